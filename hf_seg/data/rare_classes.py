"""Rare-class sampling: draw a class, rare ones more often, then a tile that contains it (DAFormer, Hoyer et al. 2022).

pixels = class_pixels(images)
stream = AugmentedStream(images, transform, seed, sampling=RareClassSampling(pixels, temperature=0.1))
"""

import numpy as np
from tqdm import tqdm

from hf_seg.data.samples import LabelledImages
from hf_seg.errors import DatasetError
from hf_seg.labels import IGNORE_INDEX


def class_pixels(images: LabelledImages, *, progress: bool = True) -> np.ndarray:
    """Count the pixels of each class in each image.

    Args:
        images: all of them are read once; `images.cache` before makes this fast.
        progress: show a progress bar.

    Returns:
        (N, C) int64.

    Raises:
        DatasetError: an image cannot be read.
    """
    num_labels = images.label_set.num_labels
    counts = np.zeros((len(images), num_labels), np.int64)
    for index in tqdm(range(len(images)), desc="count classes", unit="tile", leave=False, disable=not progress):
        label = images[index].label
        counts[index] = np.bincount(label[label != IGNORE_INDEX], minlength=num_labels)
    return counts


class RareClassSampling:
    """Which image is at a position of the training stream: a pure function of (seed, position).

    A class c with the frequency f_c among all labelled pixels is drawn with P(c) ~ exp((1 - f_c) / temperature)
    (Hoyer et al. 2022, eq. 8 and 9), then one of the images that contain enough of it, uniformly. There are no epochs:
    an image may come twice before another comes once. The crop is drawn without regard to the class.

    Args:
        pixels: (N, C) pixels of each class in each image, of `class_pixels`.
        temperature: the smaller, the more the rarest class dominates. DAFormer has 0.01, for the 19 classes of
            Cityscapes; where frequencies differ by tenths, 0.01 draws hardly any class but the rarest.
        min_fraction: an image contains enough of a class if this fraction of its labelled pixels is of it. DAFormer's
            3000 pixels are 0.0014 of an image of Cityscapes.

    Raises:
        ValueError: `temperature` is not positive.
        DatasetError: no image contains enough of any class.
    """

    def __init__(self, pixels: np.ndarray, temperature: float, *, min_fraction: float = 0.0014) -> None:
        if not temperature > 0:
            raise ValueError(f"the temperature of rare-class sampling must be > 0; it is {temperature}")
        labelled = pixels.sum(axis=1, keepdims=True)
        contains = (pixels > 0) & (pixels >= min_fraction * labelled)
        drawable = contains.any(axis=0)
        if not drawable.any():
            raise DatasetError(
                f"rare-class sampling: none of the {len(pixels)} images has a class on {min_fraction:g} of its pixels"
            )
        frequency = pixels.sum(axis=0) / labelled.sum()
        exponents = np.where(drawable, (1 - frequency) / temperature, -np.inf)
        weights = np.exp(exponents - exponents.max())
        self.probabilities = weights / weights.sum()
        self.images_of = [np.flatnonzero(column) for column in contains.T]

    def index_at(self, seed: int, position: int) -> int:
        """Return which image is at a position of the stream."""
        # Another random stream than that of `seed_at`, which augments the image at this position.
        rng = np.random.default_rng(np.random.SeedSequence([seed, position], spawn_key=(1,)))
        images = self.images_of[rng.choice(len(self.probabilities), p=self.probabilities)]
        return int(images[rng.integers(len(images))])
