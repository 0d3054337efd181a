"""Compare two sets of labels before a training on them is paid for: where do they differ, and which is better?

    python scripts/audit_labels.py data/dfc25_track1/train/labels runs/labels --output audit
    python scripts/audit_labels.py A B --truth T --images data/dfc25_track1/train/rgb_images

A set is a folder of label images named by image id (GeoTIFF or PNG; ids 0..8, 0 and 255 = no label; or a folder with
such folders: <region>/labels, train/labels), or pseudo-labels: a folder of Parquet files or a Hub id, with the columns
image_id, pseudo_label and, if known, confidence. Sets are joined by image id; a truth may cover some tiles only.
The output folder gets index.html (a page of its own), audit.md, audit.json, transition.png and gallery.png.
"""

import argparse
import csv
import json
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from tqdm import tqdm

from hf_seg.errors import DatasetError, UserError, one_line_errors
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, NUM_LABELS
from hf_seg.studies.label_audit import calibrate, count_confidence, count_pixels, summarize
from hf_seg.studies.label_audit_figures import GalleryRow, plot_gallery, plot_transitions
from hf_seg.studies.label_audit_page import GALLERY, NAMES, TRANSITIONS, judge, write_report

FILES = {"audit.json", "audit.md", "index.html", TRANSITIONS, GALLERY}
SUFFIXES = (".tif", ".tiff", ".png")
REGION_RULE = re.compile(r"(?!(?:Train|Val|Test)Area_)(.+)_[0-9]+")  # OpenEarthMap: <region>_<n>; OEM-SAR has none
NO_REGION = "(none)"
NAMED = 3  # examples of tiles without a partner


class LabelSet:
    """Label maps by image id, each read when it is asked for.

    Args:
        source: folder of label images, or folder or Hub id of pseudo-labels.

    Attributes:
        places: {image id: file, or row of the dataset}.

    Raises:
        UserError: nothing of the kind is there, or an id stands twice.
    """

    def __init__(self, source: str) -> None:
        path = Path(source)
        self.source = source
        self.rows: datasets.Dataset | None = None
        self.places: dict[str, Any]
        if path.is_file():
            raise UserError(f"{source} is a file: pass its folder")
        if path.is_dir() and next(path.rglob("*.parquet"), None) is None:
            self.places = list_images(path, "*") or list_images(path, "*/labels/*")
            if not self.places:
                raise UserError(f"{source}: holds neither label images ({', '.join(SUFFIXES)}) nor Parquet files")
            return
        self.rows = load_rows(source)
        ids = self.rows["image_id"][:]
        self.places = {image_id: row for row, image_id in enumerate(ids)}
        if len(self.places) < len(ids):
            twice = next(image_id for row, image_id in enumerate(ids) if self.places[image_id] != row)
            raise UserError(f"{source}: image_id {twice!r} stands twice")

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the (H, W) uint8 label of a tile, 0 = none, and its (H, W) uint8 confidence, None if unknown.

        Raises:
            DatasetError: unreadable, not one band, or an id that is no class.
        """
        place, confidence = f"{self.source}, {image_id}", None
        if self.rows is None:
            label = read_image(self.places[image_id])
        else:
            try:
                row = self.rows[self.places[image_id]]
            except (OSError, SyntaxError) as error:  # what Pillow raises
                raise DatasetError(f"{place}: cannot be read ({error}); make it again") from None
            label = np.asarray(row["pseudo_label"])
            confidence = np.asarray(row["confidence"]) if "confidence" in row else None
        if label.ndim != 2 or label.dtype.kind not in "iu":
            raise DatasetError(f"{place}: expected one band of class ids, found {label.shape} {label.dtype}")
        if (wrong := label[((label < 0) | (label >= NUM_LABELS)) & (label != IGNORE_INDEX)]).size:
            allowed = f"0..{NUM_LABELS - 1}, nor {IGNORE_INDEX} for none"
            raise DatasetError(f"{place}: label {wrong[0]} is no class {allowed}; remap it")
        if confidence is not None and (confidence.shape, confidence.dtype) != (label.shape, np.uint8):
            found = f"{confidence.shape} {confidence.dtype}"
            raise DatasetError(f"{place}: expected confidence as {label.shape} uint8, found {found}")
        return np.where(label == IGNORE_INDEX, BACKGROUND, label).astype(np.uint8), confidence


def load_rows(source: str) -> datasets.Dataset:
    """Load pseudo-labels from a folder or the Hub, with their confidence where there is one."""
    folder = Path(source)
    try:
        rows = datasets.load_dataset(str(folder.resolve()) if folder.exists() else source, split="train")
    except Exception as error:  # datasets raises many kinds; each is about this path
        reason = str(error).partition("\n")[0]
        raise UserError(f"{source}: neither a folder of labels nor a dataset that can be loaded ({reason})") from None
    if missing := {"image_id", "pseudo_label"} - set(rows.column_names):
        raise UserError(f"{source}: no column {', '.join(sorted(missing))} among {rows.column_names}")
    return rows.select_columns([c for c in ("image_id", "pseudo_label", "confidence") if c in rows.column_names])


def list_images(folder: Path, pattern: str) -> dict[str, Path]:
    """Map image id (stem) -> file for the images that match; two files of one id are a UserError."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if (first := files.setdefault(path.stem, path)) != path:
            raise UserError(f"{path} and {first} claim one image_id, {path.stem!r}: remove one")
    return files


def read_image(path: Path) -> np.ndarray:
    """Return the pixels of a GeoTIFF or PNG: (H, W) of one band, else (H, W, bands)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as file:
                bands = file.read()
    except RasterioError as error:
        raise DatasetError(f"{path}: cannot be read ({error.__cause__ or error}); write or download it again") from None
    return bands[0] if len(bands) == 1 else np.moveaxis(bands, 0, -1)


def match_ids(sets: dict[str, LabelSet]) -> list[str]:
    """Return the ids that A and B share, sorted; UserError if there are none, or none of them in the truth."""
    shared = set(sets["a"].places)
    for key in [key for key in ("b", "truth") if key in sets]:
        common = shared & sets[key].places.keys()
        if not common:
            examples = f"{min(sets[key].places)!r} against {min(shared)!r}"
            raise UserError(f"{sets[key].source} and {sets['a'].source} share no image id, e.g. {examples}")
        shared = common if key == "b" else shared
    return sorted(shared)


def read_tiles(sets: dict[str, LabelSet], image_id: str) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Read one tile of every set that has it; DatasetError if the sizes differ."""
    tiles = {key: label_set.read(image_id) for key, label_set in sets.items() if image_id in label_set.places}
    if len({label.shape for label, _ in tiles.values()}) > 1:
        sizes = ", ".join(f"{sets[key].source} {label.shape}" for key, (label, _) in tiles.items())
        raise DatasetError(f"{image_id}: the label maps differ in size: {sizes}")
    return tiles


def read_regions(file: Path | None, image_ids: Sequence[str]) -> list[str] | None:
    """Return the region of each tile: as the CSV file says, else by OpenEarthMap's names; None if none is known."""
    if file is None:
        regions = [match[1] if (match := REGION_RULE.fullmatch(image_id)) else NO_REGION for image_id in image_ids]
        return None if set(regions) == {NO_REGION} else regions
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        if not {"image_id", "region"} <= set(reader.fieldnames or ()):
            raise UserError(f"--regions {file}: expected a header with image_id and region, found {reader.fieldnames}")
        region_of = {row["image_id"]: row["region"] for row in reader}
    if not region_of.keys() & set(image_ids):
        raise UserError(f"--regions {file}: names none of the {len(image_ids)} tiles, e.g. not {image_ids[0]!r}")
    return [region_of.get(image_id) or NO_REGION for image_id in image_ids]


def count_tiles(sets: dict[str, LabelSet], image_ids: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Count all tiles, one in memory at a time: (N, 9, 9, 9), and (256, 2) for each set with a confidence."""
    counts = np.zeros((len(image_ids), NUM_LABELS, NUM_LABELS, NUM_LABELS), dtype=np.uint32)
    levels: dict[str, np.ndarray] = {}
    for index, image_id in enumerate(tqdm(image_ids, desc="audit", unit="tile")):
        tiles = read_tiles(sets, image_id)
        labels = {key: label for key, (label, _) in tiles.items()}
        counts[index] = count_pixels(labels["a"], labels["b"], labels.get("truth"))
        for key, other in (("a", "b"), ("b", "a")):
            confidence, reference = tiles[key][1], labels.get("truth" if "truth" in sets else other)
            if confidence is not None and reference is not None:
                levels[key] = levels.get(key, 0) + count_confidence(confidence, labels[key], reference)
    return counts, levels


def audit(sets: dict[str, LabelSet], image_ids: list[str], regions: Path | None, seed: int) -> dict[str, Any]:
    """Read every tile once and return the content of audit.json; UserError if the sets share no labelled pixel."""
    region_names = read_regions(regions, image_ids)
    counts, levels = count_tiles(sets, image_ids)
    if not counts[:, :, 1:, 1:].any():
        raise UserError(f"{sets['a'].source} and {sets['b'].source} label no pixel in common; is one of them empty?")
    result = summarize(image_ids, counts, region_names, seed=seed)
    if "truth" in sets and result["truth"] is None:
        raise UserError(f"--truth {sets['truth'].source}: labels no pixel that A and B both label")
    described, partner = {}, {"a": set(sets["b"].places), "b": set(sets["a"].places), "truth": set(image_ids)}
    for key, label_set in sets.items():
        unmatched = sorted(label_set.places.keys() - partner[key])
        described[key] = {"source": label_set.source, "n_tiles": len(label_set.places)}
        described[key] |= {"n_unmatched": len(unmatched), "unmatched": unmatched[:NAMED]}
    references = {"a": "B", "b": "A"} if "truth" not in sets else dict.fromkeys("ab", "truth")
    calibrations = {key: calibrate(found) for key, found in levels.items()}
    confidence = {key: {"reference": references[key], **found} for key, found in calibrations.items() if found}
    return {"verdict": judge(result), "sets": described, "confidence": confidence, **result}


def read_gallery(
    sets: dict[str, LabelSet], tiles: dict[str, dict[str, float]], images: dict[str, Path], n_rows: int
) -> list[GalleryRow]:
    """Read the tiles with the largest share of differing pixels once more, with their images."""
    rows = []
    for image_id in sorted(tiles, key=lambda image_id: (-tiles[image_id]["disagreement"], image_id))[:n_rows]:
        labels = {key: label for key, (label, _) in read_tiles(sets, image_id).items()}
        image = read_image(images[image_id]) if image_id in images else None
        if image is not None and (
            image.dtype != np.uint8 or image.shape not in (size := labels["a"].shape, (*size, 3))
        ):
            expected = f"1 or 3 bands of {labels['a'].shape} uint8"
            raise DatasetError(f"{images[image_id]}: expected {expected}, found {image.shape} {image.dtype}")
        rows.append(GalleryRow(image_id, image, labels["a"], labels["b"], labels.get("truth")))
    return rows


def publish(output: Path, result: dict[str, Any], rows: list[GalleryRow]) -> None:
    """Write the five files aside and rename their folder, so that it appears whole or not at all."""
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    aside.mkdir(parents=True)
    try:
        plot_transitions(result, aside / TRANSITIONS)
        plot_gallery(rows, aside / GALLERY)
        write_report(result, aside)
        content = json.dumps(result, indent=1, allow_nan=False) + "\n"
        (aside / "audit.json").write_text(content, encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)  # an older audit and nothing else, as was checked
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; UserError for an output folder that holds other files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="the labels at hand")
    parser.add_argument("b", metavar="B", help="the labels that may replace them")
    parser.add_argument("--truth", metavar="T", help="checked labels of some or all of the tiles")
    parser.add_argument("--images", metavar="DIR", type=Path, help="optical or SAR tiles to show in the gallery")
    parser.add_argument(
        "--regions", metavar="CSV", type=Path, help="columns image_id, region (else by the tiles' names)"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("audit"), help="folder to write (%(default)s)"
    )
    parser.add_argument("--gallery", metavar="N", type=int, default=6, help="tiles in the gallery (%(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the bootstrap (%(default)s)")
    args = parser.parse_args(arguments)
    args.output = args.output.resolve()
    if args.output.exists() and (not args.output.is_dir() or {path.name for path in args.output.iterdir()} - FILES):
        raise UserError(f"--output {args.output} is no earlier audit; choose another folder")
    if args.gallery < 1 or args.seed < 0:
        raise UserError(f"--gallery must be at least 1 and --seed at least 0; got {args.gallery}, {args.seed}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, count, judge, write, print."""
    args = parse(arguments)
    sets = {key: LabelSet(source) for key in ("a", "b", "truth") if (source := getattr(args, key)) is not None}
    image_ids = match_ids(sets)
    images = list_images(args.images, "*") if args.images else {}
    if args.images and not images.keys() & set(image_ids):
        raise UserError(f"--images {args.images}: holds an image of none of the tiles, e.g. not of {image_ids[0]!r}")
    result = audit(sets, image_ids, args.regions, args.seed)
    publish(args.output, result, read_gallery(sets, result["tiles"], images, args.gallery))
    for key, found in result["sets"].items():
        if found["n_unmatched"]:
            print(f"left out: {found['n_unmatched']} tiles of {NAMES[key]}, e.g. {', '.join(found['unmatched'])}")
    print(f"{result['n_tiles']} tiles compared. {result['verdict']}\nreport: {args.output / 'index.html'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
