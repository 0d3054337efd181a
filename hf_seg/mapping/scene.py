"""A raster as the networks expect it: uint8 amplitudes or colours, read in rows, and a mask of the pixels with data.

    with Scene("scene.tif", bands=None, units="db") as scene:
        pixels, valid = scene.rows(0, 512)      # (1 or 3, 512, width) uint8, (512, width) bool

A pixel without data is 0, as in training, whatever value it has in the raster.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rasterio.windows import Window

from hf_seg.bands import Bands, valid_pixels
from hf_seg.data.nodata import ZeroCollar
from hf_seg.errors import FileError, UserError
from hf_seg.mapping.gdal import GDAL_ERRORS, choose_bands, declares_nodata, gdal_reason, open_raster
from hf_seg.mapping.options import UNITS

logger = logging.getLogger(__name__)

READ_ROWS = 256  # rows per read
SAMPLED_PIXELS = 4_000_000  # per band, in full rows spread over the scene, for the percentiles
PERCENTILES = (5, 95)
# Values of these percentiles in the training data. SAR: measured on OpenEarthMap-SAR. Optical: mean plus and minus 1.64
# standard deviations, between those of OpenEarthMap and those of the optical half of OpenEarthMap-SAR.
SAR_LEVELS = (10.0, 95.0)
OPTICAL_LEVELS = (37.0, 199.0)


class Scene(contextlib.AbstractContextManager["Scene"]):
    """An open raster, to be closed or used in a `with` statement. Not thread-safe.

    Args:
        source: anything that GDAL opens.
        bands, units, stretch, zero_collar: see `SceneOptions`. The stretch is in linear units; if it is None, two
            percentiles of the valid pixels are mapped to their values in the training data, and the attribute `stretch`
            tells the values used.
        input_bands: the bands that the network takes and their stretch, from its training; None: 8-bit SAR or RGB.
        cached_rows: rows kept in memory, so that overlapping reads are cheap.

    Raises:
        UserError: the file cannot be read, or is not a raster of this kind.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        bands: Sequence[int] | None = None,
        units: str = "linear",
        stretch: Sequence[float] | None = None,
        zero_collar: bool = True,
        input_bands: Bands | None = None,
        cached_rows: int = 2 * READ_ROWS,
    ) -> None:
        if units not in UNITS:
            raise UserError(f"unknown units {units!r}; choose one of {', '.join(UNITS)}")
        if stretch is not None and not (len(stretch) == 2 and -math.inf < stretch[0] < stretch[1] < math.inf):
            raise UserError(f"stretch must be two ascending numbers, for 0 and 255; got {list(stretch)}")
        if input_bands is not None and (stretch is not None or units != "linear"):
            raise UserError(
                "this network has the stretch of its training data, so the scene must be in the units of those; "
                "leave out --stretch and --units"
            )
        self.name = str(source)
        self.dataset = open_raster(self.name)
        self.input_bands = input_bands
        self.bands = choose_bands(self.dataset, bands, input_bands and input_bands.names)
        self.height, self.width = self.dataset.height, self.dataset.width
        self.units = units
        self._declares_nodata = any(declares_nodata(self.dataset, band) for band in self.bands)
        self._collar: ZeroCollar | None = None
        self._chunk = functools.lru_cache(maxsize=cached_rows // READ_ROWS + 2)(self._read_chunk)
        if zero_collar and not self._declares_nodata and input_bands is None:
            tops = range(0, self.height, READ_ROWS)
            self._collar = ZeroCollar(_is_zero(self._read(top, READ_ROWS)[0]) for top in tops)
        self.stretch: tuple[float, float] | None = None
        if stretch is not None:
            self.stretch = (float(stretch[0]), float(stretch[1]))
        elif input_bands is None:
            is_uint8 = all(self.dataset.dtypes[band - 1] == "uint8" for band in self.bands)
            self.stretch = None if is_uint8 and units == "linear" else self._find_stretch()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and free the cached rows."""
        self._chunk.cache_clear()
        self.dataset.close()

    def rows(self, top: int, bottom: int) -> tuple[np.ndarray, np.ndarray]:
        """Read full rows; a damaged file is a `UserError`.

        Returns:
            Pixels (bands, bottom - top, width) uint8, 0 where there is no data; valid (bottom - top, width) bool.
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
        with self._reading("a reduced image"):
            raw = self.dataset.read(self.bands, out_shape=(len(self.bands), *valid.shape))
        return self._to_uint8(raw, valid & np.isfinite(raw).all(axis=0))

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except GDAL_ERRORS as error:
            hint = "the file is damaged or truncated, download it again"
            raise FileError(f"{self.name}: {what} cannot be read; {hint} ({gdal_reason(error)})") from None

    def _read_chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        raw, valid = self._read(number * READ_ROWS, READ_ROWS)
        if self._collar is not None:
            valid &= ~self._collar.mask(number, _is_zero(raw))
        return self._to_uint8(raw, valid), valid

    def _read(self, top: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return raw values (bands, rows, width), and (rows, width) bool: not declared nodata, and finite."""
        bottom = min(top + count, self.height)
        window = Window(0, top, self.width, bottom - top)
        with self._reading(f"rows {top} to {bottom - 1}"):
            raw = self.dataset.read(self.bands, window=window)
            masks = self.dataset.read_masks(self.bands, window=window) > 0
        is_explicit = self.input_bands is None or self._declares_nodata  # else 0 in all integer bands is nodata
        return raw, valid_pixels(raw, masks if is_explicit else None)

    def _to_linear(self, raw: np.ndarray) -> np.ndarray:
        """Return float32 amplitudes; raw values are finite."""
        indices = np.array(self.bands) - 1
        scales, offsets = np.array([self.dataset.scales, self.dataset.offsets], np.float32)[:, indices, None, None]
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32) * scales + offsets
        if self.units == "power":
            values = np.sqrt(np.maximum(values, 0))  # noise subtraction may leave values below 0
        elif self.units == "db":
            values = 10 ** (np.clip(values, -200, 200) / 20)
        return values

    def _to_uint8(self, raw: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Stretch to 1..255, since 0 is nodata; without a stretch the values are unchanged."""
        if self.input_bands is not None:
            return self.input_bands.to_uint8(raw, valid)
        if self.stretch is None:
            return np.where(valid, raw, np.uint8(0))
        low, high = self.stretch
        values = self._to_linear(np.where(valid, raw, raw.dtype.type(0)))
        with np.errstate(over="ignore"):  # a value near the end of float32 is 255
            values = np.clip((values - low) * (255 / (high - low)), 1, 255)
        return np.where(valid, np.rint(values), 0).astype(np.uint8)

    def _find_stretch(self) -> tuple[float, float]:
        count = min(self.height, max(1, SAMPLED_PIXELS // self.width))
        sample = []
        for row in np.unique(np.linspace(0, self.height - 1, count).round().astype(int)).tolist():
            raw, valid = self._read(row, 1)
            valid &= ~_is_zero(raw)  # leaves out the collar
            sample.append(self._to_linear(raw[:, valid][:, None])[:, 0])
        values = np.concatenate(sample, axis=1)
        if not values.size:
            raise UserError(f"{self.name}: no pixel has data")
        low, high = np.percentile(values, PERCENTILES).tolist()
        if not low < high:
            raise UserError(f"{self.name}: nearly every pixel is {low:g}; if that is right, pass --stretch LOW HIGH")
        dark, bright = SAR_LEVELS if len(self.bands) == 1 else OPTICAL_LEVELS
        per_level = (high - low) / (bright - dark)
        stretch = (low - dark * per_level, low + (255 - dark) * per_level)
        # rounded as it is logged, so that --stretch with these numbers gives the same map
        stretch = (float(f"{stretch[0]:.6g}"), float(f"{stretch[1]:.6g}"))
        logger.info(
            "%s: percentiles %d and %d of the valid pixels are %.6g and %.6g (%s); --stretch %r %r is used",
            *(self.name, *PERCENTILES, low, high, self.units, *stretch),
        )
        return stretch


def _is_zero(raw: np.ndarray) -> np.ndarray:
    return np.all(raw == 0, axis=0)
