"""Label noise as automatic labelling makes it: shifted borders, small objects lost, coherent confusions.

Rates follow the published per-class agreement of OpenEarthMap-SAR's official pseudo-labels with manual ones.
"""

import cv2
import numpy as np
from scipy import ndimage

from hf_seg.synthetic.fields import fractal_noise, smooth_noise, to_uniform
from hf_seg.synthetic.parcels import BARE, BUILDING, DEVELOPED, FIELD, RANGE, ROAD, TREE, WATER

BORDER_SHIFT = 0.5  # metres, standard deviation
LOST_AREA = 30.0  # square metres: an object of this area is lost half of the time
# Share of a class's area that turns into others, as coherent segments, beyond what borders and lost objects take.
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
WIDE = 12.0  # metres, standard deviation: how far around a place its own class is looked for
SYSTEMATIC = 0.97  # 1: width alone decides what is mistaken; 0: chance alone
_MIXED_SCALE = (9.0, 28.0)  # metres: size of the confused segments


def corrupt_labels(rng: np.random.Generator, label: np.ndarray, parcel: np.ndarray, gsd: float) -> np.ndarray:
    """Return (H, W) uint8: what a network trained elsewhere would take `label` for.

    Args:
        label: (H, W) uint8 true class ids.
        parcel: (H, W) int32 lots; errors tend to take a lot as a whole.
        gsd: metres per pixel.
    """
    noisy = _lose_small_objects(rng, label, gsd)
    noisy = _confuse(rng, noisy, parcel, gsd)
    return _shift_borders(rng, noisy, gsd)


def _lose_small_objects(rng: np.random.Generator, label: np.ndarray, gsd: float) -> np.ndarray:
    """Give the pixels of objects that were overlooked to the nearest object that was not."""
    lost = np.zeros(label.shape, bool)
    for index in np.unique(label):
        objects, count = ndimage.label(label == index)
        area = np.bincount(objects.ravel(), minlength=count + 1) * gsd**2
        overlooked = rng.random(count + 1) < 1 / (1 + (area / LOST_AREA) ** 2)
        overlooked[0] = False
        lost |= overlooked[objects]
    if lost.all() or not lost.any():
        return label
    nearest = ndimage.distance_transform_edt(lost, return_distances=False, return_indices=True)
    return label[tuple(nearest)]


def _confuse(rng: np.random.Generator, label: np.ndarray, parcel: np.ndarray, gsd: float) -> np.ndarray:
    """Turn coherent segments of each class into the classes it is mistaken for.

    Mostly the wide ones, a large meadow or roof, which lack a context that tells what they are: such errors follow from
    what is seen, radar sees it too, and so a network learns them.
    """
    noisy = label.copy()
    scale = rng.uniform(*_MIXED_SCALE) / gsd
    for index, shares in CONFUSIONS.items():
        where = label == index
        count = round(sum(shares.values()) * np.count_nonzero(where))
        if not count:
            continue
        width = cv2.GaussianBlur(where.astype(np.float32), (0, 0), WIDE / gsd)
        size = np.maximum(np.bincount(parcel[where], minlength=parcel.max() + 1), 1)
        of_lot = np.bincount(parcel[where], width[where], minlength=parcel.max() + 1) / size
        width = np.where(parcel > 0, of_lot[parcel], width)  # whole lots are mistaken; streets, one lot, in pieces
        width /= max(float(width[where].std()), 1e-3)
        chance = fractal_noise(rng, label.shape, scale, 2)
        score = np.where(where, SYSTEMATIC * width + (1 - SYSTEMATIC**2) ** 0.5 * chance, -np.inf)
        mistaken = score >= np.partition(score, -count, axis=None)[-count]
        # Gumbel fields: the largest of log share + field is each class with the probability of its share
        uniforms = [to_uniform(smooth_noise(rng, label.shape, 2 * scale))[mistaken] for _ in shares]
        gumbel = -np.log(-np.log(np.clip(uniforms, 1e-6, 1 - 1e-6)))
        choice = np.argmax(np.log(list(shares.values()))[:, None] + gumbel, axis=0)
        noisy[mistaken] = np.array(list(shares), np.uint8)[choice]
    return noisy


def _shift_borders(rng: np.random.Generator, label: np.ndarray, gsd: float) -> np.ndarray:
    """Displace every border by a smooth random amount and round its corners."""
    rows, columns = np.indices(label.shape, dtype=np.float32)
    amount = np.float32(BORDER_SHIFT / gsd)
    shift = [amount * fractal_noise(rng, label.shape, 16 / gsd, 3) for _ in range(2)]
    moved = cv2.remap(label, columns + shift[0], rows + shift[1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    side = max(3, 2 * round(0.8 / gsd) + 1)
    votes = [cv2.blur((moved == index).astype(np.float32), (side, side)) for index in range(int(label.max()) + 1)]
    return np.argmax(votes, axis=0).astype(np.uint8)
