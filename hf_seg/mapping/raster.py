"""Map a scene of any size: GeoTIFF in, GeoTIFF out, in memory that depends on the scene's width and the window.

    summary = predict_raster("runs/ensemble", "scene.tif", "map.tif", cog=True)

The scene is mapped in bands of rows. Each finished band is saved in `.map.tif.partial/` beside the map, so a killed run
resumes where it stopped; the map appears when it is complete. Its bytes depend neither on the batch size, nor on
interruptions, nor on how the bands were shared among processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_seg.inference.load import LoadedNetwork, load_networks, use_network
from hf_seg.inference.predict import Predictor
from hf_seg.mapping.job import OnProgress, map_scene
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.statistics import MapSummary


def predict_raster(
    model: str | Path | nn.Module | Sequence[LoadedNetwork],
    source: str | Path,
    destination: str | Path,
    *,
    device: str | torch.device | None = None,
    show_progress: bool = True,
    on_progress: OnProgress = lambda done, total: None,
    **options: Any,
) -> MapSummary:
    """Map one scene.

    Args:
        model: folder or Hub id of a trained network or ensemble; or an exported file .onnx; or a network in memory that
            maps (B, 3, h, w) to logits of OpenEarthMap's classes, which is put into eval mode (one of other classes:
            `use_network`).
        source: the scene: a GeoTIFF, or anything else that GDAL reads.
        destination: the GeoTIFF to write.
        device: None: an accelerator if there is one; for a network in memory, its own device.
        show_progress: draw a progress bar.
        on_progress: called with the numbers of finished windows and of all, e.g. to show them elsewhere; what it raises
            stops the computation, and the same call resumes it.
        options: fields of `RasterOptions`, e.g. window, stride, tta, mixed_precision, confidence, overwrite.

    Raises:
        UserError: a model, scene, target or option that cannot be used; the message names it and how to fix it.
    """
    chosen = RasterOptions(**options)
    networks = find_networks(model, window=chosen.window)
    if device is None and not isinstance(model, str | Path):
        weights = (weight for each in networks for weight in each.network().parameters())
        device = next((weight.device for weight in weights), torch.device("cpu"))
    elif device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    predictor = Predictor(networks, device=torch.device(device), tta=chosen.tta, mixed_precision=chosen.mixed_precision)
    summary = map_scene(predictor, source, destination, chosen, show_progress=show_progress, on_progress=on_progress)
    assert summary is not None  # no other process shares the scene
    return summary


def find_networks(
    model: str | Path | nn.Module | Sequence[LoadedNetwork], *, window: int | None = None
) -> list[LoadedNetwork]:
    """Return the networks that a model consists of, in memory.

    Args:
        model: as for `predict_raster`.
        window: replaces the crop size that the networks were trained at.

    Raises:
        UserError: as `load_networks` and `use_network`.
    """
    networks: Sequence[LoadedNetwork]
    if isinstance(model, nn.Module):
        from hf_seg.ensemble import EnsembleForSemanticSegmentation  # not needed, and slow to import, for a file

        if isinstance(model, EnsembleForSemanticSegmentation):
            networks = model.members
        else:
            networks = [use_network(model, crop_size=window)]
    elif isinstance(model, str | Path):
        networks = load_networks(model)
    else:
        networks = model
    # those that a low-memory ensemble leaves on disk are needed window by window
    return [replace(each, crop_size=window or each.crop_size, module=each.network()) for each in networks]
