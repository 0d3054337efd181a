"""Statistics of a map: seams, areas, pixels."""

import numpy as np
import pytest
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin

from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.mapping.statistics import MapStatistics, pixel_areas


def test_seams_areas_and_pixels_agree_with_a_direct_count() -> None:
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 4, (14, 9)), np.ones((3, 4), int)).astype(np.uint8)
    row_borders, column_borders = {0, 10, 15, 42}, {0, 8, 13, 36}
    crs, transform = CRS.from_epsg(32633), from_origin(5e5, 5e6, 2, 2)
    statistics = MapStatistics(36, row_borders=row_borders, column_borders=column_borders, crs=crs, transform=transform)
    for top in range(0, 42, 5):
        statistics.update(top, classes[top : top + 5])
    changes, pairs = [0, 0], [0, 0]
    for y in range(42):
        for x in range(36):
            for other, border in (((y - 1, x), y in row_borders), ((y, x - 1), x in column_borders)):
                if min(other) >= 0 and classes[y, x] and classes[other]:
                    pairs[border] += 1
                    changes[border] += classes[y, x] != classes[other]
    assert statistics.seam_score == pytest.approx((changes[1] / pairs[1]) / (changes[0] / pairs[0]))
    assert statistics.pixels.tolist() == np.bincount(classes.ravel(), minlength=OPEN_EARTH_MAP.num_labels).tolist()
    assert statistics.areas == pytest.approx(statistics.pixels * 4 / 0.9996**2, rel=1e-4)


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        ("EPSG:32632", from_origin(5e5, 5.6e6, 0.5, 0.5), 0.25 / 0.9996**2),
        ("EPSG:32632", Affine.translation(5e5, 5.6e6) * Affine.rotation(30) * Affine.scale(2, -3), 6 / 0.9996**2),
        ("EPSG:3857", from_origin(1e6, 7_361_866, 1, 1), 0.3297),  # about cos^2 of 55 degrees
        ("EPSG:4326", from_origin(179.999, 0.0001, 1e-4, 1e-4), 11.132 * 11.057),
        ("EPSG:2263", from_origin(1e6, 2e5, 10, 10), 9.2903),  # US survey feet
    ],
)
def test_pixel_areas_are_areas_on_the_ground(crs: str, transform: Affine, expected: float) -> None:
    areas = pixel_areas(CRS.from_string(crs), transform, 20, range(3))
    assert areas == pytest.approx([expected] * 3, rel=2e-3)
