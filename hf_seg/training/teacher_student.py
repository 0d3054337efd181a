"""Score and export a student and its teacher."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.arguments import RecipeArguments, dump_recipe
from hf_seg.data.dataloaders import LabelledImages
from hf_seg.hub.export import export_model
from hf_seg.training.evaluation import evaluate_network
from hf_seg.training.setup import window_settings

Scores = dict[str, dict[str, dict[str, Any]]]  # "student" | "teacher" -> domain -> results of `evaluate_network`


def evaluate_both(
    student: nn.Module,
    teacher: MeanTeacher,
    val_images: dict[str, LabelledImages],
    accelerator: Accelerator,
    args: RecipeArguments,
) -> Scores:
    """Score both networks on the images of each domain."""
    scores: Scores = {"student": {}, "teacher": {}}
    for name, network in (("student", student), ("teacher", teacher.model)):
        for domain, images in val_images.items():
            scores[name][domain] = evaluate_network(network, images, accelerator, **window_settings(args))
    accelerator.print("\nmIoU", ", ".join(f"{key} {value:.4f}" for key, value in mean_ious(scores).items()))
    return scores


def mean_ious(scores: Scores) -> dict[str, float]:
    """Return one number for each network and domain, as `<network>_<domain>_mean_iou`."""
    return {
        f"{name}_{domain}_mean_iou": results["mean_iou"]
        for name, domains in scores.items()
        for domain, results in domains.items()
    }


def export_both(
    student: nn.Module,
    teacher: MeanTeacher,
    folder: Path,
    scores: Scores | None,
    args: RecipeArguments,
    step: int,
    accelerator: Accelerator,
) -> None:
    """Write the teacher to a folder and the student to `student/` in it; to be called by every process.

    `eval_results.json` of each holds the source's results, and those of the target, if it was scored, under `target`.
    """
    if not accelerator.is_main_process:
        return
    for name, network, place in (("student", student, folder / "student"), ("teacher", teacher.model, folder)):
        results = scores and {**scores[name]["source"], "target": scores[name].get("target"), "step": step}
        export_model(network.model, place, crop_size=args.crop_size, recipe=dump_recipe(args), results=results)
