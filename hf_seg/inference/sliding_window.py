"""Class probabilities of a scene of any size from a network that sees one window at a time."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Place windows along one axis so that they cover it exactly.

    Args:
        length: pixels along the axis, > 0.
        window: window size in pixels.
        stride: distance between windows, 1..window; the last one is shifted back to end at the border.

    Returns:
        Ascending first pixels; [0] if one window is enough.

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
        forward: (B, C, window, window) -> logits (B, K, window, window), on any device; the last batch may be smaller.
        image: (C, H, W) float. Windows are handed to `forward`, and added up, on its device.
        window: window size in pixels.
        stride: distance between windows, 1..window.
        batch_size: windows per call of `forward`.

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
    total: Tensor | None = None
    for first in range(0, len(positions), batch_size):
        batch = positions[first : first + batch_size]
        crops = torch.stack([image[:, y : y + window, x : x + window] for y, x in batch])
        probs = _checked_logits(forward(crops), crops).float().softmax(dim=1).to(image.device)
        if total is None:
            total = probs.new_zeros(probs.shape[1], *image.shape[1:])
        for (y, x), window_probs in zip(batch, probs, strict=True):
            total[:, y : y + window, x : x + window] += window_probs * weights
    assert total is not None  # there is always one window

    # The positions are a grid and the weights a product, so their sum over all windows is a product too.
    total /= _summed(taper, tops, total.shape[1])[:, None]
    total /= _summed(taper, lefts, total.shape[2])
    return total[:, :height, :width].contiguous()


def _checked_logits(logits: Tensor, crops: Tensor) -> Tensor:
    if logits.ndim != 4 or logits.shape[0] != crops.shape[0] or logits.shape[2:] != crops.shape[2:]:
        batch, _, height, width = crops.shape
        raise ValueError(
            f"forward must return logits ({batch}, K, {height}, {width}), got {tuple(logits.shape)}: "
            "resize them in forward"
        )
    return logits


def _extend(image: Tensor, window: int) -> Tensor:
    """Reflect (C, H, W) beyond its right and lower border to at least (C, window, window)."""
    rows = _reflected_indices(image.shape[1], max(image.shape[1], window), image.device)
    columns = _reflected_indices(image.shape[2], max(image.shape[2], window), image.device)
    if len(rows) > image.shape[1]:
        image = image[:, rows]
    if len(columns) > image.shape[2]:
        image = image[:, :, columns]
    return image


def _reflected_indices(length: int, size: int, device: torch.device) -> Tensor:
    """Walk 0, 1, ..., length - 1, length - 2, ..., 0, 1, ... for `size` steps; the border pixel is not repeated."""
    period = max(2 * (length - 1), 1)
    steps = torch.arange(size, device=device) % period
    return torch.minimum(steps, period - steps) if length > 1 else steps


def _summed(taper: Tensor, starts: list[int], length: int) -> Tensor:
    """Add up the weights of all windows along one axis; (length,)."""
    total = taper.new_zeros(length)
    for start in starts:
        total[start : start + len(taper)] += taper
    return total
