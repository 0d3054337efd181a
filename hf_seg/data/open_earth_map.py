"""OpenEarthMap and OpenEarthMap-SAR as `datasets`; this docstring is their datasheet.

OpenEarthMap (OEM): 5000 aerial and satellite RGB tiles of 97 regions, labelled by hand (Xia et al., arXiv:2210.10732).

- Source: https://zenodo.org/records/7223446, `OpenEarthMap.zip` (9,099,481,727 bytes). GSD 0.25-0.5 m.
- Layout: `OpenEarthMap_wo_xBD/<region>/{images,labels}/<region>_<n>.tif`, at its root `train.txt`, `val.txt` and
  `test.txt` (file names) and `xbd_files.csv` (xBD file, OEM file). A region's name may contain `_` and `-`.
- Splits: 3000 / 500 / 1500 listed. 697 / 116 / 349 images come from xBD and are not in the archive, so 2303 / 384
  labelled pairs are usable as shipped. The labels of the test split are withheld.
- Licence: follows the region; CC BY-NC-SA 4.0 where nothing else is stated. CRS and tile sizes are mixed.

OpenEarthMap-SAR (OEM-SAR; IEEE GRSS Data Fusion Contest 2025, track 1): optical/SAR pairs of 35 regions in Japan,
France and the USA (Xia et al., arXiv:2501.10891).

- Source: https://zenodo.org/records/14622048 (train, val), https://zenodo.org/records/14950559 (test, more labels).
  GSD 0.15-0.5 m. SAR: Umbra Spotlight amplitude, VV or HH; (c) 2024 Umbra, CC BY 4.0.
- Layout: `{train,val,test}/{sar_images,rgb_images,labels}/{Train,Val,Test}Area_<3 or 4 digits>.tif`
- Splits: 4333 / 210 / 490 tiles of 1024 x 1024. `rgb_images` is in train only.
- Defects: `train/labels` are pseudo-labels; published IoU with manual ones: 2 % (bareland) to 85 % (water). Exact zeros
  at a SAR swath's edge are nodata, although labelled 1..8. Labels may lack a CRS.

Both: uint8 GeoTIFF; 3-band optical, 1-band SAR and label. Classes: 0 background/unknown, 1 bareland, 2 rangeland,
3 developed space, 4 road, 5 tree, 6 water, 7 agriculture land, 8 building; other ones if `dataset.json` lists them.

Data of your own in one of these layouts may have other bands of any number type: `dataset.json` in its root names them
(`hf_seg.data.provenance`). Such a column yields {path, bytes}, which `hf_seg.data.band_images` reads.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import rasterio
from datasets.exceptions import DatasetGenerationError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hf_seg.data.provenance import declared_bands, find_label_set
from hf_seg.data.scan import SCANS, SPLITS, Row
from hf_seg.errors import DatasetError, UserError, file_errors
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet

logger = logging.getLogger(__name__)

COLUMNS = {
    "OpenEarthMap": ("image_id", "region", "image", "label"),
    "OpenEarthMap-SAR": ("image_id", "optical", "sar", "label"),
}
BANDS = {"image": 3, "optical": 3, "sar": 1, "label": 1}
DOWNLOAD_HINT = "Download it again; `python scripts/prepare_data.py check DIR` lists every such file."
CONVERT_HINT = (
    "Keep those bands and scale to 0..255, e.g. with gdal_translate -b 1 -ot Byte -scale; or name the bands that all "
    'images have in dataset.json: "bands": {"sar": ["VV", "VH"]}.'
)
REWRITE_HINT = "Rewrite it, e.g. with gdal_translate -co COMPRESS=DEFLATE -colorinterp_1 gray (red for RGB)."
CACHE_HINT = "free disk space, or choose another folder with the environment variable HF_DATASETS_CACHE"


def read_tile(path: str, column: str, label_set: LabelSet = OPEN_EARTH_MAP, names: Sequence[str] = ()) -> np.ndarray:
    """Return the (C, H, W) pixels of a GeoTIFF that can be trained on.

    It is complete, has the column's bands and type and, if it is a label, values of the label set, and Pillow decodes
    it to the same pixels. Labels are not translated to class ids.

    Args:
        label_set: the values that a label may have.
        names: of the column's bands, if `dataset.json` says so: as many real numbers a pixel, of any type.

    Raises:
        DatasetError: naming the file, what was found, what was expected and how to fix it.
    """
    try:
        with rasterio.open(path, driver="GTiff") as source:
            pixels = source.read()
    except RasterioError as error:
        start = f"{Path(path).read_bytes()[:16]!r}..." if os.access(path, os.R_OK) else "no readable file"
        found = f"{start} ({error.__cause__ or error})"
        raise DatasetError(f"{path}: expected a complete GeoTIFF, found {found}. {DOWNLOAD_HINT}") from None
    if names:
        if len(pixels) != len(names) or np.iscomplexobj(pixels):
            found = f"{len(pixels)} x {pixels.dtype}"
            raise DatasetError(f"{path}: dataset.json says that {column} has {', '.join(names)}; found bands {found}")
        return pixels
    if (len(pixels), pixels.dtype) != (BANDS[column], np.uint8):
        expected, found = f"{BANDS[column]} x uint8 ({column})", f"{len(pixels)} x {pixels.dtype}"
        raise DatasetError(f"{path}: expected bands {expected}, found {found}. {CONVERT_HINT}")
    if column == "label" and (wrong := pixels[label_set.table[pixels] < 0]).size:
        raise DatasetError(
            f"{path}: expected {_describe_values(label_set)}, found {wrong.max()}. {_label_hint(label_set)}"
        )
    try:
        image = _image_feature(column).decode_example({"path": path, "bytes": None})
    except Exception as error:  # any error of Pillow here would also stop a training worker
        raise DatasetError(f"{path}: Pillow cannot decode this TIFF ({error}). {REWRITE_HINT}") from None
    decoded = np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)
    # Three bands may be JPEG, which decoders round differently; one band (a colour table?) must agree to the bit.
    if decoded.shape != pixels.shape or (len(pixels) == 1 and not np.array_equal(decoded, pixels)):
        raise DatasetError(f"{path}: Pillow and GDAL decode different pixels (a colour table?). {REWRITE_HINT}")
    return pixels


def _describe_values(label_set: LabelSet) -> str:
    """Name the pixel values that a label file may have, e.g. "ids 0..8" or "values 0..3, 6, 255"."""
    starts = [value for value in sorted(label_set.values) if value - 1 not in label_set.values]
    ends = [value for value in sorted(label_set.values) if value + 1 not in label_set.values]
    ranges = [f"{first}..{last}" if last > first else str(first) for first, last in zip(starts, ends, strict=True)]
    kind = "ids" if all(value == index for value, index in label_set.values.items()) else "values"
    return f"{kind} {', '.join(ranges)}"


def _label_hint(label_set: LabelSet) -> str:
    if label_set == OPEN_EARTH_MAP:
        return "Remap the label; unknown is 0."
    return "Add the value to a class, to `background` or to `ignore` of the label set, or remap the label."


def read_row(
    row: Row, label_set: LabelSet = OPEN_EARTH_MAP, bands: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the (C, H, W) pixels of a row's valid files by column, and what is wrong with the row.

    Args:
        label_set: as for `read_tile`.
        bands: of `declared_bands`.
    """
    pixels: dict[str, np.ndarray] = {}
    problems = []
    for column, path in row.files.items():
        try:
            if path is not None:
                pixels[column] = read_tile(path, column, label_set, (bands or {}).get(column, ()))
        except DatasetError as error:
            problems.append(str(error))
    if len({tile.shape[1:] for tile in pixels.values()}) > 1:
        sizes = ", ".join(f"{row.files[column]} {tile.shape[1]} x {tile.shape[2]}" for column, tile in pixels.items())
        problems.append(f"{row.image_id}: expected one height and width, found {sizes}. {DOWNLOAD_HINT}")
    return pixels, problems


def _examples(
    rows: list[Row], label_set: LabelSet, bands: Mapping[str, Sequence[str]], embed: bool = False
) -> Iterator[dict[str, Any]]:
    """Check each row, and yield it with its files' bytes (`embed`) or their paths."""
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            _, problems = read_row(row, label_set, bands)
        if problems:
            raise DatasetError(problems[0])
        example: dict[str, Any] = {"image_id": row.image_id, **row.files}
        if "image" in row.files:  # only OpenEarthMap names its regions
            example["region"] = row.image_id.rpartition("_")[0]
        if embed:
            example |= {column: path and Path(path).read_bytes() for column, path in row.files.items()}
        yield example


def load_open_earth_map(
    data_dir: str | Path,
    split: str,
    *,
    label_set: LabelSet | None = None,
    embed: bool = False,
    streaming: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap: {image_id, region, image, label}; `label` is None where withheld.

    Args:
        data_dir: the unpacked release, or a folder around it.
        split: train, val or test.
        label_set: its `values` are those that label files may have; None: as `find_label_set` finds them. Labels are
            not translated here, but in `LabelledImages`.
        embed: store the files' bytes, so that `to_parquet` carries them (`push_to_hub` always does), not their paths.
        streaming: check and yield rows on the fly, without a cache; an IterableDataset.
        num_proc: processes that check the files, the first time.

    Raises:
        DatasetError: a wrong folder, an unknown or empty split, or a file that cannot be trained on.
        FileError: the cache cannot be written.
    """
    return _load("OpenEarthMap", data_dir, split, label_set, embed, streaming, num_proc)


def load_open_earth_map_sar(
    data_dir: str | Path,
    split: str,
    *,
    label_set: LabelSet | None = None,
    embed: bool = False,
    streaming: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap-SAR: {image_id, optical, sar, label}; else as `load_open_earth_map`.

    `optical` or `label` is None where this copy has no such folder.
    """
    return _load("OpenEarthMap-SAR", data_dir, split, label_set, embed, streaming, num_proc)


def _load(
    layout: str,
    data_dir: str | Path,
    split: str,
    label_set: LabelSet | None,
    embed: bool,
    streaming: bool,
    num_proc: int | None,
) -> datasets.Dataset | datasets.IterableDataset:
    if split not in SPLITS:
        raise DatasetError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    scan = SCANS[layout](data_dir)
    rows, missing = scan.rows[split], scan.describe_missing(split)
    label_set = label_set or find_label_set(scan.root, layout)
    if not rows:
        raise DatasetError(f"{scan.root}: split {split!r} has no usable tile; found {missing or 'no file of it'}")
    level = logging.WARNING if missing else logging.DEBUG
    logger.log(level, "%s: %d %s tiles in %s; missing: %s", layout, len(rows), split, scan.root, missing or "none")
    bands = declared_bands(scan.root, layout)
    columns = {
        name: _image_feature(name, decode=name not in bands) if name in BANDS else datasets.Value("string")
        for name in COLUMNS[layout]
    }
    options: dict[str, Any] = {"features": datasets.Features(columns), "split": split}
    options["gen_kwargs"] = {"rows": rows, "label_set": label_set, "bands": bands, "embed": embed}
    if streaming:
        return datasets.IterableDataset.from_generator(_examples, **options)
    options["fingerprint"] = _fingerprint(rows, f"{layout} {split} {embed} {sorted(label_set.values)} {bands or ''}")
    options["writer_batch_size"] = 16  # rows in memory: an embedded one takes 5 MB
    with file_errors(datasets.config.HF_DATASETS_CACHE, "cannot be used as a cache", CACHE_HINT):
        try:
            return datasets.Dataset.from_generator(_examples, num_proc=num_proc, **options)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError | OSError):
                raise error.__cause__.with_traceback(None) from None
            for _ in _examples(
                rows, label_set, bands
            ):  # an exception in a worker process arrives without its cause, so find it again
                pass
            raise


def _fingerprint(rows: list[Row], options: str) -> str:
    """Name the cache: a change of a file's path, size or time, of the options or of this module makes a new one."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + options.encode())
    for path in (path for row in rows for path in row.files.values() if path is not None):
        with file_errors(path, "cannot be read"):
            status = os.stat(path)
        digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _image_feature(column: str, *, decode: bool = True) -> datasets.Image:
    return datasets.Image(mode="L" if column == "label" else None, decode=decode)
