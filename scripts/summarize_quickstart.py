"""Print what the quickstart has learned, stage by stage, beside baselines, and draw its map beside the truth.

    python scripts/summarize_quickstart.py runs/quickstart

Reads what `make quickstart` leaves in a folder: data/, source_only/, stage1/, audit/, ensemble/ and map.tif. Writes
quickstart.png into it. All scores are mIoU on exact labels.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_seg.errors import UserError, file_errors, one_line_errors
from hf_seg.settings import Parser

COMMON = 0.05  # a class with more than this fraction of the truth must not have an IoU of 0
LONGEST_SIDE = 1024  # of the maps in the picture, in pixels


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of the quickstart")
    options: argparse.Namespace = parser.parse_args()
    return options


def read_json(path: Path) -> dict[str, Any]:
    """Read a record of a stage.

    Raises:
        UserError: it is missing or damaged.
    """
    with file_errors(path, "cannot be read", "run `make quickstart` first"):
        text = path.read_text(encoding="utf-8")
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run `make quickstart` again") from None
    return found


def score_baselines(data_dir: Path) -> dict[str, float]:
    """Score what needs no network on the test tiles, fitted to the exact labels of train."""
    from hf_seg.data.open_earth_map import load_open_earth_map_sar
    from hf_seg.data.samples import LabelledImages
    from hf_seg.data.tile_files import read_tile
    from hf_seg.studies.baselines import score_histogram
    from hf_seg.synthetic import EXTRA_FOLDER

    train = load_open_earth_map_sar(data_dir, "train")
    exact = data_dir.parent / EXTRA_FOLDER / "train_clean_labels"
    images = LabelledImages(train, "sar")
    fit = [
        (images[index].image, read_tile(str(exact / f"{image_id}.tif"), "label")[0])
        for index, image_id in enumerate(images.image_ids)
    ]
    test = LabelledImages(load_open_earth_map_sar(data_dir, "test"), "sar")
    score = [(sample.image, sample.label) for sample in (test[index] for index in range(len(test)))]
    return {
        "majority class everywhere": score_histogram(fit, score, "majority"),
        "histogram of 9 x 9 windows": score_histogram(fit, score, "window"),
    }


def score_map(folder: Path) -> dict[str, Any]:
    """Score the map of the large scene, and draw it beside the scene and the truth."""
    import numpy as np
    import rasterio

    from hf_seg.labels import BACKGROUND, IGNORE_INDEX
    from hf_seg.metrics import ConfusionMatrix
    from hf_seg.report.panels import plot_panel

    names = {"scene": "data/scene.tif", "truth": "data/scene_label.tif", "map": "map.tif"}
    pixels = {}
    for name, file in names.items():
        with (
            file_errors(folder / file, "cannot be read", "run `make quickstart` first"),
            rasterio.open(folder / file) as source,
        ):
            pixels[name] = source.read(1)
    mapped = pixels["map"] != BACKGROUND
    counts = ConfusionMatrix()
    counts.update(pixels["map"][mapped], np.where(pixels["truth"] == BACKGROUND, IGNORE_INDEX, pixels["truth"])[mapped])
    step = -(-max(mapped.shape) // LONGEST_SIDE)
    scene, truth, label_map = (array[::step, ::step] for array in pixels.values())
    label_map = np.where(label_map == BACKGROUND, np.uint8(IGNORE_INDEX), label_map)
    titles = ("SAR", "truth", "map of the ensemble")
    plot_panel([("2048 x 2048 pixels", scene, truth, label_map)], folder / "quickstart.png", titles=titles)
    return counts.compute()


def warnings_of(scores: dict[str, dict[str, Any]], histogram: float) -> Iterator[str]:
    """Yield what should not be: a common class that is never right, a network below the histogram."""
    for name, found in scores.items():
        matrix, total = found["confusion_matrix"], max(sum(map(sum, found["confusion_matrix"])), 1)
        for index, (label, iou) in enumerate(found["iou"].items()):
            if iou == 0 and sum(matrix[index]) > COMMON * total:
                yield f"{name}: {label} is {100 * sum(matrix[index]) / total:.0f} % of the truth and its IoU is 0"
        if found["mean_iou"] <= histogram:
            yield f"{name}: {found['mean_iou']:.3f} is not above the histogram, {histogram:.3f}"


def main() -> None:
    """Collect, print, draw."""
    folder = parse().folder
    optical = {
        "source only": read_json(folder / "source_only/eval_results.json"),
        "adapted": read_json(folder / "stage1/eval_results.json"),
    }
    audit, ensemble = read_json(folder / "audit/audit.json"), read_json(folder / "ensemble/eval_results.json")
    baselines, large = score_baselines(folder / "data/dfc25_track1"), score_map(folder)
    labels = audit["truth"]["same_pixels"]
    members = {f"SAR network, {member['origin']}": member for member in ensemble["members"]}
    sar = {**members, "ensemble of the three": ensemble, "map of the large scene": large}
    rows = [
        *((f"optical network, {name}, source val", found["mean_iou"]) for name, found in optical.items()),
        *((f"optical network, {name}, target val", found["target"]["mean_iou"]) for name, found in optical.items()),
        ("labels of the source-only network, train", labels["a"]["mean_iou"]),
        ("our pseudo-labels, train", labels["b"]["mean_iou"]),
        *((f"{name}, SAR test", score) for name, score in baselines.items()),
        *((f"{name}{'' if name.startswith('map') else ', test'}", found["mean_iou"]) for name, found in sar.items()),
    ]
    print(f"\n{'what':44} mIoU")
    for name, score in rows:
        print(f"{name:44} {score:.3f}")
    for warning in warnings_of(sar, baselines["histogram of 9 x 9 windows"]):
        print(f"WARNING {warning}")
    print(f"look at: {folder}/quickstart.png, {folder}/map_preview.png, {folder}/audit/index.html")


if __name__ == "__main__":
    with one_line_errors():
        main()
