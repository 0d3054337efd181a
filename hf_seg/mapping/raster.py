"""Map a scene of any size: GeoTIFF in, GeoTIFF out, in memory that depends on the scene's width and the window.

    summary = predict_raster("runs/ensemble", "scene.tif", "map.tif", cog=True)

The scene is worked off in bands of rows. Each finished band is kept in `.map.tif.partial/` beside the target, so a
killed run goes on where it stopped; the map appears when it is whole. Its bytes depend neither on the batch size nor
on how often the work was interrupted or how it was shared.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import rasterio
import torch
from torch import nn

from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.inference.predict import Member, Predictor, load_members
from hf_seg.mapping.job import MapJob, MapSummary
from hf_seg.mapping.options import RasterOptions

GDAL_CACHE = 128  # MiB; by default GDAL takes a share of the machine's memory


def predict_raster(
    model: str | Path | nn.Module | Sequence[Member],
    source: str | Path,
    destination: str | Path,
    *,
    window: int | None = None,
    views: str = "none",
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
    if isinstance(model, EnsembleForSemanticSegmentation):
        model = [Member(model.network(i), crop, model.shares[i]) for i, crop in enumerate(model.crops)]
    members = load_members(model, window=window)
    if device is None and not isinstance(model, str | Path):
        device = next((weight.device for m in members for weight in m.network.parameters()), torch.device("cpu"))
    elif device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    predictor = Predictor(members, device=torch.device(device), views=views, mixed_precision=mixed_precision)
    return map_scene(predictor, source, destination, chosen, show_progress=show_progress)


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
