"""Is a raster as large as its header says? Decided before any pixel is decoded, since memory follows the header."""

from pathlib import Path

import numpy as np
import rasterio

from hf_seg.errors import DatasetError

MAX_IMAGE_BYTES = 2**30  # of a tile, or of one of its blocks, decoded
MAX_SIDE = 10**6  # pixels of a scene
FEW_PIXELS = 10**8  # a scene of so many may be empty
MAX_PIXELS_PER_BYTE = 20_000  # of a larger one: DEFLATE and ZSTD reach half of it where all pixels are equal
NUMPY_TYPES = {"complex_int16": "complex64"}  # of a type of GDAL that numpy has not


def pixel_bytes(source: rasterio.DatasetReader) -> int:
    """Return the bytes of a pixel, all bands together."""
    return sum(np.dtype(NUMPY_TYPES.get(each, each)).itemsize for each in source.dtypes)


def require_image_size(source: rasterio.DatasetReader, name: object) -> None:
    """Refuse an image that is too large to be decoded at once.

    Args:
        name: what an error calls it.

    Raises:
        DatasetError: naming the size that its header claims.
    """
    areas = [(source.height, source.width), *source.block_shapes]
    height, width = max(areas, key=lambda area: area[0] * area[1])
    if height * width * pixel_bytes(source) > MAX_IMAGE_BYTES:
        raise DatasetError(
            f"{name}: its header says {width:,d} x {height:,d} pixels in one piece, more than {MAX_IMAGE_BYTES:,d} "
            "bytes; create it again, or cut it into tiles"
        )


def require_scene_size(source: rasterio.DatasetReader, name: str) -> None:
    """Refuse a scene whose header cannot be true.

    Raises:
        DatasetError: a side beyond `MAX_SIDE`, or a GeoTIFF with far more pixels than its bytes can tell.
    """
    height, width = source.height, source.width
    if max(height, width) > MAX_SIDE:
        raise DatasetError(
            f"{name}: its header says {width:,d} x {height:,d} pixels; a scene may have {MAX_SIDE:,d} along a side: "
            "cut it, or download it again if it is damaged"
        )
    path = Path(name)
    if source.driver != "GTiff" or height * width <= FEW_PIXELS or not path.is_file():
        return
    size = path.stat().st_size
    if height * width > MAX_PIXELS_PER_BYTE * size:
        raise DatasetError(
            f"{name}: its header says {width:,d} x {height:,d} pixels, but the file has {size:,d} bytes: it is "
            "damaged, or nearly empty; cut it to the part with data (gdal_translate -srcwin)"
        )
