"""The figure of the IoU of each class, for every member of an ensemble and for the ensemble."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_seg.report.style import DPI, LINE_COLORS, save_figure, style_axes


def plot_member_scores(
    members: Sequence[tuple[str, Mapping[str, Any]]], ensemble: Mapping[str, Any], output: Path
) -> None:
    """Draw a row for each class that occurs, and one for their mean, with a mark for each network.

    Args:
        members: name and scores of each: `mean_iou` and `iou` as in `eval_results.json`.
        ensemble: the same for the ensemble.
        output: image file to write.
    """
    rows = [name for name, iou in ensemble["iou"].items() if iou is not None]
    labels = ["mean", *rows]
    figure = Figure(figsize=(8.5, 1.6 + 0.45 * len(labels)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    scores = [_percents(score, rows) for _, score in members]
    for row, span in enumerate(zip(*scores, strict=True)):
        axes.plot((min(span), max(span)), (row, row), color="#c4c4c4", linewidth=5, solid_capstyle="round")
    for (name, _), values, color in zip(members, scores, cycle(LINE_COLORS[1:]), strict=False):
        axes.plot(values, range(len(labels)), "o", color=color, markersize=6, label=name, clip_on=False, zorder=3)
    average = _percents(ensemble, rows)
    diamond: dict[str, Any] = {"color": LINE_COLORS[0], "markersize": 7, "clip_on": False, "zorder": 4}
    axes.plot(average, range(len(labels)), "D", label="ensemble", **diamond)
    axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5), xlim=(0, None))
    style_axes(axes, f"Members and ensemble, {ensemble['n_images']:,} tile(s)")
    axes.axhline(0.5, color="#888888", linewidth=0.8)
    axes.set_xlabel("IoU, percent")
    axes.grid(visible=False, axis="y")
    longest = max(len(name) for name, _ in members)
    figure.legend(loc="outside lower center", ncols=3 if longest < 30 else 1, frameon=False, fontsize=9)
    save_figure(figure, output)


def _percents(scores: Mapping[str, Any], rows: Sequence[str]) -> list[float]:
    return [100 * value for value in (scores["mean_iou"], *(scores["iou"][name] for name in rows))]
