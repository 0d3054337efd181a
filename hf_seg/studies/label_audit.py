"""Arithmetic of a label audit: two label sets compared with each other and, if there is one, with a truth.

A tile is counted once, into a (C, C, C) histogram of (truth, label of A, label of B) in which id 0 is "no label".
Coverage, agreement, IoU, which set is correct where A and B differ, and the bootstrap over tiles are sums of these
counts, so no tile is kept in memory. Only classes from 1 up are scored, on the pixels with a label in every compared
map.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_seg.bootstrap import REPLICATES, Interval, bootstrap_difference
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.metrics import ConfusionMatrix

CONFIDENCE_LEVELS = 256  # uint8; the last one is 1.0
QUANTILES = {"min": 0.0, "10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "max": 1.0}


def count_pixels(
    a: np.ndarray, b: np.ndarray, truth: np.ndarray | None = None, *, num_labels: int = OPEN_EARTH_MAP.num_labels
) -> np.ndarray:
    """Count the pixels of one tile by (truth, a, b): (H, W) uint8 ids, 0 = no label -> (C, C, C) uint32."""
    dtype = np.min_scalar_type(num_labels**3).type  # uint16 for 9 ids
    codes = a * dtype(num_labels) + b
    if truth is not None:
        codes += truth * dtype(num_labels**2)
    return np.bincount(codes.ravel(), minlength=num_labels**3).reshape((num_labels,) * 3).astype(np.uint32)


def count_confidence(confidence: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return (256, 2) int64: at each level of confidence, how many pixels both maps label, and on how many they agree.

    Args:
        confidence: (H, W) uint8, 255 = 1.0.
        labels, reference: (H, W) uint8 ids, 0 = no label.
    """
    both = (labels > 0) & (reference > 0)
    masks = (both, both & (labels == reference))
    return np.stack([np.bincount(confidence[mask], minlength=CONFIDENCE_LEVELS) for mask in masks], axis=1)


def calibrate(levels: np.ndarray) -> dict[str, Any] | None:
    """Compare confidence with agreement, from `count_confidence`, in deciles; equal confidences share a decile.

    Returns:
        `deciles`: least confident first, each with `low`, `high` and `mean` confidence, `share` (fraction) of the
        pixels and `agreement`; `calibration_error`: |agreement - mean confidence|, averaged over deciles weighted by
        their pixels. None without pixels.
    """
    pixels, agreeing = levels.T
    if not pixels.any():
        return None
    middle = np.cumsum(pixels) - pixels / 2
    decile_of = np.minimum(10 * middle / pixels.sum(), 9).astype(int)
    confidence = np.arange(CONFIDENCE_LEVELS) / (CONFIDENCE_LEVELS - 1)
    deciles = []
    for decile in range(10):
        found = np.flatnonzero((decile_of == decile) & (pixels > 0))
        if found.size:
            n_pixels = pixels[found].sum()
            row = {"low": confidence[found[0]], "high": confidence[found[-1]]}
            row |= {"mean": pixels[found] @ confidence[found] / n_pixels, "share": n_pixels / pixels.sum()}
            deciles.append({key: float(value) for key, value in row.items()})
            deciles[-1]["agreement"] = float(agreeing[found].sum() / n_pixels)
    error = sum(row["share"] * abs(row["agreement"] - row["mean"]) for row in deciles)
    return {"deciles": deciles, "calibration_error": error}


def summarize(
    image_ids: Sequence[str],
    counts: np.ndarray,
    regions: Sequence[str] | None,
    *,
    seed: int = 0,
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> dict[str, Any]:
    """Compute the audit from the counts of all tiles, without the calibration; every value can be written as JSON.

    Args:
        image_ids: N names.
        counts: (N, C, C, C) of `count_pixels`, with at least one pixel that A and B both label.
        regions: N names, or None if none is known.
        seed: of the bootstrap over tiles.
        label_set: names of the C classes.

    Returns:
        `n_tiles`, `coverage`, `class_share`, `agreement`, `truth` (None without one), `disagreements`,
        `tile_distribution`, `regions` (None if unknown) and `tiles`.
    """
    total = counts.sum(axis=0, dtype=np.int64)
    tiles, by_region, quantiles = _score_groups(counts), None, {}
    for name, values in tiles.items():
        if np.isfinite(values).any():
            found = np.nanquantile(values, list(QUANTILES.values())).tolist()
            quantiles[name] = dict(zip(QUANTILES, found, strict=True))
    if regions is not None:
        names, region_of = np.unique(np.asarray(regions), return_inverse=True)
        sums = np.zeros((len(names), *counts.shape[1:]), dtype=np.int64)
        np.add.at(sums, region_of, counts)
        by_region = _as_rows(names.tolist(), {"n_tiles": np.bincount(region_of), **_score_groups(sums)})
    histograms = {"a": total.sum(axis=(0, 2))[1:], "b": total.sum(axis=(0, 1))[1:], "truth": total.sum(axis=(1, 2))[1:]}
    labelled = {"a": total[:, 1:], "b": total[:, :, 1:], "both": total[:, 1:, 1:], "truth": total[1:]}
    return {
        "n_tiles": len(counts),
        "coverage": {name: float(part.sum() / total.sum()) for name, part in labelled.items()},
        "class_share": {
            name: _by_class(_ratio(pixels, pixels.sum()), label_set) for name, pixels in histograms.items()
        },
        "agreement": _agreement(total.sum(axis=0), label_set),
        "truth": _against_truth(counts, total, seed, label_set),
        "disagreements": _disagreements(total, label_set),
        "tile_distribution": quantiles,
        "regions": by_region,
        "tiles": _as_rows(image_ids, tiles),
    }


def _against_truth(counts: np.ndarray, total: np.ndarray, seed: int, label_set: LabelSet) -> dict[str, Any] | None:
    """Score A and B on the pixels that all three label, and each on all its pixels; None if all three share none."""
    same = counts[:, 1:, 1:, 1:]
    same = same[same.any(axis=(1, 2, 3))]
    if not len(same):
        return None
    truth_a, truth_b = same.sum(axis=3, dtype=np.int64), same.sum(axis=2, dtype=np.int64)
    return {
        "n_tiles": len(same),
        "compared": float(same.sum() / total[1:].sum()),
        "same_pixels": {"a": _score(truth_a.sum(axis=0), label_set), "b": _score(truth_b.sum(axis=0), label_set)},
        "own_pixels": {
            "a": _score(total[1:, 1:].sum(axis=2), label_set),
            "b": _score(total[1:, :, 1:].sum(axis=1), label_set),
        },
        "difference": _difference(truth_a, truth_b, seed, label_set),
        "bootstrap": {"replicates": REPLICATES, "seed": seed},
    }


def _difference(matrices_a: np.ndarray, matrices_b: np.ndarray, seed: int, label_set: LabelSet) -> dict[str, Any]:
    """Return the scores of B minus those of A over all tiles, with 95 % intervals from tiles drawn with replacement.

    Args:
        matrices_a, matrices_b: (N, C - 1, C - 1) counts of the classes from 1 up on the same pixels, rows = truth.
        seed: of the draws.

    Returns:
        `mean_iou`, `overall_accuracy` and, by class, `iou`: each `{difference, low, high}`; None for a class that is
        not in the truth; `low` and `high` are None for a single tile.
    """
    a, b = (np.pad(matrices, ((0, 0), (1, 0), (1, 0))) for matrices in (matrices_a, matrices_b))
    found = bootstrap_difference(a, b, seed=seed)

    def describe(interval: Interval) -> dict[str, float | None] | None:
        value, low, high = map(_number, map(np.float64, interval))
        return None if value is None else {"difference": value, "low": low, "high": high}

    per_class = dict(zip(label_set.names[1:], map(describe, found.iou[1:]), strict=True))
    return {**{key: describe(getattr(found, key)) for key in ("mean_iou", "overall_accuracy")}, "iou": per_class}


def _score(matrix: np.ndarray, label_set: LabelSet) -> dict[str, Any]:
    """Score (C - 1, C - 1) counts, rows = truth, with `ConfusionMatrix`, and add the recall of each class."""
    confusion = ConfusionMatrix(label_set)
    confusion.matrix[1:, 1:] = matrix
    return {**confusion.compute(), "recall": _by_class(_ratio(matrix.diagonal(), matrix.sum(axis=1)), label_set)}


def _agreement(pairs: np.ndarray, label_set: LabelSet) -> dict[str, Any]:
    """Compare A with B from (C, C) counts, rows = A; a class that A or B has is scored, as neither is the truth."""
    matrix = pairs[1:, 1:]
    in_a, in_b, in_both = matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal()
    iou = _ratio(in_both, in_a + in_b - in_both)
    return {
        "overall": float(in_both.sum() / matrix.sum()),
        "mean_iou": float(np.nanmean(iou)),
        "iou": _by_class(iou, label_set),
        "share_of_a": _by_class(_ratio(in_both, in_a), label_set),
        "share_of_b": _by_class(_ratio(in_both, in_b), label_set),
        "transition": pairs.tolist(),
    }


def _disagreements(total: np.ndarray, label_set: LabelSet, most: int = 10) -> dict[str, Any]:
    """List the most frequent pairs (class of A, class of B) that differ, and how often each set is correct."""
    differing = total.copy()
    same = range(label_set.num_labels)
    differing[:, same, same] = 0
    differing[:, 0, :] = differing[:, :, 0] = 0
    pairs, compared = differing.sum(axis=0), total[:, 1:, 1:].sum()

    def describe(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
        with_truth = differing[1:, a, b].sum()
        found = {"a_right": differing[a, a, b].sum(), "b_right": differing[b, a, b].sum()}
        correct = {key: float(value / with_truth) if with_truth else None for key, value in found.items()}
        return {"share": float(pairs[a, b].sum() / compared), **correct}

    order = np.argsort(-pairs, axis=None, kind="stable")[:most]
    largest = [(a, b) for a, b in zip(*np.unravel_index(order, pairs.shape), strict=True) if pairs[a, b]]
    rows = [
        {"a": label_set.names[a], "b": label_set.names[b], **describe(np.array([a]), np.array([b]))} for a, b in largest
    ]
    return {"all": describe(*np.indices(pairs.shape).reshape(2, -1)), "largest": rows}


def _score_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Score each of (G, C, C, C) counts: arrays (G,), NaN where nothing can be compared."""
    counts = counts.astype(np.int64)
    pairs, same = counts[:, :, 1:, 1:].sum(axis=1), counts[:, 1:, 1:, 1:]
    both, equal = pairs.sum(axis=(1, 2)), pairs.diagonal(axis1=1, axis2=2).sum(axis=1)
    scores = {"agreement": _ratio(equal, both), "disagreement": _ratio(both - equal, counts.sum(axis=(1, 2, 3)))}
    for name, axis in (("mean_iou_a", 3), ("mean_iou_b", 2)):
        iou = _iou(same.sum(axis=axis))
        scores[name] = _ratio(np.nansum(iou, axis=1), np.isfinite(iou).sum(axis=1))
    return {**scores, "mean_iou_difference": scores["mean_iou_b"] - scores["mean_iou_a"]}


def _iou(matrices: np.ndarray) -> np.ndarray:
    """(..., C, C) counts, rows = truth -> (..., C); NaN for a class that is not in the truth."""
    overlap, truth = matrices.diagonal(axis1=-2, axis2=-1), matrices.sum(axis=-1)
    return np.where(truth > 0, _ratio(overlap, truth + matrices.sum(axis=-2) - overlap), np.nan)


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Divide; NaN where the total is 0."""
    return np.divide(part, total, out=np.full(part.shape, np.nan), where=total > 0)


def _by_class(values: np.ndarray, label_set: LabelSet) -> dict[str, float | None]:
    return dict(zip(label_set.names[1:], map(_number, values), strict=True))


def _as_rows(names: Sequence[str], columns: dict[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    return {name: {key: _number(values[row]) for key, values in columns.items()} for row, name in enumerate(names)}


def _number(value: Any) -> float | None:
    return value.item() if np.isfinite(value) else None
