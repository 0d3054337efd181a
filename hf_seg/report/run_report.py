"""The report of a trained network or ensemble: its numbers, its figures, and one page with both.

The numbers are also written as JSON: the content of `eval_results.json`, and beside it `intervals` and `calibration`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_seg import __version__
from hf_seg.bootstrap import REPLICATES, Interval, Scores, bootstrap_difference, bootstrap_scores
from hf_seg.calibration import Calibration
from hf_seg.files import write_atomic
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.report.page import FEW_TILES, embed_from, environment, say_difference
from hf_seg.report.plots import plot_curves, plot_member_scores, read_series
from hf_seg.report.score_plots import plot_coverage, plot_intervals, plot_reliability
from hf_seg.report.style import colorize, percent, stretch

ABSTAIN = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # thresholds in the table
LARGEST_PICTURE = 400  # pixels
VALIDATION = ("mean_iou", "overall_accuracy")  # ends of the keys in metrics.jsonl


class ShownTile(NamedTuple):
    """A tile to be shown."""

    mean_iou: float
    image_id: str
    image: np.ndarray  # (H, W) or (H, W, 3) uint8
    label: np.ndarray  # (H, W) uint8 class ids
    label_map: np.ndarray  # the same, predicted
    entropy: np.ndarray  # (H, W) uint8, 255 = uniform


def describe(scores: Scores, label_set: LabelSet = OPEN_EARTH_MAP) -> dict[str, Any]:
    """Return scores as JSON has them: `{value, low, high}` of each, None for a class that is not in the truth."""
    rows = {name: _as_row(each) for name, each in zip(label_set.names[1:], scores.iou[1:], strict=True)}
    return {**{key: _as_row(getattr(scores, key)) for key in ("mean_iou", "overall_accuracy")}, "iou": rows}


def summarize_intervals(
    matrices: np.ndarray, regions: Sequence[str] | None, seed: int, label_set: LabelSet = OPEN_EARTH_MAP
) -> dict[str, Any]:
    """Score (T, C, C) counts with intervals over `tiles` and, where the T regions are known, over `regions`."""
    by_region = None
    if regions is not None:
        by_region = describe(bootstrap_scores(matrices, groups=regions, seed=seed), label_set)
    n_regions = None if regions is None else len(set(regions))
    tiles = describe(bootstrap_scores(matrices, seed=seed), label_set)
    return {"tiles": tiles, "regions": by_region, "n_regions": n_regions}


def summarize_calibration(calibration: Calibration) -> dict[str, Any]:
    """Return `expected_error`, `mean_confidence`, the `bins`, and what each threshold of `abstain` keeps."""
    thresholds, kept, accuracy = calibration.coverage().T
    at = np.searchsorted(thresholds, np.array(ABSTAIN) - 1e-9)
    return {
        "expected_error": calibration.expected_error(),
        "mean_confidence": calibration.mean_confidence(),
        "bins": [{key: _number(value) for key, value in each._asdict().items()} for each in calibration.reliability()],
        "abstain": [
            {"threshold": threshold, "kept": float(kept[index]), "accuracy": _number(accuracy[index])}
            for threshold, index in zip(ABSTAIN, at, strict=True)
        ],
    }


def compare(
    matrices: np.ndarray,
    other: np.ndarray,
    name: str,
    other_name: str,
    seed: int,
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> dict[str, Any]:
    """Compare a network with another one on the same tiles: its `difference` and a `verdict` in words."""
    found = bootstrap_difference(other, matrices, seed=seed)
    verdict = say_difference(found.mean_iou, other_name, name, len(matrices), noun="Network", verb="is")
    return {"name": other_name, "verdict": verdict, "difference": describe(found, label_set)}


def write_report(
    output: Path,
    results: dict[str, Any],
    calibration: Calibration,
    shown: Mapping[str, Sequence[ShownTile]],
    *,
    label_set: LabelSet = OPEN_EARTH_MAP,
    metrics_file: Path | None = None,
    **more: Any,
) -> None:
    """Write the page, and `results` as JSON beside it.

    Args:
        output: the HTML file.
        results: the scores of `evaluate`, and `model`, `split`, `image`, `data`, `tta`, `stride`, `members`,
            `intervals`, `calibration`, `against` (None or of `compare`).
        calibration: of all pixels.
        shown: tiles by the heading that they stand under.
        label_set: names and colours of the classes.
        metrics_file: `metrics.jsonl` of a run, if there is one.
        more: `settings`, `training_data` and `audit`, as their files have them; empty where there are none.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        curve = _draw(results, calibration, folder, metrics_file)
        tiles = {
            heading: [
                (tile, _draw_tile(tile, folder, f"{heading}_{index}", label_set)) for index, tile in enumerate(group)
            ]
            for heading, group in shown.items()
        }
        content = {
            "results": results,
            "verdict": say_score(results),
            "replicates": REPLICATES,
            "tiles": tiles,
            "classes": label_set.names[1:],
            "colors": [bytes(color).hex() for color in label_set.palette[1:]],
            "curve": curve,
            "drawn": {path.name for path in folder.iterdir()},
            "embed": embed_from(folder),
            "version": __version__,
            **more,
        }
        page = environment("hf_seg.report").get_template("report.j2").render(content, layout="html.j2")
    write_atomic(output.with_suffix(".json"), json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomic(output, page)


def say_score(results: Mapping[str, Any]) -> str:
    """Say the mIoU with its interval, and how it compares."""
    found, n_tiles = results["intervals"]["tiles"]["mean_iou"], results["n_images"]
    interval = "no interval: a single tile"
    if found["low"] is not None:
        few = ", too few to rely on" if n_tiles < FEW_TILES else ""
        interval = f"95 % interval over {n_tiles:,} tiles: {100 * found['low']:.1f} to {100 * found['high']:.1f}{few}"
    score = f"{results['model']}: mIoU {percent(found['value'])} on {results['split']} ({interval})."
    return f"{score} {results['against']['verdict']}" if results["against"] else score


def _draw(
    results: dict[str, Any], calibration: Calibration, folder: Path, metrics_file: Path | None
) -> dict[str, Any] | None:
    """Draw the charts that the template embeds; return the validation scores of a run by step."""
    found = results["intervals"]["tiles"]
    plot_intervals({"mean": found["mean_iou"], **found["iou"]}, folder / "iou.png", "IoU of each class", "IoU, percent")
    plot_reliability(results["calibration"]["bins"], folder / "reliability.png")
    plot_coverage(calibration.coverage(), folder / "coverage.png", ABSTAIN[1:])
    if comparison := results["against"]:
        rows = {"mean": comparison["difference"]["mean_iou"], **comparison["difference"]["iou"]}
        plot_intervals(rows, folder / "against.png", "Difference of IoU", "points", signed=True)
    if len(results["members"]) > 1:
        plot_member_scores([(each["name"], each) for each in results["members"]], results, folder / "members.png")
    if metrics_file is None:
        return None
    plot_curves(metrics_file, folder / "curves.png")
    series = {key: values for key, values in read_series(metrics_file).items() if key.endswith(VALIDATION)}
    steps = sorted({step for values in series.values() for step in values.dropna().index})
    names = [key.replace("mean_iou", "mIoU").replace("_", " ") for key in series]
    return {"names": names, "rows": {step: [values.get(step) for values in series.values()] for step in steps}}


def _draw_tile(tile: ShownTile, folder: Path, stem: str, label_set: LabelSet) -> dict[str, str]:
    """Write image, truth, prediction and entropy of a tile, at most 400 pixels wide, and return the files by title."""
    image = tile.image if tile.image.ndim == 3 else (255 * stretch(tile.image)).astype(np.uint8)
    maps = {"truth": colorize(tile.label, label_set), "prediction": colorize(tile.label_map, label_set)}
    maps["uncertainty"] = tile.entropy
    files = {}
    for title, pixels in {"image": image, **maps}.items():
        picture = Image.fromarray(pixels)
        how = Image.Resampling.NEAREST if title in ("truth", "prediction") else Image.Resampling.BOX
        scale = min(LARGEST_PICTURE / max(picture.size), 1)
        files[title] = f"{stem}_{title}.png"
        picture.resize((round(scale * picture.width), round(scale * picture.height)), how).save(folder / files[title])
    return files


def _as_row(interval: Interval) -> dict[str, float | None] | None:
    row = {key: _number(value) for key, value in interval._asdict().items()}
    return None if row["value"] is None else row


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
