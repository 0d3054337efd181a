"""Choose micro-batch, accumulation and checkpointing for a memory, and predict time and cost."""

import math
from dataclasses import dataclass

from hf_seg.arguments import RecipeArguments
from hf_seg.errors import UserError
from hf_seg.planning.devices import BANDWIDTH_SHARE, LOADER_SECONDS, LOADER_WORKERS, PEAK_SHARE, Device, usable
from hf_seg.planning.dry_step import StepNeeds, measure_step


@dataclass(frozen=True)
class Plan:
    """How a recipe runs with its global batch in a given memory.

    Attributes:
        batch, accumulation, processes: their product is the images of a step.
        peak: predicted bytes of tensors of each process.
        needs: of one micro-batch.
    """

    batch: int
    accumulation: int
    processes: int
    gradient_checkpointing: bool
    peak: float
    needs: StepNeeds

    def step_seconds(self, args: RecipeArguments, device: Device) -> float:
        """Predict the time of an optimizer step: products, then other operations, then gradients between devices.

        The loader works meanwhile; if it takes longer, its time counts.
        """
        images = self.batch * self.accumulation
        peak_flops = device.single if args.mixed_precision == "no" else device.half
        computed = self.needs.flops * images / (PEAK_SHARE * peak_flops)
        moved = self.needs.moved.at(self.batch) * self.accumulation + 6 * self.needs.gradients  # AdamW
        exchanged = 2 * (self.processes - 1) / self.processes * self.needs.gradients / device.link
        streams = 2 if self.needs.streams_two_images else 1
        loaded = images * streams * LOADER_SECONDS * (args.crop_size / 1024) ** 2 / LOADER_WORKERS
        return max(computed + moved / (BANDWIDTH_SHARE * device.bandwidth) + exchanged, loaded)

    def hours(self, args: RecipeArguments, device: Device) -> float:
        """Predict the hours of all steps, without validation."""
        return self.step_seconds(args, device) * args.max_train_steps / 3600


def choose_plan(args: RecipeArguments, memory: float, processes: int = 1) -> Plan:
    """Choose the largest micro-batch that fits, without gradient checkpointing if any does.

    Args:
        args: of a recipe for one process; its images per step stay.
        memory: bytes of each device.
        processes: devices.

    Raises:
        UserError: the images of a step cannot be divided, or nothing fits; the message says what is lacking.
    """
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if total % processes:
        raise UserError(f"{total} images a step cannot be divided among {processes} processes")
    share, smallest = total // processes, math.inf
    for checkpointing in dict.fromkeys((args.gradient_checkpointing, True)):
        needs = measure_step(args, gradient_checkpointing=checkpointing)
        batches = [each for each in range(share, needs.smallest_batch - 1, -1) if share % each == 0]
        if not batches:
            raise UserError(
                f"{total} images a step leave {share} for each of {processes} processes; this network needs at least "
                f"{needs.smallest_batch}: at most {total // needs.smallest_batch} processes"
            )
        for batch in batches:
            peak = needs.peak(batch, accumulation=share // batch, processes=processes)
            smallest = min(smallest, peak)
            if peak <= usable(memory):
                return Plan(batch, share // batch, processes, checkpointing, peak, needs)
    raise UserError(
        f"nothing fits {memory / 1e9:.4g} GB, of which {max(usable(memory), 0) / 1e9:.3g} GB are for tensors: the "
        f"least is {smallest / 1e9:.3g} GB, {batches[-1]} image(s) per process with gradient checkpointing; take "
        "a larger device, or a smaller --crop_size or encoder, which is another recipe"
    )
