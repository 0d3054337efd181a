"""A raster as the networks see it: uint8 amplitudes or colours, row by row, and which pixels hold data.

    with Scene("scene.tif", bands=None, units="db") as scene:
        pixels, valid = scene.rows(0, 512)      # (1 or 3, 512, width) uint8, (512, width) bool

Whatever the raster holds, a pixel without data is 0, as it was in training, and no value that it had gets through.
"""

import functools
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.dtypes import in_dtype_range
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from hf_seg.data.nodata import ZeroCollar
from hf_seg.errors import UserError

logger = logging.getLogger(__name__)

# What GDAL reports, and rasterio does not always turn into an error of its own.
GDAL_ERRORS = (RasterioError, CPLE_BaseError)

READ_ROWS = 256  # rows per read
UNITS = ("linear", "power", "db")
SAMPLED_PIXELS = 4_000_000  # per band, of whole rows spread over the scene, for the percentiles
PERCENTILES = (5, 95)
# Where these percentiles lie in what the networks learned from. SAR: measured on OpenEarthMap-SAR. Optical: mean
# plus and minus 1.64 standard deviations, between those of OpenEarthMap and those of OpenEarthMap-SAR's optical half.
SAR_LEVELS = (10.0, 95.0)
OPTICAL_LEVELS = (37.0, 199.0)


class Scene:
    """An open raster; close it, or use it in a `with` statement. Not for several threads.

    Args:
        source: whatever GDAL opens.
        bands: 1-based numbers, one for SAR or three for optical; None: the only band, or red, green and blue.
        units: "linear" takes values as they are, "power" their root, "db" as amplitude in decibels.
        stretch: two values, after `units`, that become 0 and 255. None: uint8 stays as it is, and of other types two
            percentiles of the valid pixels are brought to where they lay in training; see `stretch` afterwards.
        zero_collar: where a raster declares no nodata (value, mask or alpha), take zeros connected with its border for
            nodata.
        rows_held: rows that stay in memory, so that overlapping reads are cheap.

    Raises:
        UserError: what cannot be read, or is no such raster.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        bands: Sequence[int] | None = None,
        units: str = "linear",
        stretch: Sequence[float] | None = None,
        zero_collar: bool = True,
        rows_held: int = 2 * READ_ROWS,
    ) -> None:
        if units not in UNITS:
            raise UserError(f"unknown units {units!r}; choose one of {', '.join(UNITS)}")
        if stretch is not None and not (len(stretch) == 2 and -math.inf < stretch[0] < stretch[1] < math.inf):
            raise UserError(f"stretch must be two ascending numbers, for 0 and 255; got {list(stretch)}")
        self.name = str(source)
        self.dataset = _open(self.name)
        try:
            self.bands = _choose_bands(self.dataset, self.name, bands)
            self.height, self.width = self.dataset.height, self.dataset.width
            self.units = units
            self._declares_nodata = any(_declares_nodata(self.dataset, band) for band in self.bands)
            self._collar: ZeroCollar | None = None
            self._chunk = functools.lru_cache(maxsize=rows_held // READ_ROWS + 2)(self._read_chunk)
            if zero_collar and not self._declares_nodata:
                chunks = range(0, self.height, READ_ROWS)
                self._collar = ZeroCollar(_zeros(self._read(top, self._end(top))[0]) for top in chunks)
            self.stretch: tuple[float, float] | None = None
            if stretch is not None:
                self.stretch = (float(stretch[0]), float(stretch[1]))
            elif units != "linear" or any(self.dataset.dtypes[band - 1] != "uint8" for band in self.bands):
                self.stretch = self._find_stretch()
        except BaseException:
            self.dataset.close()
            raise

    def __enter__(self) -> "Scene":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and drop the rows held."""
        self._chunk.cache_clear()
        self.dataset.close()

    def rows(self, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        """Read full rows.

        Returns:
            Pixels (bands, bottom - top, width) uint8, 0 where there is no data; (bottom - top, width) bool, True
            where there is.

        Raises:
            UserError: the file is damaged there.
        """
        first, last = top // READ_ROWS, (bottom - 1) // READ_ROWS
        chunks = [self._chunk(number) for number in range(first, last + 1)]
        cut = slice(top - first * READ_ROWS, bottom - first * READ_ROWS)
        return (
            np.concatenate([pixels for pixels, _ in chunks], axis=1)[:, cut],
            np.concatenate([valid for _, valid in chunks])[cut],
        )

    def quicklook(self, valid: np.ndarray) -> np.ndarray:
        """Read the whole scene at the size of `valid`, (h, w) bool; (bands, h, w) uint8, 0 where not valid."""
        raw = self.dataset.read(self.bands, out_shape=(len(self.bands), *valid.shape))
        return self._to_uint8(raw, valid)

    def _end(self, top: int) -> int:
        return min(top + READ_ROWS, self.height)

    def _read_chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        top = number * READ_ROWS
        raw, valid = self._read(top, self._end(top))
        if self._collar is not None:
            valid &= ~self._collar.mask(number, _zeros(raw))
        return self._to_uint8(raw, valid), valid

    def _read(self, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        """Return raw values (bands, rows, width), and (rows, width) bool: valid by declaration, and finite."""
        window = Window(0, top, self.width, bottom - top)
        try:
            raw = self.dataset.read(self.bands, window=window)
            is_float = np.issubdtype(raw.dtype, np.floating)
            valid = np.ones(raw.shape[1:], dtype=bool)
            if self._declares_nodata:
                masks = self.dataset.read_masks(self.bands, window=window) > 0
                # a whole number is nodata where all bands have it, since 0 is also a colour's; of floats one suffices
                valid = masks.all(axis=0) if is_float else masks.any(axis=0)
        except GDAL_ERRORS as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"{self.name}: rows {top} to {bottom - 1} cannot be read; it is damaged or cut short, fetch it again "
                f"({reason})"
            ) from None
        return raw, valid & np.isfinite(raw).all(axis=0) if is_float else valid

    def _to_linear(self, raw: np.ndarray) -> np.ndarray:
        """Return float32 amplitudes; raw values are finite."""
        scales, offsets = (
            np.array([values[band - 1] for band in self.bands], np.float32)[:, None, None]
            for values in (self.dataset.scales, self.dataset.offsets)
        )
        values = raw.astype(np.float32) * scales + offsets
        if self.units == "power":
            values = np.sqrt(np.maximum(values, 0))  # noise subtraction leaves some below 0
        elif self.units == "db":
            values = 10 ** (np.clip(values, -200, 200) / 20)
        return values

    def _to_uint8(self, raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Stretch to 1..255, since 0 is nodata; without a stretch values stay what they are."""
        if self.stretch is None:
            return np.where(valid, raw, np.uint8(0))
        low, high = self.stretch
        values = self._to_linear(np.where(valid, raw, raw.dtype.type(0)))
        values = np.clip((values - low) * (255 / (high - low)), 1, 255)
        return np.where(valid, np.rint(values), 0).astype(np.uint8)

    def _find_stretch(self) -> tuple[float, float]:
        count = min(self.height, max(1, SAMPLED_PIXELS // self.width))
        sample = []
        for row in np.unique(np.linspace(0, self.height - 1, count).round().astype(int)).tolist():
            raw, valid = self._read(row, row + 1)
            valid &= ~_zeros(raw)  # the collar, wherever it is
            sample.append(self._to_linear(raw[:, valid][:, None])[:, 0])
        values = np.concatenate(sample, axis=1)
        if not values.size:
            raise UserError(f"{self.name}: none of its pixels holds data")
        low, high = np.percentile(values, PERCENTILES).tolist()
        if not low < high:
            raise UserError(f"{self.name}: {low:g} nearly everywhere; if that is right, pass --stretch LOW HIGH")
        dark, bright = SAR_LEVELS if len(self.bands) == 1 else OPTICAL_LEVELS
        per_level = (high - low) / (bright - dark)
        stretch = (low - dark * per_level, low + (255 - dark) * per_level)
        # rounded as it is printed, so that --stretch with these numbers gives the same map
        stretch = (float(f"{stretch[0]:.6g}"), float(f"{stretch[1]:.6g}"))
        logger.info(
            "%s: percentiles %d and %d of the valid pixels are %.6g and %.6g (%s); --stretch %r %r is used",
            *(self.name, *PERCENTILES, low, high, self.units, *stretch),
        )
        return stretch


def _zeros(raw: np.ndarray) -> np.ndarray:
    zeros: np.ndarray = (raw == 0).all(axis=0)
    return zeros


def _declares_nodata(dataset: rasterio.DatasetReader, band: int) -> bool:
    flags, nodata = dataset.mask_flag_enums[band - 1], dataset.nodatavals[band - 1]
    if MaskFlags.alpha in flags or MaskFlags.per_dataset in flags:
        return True
    return nodata is not None and in_dtype_range(nodata, dataset.dtypes[band - 1])


def _open(name: str) -> rasterio.DatasetReader:
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{name} is a folder; name a raster")
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"{name} is empty (0 bytes); fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(name)
    except GDAL_ERRORS as error:
        if path.is_file() and path.open("rb").read(64).lstrip()[:1] in (b"<", b"{"):
            raise UserError(f"{name} is text (HTML, XML or JSON), no raster; did a download fail?") from None
        way_out = "is it whole, and a raster?" if path.is_file() else "no such file?"
        raise UserError(f"{name} cannot be opened; {way_out} ({' '.join(str(error).split())})") from None
    fault = ""
    if not dataset.count:
        fault = f"holds {len(dataset.subdatasets)} datasets; name one of them: {', '.join(dataset.subdatasets[:3])}"
    elif any(dtype.startswith("complex") for dtype in dataset.dtypes):
        fault = f"is complex ({dataset.dtypes[0]}); its amplitude is DERIVED_SUBDATASET:AMPLITUDE:{name}"
    elif ColorInterp.palette in dataset.colorinterp:
        fault = "has a colour table, so its values are no intensities; expand it with gdal_translate -expand rgb"
    if fault:
        dataset.close()
        raise UserError(f"{name} {fault}")
    return dataset


def _choose_bands(dataset: rasterio.DatasetReader, name: str, bands: Sequence[int] | None) -> list[int]:
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
        chosen = f"{len(bands)} were chosen" if bands is not None else f"it has {dataset.count}"
        raise UserError(f"{name}: a network takes one band (SAR) or three (optical), {chosen}; choose with --bands")
    return list(bands)
