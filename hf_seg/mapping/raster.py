"""Map a scene of any size: GeoTIFF in, GeoTIFF out, in memory that depends on the scene's width and the window.

    summary = predict_raster("runs/ensemble", "scene.tif", "map.tif", cog=True)

The scene is mapped in bands of rows. Each finished band is saved in `.map.tif.partial/` beside the map, so a killed run
resumes where it stopped; the map appears when it is complete. Its bytes depend neither on the batch size, nor on
interruptions, nor on how the bands were shared among processes.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.inference.predict import Member, Predictor, load_members
from hf_seg.mapping.gdal import gdal_session
from hf_seg.mapping.job import MapJob
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.statistics import MapSummary


def predict_raster(
    model: str | Path | nn.Module | Sequence[Member],
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
        source: the scene: a GeoTIFF, or anything else that GDAL reads.
        destination: the GeoTIFF to write.
        window: side of the sliding window in pixels; None: the crop size of the training, if the model tells it.
        tta: test-time augmentation, see `hf_seg.inference.tta`.
        mixed_precision: "no", "bf16" or "fp16".
        device: None: an accelerator if there is one; for a network in memory, its own device.
        show_progress: draw a progress bar.
        options: fields of `RasterOptions`.

    Raises:
        UserError: a model, scene, target or option that cannot be used; the message names it and how to fix it.
    """
    chosen = RasterOptions(**options)
    if isinstance(model, EnsembleForSemanticSegmentation):
        model = [Member(model.network(i), crop, model.shares[i]) for i, crop in enumerate(model.crops)]
    members = load_members(model, window=window)
    if device is None and not isinstance(model, str | Path):
        device = next((weight.device for m in members for weight in m.network.parameters()), torch.device("cpu"))
    elif device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    predictor = Predictor(members, device=torch.device(device), views=tta, mixed_precision=mixed_precision)
    with gdal_session(), closing(MapJob(predictor, source, destination, chosen)) as job:
        job.prepare()
        job.compute(job.missing(), show_progress=show_progress)
        return job.finish()
