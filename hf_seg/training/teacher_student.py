"""Score and export a student and its teacher."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_seg.arguments import RecipeArguments, Stage1Arguments, dump_recipe
from hf_seg.data.provenance import read_provenance
from hf_seg.data.samples import LabelledImages
from hf_seg.hub.export import export_model
from hf_seg.models import SegmentationNetwork
from hf_seg.training.evaluation import evaluate_network

Networks = dict[str, SegmentationNetwork]  # "student" and "teacher"
Scores = dict[str, dict[str, dict[str, Any]]]  # "student" | "teacher" -> domain -> results of `evaluate_network`


def evaluate_both(
    networks: Networks, val_images: dict[str, LabelledImages], accelerator: Accelerator, args: RecipeArguments
) -> Scores:
    """Score both networks on the images of each domain."""
    return {
        name: {domain: evaluate_network(network, images, accelerator, args) for domain, images in val_images.items()}
        for name, network in networks.items()
    }


def mean_ious(scores: Scores) -> dict[str, float]:
    """Return one number for each network and domain, as `<network>_<domain>_mean_iou`."""
    return {
        f"{name}_{domain}_mean_iou": results["mean_iou"]
        for name, domains in scores.items()
        for domain, results in domains.items()
    }


def export_both(
    networks: Networks,
    folder: Path,
    scores: Scores | None,
    args: Stage1Arguments,
    step: int,
    accelerator: Accelerator,
) -> None:
    """Write the teacher to a folder and the student to `student/` in it; to be called by every process.

    `eval_results.json` of each has the source's results, and those of the target, if it was scored, under `target`.
    """
    if not accelerator.is_main_process:
        return
    training_data = {
        "source": read_provenance(args.source_dir, "OpenEarthMap"),
        "target": read_provenance(args.data_dir, "OpenEarthMap-SAR"),
    }
    shared: dict[str, Any] = {"crop_size": args.crop_size, "recipe": dump_recipe(args), "training_data": training_data}
    for name, place in (("student", folder / "student"), ("teacher", folder)):
        results: dict[str, Any] | None = None
        if scores is not None:
            results = {**scores[name]["source"], "target": scores[name].get("target"), "step": step}
        export_model(networks[name].model, place, results=results, **shared)
