"""How sure a score is: 95 % intervals from tiles, regions or seeds drawn with replacement (percentile bootstrap).

    bootstrap_miou(matrices)                     # (T, C, C) counts of T tiles
    bootstrap_difference(a, b).mean_iou          # two networks on the same tiles, b - a
    crossed_difference(a, b).mean_iou            # (S, T, C, C): two conditions, each with the same S seeds

A draw's matrices are summed and scored as one set. Its mIoU is over the classes from 1 up in the truth of *all* tiles:
one that a draw does not have counts 0 in it, so that no draw averages over other classes, and two networks differ by
nothing there. The interval of that class alone comes from the draws that have it.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from hf_seg.labels import BACKGROUND

LEVELS = (0.025, 0.975)
REPLICATES = 1000


class Interval(NamedTuple):
    """A value and the bounds of its 95 % interval; NaN where there is none, e.g. of a single tile."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Tell whether the interval is wholly above or wholly below 0."""
        return self.low > 0 or self.high < 0


class Scores(NamedTuple):
    """Scores, or differences of scores, as fractions; NaN in `iou` for a class that is not in the truth."""

    mean_iou: Interval
    overall_accuracy: Interval
    iou: list[Interval]  # by class id; background is listed, though no part of the mean


def bootstrap_miou(
    matrices: np.ndarray, *, groups: Sequence[Hashable] | None = None, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Return the mIoU of all tiles; see `bootstrap_scores`."""
    return bootstrap_scores(matrices, groups=groups, replicates=replicates, seed=seed).mean_iou


def bootstrap_scores(
    matrices: np.ndarray, *, groups: Sequence[Hashable] | None = None, replicates: int = REPLICATES, seed: int = 0
) -> Scores:
    """Score all tiles, with intervals from tiles drawn with replacement.

    Args:
        matrices: (T, C, C) int64 pixel counts of each tile, rows = truth.
        groups: T names; whole groups (regions) are drawn in place of tiles.
        replicates: number of draws.
        seed: of the draws.

    Raises:
        ValueError: no pixel of any tile is of a class from 1 up.
    """
    return _describe(_draw_scores(_group(matrices[None], groups), replicates, seed))


def bootstrap_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Scores:
    """Return the scores of `b` minus those of `a`, each draw being the same tiles for both (paired).

    Args:
        a, b: (T, C, C) int64 counts of the same pixels of the same tiles, rows = truth.
        groups, replicates, seed: as in `bootstrap_scores`.

    Raises:
        ValueError: the truths differ, so these are not the same tiles in the same order.
    """
    return crossed_difference(a[None], b[None], groups=groups, replicates=replicates, seed=seed)


def crossed_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Scores:
    """Return the scores of condition `b` minus those of `a`, averaged over seeds; each draw is of seeds and of tiles.

    Seeds are paired: a draw takes the same seeds, and for all of them the same tiles, of both conditions. With a single
    seed the interval says nothing about seeds.

    Args:
        a, b: (S, T, C, C) int64 counts of the networks of S seeds on the same pixels of T tiles, rows = truth.
        groups, replicates, seed: as in `bootstrap_scores`.

    Raises:
        ValueError: the truths differ, so these are not the same tiles in the same order.
    """
    if a.shape != b.shape:
        raise ValueError(f"counts of shape {a.shape} and {b.shape} cannot be paired")
    truth = a[:1].sum(axis=-1)
    if (truth != a.sum(axis=-1)).any() or (truth != b.sum(axis=-1)).any():
        raise ValueError("the truths differ: these are not the same pixels of the same tiles in the same order")
    scores = [_draw_scores(_group(matrices, groups), replicates, seed) for matrices in (a, b)]
    return _describe(scores[1] - scores[0])


def draw_counts(n_units: int, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Draw N of N units with replacement; (R, N) int64: how often each draw has each unit."""
    return rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=replicates)


def _group(matrices: np.ndarray, groups: Sequence[Hashable] | None) -> np.ndarray:
    """Sum the tiles of each group: (S, T, C, C) -> (S, G, C, C)."""
    if groups is None:
        return matrices
    index_of = {name: index for index, name in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(matrices), len(index_of), *matrices.shape[2:]), dtype=np.int64)
    for tile, name in zip(range(matrices.shape[1]), groups, strict=True):
        sums[:, index_of[name]] += matrices[:, tile]
    return sums


def _draw_scores(matrices: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Score each draw: (S, N, C, C) counts -> (1 + R, C + 2): mIoU, accuracy, IoU of each class; first all as it is."""
    n_seeds, n_units = matrices.shape[:2]
    rng = np.random.default_rng(seed)
    if n_seeds == n_units == 1:  # nothing to draw from
        replicates = 0
    units = np.vstack([np.ones(n_units), draw_counts(n_units, replicates, rng)])
    seeds = np.vstack([np.ones(n_seeds), draw_counts(n_seeds, replicates, rng)]) / n_seeds
    sums = np.tensordot(units, matrices.astype(np.float64), axes=(1, 1))  # (1 + R, S, C, C), exact integers
    correct, truth = sums.diagonal(axis1=2, axis2=3), sums.sum(axis=3)
    iou = _ratio(correct, truth + sums.sum(axis=2) - correct, where=truth > 0)
    n_present = np.count_nonzero(truth[0, 0, BACKGROUND + 1 :])
    if n_present == 0:
        raise ValueError("no pixel of any tile is of a class from 1 up")
    mean_iou = np.nansum(iou[:, :, BACKGROUND + 1 :], axis=2, keepdims=True) / n_present
    total = truth.sum(axis=2, keepdims=True)
    accuracy = _ratio(correct.sum(axis=2, keepdims=True), total, where=total > 0)
    scores = np.concatenate([mean_iou, accuracy, iou], axis=2)
    return np.einsum("rs,rsk->rk", seeds, scores)


def _describe(scores: np.ndarray) -> Scores:
    """Turn the scores of all tiles and of R draws, (1 + R, C + 2), into intervals."""

    def interval(column: int) -> Interval:
        value, drawn = scores[0, column], scores[1:, column]
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, LEVELS) if drawn.size and np.isfinite(value) else (np.nan, np.nan)
        return Interval(float(value), float(low), float(high))

    mean_iou, overall_accuracy, *iou = map(interval, range(scores.shape[1]))
    return Scores(mean_iou, overall_accuracy, iou)


def _ratio(part: np.ndarray, total: np.ndarray, *, where: np.ndarray) -> np.ndarray:
    return np.divide(part, total, out=np.full(part.shape, np.nan), where=where)
