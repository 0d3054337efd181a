"""Several opinions on one image: those of one network on several views of it, and those of several networks.

    probs = average_views(predict, image, "flips")        # predict: (C, h, w) -> (K, h, w)

A view resizes, mirrors and turns the image; its class maps are turned and resized back before they are averaged.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hf_seg.labels import BACKGROUND

ROWS, COLUMNS = -2, -1


class View(NamedTuple):
    """One way to look at an image: resize by `scale`, mirror along the axes `flip`, swap rows and columns."""

    scale: float = 1.0
    flip: tuple[int, ...] = ()
    transpose: bool = False

    def apply(self, image: Tensor) -> Tensor:
        """Show (C, H, W) through the view."""
        size = [max(1, round(self.scale * length)) for length in image.shape[-2:]]
        image = _resize(image, size)
        image = image.flip(self.flip) if self.flip else image
        return image.mT.contiguous() if self.transpose else image

    def invert(self, maps: Tensor, height: int, width: int) -> Tensor:
        """Bring (K, h, w) back to (K, height, width) of the image that was shown."""
        maps = maps.mT if self.transpose else maps
        return _resize(maps.flip(self.flip) if self.flip else maps, [height, width])


_FLIPS = ((), (COLUMNS,), (ROWS,), (ROWS, COLUMNS))  # the last one is the turn by 180 degrees
_PRESETS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    "flips": tuple(View(flip=flip) for flip in _FLIPS),
    "d4": tuple(View(flip=flip, transpose=transpose) for transpose in (False, True) for flip in _FLIPS),
    "paper": tuple(View(scale, flip) for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) for flip in _FLIPS),
}
VIEW_PRESETS = tuple(_PRESETS)


@torch.no_grad()
def average_views(predict: Callable[[Tensor], Tensor], image: Tensor, preset: str = "none") -> Tensor:
    """Average class probabilities over the views of a preset, one view in memory at a time.

    Args:
        predict: (C, h, w) -> (K, h, w) probabilities, for any h and w.
        image: (C, H, W) float.
        preset: one of `VIEW_PRESETS`: the image itself; with its mirror images; with quarter turns too; or the
            mirror images at six scales.

    Returns:
        (K, H, W) float32.

    Raises:
        ValueError: an unknown preset, or maps that are not at the size of their view.
    """
    if preset not in _PRESETS:
        raise ValueError(f"unknown views {preset!r}; choose one of {', '.join(VIEW_PRESETS)}")
    total: Tensor | None = None
    for view in _PRESETS[preset]:
        shown = view.apply(image)
        maps = predict(shown).float()
        if maps.shape[-2:] != shown.shape[-2:]:
            raise ValueError(f"predict must return maps of {tuple(shown.shape[-2:])} pixels, got {tuple(maps.shape)}")
        maps = view.invert(maps, *image.shape[-2:])
        if total is None:
            total = torch.zeros_like(maps)
        total += maps
    assert total is not None  # every preset has a view
    return total.div_(len(_PRESETS[preset]))


class Decision(NamedTuple):
    """What several networks make of one image; (H, W) each."""

    choice: Tensor  # uint8, the class of the largest mean probability
    confidence: Tensor  # float32, that probability
    disagreement: Tensor  # bool, True where not all networks alone choose one class


class Votes:
    """Averages the class probabilities that several networks give to one image, and sees where they disagree.

    There is one running sum, on the CPU, whatever the number of networks. Background never wins.
    """

    def __init__(self) -> None:
        self._sum = self._first_choice = self._disagreement = torch.empty(0)
        self._count = 0

    def add(self, probs: Tensor) -> None:
        """Take the (K, H, W) probabilities of one more network."""
        probs = probs[BACKGROUND + 1 :].cpu()
        choice = probs.argmax(0)
        if self._count == 0:
            self._sum, self._first_choice = torch.zeros_like(probs, dtype=torch.float32), choice
            self._disagreement = torch.zeros_like(choice, dtype=torch.bool)
        self._sum += probs
        self._disagreement |= choice != self._first_choice
        self._count += 1

    def decide(self) -> Decision:
        """Choose by the mean of the networks taken so far, at least one."""
        largest, choice = self._sum.max(0)
        choice = (choice + BACKGROUND + 1).to(torch.uint8)
        return Decision(choice, largest / self._count, self._disagreement)


def _resize(maps: Tensor, size: list[int]) -> Tensor:
    """Resize (C, h, w) as training zooms: bilinear, without a filter against aliasing.

    A filter would show the network smoother images at small scales than any it learned from.
    """
    if list(maps.shape[-2:]) == size:
        return maps
    return interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
