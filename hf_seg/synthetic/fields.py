"""Random fields and ray geometry, for the ground, both images and the label noise. Distances are in pixels."""

import cv2
import numpy as np

_GRID = 3  # grid points per correlation length; with fewer, the bilinear interpolation is visible
_SIGMA = 1.5  # in grid points


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Draw a Gaussian field of zero mean and unit variance, correlated over about `scale` pixels.

    Mean and variance are those over many fields; the mean of one field differs if it is small against `scale`.
    """
    step = max(scale / _GRID, 1.0)
    pad = 5
    rows, columns = (int(np.ceil(side / step)) + 2 * pad for side in shape)
    sigma = _SIGMA if step > 1 else scale / 2
    if sigma < 0.3:
        return rng.standard_normal(shape, dtype=np.float32)
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma, cv2.CV_32F)
    coarse = cv2.sepFilter2D(rng.standard_normal((rows, columns), dtype=np.float32), -1, kernel, kernel)
    coarse = coarse / np.float32((kernel**2).sum())
    if step == 1:
        return coarse[pad : pad + shape[0], pad : pad + shape[1]]
    matrix = np.array([[1 / step, 0, pad - rng.random()], [0, 1 / step, pad - rng.random()]])
    return cv2.warpAffine(coarse, matrix, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def fractal_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float, octaves: int = 4) -> np.ndarray:
    """Sum `octaves` fields of decreasing scale and amplitude to unit variance: an amplitude spectrum near 1 / f."""
    amplitudes = 0.5 ** np.arange(octaves)
    field = sum(a * smooth_noise(rng, shape, scale / 2**k) for k, a in enumerate(amplitudes))
    return np.asarray(field / np.sqrt((amplitudes**2).sum()), dtype=np.float32)


def to_uniform(field: np.ndarray) -> np.ndarray:
    """Map a standard normal field to a uniform one in 0..1 (logistic approximation, error < 0.01)."""
    return 1 / (1 + np.exp(np.float32(-1.702) * field))


class RayFrame:
    """A raster rotated so that rays run along its rows, from column 0 on; for the sun and for the radar.

    Args:
        shape: (H, W) of the scene.
        azimuth: direction in which rays travel, in radians from the x axis towards y (down).
    """

    def __init__(self, shape: tuple[int, int], azimuth: float) -> None:
        height, width = self.shape = shape
        self.side = int(np.ceil(np.hypot(height, width))) + 2
        cos, sin = np.cos(azimuth), np.sin(azimuth)
        centre, middle = np.array([(width - 1) / 2, (height - 1) / 2]), (self.side - 1) / 2
        rotation = np.array([[cos, sin], [-sin, cos]])
        self.matrix = np.hstack([rotation, (middle - rotation @ centre)[:, None]])

    def rotate(self, image: np.ndarray) -> np.ndarray:
        """Return (side, side): `image` along the rays, nearest pixels; its border is repeated outside."""
        size = (self.side, self.side)
        return cv2.warpAffine(image, self.matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)

    def rotate_back(self, image: np.ndarray) -> np.ndarray:
        """Return (H, W) from (side, side), bilinear."""
        return cv2.warpAffine(image, self.matrix, self.shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    def shadow_depth(self, rotated_height: np.ndarray, slope: float) -> np.ndarray:
        """Return how far below the grazing ray each pixel lies, >= 0.

        Args:
            rotated_height: (side, side), in pixels.
            slope: descent of the ray per pixel of travel.
        """
        climb = rotated_height + slope * np.arange(self.side, dtype=np.float32)
        return np.maximum.accumulate(climb, axis=1) - climb
