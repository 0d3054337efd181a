"""An exported model as a STAC Item with the Machine Learning Model extension (MLM).

The Item is built with stac-model, whose version tells that of the extension, and validated without a network: the core
by the schemas that pystac brings, the extension by stac-model's own models.
"""

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_seg.errors import UserError
from hf_seg.files import sha256_of
from hf_seg.inference.exported import ExportMetadata

STAC_FILE = "stac.json"
_ARTIFACTS = {  # of MLM's documents: framework, type of the artifact, media type
    "onnx": ("ONNX", "onnx", "application/octet-stream; application=onnx"),
    "pt2": ("PyTorch", "torch.export.save", "application/octet-stream; application=pytorch"),
}
_DIMENSIONS = ["batch", "bands", "height", "width"]


def write_item(
    file: Path,
    metadata: ExportMetadata,
    *,
    format: str,
    total_parameters: int,
    differences: Mapping[str, float],
    resolution_cm: float | None,
    trained_on: str | None,
) -> None:
    """Write `stac.json` beside an exported file.

    Args:
        file: the exported file.
        total_parameters: of all networks.
        differences: of `check.compare`.
        resolution_cm: centimetres per pixel of the data, if known.
        trained_on: name of the training data, if known.

    Raises:
        UserError: the Item is not valid, which names the field.
    """
    import pystac
    from pystac.extensions.classification import DEFAULT_VERSION, SCHEMA_URI_PATTERN
    from pystac.extensions.file import FileExtension
    from stac_model.schema import MLModelExtension

    framework, artifact, media_type = _ARTIFACTS[format]
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    properties = {
        "title": metadata.name,
        "description": _describe(metadata, trained_on),
        "created": now.isoformat().replace("+00:00", "Z"),
        **_own_properties(metadata, differences, resolution_cm),
    }
    # a model is nowhere, and what it was trained on does not say where that is
    item = pystac.Item(
        id=_plain_name(metadata.name), geometry=None, bbox=None, datetime=now, properties=_without_none(properties)
    )
    asset = pystac.Asset(
        href=f"./{file.name}",
        title="The model",
        media_type=media_type,
        roles=["mlm:model", "mlm:weights", "data"],
        extra_fields={"mlm:artifact_type": artifact, "bands": [{"name": name} for name in _band_names(metadata)]},
    )
    item.add_asset("model", asset)
    FileExtension.ext(asset, add_if_missing=True).apply(size=file.stat().st_size, checksum=f"1220{sha256_of(file)}")
    item.stac_extensions.append(SCHEMA_URI_PATTERN.format(version=DEFAULT_VERSION))  # of the classes
    versions = {"ONNX": metadata.versions.get("onnx"), "PyTorch": metadata.versions["torch"]}
    MLModelExtension.ext(item, add_if_missing=True).apply(
        {
            "name": _plain_name(metadata.name),
            "architecture": ", ".join(dict.fromkeys(member["architecture"] for member in metadata.members)),
            "tasks": {"semantic-segmentation"},
            "framework": framework,
            "framework_version": versions[framework],
            "total_parameters": total_parameters,
            "input": [_input(metadata)],
            "output": [_output(metadata)],
        }
    )
    content = item.to_dict(include_self_link=False, transform_hrefs=False)
    validate_item(content)
    (file.parent / STAC_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _own_properties(
    metadata: ExportMetadata, differences: Mapping[str, float], resolution_cm: float | None
) -> dict[str, Any]:
    """Return what no extension has a field for."""
    return {
        "hf_seg:size_multiple": metadata.size_multiple,
        "hf_seg:members": metadata.members,
        "hf_seg:versions": metadata.versions,
        "hf_seg:opset": metadata.opset,
        "hf_seg:max_difference": dict(differences),
        "hf_seg:resolution_cm": resolution_cm,
    }


def validate_item(item: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a STAC Item and its MLM properties are valid."""
    from pydantic import ValidationError
    from pystac.errors import STACValidationError
    from pystac.validation import validate_dict
    from stac_model.schema import MLModelProperties

    try:
        validate_dict(dict(item), extensions=[])
        MLModelProperties.model_validate(dict(item["properties"]))
    except (STACValidationError, ValidationError) as error:
        raise UserError(f"{STAC_FILE} would not be valid: {' '.join(str(error).split())[:300]}") from None


def _input(metadata: ExportMetadata) -> dict[str, Any]:
    """Return MLM's description of the input: raw values, since the graph normalises them."""
    side = -1 if metadata.size_multiple else metadata.crop_size
    no_data = " NaN where there is no data." if metadata.input_bands else ""
    return {
        "name": "pixels",
        "bands": _band_names(metadata),
        "description": f"Values as in the training data; the model normalises them.{no_data}",
        "input": {"shape": [-1, metadata.bands, side, side], "dim_order": _DIMENSIONS, "data_type": "float32"},
    }


def _band_names(metadata: ExportMetadata) -> list[str]:
    if metadata.stretch is not None:
        return list(metadata.stretch.names)
    return [f"band_{number}" for number in range(1, metadata.bands + 1)]


def _output(metadata: ExportMetadata) -> dict[str, Any]:
    """Return MLM's description of the output."""
    side = -1 if metadata.size_multiple else metadata.crop_size
    shape = [-1, len(metadata.classes), side, side]
    return {
        "name": "probabilities",
        "tasks": {"semantic-segmentation"},
        "description": f"Class probabilities; class {metadata.background} is never predicted and has 0.",
        "result": {"shape": shape, "dim_order": ["batch", "class", "height", "width"], "data_type": "float32"},
        "classification:classes": [
            {"value": each["id"], "name": _plain_name(each["name"]), "description": each["name"]}
            | {"color_hint": each["color"].removeprefix("#").upper()}
            for each in metadata.classes
        ],
    }


def _describe(metadata: ExportMetadata, trained_on: str | None) -> str:
    count = len(metadata.members)
    what = "An ensemble of " + str(count) + " networks" if count > 1 else "A network"
    size = f"multiples of {metadata.size_multiple}" if metadata.size_multiple else f"{metadata.crop_size} only"
    learned = f", trained on {trained_on}" if trained_on else ""
    return (
        f"{what} for land-cover mapping{learned}. Predict with windows of {metadata.crop_size} x {metadata.crop_size} "
        f"pixels; height and width may be {size}."
    )


def _plain_name(name: str) -> str:
    """Return a name of letters, digits, hyphens and underscores that begins and ends with a letter or a digit."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_") or "model"


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
