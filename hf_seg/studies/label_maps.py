"""Label maps on disk or on the Hub: read them, match them by image id, and count their pixels tile by tile."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL.Image import DecompressionBombError
from tqdm import tqdm

from hf_seg.data.hub_dataset import DATASET_FILE, find_hub_dataset
from hf_seg.data.open_earth_map import load_open_earth_map, load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set
from hf_seg.data.pseudo_label_dataset import load_pseudo_labels
from hf_seg.data.samples import has_image
from hf_seg.data.tile_shards import layout_of
from hf_seg.errors import DatasetError, UserError, file_errors
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.studies.images import LOSSLESS, list_images, read_image
from hf_seg.studies.label_audit import count_confidence, count_pixels

GENERIC_FOLDERS = ("labels", "train", "val", "test")  # such a name needs the folder above it
REGION_RULE = re.compile(r"(?!(?:Train|Val|Test)Area_)(.+)_[0-9]+")  # OpenEarthMap: <region>_<n>; OEM-SAR has none
NO_REGION = "(none)"


class LabelMaps:
    """Label maps by image id, each read on access.

    Args:
        source: folder of label images; folder or Hub id of pseudo-labels; or Hub id of tiles, whose train labels count.
        name: what the report calls the maps; by default the last parts of the source.
        label_set: classes, and the pixel values by which label images code them; pseudo-labels are ids already.

    Raises:
        UserError: the source contains no labels, an image id twice, or pseudo-labels of other classes.
    """

    def __init__(self, source: str, name: str | None = None, label_set: LabelSet = OPEN_EARTH_MAP) -> None:
        path = Path(source)
        self.source = source
        self.label_set = label_set
        self.are_ids = False
        self.name = name or default_name(source)
        self.rows: datasets.Dataset | None = None
        self.entries: dict[str, Any]  # {image id: file, or row of the dataset}
        if path.is_file():
            raise UserError(f"{source} is a file: pass its folder")
        if path.is_dir() and next(path.rglob("*.parquet"), None) is None:
            self.entries = images_by_id(path, "*") or images_by_id(path, "*/labels/*")
            if not self.entries:
                raise UserError(f"{source}: contains neither label images ({', '.join(LOSSLESS)}) nor Parquet files")
            return
        self.rows = self._load_labels_of_tiles()
        if self.rows is None:
            self.are_ids = True
            columns = ("image_id", "pseudo_label", "confidence")
            self.rows = load_pseudo_labels(source, columns, label_set=label_set)
        ids = self.rows["image_id"][:]
        self.entries = {image_id: row for row, image_id in enumerate(ids)}
        if len(self.entries) < len(ids):
            duplicate = next(image_id for row, image_id in enumerate(ids) if self.entries[image_id] != row)
            raise UserError(f"{source}: duplicate image_id {duplicate!r}")

    def _load_labels_of_tiles(self) -> datasets.Dataset | None:
        """Load the train labels of tiles on the Hub, coded as their `dataset.json` says; None if there are no tiles."""
        try:
            hub = None if Path(self.source).exists() else find_hub_dataset(self.source)
        except UserError:
            return None  # `load_pseudo_labels` says what is wrong with a name
        if hub is None or DATASET_FILE not in hub.files:
            return None
        first = hub.shards("train")[0]
        layout = layout_of(hub.fetch(first), f"{hub}, {first}")
        self.label_set = find_label_set(self.source, layout, self.label_set)
        load = load_open_earth_map if layout == "OpenEarthMap" else load_open_earth_map_sar
        rows: Any = load(self.source, "train", label_set=self.label_set)
        if not all(has_image(rows, "label")):
            raise DatasetError(f"{hub}: tiles of split train have no label")
        return rows.select_columns(["image_id", "label"]).rename_column("label", "pseudo_label")

    def read(self, image_id: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a tile's (H, W) uint8 class ids, 0 = no label, and (H, W) uint8 confidence, 255 = 1.0, or None.

        Raises:
            DatasetError: a file that cannot be read, not one band, or an id that is not a class.
        """
        place, confidence = f"{self.source}, {image_id}", None
        if self.rows is None:
            label = read_image(self.entries[image_id])
        else:
            try:
                row = self.rows[self.entries[image_id]]
            except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # what Pillow raises
                raise DatasetError(f"{place}: cannot be read ({error}); create it again") from None
            label = np.asarray(row["pseudo_label"])
            confidence = np.asarray(row["confidence"]) if "confidence" in row else None
        if label.ndim != 2 or label.dtype.kind not in "iu":
            raise DatasetError(f"{place}: expected one band of class ids, found {label.shape} {label.dtype}")
        label = self._to_ids(label, place)
        if confidence is not None and (confidence.shape, confidence.dtype) != (label.shape, np.uint8):
            found = f"{confidence.shape} {confidence.dtype}"
            raise DatasetError(f"{place}: expected confidence as {label.shape} uint8, found {found}")
        return label, confidence

    def _to_ids(self, label: np.ndarray, place: str) -> np.ndarray:
        """Return (H, W) uint8 class ids, 0 = no label, of pixel values; DatasetError for one that is no class."""
        ids = self.label_set.to_ids(label, are_ids=self.are_ids)
        if (wrong := label[ids < 0]).size:
            allowed = f"0..{self.label_set.num_labels - 1}, or {IGNORE_INDEX} for no label"
            if not self.are_ids and self.label_set != OPEN_EARTH_MAP:
                allowed = "see `values` of the label set"
            raise DatasetError(f"{place}: {wrong[0]} is not a class id ({allowed}); remap it")
        return np.where(ids == IGNORE_INDEX, BACKGROUND, ids).astype(np.uint8)


def default_name(source: str) -> str:
    """Return the last part of a folder, with those above it as long as they are generic; a Hub id as it is."""
    path = Path(source)
    if not path.exists():
        return source
    parts = path.resolve().parts
    first = max(index for index, part in enumerate(parts) if part not in GENERIC_FOLDERS)
    return "/".join(parts[first:]).strip("/")


def images_by_id(folder: Path, pattern: str) -> dict[str, Path]:
    """Map image id (stem) to file for the label images that match; two files of one id are a UserError."""
    files: dict[str, Path] = {}
    for path in list_images(folder, pattern, LOSSLESS):
        if (first := files.setdefault(path.stem, path)) != path:
            raise UserError(f"{path} and {first} have the same image_id, {path.stem!r}: remove one")
    return files


def match_ids(sets: dict[str, LabelMaps]) -> list[str]:
    """Return the ids that the sets `a` and `b` share, sorted.

    Raises:
        UserError: A and B share no id, or the truth has none of A's.
    """
    shared = set(sets["a"].entries)
    for key in [key for key in ("b", "truth") if key in sets]:
        common = shared & sets[key].entries.keys()
        if not common:
            examples = f"{min(sets[key].entries)!r} and {min(shared)!r}"
            raise UserError(f"{sets[key].source} and {sets['a'].source} share no image id, e.g. {examples}")
        shared = common if key == "b" else shared
    return sorted(shared)


def read_tiles(sets: dict[str, LabelMaps], image_id: str) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Read one tile of every set that has it; DatasetError if the sizes differ."""
    tiles = {key: maps.read(image_id) for key, maps in sets.items() if image_id in maps.entries}
    if len({label.shape for label, _ in tiles.values()}) > 1:
        sizes = ", ".join(f"{sets[key].source} {label.shape}" for key, (label, _) in tiles.items())
        raise DatasetError(f"{image_id}: the label maps differ in size: {sizes}")
    return tiles


def read_regions(file: Path | None, image_ids: Sequence[str]) -> list[str] | None:
    """Return the region of each tile, from a CSV file or from OpenEarthMap's tile names; None if none is known."""
    if file is None:
        regions = [match[1] if (match := REGION_RULE.fullmatch(image_id)) else NO_REGION for image_id in image_ids]
        return None if set(regions) == {NO_REGION} else regions
    with file_errors(file, "cannot be read"):
        try:
            table = pd.read_csv(file, usecols=["image_id", "region"], dtype=str, encoding="utf-8-sig", na_filter=False)
        except ValueError as error:  # of pandas, for any content that it cannot read
            reason = " ".join(str(error).split())
            raise UserError(f"{file}: expected CSV in UTF-8 with columns image_id and region ({reason})") from None
    region_of = dict(zip(table["image_id"], table["region"], strict=True))
    if not region_of.keys() & set(image_ids):
        raise UserError(f"{file}: contains none of the {len(image_ids)} tiles, e.g. not {image_ids[0]!r}")
    return [region_of.get(image_id) or NO_REGION for image_id in image_ids]


def count_tiles(sets: dict[str, LabelMaps], image_ids: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Apply `count_pixels` to all tiles, (N, C, C, C) uint32, and `count_confidence` to each set with a confidence.

    Confidence is compared with the truth or, without one, with the other set. One tile is in memory at a time.
    """
    num_labels = sets["a"].label_set.num_labels
    counts = np.zeros((len(image_ids), num_labels, num_labels, num_labels), dtype=np.uint32)
    levels: dict[str, np.ndarray] = {}
    for index, image_id in enumerate(tqdm(image_ids, desc="audit", unit="tile")):
        tiles = read_tiles(sets, image_id)
        labels = {key: label for key, (label, _) in tiles.items()}
        counts[index] = count_pixels(labels["a"], labels["b"], labels.get("truth"), num_labels=num_labels)
        for key, other in (("a", "b"), ("b", "a")):
            confidence, reference = tiles[key][1], labels.get("truth" if "truth" in sets else other)
            if confidence is not None and reference is not None:
                levels[key] = levels.get(key, 0) + count_confidence(confidence, labels[key], reference)
    return counts, levels
