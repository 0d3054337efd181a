"""Joint image and label transforms (albumentations): uint8 in, uint8 out, then one step to the network's input.

Every transform draws from albumentations' own generators, so `transform.set_random_seed(seed)` before a sample makes
that sample's augmentation a pure function of the seed.
"""

import os
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer release

import albumentations as A
import cv2
import numpy as np

from hf_seg.errors import UserError
from hf_seg.labels import IGNORE_INDEX


class RandomScaledCrop(A.DualTransform):
    """Zoom by a random factor and crop a square; pixels outside the image are black and ignored.

    The window of `crop_size / scale` pixels is cropped first and then resized, which equals resizing the whole image
    by `scale` and cropping `crop_size` pixels, at a fraction of the cost. Image bilinear, label nearest.

    A crop is redrawn, ten times at most, if its `mask` has no labelled pixel or too much of one class. Masks passed as
    `masks` are cropped alike, but do not cause a redraw.

    Args:
        crop_size: side of the result in pixels.
        scale_range: the zoom is uniform in it.
        max_class_share: largest share of the labelled pixels that one class may cover.
    """

    def __init__(
        self, crop_size: int, scale_range: tuple[float, float] = (0.5, 2.0), max_class_share: float = 1.0, p: float = 1
    ) -> None:
        super().__init__(p=p)
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.max_class_share = max_class_share

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window's side and its upper left corner, which may lie outside the image."""
        height, width = params["shape"][:2]
        side = max(1, round(self.crop_size / self.py_random.uniform(*self.scale_range)))
        for _ in range(10):
            # where the window is larger than the image, the image lies anywhere in the window
            top = self.py_random.randint(min(0, height - side), max(0, height - side))
            left = self.py_random.randint(min(0, width - side), max(0, width - side))
            if "mask" not in data:
                break
            window = data["mask"][max(top, 0) : top + side, max(left, 0) : left + side]
            counts = cv2.calcHist([window], [0], None, [IGNORE_INDEX], [0, IGNORE_INDEX])
            if 0 < counts.max() <= self.max_class_share * counts.sum():
                break
        return {"top": top, "left": left, "side": side}

    def apply(self, img: np.ndarray, top: int, left: int, side: int, **params: Any) -> np.ndarray:
        return self._cut(img, top, left, side, cv2.INTER_LINEAR, 0)

    def apply_to_mask(self, mask: np.ndarray, top: int, left: int, side: int, **params: Any) -> np.ndarray:
        # plain INTER_NEAREST would shift the label by half a pixel against the bilinear image
        return self._cut(mask, top, left, side, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)

    def _cut(self, array: np.ndarray, top: int, left: int, side: int, interpolation: int, fill: int) -> np.ndarray:
        window = array[max(top, 0) : top + side, max(left, 0) : left + side]
        zoom = self.crop_size / side
        y, x = round(max(-top, 0) * zoom), round(max(-left, 0) * zoom)
        height = min(max(1, round(window.shape[0] * zoom)), self.crop_size - y)
        width = min(max(1, round(window.shape[1] * zoom)), self.crop_size - x)
        resized = cv2.resize(window, (width, height), interpolation=interpolation)
        canvas = np.full((self.crop_size, self.crop_size, *array.shape[2:]), fill, dtype=array.dtype)
        canvas[y : y + height, x : x + width] = resized.reshape(height, width, *array.shape[2:])
        return canvas


DOWNSAMPLING = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}


def align_resolution(image: np.ndarray, ratio: float, resampling: str = "bilinear") -> np.ndarray:
    """Lower the resolution of (H, W, ...) uint8 and keep its size: down by `ratio`, and bilinear up.

    Args:
        resampling: how to downsample. "bilinear" is the paper (eq. 1, 2); it interpolates between neighbouring pixels,
            whatever the ratio, so fine texture turns into noise. "area" averages, as a coarse sensor does.

    Raises:
        UserError: `resampling` is neither.
    """
    if resampling not in DOWNSAMPLING:
        raise UserError(f"unknown resampling {resampling!r}; choose one of {', '.join(DOWNSAMPLING)}")
    height, width = image.shape[:2]
    small = (max(1, round(ratio * width)), max(1, round(ratio * height)))
    coarse = cv2.resize(image, small, interpolation=DOWNSAMPLING[resampling])
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).reshape(image.shape)


class ResolutionAlignment(A.DualTransform):
    """Resolution alignment augmentation: blur the source domain to the resolution of the target (eq. 1, 2).

    Size stays; without `max_upscale` the labels do too.

    Args:
        scale_range: the ratio of the downsampling is uniform in it.
        max_upscale: then zoom by U(1, max_upscale), image bilinear and label nearest, and cut back to size at a
            random place, as the authors' release does with 3.
        resampling: of `align_resolution`.
    """

    def __init__(
        self,
        scale_range: tuple[float, float] = (0.1, 0.35),
        max_upscale: float = 1.0,
        resampling: str = "bilinear",
        p: float = 0.2,
    ) -> None:
        super().__init__(p=p)
        self.scale_range = scale_range
        self.max_upscale = max_upscale
        self.resampling = resampling

    def get_params(self) -> dict[str, Any]:
        zoom = self.py_random.uniform(1, self.max_upscale) if self.max_upscale > 1 else 1.0
        place = (self.py_random.random(), self.py_random.random())
        return {"ratio": self.py_random.uniform(*self.scale_range), "zoom": zoom, "place": place}

    def apply(self, img: np.ndarray, ratio: float, zoom: float, place: tuple[float, float], **_: Any) -> np.ndarray:
        return self._zoom(align_resolution(img, ratio, self.resampling), zoom, place, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, zoom: float, place: tuple[float, float], **_: Any) -> np.ndarray:
        return self._zoom(mask, zoom, place, cv2.INTER_NEAREST_EXACT)

    def _zoom(self, array: np.ndarray, zoom: float, place: tuple[float, float], interpolation: int) -> np.ndarray:
        if zoom == 1:
            return array
        height, width = array.shape[:2]
        sides = [max(1, round(side / zoom)) for side in (height, width)]
        top, left = (round(at * (whole - side)) for at, whole, side in zip(place, (height, width), sides, strict=True))
        window = array[top : top + sides[0], left : left + sides[1]]
        return cv2.resize(window, (width, height), interpolation=interpolation).reshape(array.shape)


class SARJitter(A.ImageOnlyTransform):
    """Gain and gamma of a SAR amplitude image, as scenes differ by calibration and incidence angle.

    All bands of an image change alike. Exact zeros are nodata and stay zero; no other pixel becomes zero.

    Args:
        gain: the amplitude is multiplied by exp(U(-gain, gain)).
        gamma: the amplitude's exponent is exp(U(-gamma, gamma)), about mid-grey.
    """

    def __init__(self, gain: float = 0.2, gamma: float = 0.2, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.gain = gain
        self.gamma = gamma

    def get_params(self) -> dict[str, Any]:
        gain = self.py_random.uniform(-self.gain, self.gain)
        return {"gain": np.exp(gain), "gamma": np.exp(self.py_random.uniform(-self.gamma, self.gamma))}

    def apply(self, img: np.ndarray, gain: float, gamma: float, **params: Any) -> np.ndarray:
        levels = gain * 128 * (np.arange(256) / 128) ** gamma
        table = np.clip(np.rint(levels), 1, 255).astype(np.uint8)
        table[0] = 0
        return cv2.LUT(img, table)


class SARSpeckle(A.ImageOnlyTransform):
    """Multiplicative speckle of unit mean: the amplitude times the root of a Gamma(L, 1 / L) intensity.

    Exact zeros are nodata and stay zero; no other pixel becomes zero.

    Args:
        looks: the number of looks L is uniform in this range; fewer looks, more speckle.
    """

    def __init__(self, looks: tuple[float, float] = (8.0, 32.0), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.looks = looks

    def get_params(self) -> dict[str, Any]:
        return {"n_looks": self.py_random.uniform(*self.looks)}

    def apply(self, img: np.ndarray, n_looks: float, **params: Any) -> np.ndarray:
        intensity = self.random_generator.standard_gamma(n_looks, img.shape[:2], dtype=np.float32) / n_looks
        factor = np.sqrt(intensity) / (1 - 1 / (8 * n_looks))  # the mean of the root is 1 - 1 / (8 L) + O(L^-2)
        noisy = img * factor.reshape(factor.shape + (1,) * (img.ndim - 2))
        return np.where(img == 0, 0, np.clip(np.rint(noisy), 1, 255)).astype(np.uint8)


def sar_transform(
    crop_size: int,
    *,
    scale_range: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 1.0,
    jitter_prob: float = 0.5,
    jitter_gain: float = 0.2,
    speckle_prob: float = 0.0,
) -> A.Compose:
    """Augment SAR for training: scaled crop, the eight flips and rotations, gain and gamma, speckle.

    Flips and rotations move the look direction, so the network learns layover and shadow from every side.
    """
    radiometry = [SARJitter(jitter_gain, p=jitter_prob), SARSpeckle(p=speckle_prob)]
    return A.Compose([RandomScaledCrop(crop_size, scale_range, max_class_share), A.D4(p=1), *radiometry])


def optical_transform(
    crop_size: int,
    *,
    scale_range: tuple[float, float] = (0.5, 2.0),
    max_class_share: float = 1.0,
    resolution_alignment: ResolutionAlignment | None = None,
    jitter_prob: float = 0.5,
    is_rgb: bool = True,
) -> A.Compose:
    """Augment optical images for training: scaled crop, the eight flips and rotations, colour jitter.

    Contrast, saturation and hue vary as in the authors' release; its brightness is additive, +- 32 of 255, where this
    one is a factor.

    Args:
        resolution_alignment: comes before the jitter; for the source domain only.
        is_rgb: other bands have no saturation and hue: they get brightness and contrast of the same ranges.
    """
    transforms = [RandomScaledCrop(crop_size, scale_range, max_class_share), A.D4(p=1)]
    if resolution_alignment is not None:
        transforms.append(resolution_alignment)
    hue = 18 / 180  # as a share of the circle; the release counts it in OpenCV's 180 steps
    if not is_rgb:
        jitter = A.RandomBrightnessContrast(0.2, 0.5, brightness_by_max=False, p=jitter_prob)
        return A.Compose([*transforms, jitter])
    jitter = A.ColorJitter((0.8, 1.2), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-hue, hue), p=jitter_prob)
    return A.Compose([*transforms, jitter])
