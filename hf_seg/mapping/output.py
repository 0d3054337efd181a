"""The layers of a map as GeoTIFF: tiled, compressed, with overviews, georeference, colours, class names and tags.

A colour table needs a file with a single band, so every layer is a file of its own:
`map.tif` (class ids), `map_confidence.tif`, `map_disagreement.tif`, `map_probabilities.tif` (one band per class).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling
from rasterio.profiles import DefaultGTiffProfile
from rasterio.windows import Window

from hf_seg.labels import BACKGROUND, LabelSet
from hf_seg.mapping.options import OutputOptions

BLOCK = 512  # side of a tile in pixels
SCORE_NODATA, SCORE_MAX = 255, 254  # a score of 1.0 is stored as SCORE_MAX

Bands = Iterable[tuple[int, np.ndarray]]  # first row, (bands of the layer, rows, width) uint8


class Layer(NamedTuple):
    """One file of a map: its name, "" for the class ids, and the descriptions of its bands."""

    name: str
    bands: tuple[str, ...]

    def path(self, class_map: Path) -> Path:
        """Return the file of the layer, given that of the class ids."""
        return class_map.with_name(f"{class_map.stem}_{self.name}.tif") if self.name else class_map


def choose_layers(options: OutputOptions, label_set: LabelSet) -> list[Layer]:
    """Return the layers of a map, the class ids first."""
    descriptions = {  # by the option that chooses the layer
        "confidence": ("probability of the class",),
        "disagreement": ("weight of the networks for another class",),
        "probabilities": label_set.names,
    }
    scores = [Layer(name, bands) for name, bands in descriptions.items() if getattr(options, name)]
    return [Layer("", ("land cover",)), *scores]


def write_layer(
    path: Path,
    layer: Layer,
    read_bands: Callable[[], Bands],
    *,
    scene: rasterio.DatasetReader,
    tags: Mapping[str, str],
    label_set: LabelSet,
    cog: bool = False,
) -> Path:
    """Write one file of a map, check it and return its path.

    Args:
        path: temporary name of the file.
        read_bands: returns the rows of the layer from top to bottom; called twice.
        scene: its size and georeference are those of the map.
        tags: metadata of the file.
        label_set: names and colours of the classes.
        cog: write a cloud-optimized file, with GDAL's driver for them.

    Raises:
        OSError: it cannot be written, or what was written cannot be read back.
    """
    with _create(path, layer, scene, label_set) as file:
        for top, rows in read_bands():
            file.write(rows, window=Window(0, top, scene.width, rows.shape[1]))
        file.update_tags(**tags)
    path = _to_cog(path, layer) if cog else _add_overviews(path, layer)
    _check(path, read_bands())
    return path


def _create(path: Path, layer: Layer, scene: rasterio.DatasetReader, label_set: LabelSet) -> Any:
    gcps, gcps_crs = scene.gcps
    georeference = {"gcps": gcps, "crs": gcps_crs} if gcps else {"crs": scene.crs}
    if not gcps and not scene.transform.is_identity:
        georeference["transform"] = scene.transform
    path.unlink(missing_ok=True)  # GDAL would open what a full disk may have left of it
    profile = DefaultGTiffProfile(
        width=scene.width,
        height=scene.height,
        count=len(layer.bands),
        nodata=SCORE_NODATA if layer.name else BACKGROUND,
        blockxsize=BLOCK,
        blockysize=BLOCK,
        compress="deflate",
        predictor=2 if layer.name else 1,
        bigtiff="if_safer",
        rpcs=scene.rpcs,
    )
    file = rasterio.open(path, "w", **profile, **georeference)
    file.descriptions = layer.bands
    if layer.name:
        file.scales = [1 / SCORE_MAX] * len(layer.bands)
    else:
        file.write_colormap(1, {i: (*color, 0 if i == BACKGROUND else 255) for i, color in enumerate(label_set.colors)})
        file.update_tags(1, **{f"class_{i}": name for i, name in enumerate(label_set.names)})
    return file


def _add_overviews(path: Path, layer: Layer) -> Path:
    with rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=BLOCK), rasterio.open(path, "r+") as file:
        levels = [2**n for n in range(1, 32) if max(file.shape) > BLOCK * 2 ** (n - 1)]
        if levels:
            file.build_overviews(levels, Resampling.average if layer.name else Resampling.nearest)
    return path


def _to_cog(path: Path, layer: Layer) -> Path:
    target = path.with_suffix(".cog.tif")
    target.unlink(missing_ok=True)
    options = (
        {"predictor": "yes", "overview_resampling": "average"} if layer.name else {"overview_resampling": "nearest"}
    )
    rasterio.shutil.copy(path, target, driver="COG", compress="deflate", blocksize=BLOCK, **options)
    path.unlink()
    return target


def _check(path: Path, bands: Bands) -> None:
    """Compare a file with what was to be written: GDAL may notice a full disk without reporting it."""
    with rasterio.open(path) as file:
        levels = range(len(file.overviews(1)))
        for top, rows in bands:
            if not np.array_equal(file.read(window=Window(0, top, file.width, rows.shape[1])), rows):
                raise OSError(f"rows {top} to {top + rows.shape[1] - 1} were read back with other values")
    for level in levels:
        with rasterio.open(path, overview_level=level) as overview:
            for _, window in overview.block_windows(1):
                overview.read(window=window)  # raises if a block is missing
