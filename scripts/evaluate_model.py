"""Score a trained network or ensemble on a split of OpenEarthMap-SAR, on one or several processes.

    python scripts/evaluate_model.py --model runs/stage2 --data_dir data/dfc25_track1 --split val --output scores.json
    accelerate launch --multi_gpu scripts/evaluate_model.py ...        # the tiles are shared among the GPUs

The window is the crop that the model was trained at, as its image processor says. Prints a table and writes the JSON
that the recipes call `eval_results.json`, with each tile's own mIoU and confusion matrix, worst first, under `images`;
beside it go the confusion matrix and a panel of predictions. `--column optical` scores an optical network, where the
split has optical images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hf_seg.arguments import PredictionSettings
from hf_seg.errors import one_line_errors
from hf_seg.settings import Parser, filled


def parse() -> tuple[argparse.Namespace, PredictionSettings]:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a trained network or ensemble")
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="val")
    parser.add_argument("--column", default="sar", choices=("sar", "optical"), help="image of each tile to map (sar)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_settings(PredictionSettings, skip=["config"])
    args = parser.parse_args()
    return args, filled(PredictionSettings, args)


def main() -> None:
    """Predict, count, write."""
    args, settings = parse()

    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from transformers.utils.logging import disable_progress_bar

    from hf_seg.data.open_earth_map import load_open_earth_map_sar
    from hf_seg.data.samples import LabelledImages
    from hf_seg.files import write_atomic
    from hf_seg.inference.load import load_networks
    from hf_seg.inference.predict import Predictor
    from hf_seg.metrics import ConfusionMatrix
    from hf_seg.training.evaluation import draw_results, evaluate

    disable_progress_bar()
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    with accelerator.main_process_first():
        images = LabelledImages(load_open_earth_map_sar(args.data_dir, args.split), args.column)
        networks = load_networks(args.model)
    predictor = Predictor.with_settings(networks, settings, device=accelerator.device)
    per_image: list[tuple[str, dict[str, Any]]] = []

    def note_image(image_id: str, prediction: np.ndarray, label: np.ndarray) -> None:
        counts = ConfusionMatrix()
        counts.update(prediction, label)
        scores = counts.compute()
        per_image.append((image_id, {key: scores[key] for key in ("mean_iou", "confusion_matrix")}))

    results, _ = evaluate(predictor, images, accelerator, title=args.split, on_prediction=note_image)
    scored = sorted(
        gather_object(per_image), key=lambda pair: (pair[1]["mean_iou"] is None, pair[1]["mean_iou"], pair[0])
    )
    if accelerator.is_main_process:
        report = {**results, "model": str(args.model), "split": args.split, "images": dict(scored)}
        write_atomic(args.output, json.dumps(report) + "\n")
        figures = args.output.parent / f"{args.output.stem}_figures"
        title = {"sar": "SAR", "optical": "optical"}[args.column]
        draw_results(predictor, images, results, figures, titles=(title, "label", "prediction"))
        for name, iou in results["iou"].items():
            print(f"{name:18s} {'-' if iou is None else f'{iou:.4f}'}")
        print(f"{'mIoU':18s} {results['mean_iou']:.4f}  ({results['n_images']} tiles, {args.split})")
        print(f"scores: {args.output}", *(f"figure: {path}" for path in sorted(figures.iterdir())), sep="\n")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    with one_line_errors():
        main()
