"""Ensemble: score several SAR networks and their average in one pass over the tiles, and export them as one.

    accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml recipes/ensemble.py \\
        --model runs/stage2_b5 runs/stage2_convnextv2 org/swinv2@revision --tta flips \\
        --data_dir data/dfc25_track1 --output_dir runs/ensemble

    EnsembleForSemanticSegmentation.from_pretrained("runs/ensemble").predict("scene.png")

Each network computes its probabilities of a tile once, with windows of its own crop size; they are scored, added to the
running mean, and dropped. The tiles are shared among the processes, and the result does not depend on their number.
`--eval false` exports without data, and the scores stay unknown. Run again with the same networks, the recipe replaces
its output.
"""

from hf_seg.arguments import PREDICTION_MEMORY_HINT, EnsembleArguments, portable_settings, write_recipe
from hf_seg.settings import LOCAL_PATHS_FILE, answer_help, parse_arguments

if __name__ == "__main__":
    answer_help(EnsembleArguments)  # before the slow imports

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.bands import Bands
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set, read_provenance
from hf_seg.data.samples import LabelledImages
from hf_seg.errors import DatasetError, UserError, one_line_errors
from hf_seg.files import atomic_update, finish_update
from hf_seg.hub.export import TRAINING_DATA_FILE, read_record, write_training_data
from hf_seg.hub.push import publish
from hf_seg.inference.load import ENSEMBLE_FILE, load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.report.plots import plot_member_scores
from hf_seg.terminal import print_summary
from hf_seg.training.evaluation import draw_results, evaluate
from hf_seg.training.hub_data import pin_datasets
from hf_seg.training.run import start_accelerator, use_folder

WRITTEN = {"README.md", "recipe.yaml", LOCAL_PATHS_FILE, "eval_results.json", TRAINING_DATA_FILE, "figures"}


def main(argv: list[str] | None = None) -> None:
    """Assemble, in a folder that no other run may use meanwhile."""
    args = parse_arguments(EnsembleArguments, argv)
    accelerator = start_accelerator(args, args.mixed_precision)
    with use_folder(accelerator, Path(args.output_dir)):
        assemble(args, accelerator)


def assemble(args: EnsembleArguments, accelerator: Accelerator) -> None:
    """Load the networks, score, export."""
    output_dir = Path(args.output_dir)
    if args.eval:
        pin_datasets(args, accelerator)
    with accelerator.main_process_first():  # the first process fetches and indexes, the others find it done
        ensemble = EnsembleForSemanticSegmentation.from_members(args.model, args.weights)
        images = load_images(args, ensemble.members[0].bands) if args.eval else None
    check_output(output_dir, ensemble, args)
    accelerator.print(
        f"{len(ensemble.members)} network(s), {0 if images is None else len(images)} tiles to score, "
        f"tta: {args.tta}, {accelerator.num_processes} process(es), {accelerator.device}"
    )
    predictor = Predictor.with_settings(ensemble.members, args, device=accelerator.device)
    results = None if images is None else score(predictor, images, accelerator, args)
    if accelerator.is_main_process:
        export(ensemble, results, output_dir, args)
        if results is None or images is None:
            print("not scored: --eval is false")
        else:
            draw_figures(predictor, images, results, output_dir / "figures", args)
            print_table(results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # the other processes need not wait for the Hub
        try:
            publish(output_dir, args)
        finally:  # the ensemble is complete, although its push may have failed
            print_summary(
                "",
                {"output_dir": output_dir, "results": results},
                [output_dir / "README.md", output_dir / "figures" / "panel.png"],
                hints=[f"hf-seg predict SCENE.tif MAP.tif --model {output_dir}"],
            )


def load_images(args: EnsembleArguments, bands: Bands | None) -> LabelledImages:
    """Load the tiles to score on.

    Raises:
        DatasetError: there are none, or some have no image or no label.
    """
    try:
        label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set)
        rows = load_open_earth_map_sar(args.data_dir, args.split, label_set=label_set)
        return LabelledImages(rows, args.column, bands=bands, label_set=label_set)
    except DatasetError as error:
        raise DatasetError(f"{error}; or export without scores: --eval false") from None


def check_output(folder: Path, ensemble: EnsembleForSemanticSegmentation, args: EnsembleArguments) -> None:
    """Make sure that the output folder is free, or contains an ensemble of these networks.

    Raises:
        UserError: naming what is in the way.
    """
    hint = "choose another --output_dir"
    finish_update(folder)
    if (folder / ENSEMBLE_FILE).exists():
        before, now = (
            [f"{each.name}@{each.revision}" if each.revision else each.name for each in networks]
            for networks in (load_networks(folder, low_memory=True), ensemble.members)
        )
        if before != now:
            raise UserError(
                f"{folder} contains an ensemble of other networks ({', '.join(before)}; now {', '.join(now)}); {hint}"
            )
        return
    # an export that was stopped may have left members and, of an ensemble that it was to replace, all but its list
    others = {path.name for path in folder.glob("[!.]*") if not path.name.startswith("member_")}
    if others <= WRITTEN and read_record(folder / "recipe.yaml").get("model") == portable_settings(args)["model"]:
        return
    if others:
        raise UserError(f"{folder} already contains something else, e.g. {min(others)}; {hint}")


def score(
    predictor: Predictor, images: LabelledImages, accelerator: Accelerator, args: EnsembleArguments
) -> dict[str, Any]:
    """Score the networks and the ensemble on whole tiles, over all processes.

    Returns:
        The ensemble's scores as `evaluate` names them; how they were measured; and under `members` what each network is
        and its own scores.

    Raises:
        DatasetError: no pixel of any tile is labelled.
    """
    results, each = evaluate(predictor, images, accelerator, title=args.split)
    how = {"split": args.split, "column": args.column, "tta": args.tta, "stride": args.stride}
    members = [
        {"origin": one.name, "crop": one.crop_size, "weight": one.weight, "revision": one.revision, **scores}
        for one, scores in zip(predictor.networks, each, strict=True)
    ]
    return {**results, **how, "members": members}


def export(
    ensemble: EnsembleForSemanticSegmentation, results: dict[str, Any] | None, folder: Path, args: EnsembleArguments
) -> None:
    """Write the ensemble with its recipe and scores; members, scores and figures of an earlier one go with it."""
    members = [path.name for path in folder.glob("member_*")]
    old = [ENSEMBLE_FILE, *members, "eval_results.json", TRAINING_DATA_FILE, "figures"]
    with atomic_update(folder, first=old, last=ENSEMBLE_FILE) as temporary:
        ensemble.save_pretrained(temporary)
        write_recipe(args, temporary)
        if results is not None:
            write_training_data(temporary, {"target": read_provenance(args.data_dir, "OpenEarthMap-SAR")})
            (temporary / "eval_results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def draw_figures(
    predictor: Predictor, images: LabelledImages, results: dict[str, Any], folder: Path, args: EnsembleArguments
) -> None:
    """Draw the scores, and on a few evenly spread tiles the image, and the entropy of the mean, beside both maps."""
    plot_member_scores([(each["origin"], each) for each in results["members"]], results, folder / "members.png")
    titles = ("SAR" if args.column == "sar" else args.column, "label", "ensemble")
    draw_results(predictor, images, results, folder, titles=titles, with_uncertainty=True)


def print_table(results: dict[str, Any]) -> None:
    """Print the IoU of each class that occurs, a column for each network and the last one for the ensemble."""
    members = results["members"]
    for number, member in enumerate(members):
        revision = f"@{member['revision'][:12]}" if member["revision"] else ""
        print(f"member {number}: {member['origin']}{revision}, weight {member['weight']:g}, crop {member['crop']}")
    columns = [*members, results]
    title = f"{results['n_images']} {results['split']} tiles"
    print(f"{title:18}", *(f"{number:>8}" for number in range(len(members))), "ensemble")
    for name in (name for name, iou in results["iou"].items() if iou is not None):
        print(f"{name:18}", *(f"{column['iou'][name]:8.4f}" for column in columns))
    for key, name in (("mean_iou", "mIoU"), ("overall_accuracy", "overall accuracy")):
        print(f"{name:18}", *(f"{column[key]:8.4f}" for column in columns))


if __name__ == "__main__":
    with one_line_errors(PREDICTION_MEMORY_HINT):
        main()
