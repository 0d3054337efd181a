"""Score a trained SAR network on a split of OpenEarthMap-SAR, on one or several processes.

    python scripts/evaluate_model.py --model runs/stage2 --data_dir data/dfc25_track1 --split val --output scores.json
    accelerate launch --multi_gpu scripts/evaluate_model.py ...        # the tiles are shared among the GPUs

The window is the crop that the model was trained at, as its image processor says. Prints a table and writes the JSON
that the recipes call `eval_results.json`, with each tile's own mIoU, worst first, under `images`; beside it go the
confusion matrix and a panel of predictions.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Python puts this folder first on its path, where this file would stand before the evaluate library.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils.logging import disable_progress_bar

from hf_seg.data.dataloaders import LabelledImages
from hf_seg.data.open_earth_map import SPLITS, load_open_earth_map_sar
from hf_seg.errors import UserError, one_line_errors
from hf_seg.land_cover_iou import LandCoverIoU
from hf_seg.models import SegmentationNetwork, load_trained
from hf_seg.training.evaluation import draw_results, evaluate_network


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained SegFormer or UperNet")
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR")
    parser.add_argument("--split", default="val", choices=SPLITS, help="val")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--stride", type=float, default=0.5, help="step of the window as a share of it (0.5)")
    parser.add_argument("--batch_size", type=int, default=4, help="windows per forward pass (4)")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16", "fp16"), help="no")
    return parser.parse_args()


def main() -> None:
    """Predict, count, write."""
    args = parse()
    if not 0 < args.stride <= 1 or args.batch_size < 1:
        raise UserError(f"--stride must be in (0, 1] and --batch_size at least 1; got {args.stride}, {args.batch_size}")
    disable_progress_bar()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=args.mixed_precision)
    with accelerator.main_process_first():
        images = LabelledImages(load_open_earth_map_sar(args.data_dir, args.split), "sar")
    model, crop_size = load_trained(args.model)
    network = SegmentationNetwork(model).to(accelerator.device).eval()
    window = {"window": crop_size, "stride": max(1, round(args.stride * crop_size)), "batch_size": args.batch_size}

    metric = LandCoverIoU()
    per_image: list[tuple[str, float | None]] = []

    def note_image(image_id: str, prediction: np.ndarray, label: np.ndarray) -> None:
        per_image.append((image_id, metric.compute(predictions=prediction, references=label)["mean_iou"]))

    results = evaluate_network(network, images, accelerator, **window, on_prediction=note_image)
    scored = sorted(gather_object(per_image), key=lambda pair: (pair[1] is None, pair[1], pair[0]))
    if accelerator.is_main_process:
        report = {**results, "model": str(args.model), "split": args.split, "images": dict(scored)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        aside = args.output.with_name(args.output.name + ".partial")
        aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, args.output)
        figures = args.output.parent / f"{args.output.stem}_figures"
        draw_results(network, images, results, figures, accelerator, **window)
        for name, iou in results["iou"].items():
            print(f"{name:18s} {'-' if iou is None else f'{iou:.4f}'}")
        print(f"{'mIoU':18s} {results['mean_iou']:.4f}  ({results['n_images']} tiles, {args.split})")
        print(f"scores: {args.output}", *(f"figure: {path}" for path in sorted(figures.iterdir())), sep="\n")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with one_line_errors():
        main()
