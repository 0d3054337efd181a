"""Radial power spectra of optical images, and the blur between two sets of them as a ratio of resolution alignment.

Blur is not the only thing that changes a spectrum. So contrast is fitted, content is averaged out by medians over
patches and images, and noise is measured where the image is flat. From a dozen images, known ratios up to 0.4 are
recovered within about a fifth; noise can double that error. Two limits remain. JPEG leaves noise in textured areas and
none in flat ones, and so looks like sharpness. And a bilinear resampling by more than about 0.45 aliases detail instead
of removing it: spectra differ little there, and only the lower end of a range can be determined.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from scipy import fft

from hf_seg.data.transforms import align_resolution

PATCH = 128  # pixels, the side of a transformed patch
N_RINGS = 18
RING_EDGES = np.geomspace(2 / PATCH, 0.7, N_RINGS + 1)  # cycles per pixel; above 0.5 only in the corners
RINGS = np.sqrt(RING_EDGES[:-1] * RING_EDGES[1:])
CONTRAST_RINGS = slice(0, 5)  # below 0.045 cycles per pixel: the contrast of an image
DETAIL_RINGS = slice(12, 16)  # 0.2 to 0.45 cycles per pixel: its sharpness
COMPARED_RINGS = slice(0, 17)  # below 0.57 cycles per pixel; the last ring separates noise from detail

RATIOS = np.concatenate([np.geomspace(0.1, 0.5, 16)[:-1], np.linspace(0.5, 1, 11)])  # the last one changes nothing
RATIO_WIDTHS = np.gradient(RATIOS)

DB = 10 / np.log(10)  # decibels per unit of natural log power

BLOCK = 32  # pixels, the side of a block that may be flat
CORNER = 0.55  # cycles per pixel: only noise, where the image is flat
FLAT_QUANTILE, FLAT_BIAS = 0.1, 0.72  # in pure noise the flattest tenth of blocks has 0.72 of the power
NOISE_MARGIN = 1.25  # rings below this multiple of the noise are not compared
BLUR_FLOOR = 0.01  # nor are levels 20 dB below the sharp source: side lobes of the interpolation
# standard deviation of a ring's log power between scenes of equal sharpness: 0.23-0.30 synthetic, 0.36-0.46 real
SCENE_SPREAD = 0.35
OUTLIERS = 0.05  # fraction of images that follow no mixture
MIN_EVIDENCE = 4.0  # log-likelihood that a mixture must gain; domains of equal sharpness gain at most 1


class Spectra(NamedTuple):
    """Spectra of one image, or of several along leading axes."""

    power: np.ndarray  # (..., N_RINGS), median over patches; white noise of variance v has v in every ring
    noise: np.ndarray  # (...), power of the noise in every ring


class Mixture(NamedTuple):
    """A fraction `prob` of images is blurred by a ratio uniform in a range, the others are as sharp as the source."""

    prob: float
    min_ratio: float
    max_ratio: float

    def weights(self) -> np.ndarray:
        """Return the weight of each of `RATIOS`; they sum to 1."""
        inside = RATIO_WIDTHS * ((self.min_ratio <= RATIOS) & (RATIOS <= self.max_ratio))  # noqa: SIM300
        weights = self.prob * inside / inside.sum()
        weights[-1] += 1 - self.prob
        return weights


def power_spectrum(image: np.ndarray) -> np.ndarray:
    """Return the mean power in each ring of the tapered image without its mean.

    Args:
        image: (..., S, S) grey; if S is less than `PATCH`, the lowest rings are empty and NaN.

    Returns:
        (..., N_RINGS) float64, in the image's units squared; ring k lies about `RINGS[k]` cycles per pixel.
    """
    ring = _rings(image.shape[-1])
    power = _power(image).reshape(-1, ring.size)
    counts = np.bincount(ring, minlength=N_RINGS + 1)[:N_RINGS]
    sums = np.stack([np.bincount(ring, values, minlength=N_RINGS + 1)[:N_RINGS] for values in power])
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return mean.reshape(*image.shape[:-2], N_RINGS)


def noise_power(patches: np.ndarray) -> float:
    """Estimate the power of an image's white noise from the flattest blocks of (N, PATCH, PATCH) grey levels 0..255.

    Blocks with clipped pixels hide noise and are skipped. If no block is flat, the estimate is too high.
    """
    grid = (len(patches), PATCH // BLOCK, BLOCK, PATCH // BLOCK, BLOCK)
    blocks = patches.reshape(grid).swapaxes(2, 3).reshape(-1, BLOCK, BLOCK)
    clean = (blocks.min((1, 2)) > 2) & (blocks.max((1, 2)) < 253)
    blocks = blocks[clean] if clean.sum() >= 8 else blocks
    frequency = np.hypot(fft.fftfreq(BLOCK)[:, None], fft.rfftfreq(BLOCK))
    power = _power(blocks)[:, frequency > CORNER]
    return float(np.quantile(power.mean(1), FLAT_QUANTILE)) / FLAT_BIAS


def choose_patches(image: np.ndarray) -> list[tuple[slice, slice]]:
    """Spread up to 3 x 3 patches evenly over an image and keep those with contrast and at most 1 % of nodata.

    Args:
        image: (H, W, 3) uint8; all-zero pixels are nodata.
    """

    def starts(length: int) -> list[int]:
        room = length - PATCH
        count = min(3, 1 + 2 * room // PATCH) if room >= 0 else 0  # patches overlap by at most half
        return np.linspace(0, room, count).round().astype(int).tolist()

    corners = product(starts(image.shape[0]), starts(image.shape[1]))
    windows = [(slice(top, top + PATCH), slice(left, left + PATCH)) for top, left in corners]
    valid = np.any(image > 0, axis=-1)
    return [window for window in windows if valid[window].mean() >= 0.99 and image[window].mean(-1).std() >= 2]


def measure(grey: np.ndarray, windows: Sequence[tuple[slice, slice]]) -> Spectra:
    """Measure one image, (H, W) float32 luminance in 0..255, in at least one window of `choose_patches`."""
    patches = np.stack([grey[window] for window in windows])
    power = np.maximum(np.median(power_spectrum(patches), 0), 1e-6)  # synthetic images may have empty rings
    return Spectra(power, np.array(noise_power(patches)))


def measure_aligned(grey: np.ndarray, windows: Sequence[tuple[slice, slice]]) -> Spectra:
    """Measure an image aligned to each of `RATIOS`: power (len(RATIOS), N_RINGS), noise (len(RATIOS),)."""
    return stack([measure(align_resolution(grey, ratio) if ratio < 1 else grey, windows) for ratio in RATIOS])


def stack(spectra: Sequence[Spectra]) -> Spectra:
    """Join spectra along a new first axis."""
    return Spectra(np.stack([each.power for each in spectra]), np.stack([each.noise for each in spectra]))


def sharpness(spectra: Spectra) -> np.ndarray:
    """Return (...), the level of fine detail relative to coarse detail, in dB and without noise."""
    log_power, _ = _without_noise(spectra)
    return (log_power[..., DETAIL_RINGS].mean(-1) - log_power[..., CONTRAST_RINGS].mean(-1)) * DB


def reference_curves(source: Spectra) -> np.ndarray:
    """Return (len(RATIOS), N_RINGS), the log power of the median source image at each ratio, without noise.

    The images, of `measure_aligned`, are normalised by their contrast before alignment.
    """
    log_power, _ = _without_noise(source)
    contrast = log_power[:, -1:, CONTRAST_RINGS].mean(-1, keepdims=True)
    return np.median(log_power - contrast, 0)


def ratio_costs(target: Spectra, curves: np.ndarray) -> np.ndarray:
    """Return (N, len(RATIOS)), how badly each ratio explains each of N images: twice a negative log-likelihood.

    Args:
        target: `measure` of the images.
        curves: of `reference_curves`.
    """
    log_power, weight = (array[:, None] for array in _without_noise(target))
    floor = curves[-1] + np.log(BLUR_FLOOR)
    model = np.logaddexp(curves, floor)
    trust = (weight * np.exp(curves - model)) ** 2  # a ring at the floor carries no contrast
    contrast = ((log_power - curves) * trust).sum(-1) / np.maximum(trust.sum(-1), 1e-9)
    error = weight * (model - np.logaddexp(log_power - contrast[..., None], floor))
    return (error**2).sum(-1) / SCENE_SPREAD**2


def fit_mixture(costs: np.ndarray) -> Mixture:
    """Find the mixture under which images of (N, len(RATIOS)) costs are most likely; prob 0 if it is not clearly so.

    Quantiles of the images' best ratios would be simpler, but too wide by the error of each ratio.
    """
    likelihood = np.exp(-(costs - costs.min(1, keepdims=True)) / 2)
    outlier_likelihood = likelihood @ RATIO_WIDTHS / RATIO_WIDTHS.sum()

    def score(mixture: Mixture) -> float:
        return float(np.log((1 - OUTLIERS) * likelihood @ mixture.weights() + OUTLIERS * outlier_likelihood).sum())

    ranges = combinations(RATIOS[:-1].tolist(), 2)
    candidates = [Mixture(prob, *limits) for limits in ranges for prob in np.linspace(0.05, 1, 20).tolist()]
    unblurred = Mixture(0.0, float(RATIOS[-2]), 1.0)
    best = max(candidates, key=score)
    return best if score(best) - score(unblurred) >= MIN_EVIDENCE else unblurred


def mixture_bands(source: Spectra, mixture: Mixture) -> np.ndarray:
    """Return (9, N_RINGS), the deciles of log power over the source images, aligned by `mixture`."""
    log_power = np.log(source.power)
    log_power = log_power - log_power[:, -1:, CONTRAST_RINGS].mean(-1, keepdims=True)
    weights = np.tile(mixture.weights(), len(log_power))
    return _deciles(log_power.reshape(-1, N_RINGS), weights)


def image_bands(target: Spectra) -> np.ndarray:
    """Return (9, N_RINGS), the deciles of log power over images of normalised contrast."""
    log_power = np.log(target.power)
    return _deciles(log_power - log_power[:, CONTRAST_RINGS].mean(-1, keepdims=True), np.ones(len(log_power)))


def mismatch(bands: np.ndarray, others: np.ndarray) -> float:
    """Return the mean absolute difference of two sets of deciles over `COMPARED_RINGS`, in dB."""
    return float(np.abs(bands - others)[:, COMPARED_RINGS].mean()) * DB


def _deciles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.quantile(values, np.arange(1, 10) / 10, 0, weights=weights, method="inverted_cdf")


def _without_noise(spectra: Spectra) -> tuple[np.ndarray, np.ndarray]:
    """Return log power without the noise, and for each ring the weight in [0, 1] that is not noise."""
    power, noise = spectra.power, spectra.noise[..., None]
    weight = np.clip(1 - NOISE_MARGIN * noise / power, 0, 1)
    return np.log(np.maximum(power - noise, 0.02 * power)), weight


def _power(images: np.ndarray) -> np.ndarray:
    """Return (..., S, S // 2 + 1), the power at each frequency; white noise of variance v has v everywhere."""
    centred = images - images.mean((-2, -1), keepdims=True)
    taper = _taper(images.shape[-1])
    return np.abs(fft.rfft2(centred * taper)) ** 2 / taper.size


@lru_cache(maxsize=8)
def _taper(side: int) -> np.ndarray:
    hann = np.hanning(side + 2)[1:-1]
    return (np.outer(hann, hann) / (hann**2).mean()).astype(np.float32)


@lru_cache(maxsize=8)
def _rings(side: int) -> np.ndarray:
    """Return the ring of each frequency of a square, flattened; `N_RINGS` means none."""
    frequency = np.hypot(fft.fftfreq(side)[:, None], fft.rfftfreq(side)).ravel()
    ring = np.searchsorted(RING_EDGES, frequency, side="right") - 1
    ring[(ring < 0) | (ring >= N_RINGS)] = N_RINGS
    return ring
