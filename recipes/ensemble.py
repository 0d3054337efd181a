"""Ensemble: score several SAR networks and their average in one pass over the tiles, and export them as one.

    accelerate launch recipes/ensemble.py --members runs/b5 runs/convnextv2 org/swinv2@revision --tta flips \\
        --data_dir data/dfc25_track1 --output_dir runs/ensemble

    EnsembleForSemanticSegmentation.from_pretrained("runs/ensemble").predict("scene.png")

Of each tile every member computes its probabilities once, with windows of its own crop size; they are counted for the
member, added to the running mean, and gone. The tiles are shared among the processes, and the result does not depend on
their number. `--eval false` exports without data, and the scores stay unknown. Launched again with the same members,
the recipe replaces its output.
"""

import json
import logging
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.arguments import EnsembleArguments, dump_recipe
from hf_seg.data.dataloaders import LabelledImages, UnlabelledImages
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.errors import DatasetError, UserError, one_line_errors
from hf_seg.hub.ensemble_folder import CONFIG_FILE, read_ensemble
from hf_seg.hub.push import publish
from hf_seg.inference.vote import WeightedVotes
from hf_seg.labels import NUM_LABELS
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.member_scores import plot_member_scores
from hf_seg.report.plots import plot_confusion_matrix, plot_panel
from hf_seg.settings import parse_arguments
from hf_seg.training.evaluation import predict_probs
from hf_seg.training.setup import require_login


def main(argv: list[str] | None = None) -> None:
    """Load the members, score, export."""
    args = parse_arguments(EnsembleArguments, argv)
    has_fp16 = args.mixed_precision != "fp16" or torch.accelerator.is_available()
    args.require("mixed_precision", has_fp16, "no or bf16 on a CPU")
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    disable_progress_bar()
    require_login(args, accelerator)
    output_dir = Path(args.output_dir)
    with accelerator.main_process_first():  # the first process fetches and indexes, the others find it done
        ensemble = EnsembleForSemanticSegmentation.from_members(args.members, args.weights)
        images = load_images(args) if args.eval else None
    check_output(output_dir, ensemble)
    accelerator.print(
        f"{len(ensemble.members)} member(s), {'no' if images is None else len(images)} tiles to score, "
        f"views: {args.tta}, {accelerator.num_processes} process(es), {accelerator.device}"
    )
    ensemble.to(accelerator.device)
    results = None if images is None else score(ensemble, images, accelerator, args)
    if accelerator.is_main_process:
        export(ensemble, results, output_dir, args)
        if results is None or images is None:
            print("not scored: --eval is false")
        else:
            draw_figures(ensemble, images, results, output_dir / "figures", accelerator, args)
            print_table(results)
        print(f"ensemble: {output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:  # nobody waits for the Hub
        publish(output_dir, args)


def load_images(args: EnsembleArguments) -> LabelledImages:
    """Load the tiles to score on.

    Raises:
        DatasetError: there are none, or some have no image or no label.
    """
    try:
        rows = load_open_earth_map_sar(args.data_dir, args.split)
        UnlabelledImages(rows, args.column)  # says so if there are tiles without that image
        return LabelledImages(rows, args.column)
    except DatasetError as error:
        raise DatasetError(f"{error}; or export without scores: --eval false") from None


def check_output(folder: Path, ensemble: EnsembleForSemanticSegmentation) -> None:
    """Make sure that the output folder is free, or holds an ensemble of these members.

    Raises:
        UserError: naming what is in the way.
    """
    way_out = "choose another --output_dir"
    if (folder / CONFIG_FILE).exists():
        then, _ = read_ensemble(folder, str(folder))
        before, now = ([(member.origin, member.revision) for member in each] for each in (then, ensemble.members))
        if before != now:
            names = [
                ", ".join(f"{origin}@{revision}" if revision else origin for origin, revision in each)
                for each in (before, now)
            ]
            raise UserError(f"{folder} holds an ensemble of other members ({names[0]}; now {names[1]}); {way_out}")
        return
    # an export that was killed may have left members, but nothing else
    if others := sorted(path.name for path in folder.glob("[!.]*") if not path.name.startswith("member_")):
        raise UserError(f"{folder} already holds something else, {others[0]} for one; {way_out}")


def vote(
    ensemble: EnsembleForSemanticSegmentation, image: np.ndarray, accelerator: Accelerator, args: EnsembleArguments
) -> WeightedVotes:
    """Let every member vote on one tile; in memory are the running mean and one member's probabilities."""
    votes = WeightedVotes()
    for network, window, share in zip(ensemble.networks, ensemble.crops, ensemble.shares, strict=True):
        stride = max(1, round(args.stride * window))
        settings: dict[str, Any] = {"window": window, "stride": stride, "batch_size": args.batch_size}
        votes.add(predict_probs(network, image, accelerator, **settings, views=args.tta), share)
    return votes


def score(
    ensemble: EnsembleForSemanticSegmentation,
    images: LabelledImages,
    accelerator: Accelerator,
    args: EnsembleArguments,
) -> dict[str, Any]:
    """Score the members and the ensemble on whole tiles, over all processes.

    Returns:
        The ensemble's scores as `ConfusionMatrix.compute` names them, and `n_images`; how they were measured; and under
        `members` what each one is and its own scores.

    Raises:
        DatasetError: no pixel of any tile is labelled.
    """
    counts = [ConfusionMatrix() for _ in (*ensemble.members, ensemble)]
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    for index in tqdm(mine, desc=args.split, unit="tile", disable=not accelerator.is_main_process):
        _, image, label = images[index]
        votes = vote(ensemble, image, accelerator, args)
        for matrix, choice in zip(counts, (*votes.choices, votes.choice()), strict=True):
            matrix.update(choice, label)
    matrices = torch.from_numpy(np.stack([matrix.matrix for matrix in counts])).to(accelerator.device)
    for matrix, total in zip(counts, accelerator.reduce(matrices, reduction="sum").cpu().numpy(), strict=True):
        matrix.matrix[:] = total
    *members, results = (matrix.compute() for matrix in counts)
    if results["mean_iou"] is None:
        raise DatasetError(f"the labels of all {len(images)} {args.split} tiles are empty: no pixel is of class 1 to 8")
    how = {"n_images": len(images), "split": args.split, "column": args.column, "tta": args.tta, "stride": args.stride}
    listed = [{**asdict(member), **scores} for member, scores in zip(ensemble.members, members, strict=True)]
    return {**results, **how, "members": listed}


def export(
    ensemble: EnsembleForSemanticSegmentation, results: dict[str, Any] | None, folder: Path, args: EnsembleArguments
) -> None:
    """Write the ensemble with its recipe and scores; scores and figures of an earlier one go first."""
    (folder / "eval_results.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    ensemble.save_pretrained(folder)
    texts = {"recipe.yaml": dump_recipe(args)}
    if results is not None:
        texts["eval_results.json"] = json.dumps(results, indent=1)
    for name, text in texts.items():
        (folder / f".{name}.partial").write_text(text, encoding="utf-8")
        os.replace(folder / f".{name}.partial", folder / name)


def draw_figures(
    ensemble: EnsembleForSemanticSegmentation,
    images: LabelledImages,
    results: dict[str, Any],
    folder: Path,
    accelerator: Accelerator,
    args: EnsembleArguments,
) -> None:
    """Draw the scores, and on a few evenly spread tiles the image, and the entropy of the mean, beside both maps."""
    plot_confusion_matrix(results, folder / "confusion_matrix.png")
    plot_member_scores([(each["origin"], each) for each in results["members"]], results, folder / "members.png")
    panel, doubts = [], []
    for index in np.unique(np.linspace(0, len(images) - 1, 4).round().astype(int)).tolist():
        image_id, image, label = images[index]
        votes = vote(ensemble, image, accelerator, args)
        prediction, doubt = votes.choice().cpu().numpy(), (votes.entropy() / math.log(NUM_LABELS - 1)).cpu().numpy()
        panel.append((image_id, image, label, prediction))
        doubts.append((image_id, np.dstack([(255 * doubt.clip(0, 1)).astype(np.uint8)] * 3), label, prediction))
    title = "SAR" if args.column == "sar" else args.column
    plot_panel(panel, folder / "panel.png", titles=(title, "label", "ensemble"))
    plot_panel(doubts, folder / "uncertainty.png", titles=("entropy, white = no idea", "label", "ensemble"))


def print_table(results: dict[str, Any]) -> None:
    """Print the IoU of each class, a column for each member and the last one for the ensemble."""
    members = results["members"]
    for number, member in enumerate(members):
        revision = f"@{member['revision'][:12]}" if member["revision"] else ""
        print(f"member {number}: {member['origin']}{revision}, weight {member['weight']:g}, crop {member['crop']}")
    columns = [*members, results]
    print(" " * 18, *(f"{number:>8}" for number in range(len(members))), "ensemble")
    for name in results["iou"]:
        print(
            f"{name:18}",
            *(f"{column['iou'][name]:8.4f}" if column["iou"][name] is not None else f"{'-':>8}" for column in columns),
        )
    for key, name in (("mean_iou", "mIoU"), ("overall_accuracy", "overall accuracy")):
        print(f"{name:18}", *(f"{column[key]:8.4f}" for column in columns))
    print(f"on {results['n_images']} {results['split']} tiles")


if __name__ == "__main__":
    with one_line_errors():
        main()
