"""What is measured on scenes, real or generated, to hold one against the other.

Where SAR is 0 there are no data, and nothing is measured. Classes with fewer than 1000 pixels are left out.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from hf_seg.labels import BACKGROUND, NUM_LABELS
from hf_seg.metrics import ConfusionMatrix

WINDOW = 9  # pixels
CLASSES = range(1, NUM_LABELS)
MIN_PIXELS = 1000


class LabelledSAR(Protocol):
    """One scene."""

    @property
    def sar(self) -> np.ndarray:
        """(H, W) uint8."""

    @property
    def label(self) -> np.ndarray:
        """(H, W) uint8 class ids."""


def local_moments(sar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of the window around each pixel, (H, W) float32 each."""
    image = sar.astype(np.float32)
    mean, square = (cv2.blur(x, (WINDOW, WINDOW), borderType=cv2.BORDER_REFLECT) for x in (image, image**2))
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


class SARStatistics(NamedTuple):
    """SAR levels of one class, pooled over scenes."""

    mean: float
    std: float
    percentiles: tuple[float, ...]  # 5, 50, 95, 99
    local_cv: float  # median of deviation / mean over the windows that lie wholly inside the class; NaN if none does


def sar_statistics(tiles: Sequence[LabelledSAR]) -> dict[int, SARStatistics]:
    """Measure the classes that `tiles` hold."""
    result = {}
    window = np.ones((WINDOW, WINDOW), np.uint8)
    for index in CLASSES:
        levels, ratios = [], []
        for tile in tiles:
            inside = (tile.label == index) & (tile.sar > 0)
            mean, deviation = local_moments(tile.sar)
            pure = cv2.erode(inside.astype(np.uint8), window) > 0
            levels.append(tile.sar[inside])
            ratios.append((deviation / np.maximum(mean, 1))[pure])
        pixels, ratio = np.concatenate(levels), np.concatenate(ratios)
        if len(pixels) >= MIN_PIXELS:
            percentiles = tuple(np.percentile(pixels, (5, 50, 95, 99)).tolist())
            local_cv = float(np.median(ratio)) if len(ratio) else np.nan
            result[index] = SARStatistics(float(pixels.mean()), float(pixels.std()), percentiles, local_cv)
    return result


def optical_statistics(images: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[int, tuple[float, ...]]:
    """Return {class: (R, G, B, std)} of (image, label) pairs; std is the mean of the three channels'."""
    result = {}
    for index in CLASSES:
        pixels = np.concatenate([image[label == index] for image, label in images])
        if len(pixels) >= MIN_PIXELS:
            result[index] = (*pixels.mean(0).tolist(), float(pixels.std(0).mean()))
    return result


def fit_and_score(fit: Sequence[LabelledSAR], score: Sequence[LabelledSAR], feature: str) -> float:
    """Score a class histogram, with priors, on unseen scenes: mIoU of the classes in their truth.

    Args:
        feature: "level" (256 bins of the pixel's level) or "window" (mean in 64 bins, deviation in 64 bins).
    """

    def bins(tile: LabelledSAR) -> np.ndarray:
        if feature == "level":
            return tile.sar.astype(np.int64)
        mean, deviation = local_moments(tile.sar)
        return np.minimum(mean / 4, 63).astype(np.int64) * 64 + np.minimum(deviation, 63).astype(np.int64)

    counts = np.zeros((NUM_LABELS, 256 if feature == "level" else 4096))
    for tile in fit:
        valid = tile.sar > 0
        np.add.at(counts, (tile.label[valid], bins(tile)[valid]), 1)
    counts[BACKGROUND] = -1
    best = counts.argmax(0)
    confusion = ConfusionMatrix()
    for tile in score:
        valid = tile.sar > 0
        confusion.update(best[bins(tile)][valid], tile.label[valid])
    return float(confusion.compute()["mean_iou"])


def difficulty(
    tiles: Sequence[LabelledSAR], feature: str, n_fit: int = 5, n_score: int = 4, repeats: int = 10
) -> np.ndarray:
    """Score simple learners on random disjoint sets of scenes: (repeats,) mIoU."""
    rng = np.random.default_rng(0)
    n_score = min(n_score, len(tiles) - n_fit)
    scores = []
    for _ in range(repeats):
        order = rng.permutation(len(tiles))
        fit, score = order[:n_fit], order[n_fit : n_fit + n_score]
        scores.append(fit_and_score([tiles[i] for i in fit], [tiles[i] for i in score], feature))
    return np.array(scores)


def segment_sizes(labels: Sequence[np.ndarray]) -> dict[int, float]:
    """Return {class: mean area in pixels of its connected segments}."""
    result = {}
    for index in CLASSES:
        counts = [cv2.connectedComponents((label == index).astype(np.uint8), connectivity=4)[0] - 1 for label in labels]
        area = sum(int((label == index).sum()) for label in labels)
        result[index] = area / max(sum(counts), 1)
    return result
