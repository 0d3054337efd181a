"""The result of an ablation study: scores of its rows, and differences with intervals, as tables and a figure."""

import csv
import io
import json
import subprocess
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_seg.bootstrap import REPLICATES, crossed_difference
from hf_seg.errors import UserError, file_errors
from hf_seg.files import write_atomic
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.page import embed_from, environment
from hf_seg.report.style import DPI, LINE_COLORS, save_figure, style_axes
from hf_seg.studies.ablation import PROJECT, Comparison
from hf_seg.studies.ablation_plan import Plan, Step

# The smallest difference that four of five such studies find (5 %, two-sided), in widths of the 95 % interval
DETECTABLE = (1.96 + 0.84) / (2 * 1.96)

Key = tuple[str, str, int]  # world, row, seed
Scored = tuple[np.ndarray, float | None, str]  # confusion matrices (T, C, C), seconds of training, folder


def read_tiles(step: Step) -> np.ndarray:
    """Return the confusion matrices of the scored tiles, (T, C, C) int64, sorted by image id."""
    path = step.folder / "scores.npz"
    try:
        with file_errors(path, "cannot be read"), np.load(path, allow_pickle=False) as scores:
            matrices: np.ndarray = scores["confusion_matrices"].astype(np.int64)
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); delete it, and score again") from None
    return matrices


def read_seconds(step: Step) -> float | None:
    """Return how long a step took; None if it was interrupted."""
    seconds: float | None = json.loads(step.record.read_text(encoding="utf-8"))["seconds"]
    return seconds


def collect(plan: Plan) -> dict[Key, Scored]:
    """Return tiles, seconds and origin of every row that is done; of a `best_of` row those of the row it takes."""
    found: dict[Key, Scored] = {}
    for key, step in plan.scores.items():
        if step.record.is_file():
            found[key] = (read_tiles(step), read_seconds(plan.trained[key]), plan.trained[key].folder.name)
    for (world, name, seed), rows in plan.choices.items():
        keys = [(world, row, seed) for row in rows]
        if keys and all(key in found for key in keys):
            best = max(keys, key=lambda key: _own_score(plan.trained[key]))
            found[world, name, seed] = (*found[best][:2], f"{best[1]}, best on val")
    return found


def _pool(found: Mapping[Key, Scored], worlds: Sequence[str]) -> dict[Key, Scored]:
    """Put the tiles of all worlds side by side; rows that a world lacks are left out."""
    pooled: dict[Key, Scored] = {}
    for _, name, seed in found:
        parts = [found.get((world, name, seed)) for world in worlds]
        if all(part is not None for part in parts):
            tiles, seconds, origins = zip(*(part for part in parts if part is not None), strict=True)
            total = None if None in seconds else float(sum(seconds))
            pooled["", name, seed] = (np.concatenate(tiles), total, ", ".join(origins))
    return pooled


def _own_score(step: Step) -> float:
    path = step.folder / "eval_results.json"
    with file_errors(path, "cannot be read", "`best_of` needs rows that score themselves on val"):
        return float(json.loads(path.read_text(encoding="utf-8"))["mean_iou"])


def summarize(plan: Plan, seeds: Sequence[int]) -> dict[str, Any]:
    """Score the rows and compare them; rows and comparisons that are not complete are left out.

    Returns:
        `study`, `question`, `commit`, `seeds`, `n_tiles`, `rows` and `comparisons`, all fit for JSON. Scores are
        fractions, differences points.
    """
    found, worlds = collect(plan), plan.worlds
    if plan.study.pool:
        found, worlds = _pool(found, worlds), [""]
    rows, comparisons = [], []
    for world in worlds:
        for name in plan.study.rows:
            runs = [{"seed": seed, **_run(*found[world, name, seed])} for seed in seeds if (world, name, seed) in found]
            if runs:
                rows.append({"world": world, "row": name, **_average(runs), "runs": runs})
        for comparison in plan.study.comparisons:
            pair = [[found.get((world, name, seed)) for seed in seeds] for name in (comparison.row, comparison.against)]
            if all(entry is not None for entries in pair for entry in entries):
                a, b = (np.stack([entry[0] for entry in entries if entry is not None]) for entries in pair)
                comparisons.append({"world": world, **_compare(comparison, a, b)})
    n_tiles = len(next(iter(found.values()))[0]) if found else 0
    return {
        "study": plan.study.name,
        "question": plan.study.question,
        "commit": _commit(),
        "seeds": [*seeds],
        "n_tiles": n_tiles,
        "rows": rows,
        "comparisons": comparisons,
    }


def _commit() -> str | None:
    """Return the commit of the code, "changed" if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--exclude=*", "--dirty=, changed"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _average(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average a row over its seeds: `mean` and `deviation` of the mIoU, `iou` of each class from 1 up, `seconds`."""
    scores = [run["mean_iou"] for run in runs]
    known = [run["seconds"] for run in runs if run["seconds"] is not None]
    classes = [[run["iou"][name] for run in runs] for name in OPEN_EARTH_MAP.names[1:]]
    return {
        "mean": float(np.mean(scores)),
        "deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "iou": [None if None in values else float(np.mean(values)) for values in classes],
        "seconds": float(np.mean(known)) if known else None,
    }


def _run(tiles: np.ndarray, seconds: float | None, origin: str) -> dict[str, Any]:
    scores = _score(tiles)
    return {name: scores[name] for name in ("mean_iou", "overall_accuracy", "iou")} | {
        "seconds": seconds,
        "origin": origin,
    }


def _compare(comparison: Comparison, row: np.ndarray, against: np.ndarray) -> dict[str, Any]:
    """Compare two rows on the same seeds and tiles, (S, T, C, C) each."""
    value, low, high = (100 * bound for bound in crossed_difference(against, row).mean_iou)
    per_seed = [100 * (_score(a)["mean_iou"] - _score(b)["mean_iou"]) for a, b in zip(row, against, strict=True)]
    result = "better" if low > 0 else "worse" if high < 0 else "not shown"
    interval = {"value": value, "low": low, "high": high, "detectable": DETECTABLE * (high - low)}
    return {**vars(comparison), **interval, "per_seed": per_seed, "result": result}


def _score(tiles: np.ndarray) -> dict[str, Any]:
    counts = ConfusionMatrix()
    counts.matrix += tiles.sum(axis=0)
    return counts.compute()


def render(summary: Mapping[str, Any], folder: Path, layout: str) -> str:
    """Return the report of a study, with the layout `html.j2` (the folder's figure in it) or `markdown.j2`."""
    template = environment("hf_seg.studies", html=layout == "html.j2").get_template("study.j2")
    content = {**summary, "classes": OPEN_EARTH_MAP.names[1:], "replicates": REPLICATES, "embed": embed_from(folder)}
    return template.render(content, layout=layout)


def to_csv(summary: Mapping[str, Any]) -> str:
    """Return one line per row and seed, with the IoU of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["world", "row", "seed", "mean_iou", "overall_accuracy", *OPEN_EARTH_MAP.names[1:], "seconds", "origin"]
    )
    for row in summary["rows"]:
        for run in row["runs"]:
            iou = [run["iou"][name] for name in OPEN_EARTH_MAP.names[1:]]
            scores = [run["mean_iou"], run["overall_accuracy"], *iou]
            writer.writerow([row["world"], row["row"], run["seed"], *scores, run["seconds"], run["origin"]])
    return text.getvalue()


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the scores of the rows, a dot a seed, beside the differences with their intervals."""
    height = 1.6 + 0.34 * max(len(summary["rows"]), len(summary["comparisons"]))
    figure = Figure(figsize=(13, height), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = []
    for place, row in enumerate(summary["rows"]):
        scores = [100 * run["mean_iou"] for run in row["runs"]]
        left.plot(scores, [place] * len(scores), "o", color=LINE_COLORS[1], alpha=0.55, markersize=5)
        left.plot(100 * row["mean"], place, "|", color=LINE_COLORS[0], markersize=15, markeredgewidth=2)
        names.append(_title(row["world"], row["row"]))
    _label(left, "Scores: a dot per seed, and their mean", names, "mIoU, %")
    names = []
    for place, each in enumerate(summary["comparisons"]):
        color = {"better": LINE_COLORS[3], "worse": LINE_COLORS[2]}.get(each["result"], "#8a8a8a")
        right.plot([each["low"], each["high"]], [place, place], color=color, linewidth=2.5)
        right.plot(each["value"], place, "o", color=color, markersize=7)
        right.plot(each["per_seed"], [place] * len(each["per_seed"]), "|", color="#8a8a8a", markersize=8)
        names.append(_title(each["world"], f"{each['row']} - {each['against']}"))
    right.axvline(0, color=LINE_COLORS[0], linewidth=1)
    _label(right, "Differences, 95 % intervals; a tick a seed", names, "points of mIoU")
    save_figure(figure, path)


def _title(world: str, name: str) -> str:
    return f"{name} ({world})" if world else name


def _label(axes: Axes, title: str, names: Sequence[str], unit: str) -> None:
    style_axes(axes, title)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(unit)


def write_results(summary: Mapping[str, Any], folder: Path) -> None:
    """Write results.html, the same as Markdown, JSON and CSV, and results.png to a folder."""
    write_atomic(folder / "results.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(folder / "results.csv", to_csv(summary))
    draw(summary, folder / "results.png")
    write_atomic(folder / "results.md", render(summary, folder, "markdown.j2"))
    write_atomic(folder / "results.html", render(summary, folder, "html.j2"))
