"""Figures of a run: training curves, confusion matrix, maps beside each other.

Every function writes one image, aside and then renamed, at a size that depends on its content alone. Drawn through
`matplotlib.figure.Figure`, without pyplot: no display, no global state, nothing to close.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hf_seg.labels import BACKGROUND, CLASS_NAMES, IGNORE_INDEX, NUM_LABELS, PALETTE

logger = logging.getLogger(__name__)

DPI = 120
LINE_COLORS = ("#1b1b1b", "#3572b0", "#c8553d", "#4c9a6a", "#8a6fb0", "#b58b2a")
GRID_COLOR = "#e3e3e3"
ABSENT_COLOR = "#d9d9d9"
SAR_GAMMA = 0.7  # amplitudes have a long bright tail: linear, three quarters of a scene would be nearly black
SMOOTH_FROM = 60  # curves with fewer points are drawn as they are

# Ignored pixels are striped in two dark violet greys: no class is striped, and even where a small map blurs the stripes
# away their mean stays far from background (black), developed space (mid-grey), tree (dark green) and road (white).
IGNORE_STRIPES = np.array([(0x30, 0x2A, 0x3C), (0x6A, 0x62, 0x78)], dtype=np.uint8)

PanelRow = tuple[str, np.ndarray, np.ndarray | None, np.ndarray]


def colorize(label_map: np.ndarray) -> np.ndarray:
    """Paint class ids in the colours of the classes.

    Args:
        label_map: (H, W) ids; `IGNORE_INDEX` is striped (`IGNORE_STRIPES`).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: for an id that is neither a class nor `IGNORE_INDEX`.
    """
    ignored = label_map == IGNORE_INDEX
    ids = np.where(ignored, BACKGROUND, label_map)
    if ids.size and not 0 <= ids.min() <= ids.max() < NUM_LABELS:
        wrong = sorted({int(index) for index in np.unique(ids) if not 0 <= index < NUM_LABELS})
        raise ValueError(f"label ids {wrong} are no class; expected 0..{NUM_LABELS - 1} or {IGNORE_INDEX} (ignored)")
    colors = PALETTE[ids]
    height, width = label_map.shape
    stripe_width = max(min(height, width) // 64, 1)
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // stripe_width) % 2
    colors[ignored] = IGNORE_STRIPES[stripes[ignored]]
    return colors


def plot_curves(metrics_file: Path, output: Path) -> None:
    """Draw losses, validation scores and learning rate of a run over its steps.

    Args:
        metrics_file: `metrics.jsonl`, one JSON object a line, each with `step`. Losses are `loss`, `ce`, `rce`,
            `lovasz` and `*_loss`; scores are `mean_iou`, `*_mean_iou` and `overall_accuracy`, as fractions. Other keys
            are left aside, values that are null or not finite leave a gap, of a step logged twice (a resumed run) the
            later value counts, and a line cut off by a kill is skipped with a warning.
        output: image file to write.

    Raises:
        ValueError: if the file holds no metrics at all.
    """
    series = _read_series(metrics_file)
    figure = Figure(figsize=(12.5, 4.2), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12))
    loss_axes, score_axes, rate_axes = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.9))
    losses = [name for name in series if name in ("loss", "ce", "rce", "lovasz") or name.endswith("_loss")]
    for name, color in zip(sorted(losses, key=lambda name: name != "loss"), cycle(LINE_COLORS), strict=False):
        _draw_curve(loss_axes, *series[name], name, color)
    shown = {"overall_accuracy": ("overall accuracy", "#9aa5b1"), "mean_iou": ("mIoU", "#3572b0")}
    several = [
        name for name in series if name.endswith("_mean_iou")
    ]  # of several networks or domains, one of them best
    if several:
        names = [name.removesuffix("_mean_iou").replace("_", " ") for name in several]
        shown = dict(zip(several, zip(names, cycle(LINE_COLORS), strict=False), strict=True))
    for name, (label, color) in shown.items():
        if name in series:
            steps, scores = series[name]
            score_axes.plot(steps, 100 * scores, color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
    _mark_best(score_axes, *series.get("mean_iou", (np.empty(0), np.empty(0))))
    if "learning_rate" in series:
        rate_axes.plot(*series["learning_rate"], color=LINE_COLORS[0], linewidth=1.6)
        rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_formatter("{x:g}")
    titles = ("training loss", "validation mIoU, percent" if several else "validation, percent", "learning rate")
    for axes, title in zip((loss_axes, score_axes, rate_axes), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        style_axes(axes)
        if not axes.lines:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color="#777777")
        elif axes is not rate_axes:
            axes.legend(frameon=False, fontsize=9)
    save_figure(figure, output)


def plot_confusion_matrix(results: Mapping[str, Any], output: Path) -> None:
    """Draw where each class goes, in percent of its true pixels, and the IoU of each class.

    Args:
        results: as in `eval_results.json`: `confusion_matrix` (C, C) counts with rows = truth; `iou` by class name
            and `mean_iou`, `overall_accuracy`, `n_images` where they are known (fractions; null = absent).
        output: image file to write.

    Raises:
        ValueError: if the matrix does not have the classes of `hf_seg.labels`.
    """
    counts = np.asarray(results["confusion_matrix"], dtype=np.float64)
    if counts.shape != (NUM_LABELS, NUM_LABELS):
        raise ValueError(f"confusion_matrix has shape {counts.shape}, expected {(NUM_LABELS, NUM_LABELS)}")
    # Background is neither scored nor predicted; it gets a row only where pixels say otherwise.
    shown = [i for i in range(NUM_LABELS) if i != BACKGROUND or counts[i].sum() + counts[:, i].sum() > 0]
    counts = counts[np.ix_(shown, shown)]
    truth = counts.sum(axis=1)
    present = truth > 0
    percent = np.full_like(counts, np.nan)
    percent[present] = 100 * counts[present] / truth[present, None]

    figure = Figure(figsize=(12.5, 7.0), dpi=DPI, layout="constrained")
    matrix_axes, iou_axes = figure.subplots(1, 2, width_ratios=(2.3, 1))
    figure.suptitle(_headline(results), fontsize=13, fontweight="bold")
    draw_matrix(matrix_axes, percent, shown, truth)
    _draw_iou(iou_axes, shown, results.get("iou") or {}, present)
    save_figure(figure, output)


def plot_panel(
    rows: Sequence[PanelRow], output: Path, *, titles: Sequence[str] = ("SAR", "label", "prediction")
) -> None:
    """Draw image, label and prediction of several scenes beside each other, with a legend of the classes.

    Args:
        rows: tuples (name, image, label, prediction): image (H, W), stretched between its percentiles 1 and 99, or
            (H, W, 3) uint8 as it is; label (H, W) ids or None if there is none; prediction (H, W) ids.
        output: image file to write.
        titles: names of the three columns.

    Raises:
        ValueError: without rows, for maps of another size than their image, and as `colorize`.
    """
    if not rows:
        raise ValueError(f"no rows to draw in {output}")
    figure = Figure(figsize=(12.5, 4.3 * len(rows) + 0.8), dpi=DPI, layout="constrained")
    ids: set[int] = set()
    for axes, (name, image, label, prediction) in zip(figure.subplots(len(rows), 3, squeeze=False), rows, strict=True):
        for kind, ids_map in (("label", label), ("prediction", prediction)):
            if ids_map is not None and ids_map.shape != image.shape[:2]:
                raise ValueError(f"{name}: {kind} is {ids_map.shape}, its image {image.shape[:2]}")
        axes[0].imshow(stretch(image) if image.ndim == 2 else image, cmap="gray", vmin=0, vmax=1)
        axes[2].imshow(colorize(prediction), interpolation="nearest")
        ids |= set(np.unique(prediction).tolist())
        score = ""
        if label is None:
            axes[1].set_facecolor("#f0f0f0")  # not white, which is road
            axes[1].text(0.5, 0.5, "no label", transform=axes[1].transAxes, ha="center", va="center", color="#777777")
        else:
            axes[1].imshow(colorize(label), interpolation="nearest")
            ids |= set(np.unique(label).tolist())
            score = f" \N{MIDDLE DOT} mIoU {_percent(_mean_iou(label, prediction))}"
        for cell, title in zip(axes, (f"{titles[0]} \N{MIDDLE DOT} {name}", titles[1], titles[2] + score), strict=True):
            cell.set_title(title, loc="left", fontsize=11)
            cell.set(xticks=[], yticks=[], aspect="equal")
            cell.spines[:].set_color("#888888")
    figure.legend(handles=class_legend(ids), loc="outside lower center", ncols=6, frameon=False, fontsize=10)
    save_figure(figure, output)


def _read_series(metrics_file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collect every numeric key of a metrics file as (steps, values), sorted by step; what is not finite is NaN."""
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(metrics_file.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s, line %d is no JSON object with a step, skipped: %.60s", metrics_file, number, line)
            continue
        for key, value in entry.items():
            if value is None:
                points.setdefault(key, {})[step] = math.nan
            elif isinstance(value, int | float):
                points.setdefault(key, {})[step] = value if math.isfinite(value) else math.nan
    if not points:
        raise ValueError(f"{metrics_file} holds no metrics; wait until the run has logged its first steps")
    series = {key: sorted(values.items()) for key, values in points.items()}
    return {key: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])) for key, pairs in series.items()}


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, color: str) -> None:
    """Draw one loss; a long one as a running mean over its pale self."""
    width = len(values) // 25
    if len(values) < SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=1.6, label=name)
        return
    known = np.isfinite(values)
    window = np.ones(2 * (width // 2) + 1)
    # Dividing by the number of known values keeps the ends, and the neighbours of gaps, unbiased.
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    count = np.convolve(known.astype(np.float64), window, mode="same")
    smooth = np.divide(total, count, out=np.full_like(total, np.nan), where=known & (count > 0))
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    axes.plot(steps, smooth, color=color, linewidth=1.6, label=name)


def _mark_best(axes: Axes, steps: np.ndarray, scores: np.ndarray) -> None:
    if not np.isfinite(scores).any():
        return
    best = int(np.nanargmax(scores))
    step, percent = float(steps[best]), 100 * float(scores[best])
    axes.plot(
        step,
        percent,
        linestyle="none",
        marker="*",
        markersize=14,
        color="#c8553d",
        zorder=3,
        label=f"best mIoU {percent:.2f} at step {int(step):,}",
    )


def draw_matrix(axes: Axes, percent: np.ndarray, shown: list[int], truth: np.ndarray) -> None:
    """Draw a confusion matrix as a table of shaded numbers.

    Args:
        percent: (K, K), each row of the true pixels of its class; NaN rows are classes that do not occur.
        shown: the K class ids.
        truth: (K,) true pixels of each class.
    """
    axes.set_facecolor(ABSENT_COLOR)  # shows where NaN leaves the rows of absent classes transparent
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(percent):
        if np.isfinite(value):
            weight = "bold" if row == column else "normal"
            color = "white" if value > 55 else "#1b1b1b"
            axes.text(
                column, row, f"{value:.1f}", ha="center", va="center", color=color, fontweight=weight, fontsize=10
            )
    names = [CLASS_NAMES[index] for index in shown]
    shares = 100 * truth / max(truth.sum(), 1)
    axes.set_xticks(range(len(shown)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(shown)), [f"{name}\n{share:.1f} %" for name, share in zip(names, shares, strict=True)])
    for tick, count in zip(axes.get_yticklabels(), truth, strict=True):
        tick.set_color("#1b1b1b" if count else "#9a9a9a")
    axes.set_xticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(shown) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class, share of all pixels")
    axes.set_title("percent of the true pixels of each class", loc="left", fontsize=11)


def _draw_iou(axes: Axes, shown: list[int], iou: Mapping[str, float | None], present: np.ndarray) -> None:
    for row, (index, is_present) in enumerate(zip(shown, present, strict=True)):
        value = iou.get(CLASS_NAMES[index])
        if value is None or not math.isfinite(value) or not is_present:
            axes.barh(row, 100, height=0.62, color=ABSENT_COLOR, alpha=0.5)
            axes.text(2, row, "absent" if not is_present else "not scored", va="center", color="#777777", fontsize=10)
            continue
        axes.barh(row, 100 * value, height=0.62, color=PALETTE[index] / 255, edgecolor="#555555", linewidth=0.8)
        axes.text(100 * value + 2, row, f"{100 * value:.1f}", va="center", fontsize=10)
    axes.set(xlim=(0, 112), ylim=(len(shown) - 0.5, -0.5), yticks=[], xticks=range(0, 101, 20))
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("IoU, percent")
    axes.set_title("IoU of each class", loc="left", fontsize=11)


def _headline(results: Mapping[str, Any]) -> str:
    parts = [
        f"mIoU {_percent(results.get('mean_iou'))}",
        f"overall accuracy {_percent(results.get('overall_accuracy'))}",
    ]
    if results.get("n_images") is not None:
        parts.append(f"{results['n_images']:,} images")
    return " \N{MIDDLE DOT} ".join(parts)


def _percent(fraction: float | None) -> str:
    return f"{100 * fraction:.1f} %" if fraction is not None and math.isfinite(fraction) else "unknown"


def stretch(image: np.ndarray) -> np.ndarray:
    """Map the percentiles 1 and 99 of an amplitude image to 0 and 1, with the dark half lifted; zeros are nodata."""
    valid = image[image > 0]
    low, high = np.percentile(valid, (1, 99)) if valid.size else (0.0, 1.0)
    stretched: np.ndarray = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** SAR_GAMMA
    return stretched


def _mean_iou(label: np.ndarray, prediction: np.ndarray) -> float:
    """Compute the mean IoU over the classes in one label map, background and ignored pixels left out; NaN if none."""
    valid = (label != IGNORE_INDEX) & (label != BACKGROUND)
    pairs = np.minimum(prediction[valid], NUM_LABELS) + (NUM_LABELS + 1) * label[valid].astype(np.int64)
    counts = np.bincount(pairs, minlength=NUM_LABELS * (NUM_LABELS + 1)).reshape(NUM_LABELS, NUM_LABELS + 1)
    truth, overlap = counts.sum(axis=1), counts.diagonal()
    union = truth + counts.sum(axis=0)[:NUM_LABELS] - overlap
    return float(np.mean(overlap[truth > 0] / union[truth > 0])) if truth.any() else math.nan


def class_legend(ids: set[int]) -> list[Patch]:
    """Build one patch for each land-cover class, and for background and ignored pixels where the maps have them."""
    shown = [index for index in range(NUM_LABELS) if index != BACKGROUND or index in ids]
    patches = [Patch(facecolor=PALETTE[i] / 255, edgecolor="#555555", label=CLASS_NAMES[i]) for i in shown]
    if IGNORE_INDEX in ids:
        dark, light = IGNORE_STRIPES / 255
        patches.append(Patch(facecolor=dark, edgecolor=light, hatch="////", label="ignored"))
    return patches


def style_axes(axes: Axes) -> None:
    """Give a chart the project's plain looks: a pale grid behind it, no frame above and to the right."""
    axes.grid(color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure aside and rename it, so that the file appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.part")
    figure.savefig(aside, format=output.suffix.lstrip(".") or "png")
    aside.replace(output)
