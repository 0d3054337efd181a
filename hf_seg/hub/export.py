"""Write a trained model as a folder that stock transformers opens: weights, image processor, recipe, results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, SegformerImageProcessor

from hf_seg.errors import UserError, file_errors
from hf_seg.files import atomic_update, write_atomic
from hf_seg.lora import ADAPTER_FOLDER, has_adapters, merge_adapters, save_adapter
from hf_seg.models import normalization_of
from hf_seg.normalization import IMAGENET, Normalization

TRAINING_DATA_FILE = "training_data.json"
_LAYOUTS = {"source": "OpenEarthMap", "target": "OpenEarthMap-SAR"}
_PROVENANCE_KEYS = ("name", "layout", "description", "license", "synthetic", "released", "labels")
_HUB_KEYS = ("hub_id", "revision", "benchmark_tasks")  # of data from the Hub


def image_processor(crop_size: int, normalization: Normalization = IMAGENET) -> SegformerImageProcessor:
    """Build the processor that repeats training's preprocessing; grey images become RGB in a stock pipeline.

    It does not resize, since the ground sampling distance matters; `size` records the crop, which is the window to
    predict with.
    """
    return SegformerImageProcessor(
        do_resize=False,
        size={"height": crop_size, "width": crop_size},
        do_rescale=True,
        rescale_factor=1 / normalization.scale,
        do_normalize=True,
        image_mean=list(normalization.mean),
        image_std=list(normalization.std),
        do_reduce_labels=False,
    )


def export_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    crop_size: int,
    recipe: str,
    results: dict[str, Any] | None,
    training_data: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write weights (safetensors), config, processor, `recipe.yaml`, `eval_results.json` and `training_data.json`.

    Adapters of LoRA are merged into the weights; `adapter/` has them alone, in peft's format.

    Everything is written to a temporary folder first, so a full disk (`FileError`) or a kill does not damage an earlier
    model. While the files are replaced there is no `config.json`, so no mixture of two models is taken for one.

    Args:
        model: a stock model, with or without adapters.
        crop_size: see `image_processor`.
        recipe: the resolved settings as YAML.
        results: from `evaluate_network`; None if the model was not scored.
        training_data: see `write_training_data`.
    """
    # the scores of an earlier model are not those of this one
    with atomic_update(folder, first=("config.json", "eval_results.json"), last="config.json") as temporary:
        if has_adapters(model):
            save_adapter(model, temporary / ADAPTER_FOLDER)
            model = merge_adapters(model)
        model.save_pretrained(temporary)
        image_processor(crop_size, normalization_of(model)).save_pretrained(temporary)
        (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
        if results is not None:
            (temporary / "eval_results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        if training_data is not None:
            write_training_data(temporary, training_data)


def write_training_data(folder: Path, provenance: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `training_data.json`, which tells a card what data a model or dataset was made from.

    Args:
        folder: of the model, the ensemble or the pseudo-labels.
        provenance: "source" and "target" for stage 1, "target" for everything else (an ensemble: the tiles that it was
            scored on); each as `read_provenance` returns it.
    """
    kept = {
        domain: {key: found[key] for key in (*_PROVENANCE_KEYS, *_HUB_KEYS) if key in found or key not in _HUB_KEYS}
        for domain, found in provenance.items()
    }
    write_atomic(folder / TRAINING_DATA_FILE, json.dumps(kept, indent=1))


def read_training_data(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the provenance of "source" and "target"; where nothing was recorded, it names the layout alone."""
    recorded = read_record(folder / TRAINING_DATA_FILE)
    unknown = {"description": None, "license": None, "synthetic": False, "released": False, "labels": None}
    unknown |= dict.fromkeys(_HUB_KEYS)
    return {
        domain: {"name": f"data laid out as {layout}", "layout": layout, **unknown, **recorded.get(domain, {})}
        for domain, layout in _LAYOUTS.items()
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file, an empty one if there is no file; `UserError` if it is damaged."""
    if not path.exists():
        return {}
    with file_errors(path, "cannot be read"):
        content = path.read_bytes()
    try:
        found = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it contains no mapping of keys to values")
    return found


def without_paths(found: Any) -> Any:
    """Shorten the path of each network that came from a local folder, and so has no revision, to its last part."""
    if isinstance(found, list):
        return [without_paths(each) for each in found]
    if not isinstance(found, dict):
        return found
    portable = {key: without_paths(value) for key, value in found.items()}
    if portable.get("revision", "") is None:
        portable |= {key: Path(portable[key]).name for key in ("name", "origin") if key in portable}
    return portable
