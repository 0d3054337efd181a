"""Write a trained model as a folder that stock transformers opens: weights, image processor, recipe, results."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, SegformerImageProcessor

from hf_seg.normalization import IMAGENET, Normalization


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
    model: PreTrainedModel, folder: Path, *, crop_size: int, recipe: str, results: dict[str, Any] | None
) -> None:
    """Write weights (safetensors), config, processor, `recipe.yaml` and `eval_results.json`.

    Everything is written beside its place first, so a model that was there is not lost to a full disk or a kill.

    Args:
        model: a stock model.
        crop_size: see `image_processor`.
        recipe: the resolved settings as YAML.
        results: of `evaluate_network`; None if the model was not scored.
    """
    aside = folder / ".partial"
    if aside.exists():
        shutil.rmtree(aside)
    model.save_pretrained(aside)
    image_processor(crop_size).save_pretrained(aside)
    (aside / "recipe.yaml").write_text(recipe, encoding="utf-8")
    if results is not None:
        (aside / "eval_results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    else:  # those of the model that was here are not this one's
        (folder / "eval_results.json").unlink(missing_ok=True)
    for file in sorted(aside.iterdir()):
        os.replace(file, folder / file.name)
    aside.rmdir()
