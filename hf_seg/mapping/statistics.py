"""Figures of a map, gathered while its rows pass by: pixels and area of each class, and whether seams show."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform as transform_coordinates

from hf_seg.labels import BACKGROUND, NUM_LABELS

# WGS 84: semi-major axis in metres, squared eccentricity
SEMI_MAJOR_AXIS, ECCENTRICITY_2 = 6378137.0, 0.00669437999014


class MapStatistics:
    """Count classes, areas and class changes of a map that comes in bands of rows, from top to bottom.

    Args:
        width: of the map in pixels.
        row_borders, column_borders: rows (columns) at which a window begins, or the first after a window's end.
        crs, transform: of the map; without them `areas` stays None.
    """

    def __init__(
        self,
        width: int,
        *,
        row_borders: Iterable[int],
        column_borders: Iterable[int],
        crs: CRS | None,
        transform: Affine,
    ) -> None:
        self.pixels = np.zeros(NUM_LABELS, np.int64)
        self.areas: np.ndarray | None = np.zeros(NUM_LABELS) if crs else None  # square metres
        self._crs, self._transform = crs, transform
        self._row_borders = set(row_borders)
        self._is_column_border = np.isin(np.arange(1, width), sorted(column_borders))
        self._changes = np.zeros(2, np.int64)  # elsewhere, on borders
        self._pairs = np.zeros(2, np.int64)
        self._last_row: np.ndarray | None = None

    def update(self, top: int, classes: np.ndarray) -> None:
        """Count the next rows.

        Args:
            top: the first of them.
            classes: (rows, width) uint8 ids; `BACKGROUND` is nodata.
        """
        counts = np.stack([(classes == index).sum(axis=1) for index in range(NUM_LABELS)], axis=1)
        self.pixels += counts.sum(axis=0)
        if self.areas is not None:
            areas = pixel_areas(self._crs, self._transform, classes.shape[1], range(top, top + len(classes)))
            self.areas = None if areas is None else self.areas + areas @ counts
        beside = self._changes_between(classes[:, :-1], classes[:, 1:])
        for total, counted in zip((self._changes, self._pairs), beside, strict=True):
            per_column = counted.sum(axis=0)
            total += per_column[~self._is_column_border].sum(), per_column[self._is_column_border].sum()
        above = classes if self._last_row is None else np.concatenate([self._last_row[None], classes])
        first = top + len(classes) - len(above) + 1
        is_border = np.array([row in self._row_borders for row in range(first, top + len(classes))], dtype=bool)
        for total, counted in zip(
            (self._changes, self._pairs), self._changes_between(above[:-1], above[1:]), strict=True
        ):
            per_row = counted.sum(axis=1)
            total += per_row[~is_border].sum(), per_row[is_border].sum()
        self._last_row = classes[-1]

    @staticmethod
    def _changes_between(classes: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both = (classes != BACKGROUND) & (neighbours != BACKGROUND)
        return both & (classes != neighbours), both

    @property
    def seam_score(self) -> float | None:
        """How often the class changes across a window's border, over how often it does elsewhere.

        1 where windows leave no trace, more where they show, infinite where the class changes nowhere else; None where
        it changes nowhere, or everything or nothing is border.
        """
        if not self._pairs.all() or not self._changes.any():
            return None
        elsewhere, on_borders = (self._changes / self._pairs).tolist()
        return on_borders / elsewhere if elsewhere else math.inf


def pixel_areas(crs: CRS, transform: Affine, width: int, rows: Sequence[int]) -> np.ndarray | None:
    """Return the area on the ground of a pixel in the middle of each row.

    Computed on the WGS 84 ellipsoid from the pixel's geographic corners, so it holds in degrees, in feet, and where a
    projection distorts areas (Web Mercator triples them at 55 degrees).

    Returns:
        (len(rows),) square metres; None if the CRS has no place on the earth.
    """
    column, row = (width - 1) / 2 + 0.5, np.asarray(rows) + 0.5
    # left, right, upper and lower edge of each pixel
    columns = np.concatenate([np.full(len(row), column + step) for step in (-0.5, 0.5, 0, 0)])
    lines = np.concatenate([row, row, row - 0.5, row + 0.5])
    xs = transform.a * columns + transform.b * lines + transform.c
    ys = transform.d * columns + transform.e * lines + transform.f
    try:
        longitudes, latitudes = (np.array(values) for values in transform_coordinates(crs, "EPSG:4326", xs, ys))
    except Exception:  # GDAL's own are private to rasterio; areas are a courtesy that must not cost the map
        return None
    left, right, upper, lower = np.stack([longitudes, latitudes]).reshape(2, 4, -1).swapaxes(0, 1)
    phi = np.radians((upper[1] + lower[1]) / 2)
    curvature = 1 - ECCENTRICITY_2 * np.sin(phi) ** 2
    east = SEMI_MAJOR_AXIS / np.sqrt(curvature) * np.cos(phi)  # metres per radian of longitude
    north = SEMI_MAJOR_AXIS * (1 - ECCENTRICITY_2) / curvature**1.5  # and of latitude
    across, down = (np.radians((step + 180) % 360 - 180) for step in (right - left, lower - upper))
    areas: np.ndarray = np.abs(across[0] * down[1] - across[1] * down[0]) * east * north
    return areas if np.isfinite(areas).all() else None
