"""Read and check the files of a tile: GeoTIFFs on disk, or the bytes of one in a Parquet shard."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from hf_seg.data.raster_size import require_image_size
from hf_seg.data.scan import Row
from hf_seg.errors import DatasetError
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet

BANDS = {"image": 3, "optical": 3, "sar": 1, "label": 1}
DOWNLOAD_HINT = "Download it again; `python scripts/prepare_data.py check DIR` lists every such file."
CONVERT_HINT = (
    "Keep those bands and scale to 0..255, e.g. with gdal_translate -b 1 -ot Byte -scale; or name the bands that all "
    'images have in dataset.json: "bands": {"sar": ["VV", "VH"]}.'
)
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
REWRITE_HINT = "Rewrite it, e.g. with gdal_translate -co COMPRESS=DEFLATE -colorinterp_1 gray (red for RGB)."


class TileBytes(NamedTuple):
    """The content of one file of a tile, and what errors call it."""

    place: str
    content: bytes

    def __str__(self) -> str:
        return self.place


class EmbeddedRow(NamedTuple):
    """One tile whose files came as bytes; as `hf_seg.data.scan.Row`, None where there is no file."""

    image_id: str
    files: dict[str, TileBytes | None]


File = str | TileBytes


def image_feature(column: str, *, decode: bool = True) -> datasets.Image:
    """Return the type of an image column; without `decode`, its rows are {path, bytes}."""
    return datasets.Image(mode="L" if column == "label" else None, decode=decode)


@contextmanager
def open_tile(file: File) -> Iterator[rasterio.DatasetReader]:
    """Open a GeoTIFF, and nothing else that GDAL could read.

    Raises:
        RasterioError: it is none.
    """
    if isinstance(file, str):
        with rasterio.open(file, driver="GTiff") as source:
            yield source
    else:
        with MemoryFile(file.content) as memory, memory.open(driver="GTiff") as source:
            yield source


def decode_tile(image: Mapping[str, Any]) -> np.ndarray:
    """Decode an image of a dataset: TIFF by GDAL, which takes half of Pillow's time, other formats by Pillow.

    Args:
        image: {path, bytes} of an undecoded `datasets.Image`.

    Returns:
        (H, W) or (H, W, bands), uint8 for tiles that `read_tile` has checked.

    Raises:
        OSError, RasterioError: it cannot be read.
    """
    path, content = image["path"], image["bytes"]
    if content is not None and content[:4] not in TIFF_STARTS:
        return np.array(datasets.Image().decode_example({"path": path, "bytes": content}))
    with open_tile(path if content is None else TileBytes(path or "tile", content)) as source:
        pixels = source.read()
    return pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))


def file_bytes(file: File) -> bytes:
    """Return the content of a file."""
    return Path(file).read_bytes() if isinstance(file, str) else file.content


def _first_bytes(file: File) -> str:
    if isinstance(file, str) and not os.access(file, os.R_OK):
        return "no readable file"
    return f"{file_bytes(file)[:16]!r}..."


def read_tile(path: File, column: str, label_set: LabelSet = OPEN_EARTH_MAP, names: Sequence[str] = ()) -> np.ndarray:
    """Return the (C, H, W) pixels of a GeoTIFF that can be trained on.

    It is complete, has the column's bands and type and, if it is a label, values of the label set, and Pillow decodes
    it to the same pixels. Labels are not translated to class ids.

    Args:
        path: a file on disk, or its bytes.
        label_set: the values that a label may have.
        names: of the column's bands, if `dataset.json` says so: as many real numbers a pixel, of any type.

    Raises:
        DatasetError: naming the file, what was found, what was expected and how to fix it.
    """
    try:
        with open_tile(path) as source:
            require_image_size(source, path)
            pixels = source.read()
    except RasterioError as error:
        found = f"{_first_bytes(path)} ({' '.join(str(error.__cause__ or error).split())})"
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
        is_file = isinstance(path, str)
        image = image_feature(column).decode_example(
            {"path": path if is_file else None, "bytes": None if is_file else file_bytes(path)}
        )
    except Exception as error:  # any error of Pillow here would also stop a training worker
        raise DatasetError(f"{path}: Pillow cannot decode this TIFF ({error}). {REWRITE_HINT}") from None
    decoded = np.moveaxis(np.atleast_3d(np.asarray(image)), -1, 0)
    # Three bands may be JPEG, which decoders round differently; one band (a colour table?) must agree to the bit.
    is_like = (decoded.shape, decoded.dtype) == (pixels.shape, np.uint8)  # 1 bit a pixel would be bool
    if not is_like or (len(pixels) == 1 and not np.array_equal(decoded, pixels)):
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
    row: Row | EmbeddedRow, label_set: LabelSet = OPEN_EARTH_MAP, bands: Mapping[str, Sequence[str]] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the (C, H, W) pixels of a row's valid files by column, and what is wrong with the row.

    Args:
        label_set: as for `read_tile`.
        bands: of `declared_bands`.
    """
    pixels: dict[str, np.ndarray] = {}
    problems = []
    files: Mapping[str, File | None] = row.files
    for column, path in files.items():
        try:
            if path is not None:
                pixels[column] = read_tile(path, column, label_set, (bands or {}).get(column, ()))
        except DatasetError as error:
            problems.append(str(error))
    if len({tile.shape[1:] for tile in pixels.values()}) > 1:
        sizes = ", ".join(f"{row.files[column]} {tile.shape[1]} x {tile.shape[2]}" for column, tile in pixels.items())
        problems.append(f"{row.image_id}: expected one height and width, found {sizes}. {DOWNLOAD_HINT}")
    return pixels, problems


def example_of(
    row: Row | EmbeddedRow, label_set: LabelSet, bands: Mapping[str, Sequence[str]], *, embed: bool
) -> dict[str, Any]:
    """Check a row, and return it with its files' bytes (`embed`) or their paths.

    Raises:
        DatasetError: a file that cannot be trained on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _, problems = read_row(row, label_set, bands)
    if problems:
        raise DatasetError(problems[0])
    example: dict[str, Any] = {"image_id": row.image_id, **row.files}
    if "image" in row.files:  # only OpenEarthMap names its regions
        example["region"] = row.image_id.rpartition("_")[0]
    if embed:
        files: Mapping[str, File | None] = row.files
        example |= {column: file and file_bytes(file) for column, file in files.items()}
    return example
