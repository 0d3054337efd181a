"""Calibration counted in histograms, against direct formulas on all pixels."""

import numpy as np
import pytest

from hf_seg.calibration import BINS, STEPS, Calibration
from hf_seg.labels import IGNORE_INDEX


def maps(seed: int, size: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, prediction and label, the latter right as often as the square root of the confidence says."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(4, 2, (size, size)).astype(np.float32)
    label = rng.integers(1, 9, (size, size)).astype(np.uint8)
    predicted = np.where(rng.random((size, size)) < np.sqrt(confidence), label, label % 8 + 1)
    label[rng.random((size, size)) < 0.1] = IGNORE_INDEX
    return confidence, predicted, label


def counted(*seeds: int) -> tuple[Calibration, np.ndarray, np.ndarray]:
    """The counts of several maps, and confidence and correctness of all their labelled pixels."""
    calibration, values, right = Calibration(), [], []
    for seed in seeds:
        confidence, predicted, label = maps(seed)
        calibration.update(confidence, predicted, label)
        values.append(confidence[label != IGNORE_INDEX])
        right.append((predicted == label)[label != IGNORE_INDEX])
    return calibration, np.concatenate(values).astype(np.float64), np.concatenate(right)


def test_expected_error_is_that_of_the_formula() -> None:
    calibration, values, right = counted(0, 1)
    error = 0.0
    for low in range(BINS):
        found = (values >= low / BINS) & (values < (low + 1) / BINS)
        if found.any():
            error += found.mean() * abs(right[found].mean() - values[found].mean())
    assert calibration.expected_error() == pytest.approx(error, abs=1e-12)
    assert error > 0.05
    assert calibration.mean_confidence() == pytest.approx(values.mean())


def test_bins_are_the_means_of_their_pixels() -> None:
    calibration, values, right = counted(2)
    bins = calibration.reliability()
    assert len(bins) == BINS and sum(each.share for each in bins) == pytest.approx(1)
    found = (values >= bins[9].low) & (values < bins[9].high)
    assert bins[9][2:] == pytest.approx((found.mean(), values[found].mean(), right[found].mean()))


def test_coverage_is_what_is_left_at_each_threshold() -> None:
    calibration, values, right = counted(3)
    rows = calibration.coverage()
    assert rows.shape == (STEPS, 3) and rows[0].tolist() == pytest.approx([0, 1, right.mean()])
    for threshold, kept, accuracy in rows[[0, 100, 150, 240]]:
        assert kept == pytest.approx((values >= threshold).mean())
        assert accuracy == pytest.approx(right[values >= threshold].mean())
    assert (np.diff(rows[:, 1]) <= 0).all()


def test_certain_and_right_is_calibrated() -> None:
    calibration = Calibration()
    calibration.update(np.ones((2, 2)), np.full((2, 2), 5), np.full((2, 2), 5))
    assert calibration.expected_error() == 0 and calibration.reliability()[-1].accuracy == 1
    calibration.update(np.ones((2, 2)), np.full((2, 2), 5), np.full((2, 2), 6))
    assert calibration.expected_error() == 0.5 and np.isnan(calibration.reliability()[0].accuracy)
