"""Intervals of scores: laws, and the same numbers from a loop over each draw."""

import math

import numpy as np
import pytest

from hf_seg.bootstrap import (
    Interval,
    bootstrap_difference,
    bootstrap_miou,
    bootstrap_scores,
    crossed_difference,
    draw_counts,
)
from hf_seg.metrics import ConfusionMatrix

CLASSES, TILES, SEEDS = 5, 12, 3
LEVELS = (0.025, 0.975)


def random_counts(rng: np.random.Generator, conditions: int = 1, accuracy: float = 0.5) -> np.ndarray:
    """(conditions, TILES, C, C) counts with the same truth in every condition; class 4 is in one tile only."""
    truth = rng.integers(1, CLASSES, (TILES, 50))
    truth[1:][truth[1:] == 4] = 3
    found = np.zeros((conditions, TILES, CLASSES, CLASSES), dtype=np.int64)
    for condition in range(conditions):
        predicted = np.where(rng.random(truth.shape) < accuracy, truth, rng.integers(1, CLASSES, truth.shape))
        for tile in range(TILES):
            np.add.at(found[condition, tile], (truth[tile], predicted[tile]), 1)
    return found


def miou(matrix: np.ndarray, present: list[int]) -> float:
    """Mean over the given classes; 0 for one that the matrix's truth does not have."""
    counts = ConfusionMatrix(CLASSES)
    counts.matrix[:] = matrix
    iou = counts.compute()["iou"]
    return sum(iou[str(index)] or 0.0 for index in present) / len(present)


def test_interval_is_that_of_a_loop_over_the_draws() -> None:
    (matrices,) = random_counts(np.random.default_rng(0))
    draws = draw_counts(TILES, 60, np.random.default_rng(7))
    values = [miou(sum(matrices[i] for i in np.repeat(range(TILES), draw)), [1, 2, 3, 4]) for draw in draws]
    assert any(draw[0] == 0 for draw in draws)  # without class 4
    found = bootstrap_miou(matrices, replicates=60, seed=7)
    assert found == pytest.approx((miou(matrices.sum(axis=0), [1, 2, 3, 4]), *np.quantile(values, LEVELS)))


def test_value_is_the_score_of_the_whole_set() -> None:
    (matrices,) = random_counts(np.random.default_rng(0))
    counts = ConfusionMatrix(CLASSES)
    counts.matrix[:] = matrices.sum(axis=0)
    expected, found = counts.compute(), bootstrap_scores(matrices)
    assert found.mean_iou.value == pytest.approx(expected["mean_iou"])
    assert found.overall_accuracy.value == pytest.approx(expected["overall_accuracy"])
    assert math.isnan(found.iou[0].value) and math.isnan(found.iou[0].low)
    assert [each.value for each in found.iou[1:]] == pytest.approx(list(expected["iou"].values())[1:])
    assert all(each.low <= each.value <= each.high for each in found.iou[1:])


def test_background_has_no_part_in_the_mean() -> None:
    (matrices,) = random_counts(np.random.default_rng(0))
    before = bootstrap_miou(matrices)
    matrices[:, 0, 0] = 1000
    assert bootstrap_miou(matrices) == before


def test_crossed_interval_is_that_of_a_loop_over_seeds_and_tiles() -> None:
    both = random_counts(np.random.default_rng(1), 2 * SEEDS)
    a, b = both[:SEEDS], both[SEEDS:]
    rng = np.random.default_rng(5)
    tiles, seeds = draw_counts(TILES, 40, rng), draw_counts(SEEDS, 40, rng)
    values = []
    for tile_draw, seed_draw in zip(tiles, seeds, strict=True):
        differences = []
        for seed in np.repeat(range(SEEDS), seed_draw):
            sums = [sum(each[seed][i] for i in np.repeat(range(TILES), tile_draw)) for each in (a, b)]
            differences.append(miou(sums[1], [1, 2, 3, 4]) - miou(sums[0], [1, 2, 3, 4]))
        values.append(np.mean(differences))
    found = crossed_difference(a, b, replicates=40, seed=5).mean_iou
    assert found[1:] == pytest.approx(np.quantile(values, LEVELS))
    each = [bootstrap_difference(one, two).mean_iou.value for one, two in zip(a, b, strict=True)]
    assert found.value == pytest.approx(np.mean(each))


def test_one_seed_is_the_paired_bootstrap_over_tiles() -> None:
    a, b = random_counts(np.random.default_rng(1), 2)
    assert repr(crossed_difference(a[None], b[None], seed=3)) == repr(bootstrap_difference(a, b, seed=3))


def test_identical_conditions_differ_by_exactly_nothing() -> None:
    matrices = random_counts(np.random.default_rng(2), SEEDS)
    for found in (crossed_difference(matrices, matrices), bootstrap_difference(matrices[0], matrices[0])):
        assert found.mean_iou == found.overall_accuracy == found.iou[1] == Interval(0.0, 0.0, 0.0)
        assert not found.mean_iou.excludes_zero


def test_difference_changes_sign_with_its_arguments() -> None:
    a, b = random_counts(np.random.default_rng(3), 2)
    forward, backward = bootstrap_difference(a, b).mean_iou, bootstrap_difference(b, a).mean_iou
    assert forward == pytest.approx((-backward.value, -backward.high, -backward.low))


def test_a_better_network_is_found_better() -> None:
    (a,) = random_counts(np.random.default_rng(4))
    truth = a.sum(axis=2)
    found = bootstrap_difference(a, truth[:, None] * np.eye(CLASSES, dtype=np.int64)).mean_iou
    assert found.excludes_zero and 0 < found.low < found.value < found.high


def test_groups_are_drawn_whole() -> None:
    (matrices,) = random_counts(np.random.default_rng(5))
    regions = ["east", "west", "north", "south"] * 3
    sums = np.stack([matrices[start::4].sum(axis=0) for start in range(4)])
    assert bootstrap_miou(matrices, groups=regions) == bootstrap_miou(sums) != bootstrap_miou(matrices)
    assert repr(bootstrap_scores(matrices, groups=list(range(TILES)))) == repr(bootstrap_scores(matrices))


def test_a_single_tile_or_region_has_no_interval() -> None:
    (matrices,) = random_counts(np.random.default_rng(6))
    for found in (bootstrap_miou(matrices[:1]), bootstrap_miou(matrices, groups=["east"] * TILES)):
        assert np.isfinite(found.value) and np.isnan(found.low) and np.isnan(found.high) and not found.excludes_zero


def test_draws_depend_on_the_seed_only() -> None:
    (matrices,) = random_counts(np.random.default_rng(7))
    assert bootstrap_miou(matrices, seed=1) == bootstrap_miou(matrices, seed=1) != bootstrap_miou(matrices, seed=2)


def test_interval_is_about_as_wide_as_the_spread_of_new_sets_of_tiles() -> None:
    rng = np.random.default_rng(8)
    rates = rng.uniform(0.2, 0.8, (400, 50))  # accuracy of 400 sets of 50 tiles

    def counts(row: np.ndarray) -> np.ndarray:
        hits = (1000 * row).astype(np.int64)
        matrices = np.zeros((len(row), 3, 3), dtype=np.int64)
        matrices[:, 1, 1], matrices[:, 1, 2] = hits, 1000 - hits
        return matrices

    values = [bootstrap_miou(counts(row), replicates=1).value for row in rates]
    found = bootstrap_miou(counts(rates[0]))
    low, high = np.quantile(values, LEVELS)
    assert found.high - found.low == pytest.approx(high - low, rel=0.3)


def test_errors_say_what_is_wrong() -> None:
    a, b = random_counts(np.random.default_rng(9), 2)
    with pytest.raises(ValueError, match="not the same pixels of the same tiles"):
        bootstrap_difference(a, b[::-1])
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap_difference(a, b[1:])
    with pytest.raises(ValueError, match="no pixel of any tile"):
        bootstrap_miou(np.zeros((2, 3, 3), dtype=np.int64))
