"""Test-time augmentation: one network's predictions on several views of an image, averaged.

    probs = average_views(predict, image, "flips")        # predict: (C, h, w) -> (K, h, w)

A view resizes, mirrors and turns the image; its class maps are turned and resized back before they are averaged.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

ROWS, COLUMNS = -2, -1


class View(NamedTuple):
    """One way to look at an image: resize by `scale`, mirror along the axes `flip`, swap rows and columns."""

    scale: float = 1.0
    flip: tuple[int, ...] = ()
    transpose: bool = False

    def apply(self, image: Tensor) -> Tensor:
        """Show (C, H, W) through the view."""
        size = [max(1, round(self.scale * length)) for length in image.shape[-2:]]
        image = _resize(image, size).flip(self.flip)
        return image.mT.contiguous() if self.transpose else image

    def invert(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Bring (K, h, w) back to (K, height, width) of the image that was shown."""
        maps = maps.mT if self.transpose else maps
        return _resize(maps.flip(self.flip), [height, width])


_FLIPS = ((), (COLUMNS,), (ROWS,), (ROWS, COLUMNS))  # the last one is the turn by 180 degrees
_PRESETS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    "flips": tuple(View(flip=flip) for flip in _FLIPS),
    "d4": tuple(View(flip=flip, transpose=transpose) for transpose in (False, True) for flip in _FLIPS),
    "paper": tuple(View(scale, flip) for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) for flip in _FLIPS),
}
TTA_PRESETS = tuple(_PRESETS)


@torch.no_grad()
def average_views(predict: Callable[[Tensor], Tensor], image: Tensor, preset: str = "none") -> Tensor:
    """Average class probabilities over the views of a preset, one view in memory at a time.

    Args:
        predict: (C, h, w) -> (K, h, w) probabilities, for any h and w.
        image: (C, H, W) float.
        preset: "none", the image itself; "flips", with its mirror images; "d4", with quarter turns too; "paper", the
            mirror images at six scales.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: an unknown preset, or maps that are not at the size of their view.
    """
    if preset not in _PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(TTA_PRESETS)}")
    total = torch.zeros((), device=image.device)
    for view in _PRESETS[preset]:
        shown = view.apply(image)
        maps = predict(shown).float()
        if maps.shape[-2:] != shown.shape[-2:]:
            raise ValueError(f"predict must return maps of {tuple(shown.shape[-2:])} pixels, got {tuple(maps.shape)}")
        total = total + view.invert(maps, *image.shape[-2:])
    return total.div_(len(_PRESETS[preset]))


def _resize(maps: Tensor, size: list[int]) -> Tensor:
    """Resize (C, h, w) as training zooms: bilinear, without a filter against aliasing.

    A filter would show the network smoother images at small scales than any it learned from.
    """
    if list(maps.shape[-2:]) == size:
        return maps
    return interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
