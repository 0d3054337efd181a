"""Pixels outside the SAR swath: the same rule for an image in memory and for a scene read in bands."""

import numpy as np
import pytest
from scipy.ndimage import label as label_components

from hf_seg.data.nodata import ZeroCollar, outside_swath


@pytest.mark.parametrize("seed", range(20))
def test_zeros_connected_with_the_border_are_outside_the_swath_in_one_piece_and_in_bands(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    sar = np.where(rng.random((height, width)) < rng.uniform(0.3, 0.8), 0, 9).astype(np.uint8)
    labels = label_components(sar == 0)[0]
    on_border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    expected = np.isin(labels, on_border[on_border > 0])
    assert np.array_equal(outside_swath(sar), expected)
    rows = int(rng.integers(1, 9))
    bands = [sar[top : top + rows] == 0 for top in range(0, height, rows)]
    collar = ZeroCollar(bands)
    assert np.array_equal(np.concatenate([collar.mask(i, band) for i, band in enumerate(bands)]), expected)


def test_the_collar_follows_a_spiral_across_bands() -> None:
    image = np.ones((512, 9), np.uint8)
    image[:, 1] = image[-2, 1:8] = image[2:-1, 7] = image[2, 3:8] = image[2:-4, 3] = 0  # reaches the top border only
    bands = [band == 0 for band in np.split(image, 4)]
    collar = ZeroCollar(bands)
    found = np.concatenate([collar.mask(i, band) for i, band in enumerate(bands)])
    assert np.array_equal(found, image == 0)


def test_an_image_without_zeros_lies_inside_the_swath() -> None:
    assert not outside_swath(np.ones((5, 4), np.uint8)).any()
