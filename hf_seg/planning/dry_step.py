"""One training step without its arithmetic: what it keeps in memory, computes and moves.

The networks of the recipe are built on torch's meta device and run forward and backward on fake tensors
(`FakeTensorMode`), which have shapes and lifetimes but no values. So any batch and crop takes seconds and no memory,
and no weights are needed. `LiveBytes` counts the tensors, `FlopCounterMode` the arithmetic of the forward pass.

    peak = parameters, buffers and AdamW's two averages (in stage 1 also the teacher)
         + the larger of: the most that lives during forward and backward;
                          what lives after the forward pass, and the most that the losses need

The losses depend on values (sorting, classes present), so they run for real on a small image; their need is
proportional to the pixels. Gradients appear during the backward pass; later micro-batches of
a step, and stage 1's second backward, find them in place. Everything but parameters is linear in the batch: two batches
give the line. Several processes add one copy of the gradients, the buckets of DistributedDataParallel.

Not counted: workspaces inside operations (cuDNN, oneDNN), fragmentation, the CUDA context; `devices` has a reserve.
"""

import contextlib
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.adaptation.pseudo_labels import weigh_pseudo_labels
from hf_seg.arguments import RecipeArguments, Stage1Arguments, Stage2Arguments, result_settings
from hf_seg.errors import UserError
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.losses import cross_entropy, noise_robust_loss
from hf_seg.models import SegmentationLogits, SegmentationNetwork, build_model
from hf_seg.planning.live_bytes import LiveBytes
from hf_seg.settings import dump_yaml

_LOSS_SIDE = 256  # pixels of the image that measures the losses
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # torch has the CUDA ones


_measured: dict[tuple[type, bool, str], "StepNeeds"] = {}


class Line(NamedTuple):
    """A quantity that is linear in the batch."""

    constant: float
    per_image: float

    def at(self, batch: int) -> float:
        """Return its value."""
        return self.constant + self.per_image * batch


class StepNeeds(NamedTuple):
    """What one micro-batch of a step needs.

    Attributes:
        parameters: of the student.
        static: bytes of weights, buffers and optimizer.
        gradients: bytes.
        above: bytes at the peak above `static`, of the first micro-batch.
        kept_gradients: bytes that later micro-batches find in place.
        flops: of forward and backward, per image.
        moved: bytes read and written by operations whose time is that of the memory.
        smallest_batch: per process.
        streams_two_images: an image of the source and one of the target.
    """

    parameters: int
    static: float
    gradients: float
    above: Line
    kept_gradients: float
    flops: float
    moved: Line
    smallest_batch: int
    streams_two_images: bool

    def peak(self, batch: int, *, accumulation: int = 1, processes: int = 1) -> float:
        """Return the bytes of tensors at the peak of a process."""
        kept = self.kept_gradients if accumulation > 1 else 0
        return self.static + self.above.at(batch) + kept + (self.gradients if processes > 1 else 0)


def measure_step(args: RecipeArguments, *, gradient_checkpointing: bool) -> StepNeeds:
    """Run the step of a recipe on fake tensors, at two batches; what was run is remembered.

    Raises:
        UserError: a model that is not known without a download or does not fit the crop, or LoRA.
    """
    if args.lora_rank:
        raise UserError(f"lora_rank {args.lora_rank} cannot be planned: adapters need their weights; plan lora_rank 0")
    spread = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    settings = {key: value for key, value in result_settings(args).items() if key not in spread}
    key = (type(args), gradient_checkpointing, dump_yaml(settings))
    if key not in _measured:
        _measured[key] = _measure(args, gradient_checkpointing)
    return _measured[key]


def _measure(args: RecipeArguments, gradient_checkpointing: bool) -> StepNeeds:
    with torch.device("meta"):
        model = build_model(
            args.model_name_or_path, crop_size=args.crop_size, from_scratch=True, head_width=args.head_width
        )
        student = SegmentationNetwork(model)
    teacher = None
    if isinstance(args, Stage1Arguments) and _is_adapted(args):
        teacher = MeanTeacher(student, batch_norm=args.teacher_batch_norm)
    if gradient_checkpointing:
        student.enable_gradient_checkpointing()
    mode = FakeTensorMode()
    for network in (student, teacher):
        if network is not None:
            _make_fake(network, mode)
    student.train()
    smallest = 2 if getattr(model, "auxiliary_head", None) is not None else 1  # BatchNorm of UperNet's 1 x 1 pooling
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    copies = 2 if teacher is not None or (isinstance(args, Stage2Arguments) and args.ema_decay) else 1
    static = copies * _bytes_of(student) + 8 * trained
    loss = _loss_bytes(args, has_auxiliary=smallest == 2)
    found = []
    for batch in (2, 4):
        with mode:
            found.append(_run(student, teacher, args, batch, loss * batch * args.crop_size**2))
    above, forward, teachers, moved = (_line(*pair) for pair in zip(*found, strict=True))
    factor = 4 if gradient_checkpointing else 3  # the backward pass computes twice as much as the forward pass
    return StepNeeds(
        parameters=sum(each.numel() for each in student.parameters()),
        static=static,
        gradients=4 * trained,
        above=above,
        kept_gradients=0 if _is_adapted(args) else 4 * trained,  # stage 1's second backward has them in any case
        flops=forward.per_image * factor + teachers.per_image,
        moved=moved,
        smallest_batch=smallest,
        streams_two_images=_is_adapted(args),
    )


def _is_adapted(args: RecipeArguments) -> bool:
    return isinstance(args, Stage1Arguments) and args.method == "dacs"


def _line(two: float, four: float) -> Line:
    return Line(2 * two - four, (four - two) / 2)


def _bytes_of(network: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*network.parameters(), *network.buffers()))


def _make_fake(network: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a network on the meta device by fake ones of the CPU."""

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(fake(value), requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _run(
    student: SegmentationNetwork, teacher: MeanTeacher | None, args: RecipeArguments, batch: int, loss_bytes: float
) -> tuple[float, float, float, float]:
    """Return the peak, the FLOPs of the student's and the teacher's forward passes, and the bytes moved."""
    student.zero_grad()
    counted: dict[str, float] = {"student": 0, "teacher": 0}
    highest = 0.0
    with LiveBytes() as live:
        batches = [_fake_batch(args, batch) for _ in range(1 if teacher is None else 2)]
        for number, (pixels, _) in enumerate(batches):
            if teacher is not None and number == 1:
                with _counting(counted, "teacher"), _autocast(args):
                    logits = teacher(pixels).logits
                weigh_pseudo_labels(logits)
                del logits
                pixels = torch.where(pixels > 0, batches[0][0], pixels)  # mixed
            with _counting(counted, "student"), _autocast(args):
                outputs = student(pixels)
            auxiliary = outputs.auxiliary_logits
            outputs = SegmentationLogits(outputs.logits.float(), None if auxiliary is None else auxiliary.float())
            del auxiliary
            highest = max(highest, live.now + loss_bytes)
            torch.stack([each.sum() for each in outputs if each is not None]).sum().backward()
            del outputs
    return max(highest, live.peak), counted["student"], counted["teacher"], float(live.moved)


def _fake_batch(args: RecipeArguments, batch: int) -> tuple[Tensor, Tensor]:
    side = args.crop_size
    return torch.empty(batch, 3, side, side), torch.empty(batch, side, side, dtype=torch.int64)


def _autocast(args: RecipeArguments) -> torch.autocast:
    dtype = _AMP.get(args.mixed_precision, torch.bfloat16)
    return torch.autocast("cpu", dtype=dtype, enabled=args.mixed_precision != "no")


@contextlib.contextmanager
def _counting(counted: dict[str, float], name: str) -> Iterator[None]:
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        yield
    counted[name] += counter.get_total_flops()


def _loss_bytes(args: RecipeArguments, *, has_auxiliary: bool) -> float:
    """Run the losses of a stage on a small image and return the bytes per pixel at their peak, above the logits."""
    side, classes = _LOSS_SIDE, OPEN_EARTH_MAP.num_labels
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, classes, (1, side, side), generator=generator)
    outputs = [
        torch.randn(1, classes, side, side, generator=generator).requires_grad_() for _ in range(1 + has_auxiliary)
    ]
    tracemalloc.start()
    with _LiveBytesAndArrays() as live:
        losses = [_loss(args, each, labels) for each in outputs]
        torch.stack(losses).sum().backward()
    tracemalloc.stop()
    return live.peak / side**2


class _LiveBytesAndArrays(LiveBytes):
    """Counts numpy's arrays too: their most since the last operation of torch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.peak = max(self.peak, self.now + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        return super().__torch_dispatch__(func, types, args, kwargs)


def _loss(args: RecipeArguments, logits: Tensor, labels: Tensor) -> Tensor:
    if isinstance(args, Stage2Arguments):
        names = ("ce_weight", "rce_weight", "lovasz_weight", "gce_q", "lovasz_stride")
        return noise_robust_loss(logits, labels, **{name: getattr(args, name) for name in names})["loss"]
    weights: Any = torch.ones(labels.shape) if _is_adapted(args) else None
    return cross_entropy(logits, labels, weights=weights)
