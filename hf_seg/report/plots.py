"""Charts of a run, each in one image file: training curves, confusion matrix, scores of an ensemble's members."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hf_seg.errors import UserError, file_errors
from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet
from hf_seg.report.style import DPI, LINE_COLORS, percent, save_figure, style_axes

if TYPE_CHECKING:
    from pandas import Series

logger = logging.getLogger(__name__)

ABSENT_COLOR = "#d9d9d9"
SMOOTH_FROM = 60  # curves with fewer points are drawn as they are


def plot_curves(metrics_file: Path, output: Path) -> None:
    """Draw losses, validation scores and learning rate of a run over its steps.

    Args:
        metrics_file: `metrics.jsonl`, one JSON object a line, each with `step`. Losses are `loss`, `ce`, `rce`,
            `lovasz` and `*_loss`; scores are `mean_iou`, `*_mean_iou` and `overall_accuracy`, as fractions. Other keys
            are not drawn. A value that is null or not finite leaves a gap. Where a resumed run logged a step again, the
            later value counts. A line cut off by a kill is skipped with a warning.

    Raises:
        ValueError: the file contains no metrics.
    """
    series = read_series(metrics_file)
    figure = Figure(figsize=(12.5, 4.2), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12))
    loss_axes, score_axes, rate_axes = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.9))
    losses = [name for name in series if name in ("loss", "ce", "rce", "lovasz") or name.endswith("_loss")]
    for name, color in zip(sorted(losses, key=lambda name: name != "loss"), cycle(LINE_COLORS), strict=False):
        _draw_loss(loss_axes, series[name], name, color)
    shown = {"overall_accuracy": ("overall accuracy", "#9aa5b1"), "mean_iou": ("mIoU", "#3572b0")}
    # scores of several networks or domains; the one called `mean_iou` too is the best of them
    several = [name for name in series if name.endswith("_mean_iou")]
    if several:
        names = [name.removesuffix("_mean_iou").replace("_", " ") for name in several]
        shown = dict(zip(several, zip(names, cycle(LINE_COLORS), strict=False), strict=True))
    for name, (label, color) in shown.items():
        if name in series:
            score_axes.plot(100 * series[name], color=color, marker="o", markersize=3.5, linewidth=1.6, label=label)
    if "mean_iou" in series and series["mean_iou"].notna().any():
        step, score = series["mean_iou"].idxmax(), 100 * series["mean_iou"].max()
        label = f"best mIoU {score:.2f} at step {step:,}"
        score_axes.plot(step, score, "*", markersize=14, color="#c8553d", zorder=3, label=label)
    if "learning_rate" in series:
        rate_axes.plot(series["learning_rate"], color=LINE_COLORS[0], linewidth=1.6)
        rate_axes.set_ylim(bottom=0)
    rate_axes.yaxis.set_major_formatter("{x:g}")
    titles = ("training loss", "validation mIoU, percent" if several else "validation, percent", "learning rate")
    for axes, title in zip((loss_axes, score_axes, rate_axes), titles, strict=True):
        style_axes(axes, title)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if not axes.lines:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color="#777777")
        elif axes is not rate_axes:
            axes.legend(frameon=False, fontsize=9)
    save_figure(figure, output)


def plot_confusion_matrix(results: Mapping[str, Any], output: Path, *, label_set: LabelSet = OPEN_EARTH_MAP) -> None:
    """Draw the confusion matrix in percent of the true pixels of each class, and the IoU of each class.

    Args:
        results: as in `eval_results.json`: `confusion_matrix` (C, C) counts with rows = truth; `iou` by class name
            and `mean_iou`, `overall_accuracy`, `n_images` where they are known (fractions; null = absent).
        label_set: names and colours of the C classes.

    Raises:
        ValueError: the matrix has another number of classes.
    """
    counts = np.asarray(results["confusion_matrix"], dtype=np.float64)
    num_labels = label_set.num_labels
    if counts.shape != (num_labels, num_labels):
        raise ValueError(f"confusion_matrix has shape {counts.shape}, expected {(num_labels, num_labels)}")
    # Background is normally neither scored nor predicted; it gets a row only if it occurs.
    shown = [i for i in range(num_labels) if i != BACKGROUND or counts[i].sum() + counts[:, i].sum() > 0]
    counts = counts[np.ix_(shown, shown)]
    figure = Figure(figsize=(12.5, 7.0), dpi=DPI, layout="constrained")
    matrix_axes, iou_axes = figure.subplots(1, 2, width_ratios=(2.3, 1))
    scores = {"mIoU": results.get("mean_iou"), "overall accuracy": results.get("overall_accuracy")}
    headline = [f"{name} {percent(score, 'unknown')}" for name, score in scores.items()]
    if results.get("n_images") is not None:
        headline.append(f"{results['n_images']:,} images")
    figure.suptitle(" \N{MIDDLE DOT} ".join(headline), fontsize=13, fontweight="bold")
    draw_matrix(matrix_axes, counts, [label_set.names[i] for i in shown])
    matrix_axes.set_xlabel("predicted class")
    matrix_axes.set_ylabel("true class, percent of all pixels")
    matrix_axes.set_title("percent of the true pixels of each class", loc="left", fontsize=11)
    _draw_iou(iou_axes, shown, results.get("iou") or {}, counts.sum(axis=1) > 0, label_set)
    save_figure(figure, output)


def plot_member_scores(
    members: Sequence[tuple[str, Mapping[str, Any]]], ensemble: Mapping[str, Any], output: Path
) -> None:
    """Draw a row for each class that occurs, and one for their mean, with a mark for each network.

    Args:
        members: name and scores of each: `mean_iou` and `iou` as in `eval_results.json`.
        ensemble: the same for the ensemble.
    """
    rows = [name for name, iou in ensemble["iou"].items() if iou is not None]
    labels = ["mean", *rows]
    figure = Figure(figsize=(6.4, 1.6 + 0.4 * len(labels)), dpi=DPI, layout="constrained")
    axes = figure.subplots()

    def percents(scores: Mapping[str, Any]) -> list[float]:
        return [100 * value for value in (scores["mean_iou"], *(scores["iou"][name] for name in rows))]

    scores = np.array([percents(score) for _, score in members])
    axes.hlines(range(len(labels)), scores.min(axis=0), scores.max(axis=0), "#c4c4c4", linewidth=5, capstyle="round")
    for (name, _), values, color in zip(members, scores, cycle(LINE_COLORS[1:]), strict=False):
        axes.plot(values, range(len(labels)), "o", color=color, markersize=6, label=name, clip_on=False, zorder=3)
    average, color = percents(ensemble), LINE_COLORS[0]
    axes.plot(average, range(len(labels)), "D", color=color, markersize=7, label="ensemble", clip_on=False, zorder=4)
    axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5), xlim=(0, None))
    style_axes(axes, f"Members and ensemble, {ensemble['n_images']:,} tile(s)")
    axes.axhline(0.5, color="#888888", linewidth=0.8)
    axes.set_xlabel("IoU, percent")
    axes.grid(visible=False, axis="y")
    longest = max(len(name) for name, _ in members)
    figure.legend(loc="outside lower center", ncols=3 if longest < 18 else 1, frameon=False, fontsize=9)
    save_figure(figure, output)


def read_series(metrics_file: Path) -> dict[str, "Series"]:
    """Return the values of every numeric key of a metrics file by step, in order; NaN for values not finite.

    Raises:
        UserError: it cannot be read, or contains none.
    """
    from pandas import Series

    points: dict[str, dict[int, float]] = {}
    with file_errors(metrics_file, "cannot be read"):
        lines = metrics_file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            logger.warning("%s, line %d is not a JSON object with a step, skipped: %.60s", metrics_file, number, line)
            continue
        for key, value in entry.items():
            if value is None or isinstance(value, int | float):
                points.setdefault(key, {})[step] = _as_float(value)
    if not points:
        raise UserError(f"{metrics_file} contains no metrics; wait until the run has logged its first steps")
    series = {key: Series(values, dtype=float).sort_index() for key, values in points.items()}
    return {key: values.where(np.isfinite(values)) for key, values in series.items()}


def _as_float(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def _draw_loss(axes: Axes, values: "Series", name: str, color: str) -> None:
    """Draw one loss; if it is long, in pale with its running mean on top."""
    if len(values) < SMOOTH_FROM:
        axes.plot(values, color=color, linewidth=1.6, label=name)
        return
    running_mean = values.rolling(2 * (len(values) // 50) + 1, center=True, min_periods=1).mean()
    axes.plot(values, color=color, linewidth=0.8, alpha=0.25)
    axes.plot(running_mean.where(values.notna()), color=color, linewidth=1.6, label=name)


def draw_matrix(axes: Axes, counts: np.ndarray, names: Sequence[str]) -> None:
    """Draw counts as a table of numbers in percent of their row; rows of classes that do not occur are grey.

    Args:
        counts: (K, K) pixels.
        names: of the K classes.
    """
    total = counts.sum(axis=1)
    percents = np.full(counts.shape, np.nan)
    percents[total > 0] = 100 * counts[total > 0] / total[total > 0, None]
    axes.set_facecolor(ABSENT_COLOR)  # shows through where a row is NaN
    axes.imshow(percents, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(percents):
        if np.isfinite(value):
            weight = "bold" if row == column else "normal"
            color = "white" if value > 55 else "#1b1b1b"
            text = f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontweight=weight, fontsize=10)
    parts = 100 * total / max(total.sum(), 1)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), [f"{name}\n{part:.1f} %" for name, part in zip(names, parts, strict=True)])
    for tick, count in zip(axes.get_yticklabels(), total, strict=True):
        tick.set_color("#1b1b1b" if count else "#9a9a9a")
    axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _draw_iou(
    axes: Axes, shown: list[int], iou: Mapping[str, float | None], present: np.ndarray, label_set: LabelSet
) -> None:
    for row, (index, is_present) in enumerate(zip(shown, present, strict=True)):
        value = iou.get(label_set.names[index])
        if value is None or not math.isfinite(value) or not is_present:
            axes.barh(row, 100, height=0.62, color=ABSENT_COLOR, alpha=0.5)
            axes.text(2, row, "absent" if not is_present else "not scored", va="center", color="#777777", fontsize=10)
            continue
        axes.barh(
            row, 100 * value, height=0.62, color=label_set.palette[index] / 255, edgecolor="#555555", linewidth=0.8
        )
        axes.text(100 * value + 2, row, f"{100 * value:.1f}", va="center", fontsize=10)
    axes.set(xlim=(0, 112), ylim=(len(shown) - 0.5, -0.5), yticks=[], xticks=range(0, 101, 20))
    style_axes(axes, "IoU of each class")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("IoU, percent")
