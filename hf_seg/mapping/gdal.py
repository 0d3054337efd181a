"""GDAL through rasterio: its session, its errors, and which rasters and bands can be mapped."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hf_seg.data.raster_size import require_scene_size
from hf_seg.errors import UserError, shown

# rasterio does not turn every error of GDAL into one of its own
GDAL_ERRORS = (RasterioError, CPLE_BaseError)
RED_GREEN_BLUE = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
GDAL_CACHE = 128  # MiB; GDAL's default is a fraction of the machine's memory
TIFF = "GTiff"


def is_tiff_file(name: str) -> bool:
    """Tell whether a name is that of a file of this machine that calls itself TIFF."""
    return Path(name).suffix.lower() in (".tif", ".tiff") and Path(name).is_file()


@contextlib.contextmanager
def gdal_session() -> Iterator[None]:
    """Limit GDAL's cache, run no Python of a VRT, and accept rasters without a georeference silently."""
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE, GDAL_VRT_ENABLE_PYTHON="NO"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def gdal_reason(error: BaseException) -> str:
    """Return what GDAL reports, in one line; rasterio's own message often only points to it."""
    return " ".join(str(error.__cause__ or error).split())


def open_raster(name: str) -> rasterio.DatasetReader:
    """Open a raster of intensities; a file called .tif is read as GeoTIFF alone, since a VRT points to other files.

    Raises:
        UserError: it cannot be opened, or is another kind of raster; the message says why.
    """
    try:
        dataset = rasterio.open(name, driver=TIFF if is_tiff_file(name) else None)
    except GDAL_ERRORS as error:
        raise UserError(
            f"{name} cannot be opened as a raster; check the name, and download the file again if it is incomplete or "
            f"a web page ({' '.join(str(error).split())})"
        ) from None
    require_scene_size(dataset, name)
    if not dataset.count:
        names = ", ".join(dataset.subdatasets[:3])
        raise UserError(f"{name} contains {len(dataset.subdatasets)} datasets; name one of them: {names}")
    if any(dtype.startswith("complex") for dtype in dataset.dtypes):
        raise UserError(
            f"{name} is complex ({dataset.dtypes[0]}); its amplitude is DERIVED_SUBDATASET:AMPLITUDE:{name}"
        )
    if ColorInterp.palette in dataset.colorinterp:
        raise UserError(
            f"{name} has a colour table, so its values are not intensities; expand it with gdal_translate -expand rgb"
        )
    return dataset


def choose_bands(
    dataset: rasterio.DatasetReader, bands: Sequence[int] | None, names: Sequence[str] | None = None
) -> list[int]:
    """Return the bands to read, 1-based: `bands`, or the only band, or red, green and blue.

    Args:
        names: of the bands that the network takes, if they are not 8-bit SAR or RGB: those with these descriptions, or
            all bands in the order of the file, if they are as many.

    Raises:
        UserError: a band that does not exist, or neither one nor three, or not as many as there are names.
    """
    if names is not None:
        descriptions = [(description or "").lower() for description in dataset.descriptions]
        if bands is None and {name.lower() for name in names} <= {*descriptions}:
            bands = [1 + descriptions.index(name.lower()) for name in names]
        found = list(bands or dataset.indexes)
        if len(found) != len(names) or not set(found) <= set(dataset.indexes):
            raise UserError(
                f"{dataset.name} has bands 1 to {dataset.count}; the network takes {len(names)}: {', '.join(names)}; "
                "choose them with --bands, in this order"
            )
        return found
    if bands is None:
        colors = dict(zip(dataset.colorinterp, dataset.indexes, strict=True))
        if colors.keys() >= set(RED_GREEN_BLUE):
            bands = [colors[kind] for kind in RED_GREEN_BLUE]
        else:
            kinds = zip(dataset.indexes, dataset.colorinterp, strict=True)
            bands = [band for band, kind in kinds if kind != ColorInterp.alpha]
    if len(bands) not in (1, 3) or not set(bands) <= set(dataset.indexes):
        raise UserError(
            f"{dataset.name} has bands 1 to {dataset.count}; a network takes one (SAR) or three (optical) of them, not "
            f"{shown(bands)[1:-1]}; choose with --bands"
        )
    return list(bands)


def declares_nodata(dataset: rasterio.DatasetReader, band: int) -> bool:
    """Tell whether a band has a nodata value that can occur in it, a mask or an alpha band."""
    flags, nodata = dataset.mask_flag_enums[band - 1], dataset.nodatavals[band - 1]
    if MaskFlags.alpha in flags or MaskFlags.per_dataset in flags:
        return True
    return nodata is not None and in_dtype_range(nodata, dataset.dtypes[band - 1])
