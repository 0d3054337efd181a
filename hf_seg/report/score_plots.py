"""Charts of how sure scores and predictions are: intervals by class, reliability, accuracy of the pixels kept.

They are narrow, so that their text can be read on a phone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_seg.report.style import LINE_COLORS, save_figure, style_axes

DARK, BLUE, RED = LINE_COLORS[:3]
DPI = 150  # for screens with small pixels


def plot_intervals(
    rows: Mapping[str, Mapping[str, float | None] | None], output: Path, title: str, label: str, *, signed: bool = False
) -> None:
    """Draw a value with its interval in each row.

    Args:
        rows: by name `value`, `low` and `high` as fractions; None where there is none. The first is their mean.
        label: of the axis.
        signed: these are differences, which get a line at 0; else the axis begins there.
    """
    figure = Figure(figsize=(5.2, 0.9 + 0.34 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for row, found in enumerate(rows.values()):
        if found is None or found["value"] is None:
            axes.text(0, row, "  not in the truth", va="center", color="#777777", fontsize=9)
            continue
        color = DARK if row == 0 else BLUE
        if found["low"] is not None and found["high"] is not None:
            bounds = [100 * found["low"], 100 * found["high"]]
            axes.plot(bounds, [row, row], color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(100 * found["value"], row, "D" if row == 0 else "o", color=color, markersize=6, clip_on=False)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=label)
    style_axes(axes, title)
    axes.grid(visible=False, axis="y")
    axes.axhline(0.5, color="#888888", linewidth=0.8)
    if signed:
        axes.axvline(0, color=RED, linewidth=1, zorder=1)
    else:
        axes.set_xlim(left=0)
    save_figure(figure, output)


def plot_reliability(bins: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw accuracy over mean confidence, with the share of pixels of each bin below; the diagonal is calibrated."""
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    axes, shares = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    filled = [each for each in bins if each["share"] > 0]
    axes.plot([0, 100], [0, 100], "--", color="#888888", linewidth=1, label="calibrated")
    confidence, accuracy = ([100 * each[key] for each in filled] for key in ("confidence", "accuracy"))
    axes.plot(confidence, accuracy, "o-", color=BLUE, markersize=5, label="pixels of a bin")
    axes.set(ylim=(0, 100), ylabel="correct, percent")
    axes.legend(frameon=False, fontsize=9)
    style_axes(axes, "Reliability")
    left, width = [100 * each["low"] for each in bins], 100 / len(bins)
    shares.bar(left, [100 * each["share"] for each in bins], 0.9 * width, align="edge", color=BLUE)
    shares.set(xlim=(0, 100), xlabel="confidence, percent", ylabel="pixels, %")
    style_axes(shares, "")
    save_figure(figure, output)


def plot_coverage(coverage: np.ndarray, output: Path, marked: Sequence[float]) -> None:
    """Draw the accuracy of the pixels kept over their fraction.

    Args:
        coverage: (N, 3) of `Calibration.coverage`.
        marked: thresholds to name.
    """
    figure = Figure(figsize=(5.2, 4.6), dpi=DPI, layout="constrained")
    axes: Axes = figure.subplots()
    threshold, kept, accuracy = coverage[coverage[:, 1] > 0].T
    axes.plot(100 * kept, 100 * accuracy, color=BLUE, linewidth=2)
    for each in marked:
        index = int(np.searchsorted(threshold, each - 1e-9))
        if index < len(threshold):
            point = 100 * kept[index], 100 * accuracy[index]
            axes.plot(*point, "o", color=RED, markersize=5)
            axes.annotate(f"{each:g}", point, xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set(xlim=(0, 104), xlabel="pixels kept, percent", ylabel="correct among them, percent")
    style_axes(axes, "Accuracy of the pixels kept, by --abstain")
    save_figure(figure, output)
