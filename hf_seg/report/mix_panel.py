"""The figure of one step of self-training: the mixed images, their labels and the student's predictions."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from hf_seg.normalization import to_image
from hf_seg.report.style import DPI, class_legend, colorize, save_figure, show_image


def plot_mix_panel(
    output: Path,
    source: dict[str, Any],
    target: dict[str, Any],
    class_masks: Tensor,
    mixed: dict[str, Any],
    predictions: Tensor,
    weights: Tensor,
    *,
    rows: int = 2,
) -> None:
    """Draw source, target, pasted pixels, mixed image, its labels and the student's prediction of a batch's first rows.

    Args:
        source, target, mixed: batches with `pixel_values` (B, 3, H, W), `labels` (B, H, W), and `image_id`.
        class_masks: (B, H, W) bool, True where the source is pasted.
        predictions: (B, H, W) class ids on the mixed images.
        weights: (B,) weight (lambda) of each target image.
        rows: images to draw, at most.
    """
    rows = min(rows, len(weights))
    figure = Figure(figsize=(18, 3.3 * rows + 0.7), dpi=DPI, layout="constrained")
    ids: set[int] = set()
    for i, axes in enumerate(figure.subplots(rows, 6, squeeze=False)):
        pasted, labels = class_masks[i].cpu().numpy()[..., None], mixed["labels"][i].cpu().numpy()
        source_image = to_image(source["pixel_values"][i])
        cells = {
            f"source \N{MIDDLE DOT} {source['image_id'][i]}": source_image,
            f"target \N{MIDDLE DOT} {target['image_id'][i]}": to_image(target["pixel_values"][i]),
            "pasted pixels": np.where(pasted, source_image, source_image // 4),
            "mixed and augmented": to_image(mixed["pixel_values"][i]),
            f"labels \N{MIDDLE DOT} target's weight {float(weights[i]):.3f}": colorize(labels),
            "student": colorize(predictions[i].cpu().numpy()),
        }
        ids |= set(np.unique(labels).tolist())
        for cell, (name, image) in zip(axes, cells.items(), strict=True):
            show_image(cell, name, image)
    figure.legend(handles=class_legend(ids), loc="outside lower center", ncols=10, frameon=False, fontsize=9)
    save_figure(figure, output)
