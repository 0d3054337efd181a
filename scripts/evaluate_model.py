"""Score a trained network or ensemble on a split of OpenEarthMap-SAR, on one or several processes.

    python scripts/evaluate_model.py --model runs/stage2 --data_dir data/dfc25_track1 --split val --output scores.json
    accelerate launch --multi_gpu scripts/evaluate_model.py ...        # the tiles are shared among the GPUs

The window is the crop that the model was trained at, as its image processor says. Prints a table and writes the JSON
that the recipes call `eval_results.json`, with each tile's own mIoU, worst first, under `images`; beside it go the
confusion matrix, a panel of predictions, and scores.npz: `image_ids` (T,) and their `confusion_matrices` (T, C, C),
from which `hf_seg.bootstrap` makes intervals.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_seg.arguments import PREDICTION_MEMORY_HINT, PredictionSettings
from hf_seg.errors import one_line_errors
from hf_seg.processes import end_with_launcher
from hf_seg.settings import Parser, filled
from hf_seg.terminal import print_summary


def parse() -> tuple[argparse.Namespace, PredictionSettings]:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained network or ensemble")
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR, or a dataset on the Hub")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="val")
    parser.add_argument(
        "--column", default="sar", choices=("sar", "optical"), help="image of each tile to map (%(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--label_set", metavar="FILE", help="YAML file of the classes (the dataset's own)")
    parser.add_settings(PredictionSettings, skip=["config"])
    args = parser.parse_args()
    return args, filled(PredictionSettings, args)


def write_scores(args: argparse.Namespace, results: dict[str, Any], by_id: list[tuple[str, Any, Any]]) -> None:
    """Write the JSON, and the counts of each tile beside it.

    Args:
        by_id: name, mIoU (None without a labelled pixel) and (C, C) counts of each tile, sorted by name.
    """
    import numpy as np

    from hf_seg.data.provenance import read_provenance
    from hf_seg.files import atomic_file, write_atomic

    worst_first = sorted(by_id, key=lambda tile: (tile[1] is None, tile[1], tile[0]))
    scores = {image_id: mean_iou for image_id, mean_iou, _ in worst_first}
    data = read_provenance(args.data_dir, "OpenEarthMap-SAR")
    how = {"model": str(args.model), "data": data, "split": args.split, "image": args.column}
    report = {**results, **how, "images": scores}
    write_atomic(args.output, json.dumps(report, indent=1) + "\n")
    image_ids, _, matrices = zip(*by_id, strict=True)
    with atomic_file(args.output.with_suffix(".npz")) as temporary:
        np.savez_compressed(temporary, image_ids=np.array(image_ids), confusion_matrices=np.stack(matrices))


def main() -> None:
    """Predict, count, write."""
    args, settings = parse()

    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from transformers.utils.logging import disable_progress_bar

    from hf_seg.data.open_earth_map import load_open_earth_map_sar
    from hf_seg.data.provenance import find_label_set
    from hf_seg.data.samples import LabelledImages
    from hf_seg.inference.load import load_networks
    from hf_seg.inference.predict import Predictor
    from hf_seg.training.evaluation import draw_results, evaluate
    from hf_seg.training.hub_data import pin_datasets
    from hf_seg.training.tile_scores import TileScores

    disable_progress_bar()
    end_with_launcher()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pin_datasets(args, accelerator)
    with accelerator.main_process_first():
        label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set)
        rows = load_open_earth_map_sar(args.data_dir, args.split, label_set=label_set)
        networks = load_networks(args.model)
    predictor = Predictor.with_settings(networks, settings, device=accelerator.device)
    images = LabelledImages(rows, args.column, bands=predictor.bands, label_set=label_set)
    tiles = TileScores(shown=0)
    results, _ = evaluate(predictor, images, accelerator, title=args.split, on_prediction=tiles.add)
    mine = zip(tiles.image_ids, tiles.mean_ious, tiles.matrices(), strict=True)
    by_id = sorted(gather_object(list(mine)), key=lambda tile: tile[0])
    if accelerator.is_main_process:
        write_scores(args, results, by_id)
        figures = args.output.parent / f"{args.output.stem}_figures"
        titles = ("SAR" if args.column == "sar" else args.column, "label", "prediction")
        draw_results(predictor, images, results, figures, titles=titles)
        lines = [f"{name:18s} {'-' if iou is None else f'{iou:.4f}'}" for name, iou in results["iou"].items()]
        lines.append(f"{'mIoU':18s} {results['mean_iou']:.4f}  ({results['n_images']} tiles, {args.split})")
        print_summary("\n".join(lines), results, [args.output, *sorted(figures.iterdir())])
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with one_line_errors(PREDICTION_MEMORY_HINT):
        main()
