"""Measure how hard a synthetic dataset is, by training a small network on it.

    python scripts/make_synthetic_dataset.py --output data/synthetic --seed 7 --source 56 --train 48 --val 12
    python scripts/measure_synthetic_difficulty.py networks --data data/synthetic [--steps 1500] [--runs sar_clean]
    python scripts/measure_synthetic_difficulty.py resolution --data data/synthetic [--steps 1500] [--scenes 40]

`networks` trains a small convolutional network with cross entropy: on SAR with exact and with noisy labels, and on the
optical images of the source. Each is scored on unseen scenes with exact labels.
`resolution` trains the small network on the optical images of the source and scores it on unseen target scenes, each
rendered twice, sharp and coarse, all else equal. The difference is what resolution alignment could win back.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_seg.errors import UserError, one_line_errors
from hf_seg.labels import NUM_LABELS
from hf_seg.settings import Parser
from hf_seg.synthetic import EXTRA_FOLDER, SOURCE_FOLDER, TARGET_FOLDER, check_synthetic_dataset

CROP = 128
RUNS = ("sar_clean", "sar_noisy", "optical")


def small_network(width: int = 24) -> Any:
    """Return a network of half a million weights that trains on one core in minutes.

    Three strided stages, dilated convolutions, two skip connections; it maps (B, 3, H, W) to logits.
    """
    import torch
    from torch import Tensor, nn

    from hf_seg.models import SegmentationLogits

    def block(width_in: int, width_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(width_in, width_out, 3, stride, dilation, dilation, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU())

    def resize(features: Tensor, like: Tensor) -> Tensor:
        return nn.functional.interpolate(features, size=like.shape[-2:], mode="bilinear")

    class SmallNetwork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = 4 * width
            self.stage1 = nn.Sequential(block(3, width, 2), block(width, width))
            self.stage2 = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
            dilated = [block(wide, wide, dilation=dilation) for dilation in (1, 2, 4)]
            self.stage3 = nn.Sequential(block(2 * width, wide, 2), *dilated)
            self.fuse_quarter, self.fuse_half = block(wide + 2 * width, 2 * width), block(3 * width, 2 * width)
            self.head = nn.Conv2d(2 * width, NUM_LABELS, 1)

        def forward(self, pixel_values: Tensor) -> SegmentationLogits:
            half = self.stage1(pixel_values)
            quarter = self.stage2(half)
            features = self.fuse_quarter(torch.cat([quarter, resize(self.stage3(quarter), quarter)], 1))
            features = self.fuse_half(torch.cat([half, resize(features, half)], 1))
            return SegmentationLogits(resize(self.head(features), pixel_values), None)

    return SmallNetwork()


def train_network(images: Any, *, is_sar: bool, steps: int, seed: int = 0) -> Any:
    """Train the small network: crop 128, batch 8, cross entropy, AdamW with one cycle up to 3e-3."""
    import torch
    from tqdm import tqdm

    from hf_seg.data.dataloaders import AugmentedStream, train_dataloader
    from hf_seg.data.transforms import optical_transform, sar_transform
    from hf_seg.losses import cross_entropy

    torch.manual_seed(seed)
    network = small_network().train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    transform = (sar_transform if is_sar else optical_transform)(CROP, scale_range=(0.75, 1.5))
    loader = train_dataloader(AugmentedStream(images, transform, seed), start=0, stop=8 * steps, batch_size=8)
    for batch in tqdm(loader, desc="training", unit="step", leave=False):
        loss = cross_entropy(network(batch["pixel_values"]).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def image_features() -> Any:
    """Return the columns of a dataset of labelled images."""
    import datasets

    features = {"image_id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Image(mode="L")}
    return datasets.Features(features)


def labelled_images(rows: Sequence[Any], column: str, labels: Path | None = None) -> Any:
    """Return images with their labels.

    Args:
        rows: of a scan.
        column: of the images.
        labels: folder of other labels than those of the rows.
    """
    import datasets

    from hf_seg.data.samples import LabelledImages

    columns = {
        "image_id": [row.image_id for row in rows],
        "image": [row.files[column] for row in rows],
        "label": [str(labels / f"{row.image_id}.tif") if labels else row.files["label"] for row in rows],
    }
    return LabelledImages(datasets.Dataset.from_dict(columns, features=image_features()), "image")


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
        network = train_network(images, is_sar=name != "optical", steps=options.steps, seed=options.seed)
        print(f"{name}: {len(images)} scenes, {options.steps} steps")
        for title, test in tests.items():
            print_score(network, title, test)


def run_resolution(options: argparse.Namespace) -> None:
    """Train on optical source tiles; score on target scenes that are rendered sharp and coarse."""
    import datasets
    from PIL import Image

    from hf_seg.data.samples import LabelledImages
    from hf_seg.data.scan import scan_open_earth_map
    from hf_seg.synthetic import Scene
    from hf_seg.synthetic.optical import TARGET_CAMERA, render_optical

    rows = scan_open_earth_map(options.data / SOURCE_FOLDER).rows["train"]
    made_with = json.loads((options.data / SOURCE_FOLDER / "dataset.json").read_text(encoding="utf-8"))["settings"]
    network = train_network(labelled_images(rows, "image"), is_sar=False, steps=options.steps, seed=options.seed)
    print(f"optical: {len(rows)} scenes, {options.steps} steps")
    scores = {}
    for name, coarse_prob in (("sharp", 0.0), ("coarse", 1.0)):
        camera = replace(TARGET_CAMERA, coarse_prob=coarse_prob)
        columns: dict[str, list[Any]] = {"image_id": [], "image": [], "label": []}
        for scene in (Scene(made_with["seed"], "test", index, made_with["size"]) for index in range(options.scenes)):
            ground_rng, optical_rng, *_ = scene.generators()
            ground = scene.make_ground(ground_rng)
            image = np.moveaxis(render_optical(optical_rng, ground, camera), 0, -1)
            columns["image_id"].append(scene.name)
            columns["image"].append(Image.fromarray(image))
            columns["label"].append(Image.fromarray(ground.crop(ground.label)))
        test = LabelledImages(datasets.Dataset.from_dict(columns, features=image_features()), "image")
        scores[name] = print_score(network, f"{name} target", test)
    lost = 100 * (scores["sharp"] - scores["coarse"])
    print(f"lost on coarse scenes: {lost:.1f} points of mIoU")


def print_score(network: Any, title: str, images: Any) -> float:
    """Print and return the mIoU of a network on labelled images."""
    import torch
    from accelerate import Accelerator

    from hf_seg.inference.load import use_network
    from hf_seg.inference.predict import Predictor
    from hf_seg.training.evaluation import evaluate

    predictor = Predictor([use_network(network, crop_size=CROP)], device=torch.device("cpu"), batch_size=8)
    results, _ = evaluate(predictor, images, Accelerator(cpu=True))
    classes = " ".join("-" if value is None else f"{value:.2f}" for value in results["iou"].values())
    print(f"{title} ({len(images)}): mIoU {results['mean_iou']:.3f}, IoU 0..8 {classes}", flush=True)
    return float(results["mean_iou"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line and check that `--data` is a synthetic dataset."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    networks = commands.add_parser("networks", help="train a small network three times, minutes each")
    resolution = commands.add_parser("resolution", help="measure what an optical network loses on coarse images")
    for command in (networks, resolution):
        command.add_argument("--data", metavar="DIR", type=Path, required=True, help="of make_synthetic_dataset.py")
        command.add_argument("--steps", metavar="N", type=int, default=1500, help="training steps (%(default)s)")
        command.add_argument("--seed", metavar="N", type=int, default=0, help="of the training (%(default)s)")
    networks.add_argument("--runs", nargs="+", choices=RUNS, help="only these")
    resolution.add_argument("--scenes", metavar="N", type=int, default=40, help="scenes to score (%(default)s)")
    options = parser.parse_args(arguments)
    for name, low in (("steps", 2), ("scenes", 1)):
        if getattr(options, name, low) < low:
            raise UserError(f"--{name} must be at least {low}; it is {getattr(options, name)}")
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
