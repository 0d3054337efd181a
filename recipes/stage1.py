"""Stage 1: teach an optical network from labelled source images and adapt it to unlabelled target images (DACS).

    accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml recipes/stage1.py \\
        --config recipes/configs/stage1/segformer_b3.yaml --source_dir data/OpenEarthMap_wo_xBD \\
        --data_dir data/dfc25_track1 --output_dir runs/stage1_b3

Some source images are aligned in resolution (RAA). The teacher, an average of the student, labels the target; half of
each source image's classes are pasted onto a target image, and the student learns both. `--method source_only` and
`--raa_prob 0` are the baselines. A stopped or killed run resumes with `--resume_from_checkpoint latest`.

The teacher is at the root of the output folder, the student in `student/`. Both are scored on the source's validation
split, and on the target's if it has images and labels. `best/` is chosen by the source's score (`--select_best_by`), so
that no label of the target is used.
"""

from hf_seg.arguments import TRAINING_MEMORY_HINT, Stage1Arguments, write_recipe
from hf_seg.settings import answer_help, parse_arguments

if __name__ == "__main__":
    answer_help(Stage1Arguments)  # before the slow imports

import contextlib
import itertools
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device, set_seed
from torch import Tensor

from hf_seg.adaptation.class_mix import mix_domains, sample_class_mask
from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.adaptation.pseudo_labels import CollapseWatch, describe_pseudo_labels, weigh_pseudo_labels
from hf_seg.adaptation.strong_augmentation import strong_augment
from hf_seg.data.band_images import BandStatistics
from hf_seg.data.dataloaders import seed_at, stream_seed
from hf_seg.data.open_earth_map import has_labelled_images, load_open_earth_map, load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set
from hf_seg.data.samples import LabelledImages, UnlabelledImages
from hf_seg.data.transforms import ResolutionAlignment, optical_transform
from hf_seg.errors import UserError, one_line_errors
from hf_seg.losses import cross_entropy
from hf_seg.models import SegmentationLogits
from hf_seg.normalization import Normalization
from hf_seg.report.panels import plot_mix_panel
from hf_seg.training.checkpoints import Progress, StopSignal, load_checkpoint, save_or_stop
from hf_seg.training.evaluation import draw_results, trained_predictor
from hf_seg.training.optimization import clip_gradient
from hf_seg.training.run import build_network, build_optimization, find_bands, finish_run, load_stream, open_run
from hf_seg.training.run_log import RunLog
from hf_seg.training.teacher_student import evaluate_both, export_both, mean_ious

SOURCE_STREAM, TARGET_STREAM, MIX_STREAM = 0, 1, 2  # ids of independent random streams


def main(argv: list[str] | None = None) -> None:
    """Train, validate, export."""
    args = parse_arguments(Stage1Arguments, argv)
    with open_run(args) as (accelerator, checkpoint):
        train(args, accelerator, checkpoint)


def train(args: Stage1Arguments, accelerator: Accelerator, checkpoint: Path | None) -> None:
    """Train from the beginning or from a checkpoint, validate, export."""
    output_dir = Path(args.output_dir)

    # Data, student, teacher, optimizer
    source_images, target_images, val_images, statistics = load_images(args, accelerator)
    label_set = source_images.label_set
    set_seed(args.seed)
    student = build_network(args, accelerator, label_set, statistics)
    optimizer, schedule = build_optimization(student.model, args)
    teacher = MeanTeacher(student, args.ema_decay, batch_norm=args.teacher_batch_norm)  # before the student is wrapped
    student, optimizer = accelerator.prepare(student, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    networks = {"student": accelerator.unwrap_model(student), "teacher": teacher.model}
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    progress = Progress() if checkpoint is None else load_checkpoint(accelerator, checkpoint, seed=args.seed)

    uses_target = args.method == "dacs"
    how = (progress, args, accelerator, networks["student"].normalization)
    source_loader = load_domain(source_images, SOURCE_STREAM, *how)
    target_loader: Any = itertools.repeat({})
    if uses_target:
        target_loader = load_domain(target_images, TARGET_STREAM, *how)
    to_device = partial(send_to_device, device=accelerator.device, non_blocking=True)
    mix_seed, batch_size = stream_seed(args.seed, MIX_STREAM), args.per_device_train_batch_size
    images_per_pass = batch_size * accelerator.num_processes
    accelerator.print(
        f"{'from the beginning' if checkpoint is None else f'resumed from {checkpoint.name}'}: "
        f"steps {progress.step} to {args.max_train_steps}, {images_per_pass * args.gradient_accumulation_steps} of "
        f"{len(source_images)} source and of {len(target_images)} target images a step on "
        f"{accelerator.num_processes} process(es), {accelerator.device}"
    )

    if accelerator.is_main_process:
        write_recipe(args, output_dir)
    scores: dict[str, Any] | None = None
    stop, log = StopSignal(accelerator), RunLog(accelerator, args, progress.step)
    watch = CollapseWatch(label_set=label_set)
    student.train()
    for source, target in zip(source_loader, target_loader, strict=False):
        schedule.step_update(progress.step)
        source_labels = source["labels"]  # on the CPU, where class masks are drawn
        source, target = to_device((source, target))
        with accelerator.accumulate(student):
            # Source: the student learns labelled images (with a second backward to come, gradients synchronise there)
            with accelerator.no_sync(student) if uses_target else contextlib.nullcontext():
                source_loss = segmentation_loss(student(source["pixel_values"]), source["labels"], args)
                accelerator.backward(source_loss)
            losses = {"loss": source_loss.detach(), "source_loss": source_loss.detach()}

            if uses_target:
                # Target: the teacher labels it, each image weighted by its share of confident pixels
                pseudo_labels, weights = weigh_pseudo_labels(
                    teacher(target["pixel_values"]).logits,
                    args.confidence_threshold,
                    valid=target["valid_mask"],
                    keep_background=args.keep_background,
                )

                # Mix: half of each source image's classes are pasted onto a target image, then augmented strongly
                position = progress.samples_seen + accelerator.process_index * batch_size
                generators = [torch.Generator().manual_seed(seed_at(mix_seed, position + i)) for i in range(batch_size)]
                masks = [sample_class_mask(*pair) for pair in zip(source_labels, generators, strict=True)]
                class_masks = to_device(torch.stack(masks))
                mixed = mix_domains(source, target, class_masks, pseudo_labels, weights)
                mixed["pixel_values"] = strong_augment(
                    mixed["pixel_values"],
                    generators,
                    normalization=networks["student"].normalization,
                    jitter_prob=args.strong_jitter_prob,
                    blur_prob=args.strong_blur_prob,
                )

                # The student learns the mixed images
                outputs = student(mixed["pixel_values"])
                target_loss = segmentation_loss(outputs, mixed["labels"], args, weights=mixed["weights"])
                accelerator.backward(target_loss)
                losses["loss"] = losses["loss"] + target_loss.detach()
                losses["target_loss"] = target_loss.detach()
                losses |= describe_pseudo_labels(pseudo_labels, weights, label_set)

            # One optimizer step for both losses
            log.require_finite(losses["loss"], progress.step + 1, source["image_id"])
            if accelerator.sync_gradients:
                norm = clip_gradient(accelerator, student.parameters(), args.max_grad_norm)
                log.require_finite_gradient(norm, progress.step + 1)
            optimizer.step()
            optimizer.zero_grad()
        progress.samples_seen += images_per_pass
        log.add(losses, images_per_pass)
        if not accelerator.sync_gradients:
            continue

        # The teacher follows the student
        teacher.update(networks["student"])
        if accelerator.num_processes > 1:  # running statistics are each process's own; those of the first count
            broadcast(list(teacher.model.buffers()))

        # Log, and watch for collapse
        progress.step += 1
        means = log.end_step(progress.step, learning_rate=optimizer.param_groups[0]["lr"])
        if uses_target and means is not None:
            progress.mean_weight = means["mean_weight"]
            shares = [means[f"pseudo_share_{name}"] for name in label_set.names]
            if (warning := watch.update(shares, progress.mean_weight)) is not None:
                logging.warning("step %d: %s", progress.step, warning)
        is_panel_due = uses_target and args.panel_steps > 0 and progress.step % args.panel_steps == 0
        if is_panel_due and accelerator.is_main_process:
            path = output_dir / "figures" / "mixes" / f"step_{progress.step:08d}.png"
            shown = source, target, class_masks, mixed, outputs.logits.argmax(1), weights, how[-1]
            plot_mix_panel(path, *shown, label_set=label_set)

        # Validate (all ranks), keep the best
        is_last = progress.step == args.max_train_steps
        scores = None
        if val_images and (is_last or progress.step % args.eval_steps == 0):
            scores = evaluate_both(networks, val_images, accelerator, args)
            log.write({"step": progress.step, **mean_ious(scores)})
            score = selection_score(scores, progress, args)
            if score is not None and (progress.best_score is None or score > progress.best_score):
                progress.best_score = score
                export_both(networks, output_dir / "best", scores, args, progress.step, accelerator)
            log.restart_clock()

        # Checkpoint; a signal stops here
        save_or_stop(accelerator, progress, stop, log, args)
    stop.restore()
    log.close()

    # Export both networks, their results and figures
    if scores is None and val_images:  # resumed after the last step
        scores = evaluate_both(networks, val_images, accelerator, args)
    export_both(networks, output_dir, scores, args, progress.step, accelerator)
    if scores is not None and accelerator.is_main_process:
        predictor = trained_predictor(teacher.model, accelerator, args)
        for domain, results in scores["teacher"].items():
            titles = ("optical", "label", "teacher")
            draw_results(predictor, val_images[domain], results, output_dir / "figures" / domain, titles=titles)
    finish_run(accelerator, args)


def load_images(
    args: Stage1Arguments, accelerator: Accelerator
) -> tuple[LabelledImages, UnlabelledImages, dict[str, LabelledImages], BandStatistics | None]:
    """Load labelled source images, target images, what validates (source, and target if it has both), and the bands.

    Each domain is stretched by its own values; the network keeps those of the target.
    """
    with accelerator.main_process_first():  # the first process checks and indexes the files, the others find the index
        label_set = find_label_set(args.source_dir, "OpenEarthMap", args.label_set)
        # its label files may code the same classes by other values
        target_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set or label_set)
        source_rows = load_open_earth_map(args.source_dir, "train", label_set=label_set)
        target_rows = load_open_earth_map_sar(args.data_dir, "train", label_set=target_set)
        progress = accelerator.is_main_process
        source_bands = find_bands(args, source_rows, "image", args.source_dir, "OpenEarthMap", progress=progress)
        statistics = find_bands(args, target_rows, "optical", args.data_dir, "OpenEarthMap-SAR", progress=progress)
        of_source, of_target = (each and each.bands for each in (source_bands, statistics))
        numbers = [len(bands.names) if bands else 3 for bands in (of_source, of_target)]
        if numbers[0] != numbers[1]:
            raise UserError(f"source images have {numbers[0]} bands, target images {numbers[1]}; they must be the same")
        how: dict[str, Any] = {"bands": of_source, "label_set": label_set}
        source = LabelledImages(source_rows, "image", keep_background=args.keep_background, **how)
        target = UnlabelledImages(target_rows, "optical", bands=of_target)
        val: dict[str, LabelledImages] = {}
        if args.eval_steps:
            source_val = load_open_earth_map(args.source_dir, "val", label_set=label_set)
            val["source"] = LabelledImages(source_val, "image", **how)
            if has_labelled_images(args.data_dir, "val", "optical", target_set):
                target_val = load_open_earth_map_sar(args.data_dir, "val", label_set=target_set)
                val["target"] = LabelledImages(target_val, "optical", bands=of_target, label_set=target_set)
    by_target = args.select_best_by == "target" and args.eval_steps > 0
    args.require(
        "select_best_by", not by_target or "target" in val, "source or weight: val has no labelled optical tiles"
    )
    return source, target, val, statistics


def load_domain(
    images: LabelledImages | UnlabelledImages,
    stream: int,
    progress: Progress,
    args: Stage1Arguments,
    accelerator: Accelerator,
    normalization: Normalization,
) -> Any:
    """Load what is left of a stream: the source augmented, the target as the teacher sees it, only cut and turned."""
    is_source = stream == SOURCE_STREAM
    scales = (args.raa_min_scale, args.raa_max_scale)
    alignment = ResolutionAlignment(scales, args.raa_max_upscale, args.raa_resampling, p=args.raa_prob)
    transform = optical_transform(
        args.crop_size,
        scale_range=(args.min_scale, args.max_scale),
        max_class_share=args.max_class_share if is_source else 1.0,
        resolution_alignment=alignment if is_source else None,
        jitter_prob=args.jitter_prob if is_source else 0.0,
        is_rgb=len(normalization.mean) == 3,
    )
    return load_stream(images, transform, stream_seed(args.seed, stream), progress, args, accelerator, normalization)


def segmentation_loss(
    outputs: SegmentationLogits, labels: Tensor, args: Stage1Arguments, *, weights: Tensor | None = None
) -> Tensor:
    """Return the cross entropy, the auxiliary head's included."""
    loss = cross_entropy(outputs.logits, labels, weights=weights)
    if outputs.auxiliary_logits is not None:
        loss = loss + args.auxiliary_weight * cross_entropy(outputs.auxiliary_logits, labels, weights=weights)
    return loss


def selection_score(scores: dict[str, Any], progress: Progress, args: Stage1Arguments) -> float | None:
    """Return what chooses `best/`; None if the pseudo-labels' weight is to choose and was not logged yet."""
    if args.select_best_by == "weight":
        return progress.mean_weight
    return scores["teacher"][args.select_best_by]["mean_iou"]


if __name__ == "__main__":
    with one_line_errors(TRAINING_MEMORY_HINT):
        main()
