"""OpenEarthMap and OpenEarthMap-SAR as `datasets` builders; this docstring is their datasheet.

OpenEarthMap (OEM): 5000 aerial and satellite RGB tiles of 97 regions, labelled by hand (Xia et al., arXiv:2210.10732).
    Source   https://zenodo.org/records/7223446, OpenEarthMap.zip (9,099,481,727 bytes). GSD 0.25-0.5 m.
    Layout   OpenEarthMap_wo_xBD/<region>/{images,labels}/<region>_<n>.tif, at its root train.txt, val.txt, test.txt
             (file names) and xbd_files.csv (xBD file, OEM file). A region's name may hold `_` and `-`.
    Splits   3000 / 500 / 1500 listed. 697 / 116 / 349 images come from xBD and are not in the archive, so 2303 / 384
             labelled pairs are usable as shipped. The labels of the test split are withheld.
    Licence  follows the region; CC BY-NC-SA 4.0 where nothing else is stated. CRS and tile sizes are mixed.

OpenEarthMap-SAR (OEM-SAR; IEEE GRSS Data Fusion Contest 2025, track 1): optical/SAR pairs of 35 regions in Japan,
France and the USA (Xia et al., arXiv:2501.10891).
    Source   https://zenodo.org/records/14622048 (train, val), https://zenodo.org/records/14950559 (test, more labels).
             GSD 0.15-0.5 m. SAR: Umbra Spotlight amplitude, VV or HH; (c) 2024 Umbra, CC BY 4.0.
    Layout   {train,val,test}/{sar_images,rgb_images,labels}/{Train,Val,Test}Area_<3 or 4 digits>.tif
    Splits   4333 / 210 / 490 tiles of 1024 x 1024. rgb_images is in train only.
    Defects  train/labels are pseudo-labels; published IoU with manual ones: 2 % (bareland) to 85 % (water). Exact zeros
             at a SAR swath's edge are nodata, although labelled 1..8. Labels may lack a CRS.

Both: uint8 GeoTIFF; 3-band optical, 1-band SAR and label. Classes: 0 background/unknown, 1 bareland, 2 rangeland,
3 developed space, 4 road, 5 tree, 6 water, 7 agriculture land, 8 building.
"""

import csv
import hashlib
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import rasterio
from datasets.exceptions import DatasetGenerationError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hf_seg.errors import DatasetError
from hf_seg.labels import NUM_LABELS

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
BANDS = {"image": 3, "optical": 3, "sar": 1, "label": 1}
SAR_FOLDERS = {"optical": "rgb_images", "sar": "sar_images", "label": "labels"}
NO_LIST = "split list not found"
FROM_XBD = "image from xBD, not in the release"
XBD_HINT = "Get xBD at https://xview2.org and copy its images into <region>/images, named as xbd_files.csv says."
DOWNLOAD_HINT = "Download it again; `python scripts/prepare_data.py check DIR` lists every such file."
CONVERT_HINT = "Keep those bands and scale to 0..255, e.g. with gdal_translate -b 1 -ot Byte -scale."
REWRITE_HINT = "Rewrite it, e.g. with gdal_translate -co COMPRESS=DEFLATE -colorinterp_1 gray (red for RGB)."


class Row(NamedTuple):
    """One tile: its id (the file stem) and the path of each column's file, None where this copy has none."""

    image_id: str
    files: dict[str, str | None]


class Hole(NamedTuple):
    """Tiles that cannot be used, and why; `split` is None where no single split is concerned."""

    split: str | None
    reason: str
    names: list[str]

    def __str__(self) -> str:
        return f"{len(self.names)} x {self.reason} (e.g. {self.names[0]})"


@dataclass(frozen=True)
class Scan:
    """What lies on disk, from directory listings alone: usable rows per split, and the holes."""

    root: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)
    holes: list[Hole] = field(default_factory=list)

    def add_holes(self, split: str | None, reasons: dict[str, set[str]]) -> None:
        self.holes.extend(Hole(split, why, sorted(names, key=_natural_key)) for why, names in reasons.items() if names)

    def describe_holes(self, split: str) -> str:
        """Say in one line what is missing from `split`; empty if nothing is."""
        holes = [hole for hole in self.holes if hole.split in (split, None)]
        hint = f". {XBD_HINT}" if any(hole.reason == FROM_XBD for hole in holes) else ""
        return "; ".join(map(str, holes)) + hint


def scan_open_earth_map(data_dir: str | Path) -> Scan:
    """List OpenEarthMap's usable tiles: train and val need image and label, test needs the image.
    Raises DatasetError if there is no such folder, or if two files claim one name.
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
        scan.add_holes(split, reasons)
        seen |= listed
    unlisted = (images.keys() | labels.keys()) - seen
    empty = {path.name for path in scan.root.glob("[!.]*/")} - {name.rpartition("_")[0] for name in (*images, *labels)}
    scan.add_holes(None, {"on disk but in no split list": unlisted, "region folder without tiles": empty})
    return scan


def scan_open_earth_map_sar(data_dir: str | Path) -> Scan:
    """List OpenEarthMap-SAR's usable tiles: a row has a file in every folder that its split has.

    An absent folder is a modality that this copy lacks (None in every row); sar_images is required. Raises as above.
    """
    layout = "dfc25_track1, a folder with train/sar_images, val/sar_images or test/sar_images"
    scan = Scan(_find_root(data_dir, ("*/sar_images/",), layout))
    for split in SPLITS:
        folder = scan.root / split
        present = [column for column, name in SAR_FOLDERS.items() if column == "sar" or (folder / name).is_dir()]
        tiles = {column: _list_tiles((folder / SAR_FOLDERS[column]).glob("*")) for column in present}
        names = set().union(*tiles.values())
        missing = {f"no file in {split}/{SAR_FOLDERS[column]}": names - tiles[column].keys() for column in present}
        scan.add_holes(split, missing)
        scan.rows[split] = [
            Row(name, {column: tiles[column][name] if column in tiles else None for column in SAR_FOLDERS})
            for name in sorted(names.intersection(*tiles.values()), key=_natural_key)
        ]
    return scan


def read_tile(path: str, column: str) -> np.ndarray:
    """Return the (C, H, W) pixels of a GeoTIFF that is whole, uint8, has the column's bands and ids, and suits Pillow.

    Raises:
        DatasetError: naming the file, what was found, what was expected and the way out.
    """
    try:
        with rasterio.open(path, driver="GTiff") as source:
            pixels = source.read()
    except RasterioError as error:
        start = f"{Path(path).read_bytes()[:16]!r}..." if os.access(path, os.R_OK) else "no readable file"
        found = f"{start} ({error.__cause__ or error})"
        raise DatasetError(f"{path}: expected a whole GeoTIFF, found {found}. {DOWNLOAD_HINT}") from None
    if (len(pixels), pixels.dtype) != (BANDS[column], np.uint8):
        expected, found = f"{BANDS[column]} x uint8 ({column})", f"{len(pixels)} x {pixels.dtype}"
        raise DatasetError(f"{path}: expected bands {expected}, found {found}. {CONVERT_HINT}")
    if column == "label" and (largest := pixels.max()) >= NUM_LABELS:
        raise DatasetError(f"{path}: expected ids 0..{NUM_LABELS - 1}, found {largest}. Remap the label; unknown is 0.")
    try:
        image = _image_feature(column).decode_example({"path": path, "bytes": None})
    except Exception as error:  # whatever Pillow raises here, a training worker would meet
        raise DatasetError(f"{path}: Pillow cannot decode this TIFF ({error}). {REWRITE_HINT}") from None
    decoded = np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)
    # Three bands may be JPEG, which decoders round differently; one band (a colour table?) must agree to the bit.
    if decoded.shape != pixels.shape or (len(pixels) == 1 and not np.array_equal(decoded, pixels)):
        raise DatasetError(f"{path}: Pillow and GDAL decode different pixels (a colour table?). {REWRITE_HINT}")
    return pixels


def check_sizes(row: Row, pixels: dict[str, np.ndarray]) -> None:
    """Check that the (C, H, W) files of a row share H and W, else raise DatasetError naming each."""
    if len({tile.shape[1:] for tile in pixels.values()}) > 1:
        sizes = ", ".join(f"{row.files[column]} {tile.shape[1]} x {tile.shape[2]}" for column, tile in pixels.items())
        raise DatasetError(f"{row.image_id}: expected one height and width, found {sizes}. {DOWNLOAD_HINT}")


def check_row(row: Row) -> None:
    """Read and check every file of a row; raises DatasetError at the first that is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        check_sizes(row, {column: read_tile(path, column) for column, path in row.files.items() if path is not None})


@dataclass
class TileConfig(datasets.BuilderConfig):
    """Which split to build, and whether the files' bytes (True) or their paths (False) are stored."""

    split: str = "train"
    embed: bool = False


class _TileBuilder(datasets.GeneratorBasedBuilder):
    """Builds one split of a scanned folder, checking each row once."""

    BUILDER_CONFIG_CLASS = TileConfig
    DEFAULT_WRITER_BATCH_SIZE = 16  # rows held in memory: an embedded one weighs 5 MB
    scan: Callable[[str | Path], Scan]
    columns: tuple[str, ...]

    def _info(self) -> datasets.DatasetInfo:
        features = {name: _image_feature(name) if name in BANDS else datasets.Value("string") for name in self.columns}
        return datasets.DatasetInfo(features=datasets.Features(features), description=str(__doc__))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        rows = self.scan(self.config.data_dir).rows[self.config.split]
        return [datasets.SplitGenerator(name=self.config.split, gen_kwargs={"rows": rows})]

    def _generate_examples(self, rows: list[Row]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            check_row(row)
            example: dict[str, Any] = {"image_id": row.image_id, **row.files}
            if "region" in self.columns:
                example["region"] = row.image_id.rpartition("_")[0]
            if self.config.embed:
                example |= {column: path and Path(path).read_bytes() for column, path in row.files.items()}
            yield row.image_id, example

    def _prepare_split_single(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # Unwrapped here, inside the worker: with num_proc an exception loses its cause on the way to the parent.
        try:
            yield from super()._prepare_split_single(*args, **kwargs)
        except DatasetGenerationError as error:
            raise (error.__cause__ if isinstance(error.__cause__, DatasetError) else error) from None


class OpenEarthMap(_TileBuilder):
    """OpenEarthMap; `label` is None where withheld."""

    scan = staticmethod(scan_open_earth_map)
    columns = ("image_id", "region", "image", "label")


class OpenEarthMapSAR(_TileBuilder):
    """OpenEarthMap-SAR; `optical` or `label` is None where this copy has no such folder."""

    scan = staticmethod(scan_open_earth_map_sar)
    columns = ("image_id", "optical", "sar", "label")


def load_open_earth_map(
    data_dir: str | Path, split: str, *, embed: bool = False, streaming: bool = False, num_proc: int | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap: {image_id, region, image, label}.

    Args:
        data_dir: the unpacked release, or a folder around it.
        split: train, val or test.
        embed: store the files' bytes, so that `to_parquet` carries them (`push_to_hub` always does), not their paths.
        streaming: check and yield rows on the fly, without a cache; an IterableDataset.
        num_proc: processes that check the files, the first time.

    Raises DatasetError for a wrong folder, an unknown or empty split, or a file that cannot be trained on.
    """
    return _load(OpenEarthMap, data_dir, split, embed, streaming, num_proc)


def load_open_earth_map_sar(
    data_dir: str | Path, split: str, *, embed: bool = False, streaming: bool = False, num_proc: int | None = None
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap-SAR: {image_id, optical, sar, label}; else as `load_open_earth_map`."""
    return _load(OpenEarthMapSAR, data_dir, split, embed, streaming, num_proc)


def _load(
    kind: type[_TileBuilder], data_dir: str | Path, split: str, embed: bool, streaming: bool, num_proc: int | None
) -> datasets.Dataset | datasets.IterableDataset:
    if split not in SPLITS:
        raise DatasetError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    scan = kind.scan(data_dir)
    rows, holes = scan.rows[split], scan.describe_holes(split)
    if not rows:
        raise DatasetError(f"{scan.root}: split {split!r} has no usable tile; found {holes or 'no file of it'}")
    level = logging.WARNING if holes else logging.INFO
    logger.log(level, "%s: %d %s tiles in %s; holes: %s", kind.__name__, len(rows), split, scan.root, holes or "none")
    settings = {"data_dir": str(scan.root), "split": split, "embed": embed}
    builder = kind(dataset_name=kind.__name__, hash=_fingerprint(rows, settings), **settings)
    if streaming:
        return builder.as_streaming_dataset(split)
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except DatasetError as error:
        raise DatasetError(str(error)) from None  # one clear message instead of the builder's traceback
    return builder.as_dataset(split)


def _fingerprint(rows: list[Row], settings: dict[str, Any]) -> str:
    """Name the cache: a change of a file's path, size or time, of the settings or of this module makes a new one."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr(settings).encode())
    for path in (path for row in rows for path in row.files.values() if path is not None):
        status = os.stat(path)
        digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


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
        if (first := tiles.setdefault(path.stem, str(path))) != str(path):
            raise DatasetError(f"{path} and {first} claim one image_id, {path.stem!r}: remove one.")
    return tiles


def _read_stems(path: Path) -> list[str]:
    """Read the names in a split list, or in the last column of xbd_files.csv, without extension; none if absent."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        return [os.path.splitext(cells[-1].strip())[0] for cells in csv.reader(file) if "".join(cells).strip()]


def _image_feature(column: str) -> datasets.Image:
    return datasets.Image(mode="L" if column == "label" else None)


def _natural_key(name: str) -> list[Any]:
    """Sort area_2 before area_10: text and numbers alternate."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]+)", name))]
