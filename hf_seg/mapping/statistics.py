"""Statistics of a map, computed band by band: pixels and area of each class, and whether window borders are visible."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as transform_coordinates

from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet

# WGS 84: semi-major axis in metres, squared eccentricity
SEMI_MAJOR_AXIS, ECCENTRICITY_2 = 6378137.0, 0.00669437999014
GIS_SUFFIXES = (".aux.xml", ".qml")  # of the files that give a GIS the legend of the map


@dataclass(frozen=True)
class MapSummary:
    """The files and the statistics of a finished map; the times are those of this process."""

    files: list[Path]
    pixels: dict[str, int]  # by class name
    areas_km2: dict[str, float] | None  # by class name; None if the map has no CRS on the earth
    nodata_pixels: int
    seam_score: float | None  # see `MapStatistics.seam_score`
    seconds: float
    network_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, paths as text."""
        return {**vars(self), "files": [str(file) for file in self.files]}

    def __str__(self) -> str:
        total = max(sum(self.pixels.values()), 1)
        lines = []
        for name, count in self.pixels.items():
            area = f"{self.areas_km2[name]:14.4f} km2" if self.areas_km2 else ""
            lines.append(f"{name:18s}{count:14,d} pixels {100 * count / total:6.2f} %{area}")
        lines.append(f"{'no class':18s}{self.nodata_pixels:14,d} pixels")
        score = "undefined" if self.seam_score is None else f"{self.seam_score:.3f}"
        lines.append(f"seam score {score} (class changes across window borders over those elsewhere; 1: no seams)")
        percentage = 100 * self.network_seconds / max(self.seconds, 1e-9)
        lines.append(f"{self.seconds:.1f} s, {percentage:.0f} % of it in the networks")
        beside = [file for file in self.files if file.name.endswith(GIS_SUFFIXES)]
        lines += [f"written: {file}" for file in self.files if file not in beside]
        return "\n".join([*lines, f"class names and colours for a GIS: {', '.join(file.name for file in beside)}"])


class MapStatistics:
    """Count the classes, areas and class changes of a map that comes in bands of rows, from top to bottom.

    Args:
        width: of the map in pixels.
        row_borders, column_borders: first rows (columns) of the windows, and the first after each window.
        crs, transform: of the map.
        label_set: the N classes, background included.

    Attributes:
        pixels: (N,) int64.
        areas: (N,) float64 in square metres; None if the map has no CRS on the earth.
    """

    def __init__(
        self,
        width: int,
        *,
        row_borders: Iterable[int],
        column_borders: Iterable[int],
        crs: CRS | None,
        transform: Affine,
        label_set: LabelSet = OPEN_EARTH_MAP,
    ) -> None:
        self.pixels = np.zeros(label_set.num_labels, np.int64)
        self.areas: np.ndarray | None = np.zeros(label_set.num_labels) if crs else None
        self._names = label_set.names
        self._crs, self._transform = crs, transform
        self._row_borders = sorted(row_borders)
        self._is_column_border = np.isin(np.arange(1, width), sorted(column_borders))
        self._changes = np.zeros(2, np.int64)  # class changes elsewhere, and across borders
        self._pairs = np.zeros(2, np.int64)  # pairs of neighbours, likewise
        self._last_row: np.ndarray | None = None

    def update(self, top: int, classes: np.ndarray) -> None:
        """Count the next rows, from row `top`; (rows, width) uint8 ids, `BACKGROUND` is nodata."""
        counts = np.stack([(classes == index).sum(axis=1) for index in range(len(self._names))], axis=1)
        self.pixels += counts.sum(axis=0)
        if self.areas is not None:
            areas = pixel_areas(self._crs, self._transform, classes.shape[1], range(top, top + len(classes)))
            self.areas = None if areas is None else self.areas + areas @ counts
        self._count_changes(classes[:, :-1], classes[:, 1:], self._is_column_border, axis=0)
        if self._last_row is not None:
            classes = np.concatenate([self._last_row[None], classes])
            top -= 1
        is_row_border = np.isin(np.arange(top + 1, top + len(classes)), self._row_borders)
        self._count_changes(classes[:-1], classes[1:], is_row_border, axis=1)
        self._last_row = classes[-1]

    def _count_changes(self, classes: np.ndarray, neighbours: np.ndarray, is_border: np.ndarray, axis: int) -> None:
        """Count pairs of neighbours with a class, and their class changes; `is_border` is along the other axis."""
        pairs = (classes != BACKGROUND) & (neighbours != BACKGROUND)
        for total, found in ((self._pairs, pairs), (self._changes, pairs & (classes != neighbours))):
            counts = found.sum(axis=axis)
            total += counts[~is_border].sum(), counts[is_border].sum()

    @property
    def seam_score(self) -> float | None:
        """The rate of class changes across window borders, divided by the rate elsewhere.

        1 if windows leave no trace, more if their borders are visible, infinite if the class changes nowhere else. None
        if it changes nowhere, or if there are no borders, or nothing else.
        """
        if not self._pairs.all() or not self._changes.any():
            return None
        elsewhere, on_borders = (self._changes / self._pairs).tolist()
        return on_borders / elsewhere if elsewhere else math.inf

    def summary(self, files: Sequence[Path], *, seconds: float, network_seconds: float) -> MapSummary:
        """Return the statistics of the rows counted so far, by class name."""
        names = {index: name for index, name in enumerate(self._names) if index != BACKGROUND}
        return MapSummary(
            files=list(files),
            pixels={name: int(self.pixels[i]) for i, name in names.items()},
            areas_km2=None if self.areas is None else {name: float(self.areas[i]) / 1e6 for i, name in names.items()},
            nodata_pixels=int(self.pixels[BACKGROUND]),
            seam_score=self.seam_score,
            seconds=seconds,
            network_seconds=network_seconds,
        )


def pixel_areas(crs: CRS, transform: Affine, width: int, rows: Sequence[int]) -> np.ndarray | None:
    """Return the area on the ground of the pixel in the middle of each row.

    Computed on the WGS 84 ellipsoid from the geographic coordinates of the pixel's edges, so it is right for a CRS in
    degrees or feet, and for a projection that distorts areas (Web Mercator triples them at 55 degrees).

    Returns:
        (len(rows),) square metres; None if the CRS cannot be transformed to geographic coordinates.
    """
    column, row = (width - 1) / 2 + 0.5, np.asarray(rows) + 0.5
    # left, right, upper and lower edge of each pixel
    columns = np.concatenate([np.full(len(row), column + step) for step in (-0.5, 0.5, 0, 0)])
    lines = np.concatenate([row, row, row - 0.5, row + 0.5])
    xs = transform.a * columns + transform.b * lines + transform.c
    ys = transform.d * columns + transform.e * lines + transform.f
    try:
        coordinates = transform_coordinates(crs, "EPSG:4326", xs, ys)
    except Exception:  # GDAL's errors are private to rasterio, and a map without areas is better than none
        return None
    left, right, upper, lower = np.reshape(coordinates, (2, 4, -1)).swapaxes(0, 1)
    phi = np.radians((upper[1] + lower[1]) / 2)
    curvature = 1 - ECCENTRICITY_2 * np.sin(phi) ** 2
    east = SEMI_MAJOR_AXIS / np.sqrt(curvature) * np.cos(phi)  # metres per radian of longitude
    north = SEMI_MAJOR_AXIS * (1 - ECCENTRICITY_2) / curvature**1.5  # metres per radian of latitude
    across, down = (np.radians((step + 180) % 360 - 180) for step in (right - left, lower - upper))
    areas: np.ndarray = np.abs(across[0] * down[1] - across[1] * down[0]) * east * north
    return areas if np.isfinite(areas).all() else None
