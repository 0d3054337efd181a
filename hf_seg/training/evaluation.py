"""Score networks on whole tiles: sliding window, confusion matrices over all processes, nothing stored."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from tqdm import tqdm

from hf_seg.arguments import RecipeArguments
from hf_seg.data.samples import LabelledImages, Sample
from hf_seg.errors import DatasetError
from hf_seg.inference.load import use_network
from hf_seg.inference.predict import Predictor
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.label_sets import require_same_classes
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.panels import plot_panel
from hf_seg.report.plots import plot_confusion_matrix

PANEL_ROWS = 4


def evaluate_network(
    network: nn.Module, images: LabelledImages, accelerator: Accelerator, args: RecipeArguments
) -> dict[str, Any]:
    """Score a network in training (unwrapped) as `evaluate` does; it is put into eval mode and back.

    On several processes all score the first one's BatchNorm statistics, which are those that are exported.
    """
    if accelerator.num_processes > 1:
        broadcast(list(network.buffers()))
    was_training = network.training
    results, _ = evaluate(trained_predictor(network, accelerator, args), images, accelerator)
    network.train(was_training)
    return results


def trained_predictor(network: nn.Module, accelerator: Accelerator, args: RecipeArguments) -> Predictor:
    """Predict with a network in training: windows of its crop, in the training's arithmetic."""
    return Predictor(
        [use_network(network, crop_size=args.crop_size)],
        device=accelerator.device,
        stride=args.eval_stride,
        batch_size=args.eval_batch_size,
        mixed_precision=accelerator.mixed_precision,
        batch_setting="--eval_batch_size",
    )


def evaluate(
    predictor: Predictor,
    images: LabelledImages,
    accelerator: Accelerator,
    *,
    title: str = "validation",
    on_prediction: Callable[[Sample, np.ndarray, VoteAccumulator], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score networks and their average in one pass over the images, shared among the processes.

    Args:
        title: of the progress bar.
        on_prediction: called with (sample, label map, accumulated votes) of each image of this process.

    Returns:
        The scores of the average: `mean_iou`, `overall_accuracy`, `iou`, `n_classes_present`, `confusion_matrix`,
        `n_images` over all processes; and those of each network, without `n_images`.

    Raises:
        DatasetError: no pixel of any image is labelled.
        UserError: the networks and the labels have different classes.
    """
    label_set = predictor.label_set
    hint = "; give the --label_set that the networks were trained with"
    require_same_classes(label_set.names, images.label_set.names, predictor.networks[0].origin, "the labels", hint)
    counts = [ConfusionMatrix(label_set) for _ in range(1 + len(predictor.networks))]
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    for index in tqdm(mine, desc=title, unit="tile", leave=False, disable=not accelerator.is_main_process):
        sample = images[index]
        accumulator = predictor.predict(sample.image)
        label_map = accumulator.label_map().cpu().numpy()
        counts[0].update(label_map, sample.label)
        for matrix, own_map in zip(counts[1:], accumulator.label_maps, strict=True):
            matrix.update(own_map, sample.label)
        if on_prediction is not None:
            on_prediction(sample, label_map, accumulator)
    matrices = torch.from_numpy(np.stack([matrix.matrix for matrix in counts])).to(accelerator.device)
    for matrix, total in zip(counts, accelerator.reduce(matrices, reduction="sum").cpu().numpy(), strict=True):
        matrix.matrix[:] = total
    results, *each = (matrix.compute() for matrix in counts)
    if results["mean_iou"] is None:
        range_of_ids = f"1 to {label_set.num_labels - 1}"
        raise DatasetError(
            f"the labels of all {len(images)} {title} images are empty: no pixel is of class {range_of_ids}"
        )
    return {**results, "n_images": len(images)}, each


def entropy_levels(accumulator: VoteAccumulator) -> np.ndarray:
    """Return the entropy of a prediction as an image, (H, W) uint8: 0 = certain, 255 = uniform."""
    n_classes = accumulator.probs().shape[-3] - 1  # without background
    levels = 255 / math.log(n_classes) * accumulator.entropy()
    return levels.clamp(0, 255).to(torch.uint8).cpu().numpy()


def draw_results(
    predictor: Predictor,
    images: LabelledImages,
    results: dict[str, Any],
    folder: Path,
    *,
    titles: tuple[str, str, str] = ("SAR", "label", "prediction"),
    with_uncertainty: bool = False,
) -> None:
    """Draw the confusion matrix, and a panel of image | label | prediction on a few evenly spread images.

    Args:
        folder: takes `confusion_matrix.png`, `panel.png` and, with the entropy in place of the image,
            `uncertainty.png`.
        titles: of the panel's columns.
    """
    label_set = predictor.label_set
    plot_confusion_matrix(results, folder / "confusion_matrix.png", label_set=label_set)
    panel, entropies = [], []
    for index in np.unique(np.linspace(0, len(images) - 1, PANEL_ROWS).round().astype(int)).tolist():
        image_id, image, label, _ = images[index]
        accumulator = predictor.predict(image)
        label_map = accumulator.label_map().cpu().numpy()
        panel.append((image_id, image, label, label_map))
        if with_uncertainty:
            entropies.append((image_id, np.dstack([entropy_levels(accumulator)] * 3), label, label_map))
    plot_panel(panel, folder / "panel.png", titles=titles, label_set=label_set)
    if with_uncertainty:
        titles = ("entropy, white = uniform", *titles[1:])
        plot_panel(entropies, folder / "uncertainty.png", titles=titles, label_set=label_set)
