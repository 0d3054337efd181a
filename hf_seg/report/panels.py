"""Figures of images, labels and predictions beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.metrics import ConfusionMatrix
from hf_seg.normalization import IMAGENET, Normalization, to_image
from hf_seg.report.style import DPI, class_legend, colorize, percent, save_figure, show_image


def plot_panel(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray | None, np.ndarray]],
    output: Path,
    *,
    titles: Sequence[str] = ("SAR", "label", "prediction"),
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> None:
    """Draw image, label and prediction of several scenes beside each other, with a legend of the classes.

    Args:
        rows: tuples (name, image, label, prediction): image (H, W), stretched between its percentiles 1 and 99, or
            (H, W, 3) uint8 as it is; label (H, W) ids or None if there is none; prediction (H, W) ids.
        titles: names of the three columns.
        label_set: names and colours of the classes.

    Raises:
        ValueError: without rows, for maps of another size than their image, and as `colorize`.
    """
    if not rows:
        raise ValueError(f"no rows to draw in {output}")
    figure = Figure(figsize=(12.5, 4.3 * len(rows) + 0.8), dpi=DPI, layout="constrained")
    ids: set[int] = set()
    for axes, (name, image, label, prediction) in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        score = ""
        for kind, label_map in (("label", label), ("prediction", prediction)):
            if label_map is None:
                continue
            if label_map.shape != image.shape[:2]:
                raise ValueError(f"{name}: {kind} is {label_map.shape}, its image {image.shape[:2]}")
            ids |= set(np.unique(label_map).tolist())
        if label is not None:
            score = f" \N{MIDDLE DOT} mIoU {percent(_mean_iou(label, prediction, label_set), 'unknown')}"
        show_image(axes[0], f"{titles[0]} \N{MIDDLE DOT} {name}", image, interpolation="auto")
        show_image(axes[1], titles[1], None if label is None else colorize(label, label_set), missing="no label")
        show_image(axes[2], titles[2] + score, colorize(prediction, label_set))
    figure.legend(handles=class_legend(ids, label_set), loc="outside lower center", ncols=6, frameon=False, fontsize=10)
    save_figure(figure, output)


def plot_mix_panel(
    output: Path,
    source: dict[str, Any],
    target: dict[str, Any],
    class_masks: Tensor,
    mixed: dict[str, Any],
    predictions: Tensor,
    weights: Tensor,
    normalization: Normalization = IMAGENET,
    *,
    rows: int = 2,
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> None:
    """Draw source, target, pasted pixels, mixed image, its labels and the student's prediction of a batch's first rows.

    Args:
        source, target, mixed: batches with `pixel_values` (B, 3, H, W), `labels` (B, H, W), and `image_id`.
        class_masks: (B, H, W) bool, True where the source is pasted.
        predictions: (B, H, W) class ids on the mixed images.
        weights: (B,) weight (lambda) of each target image.
        normalization: of `pixel_values`.
        rows: images to draw, at most.
        label_set: names and colours of the classes.
    """
    rows = min(rows, len(weights))
    figure = Figure(figsize=(18, 3.3 * rows + 0.7), dpi=DPI, layout="constrained")
    ids: set[int] = set()
    for i, axes in enumerate(figure.subplots(rows, 6, squeeze=False)):
        pasted, labels = class_masks[i].cpu().numpy()[..., None], mixed["labels"][i].cpu().numpy()
        source_image = to_image(source["pixel_values"][i], normalization)
        cells = {
            f"source \N{MIDDLE DOT} {source['image_id'][i]}": source_image,
            f"target \N{MIDDLE DOT} {target['image_id'][i]}": to_image(target["pixel_values"][i], normalization),
            "pasted pixels": np.where(pasted, source_image, source_image // 4),
            "mixed and augmented": to_image(mixed["pixel_values"][i], normalization),
            f"labels \N{MIDDLE DOT} target's weight {float(weights[i]):.3f}": colorize(labels, label_set),
            "student": colorize(predictions[i].cpu().numpy(), label_set),
        }
        ids |= set(np.unique(labels).tolist())
        for cell, (name, image) in zip(axes, cells.items(), strict=True):
            show_image(cell, name, image)
    figure.legend(handles=class_legend(ids, label_set), loc="outside lower center", ncols=10, frameon=False, fontsize=9)
    save_figure(figure, output)


def _mean_iou(label: np.ndarray, prediction: np.ndarray, label_set: LabelSet = OPEN_EARTH_MAP) -> float | None:
    """Return the mean IoU over the classes in one label map, without background and ignored pixels; None if none is."""
    confusion = ConfusionMatrix(label_set)
    confusion.update(
        np.where(prediction == IGNORE_INDEX, BACKGROUND, prediction), np.where(label == BACKGROUND, IGNORE_INDEX, label)
    )
    return confusion.compute()["mean_iou"]
