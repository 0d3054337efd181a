"""Stage 1: teach an optical network from labelled source images and adapt it to unlabelled target images (DACS).

    accelerate launch recipes/stage1.py --config recipes/configs/stage1/segformer_b3.yaml \\
        --source_dir data/OpenEarthMap_wo_xBD --data_dir data/dfc25_track1 --output_dir runs/stage1_b3

Some source images are aligned in resolution (RAA). The teacher, an average of the student, labels the target; half of
each source image's classes are pasted onto a target image, and the student learns both. `--method source_only` and
`--raa_prob 0` are the baselines. A killed run goes on with `--resume_from_checkpoint latest`.

The teacher is at the root of the output folder, the student in `student/`. Both are scored on the source's validation
split, and then on the target's if it has images and labels; `best/` is the best teacher by the last of these.
"""

import contextlib
import itertools
import logging
import sys
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
from hf_seg.arguments import Stage1Arguments
from hf_seg.data.dataloaders import (
    AugmentedStream,
    LabelledImages,
    UnlabelledImages,
    seed_at,
    stream_seed,
    train_dataloader,
)
from hf_seg.data.open_earth_map import load_open_earth_map, load_open_earth_map_sar, scan_open_earth_map_sar
from hf_seg.data.transforms import ResolutionAlignment, optical_transform
from hf_seg.errors import one_line_errors
from hf_seg.hub.push import publish
from hf_seg.labels import CLASS_NAMES, IGNORE_INDEX
from hf_seg.losses import cross_entropy
from hf_seg.models import SegmentationLogits
from hf_seg.report.mix_panel import plot_mix_panel
from hf_seg.report.plots import plot_curves
from hf_seg.settings import parse_arguments
from hf_seg.training.checkpoints import Progress, StopSignal, load_checkpoint, save_checkpoint
from hf_seg.training.evaluation import draw_results
from hf_seg.training.run_log import RunLog
from hf_seg.training.setup import build_network, build_optimization, open_run, window_settings
from hf_seg.training.teacher_student import evaluate_both, export_both, mean_ious

SOURCE_STREAM, TARGET_STREAM, MIX_STREAM = 0, 1, 2  # of randomness, none follows another


def main(argv: list[str] | None = None) -> None:
    """Train, validate, export."""
    args = parse_arguments(Stage1Arguments, argv)
    output_dir = Path(args.output_dir)
    accelerator, checkpoint = open_run(args)

    source_images, target_images, val_images = load_images(args, accelerator)
    set_seed(args.seed)
    network = build_network(args, accelerator)
    optimizer, schedule = build_optimization(network.model, args)
    teacher = MeanTeacher(network, args.ema_decay)  # before the student is wrapped
    network, optimizer = accelerator.prepare(network, optimizer)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    networks = {"student": accelerator.unwrap_model(network), "teacher": teacher.model}
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    progress = Progress() if checkpoint is None else load_checkpoint(accelerator, checkpoint)

    source_loader = load_stream(source_images, SOURCE_STREAM, progress, args, accelerator)
    target_loader: Any = itertools.repeat(None)
    if args.method == "dacs":
        target_loader = load_stream(target_images, TARGET_STREAM, progress, args, accelerator)
    to_device = partial(send_to_device, device=accelerator.device, non_blocking=True)
    mix_seed, batch_size = stream_seed(args.seed, MIX_STREAM), args.per_device_train_batch_size
    images_per_pass = batch_size * accelerator.num_processes
    accelerator.print(
        f"steps {progress.step} to {args.max_train_steps}: {images_per_pass * args.gradient_accumulation_steps} of "
        f"{len(source_images)} source and of {len(target_images)} target images a step on "
        f"{accelerator.num_processes} process(es), {accelerator.device}"
    )

    scores: dict[str, Any] | None = None
    stop = StopSignal(accelerator)
    log, watch = RunLog(accelerator, args, progress.step), CollapseWatch()
    network.train()
    for source, target in zip(source_loader, target_loader, strict=False):
        schedule.step_update(progress.step)
        position = progress.samples_seen + accelerator.process_index * batch_size
        generators = [torch.Generator().manual_seed(seed_at(mix_seed, position + i)) for i in range(batch_size)]
        class_masks = torch.stack([sample_class_mask(*pair) for pair in zip(source["labels"], generators, strict=True)])
        source, class_masks = to_device((source, class_masks))
        with accelerator.accumulate(network):
            # with a second backward to come, gradients synchronise there
            with contextlib.nullcontext() if target is None else accelerator.no_sync(network):
                source_loss = segmentation_loss(network(source["pixel_values"]), source["labels"], args)
                accelerator.backward(source_loss)
            losses = {"loss": source_loss.detach(), "source_loss": source_loss.detach()}

            if target is not None:
                target = to_device(target)
                has_ground = target["labels"] != IGNORE_INDEX
                pseudo_labels, weights = weigh_pseudo_labels(
                    teacher(target["pixel_values"]).logits,
                    args.confidence_threshold,
                    valid=has_ground,
                    keep_background=args.keep_background,
                )
                mixed = mix_domains(source, target, class_masks, pseudo_labels, weights)
                mixed["pixel_values"] = strong_augment(
                    mixed["pixel_values"],
                    generators,
                    jitter_prob=args.strong_jitter_prob,
                    blur_prob=args.strong_blur_prob,
                )
                outputs = network(mixed["pixel_values"])
                target_loss = segmentation_loss(outputs, mixed["labels"], args, weights=mixed["weights"])
                accelerator.backward(target_loss)
                losses["loss"] = losses["loss"] + target_loss.detach()
                losses |= {"target_loss": target_loss.detach(), **describe_pseudo_labels(pseudo_labels, weights)}

            log.require_finite(losses["loss"], progress.step + 1, source["image_id"])
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        progress.samples_seen += images_per_pass
        log.add(losses, images_per_pass)
        if not accelerator.sync_gradients:
            continue

        teacher.update(networks["student"])
        if accelerator.num_processes > 1:  # running statistics are each process's own; those of the first count
            broadcast(list(teacher.model.buffers()))
        progress.step += 1
        means = log.end_step(progress.step, learning_rate=optimizer.param_groups[0]["lr"])
        if means is not None and target is not None:
            shares = [means[f"pseudo_share_{name}"] for name in CLASS_NAMES]
            if (warning := watch.update(shares, means["mean_weight"])) is not None:
                logging.warning("step %d: %s", progress.step, warning)
        if target is not None and args.panel_steps and progress.step % args.panel_steps == 0:
            path = output_dir / "figures" / "mixes" / f"step_{progress.step:08d}.png"
            if accelerator.is_main_process:
                plot_mix_panel(path, source, target, class_masks, mixed, outputs.logits.argmax(1), weights)
        is_last = progress.step == args.max_train_steps
        scores = None
        if val_images and (is_last or progress.step % args.eval_steps == 0):
            scores = evaluate_both(networks, val_images, accelerator, args)
            log.write({"step": progress.step, **mean_ious(scores)})
            mean_iou = scores["teacher"][list(val_images)[-1]]["mean_iou"]
            if progress.best_mean_iou is None or mean_iou > progress.best_mean_iou:
                progress.best_mean_iou = mean_iou
                export_both(networks, output_dir / "best", scores, args, progress.step, accelerator)
            log.restart_clock()
        signal = stop.received()
        if signal or is_last or (args.checkpointing_steps and progress.step % args.checkpointing_steps == 0):
            saved = save_checkpoint(accelerator, output_dir, progress, args.save_total_limit)
        if signal and not is_last:
            log.close()
            accelerator.end_training()
            accelerator.print(f"{signal.name}: saved {saved}; go on with --resume_from_checkpoint latest")
            sys.exit(128 + signal)
    stop.restore()
    log.close()

    if scores is None and val_images:  # resumed after the last step
        scores = evaluate_both(networks, val_images, accelerator, args)
    export_both(networks, output_dir, scores, args, progress.step, accelerator)
    if accelerator.is_main_process:
        plot_curves(output_dir / "metrics.jsonl", output_dir / "figures" / "curves.png")
        for domain, results in ({} if scores is None else scores["teacher"]).items():
            figures = output_dir / "figures" / domain
            settings = {**window_settings(args), "image_title": "optical"}
            draw_results(teacher.model, val_images[domain], results, figures, accelerator, **settings)
        print(f"teacher, student, results and figures: {output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # nobody waits for the Hub
        publish(output_dir, args)


def load_images(
    args: Stage1Arguments, accelerator: Accelerator
) -> tuple[LabelledImages, UnlabelledImages, dict[str, LabelledImages]]:
    """Load labelled source images, target images, and what validates: source, and target if it has both."""
    with accelerator.main_process_first():  # the first process checks and indexes the files, the others find the index
        source_rows = load_open_earth_map(args.source_dir, "train")
        source = LabelledImages(source_rows, "image", keep_background=args.keep_background)
        target = UnlabelledImages(load_open_earth_map_sar(args.data_dir, "train"), "optical")
        if not args.eval_steps:
            return source, target, {}
        val = {"source": LabelledImages(load_open_earth_map(args.source_dir, "val"), "image")}
        target_rows = scan_open_earth_map_sar(args.data_dir).rows["val"]
        if target_rows and all(row.files["optical"] and row.files["label"] for row in target_rows):
            val["target"] = LabelledImages(load_open_earth_map_sar(args.data_dir, "val"), "optical")
    return source, target, val


def load_stream(
    images: LabelledImages | UnlabelledImages,
    stream: int,
    progress: Progress,
    args: Stage1Arguments,
    accelerator: Accelerator,
) -> Any:
    """Load what is left of a stream: the source augmented, the target as the teacher sees it, only cut and turned."""
    is_source = stream == SOURCE_STREAM
    alignment = ResolutionAlignment((args.raa_min_scale, args.raa_max_scale), args.raa_max_upscale, p=args.raa_prob)
    transform = optical_transform(
        args.crop_size,
        scale_range=(args.min_scale, args.max_scale),
        max_class_share=args.max_class_share if is_source else 1.0,
        resolution_alignment=alignment if is_source else None,
        jitter_prob=args.jitter_prob if is_source else 0.0,
    )
    images_per_step = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    return train_dataloader(
        AugmentedStream(images, transform, stream_seed(args.seed, stream)),
        start=progress.samples_seen,
        stop=progress.samples_seen + (args.max_train_steps - progress.step) * images_per_step,
        batch_size=args.per_device_train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
    )


def segmentation_loss(
    outputs: SegmentationLogits, labels: Tensor, args: Stage1Arguments, *, weights: Tensor | None = None
) -> Tensor:
    """Return the cross entropy, the auxiliary head's included."""
    loss = cross_entropy(outputs.logits, labels, weights=weights)
    if outputs.auxiliary_logits is not None:
        loss = loss + args.auxiliary_weight * cross_entropy(outputs.auxiliary_logits, labels, weights=weights)
    return loss


if __name__ == "__main__":
    with one_line_errors():
        main()
