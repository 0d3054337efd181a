"""Class probabilities of a scene of any size from a network that sees one window at a time.

`sliding_window_probs` blends the windows of an image in memory; `RowBlender` those of a scene that is read, and handed
on, from top to bottom.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of windows that cover an axis of `length` pixels, `stride` pixels apart.

    The last window is shifted back to end at the border. [0] if one window is enough.

    Raises:
        ValueError: an empty axis or window, or a stride that would leave gaps.
    """
    if length < 1 or window < 1:
        raise ValueError(f"length and window must be at least 1 pixel, got length {length} and window {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be in 1..window ({window}), or pixels stay uncovered; got {stride}")
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def blend_weights(window: int) -> Tensor:
    """Weigh the pixels of a window along one axis: a raised cosine, sampled at pixel centres.

    Predictions are worst at a window's border, where they lack context. Sampled at its centres the cosine never
    reaches 0 (about (pi / 2 window)^2 at the border), so a pixel that only a border covers is still covered.

    Returns:
        (window,) float32 in (0, 1], symmetric.
    """
    centres = (torch.arange(window, dtype=torch.float64) + 0.5) / window
    return torch.sin(math.pi * centres).square().float()


@torch.no_grad()
def sliding_window_probs(
    forward: Callable[[Tensor], Tensor], image: Tensor, *, window: int, stride: int, batch_size: int = 1
) -> Tensor:
    """Average the class probabilities of overlapping windows over a whole scene.

    A scene smaller than the window is reflected at its right and lower border until it fills one, and the result is
    cut back. Windows are added up in raster order whatever the batch size.

    Args:
        forward: (B, C, window, window) -> logits (B, K, window, window), on any device; B is at most `batch_size`.
        image: (C, H, W) float. Windows are handed to `forward`, and added up, on its device.
        window, stride: size of a window and distance between windows, in pixels; the stride is 1..window.

    Returns:
        (K, H, W) float32; sums to 1 over K.

    Raises:
        ValueError: an impossible setting, or logits that are not at the window's size.
    """
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(f"image must be (C, H, W) float, got {tuple(image.shape)} {image.dtype}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    _, height, width = image.shape
    tops, lefts = window_starts(height, window, stride), window_starts(width, window, stride)
    image = _extend(image, window)
    taper = blend_weights(window).to(image.device)
    weights = torch.outer(taper, taper)

    positions = [(top, left) for top in tops for left in lefts]
    total = image.new_empty(0)
    for first in range(0, len(positions), batch_size):
        batch = positions[first : first + batch_size]
        crops = torch.stack([image[:, y : y + window, x : x + window] for y, x in batch])
        logits = forward(crops)
        if logits.ndim != 4 or logits.shape[0] != len(crops) or logits.shape[2:] != crops.shape[2:]:
            got = f"({len(crops)}, K, {window}, {window}), got {tuple(logits.shape)}"
            raise ValueError(f"forward must return logits {got}: resize them in forward")
        probs = logits.float().softmax(dim=1).to(image.device)
        if first == 0:
            total = probs.new_zeros(probs.shape[1], *image.shape[1:])
        for (y, x), window_probs in zip(batch, probs, strict=True):
            total[:, y : y + window, x : x + window] += window_probs * weights

    # The positions are a grid and the weights a product, so their sum over all windows is a product too.
    total /= _summed(taper, tops, total.shape[1])[:, None]
    total /= _summed(taper, lefts, total.shape[2])
    return total[:, :height, :width].contiguous()


class RowBlender:
    """Blend overlapping windows from the top of a scene to its bottom, in memory that does not depend on its height.

    Keeps the sums of one row of windows, K x (window + max_rows) x width float32. Every pixel adds up its windows in
    raster order wherever the work begins, so parts of a scene that are blended apart have the bits of the whole.

    Args:
        predict: (B, C, window, window) -> B probabilities (K, window, window), one after the other or in one tensor; B
            is at most `batch_size`. The bits of the result depend on the batch size only if those of `predict` do.
        read_rows: (top, bottom) -> pixels (C, bottom - top, width) of any type, and (bottom - top, width) bool, True
            where they contain data. A window without any data is not predicted.
        height, width: of the scene in pixels. One smaller than the window is reflected as in `sliding_window_probs`.
        num_labels: K.
        window, stride: size of a window and distance between windows, in pixels; the stride is 1..window.
        batch_size: windows per call of `predict`, all of one row of windows.
        first_row: where `rows` will begin.
        max_rows: the most rows that one call of `rows` may ask for.
        device: where the windows are added up.
        on_windows: called with the number of windows that were just done or found empty.
    """

    def __init__(
        self,
        predict: Callable[[Tensor], Iterable[Tensor]],
        read_rows: Callable[[int, int], tuple[Tensor, Tensor]],
        *,
        height: int,
        width: int,
        num_labels: int,
        window: int,
        stride: int,
        batch_size: int = 1,
        first_row: int = 0,
        max_rows: int = 32,
        device: torch.device | None = None,
        on_windows: Callable[[int], object] = lambda count: None,
    ) -> None:
        self.tops, self.lefts = window_starts(height, window, stride), window_starts(width, window, stride)
        self._predict, self._read_rows, self._on_windows = predict, read_rows, on_windows
        self._height, self._width, self._window, self._batch_size = height, width, window, batch_size
        taper = blend_weights(window).to(device)
        self._weights = torch.outer(taper, taper)
        self._row_sums = _summed(taper, self.tops, max(height, window))
        self._column_sums = _summed(taper, self.lefts, max(width, window))
        self._next_row = first_row
        self._next_window = next(i for i, top in enumerate(self.tops) if top + window > first_row)
        # row y of the scene lies at y % the ring's length, and is cleared when it is handed on
        self._ring = torch.zeros(num_labels, window + max_rows, max(width, window), device=device)
        self._weighted = torch.empty(num_labels, window, window, device=device)

    @torch.no_grad()
    def rows(self, bottom: int) -> Tensor:
        """Return the rows from where the last call ended to `bottom`; (K, rows, width) float32, sums to 1 over K.

        Where a pixel has no data the result has no meaning.
        """
        top = self._next_row
        last = min(self._height, top + self._ring.shape[1] - self._window)
        if not top < bottom <= last:
            raise ValueError(f"the next rows are {top} to {last} at most; asked for those up to {bottom}")
        while self._next_window < len(self.tops) and self.tops[self._next_window] < bottom:
            self._add_windows(self.tops[self._next_window])
            self._next_window += 1
        probs = self._ring.new_empty(self._ring.shape[0], bottom - top, self._width)
        for rows, ring_rows in self._ring_segments(top, bottom):
            sums = self._ring[:, ring_rows, : self._width]
            torch.div(sums, self._row_sums[rows, None], out=probs[:, rows.start - top : rows.stop - top])
            self._ring[:, ring_rows] = 0
        probs /= self._column_sums[: self._width]
        self._next_row = bottom
        return probs

    def _add_windows(self, top: int) -> None:
        pixels, has_data = self._read_rows(top, min(top + self._window, self._height))
        pixels = _extend(pixels, self._window)
        has_column = has_data.any(dim=0)
        lefts = [left for left in self.lefts if has_column[left : left + self._window].any()]
        self._on_windows(len(self.lefts) - len(lefts))
        for first in range(0, len(lefts), self._batch_size):
            batch = lefts[first : first + self._batch_size]
            crops = torch.stack([pixels[:, :, left : left + self._window] for left in batch])
            for left, probs in zip(batch, self._predict(crops), strict=True):
                self._add(probs.to(self._ring.device), top, left)
            self._on_windows(len(batch))

    def _add(self, probs: Tensor, top: int, left: int) -> None:
        # product and sum are rounded apart: a fused one may round differently where threads share the work differently
        weighted = torch.mul(probs, self._weights, out=self._weighted)
        first = max(top, self._next_row)  # rows above were handed on, or belong to the part above this one
        for rows, ring_rows in self._ring_segments(first, top + self._window):
            source = slice(rows.start - top, rows.stop - top)
            self._ring[:, ring_rows, left : left + self._window] += weighted[:, source]

    def _ring_segments(self, top: int, bottom: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows of the scene and the contiguous places that they have in the ring."""
        length = self._ring.shape[1]
        while top < bottom:
            count = min(bottom - top, length - top % length)
            yield slice(top, top + count), slice(top % length, top % length + count)
            top += count


def _extend(image: Tensor, window: int) -> Tensor:
    """Reflect (C, H, W) beyond its right and lower border to at least (C, window, window)."""
    for axis in (1, 2):
        length = image.shape[axis]
        if length < window:
            indices = np.pad(np.arange(length), (0, window - length), mode="reflect")  # torch's pad reflects only once
            image = image.index_select(axis, torch.from_numpy(indices).to(image.device))
    return image


def _summed(taper: Tensor, starts: list[int], length: int) -> Tensor:
    """Add up the weights of all windows along one axis; (length,)."""
    total = taper.new_zeros(length)
    for start in starts:
        total[start : start + len(taper)] += taper
    return total
