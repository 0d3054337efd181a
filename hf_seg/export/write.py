"""Write a network or an ensemble as one checked file with its metadata.

    options = ExportOptions(format="onnx")
    export_networks(load_networks("runs/ensemble"), Path("runs/exported"), options)

The folder then contains `model.onnx` or `model.pt2` and `stac.json`, and for an ONNX model over 2 GB its weights in
`model.onnx.data`. It appears when the file has been run and agrees with PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hf_seg.errors import UserError, file_errors
from hf_seg.export.check import compare, generate_tile, read_tile
from hf_seg.export.formats import FORMATS, library_versions, open_graph, require_packages, write_graph
from hf_seg.export.graph import ProbabilityGraph, describe_members
from hf_seg.export.stac import STAC_FILE, write_item
from hf_seg.files import atomic_folder
from hf_seg.inference.exported import MODEL_FILES, ExportMetadata
from hf_seg.inference.load import LoadedNetwork
from hf_seg.labels import BACKGROUND

_WRITTEN = {*MODEL_FILES.values(), f"{MODEL_FILES['onnx']}.data", STAC_FILE}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    Args:
        format: "onnx" or "pt2".
        opset: of ONNX; None: the exporter's own default.
        bands: of the input: as many as the networks take, or 1, which is replicated for networks that take three.
            None: as the image has, or as the networks take.
        crop_size: of the windows, if the networks were trained at different ones.
        fixed_size: fix height and width to the crop even where they could be dynamic.
        image: real tile for the check; None: a generated one.
        resolution_cm: centimetres per pixel of the data.
        trained_on: name of the training data.
        overwrite: replace an earlier export.

    Raises:
        UserError: an unknown format, or a value out of its range.
    """

    format: str
    opset: int | None = None
    bands: int | None = None
    crop_size: int | None = None
    fixed_size: bool = False
    image: Path | None = None
    resolution_cm: float | None = None
    trained_on: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"unknown format {self.format!r}; choose one of {', '.join(FORMATS)}")
        if self.opset is not None and self.format != "onnx":
            raise UserError(f"opset is for onnx; {self.format} has none")
        for name in ("opset", "bands", "crop_size", "resolution_cm"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be more than 0 and finite; it is {value!r}")


class Exported(NamedTuple):
    """What was written: the file, its size in bytes with its weights, its metadata, and how well it agrees."""

    file: Path
    size: int
    metadata: ExportMetadata
    differences: dict[str, float]  # largest one of a probability, by the shape of the input


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Raise `UserError` if a folder contains anything, other than an earlier export that is to be replaced."""
    with file_errors(folder, "cannot be written"):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder")
        present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if other := sorted(present - _WRITTEN):
        raise UserError(f"{folder} contains {other[0]}, which is no part of an export; name another folder")
    if present and not overwrite:
        raise UserError(f"{folder} contains an export; add --overwrite, or name another folder")


def export_networks(networks: Sequence[LoadedNetwork], folder: Path, options: ExportOptions) -> Exported:
    """Export networks as one graph, check it and write it.

    Args:
        networks: of `load_networks`, in memory; of one model or ensemble, by whose name the export goes.
        folder: to write.

    Raises:
        UserError: networks, options or a folder that cannot be used, or a file that does not agree with PyTorch; then
            nothing is written.
    """
    require_packages(options.format)
    check_target(folder, overwrite=options.overwrite)
    graph = ProbabilityGraph(networks)
    tile = None if options.image is None else read_tile(options.image, graph)
    bands = graph.bands(options.bands if tile is None else len(tile))
    if options.bands not in (None, bands):
        raise UserError(f"{options.image} has {bands} bands, not {options.bands}")
    crop_size = graph.crop_size(options.crop_size)
    if tile is None:
        tile = generate_tile(graph, bands, crop_size)
    metadata = ExportMetadata(
        name=networks[0].model or networks[0].name,
        revision=networks[0].model_revision,
        classes=graph.classes(),
        background=BACKGROUND,
        bands=bands,
        input_bands=None if graph.stretch is None else graph.stretch.as_config(),
        crop_size=crop_size,
        size_multiple=None if options.fixed_size else graph.size_multiple(crop_size),
        members=describe_members(graph),
        versions=library_versions(),
    )
    with atomic_folder(folder) as temporary:
        file = temporary / MODEL_FILES[options.format]
        metadata = write_graph(
            graph, file, metadata, format=options.format, opset=options.opset, resolution_cm=options.resolution_cm
        )
        differences = compare(open_graph(file, options.format), graph, tile, metadata)
        write_item(
            file,
            metadata,
            format=options.format,
            total_parameters=sum(weight.numel() for weight in graph.networks.parameters()),
            differences=differences,
            resolution_cm=options.resolution_cm,
            trained_on=options.trained_on,
        )
        size = sum(path.stat().st_size for path in temporary.glob(f"{file.name}*"))
    return Exported(folder / file.name, size, metadata, differences)
