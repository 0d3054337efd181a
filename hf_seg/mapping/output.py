"""Layers of a map as GeoTIFF: tiled, compressed, with overviews, georeference, colours, names and tags.

Every layer is a file of its own, since a colour table is only to be had in a file of one band:
`map.tif` (class ids), `map_confidence.tif`, `map_disagreement.tif`, `map_probabilities.tif` (one band per class).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from hf_seg.errors import UserError
from hf_seg.labels import BACKGROUND, CLASS_NAMES, PALETTE
from hf_seg.mapping.scene import GDAL_ERRORS

BLOCK = 512  # side of a tile in pixels
SCORE_NODATA, SCORE_MAX = 255, 254  # a score of 1.0 is stored as SCORE_MAX


@dataclass(frozen=True)
class Layer:
    """One file of a map: its name ("" for the class ids) and what its bands are called."""

    name: str
    bands: tuple[str, ...]

    @property
    def is_classes(self) -> bool:
        return not self.name

    def path(self, destination: Path) -> Path:
        """Return where the layer goes when the class ids go to `destination`."""
        return destination if self.is_classes else destination.with_name(f"{destination.stem}_{self.name}.tif")


def choose_layers(*, confidence: bool, disagreement: bool, probabilities: bool) -> list[Layer]:
    """Return the layers of a map, the class ids first."""
    layers = [Layer("", ("land cover",))]
    layers += [Layer("confidence", ("probability of the class",))] * confidence
    layers += [Layer("disagreement", ("share of the networks for another class",))] * disagreement
    layers += [Layer("probabilities", CLASS_NAMES)] * probabilities
    return layers


@contextlib.contextmanager
def clear_errors(destination: Path, way_out: str) -> Iterator[None]:
    """Name the target where the disk is full, or something cannot be written.

    Raises:
        UserError: in place of an `OSError` or an error of GDAL.
    """
    try:
        yield
    except (OSError, *GDAL_ERRORS) as error:
        reason = getattr(error, "strerror", None) or error.__cause__ or error
        raise UserError(f"{destination} cannot be written ({' '.join(str(reason).split())}); {way_out}") from None


def write_layers(
    folder: Path,
    layers: Iterable[Layer],
    read_bands: Callable[[], Iterable[tuple[int, np.ndarray]]],
    *,
    scene: rasterio.DatasetReader,
    describe: Callable[[], Mapping[str, str]],
    cog: bool = False,
) -> dict[Layer, Path]:
    """Write the files of a map and read them back.

    Args:
        folder: takes the files.
        layers: what to write.
        read_bands: yields (first row, (bands of all layers, rows, width) uint8) from top to bottom; called twice.
        scene: whose size and georeference the map gets.
        describe: asked for the tags when all rows have passed.
        cog: write cloud-optimised files, through GDAL's driver for them.

    Returns:
        The file of each layer.

    Raises:
        OSError: a file cannot be written, or does not hold what was written.
    """
    layers = list(layers)
    paths = {layer: layer.path(folder / "layer.tif") for layer in layers}
    with contextlib.ExitStack() as stack:
        files = {layer: stack.enter_context(_create(paths[layer], layer, scene)) for layer in layers}
        for top, rows in read_bands():
            for layer, part in _split(layers, rows):
                files[layer].write(part, window=Window(0, top, scene.width, rows.shape[1]))
        for file in files.values():
            file.update_tags(**describe())
    for layer, path in paths.items():
        paths[layer] = _to_cog(path, layer) if cog else _add_overviews(path, layer)
    _check(paths, read_bands())
    return paths


def _create(path: Path, layer: Layer, scene: rasterio.DatasetReader) -> Any:
    gcps, gcps_crs = scene.gcps
    georeference = {} if gcps or scene.transform.is_identity else {"transform": scene.transform}
    path.unlink(missing_ok=True)  # GDAL would look into what a full disk may have left of it
    with _quiet():
        file = rasterio.open(
            path,
            "w",
            driver="GTiff",
            width=scene.width,
            height=scene.height,
            count=len(layer.bands),
            dtype="uint8",
            crs=gcps_crs if gcps else scene.crs,
            nodata=BACKGROUND if layer.is_classes else SCORE_NODATA,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            interleave="band",
            compress="deflate",
            predictor=1 if layer.is_classes else 2,
            bigtiff="if_safer",
            **georeference,
        )
    if gcps:
        file.gcps = gcps, gcps_crs
    if scene.rpcs:
        file.rpcs = scene.rpcs
    file.descriptions = layer.bands
    if layer.is_classes:
        file.write_colormap(1, {i: (*color, 0 if i == BACKGROUND else 255) for i, color in enumerate(PALETTE.tolist())})
        file.update_tags(1, **{f"class_{i}": name for i, name in enumerate(CLASS_NAMES)})
    else:
        file.scales = [1 / SCORE_MAX] * len(layer.bands)
    return file


def _split(layers: Iterable[Layer], rows: np.ndarray) -> Iterator[tuple[Layer, np.ndarray]]:
    first = 0
    for layer in layers:
        yield layer, rows[first : first + len(layer.bands)]
        first += len(layer.bands)


def _resampling(layer: Layer) -> Resampling:
    return Resampling.nearest if layer.is_classes else Resampling.average


def _add_overviews(path: Path, layer: Layer) -> Path:
    with _quiet(), rasterio.Env(GDAL_TIFF_OVR_BLOCKSIZE=BLOCK), rasterio.open(path, "r+") as file:
        levels = [2**n for n in range(1, 32) if max(file.shape) > BLOCK * 2 ** (n - 1)]
        if levels:
            file.build_overviews(levels, _resampling(layer))
    return path


def _to_cog(path: Path, layer: Layer) -> Path:
    target = path.with_suffix(".cog.tif")
    target.unlink(missing_ok=True)
    options = {"compress": "deflate", "blocksize": BLOCK, "overview_resampling": _resampling(layer).name}
    options |= {} if layer.is_classes else {"predictor": "yes"}
    with _quiet():
        rasterio.shutil.copy(path, target, driver="COG", **options)
    path.unlink()
    return target


def _check(paths: Mapping[Layer, Path], bands: Iterable[tuple[int, np.ndarray]]) -> None:
    """Compare the files with what should be in them: GDAL may notice a full disk too late to say so."""
    with _quiet(), contextlib.ExitStack() as stack:
        files = {layer: stack.enter_context(rasterio.open(path)) for layer, path in paths.items()}
        for top, rows in bands:
            for layer, part in _split(files, rows):
                written = files[layer].read(window=Window(0, top, files[layer].width, rows.shape[1]))
                if not np.array_equal(written, part):
                    raise OSError(f"rows {top} to {top + rows.shape[1] - 1} came back changed")
        for layer, file in files.items():
            for level in range(len(file.overviews(1))):
                with rasterio.open(paths[layer], overview_level=level) as overview:
                    for _, window in overview.block_windows(1):
                        overview.read(window=window)  # raises where a block is missing


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Accept rasters without georeference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
