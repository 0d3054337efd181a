"""One run of the page: a scene and settings in, figures and files out."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_seg.demo.view import view_map
from hf_seg.inference.load import LoadedNetwork, common_label_set
from hf_seg.mapping.polygons import write_polygons
from hf_seg.mapping.raster import predict_raster
from hf_seg.mapping.statistics import MapSummary

FILES = {  # what can be downloaded: the key, and the label of its button
    "map": "Map .tif",
    "confidence": "Confidence .tif",
    "gpkg": "Polygons .gpkg",
    "geojson": "Polygons .geojson",
    "zip": "All files .zip",
}


class StoppedError(Exception):
    """The user has stopped a run, or has left."""


@dataclass(frozen=True)
class MappedScene:
    """A finished run: files by the keys of `FILES`, what the page shows (`view_map`), and the figures."""

    files: dict[str, Path]
    view: dict[str, Any]
    summary: MapSummary


def run_job(
    networks: Sequence[LoadedNetwork],
    scene: Path,
    folder: Path,
    *,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **options: Any,
) -> MappedScene:
    """Map a scene and write all files of the page into a folder.

    Args:
        networks: of one model.
        scene: GeoTIFF that `check_scene` has accepted.
        folder: an empty folder, which the caller deletes.
        on_progress: called with the numbers of finished windows and of all; what it raises stops the run.
        options: fields of `RasterOptions` that the user may set, e.g. abstain and units.

    Raises:
        UserError: the scene does not suit the model or the options.
    """
    label_set = common_label_set(networks)
    class_map = folder / f"{scene.stem}_map.tif"
    summary = predict_raster(
        networks,
        scene,
        class_map,
        device=torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"),
        show_progress=False,
        on_progress=on_progress,
        confidence=True,
        cog=True,
        polygons=".gpkg",
        **options,
    )
    files = {
        "map": class_map,
        "confidence": class_map.with_name(f"{class_map.stem}_confidence.tif"),
        "gpkg": class_map.with_suffix(".gpkg"),
        "geojson": class_map.with_suffix(".geojson"),
        "zip": class_map.with_suffix(".zip"),
    }
    write_polygons(class_map, files["geojson"], label_set)
    write_zip(files["zip"], [*summary.files, files["geojson"]])
    view = view_map(scene, class_map, files["confidence"], label_set, summary)
    return MappedScene({key: path for key, path in files.items() if path.exists()}, view, summary)


def write_zip(path: Path, files: Sequence[Path]) -> None:
    """Write files into a zip file, without their folders."""
    # a clock that is wrong may have dated them before 1980, which the format does not know
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for file in files:
            archive.write(file, file.name)
