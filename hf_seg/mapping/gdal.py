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

from hf_seg.errors import UserError, file_errors

# rasterio does not turn every error of GDAL into one of its own
GDAL_ERRORS = (RasterioError, CPLE_BaseError)
GDAL_CACHE = 128  # MiB; GDAL's default is a fraction of the machine's memory


@contextlib.contextmanager
def gdal_session() -> Iterator[None]:
    """Limit GDAL's cache, and accept rasters without a georeference silently."""
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def gdal_reason(error: BaseException) -> str:
    """Return what GDAL reports, in one line; rasterio's own message often only points to it."""
    return " ".join(str(error.__cause__ or error).split())


def open_raster(name: str) -> rasterio.DatasetReader:
    """Open a raster.

    Raises:
        UserError: it cannot be opened, or is not a raster of intensities; the message says why.
    """
    path = Path(name)
    with file_errors(name, "cannot be read"):
        if path.is_dir():
            raise UserError(f"{name} is a folder; name a raster")
        start = b""
        if is_file := path.is_file():
            with path.open("rb") as file:
                start = file.read(64).lstrip()
            if not path.stat().st_size:
                raise UserError(f"{name} is empty (0 bytes); download it again")
    try:
        dataset = rasterio.open(name)
    except GDAL_ERRORS as error:
        if start[:1] in (b"<", b"{"):
            raise UserError(f"{name} is text (HTML, XML or JSON), not a raster; did a download fail?") from None
        hint = "is it a complete raster?" if is_file else "does the file exist?"
        raise UserError(f"{name} cannot be opened; {hint} ({' '.join(str(error).split())})") from None
    problem = ""
    if not dataset.count:
        names = ", ".join(dataset.subdatasets[:3])
        problem = f"contains {len(dataset.subdatasets)} datasets; name one of them: {names}"
    elif any(dtype.startswith("complex") for dtype in dataset.dtypes):
        problem = f"is complex ({dataset.dtypes[0]}); its amplitude is DERIVED_SUBDATASET:AMPLITUDE:{name}"
    elif ColorInterp.palette in dataset.colorinterp:
        problem = "has a colour table, so its values are not intensities; expand it with gdal_translate -expand rgb"
    if problem:
        dataset.close()
        raise UserError(f"{name} {problem}")
    return dataset


def choose_bands(dataset: rasterio.DatasetReader, bands: Sequence[int] | None) -> list[int]:
    """Return the bands to read, 1-based: `bands`, or the only band, or red, green and blue.

    Raises:
        UserError: a band that does not exist, or neither one nor three.
    """
    name = dataset.name
    wrong = [band for band in bands or () if not 1 <= band <= dataset.count]
    if wrong:
        raise UserError(f"{name} has bands 1 to {dataset.count}; there is no band {wrong[0]}")
    if bands is None:
        kinds = dict(zip(dataset.indexes, dataset.colorinterp, strict=True))
        colors = {kind: band for band, kind in kinds.items()}
        plain = [band for band, kind in kinds.items() if kind != ColorInterp.alpha]
        red_green_blue = [colors.get(kind) for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue)]
        if None not in red_green_blue:
            bands = [band for band in red_green_blue if band is not None]
        elif len(plain) in (1, 3):
            bands = plain
    if bands is None or len(bands) not in (1, 3):
        found = f"{len(bands)} were chosen" if bands is not None else f"it has {dataset.count}"
        raise UserError(f"{name}: a network takes one band (SAR) or three (optical), {found}; choose with --bands")
    return list(bands)


def declares_nodata(dataset: rasterio.DatasetReader, band: int) -> bool:
    """Tell whether a band has a nodata value that can occur in it, a mask or an alpha band."""
    flags, nodata = dataset.mask_flag_enums[band - 1], dataset.nodatavals[band - 1]
    if MaskFlags.alpha in flags or MaskFlags.per_dataset in flags:
        return True
    return nodata is not None and in_dtype_range(nodata, dataset.dtypes[band - 1])
