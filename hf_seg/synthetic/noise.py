"""Simulated noisy labels: shifted borders, missed small objects, and whole segments of a wrong class.

Rates follow the published per-class agreement of the pseudo-labels of OpenEarthMap-SAR with manual labels.
"""

import cv2
import numpy as np
from scipy import ndimage

from hf_seg.synthetic.fields import fractal_noise, smooth_noise, to_uniform
from hf_seg.synthetic.parcels import BARE, BUILDING, DEVELOPED, FIELD, RANGE, ROAD, TREE, WATER

BORDER_SHIFT = 0.5  # metres, standard deviation
MISSED_AREA = 30.0  # square metres; an object of this area is missed with probability 0.5
# {class: {wrong class: fraction of the area}} in whole segments, in addition to borders and missed objects.
CONFUSIONS: dict[int, dict[int, float]] = {
    BARE: {RANGE: 0.52, DEVELOPED: 0.37},
    RANGE: {BARE: 0.1, FIELD: 0.05, DEVELOPED: 0.05, TREE: 0.02, WATER: 0.012},
    DEVELOPED: {RANGE: 0.15, BARE: 0.075, BUILDING: 0.04, ROAD: 0.02, WATER: 0.01},
    ROAD: {DEVELOPED: 0.2, RANGE: 0.04, BARE: 0.01},
    TREE: {RANGE: 0.21, FIELD: 0.01},
    WATER: {RANGE: 0.025, BARE: 0.02, DEVELOPED: 0.01},
    FIELD: {RANGE: 0.25, BARE: 0.08, TREE: 0.01},
    BUILDING: {DEVELOPED: 0.07, RANGE: 0.01},
}
WIDE = 12.0  # metres, standard deviation of the window in which the width of an area is measured
SYSTEMATIC = 0.97  # weight of the width of an area in where the errors are; 0: they are by chance only
MOST_WRONG = 0.9  # of a class's area, whatever the amount of noise
_MIXED_SCALE = (9.0, 28.0)  # metres, size of the confused segments


def corrupt_labels(
    rng: np.random.Generator,
    label: np.ndarray,
    parcel: np.ndarray,
    gsd: float,
    *,
    amount: float = 1.0,
    systematic: float = SYSTEMATIC,
) -> np.ndarray:
    """Return (H, W) uint8: `label` with the simulated errors of a network trained on other data.

    Args:
        label: (H, W) uint8 true class ids.
        parcel: (H, W) int32 ids of lots, 0 on streets; errors tend to cover whole lots.
        gsd: metres per pixel.
        amount: of errors, 1 = as published; 0 returns the label as it is.
        systematic: how far what is visible determines where segments are wrong, 0..1.
    """
    if amount == 0:
        return label.copy()
    noisy = _miss_small_objects(rng, label, gsd, MISSED_AREA * amount)
    noisy = _confuse(rng, noisy, parcel, gsd, amount, systematic)
    return _shift_borders(rng, noisy, gsd, BORDER_SHIFT * amount)


def _miss_small_objects(rng: np.random.Generator, label: np.ndarray, gsd: float, missed_area: float) -> np.ndarray:
    """Replace the pixels of missed objects by the nearest object that is not missed."""
    missed = np.zeros(label.shape, bool)
    for index in np.unique(label):
        objects, count = ndimage.label(label == index)
        area = np.bincount(objects.ravel(), minlength=count + 1) * gsd**2
        is_missed = rng.random(count + 1) < 1 / (1 + (area / missed_area) ** 2)
        is_missed[0] = False
        missed |= is_missed[objects]
    if missed.all() or not missed.any():
        return label
    nearest = ndimage.distance_transform_edt(missed, return_distances=False, return_indices=True)
    return label[tuple(nearest)]


def _confuse(
    rng: np.random.Generator, label: np.ndarray, parcel: np.ndarray, gsd: float, amount: float, systematic: float
) -> np.ndarray:
    """Change coherent segments of each class into the classes that it is confused with.

    Mostly wide areas change, e.g. a large meadow or roof, as they lack context. Such errors depend on what is visible,
    also in SAR, so a network learns them.
    """
    noisy = label.copy()
    scale = rng.uniform(*_MIXED_SCALE) / gsd
    for index, fractions in CONFUSIONS.items():
        where = label == index
        count = round(min(amount * sum(fractions.values()), MOST_WRONG) * np.count_nonzero(where))
        if not count:
            continue
        width = cv2.GaussianBlur(where.astype(np.float32), (0, 0), WIDE / gsd)
        size = np.maximum(np.bincount(parcel[where], minlength=parcel.max() + 1), 1)
        of_lot = np.bincount(parcel[where], width[where], minlength=parcel.max() + 1) / size
        width = np.where(parcel > 0, of_lot[parcel], width)  # lots change as a whole, streets in pieces
        width /= max(float(width[where].std()), 1e-3)
        chance = fractal_noise(rng, label.shape, scale, 2)
        score = np.where(where, systematic * width + (1 - systematic**2) ** 0.5 * chance, -np.inf)
        wrong = score >= np.partition(score, -count, axis=None)[-count]
        # Gumbel-max: the largest of log fraction + Gumbel field draws each class with the probability of its fraction
        uniforms = [to_uniform(smooth_noise(rng, label.shape, 2 * scale))[wrong] for _ in fractions]
        gumbel = -np.log(-np.log(np.clip(uniforms, 1e-6, 1 - 1e-6)))
        drawn = np.argmax(np.log(list(fractions.values()))[:, None] + gumbel, axis=0)
        noisy[wrong] = np.array(list(fractions), np.uint8)[drawn]
    return noisy


def _shift_borders(rng: np.random.Generator, label: np.ndarray, gsd: float, shift_by: float) -> np.ndarray:
    """Move every border by a smooth random amount and round its corners."""
    rows, columns = np.indices(label.shape, dtype=np.float32)
    amount = np.float32(shift_by / gsd)
    shift = [amount * fractal_noise(rng, label.shape, 16 / gsd, 3) for _ in range(2)]
    moved = cv2.remap(label, columns + shift[0], rows + shift[1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    side = max(3, 2 * round(0.8 / gsd) + 1)
    frequencies = [cv2.blur((moved == index).astype(np.float32), (side, side)) for index in range(int(label.max()) + 1)]
    return np.argmax(frequencies, axis=0).astype(np.uint8)
