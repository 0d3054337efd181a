"""What the recipes do before and after their work."""

import logging
from pathlib import Path
from typing import Any

import albumentations as A
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.scheduler import PolyLRScheduler
from transformers import PreTrainedModel, UperNetForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

from hf_seg.arguments import HubSettings, RecipeArguments, check_same_recipe
from hf_seg.data.dataloaders import AugmentedStream, StreamLoader, train_dataloader
from hf_seg.data.rare_classes import RareClassSampling, class_pixels
from hf_seg.data.samples import LabelledImages, UnlabelledImages
from hf_seg.errors import UserError
from hf_seg.hub.push import check_login, publish
from hf_seg.labels import LabelSet
from hf_seg.models import SegmentationNetwork, build_model, synchronize_batch_norm
from hf_seg.normalization import Normalization
from hf_seg.report.plots import plot_curves
from hf_seg.training.checkpoints import Progress, find_checkpoint
from hf_seg.training.optimization import build_optimizer, build_schedule
from hf_seg.training.run_log import check_tracker


def start_accelerator(args: HubSettings, mixed_precision: str, **options: Any) -> Accelerator:
    """Start the accelerator and the console's log.

    Raises:
        UserError: settings that do not fit this machine, or a Hub that would refuse the push.
    """
    has_fp16 = mixed_precision != "fp16" or torch.accelerator.is_available()
    args.require("mixed_precision", has_fp16, "no or bf16 on a CPU")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=mixed_precision, **options)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    disable_progress_bar()
    _require_login(args, accelerator)
    return accelerator


def open_run(args: RecipeArguments) -> tuple[Accelerator, Path | None]:
    """Start the accelerator and find the checkpoint to resume from; nothing is written yet.

    Raises:
        UserError: the output folder contains another run, or the settings do not fit this machine.
    """
    check_tracker(args.report_to)
    output_dir = Path(args.output_dir)
    accelerator = start_accelerator(
        args,
        args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output_dir / "tracker",
    )
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_same_recipe(args, checkpoint.parent.parent / "recipe.yaml")
    accelerator.wait_for_everyone()
    return accelerator, checkpoint


def finish_run(accelerator: Accelerator, args: RecipeArguments) -> None:
    """Draw the curves of a run whose models are exported, end the tracker, and `publish` the folder.

    To be called by every process, last of all.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        plot_curves(output_dir / "metrics.jsonl", output_dir / "figures" / "curves.png")
        print(f"models, results and figures: {output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # the other processes need not wait for the Hub
        publish(output_dir, args)


def _require_login(args: HubSettings, accelerator: Accelerator) -> None:
    """Make sure that a push will be accepted; only the main process asks the Hub, and all raise what it found."""
    if not args.push_to_hub or args.hub_model_id is None:
        return
    for client in ("httpx", "httpx2"):  # of the Hub, by its version
        logging.getLogger(client).setLevel(logging.WARNING)  # or each request is a line
    problems = [""]
    if accelerator.is_main_process:
        try:
            check_login(args.hub_model_id)
        except UserError as error:
            problems = [str(error)]
    if problem := broadcast_object_list(problems)[0]:
        raise UserError(problem)


def build_network(args: RecipeArguments, accelerator: Accelerator, label_set: LabelSet) -> SegmentationNetwork:
    """Build the network that is trained, ready for several processes."""
    model = build_model(
        args.model_name_or_path,
        crop_size=args.crop_size,
        from_scratch=args.from_scratch,
        head_width=args.head_width,
        label_set=label_set,
    )
    network = SegmentationNetwork(model)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return synchronize_batch_norm(network)
    if isinstance(model, UperNetForSemanticSegmentation):  # BatchNorm of its 1 x 1 pooling branch
        args.require("per_device_train_batch_size", args.per_device_train_batch_size > 1, "at least 2 for UperNet")
    return network


def load_stream(
    images: LabelledImages | UnlabelledImages,
    transform: A.Compose,
    seed: int,
    progress: Progress,
    args: RecipeArguments,
    accelerator: Accelerator,
    normalization: Normalization,
) -> StreamLoader:
    """Load this process's part of what is left of a training stream; tiles are cached as far as the budget goes.

    Args:
        images: labelled ones are drawn by class if `args.rare_class_temperature` is not 0.
        transform: augmentation.
        seed: of the order and the augmentation.
        normalization: of the network's input.
    """
    show_progress = accelerator.is_main_process
    images.cache(args.cache_gib, progress=show_progress)
    sampling = None
    if args.rare_class_temperature and isinstance(images, LabelledImages):
        sampling = RareClassSampling(class_pixels(images, progress=show_progress), args.rare_class_temperature)
    images_per_step = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    return train_dataloader(
        AugmentedStream(images, transform, seed, sampling=sampling, normalization=normalization),
        start=progress.samples_seen,
        stop=progress.samples_seen + (args.max_train_steps - progress.step) * images_per_step,
        batch_size=args.per_device_train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
    )


def build_optimization(model: PreTrainedModel, args: RecipeArguments) -> tuple[torch.optim.AdamW, PolyLRScheduler]:
    """Build optimizer and schedule; the schedule is not for `accelerator.prepare`."""
    optimizer = build_optimizer(model, args)
    return optimizer, build_schedule(optimizer, args)
