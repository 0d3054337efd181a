"""The files: a graph as ONNX or as a program of torch.export, and both run as functions of pixels."""

import importlib.metadata
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from hf_seg.errors import UserError
from hf_seg.export.graph import ProbabilityGraph, traceable
from hf_seg.inference.exported import INPUT, METADATA_KEY, MODEL_FILES, OUTPUT, ExportMetadata, open_session

FORMATS = tuple(MODEL_FILES)
OVERLAP = 50  # per cent of a tile in QGIS: the default stride of hf-seg predict
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime", "stac_model"), "pt2": ("stac_model",)}
_RECORDED = ("hf_seg", "torch", "transformers", "timm", "onnx", "onnxscript")
_EXTRA_FILE = "hf_seg.json"  # metadata within a program of torch.export


def require_packages(format: str) -> None:
    """Raise `UserError` unless the packages that a format needs are installed."""
    if missing := [name for name in _NEEDED[format] if importlib.util.find_spec(name) is None]:
        raise UserError(f"an export as {format} needs {' and '.join(missing)}: pip install 'hf_seg[export]'")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that an export depends on, of those that are installed."""
    found = {}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_graph(
    graph: ProbabilityGraph,
    path: Path,
    metadata: ExportMetadata,
    *,
    format: str,
    opset: int | None = None,
    resolution_cm: float | None = None,
) -> ExportMetadata:
    """Write a graph to a file, with its metadata.

    Args:
        path: of the file; the weights of an ONNX model over 2 GB go to another one beside it.
        opset: of ONNX; None: the exporter's own default.
        resolution_cm: centimetres per pixel of the data, for QGIS.

    Returns:
        The metadata, with the opset.

    Raises:
        UserError: the exporter refuses the graph or the opset.
    """
    example = torch.zeros(2, metadata.bands, metadata.crop_size, metadata.crop_size)
    axes = {0: "batch"} | ({2: "height", 3: "width"} if metadata.size_multiple else {})
    if format == "onnx":
        return _write_onnx(graph, path, metadata, example, axes, opset=opset, resolution_cm=resolution_cm)
    with _exporting(graph, metadata):
        dynamic = dict.fromkeys(axes, Dim.DYNAMIC)
        program = torch.export.export(graph, (example,), dynamic_shapes={INPUT: dynamic})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    content = io.BytesIO()  # a file that cannot be written is then an OSError
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, content, extra_files={_EXTRA_FILE: metadata.to_json()})
    path.write_bytes(content.getbuffer())
    return metadata


def open_graph(path: Path, format: str) -> Callable[[Tensor], Tensor]:
    """Open a file just written as a function of (B, bands, H, W) float32 pixels."""
    if format == "onnx":
        session = open_session(path)
        return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])
    extra_files = {_EXTRA_FILE: ""}
    program = torch.export.load(path, extra_files=extra_files)  # unpickles: only for what this process wrote
    ExportMetadata.from_json(extra_files[_EXTRA_FILE], str(path))
    run: Any = program.module()
    return lambda pixels: run(pixels)


def deepness_metadata(metadata: ExportMetadata, resolution_cm: float | None) -> dict[str, str]:
    """Return what the QGIS plug-in Deepness reads from an ONNX file.

    The plug-in feeds (x / 255 - mean) / std of uint8 pixels x, so this mean and std hand the graph raw pixels. Its
    reader takes `tile_size` and its documentation names `tiles_size`.
    """
    values: dict[str, Any] = {
        "model_type": "Segmentor",
        "class_names": {str(each["id"]): each["name"] for each in metadata.classes},
        "tile_size": metadata.crop_size,
        "tiles_size": metadata.crop_size,
        "tiles_overlap": OVERLAP,
        "standardization_mean": [0.0] * metadata.bands,
        "standardization_std": [1 / 255] * metadata.bands,
        "seg_thresh": 0,  # the plug-in would turn pixels below its threshold to class 0
        "seg_small_segment": 0,  # nor shall it blur the map
    }
    if resolution_cm is not None:
        values["resolution"] = resolution_cm
    return {key: json.dumps(value) for key, value in values.items()}


def _write_onnx(
    graph: ProbabilityGraph,
    path: Path,
    metadata: ExportMetadata,
    example: Tensor,
    axes: dict[int, str],
    *,
    opset: int | None,
    resolution_cm: float | None,
) -> ExportMetadata:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise UserError(f"opset must be at most {newest}, the newest that onnx {onnx.__version__} knows; it is {opset}")
    with _exporting(graph, metadata):
        program: Any = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: axes},
            verbose=False,
        )
    model = program.model
    for scope in (model.graph, *model.functions.values()):
        for node in scope:
            node.metadata_props.clear()  # stack traces, with paths of this machine
    metadata = replace(metadata, opset=model.opset_imports[""])
    if opset not in (None, metadata.opset):
        raise UserError(f"opset is {opset}, but this graph can only be written in opset {metadata.opset}; leave it out")
    if metadata.input_bands is None:  # the plug-in feeds 8-bit images only
        model.metadata_props.update(deepness_metadata(metadata, resolution_cm))
    model.metadata_props[METADATA_KEY] = metadata.to_json()
    program.save(path)
    return metadata


@contextmanager
def _exporting(graph: ProbabilityGraph, metadata: ExportMetadata) -> Iterator[None]:
    """Make a graph traceable, keep the exporters quiet, and turn what they raise into a `UserError`."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with traceable(graph), torch.no_grad(), warnings.catch_warnings(action="ignore"):
            yield
    except OSError:
        raise
    except Exception as error:  # the exporters raise many kinds; each is about this graph
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        hint = "; try --fixed_size" if metadata.size_multiple else ""
        raise UserError(f"the exporter refuses {metadata.name}: {lines[0].strip()[:200]}{hint}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
