"""Figures of a label audit: where each class goes, and the tiles on which two label sets differ most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, NUM_LABELS
from hf_seg.report.plots import draw_matrix
from hf_seg.report.style import DPI, class_legend, colorize, save_figure, show_image, style_axes
from hf_seg.studies.label_audit import CLASSES

COLOR_A, COLOR_B = "#e08a2e", "#3572b0"
WITH_TRUTH = {"both correct": "#e4e4e4", "only A correct": COLOR_A, "only B correct": COLOR_B, "both wrong": "#6b6b6b"}
WITHOUT_TRUTH = {"A and B agree": "#e4e4e4", "they differ": "#c8553d"}
NOT_COMPARED = {"not compared": "#302a3c"}
LONGEST_TITLE = 36  # characters beside each other in the gallery


class GalleryRow(NamedTuple):
    """A tile of the gallery; label maps are (H, W) uint8, 0 = no label; the image (H, W), or (H, W, 3) uint8."""

    image_id: str
    image: np.ndarray | None
    a: np.ndarray
    b: np.ndarray
    truth: np.ndarray | None


def plot_transitions(result: Mapping[str, Any], output: Path, title_a: str = "A", title_b: str = "B") -> None:
    """Draw which classes of B the classes of A are; with a truth also which true classes A and B are, and their IoU.

    Args:
        result: of `label_audit.summarize`.
        output: image file to write.
        title_a, title_b: how the figure calls the sets.
    """
    title_a, title_b = _shorten(title_a), _shorten(title_b)
    a_to_b = np.array(result["agreement"]["transition"])[1:, 1:]
    if result["truth"] is None:
        figure = Figure(figsize=(9.2, 7.2), dpi=DPI, layout="constrained")
        _draw_transition(figure.subplots(), title_a, title_b, a_to_b)
    else:
        scores = result["truth"]["same_pixels"]
        figure = Figure(figsize=(16.5, 12.5), dpi=DPI, layout="constrained")
        (a_axes, b_axes), (both_axes, iou_axes) = figure.subplots(2, 2)
        _draw_transition(a_axes, title_a, "truth", np.array(scores["a"]["confusion_matrix"])[1:, 1:].T)
        _draw_transition(b_axes, title_b, "truth", np.array(scores["b"]["confusion_matrix"])[1:, 1:].T)
        _draw_transition(both_axes, title_a, title_b, a_to_b)
        _draw_scores(iou_axes, scores)
    save_figure(figure, output)


def plot_gallery(rows: Sequence[GalleryRow], output: Path, title_a: str = "A", title_b: str = "B") -> None:
    """Draw image | A | B | truth | comparison of some tiles; a column that no tile has is omitted.

    Args:
        rows: at least one tile.
        output: image file to write.
        title_a, title_b: how the figure calls the sets.
    """
    columns = ["image", "a", "b", "truth"]
    shown = [name for name in columns if any(getattr(row, name) is not None for row in rows)]
    titles = {"image": "image", "a": _shorten(title_a), "b": _shorten(title_b), "truth": "truth"}
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 3.3 * len(rows) + 1.2), dpi=DPI, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), len(shown) + 1, squeeze=False), rows, strict=True):
        pictures = {"image": row.image, "a": _paint(row.a), "b": _paint(row.b), "truth": _paint(row.truth)}
        for cell, name in zip(axes, shown, strict=False):
            show_image(cell, titles[name], pictures[name])
        differ = np.mean((row.a != row.b) & (row.a > 0) & (row.b > 0))
        show_image(axes[-1], f"A and B differ on {100 * differ:.1f} %", paint_comparison(row.a, row.b, row.truth))
        axes[0].set_ylabel(row.image_id, fontsize=10)
    unlabelled = any((label == BACKGROUND).any() for row in rows for label in row[2:] if label is not None)
    classes = class_legend({IGNORE_INDEX} if unlabelled else set())
    if unlabelled:
        classes[-1].set_label("no label")
    kinds = {**(WITH_TRUTH if "truth" in shown else WITHOUT_TRUTH), **NOT_COMPARED}
    handles = [Patch(facecolor=color, edgecolor="#555555", label=name) for name, color in kinds.items()]
    style: dict[str, Any] = {"frameon": False, "fontsize": 10}
    figure.legend(handles=classes, loc="outside lower center", ncols=len(classes), **style)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), **style)
    save_figure(figure, output)


def paint_comparison(a: np.ndarray, b: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """Draw which set is correct (`WITH_TRUTH`) or, without a truth, where A and B differ (`WITHOUT_TRUTH`).

    Args:
        a, b, truth: (H, W) ids 0..8, 0 = no label, which is drawn as `NOT_COMPARED`.

    Returns:
        (H, W, 3) uint8.
    """
    if truth is None:
        kinds, kind, known = WITHOUT_TRUTH, (a != b).astype(int), (a > 0) & (b > 0)
    else:
        # 0 both correct, 1 only A, 2 only B, 3 both wrong
        kinds, kind, known = WITH_TRUTH, 2 * (a != truth) + (b != truth), (a > 0) & (b > 0) & (truth > 0)
    colors = np.array([to_rgb(color) for color in {**kinds, **NOT_COMPARED}.values()])
    return (255 * colors).round().astype(np.uint8)[np.where(known, kind, len(kinds))]


def _draw_transition(axes: Axes, rows: str, columns: str, counts: np.ndarray) -> None:
    """Draw (8, 8) counts of classes 1..8 in percent of each row."""
    draw_matrix(axes, counts, range(1, NUM_LABELS))
    axes.set_xlabel(f"class in {columns}")
    axes.set_ylabel(f"class in {rows}, percent of the compared pixels")
    arrow = "\N{RIGHTWARDS ARROW}"
    axes.set_title(f"{rows} {arrow} {columns}, percent of each row", loc="left", fontsize=12)


def _draw_scores(axes: Axes, scores: dict[str, Any]) -> None:
    """Draw the IoU of each class of A and B side by side."""
    for key, name, color, shift in (("a", "A", COLOR_A, -0.19), ("b", "B", COLOR_B, 0.19)):
        for row, label in enumerate(CLASSES):
            if (iou := scores[key]["iou"][label]) is not None:
                axes.barh(row + shift, 100 * iou, height=0.36, color=color)
                axes.text(100 * iou + 1, row + shift, f"{100 * iou:.1f}", va="center", fontsize=9)
            elif key == "a":
                axes.text(1, row, "not in the truth", va="center", color="#777777", fontsize=9)
        axes.barh(0, 0, color=color, label=f"{name}, mIoU {100 * scores[key]['mean_iou']:.1f}")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlim=(0, 109), ylim=(len(CLASSES) - 0.5, -0.5), xticks=range(0, 101, 20), xlabel="IoU, percent")
    style_axes(axes, "IoU with the truth, on the same pixels")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=11)


def _paint(label: np.ndarray | None) -> np.ndarray | None:
    return None if label is None else colorize(np.where(label == BACKGROUND, np.uint8(IGNORE_INDEX), label))


def _shorten(title: str) -> str:
    """Cut the start of a long title, and escape what matplotlib would take for mathematics."""
    short = title if len(title) <= LONGEST_TITLE else f"...{title[3 - LONGEST_TITLE :]}"
    return short.replace("$", r"\$")
