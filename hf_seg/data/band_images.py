"""Images with bands of their own (`hf_seg.bands`): read one, and measure the values of a training set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import rasterio
from rasterio.enums import MaskFlags
from rasterio.io import MemoryFile
from tqdm import tqdm

from hf_seg.bands import Bands, valid_pixels
from hf_seg.errors import DatasetError
from hf_seg.normalization import Normalization

MEASURED_TILES = 200  # spread evenly over the training tiles
PIXELS_OF_A_TILE = 20_000
PERCENTILES = (1, 99)
MARGIN = 0.1  # of the range between the percentiles, added on both sides


class BandStatistics(NamedTuple):
    """What a network needs to know of its bands: the stretch of each, and mean and deviation behind it."""

    bands: Bands
    normalization: Normalization


def read_bands(image: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Read an image.

    Args:
        image: {path, bytes} of an undecoded `datasets.Image`.

    Returns:
        (bands, H, W) of the file's type, and (H, W) bool: where there is data (`valid_pixels`).
    """
    if image["bytes"] is not None:
        with MemoryFile(image["bytes"]) as memory, memory.open(driver="GTiff") as file:
            return _read(file)
    with rasterio.open(image["path"], driver="GTiff") as file:
        return _read(file)


def _read(file: rasterio.DatasetReader) -> tuple[np.ndarray, np.ndarray]:
    raw = file.read()
    has_masks = any(flags != [MaskFlags.all_valid] for flags in file.mask_flag_enums)
    return raw, valid_pixels(raw, file.read_masks() > 0 if has_masks else None)


def measure_bands(
    rows: datasets.Dataset, column: str, names: Sequence[str], *, progress: bool = True
) -> BandStatistics:
    """Measure each band of the training tiles: percentiles 1 and 99 with a margin, then mean and deviation.

    At most `MEASURED_TILES` tiles are read, and `PIXELS_OF_A_TILE` valid pixels of each are kept, so memory is bounded.
    The result depends on the tiles alone.

    Raises:
        DatasetError: no tile has data, or a band has one value only.
    """
    sample = []
    indices = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_TILES)).round().astype(int)).tolist()
    undecoded = rows.select_columns([column])
    for index in tqdm(indices, desc="bands", unit="tile", leave=False, disable=not progress):
        raw, valid = read_bands(undecoded[index][column])
        pixels = raw[:, valid]
        sample.append(pixels[:, :: max(1, pixels.shape[1] // PIXELS_OF_A_TILE)].astype(np.float64))
    values = np.concatenate(sample, axis=1)
    if not values.size:
        raise DatasetError(f"none of {len(indices)} {column} tiles has data in all of {', '.join(names)}")
    low, high = np.percentile(values, PERCENTILES, axis=1)
    if (constant := [name for name, a, b in zip(names, low, high, strict=True) if not a < b]) != []:
        raise DatasetError(f"band {constant[0]} of the {column} tiles has nearly one value only; leave it out")
    margin = MARGIN * (high - low)
    # rounded, so that the numbers in config.json are those that were used
    low, high = ([float(f"{value:.6g}") for value in values] for values in (low - margin, high + margin))
    bands = Bands(tuple(names), tuple(low), tuple(high))
    levels = bands.to_uint8(values[:, None], np.ones((1, values.shape[1]), bool))[:, 0] / 255
    mean, std = (tuple(float(f"{value:.4g}") for value in each) for each in (levels.mean(axis=1), levels.std(axis=1)))
    return BandStatistics(bands, Normalization(mean, std))
