"""Run what was written against PyTorch, on a tile, before it counts as written."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_seg.bands import valid_pixels
from hf_seg.errors import UserError
from hf_seg.export.graph import ProbabilityGraph
from hf_seg.inference.exported import ExportMetadata

TOLERANCE = 1e-4  # of a probability
_BLOCK = 16  # side in pixels of what looks alike in a generated tile


def read_tile(path: Path, graph: ProbabilityGraph) -> Tensor:
    """Read an image as (bands, H, W) float32 raw pixels, NaN where bands with a stretch have no data.

    Raises:
        UserError: it cannot be read, or has other pixels than the networks take.
    """
    import rasterio  # slow
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning), rasterio.open(path) as file:
            raw = file.read()
    except RasterioError as error:
        raise UserError(f"{path} cannot be read as an image ({' '.join(str(error).split())})") from None
    if graph.stretch is None and raw.dtype != np.uint8:
        raise UserError(f"{path} has pixels of {raw.dtype}; the networks take images of 8 bits")
    pixels = raw.astype(np.float32)
    if graph.stretch is None:
        return torch.from_numpy(np.nan_to_num(pixels))
    return torch.from_numpy(np.where(valid_pixels(raw), pixels, np.nan))


def generate_tile(graph: ProbabilityGraph, bands: int, size: int) -> Tensor:
    """Draw blocks under noise, in the range that the networks expect; always the same.

    Returns:
        (bands, H, W) float32; with a stretch, one corner has no data.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(1, bands, -(-size // _BLOCK), -(-size // _BLOCK), generator=generator)
    pixels = torch.nn.functional.interpolate(blocks, scale_factor=_BLOCK)[0, :, :size, :size]
    pixels = pixels + 0.5 * torch.randn(pixels.shape, generator=generator)
    if graph.stretch is not None:
        low, high = (torch.tensor(values)[:, None, None] for values in graph.stretch[1:])
        pixels = (low + high) / 2 + (high - low) / 5 * pixels
        pixels[:, :4, :4] = torch.nan
        return pixels
    normalization = graph.members[0].normalization
    mean, std = (normalization.scale * torch.tensor(values)[:bands, None, None] for values in normalization[:2])
    return (mean + std * pixels).round().clamp_min(0)


def compare(
    run: Callable[[Tensor], Tensor], graph: ProbabilityGraph, tile: Tensor, metadata: ExportMetadata
) -> dict[str, float]:
    """Run both at the crop's size, for one image and for two, and at another size if sizes are dynamic.

    Args:
        run: the written file.
        graph: what it was made from.
        tile: (bands, H, W), reflected or cut to each size.

    Returns:
        Largest difference of a probability, by the shape of the input.

    Raises:
        UserError: a difference above `TOLERANCE`, or the file does not run.
    """
    crop, multiple = metadata.crop_size, metadata.size_multiple
    shapes = [(1, crop, crop), (2, crop, crop)]
    if multiple:
        step = max(multiple, 8)
        shapes.append((1, crop + step, crop + 3 * step))
    differences = {}
    for count, height, width in shapes:
        shown = _fitted(tile, height, width)
        pixels = torch.stack([shown, shown.flip(-1)][:count]).contiguous()
        name = f"{count}x{metadata.bands}x{height}x{width}"
        try:
            with torch.no_grad():
                found = run(pixels)
        except Exception as error:  # of onnxruntime or torch; each is about this file
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the exported {metadata.name} does not run at {name}: {reason}") from error
        with torch.no_grad():
            expected = graph(pixels)
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported {metadata.name} differs from PyTorch by {difference:.2g} at {name}; nothing was written"
            )
        differences[name] = difference
    return differences


def _fitted(tile: Tensor, height: int, width: int) -> Tensor:
    """Cut (bands, H, W) to a size, or reflect it beyond its right and lower border."""
    pixels = tile.numpy()[:, :height, :width]
    padding = ((0, 0), (0, height - pixels.shape[1]), (0, width - pixels.shape[2]))
    return torch.from_numpy(np.pad(pixels, padding, mode="reflect"))
