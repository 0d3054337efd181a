"""Does a confidence of 80 % mean 80 % correct? Histograms of confidence, in memory that does not grow with the pixels.

calibration = Calibration()
calibration.update(confidence, label_map, label)       # each tile
calibration.expected_error(), calibration.reliability(), calibration.coverage()
"""

from typing import NamedTuple

import numpy as np

from hf_seg.labels import IGNORE_INDEX

BINS = 15  # equal-width, as the expected calibration error is usually given (Guo et al. 2017)
STEPS = 300  # of the histogram; a multiple of BINS


class Bin(NamedTuple):
    """The pixels of one range of confidence; means are NaN where there are none."""

    low: float
    high: float
    share: float  # of all pixels
    confidence: float  # mean
    accuracy: float


class Calibration:
    """Count right and wrong pixels by their confidence.

    Attributes:
        pixels, correct: (STEPS,) int64, by the confidence's step of [0, 1]; 1 belongs to the last one.
        confidence: (STEPS,) float64, summed over the pixels.
    """

    def __init__(self) -> None:
        self.pixels, self.correct = np.zeros(STEPS, dtype=np.int64), np.zeros(STEPS, dtype=np.int64)
        self.confidence = np.zeros(STEPS)

    def update(self, confidence: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> None:
        """Count the labelled pixels of one map.

        Args:
            confidence: (H, W) float in [0, 1], the probability of the predicted class.
            predictions, labels: (H, W) class ids; pixels labelled `IGNORE_INDEX` are not counted.
        """
        labelled = labels != IGNORE_INDEX
        values, right = confidence[labelled].astype(np.float64), predictions[labelled] == labels[labelled]
        step = np.clip(values * STEPS, 0, STEPS - 1).astype(np.intp)
        self.pixels += np.bincount(step, minlength=STEPS)
        self.correct += np.bincount(step[right], minlength=STEPS)
        self.confidence += np.bincount(step, weights=values, minlength=STEPS)

    def expected_error(self) -> float:
        """Return |accuracy - mean confidence| averaged over 15 equal-width bins, weighted by their pixels."""
        gap = self.correct.reshape(BINS, -1).sum(axis=1) - self.confidence.reshape(BINS, -1).sum(axis=1)
        return float(np.abs(gap).sum() / self.pixels.sum())

    def mean_confidence(self) -> float:
        """Return the mean over all pixels; above their accuracy, the network is overconfident."""
        return float(self.confidence.sum() / self.pixels.sum())

    def reliability(self) -> list[Bin]:
        """Return the bins of the expected calibration error."""
        sums = (each.reshape(BINS, -1).sum(axis=1) for each in (self.pixels, self.confidence, self.correct))
        pixels, confidence, correct = (each.astype(np.float64) for each in sums)
        with np.errstate(invalid="ignore"):
            columns = pixels / pixels.sum(), confidence / pixels, correct / pixels
        edges = np.linspace(0, 1, BINS + 1)
        return [Bin(*map(float, row)) for row in zip(edges[:-1], edges[1:], *columns, strict=True)]

    def coverage(self) -> np.ndarray:
        """Say what is lost and gained by keeping confident pixels only.

        Returns:
            (STEPS, 3): a confidence threshold, the fraction of pixels at or above it, and their accuracy (NaN if none).
        """
        kept, correct = (np.cumsum(each[::-1])[::-1].astype(np.float64) for each in (self.pixels, self.correct))
        accuracy = np.divide(correct, kept, out=np.full(STEPS, np.nan), where=kept > 0)
        return np.column_stack([np.arange(STEPS) / STEPS, kept / kept[0], accuracy])
