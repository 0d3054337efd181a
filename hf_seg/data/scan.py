"""Find the tiles of OpenEarthMap and OpenEarthMap-SAR on disk, from directory listings and split lists alone.

The layouts are described in `hf_seg.data.open_earth_map`. No tile is opened here, and the imports are light.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hf_seg.errors import DatasetError, file_errors

SPLITS = ("train", "val", "test")
SAR_FOLDERS = {"optical": "rgb_images", "sar": "sar_images", "label": "labels"}
_LONGEST_NAME = 255  # letters in a message; no file's name is longer
NO_LIST = "split list not found"
FROM_XBD = "image from xBD, not in the release"
XBD_HINT = "Get xBD at https://xview2.org and copy its images into <region>/images, named as in xbd_files.csv."


class Row(NamedTuple):
    """One tile: its id (the file stem) and the path of each column's file, None where this copy has none."""

    image_id: str
    files: dict[str, str | None]


class MissingTiles(NamedTuple):
    """Tiles that cannot be used, and why; `split` is None where no single split is concerned."""

    split: str | None
    reason: str
    names: list[str]

    def __str__(self) -> str:
        name = "".join(letter if letter.isprintable() else "?" for letter in self.names[0][:_LONGEST_NAME])
        return f"{len(self.names)} x {self.reason} (e.g. {name})"


@dataclass(frozen=True)
class Scan:
    """The usable rows of each split, and what is missing."""

    root: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    missing: list[MissingTiles] = field(default_factory=list)

    def add_missing(self, split: str | None, reasons: dict[str, set[str]]) -> None:
        """Record the names of unusable tiles by reason."""
        found = {reason: sorted(names, key=_natural_key) for reason, names in reasons.items() if names}
        self.missing.extend(MissingTiles(split, reason, names) for reason, names in found.items())

    def describe_missing(self, split: str) -> str:
        """Say in one line what is missing from `split`; empty if nothing is."""
        missing = [each for each in self.missing if each.split in (split, None)]
        hint = f". {XBD_HINT}" if any(each.reason == FROM_XBD for each in missing) else ""
        return "; ".join(map(str, missing)) + hint


def scan_open_earth_map(data_dir: str | Path) -> Scan:
    """List OpenEarthMap's usable tiles: train and val need image and label, test needs the image.

    Raises:
        DatasetError: no such folder, or two files with the same image_id.
    """
    layout = "OpenEarthMap_wo_xBD, a folder with train.txt, val.txt, test.txt and <region>/images"
    scan = Scan(_find_root(data_dir, ("*.txt", "*/images/"), layout))
    images, labels = (_list_tiles(scan.root.glob(f"*/{kind}/*")) for kind in ("images", "labels"))
    from_xbd = set(_read_stems(scan.root / "xbd_files.csv"))
    seen: set[str] = set()
    for split in SPLITS:
        split_list = scan.root / f"{split}.txt"
        counts = Counter(_read_stems(split_list))
        listed = counts.keys() - seen  # a tile in two splits would leak: the first one keeps it
        absent = listed - images.keys()
        usable = {name for name in listed - absent if name in labels or split == "test"}
        scan.rows[split] = [
            Row(name, {"image": images[name], "label": labels.get(name)}) for name in sorted(usable, key=_natural_key)
        ]
        reasons = {
            NO_LIST: set() if split_list.is_file() else {split_list.name},
            FROM_XBD: absent & from_xbd,
            "label without image": absent & labels.keys() - from_xbd,
            "listed but not on disk": absent - labels.keys() - from_xbd,
            "image without label": listed - absent - usable,
            "listed twice": {name for name, count in counts.items() if count > 1},
            "listed in an earlier split too": counts.keys() & seen,
        }
        scan.add_missing(split, reasons)
        seen |= listed
    unlisted = (images.keys() | labels.keys()) - seen
    empty = {path.name for path in scan.root.glob("[!.]*/")} - {name.rpartition("_")[0] for name in (*images, *labels)}
    scan.add_missing(None, {"on disk but in no split list": unlisted, "region folder without tiles": empty})
    return scan


def scan_open_earth_map_sar(data_dir: str | Path) -> Scan:
    """List OpenEarthMap-SAR's usable tiles: a row has a file in every folder that its split has.

    An absent folder is a modality that this copy lacks (None in every row); sar_images is required.

    Raises:
        DatasetError: no such folder, or two files with the same image_id.
    """
    layout = "dfc25_track1, a folder with train/sar_images, val/sar_images or test/sar_images"
    scan = Scan(_find_root(data_dir, ("*/sar_images/",), layout))
    for split in SPLITS:
        folder = scan.root / split
        present = [column for column, name in SAR_FOLDERS.items() if column == "sar" or (folder / name).is_dir()]
        tiles = {column: _list_tiles((folder / SAR_FOLDERS[column]).glob("*")) for column in present}
        names = set().union(*tiles.values())
        absent = {f"no file in {split}/{SAR_FOLDERS[column]}": names - tiles[column].keys() for column in present}
        scan.add_missing(split, absent)
        scan.rows[split] = [
            Row(name, {column: tiles[column][name] if column in tiles else None for column in SAR_FOLDERS})
            for name in sorted(names.intersection(*tiles.values()), key=_natural_key)
        ]
    return scan


SCANS = {"OpenEarthMap": scan_open_earth_map, "OpenEarthMap-SAR": scan_open_earth_map_sar}  # by layout


def _find_root(data_dir: str | Path, patterns: tuple[str, ...], layout: str) -> Path:
    """Return the folder in which every pattern matches: `data_dir`, or the only one a level below, or two."""
    top = Path(os.path.abspath(os.path.expanduser(data_dir)))
    if not top.is_dir():
        found = "is a file: unpack it and pass the folder" if top.exists() else "does not exist"
        raise DatasetError(f"{data_dir} {found}; looked for {layout}.")
    for candidates in ([top], top.glob("*/"), top.glob("*/*/")):
        roots = sorted(folder for folder in candidates if all(any(folder.glob(pattern)) for pattern in patterns))
        if len(roots) > 1:
            raise DatasetError(f"{data_dir}: several folders fit, pass one of {', '.join(map(str, roots))}.")
        if roots:
            return roots[0]
    raise DatasetError(f"{data_dir}: looked here and two levels below for {layout}; found none.")


def _list_tiles(paths: Iterable[Path]) -> dict[str, str]:
    """Map stem -> path of the TIFFs in `paths`, without hidden files such as the `._x.tif` of macOS archives."""
    tiles: dict[str, str] = {}
    for path in paths:
        if path.suffix.lower() not in (".tif", ".tiff") or path.name.startswith(".") or not path.is_file():
            continue
        if not path.name.isprintable():  # nor is what stands for bytes that are no UTF-8
            raise DatasetError(f"{str(path)!r}: its name has letters that cannot be printed; rename it")
        if (first := tiles.setdefault(path.stem, str(path))) != str(path):
            raise DatasetError(f"{path} and {first} have the same image_id, {path.stem!r}: remove one.")
    return tiles


def _read_stems(path: Path) -> list[str]:
    """Read the names in a split list, or in the last column of xbd_files.csv, without extension; none if absent."""
    if not path.is_file():
        return []
    try:
        with (
            file_errors(path, "cannot be read"),
            open(path, encoding="utf-8-sig", errors="replace", newline="") as file,
        ):
            return [os.path.splitext(cells[-1].strip())[0] for cells in csv.reader(file) if "".join(cells).strip()]
    except csv.Error as error:
        raise DatasetError(f"{path}: expected a file name in each line ({error})") from None


def _natural_key(name: str) -> tuple[list[Any], str]:
    """Sort area_2 before area_10: text and numbers alternate."""
    parts: list[Any] = re.split("([0-9]+)", name)
    # by length first: Python reads no number of more than 4300 digits
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(number), number) for number in numbers]
    return parts, name
