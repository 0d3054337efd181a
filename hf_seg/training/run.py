"""What the recipes do before and after their work."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import albumentations as A
import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.scheduler import PolyLRScheduler
from transformers import AutoConfig, PreTrainedModel, UperNetForSemanticSegmentation
from transformers.utils.logging import disable_progress_bar

from hf_seg.arguments import HubSettings, RecipeArguments, check_same_recipe, without_folders
from hf_seg.bands import Bands
from hf_seg.data.band_images import BandStatistics, measure_bands
from hf_seg.data.dataloaders import AugmentedStream, StreamLoader, train_dataloader
from hf_seg.data.provenance import read_provenance
from hf_seg.data.rare_classes import RareClassSampling, class_pixels
from hf_seg.data.samples import LabelledImages, UnlabelledImages
from hf_seg.errors import UserError
from hf_seg.files import finish_update
from hf_seg.hub.export import read_record
from hf_seg.hub.push import check_login, publish
from hf_seg.labels import LabelSet
from hf_seg.locks import exclusive
from hf_seg.lora import add_adapters, count_parameters
from hf_seg.models import SegmentationNetwork, build_model, normalization_of, synchronize_batch_norm
from hf_seg.normalization import Normalization
from hf_seg.processes import end_with_launcher
from hf_seg.report.plots import plot_curves
from hf_seg.stem import set_input_bands
from hf_seg.terminal import print_summary
from hf_seg.training.checkpoints import Progress, delete_old_checkpoints, find_checkpoint, require_same_global_batch
from hf_seg.training.hub_data import pin_datasets
from hf_seg.training.optimization import build_optimizer, build_schedule
from hf_seg.training.run_log import check_tracker


def start_accelerator(args: HubSettings, mixed_precision: str, **options: Any) -> Accelerator:
    """Start the accelerator and the console's log.

    Raises:
        UserError: settings that do not fit this machine, or a Hub that would refuse the push.
    """
    has_fp16 = mixed_precision != "fp16" or torch.accelerator.is_available()
    args.require("mixed_precision", has_fp16, "no or bf16 on a CPU")
    end_with_launcher()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=mixed_precision, **options)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    for name in ("accelerate", "httpx", "httpx2"):  # each request to the Hub would be a line
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    _require_login(args, accelerator)
    return accelerator


@contextlib.contextmanager
def open_run(args: RecipeArguments) -> Iterator[tuple[Accelerator, Path | None]]:
    """Start the accelerator and find the checkpoint to resume from; the block has the output folder for itself.

    Nothing is written yet.

    Raises:
        UserError: the output folder contains another run, or one is at work there; the settings do not fit this
            machine; a dataset on the Hub was not found.
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
    with use_folder(accelerator, output_dir):
        checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
        recipe = None if checkpoint is None else checkpoint.parent.parent / "recipe.yaml"
        if checkpoint is not None and recipe is not None:
            may_differ = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product counts
            check_same_recipe(args, recipe, may_differ=may_differ)
            require_same_global_batch(args, checkpoint, accelerator.num_processes)
        pin_datasets(args, accelerator, recipe)
        finish_update(Path(args.model_name_or_path))
        accelerator.wait_for_everyone()
        yield accelerator, checkpoint


@contextlib.contextmanager
def use_folder(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """Keep other runs out of an output folder during the block.

    To be called by every process; the first one holds the lock.

    Raises:
        UserError: another run is at work there.
    """
    with contextlib.ExitStack() as stack:
        _first_alone(accelerator, lambda: stack.enter_context(exclusive(output_dir)))
        yield


def _first_alone(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Let the main process do something; all processes raise its `UserError`."""
    problems = [""]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            problems = [str(error)]
    if problem := broadcast_object_list(problems)[0]:
        raise UserError(problem)


def finish_run(accelerator: Accelerator, args: RecipeArguments) -> None:
    """Draw the curves of a run whose models are exported, end the tracker, and `publish` the folder.

    To be called by every process, last of all.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        if (newest := find_checkpoint(output_dir, "latest")) is not None:  # a kill may have left older ones
            delete_old_checkpoints(output_dir, newest, args.save_total_limit)
        plot_curves(output_dir / "metrics.jsonl", output_dir / "figures" / "curves.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # the other processes need not wait for the Hub
        try:
            publish(output_dir, args)
        finally:  # the run is complete, although its push may have failed
            print_run(output_dir)


def print_run(output_dir: Path) -> None:
    """Tell what a finished run leaves to open, and what may follow."""
    recipe, results = (read_record(output_dir / name) for name in ("recipe.yaml", "eval_results.json"))
    scores = {key: value for key, value in results.items() if isinstance(value, int | float)}
    files = [output_dir / "README.md", *sorted(output_dir.glob("figures/**/panel.png"))]
    after = "pseudo-label" if "method" in recipe else "predict SCENE.tif MAP.tif"
    print_summary(
        "",
        {"output_dir": output_dir, **scores},
        [*files, output_dir / "figures" / "curves.png"],
        hints=[f"hf-seg {after} --model {output_dir}"],
    )


def _require_login(args: HubSettings, accelerator: Accelerator) -> None:
    """Make sure that a push will be accepted; only the main process asks the Hub, and all raise what it found."""
    repository = args.hub_model_id
    if args.push_to_hub and repository is not None:
        _first_alone(accelerator, lambda: check_login(repository))


def find_bands(
    args: RecipeArguments, rows: datasets.Dataset, column: str, data_dir: str, layout: str, *, progress: bool
) -> BandStatistics | None:
    """Find the bands of a training set: those that the model to continue from has, else measured.

    Returns:
        None for 8-bit SAR or RGB images.

    Raises:
        UserError: the model has other bands than the data.
    """
    names = (read_provenance(data_dir, layout)["bands"] or {}).get(column)
    trained = None if args.from_scratch else _trained_bands(args.model_name_or_path)
    if trained is not None and list(trained.bands.names) != names:
        has = ", ".join(names) if names else "8-bit images"
        raise UserError(
            f"{args.model_name_or_path} takes bands {', '.join(trained.bands.names)}, but {data_dir} has {has}"
        )
    return trained if names is None or trained else measure_bands(rows, column, names, progress=progress)


def _trained_bands(name: str) -> BandStatistics | None:
    """Return the bands of a trained model; None for an encoder, and for a model of 8-bit SAR or RGB images."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        bands = Bands.from_config(getattr(config, "input_bands", None))
    except Exception:  # transformers checks little, so any kind may come
        return None  # an encoder of timm or a preset; what is wrong with a model shows when it is built
    return bands and BandStatistics(bands, Normalization(tuple(config.image_mean), tuple(config.image_std)))


def build_network(
    args: RecipeArguments,
    accelerator: Accelerator,
    label_set: LabelSet,
    statistics: BandStatistics | None = None,
    *,
    native_stem: bool = False,
) -> SegmentationNetwork:
    """Build the network that is trained, ready for several processes.

    Args:
        label_set: the classes.
        statistics: of bands other than 8-bit SAR or RGB.
        native_stem: the stem takes one band, not the same band three times.
    """
    model = build_model(
        args.model_name_or_path,
        crop_size=args.crop_size,
        from_scratch=args.from_scratch,
        head_width=args.head_width,
        label_set=label_set,
    )
    _set_bands(model, statistics, native_stem, args.from_scratch)
    if args.lora_rank:
        add_adapters(
            model,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            targets=args.lora_targets,
            base=without_folders(args.model_name_or_path),
        )
        trained, total = count_parameters(model)
        accelerator.print(f"LoRA of rank {args.lora_rank}: {trained:,} of {total:,} parameters are trained")
    network = SegmentationNetwork(model)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return synchronize_batch_norm(network)
    if isinstance(model, UperNetForSemanticSegmentation):  # BatchNorm of its 1 x 1 pooling branch
        args.require("per_device_train_batch_size", args.per_device_train_batch_size > 1, "at least 2 for UperNet")
    return network


def _set_bands(
    model: PreTrainedModel, statistics: BandStatistics | None, native_stem: bool, from_scratch: bool
) -> None:
    """Fit a model's stem to the bands, unless it was trained on them."""
    if getattr(model.config, "input_bands", None) is not None:
        return
    encoder = normalization_of(model)
    bands, normalization = statistics or (None, encoder)
    names = bands.names if bands else ("band",)
    if bands is None and not native_stem:
        return
    if len(names) == 1 and not native_stem:  # the band three times
        names, normalization = names * 3, encoder
    elif bands is None:
        normalization = Normalization((sum(encoder.mean) / 3,), (sum(encoder.std) / 3,))
    set_input_bands(model, names, normalization, bands=bands, from_scratch=from_scratch)


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
