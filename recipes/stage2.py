"""Stage 2: teach a SAR network from noisy labels by CE + reverse CE + Lovász-softmax.

    accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml recipes/stage2.py \\
        --config recipes/configs/stage2/segformer_b5.yaml --data_dir data/dfc25_track1 --output_dir runs/stage2_b5

Without `--pseudo_labels` the labels are the official pseudo-labels of OpenEarthMap-SAR. A stopped or killed run resumes
with `--resume_from_checkpoint latest`. With `--ema_decay` the root of the output folder is a moving average of the
weights, `student/` the last ones. Every setting: `python recipes/stage2.py --help`.

Several processes share each global batch and average gradients. Equal to one process are cross entropy and reverse
cross entropy, where all processes see as many labelled pixels. Lovász-softmax sees the local batch only, and so does
BatchNorm on a CPU; on GPUs it is synchronised.
"""

from hf_seg.arguments import TRAINING_MEMORY_HINT, Stage2Arguments, dump_recipe, write_recipe
from hf_seg.settings import answer_help, parse_arguments

if __name__ == "__main__":
    answer_help(Stage2Arguments)  # before the slow imports

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device, set_seed
from torch import Tensor

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.data.band_images import BandStatistics
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set, read_provenance
from hf_seg.data.pseudo_label_dataset import load_pseudo_labels
from hf_seg.data.samples import LabelledImages
from hf_seg.data.transforms import sar_transform
from hf_seg.errors import one_line_errors
from hf_seg.hub.export import export_model
from hf_seg.losses import noise_robust_loss
from hf_seg.models import SegmentationLogits, SegmentationNetwork
from hf_seg.training.checkpoints import Progress, StopSignal, load_checkpoint, save_or_stop
from hf_seg.training.evaluation import draw_results, evaluate_network, trained_predictor
from hf_seg.training.optimization import clip_gradient
from hf_seg.training.run import build_network, build_optimization, find_bands, finish_run, load_stream, open_run
from hf_seg.training.run_log import RunLog


def main(argv: list[str] | None = None) -> None:
    """Train, validate, export."""
    args = parse_arguments(Stage2Arguments, argv)
    with open_run(args) as (accelerator, checkpoint):
        train(args, accelerator, checkpoint)


def train(args: Stage2Arguments, accelerator: Accelerator, checkpoint: Path | None) -> None:
    """Train from the beginning or from a checkpoint, validate, export."""
    output_dir = Path(args.output_dir)

    # Data, network, optimizer
    train_images, val_images, statistics = load_images(args, accelerator)
    set_seed(args.seed)
    label_set = train_images.label_set
    network = build_network(args, accelerator, label_set, statistics, native_stem=args.native_stem)
    optimizer, schedule = build_optimization(network.model, args)
    average = MeanTeacher(network, args.ema_decay) if args.ema_decay else None  # before the network is wrapped
    network, optimizer = accelerator.prepare(network, optimizer)
    student = exported = accelerator.unwrap_model(network)
    if average is not None:
        average = accelerator.prepare_model(average, evaluation_mode=True)
        exported = average.model
    set_seed(args.seed, device_specific=True)  # dropout differs between processes
    progress = Progress() if checkpoint is None else load_checkpoint(accelerator, checkpoint, seed=args.seed)

    transform = sar_transform(
        args.crop_size,
        scale_range=(args.min_scale, args.max_scale),
        max_class_share=args.max_class_share,
        jitter_prob=args.jitter_prob,
        jitter_gain=args.jitter_gain,
        speckle_prob=args.speckle_prob,
    )
    loader = load_stream(train_images, transform, args.seed, progress, args, accelerator, student.normalization)
    images_per_pass = args.per_device_train_batch_size * accelerator.num_processes
    accelerator.print(
        f"{'from the beginning' if checkpoint is None else f'resumed from {checkpoint.name}'}: "
        f"steps {progress.step} to {args.max_train_steps}, {images_per_pass * args.gradient_accumulation_steps} of "
        f"{len(train_images)} images a step on {accelerator.num_processes} process(es), {accelerator.device}"
    )

    if accelerator.is_main_process:
        write_recipe(args, output_dir)
    results: dict[str, Any] | None = None
    stop, log = StopSignal(accelerator), RunLog(accelerator, args, progress.step)
    network.train()
    for batch in loader:
        # Learn one micro-batch
        schedule.step_update(progress.step)
        with accelerator.accumulate(network):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            outputs = network(batch["pixel_values"])
            losses = training_loss(outputs, batch["labels"], args, weights=batch.get("weights"))
            log.require_finite(losses["loss"], progress.step + 1, batch["image_id"])
            accelerator.backward(losses["loss"])
            if accelerator.sync_gradients:
                norm = clip_gradient(accelerator, network.parameters(), args.max_grad_norm)
                log.require_finite_gradient(norm, progress.step + 1)
            optimizer.step()
            optimizer.zero_grad()
        progress.samples_seen += images_per_pass
        log.add(losses, images_per_pass)
        if not accelerator.sync_gradients:
            continue

        # The average follows (its BatchNorm statistics are those of the first process)
        if average is not None:
            average.update(student)
            if accelerator.num_processes > 1:
                broadcast(list(average.model.buffers()))

        # Log the step
        progress.step += 1
        log.end_step(progress.step, learning_rate=optimizer.param_groups[0]["lr"])

        # Validate (all ranks), keep the best
        is_last = progress.step == args.max_train_steps
        results = None
        if val_images is not None and (is_last or progress.step % args.eval_steps == 0):
            results = evaluate_network(exported, val_images, accelerator, args)
            log.write({"step": progress.step, **results})
            if progress.best_score is None or results["mean_iou"] > progress.best_score:
                progress.best_score = results["mean_iou"]
                export(exported, student, output_dir / "best", results, args, progress.step, accelerator)
            log.restart_clock()

        # Checkpoint; a signal stops here
        save_or_stop(accelerator, progress, stop, log, args)
    stop.restore()
    log.close()

    # Export the last network, its results and figures
    if results is None and val_images is not None:  # resumed after the last step
        results = evaluate_network(exported, val_images, accelerator, args)
    export(exported, student, output_dir, results, args, progress.step, accelerator)
    if results is not None and val_images is not None and accelerator.is_main_process:
        predictor = trained_predictor(exported, accelerator, args)
        draw_results(predictor, val_images, results, output_dir / "figures")
    finish_run(accelerator, args)


def load_images(
    args: Stage2Arguments, accelerator: Accelerator
) -> tuple[LabelledImages, LabelledImages | None, BandStatistics | None]:
    """Load SAR training images with their noisy labels, validation images with their manual ones, and their bands."""
    with accelerator.main_process_first():  # the first process checks and indexes the files, the others find the index
        label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set)
        columns = ["image_id", "pseudo_label"]
        if args.confidence_weights:
            columns.append("confidence")
        pseudo_labels = None
        if args.pseudo_labels is not None:
            pseudo_labels = load_pseudo_labels(args.pseudo_labels, columns, label_set=label_set)
        has_confidence = not args.confidence_weights or "confidence" in pseudo_labels.column_names
        args.require("confidence_weights", has_confidence, "false, since the pseudo-labels have no confidence")
        train_rows = load_open_earth_map_sar(args.data_dir, "train", label_set=label_set)
        val_rows = None
        if args.eval_steps:
            val_rows = load_open_earth_map_sar(args.data_dir, "val", label_set=label_set)
        progress = accelerator.is_main_process
        statistics = find_bands(args, train_rows, "sar", args.data_dir, "OpenEarthMap-SAR", progress=progress)
    how: dict[str, Any] = {"bands": statistics and statistics.bands, "label_set": label_set}
    train_images = LabelledImages(
        train_rows,
        "sar",
        pseudo_labels=pseudo_labels,
        keep_background=args.keep_background,
        mask_nodata=args.mask_nodata,
        **how,
    )
    return train_images, None if val_rows is None else LabelledImages(val_rows, "sar", **how), statistics


def training_loss(
    outputs: SegmentationLogits, labels: Tensor, args: Stage2Arguments, *, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the terms of the loss and their sum `loss`, the auxiliary head's included."""
    settings: dict[str, Any] = {
        "ce_weight": args.ce_weight,
        "rce_weight": args.rce_weight,
        "lovasz_weight": args.lovasz_weight,
        "gce_q": args.gce_q,
        "lovasz_stride": args.lovasz_stride,
        "epsilon": args.rce_epsilon,
        "weights": weights,
    }
    losses = noise_robust_loss(outputs.logits, labels, **settings)
    if outputs.auxiliary_logits is not None:
        auxiliary = noise_robust_loss(outputs.auxiliary_logits, labels, **settings)
        losses["loss"] = losses["loss"] + args.auxiliary_weight * auxiliary["loss"]
    return losses


def export(
    network: SegmentationNetwork,
    student: SegmentationNetwork,
    folder: Path,
    results: dict[str, Any] | None,
    args: Stage2Arguments,
    step: int,
    accelerator: Accelerator,
) -> None:
    """Write model, recipe and results to a folder, and an averaged model's student to `student/`, unscored.

    To be called by every process.
    """
    if not accelerator.is_main_process:
        return
    results = None if results is None else {**results, "step": step}
    places = [(network, folder, results)]
    if student is not network:
        places.insert(0, (student, folder / "student", None))
    for each, place, scores in places:
        export_model(
            each.model,
            place,
            crop_size=args.crop_size,
            recipe=dump_recipe(args),
            results=scores,
            training_data={"target": read_provenance(args.data_dir, "OpenEarthMap-SAR")},
        )


if __name__ == "__main__":
    with one_line_errors(TRAINING_MEMORY_HINT):
        main()
