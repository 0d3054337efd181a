"""Measure how hard a synthetic dataset is, by training a small network on it.

    python scripts/make_synthetic_dataset.py --output data/synthetic --seed 7 --source 56 --train 48 --val 12
    python scripts/measure_synthetic_difficulty.py networks --data data/synthetic [--steps 1500] [--runs sar_clean]
    python scripts/measure_synthetic_difficulty.py resolution --data data/synthetic [--steps 1500] [--scenes 40] \\
        [--model_name_or_path pretrained/efficientnet_lite0]
    python scripts/measure_synthetic_difficulty.py resolution --source_dir REAL [--model_name_or_path ...]

`networks` trains a small convolutional network with cross entropy: on SAR with exact and with noisy labels, and on the
optical images of the source. Each is scored on unseen scenes with exact labels.
`resolution` trains a network on the optical images of the source and scores it on unseen target scenes, each rendered
twice, sharp and coarse, all else equal. The difference is what resolution alignment could win back. A network with
random weights that learns little loses little: take the pretrained encoder of stage 1. With `--source_dir`, a folder of
real tiles in the layout of OpenEarthMap, it trains on one half of each labelled tile of train and val, scores the other
half as it is and made coarse as the target's camera does, and repeats this with the halves exchanged.
"""

import argparse
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_seg.errors import UserError, one_line_errors
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.settings import Parser
from hf_seg.synthetic import EXTRA_FOLDER, SOURCE_FOLDER, TARGET_FOLDER, check_synthetic_dataset

CROP = 128  # of the small network
TOY_CROP = 96  # of a pretrained encoder
RUNS = ("sar_clean", "sar_noisy", "optical")


def build_network(name: str | None) -> Any:
    """Return a `LoadedNetwork`: the small network, or UperNet of toy stage 1 on the pretrained encoder `name`."""
    from hf_seg.inference.load import use_network
    from hf_seg.models import build_model
    from hf_seg.studies.small_network import SmallNetwork

    if name is None:
        return use_network(SmallNetwork(), crop_size=CROP)
    return use_network(build_model(name, crop_size=TOY_CROP, head_width=64), crop_size=TOY_CROP)


def train_network(images: Any, options: argparse.Namespace, *, is_sar: bool = False) -> Any:
    """Train a network: batch 8, cross entropy, AdamW with one cycle up to 3e-3, or 2e-3 if it is pretrained.

    Returns:
        The `LoadedNetwork`.
    """
    import torch
    from tqdm import tqdm

    from hf_seg.data.dataloaders import AugmentedStream, train_dataloader
    from hf_seg.data.transforms import optical_transform, sar_transform
    from hf_seg.losses import cross_entropy

    torch.manual_seed(options.seed)
    loaded = build_network(name := getattr(options, "model_name_or_path", None))
    network = loaded.network().train()
    rate = 2e-3 if name else 3e-3
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.steps)
    transform = (sar_transform if is_sar else optical_transform)(loaded.crop_size, scale_range=(0.75, 1.5))
    stream = AugmentedStream(images, transform, options.seed, normalization=loaded.normalization)
    loader = train_dataloader(stream, start=0, stop=8 * options.steps, batch_size=8)
    for batch in tqdm(loader, desc="training", unit="step", leave=False):
        logits, auxiliary_logits = network(batch["pixel_values"])
        loss = cross_entropy(logits, batch["labels"])
        if auxiliary_logits is not None:
            loss = loss + 0.4 * cross_entropy(auxiliary_logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return loaded


def labelled_images(rows: Sequence[Any], column: str, labels: Path | None = None) -> Any:
    """Return images with their labels.

    Args:
        rows: of a scan.
        column: of the images.
        labels: folder of other labels than those of the rows.
    """
    return as_samples(
        (row.image_id, row.files[column], str(labels / f"{row.image_id}.tif") if labels else row.files["label"])
        for row in rows
    )


def as_samples(rows: Iterable[tuple[str, Any, Any]]) -> Any:
    """Return `LabelledImages` of (id, image, label): files, or arrays of (H, W, 3) and (H, W) uint8."""
    import datasets
    from PIL import Image

    from hf_seg.data.samples import LabelledImages

    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "label": []}
    for row in rows:
        for name, value in zip(columns, row, strict=True):
            columns[name].append(Image.fromarray(value) if isinstance(value, np.ndarray) else value)
    features = {"image_id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Image(mode="L")}
    return LabelledImages(datasets.Dataset.from_dict(columns, features=datasets.Features(features)), "image")


def run_networks(options: argparse.Namespace) -> None:
    """Train on SAR with exact and with noisy labels, and on optical source tiles; score on unseen scenes."""
    from hf_seg.data.scan import scan_open_earth_map, scan_open_earth_map_sar

    source = scan_open_earth_map(options.data / SOURCE_FOLDER).rows
    target = scan_open_earth_map_sar(options.data / TARGET_FOLDER).rows
    clean = options.data / EXTRA_FOLDER / "train_clean_labels"
    unseen = {"unseen SAR": labelled_images(target["val"], "sar")}
    unseen_optical = {
        "unseen source": labelled_images(source["val"], "image"),
        "unseen target": labelled_images(target["val"], "optical"),
    }
    runs = {
        "sar_clean": (labelled_images(target["train"], "sar", clean), unseen),
        "sar_noisy": (labelled_images(target["train"], "sar"), unseen),
        "optical": (labelled_images(source["train"], "image"), unseen_optical),
    }
    for name in options.runs or RUNS:
        images, tests = runs[name]
        loaded = train_network(images, options, is_sar=name != "optical")
        print(f"{name}: {len(images)} scenes, {options.steps} steps")
        for title, test in tests.items():
            print_score(f"{title} ({len(test)})", score(loaded, test))


def run_resolution(options: argparse.Namespace) -> None:
    """Train on sharp optical images, and score on unseen ones that are sharp and coarse, all else equal."""
    from hf_seg.metrics import ConfusionMatrix

    counts = {"sharp": ConfusionMatrix(), "coarse": ConfusionMatrix()}
    for images, tests in real_folds(options) if options.source_dir else synthetic_fold(options):
        loaded = train_network(images, options)
        print(f"optical: {len(images)} scenes, {options.steps} steps", flush=True)
        for name, test in tests.items():
            counts[name].merge(score(loaded, test))
    sharp, coarse = (print_score(name, matrix) for name, matrix in counts.items())
    print(f"lost on coarse images: {100 * (sharp['mean_iou'] - coarse['mean_iou']):.1f} points of mIoU")
    lost = [
        f"{name} {100 * (sharp['iou'][name] - coarse['iou'][name]):.1f}"
        for name in OPEN_EARTH_MAP.names[1:]
        if sharp["iou"][name] is not None
    ]
    print(f"lost IoU: {', '.join(lost)}")


def synthetic_fold(options: argparse.Namespace) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the source's training tiles, and unseen target scenes rendered twice, sharp and coarse."""
    from hf_seg.data.scan import scan_open_earth_map
    from hf_seg.synthetic import Scene
    from hf_seg.synthetic.optical import TARGET_CAMERA, render_optical

    folder = options.data / SOURCE_FOLDER
    made_with = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["settings"]
    tests = {}
    for name, coarse_prob in (("sharp", 0.0), ("coarse", 1.0)):
        camera, rows = replace(TARGET_CAMERA, coarse_prob=coarse_prob), []
        for scene in (Scene(made_with["seed"], "test", index, made_with["size"]) for index in range(options.scenes)):
            ground_rng, optical_rng, *_ = scene.generators()
            ground = scene.make_ground(ground_rng)
            image = np.moveaxis(render_optical(optical_rng, ground, camera), 0, -1)
            rows.append((scene.name, image, ground.crop(ground.label)))
        tests[name] = as_samples(rows)
    yield labelled_images(scan_open_earth_map(folder).rows["train"], "image"), tests


def real_folds(options: argparse.Namespace) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the left halves of all labelled tiles, the right ones as they are and made coarse; then the reverse.

    There are too few real tiles to leave whole ones out: some classes occur in one tile only.
    """
    from hf_seg.data.scan import scan_open_earth_map
    from hf_seg.data.tile_files import read_tile
    from hf_seg.synthetic.optical import TARGET_CAMERA, coarsen

    splits = scan_open_earth_map(options.source_dir).rows
    rng = np.random.default_rng(options.seed)
    halves: tuple[list[Any], list[Any]] = ([], [])
    coarse: tuple[list[Any], list[Any]] = ([], [])
    for row in (row for split in ("train", "val") for row in splits[split] if row.files["label"]):
        image = np.moveaxis(read_tile(row.files["image"], "image"), 0, -1)
        label = read_tile(row.files["label"], "label")[0]
        blurred = coarsen(image, rng.uniform(*TARGET_CAMERA.coarse_zoom))
        middle = image.shape[1] // 2
        for side, columns in enumerate((slice(0, middle), slice(middle, None))):
            halves[side].append((row.image_id, image[:, columns], label[:, columns]))
            coarse[side].append((row.image_id, blurred[:, columns], label[:, columns]))
    if not halves[0]:
        raise UserError(f"--source_dir {options.source_dir}: no tile of train or val is labelled")
    for seen, unseen in ((0, 1), (1, 0)):
        yield as_samples(halves[seen]), {"sharp": as_samples(halves[unseen]), "coarse": as_samples(coarse[unseen])}


def score(loaded: Any, images: Any) -> Any:
    """Return the `ConfusionMatrix` of a network on labelled images."""
    import torch
    from accelerate import Accelerator

    from hf_seg.inference.predict import Predictor
    from hf_seg.metrics import ConfusionMatrix
    from hf_seg.training.evaluation import evaluate

    results, _ = evaluate(Predictor([loaded], device=torch.device("cpu")), images, Accelerator(cpu=True))
    counts = ConfusionMatrix()
    counts.matrix[:] = results["confusion_matrix"]
    return counts


def print_score(title: str, counts: Any) -> dict[str, Any]:
    """Print and return the scores of a `ConfusionMatrix`."""
    results: dict[str, Any] = counts.compute()
    classes = " ".join("-" if value is None else f"{value:.2f}" for value in results["iou"].values())
    print(f"{title}: mIoU {results['mean_iou']:.3f}, IoU 0..8 {classes}", flush=True)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line and check that `--data` is a synthetic dataset."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    networks = commands.add_parser("networks", help="train a small network three times, minutes each")
    resolution = commands.add_parser("resolution", help="measure what an optical network loses on coarse images")
    on_real = resolution.add_mutually_exclusive_group(required=True)
    for command, group in ((networks, networks), (resolution, on_real)):
        needed = {"required": True} if command is networks else {}
        group.add_argument("--data", metavar="DIR", type=Path, help="of make_synthetic_dataset.py", **needed)
        command.add_argument("--steps", metavar="N", type=int, default=1500, help="training steps (%(default)s)")
        command.add_argument("--seed", metavar="N", type=int, default=0, help="of the training (%(default)s)")
    networks.add_argument("--runs", nargs="+", choices=RUNS, help="only these")
    on_real.add_argument("--source_dir", metavar="DIR", type=Path, help="real tiles instead, as OpenEarthMap")
    resolution.add_argument("--scenes", metavar="N", type=int, default=40, help="scenes to score (%(default)s)")
    resolution.add_argument("--model_name_or_path", metavar="NAME", help="pretrained encoder, not the small network")
    options = parser.parse_args(arguments)
    for name, low in (("steps", 2), ("scenes", 1)):
        if getattr(options, name, low) < low:
            raise UserError(f"--{name} must be at least {low}; it is {getattr(options, name)}")
    if options.data:
        check_synthetic_dataset(options.data)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake is one line on stderr."""
    with one_line_errors():
        options = parse(arguments)
        from rasterio.errors import NotGeoreferencedWarning

        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        {"networks": run_networks, "resolution": run_resolution}[options.command](options)


if __name__ == "__main__":
    main()
