"""Is an upload a scene that may be mapped? Decided from its header, before any pixel is decoded."""

import re
from dataclasses import dataclass
from pathlib import Path

import rasterio
from rasterio.crs import CRS

from hf_seg.data.raster_size import pixel_bytes
from hf_seg.errors import UserError
from hf_seg.mapping.gdal import GDAL_ERRORS, gdal_session, open_raster

# Classic and big TIFF, both byte orders. GDAL opens by content: under any name, XML could make it read other files.
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_SIDE = 20_000  # pixels; memory grows with the width, whatever the area
MAX_PIXEL_BYTES = 64  # of all bands; one block of a raster may contain all of its pixels


@dataclass(frozen=True)
class SceneFacts:
    """What a scene's header says."""

    width: int
    height: int
    bands: int
    dtype: str
    crs: CRS | None

    def __str__(self) -> str:
        code = self.crs and self.crs.to_epsg()
        crs = f"EPSG:{code}" if code else "a CRS without a code" if self.crs else "no CRS"
        bands = "1 band" if self.bands == 1 else f"{self.bands} bands"
        return f"{self.width:,d} × {self.height:,d} pixels, {bands} of {self.dtype}, {crs}"


def safe_name(name: str) -> str:
    """Return a file name of plain letters, digits, `-` and `_` that ends in .tif, whatever the upload is called."""
    base = re.split(r"[/\\]", name)[-1]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", base.rpartition(".")[0] or base)
    return f"{stem.strip('_')[:60] or 'scene'}.tif"


def check_scene(path: Path, *, max_megapixels: float) -> SceneFacts:
    """Return what the header of a GeoTIFF says.

    Raises:
        UserError: it is no GeoTIFF, refers to other files, is larger than allowed, or contains no intensities.
    """
    with path.open("rb") as file:
        signature = file.read(4)
    try:
        if signature not in TIFF_SIGNATURES:
            raise UserError("its content is not that of a TIFF file")
        with gdal_session(), rasterio.open(path, driver="GTiff") as dataset:
            if dataset.tags(ns="OVERVIEWS"):
                raise UserError("its overviews are in another file")
            found = SceneFacts(dataset.width, dataset.height, dataset.count, dataset.dtypes[0], dataset.crs)
            bytes_each = pixel_bytes(dataset)
    except (UserError, *GDAL_ERRORS) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path.name} is not a GeoTIFF that can be mapped: {reason}") from None
    pixels = found.width * found.height
    if pixels > max_megapixels * 1e6 or max(found.width, found.height) > MAX_SIDE:
        raise UserError(
            f"{path.name} has {found.width:,d} × {found.height:,d} pixels; this page maps up to {max_megapixels:g} "
            f"million, {MAX_SIDE:,d} along a side; cut it, or use hf-seg predict on your own computer"
        )
    if bytes_each > MAX_PIXEL_BYTES:
        raise UserError(
            f"{path.name} has {found.bands} bands, {bytes_each} bytes per pixel; this page takes up to "
            f"{MAX_PIXEL_BYTES}; keep the bands that the model needs"
        )
    with gdal_session():
        open_raster(str(path)).close()  # refuses complex values and colour tables
    return found
