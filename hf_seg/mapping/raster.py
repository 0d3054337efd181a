"""Map a scene of any size: GeoTIFF in, GeoTIFF out, in memory that depends on the scene's width and the window.

    summary = predict_raster("runs/ensemble", "scene.tif", "map.tif", cog=True)

The scene is worked off in bands of rows. Each finished band is kept in `.map.tif.partial/` beside the target, so a
killed run goes on where it stopped; the map appears when it is whole. Its bytes depend neither on the batch size nor
on how often the work was interrupted or how it was shared.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import rasterio
import torch
from torch import nn

from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.inference.load import LoadedNetwork, load_networks, use_network
from hf_seg.inference.predict import Predictor
from hf_seg.mapping.job import MapJob, MapSummary
from hf_seg.mapping.options import RasterOptions

GDAL_CACHE = 128  # MiB; by default GDAL takes a share of the machine's memory


def predict_raster(
    model: str | Path | nn.Module | Sequence[LoadedNetwork],
    source: str | Path,
    destination: str | Path,
    *,
    window: int | None = None,
    tta: str = "none",
    mixed_precision: str = "no",
    device: str | torch.device | None = None,
    show_progress: bool = True,
    **options: Any,
) -> MapSummary:
    """Map one scene.

    Args:
        model: folder or Hub id of a trained network or ensemble; or a network in memory that maps (B, 3, h, w) to
            logits of the nine classes, which is put into eval mode.
        source: the scene: a GeoTIFF, or whatever else GDAL reads.
        destination: the GeoTIFF to write.
        window: side of the sliding window in pixels; None: the crop of the training, where the model tells it.
        views: test-time augmentation, see `hf_seg.inference.tta`.
        mixed_precision: "no", "bf16" or "fp16".
        device: None: an accelerator if there is one; for a network in memory, where it is.
        show_progress: draw a progress bar.
        options: fields of `RasterOptions`.

    Raises:
        UserError: a model, scene, target or option that cannot be; the message names it and the way out.
    """
    chosen = RasterOptions(**options)
    networks = find_networks(model, window=window)
    if device is None and not isinstance(model, str | Path):
        weights = (weight for each in networks if each.module is not None for weight in each.module.parameters())
        device = next((weight.device for weight in weights), torch.device("cpu"))
    elif device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    predictor = Predictor(networks, device=torch.device(device), tta=tta, mixed_precision=mixed_precision)
    return map_scene(predictor, source, destination, chosen, show_progress=show_progress)


def find_networks(
    model: str | Path | nn.Module | Sequence[LoadedNetwork], *, window: int | None = None
) -> list[LoadedNetwork]:
    """Return the networks that a model consists of, in memory.

    Args:
        model: see `predict_raster`.
        window: replaces the crop that the networks were trained at.

    Raises:
        UserError: see `load_networks` and `use_network`; or a window of no pixel.
    """
    if window is not None and window < 1:
        raise UserError(f"window must be at least 1 pixel; it is {window}")
    if isinstance(model, EnsembleForSemanticSegmentation):
        networks = list(model.members)
    elif isinstance(model, nn.Module):
        networks = [use_network(model, crop_size=window)]
    elif isinstance(model, str | Path):
        networks = load_networks(model)
    else:
        networks = list(model)
    # those of a low-memory ensemble are needed window by window
    return [replace(each, crop_size=window or each.crop_size, module=each.network()) for each in networks]


def map_scene(
    predictor: Predictor,
    source: str | Path,
    destination: str | Path,
    options: RasterOptions,
    *,
    show_progress: bool = True,
) -> MapSummary:
    """Map one scene in this process; see `predict_raster`."""
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE), closing(MapJob(predictor, source, destination, options)) as job:
        job.prepare()
        job.compute(job.missing(), show_progress=show_progress)
        return job.finish()
