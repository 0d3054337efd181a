"""Image files of a folder, and their pixels."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hf_seg.data.raster_size import require_image_size
from hf_seg.errors import DatasetError, file_errors

_STARTS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
LOSSLESS = (".tif", ".tiff", ".png")
ANY_IMAGE = (*LOSSLESS, ".jpg", ".jpeg")


def list_images(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the image files that match a glob pattern, sorted, without hidden ones.

    Raises:
        FileError: the folder cannot be read.
    """
    with file_errors(folder, "cannot be read"):
        return [
            path
            for path in sorted(folder.glob(pattern))
            if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
        ]


def _driver_of(path: Path) -> str:
    """Return GDAL's driver of an image by its first bytes; TIFF unless it is another, as a VRT would point to files."""
    with file_errors(path, "cannot be read"), path.open("rb") as file:
        start = file.read(4)
    return next((driver for magic, driver in _STARTS.items() if start.startswith(magic)), "GTiff")


def read_image(path: Path) -> np.ndarray:
    """Return the pixels of an image: (H, W) of one band, else (H, W, bands).

    Raises:
        DatasetError: the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path, driver=_driver_of(path)) as file:
                require_image_size(file, path)
                bands = file.read()
    except RasterioError as error:
        reason = error.__cause__ or error
        raise DatasetError(f"{path}: cannot be read as an image ({reason}); remove it or create it again") from None
    return bands[0] if len(bands) == 1 else np.ascontiguousarray(np.moveaxis(bands, 0, -1))
