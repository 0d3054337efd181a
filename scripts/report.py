"""Report on a trained network or ensemble: one HTML page with its scores, how sure they are, and what it maps wrongly.

    python scripts/report.py runs/stage2_b5 --data_dir data/dfc25_track1 --split val --output report.html
    python scripts/report.py runs/ensemble --data_dir data/dfc25_track1 --output report.html --against runs/stage2_b5

The page is self-contained. It has settings and curves, IoU with 95 % bootstrap intervals over tiles (and over regions,
where they are known), the confusion matrix, calibration, what --abstain of the mapping command would give, and the best
and the worst tiles. Beside it goes report.json with the numbers; a report written into the run's own folder adds its
interval to the model card. The tiles are read once, and once more for the network that it is compared with.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_seg.arguments import PREDICTION_MEMORY_HINT, PredictionSettings
from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser, filled
from hf_seg.terminal import print_summary

if TYPE_CHECKING:
    from hf_seg.data.samples import LabelledImages
    from hf_seg.training.tile_scores import TileScores


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, PredictionSettings]:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained network or ensemble")
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR, or a dataset on the Hub")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="%(default)s")
    parser.add_argument(
        "--column", default="sar", choices=("sar", "optical"), help="image of each tile to map (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="page to write (%(default)s)")
    parser.add_argument("--against", metavar="MODEL", help="another network or ensemble, compared on the same tiles")
    parser.add_argument("--label_audit", metavar="DIR", type=Path, help="output folder of scripts/audit_labels.py")
    parser.add_argument("--regions", metavar="CSV", type=Path, help="columns image_id, region (the tiles' names)")
    parser.add_argument("--tiles", type=int, default=3, help="best and worst tiles to show, of each (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument("--label_set", metavar="FILE", help="YAML file of the classes (the dataset's own)")
    parser.add_settings(PredictionSettings, skip=["config"])
    args = parser.parse_args(argv)
    if args.output.suffix != ".html":
        raise UserError(f"--output must end in .html; it is {args.output}")
    if args.tiles < 0 or args.seed < 0:
        raise UserError(f"--tiles and --seed must be at least 0; got {args.tiles}, {args.seed}")
    return args, filled(PredictionSettings, args)


def score(
    model: str, images: "LabelledImages", args: argparse.Namespace, settings: PredictionSettings, shown: int
) -> "tuple[dict[str, Any], TileScores]":
    """Predict every tile once; return the scores, with those of each network under `members`, and the tiles."""
    import torch
    from accelerate import Accelerator

    from hf_seg.inference.load import load_networks
    from hf_seg.inference.predict import Predictor
    from hf_seg.training.evaluation import evaluate
    from hf_seg.training.tile_scores import TileScores

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.num_processes > 1:
        raise UserError(f"a report is made by one process; there are {accelerator.num_processes}")
    predictor = Predictor.with_settings(load_networks(model), settings, device=accelerator.device)
    tiles = TileScores(shown=shown)
    results, each = evaluate(predictor, images, accelerator, title=args.split, on_prediction=tiles.add)
    networks = zip(predictor.networks, each, strict=True)
    members = [{"name": one.name, "weight": one.weight, "crop": one.crop_size, **found} for one, found in networks]
    return {**results, "members": members}, tiles


def load(args: argparse.Namespace) -> "tuple[LabelledImages, list[str] | None, dict[str, Any]]":
    """Return the tiles, their regions (None if unknown) and the label audit (empty if there is none).

    Raises:
        UserError: one of them, or the network to compare with, cannot be used; nothing is predicted yet.
    """
    from hf_seg.data.open_earth_map import load_open_earth_map_sar
    from hf_seg.data.provenance import find_label_set
    from hf_seg.data.samples import LabelledImages
    from hf_seg.hub.export import read_record
    from hf_seg.inference.load import load_networks
    from hf_seg.studies.label_maps import read_regions

    label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR", args.label_set)
    rows = load_open_earth_map_sar(args.data_dir, args.split, label_set=label_set)
    bands = load_networks(args.model, low_memory=True)[0].bands
    images = LabelledImages(rows, args.column, bands=bands, label_set=label_set)
    audit = read_record(args.label_audit / "audit.json") if args.label_audit else {}
    if args.label_audit and "verdict" not in audit:
        raise UserError(f"--label_audit {args.label_audit}: no audit.json; make it with scripts/audit_labels.py")
    if args.against:
        load_networks(args.against, low_memory=True)
    return images, read_regions(args.regions, images.image_ids), audit


def main(argv: Sequence[str] | None = None) -> None:
    """Score, compare, draw, write."""
    args, settings = parse(argv)

    from transformers.utils.logging import disable_progress_bar

    from hf_seg.data.provenance import read_provenance
    from hf_seg.hub.export import TRAINING_DATA_FILE, read_record
    from hf_seg.report import run_report
    from hf_seg.report.plots import read_series

    disable_progress_bar()
    images, regions, audit = load(args)
    run, metrics_file = Path(args.model), Path(args.model) / "metrics.jsonl"
    name, other_name = run.resolve().name, Path(args.against or "").resolve().name
    if args.against and name == other_name:
        name, other_name = args.model, args.against

    # what cannot be read shows before anything is predicted
    records = {name: read_record(run / name) for name in ("recipe.yaml", TRAINING_DATA_FILE)}
    has_metrics = metrics_file.is_file() and metrics_file.stat().st_size > 0
    if has_metrics:
        read_series(metrics_file)
    results, tiles = score(args.model, images, args, settings, args.tiles)
    matrices, label_set = tiles.matrices(), images.label_set
    results |= {
        "model": name,
        "split": args.split,
        "image": args.column,
        "tta": settings.tta,
        "stride": settings.stride,
    }
    results["data"] = read_provenance(args.data_dir, "OpenEarthMap-SAR")
    results["intervals"] = run_report.summarize_intervals(matrices, regions, args.seed, label_set)
    results["calibration"] = run_report.summarize_calibration(tiles.calibration)
    results["against"] = None
    if args.against:
        _, other = score(args.against, images, args, settings, shown=0)
        results["against"] = run_report.compare(matrices, other.matrices(), name, other_name, args.seed, label_set)
    run_report.write_report(
        args.output,
        results,
        tiles.calibration,
        {"Worst": tiles.worst(), "Best": tiles.best()},
        label_set=label_set,
        metrics_file=metrics_file if has_metrics else None,
        settings=records["recipe.yaml"],
        training_data=records[TRAINING_DATA_FILE],
        audit=audit,
    )
    facts = {key: results[key] for key in ("mean_iou", "overall_accuracy", "n_images")}
    print_summary(run_report.say_score(results), facts, [args.output])


if __name__ == "__main__":
    with one_line_errors(PREDICTION_MEMORY_HINT):
        main()
