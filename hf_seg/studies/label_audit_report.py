"""The report of a label audit: its verdict, its figures, and a page as Markdown and as self-contained HTML."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.bootstrap import Interval
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.report.page import embed_from, environment, say_difference
from hf_seg.report.plots import draw_matrix
from hf_seg.report.style import DPI, class_legend, colorize, percent, save_figure, show_image, style_axes

TRANSITIONS, GALLERY = "transition.png", "gallery.png"
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


def title(key: str, name: str) -> str:
    """Return how the report calls a set, e.g. "A (runs/labels)"; the truth is called the truth."""
    return "truth" if key == "truth" else f"{key.upper()} ({name})"


def judge(result: Mapping[str, Any], name_a: str, name_b: str) -> str:
    """Say which labels are better, if the result of `label_audit.summarize` can tell."""
    a, b = title("a", name_a), title("b", name_b)
    if result["truth"] is None:
        agreement = percent(result["agreement"]["overall"])
        return (
            f"Cannot tell which labels are better without a truth. Labels {a} and {b} agree on {agreement} of the "
            "pixels that both label; this audit shows how much and where they differ."
        )
    gain = result["truth"]["difference"]["mean_iou"]
    found = Interval(gain["difference"], *(math.nan if gain[key] is None else gain[key] for key in ("low", "high")))
    return say_difference(found, a, b, result["truth"]["n_tiles"], noun="Labels", verb="are")


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write the content of `audit.json` as `audit.md` and `index.html` beside the pictures that they show."""
    content = {
        **result,
        "titles": {key: title(key, found["name"]) for key, found in result["sets"].items()},
        "classes": _classes(result),
        "transitions": TRANSITIONS,
        "gallery": GALLERY,
        "embed": embed_from(folder),
    }
    for file, layout in (("audit.md", "markdown.j2"), ("index.html", "html.j2")):
        template = environment("hf_seg.studies", html=file.endswith(".html")).get_template("audit.j2")
        (folder / file).write_text(template.render(content, layout=layout), encoding="utf-8")


def plot_transitions(result: Mapping[str, Any], output: Path, title_a: str = "A", title_b: str = "B") -> None:
    """Draw which classes of B the classes of A are; with a truth also which true classes A and B are, and their IoU."""
    title_a, title_b = _shorten(title_a), _shorten(title_b)
    a_to_b, classes = np.array(result["agreement"]["transition"])[1:, 1:], _classes(result)
    if result["truth"] is None:
        figure = Figure(figsize=(9.2, 7.2), dpi=DPI, layout="constrained")
        _draw_transition(figure.subplots(), title_a, title_b, a_to_b, classes)
    else:
        scores = result["truth"]["same_pixels"]
        figure = Figure(figsize=(16.5, 12.5), dpi=DPI, layout="constrained")
        (a_axes, b_axes), (both_axes, iou_axes) = figure.subplots(2, 2)
        _draw_transition(a_axes, title_a, "truth", np.array(scores["a"]["confusion_matrix"])[1:, 1:].T, classes)
        _draw_transition(b_axes, title_b, "truth", np.array(scores["b"]["confusion_matrix"])[1:, 1:].T, classes)
        _draw_transition(both_axes, title_a, title_b, a_to_b, classes)
        _draw_scores(iou_axes, scores, classes)
    save_figure(figure, output)


def plot_gallery(
    rows: Sequence[GalleryRow],
    output: Path,
    title_a: str = "A",
    title_b: str = "B",
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> None:
    """Draw image | A | B | truth | comparison of at least one tile; a column that no tile has is omitted."""
    titles = {"image": "image", "a": _shorten(title_a), "b": _shorten(title_b), "truth": "truth"}
    shown = [name for name in titles if any(getattr(row, name) is not None for row in rows)]
    figure = Figure(figsize=(3.1 * (len(shown) + 1), 3.3 * len(rows) + 1.2), dpi=DPI, layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), len(shown) + 1, squeeze=False), rows, strict=True):
        for cell, name in zip(axes, shown, strict=False):
            pixels = getattr(row, name)
            show_image(cell, titles[name], pixels if name == "image" else _paint(pixels, label_set))
        differ = np.mean((row.a != row.b) & (row.a > 0) & (row.b > 0))
        show_image(axes[-1], f"A and B differ on {100 * differ:.1f} %", paint_comparison(row.a, row.b, row.truth))
        axes[0].set_ylabel(row.image_id, fontsize=10)
    unlabelled = any((label == BACKGROUND).any() for row in rows for label in row[2:] if label is not None)
    classes = class_legend({IGNORE_INDEX} if unlabelled else set(), label_set)
    if unlabelled:
        classes[-1].set_label("no label")
    kinds = {**(WITH_TRUTH if "truth" in shown else WITHOUT_TRUTH), **NOT_COMPARED}
    handles = [Patch(facecolor=color, edgecolor="#555555", label=name) for name, color in kinds.items()]
    figure.legend(handles=classes, loc="outside lower center", ncols=len(classes), frameon=False, fontsize=10)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=10)
    save_figure(figure, output)


def paint_comparison(a: np.ndarray, b: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """Draw which set is correct or, without a truth, where they differ: (H, W) ids, 0 = no label -> (H, W, 3) uint8."""
    if truth is None:
        kinds, kind, known = WITHOUT_TRUTH, (a != b).astype(int), (a > 0) & (b > 0)
    else:
        # 0 both correct, 1 only A, 2 only B, 3 both wrong
        kinds, kind, known = WITH_TRUTH, 2 * (a != truth) + (b != truth), (a > 0) & (b > 0) & (truth > 0)
    colors = np.array([to_rgb(color) for color in {**kinds, **NOT_COMPARED}.values()])
    return (255 * colors).round().astype(np.uint8)[np.where(known, kind, len(kinds))]


def _classes(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes from 1 up."""
    return [*result["agreement"]["iou"]]


def _draw_transition(axes: Axes, rows: str, columns: str, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Draw (C, C) counts of the classes in percent of each row."""
    draw_matrix(axes, counts, classes)
    axes.set_xlabel(f"class in {columns}")
    axes.set_ylabel(f"class in {rows}, percent of the compared pixels")
    axes.set_title(f"{rows} \N{RIGHTWARDS ARROW} {columns}, percent of each row", loc="left", fontsize=12)


def _draw_scores(axes: Axes, scores: dict[str, Any], classes: Sequence[str]) -> None:
    """Draw the IoU of each class of A and B side by side."""
    for key, name, color, shift in (("a", "A", COLOR_A, -0.19), ("b", "B", COLOR_B, 0.19)):
        percents = 100 * np.array([scores[key]["iou"][label] for label in classes], dtype=float)
        label = f"{name}, mIoU {100 * scores[key]['mean_iou']:.1f}"
        bars = axes.barh(np.arange(len(classes)) + shift, percents, height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=9)
    for row in np.flatnonzero(np.isnan(percents)).tolist():
        axes.text(1, row, "not in the truth", va="center", color="#777777", fontsize=9)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlim=(0, 109), ylim=(len(classes) - 0.5, -0.5), xticks=range(0, 101, 20), xlabel="IoU, percent")
    style_axes(axes, "IoU with the truth, on the same pixels")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=11)


def _paint(label: np.ndarray | None, label_set: LabelSet) -> np.ndarray | None:
    if label is None:
        return None
    return colorize(np.where(label == BACKGROUND, np.uint8(IGNORE_INDEX), label), label_set)


def _shorten(title: str) -> str:
    """Cut the start of a long title, and escape what matplotlib would take for mathematics."""
    short = title if len(title) <= LONGEST_TITLE else f"...{title[3 - LONGEST_TITLE :]}"
    return short.replace("$", r"\$")
