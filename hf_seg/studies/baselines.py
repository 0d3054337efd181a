"""Baselines that need no network: what a score must exceed before it shows that anything was learned."""

from collections.abc import Iterable
from typing import Literal

import cv2
import numpy as np

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix

WINDOW = 9  # pixels: side of the local windows

Tiles = Iterable[tuple[np.ndarray, np.ndarray]]  # SAR (H, W) uint8, 0 = nodata; class ids (H, W) uint8
Feature = Literal["majority", "level", "window"]


def local_moments(sar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of the window around each pixel, (H, W) float32 each."""
    image = sar.astype(np.float32)
    mean, square = (cv2.blur(x, (WINDOW, WINDOW), borderType=cv2.BORDER_REFLECT) for x in (image, image**2))
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def score_histogram(fit: Tiles, score: Tiles, feature: Feature) -> float:
    """Return the mIoU of a class histogram, with priors, on unseen tiles.

    Args:
        fit, score: tiles to count, and to predict.
        feature: "majority" (the most common class everywhere), "level" (the pixel's level) or "window" (mean and
            standard deviation of the window around it, in 64 bins each).
    """

    def bins(sar: np.ndarray) -> np.ndarray:
        if feature == "majority":
            return np.zeros(sar.shape, np.int64)
        if feature == "level":
            return sar.astype(np.int64)
        mean, deviation = local_moments(sar)
        return np.minimum(mean / 4, 63).astype(np.int64) * 64 + np.minimum(deviation, 63).astype(np.int64)

    counts = np.zeros((OPEN_EARTH_MAP.num_labels, 4096), np.int64)
    for sar, label in fit:
        valid = (sar > 0) & (label != IGNORE_INDEX)
        np.add.at(counts, (label[valid], bins(sar)[valid]), 1)
    counts[BACKGROUND] = -1
    best = counts.argmax(0)
    confusion = ConfusionMatrix()
    for sar, label in score:
        valid = sar > 0
        confusion.update(best[bins(sar)][valid], label[valid])
    return float(confusion.compute()["mean_iou"])
