"""What every training recipe does before its loop."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.scheduler import PolyLRScheduler
from torch import nn
from transformers import PreTrainedModel, UperNetForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

from hf_seg.arguments import HubSettings, RecipeArguments, check_same_recipe, dump_recipe
from hf_seg.errors import UserError
from hf_seg.hub.push import check_login
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.training.checkpoints import find_checkpoint
from hf_seg.training.optimization import build_optimizer, build_schedule
from hf_seg.training.run_log import check_tracker


def open_run(args: RecipeArguments) -> tuple[Accelerator, Path | None]:
    """Start the accelerator and the log, find the checkpoint to resume from, and write `recipe.yaml`.

    Raises:
        UserError: the output folder holds another run, or the settings do not fit this machine.
    """
    check_tracker(args.report_to)
    has_fp16 = args.mixed_precision != "fp16" or torch.accelerator.is_available()
    args.require("mixed_precision", has_fp16, "no or bf16 on a CPU")
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=output_dir / "tracker",
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    disable_progress_bar()
    require_login(args, accelerator)

    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if checkpoint is not None:
        check_same_recipe(args, checkpoint.parent.parent / "recipe.yaml")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "recipe.yaml").write_text(dump_recipe(args), encoding="utf-8")
    return accelerator, checkpoint


def require_login(args: HubSettings, accelerator: Accelerator) -> None:
    """Make sure that what a recipe makes can be pushed, if it is to be; only the main process asks the Hub.

    Raises:
        UserError: in every process, so that none waits for another.
    """
    if not args.push_to_hub or args.hub_model_id is None:
        return
    for client in ("httpx", "httpx2"):  # of the Hub, by its version
        logging.getLogger(client).setLevel(logging.WARNING)  # or each request is a line
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            check_login(args.hub_model_id)
        except UserError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def build_network(args: RecipeArguments, accelerator: Accelerator) -> SegmentationNetwork:
    """Build the network that is trained, ready for several processes."""
    model = build_model(args.model_name_or_path, crop_size=args.crop_size, from_scratch=args.from_scratch)
    network = SegmentationNetwork(model)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if isinstance(model, UperNetForSemanticSegmentation):  # BatchNorm of its 1 x 1 pooling branch
        args.require("per_device_train_batch_size", args.per_device_train_batch_size > 1, "at least 2 for UperNet")
    return network


def build_optimization(model: PreTrainedModel, args: RecipeArguments) -> tuple[torch.optim.AdamW, PolyLRScheduler]:
    """Build optimizer and schedule; the schedule is not for `accelerator.prepare`."""
    optimizer = build_optimizer(
        model,
        learning_rate=args.learning_rate,
        head_lr_multiplier=args.head_lr_multiplier,
        weight_decay=args.weight_decay,
    )
    steps = {"max_train_steps": args.max_train_steps, "warmup_steps": args.warmup_steps}
    return optimizer, build_schedule(optimizer, **steps, power=args.lr_power)


def window_settings(args: RecipeArguments) -> dict[str, Any]:
    """Return the sliding window that fits the crop."""
    stride = max(1, round(args.eval_stride * args.crop_size))
    return {"window": args.crop_size, "stride": stride, "batch_size": args.eval_batch_size}
