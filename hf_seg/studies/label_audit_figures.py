"""Figures of a label audit: where each class goes, and the tiles on which two label sets differ most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, NUM_LABELS
from hf_seg.report import plots
from hf_seg.studies.label_audit import CLASSES

COLOR_A, COLOR_B = "#e08a2e", "#3572b0"
WITH_TRUTH = {"both right": "#e4e4e4", "only A right": COLOR_A, "only B right": COLOR_B, "both wrong": "#6b6b6b"}
WITHOUT_TRUTH = {"A and B agree": "#e4e4e4", "they differ": "#c8553d"}
NOT_COMPARED = {"not compared": "#302a3c"}


class GalleryRow(NamedTuple):
    """A tile of the gallery; label maps are (H, W) uint8, 0 = no label; the image (H, W), or (H, W, 3) uint8."""

    image_id: str
    image: np.ndarray | None
    a: np.ndarray
    b: np.ndarray
    truth: np.ndarray | None


def plot_transitions(result: dict[str, Any], output: Path) -> None:
    """Draw where the classes of A go in B; with a truth, what A and B truly are, and their IoU per class too.

    Args:
        result: of `label_audit.summarize`.
        output: image file to write.
    """
    a_to_b = np.array(result["agreement"]["transition"])[1:, 1:]
    if result["truth"] is None:
        figure = Figure(figsize=(9.2, 7.2), dpi=plots.DPI, layout="constrained")
        _draw_transition(figure.subplots(), "A", "B", a_to_b)
    else:
        scores = result["truth"]["same_pixels"]
        figure = Figure(figsize=(16.5, 12.5), dpi=plots.DPI, layout="constrained")
        (a_axes, b_axes), (both_axes, iou_axes) = figure.subplots(2, 2)
        _draw_transition(a_axes, "A", "truth", np.array(scores["a"]["confusion_matrix"])[1:, 1:].T)
        _draw_transition(b_axes, "B", "truth", np.array(scores["b"]["confusion_matrix"])[1:, 1:].T)
        _draw_transition(both_axes, "A", "B", a_to_b)
        _draw_scores(iou_axes, scores)
    plots.save_figure(figure, output)


def plot_gallery(rows: Sequence[GalleryRow], output: Path) -> None:
    """Draw image | A | B | truth | comparison of some tiles; a column that no tile has is left out.

    Args:
        rows: from one tile up.
        output: image file to write.
    """
    with_truth = any(row.truth is not None for row in rows)
    names = ["image"] * any(row.image is not None for row in rows) + ["A", "B"] + ["truth"] * with_truth
    figure = Figure(figsize=(3.1 * (len(names) + 1), 3.3 * len(rows) + 1.2), dpi=plots.DPI, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), len(names) + 1, squeeze=False), rows, strict=True):
        pictures = {"image": row.image, "A": _paint(row.a), "B": _paint(row.b), "truth": _paint(row.truth)}
        if row.image is not None and row.image.ndim == 2:
            pictures["image"] = plots.stretch(row.image)
        for axis, name in zip(axes, names, strict=False):
            _show(axis, name, pictures[name])
        differ = np.mean((row.a != row.b) & (row.a > 0) & (row.b > 0))
        _show(axes[-1], f"A and B differ on {100 * differ:.1f} %", paint_comparison(row.a, row.b, row.truth))
        axes[0].set_ylabel(row.image_id, fontsize=10)
    unlabelled = any((label == BACKGROUND).any() for row in rows for label in row[2:] if label is not None)
    classes = plots.class_legend({IGNORE_INDEX} if unlabelled else set())
    if unlabelled:
        classes[-1].set_label("no label")
    kinds = {**(WITH_TRUTH if with_truth else WITHOUT_TRUTH), **NOT_COMPARED}
    handles = [Patch(facecolor=color, edgecolor="#555555", label=name) for name, color in kinds.items()]
    style: dict[str, Any] = {"frameon": False, "fontsize": 10}
    figure.legend(handles=classes, loc="outside lower center", ncols=len(classes), **style)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), **style)
    plots.save_figure(figure, output)


def paint_comparison(a: np.ndarray, b: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """Paint who is right (`WITH_TRUTH`) or, without a truth, where A and B differ (`WITHOUT_TRUTH`).

    Args:
        a, b, truth: (H, W) ids 0..8, 0 = no label: `NOT_COMPARED`.

    Returns:
        (H, W, 3) uint8.
    """
    if truth is None:
        kinds, kind, known = WITHOUT_TRUTH, (a != b).astype(int), (a > 0) & (b > 0)
    else:
        # 0 both right, 1 A alone, 2 B alone, 3 neither
        kinds, kind, known = WITH_TRUTH, 2 * (a != truth) + (b != truth), (a > 0) & (b > 0) & (truth > 0)
    colors = np.array([to_rgb(color) for color in {**kinds, **NOT_COMPARED}.values()])
    return (255 * colors).round().astype(np.uint8)[np.where(known, kind, len(kinds))]


def _draw_transition(axes: Axes, rows: str, columns: str, counts: np.ndarray) -> None:
    """Draw (8, 8) counts of classes 1..8 in percent of each row."""
    total = counts.sum(axis=1)
    percent = np.full(counts.shape, np.nan)
    percent[total > 0] = 100 * counts[total > 0] / total[total > 0, None]
    plots.draw_matrix(axes, percent, list(range(1, NUM_LABELS)), total)
    axes.set_xlabel(f"class in {columns}")
    axes.set_ylabel(f"class in {rows}, share of the compared pixels")
    arrow = "\N{RIGHTWARDS ARROW}"
    axes.set_title(f"{rows} {arrow} {columns}: percent of each class of {rows}", loc="left", fontsize=12)


def _draw_scores(axes: Axes, scores: dict[str, Any]) -> None:
    """Draw the IoU of each class of A and B side by side."""
    for key, name, color, shift in (("a", "A", COLOR_A, -0.19), ("b", "B", COLOR_B, 0.19)):
        for row, label in enumerate(CLASSES):
            if (iou := scores[key]["iou"][label]) is not None:
                axes.barh(row + shift, 100 * iou, height=0.36, color=color)
                axes.text(100 * iou + 1, row + shift, f"{100 * iou:.1f}", va="center", fontsize=9)
            else:
                axes.text(1, row + shift, "not in the truth" * (key == "a"), va="center", color="#777777", fontsize=9)
        axes.barh(0, 0, color=color, label=f"{name}, mIoU {100 * scores[key]['mean_iou']:.1f}")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlim=(0, 109), ylim=(len(CLASSES) - 0.5, -0.5), xticks=range(0, 101, 20), xlabel="IoU, percent")
    plots.style_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title("IoU with the truth, on the same pixels", loc="left", fontsize=12)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.08), ncols=2, frameon=False, fontsize=11)


def _show(axes: Axes, title: str, picture: np.ndarray | None) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xticks=[], yticks=[], facecolor="#f0f0f0")
    axes.spines[:].set_color("#888888")
    if picture is None:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color="#777777")
    else:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _paint(label: np.ndarray | None) -> np.ndarray | None:
    return None if label is None else plots.colorize(np.where(label == BACKGROUND, np.uint8(IGNORE_INDEX), label))
