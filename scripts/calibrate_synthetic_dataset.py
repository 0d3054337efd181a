"""Hold the generated world against real scenes and against learners: its statistics, its looks, how hard it is.

    python scripts/make_synthetic_dataset.py --output data/toy --seed 7 --source 56 --train 48 --val 12
    python scripts/calibrate_synthetic_dataset.py statistics --world data/toy [--real REAL]
    python scripts/calibrate_synthetic_dataset.py figure --world data/toy --real REAL --output toy_world.png
    python scripts/calibrate_synthetic_dataset.py networks --world data/toy [--steps 1500] [--runs sar_clean sar_noisy]

REAL is a folder of real scenes in the layout of OpenEarthMap-SAR (dfc25_track1), optical images in train.

`statistics` prints class shares, SAR levels and local variation per class, label noise, and the score of two simple
learners on scenes they have not seen, as hf_seg/synthetic/statistics.py defines them.
`networks` trains a small convolutional network with cross entropy: on SAR with clean and with noisy labels, and on
source optical images, each scored on unseen scenes with clean labels.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import rasterio
import torch
from accelerate import Accelerator
from rasterio.errors import NotGeoreferencedWarning
from torch import Tensor, nn
from tqdm import tqdm

from hf_seg.data.dataloaders import AugmentedStream, train_dataloader
from hf_seg.data.samples import LabelledImages
from hf_seg.data.scan import scan_open_earth_map, scan_open_earth_map_sar
from hf_seg.data.transforms import optical_transform, sar_transform
from hf_seg.errors import DatasetError
from hf_seg.labels import CLASS_NAMES, NUM_LABELS
from hf_seg.losses import cross_entropy
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import SegmentationLogits
from hf_seg.studies.power_spectra import RINGS, power_spectrum
from hf_seg.synthetic import EXTRA_FOLDER, SOURCE_FOLDER, TARGET_FOLDER
from hf_seg.synthetic.statistics import (
    CLASSES,
    difficulty,
    optical_statistics,
    sar_statistics,
    segment_sizes,
)
from hf_seg.training.evaluation import evaluate_network

CROP = 128


class Tile(NamedTuple):
    """One scene; `noisy` is the label a recipe sees where that is not the true one."""

    sar: np.ndarray  # (H, W) uint8
    label: np.ndarray  # (H, W) uint8
    optical: np.ndarray | None  # (H, W, 3) uint8
    noisy: np.ndarray | None


def read(path: str | Path) -> np.ndarray:
    """Return (H, W) or (H, W, 3) pixels."""
    with rasterio.open(path) as file:
        return np.moveaxis(file.read(), 0, -1).squeeze()


def read_scenes(folder: Path, split: str) -> list[Tile]:
    """Read a split of OpenEarthMap-SAR, real or generated, with the true labels where the world has them."""
    tiles = []
    extra = folder.parent / EXTRA_FOLDER
    for row in scan_open_earth_map_sar(folder).rows[split]:
        label, optical, noisy = read(str(row.files["label"])), row.files["optical"], None
        if (clean := extra / f"{split}_clean_labels" / f"{row.image_id}.tif").is_file():
            label, noisy = read(clean), label
        tiles.append(Tile(read(str(row.files["sar"])), label, None if optical is None else read(optical), noisy))
    return tiles


def print_statistics(name: str, tiles: list[Tile]) -> None:
    """Print what the module's docstring names, for one set of scenes."""
    levels = np.concatenate([tile.sar.ravel() for tile in tiles])
    means = [tile.sar[tile.sar > 0].mean() for tile in tiles]
    print(f"\n{name}: {len(tiles)} scenes")
    print(f"SAR mean {levels.mean():.1f} std {levels.std():.1f}, zeros {100 * (levels == 0).mean():.2f} %, percentiles")
    print("  1 5 25 50 75 95 99 99.9:", np.percentile(levels, (1, 5, 25, 50, 75, 95, 99, 99.9)).round().astype(int))
    print("  scene means p5 p50 p95:", np.percentile(means, (5, 50, 95)).round(1), f"from {min(means):.1f}")
    sar, sizes = sar_statistics(tiles), segment_sizes([tile.label for tile in tiles])
    optical = optical_statistics([(tile.optical, tile.label) for tile in tiles if tile.optical is not None])
    noise = ConfusionMatrix()
    for tile in tiles:
        if tile.noisy is not None:
            noise.update(tile.noisy, tile.label)
    shares = np.bincount(np.concatenate([tile.label.ravel() for tile in tiles]), minlength=NUM_LABELS)
    shares = 100 * shares / shares.sum()
    iou, counts = noise.compute()["iou"], noise.matrix
    print("class            share  segment | SAR mean/std   p5/p50/p95/p99  CV   | RGB (std)        | agreement / IoU")
    for index in CLASSES:
        line = f"{CLASS_NAMES[index]:16s} {shares[index]:5.1f} {sizes[index]:8.0f} | "
        if index in sar:
            mean, std, percentiles, cv = sar[index]
            line += f"{mean:5.1f}/{std:4.1f}  {'/'.join(f'{p:.0f}' for p in percentiles):>15s}  {cv:.2f} | "
        if index in optical:
            red, green, blue, std = optical[index]
            line += f"{red:.0f},{green:.0f},{blue:.0f} ({std:.0f})"
        if counts[index].sum():
            line += f" | {counts[index, index] / counts[index].sum():.3f} / {iou[CLASS_NAMES[index]]:.3f}"
        print(line)
    for feature in ("level", "window"):
        scores = difficulty(tiles, feature)
        print(f"mIoU of the {feature} histogram on unseen scenes: {scores.mean():.3f} (std {scores.std():.3f})")


def run_statistics(options: argparse.Namespace) -> None:
    """Print the statistics of the generated world, and of real scenes where there are some."""
    folders = {"generated": options.world / TARGET_FOLDER} | ({"real": options.real} if options.real else {})
    for name, folder in folders.items():
        print_statistics(name, [tile for split in ("train", "val") for tile in read_scenes(folder, split)])
    rows = scan_open_earth_map(options.world / SOURCE_FOLDER).rows["train"]
    images = [(read(str(row.files["image"])), read(str(row.files["label"]))) for row in rows]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in images])
    print(f"\nsource optical: mean {pixels.mean(0).round(1)} std {pixels.std(0).round(1)}")


def run_figure(options: argparse.Namespace) -> None:
    """Draw real tiles beside generated ones, their histograms and power spectra."""
    from matplotlib.figure import Figure

    from hf_seg.report.plots import colorize

    folders = {"real": options.real, "generated": options.world / TARGET_FOLDER}
    sets = {name: read_scenes(folder, "train") for name, folder in folders.items()}
    rows, side = 6, min(tile.sar.shape[0] for tile in sets["generated"])
    figure = Figure(figsize=(15, 2.5 * rows + 4.4), dpi=100, layout="constrained")
    upper, lower = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(2.5 * rows, 4.4)))
    grid = upper.subplots(rows, 6)
    for column, (name, tiles) in enumerate(sets.items()):
        for row in range(rows):
            # few real scenes, so two rows may show two corners of one
            tile, corner = tiles[row % len(tiles)], slice(0, side) if row < len(tiles) else slice(-side, None)
            sar = np.clip(tile.sar[corner, corner] / 160, 0, 1) ** 0.7
            optical = np.zeros((side, side, 3), np.uint8) if tile.optical is None else tile.optical[corner, corner]
            images = {"SAR": sar, "optical": optical, "label": colorize(tile.label[corner, corner])}
            for k, (title, image) in enumerate(images.items()):
                axes = grid[row, 3 * column + k]
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                if row == 0:
                    axes.set_title(f"{name}: {title}", fontsize=11)
    level_axes, class_axes, sar_axes, optical_axes = lower.subplots(1, 4)
    for offset, (name, tiles) in zip((-0.15, 0.15), sets.items(), strict=True):
        color = {"real": "#1b1b1b", "generated": "#c8553d"}[name]
        counts = np.bincount(np.concatenate([tile.sar.ravel() for tile in tiles]), minlength=256)
        level_axes.plot(np.arange(1, 256), counts[1:] / counts[1:].sum(), color=color, label=name)
        for index, classes in sar_statistics(tiles).items():
            class_axes.plot([index + offset] * 2, classes.percentiles[:3:2], color=color)
            class_axes.plot(index + offset, classes.mean, "o", color=color, markersize=5)
        groups = [tile.sar for tile in tiles], [tile.optical.mean(-1) for tile in tiles if tile.optical is not None]
        for axes, group in zip((sar_axes, optical_axes), groups, strict=True):
            squares = (image[: min(image.shape), : min(image.shape)] for image in group)
            spectra = [power_spectrum(image) / image.var() for image in squares]
            axes.loglog(RINGS, np.exp(np.mean(np.log(spectra), 0)), color=color)
            axes.set_xticks([0.02, 0.1, 0.5], ["0.02", "0.1", "0.5"])
            axes.set_xticks([], minor=True)
    level_axes.set(title="SAR level, share of pixels", xlim=(0, 200))
    level_axes.legend(frameon=False)
    class_axes.set(title="SAR per class: mean, p5 to p95", ylim=(0, None))
    class_axes.set_xticks(CLASSES, [CLASS_NAMES[index] for index in CLASSES], rotation=60, ha="right")
    sar_axes.set(title="power spectrum, SAR", xlabel="cycles per pixel")
    optical_axes.set(title="power spectrum, optical", xlabel="cycles per pixel")
    figure.savefig(options.output)
    print(options.output)


def as_rows(tiles: list[tuple[str, Any, Any]]) -> Any:
    """Return a dataset {image_id, image, label} of files."""
    import datasets

    names, images, labels = zip(*tiles, strict=True)
    columns = {"image_id": list(names), "image": list(map(str, images)), "label": list(map(str, labels))}
    features = datasets.Features(
        {"image_id": datasets.Value("string"), "image": datasets.Image(), "label": datasets.Image(mode="L")}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def block(width_in: int, width_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return convolution, normalisation and activation."""
    convolution = nn.Conv2d(width_in, width_out, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU())


def resize(features: Tensor, like: Tensor) -> Tensor:
    """Resize (B, C, H, W) to another tensor's height and width."""
    return nn.functional.interpolate(features, size=like.shape[-2:], mode="bilinear")


class SmallNetwork(nn.Module):
    """Half a million weights that a core trains in minutes: three strides, dilated context, two skips."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        wide = 4 * width
        self.stage1 = nn.Sequential(block(3, width, 2), block(width, width))
        self.stage2 = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
        dilated = [block(wide, wide, dilation=dilation) for dilation in (1, 2, 4)]
        self.stage3 = nn.Sequential(block(2 * width, wide, 2), *dilated)
        self.fuse_quarter, self.fuse_half = block(wide + 2 * width, 2 * width), block(3 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, NUM_LABELS, 1)

    def forward(self, pixel_values: Tensor) -> SegmentationLogits:
        """Map (B, 3, H, W) to logits."""
        half = self.stage1(pixel_values)
        quarter = self.stage2(half)
        features = self.fuse_quarter(torch.cat([quarter, resize(self.stage3(quarter), quarter)], 1))
        features = self.fuse_half(torch.cat([half, resize(features, half)], 1))
        return SegmentationLogits(resize(self.head(features), pixel_values), None)


def train_network(images: Any, *, is_sar: bool, steps: int, seed: int = 0) -> Any:
    """Train the small network: crop 128, batch 8, cross entropy, AdamW with one cycle up to 3e-3."""
    torch.manual_seed(seed)
    network = SmallNetwork().train()
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


def run_networks(options: argparse.Namespace) -> None:
    """Train on SAR with clean and with noisy labels, and on source optical; score on unseen scenes, clean labels."""
    source, target = options.world / SOURCE_FOLDER, options.world / TARGET_FOLDER
    extra = options.world / EXTRA_FOLDER
    train, val = (scan_open_earth_map_sar(target).rows[split] for split in ("train", "val"))
    clean = [(row.image_id, row.files["sar"], extra / "train_clean_labels" / f"{row.image_id}.tif") for row in train]
    noisy = [(row.image_id, row.files["sar"], row.files["label"]) for row in train]
    unseen = [(row.image_id, row.files["sar"], row.files["label"]) for row in val]
    optical = [(row.image_id, row.files["optical"], row.files["label"]) for row in val]
    lists = scan_open_earth_map(source).rows
    source_train, source_val = (
        [(row.image_id, row.files["image"], row.files["label"]) for row in lists[split]] for split in ("train", "val")
    )
    runs = {
        "sar_clean": (clean, {"unseen SAR": unseen}),
        "sar_noisy": (noisy, {"unseen SAR": unseen}),
        "optical": (source_train, {"unseen source": source_val, "unseen target": optical}),
    }
    for name in options.runs or runs:
        files, tests = runs[name]
        images = LabelledImages(as_rows(files), "image")
        network = train_network(images, is_sar=name != "optical", steps=options.steps)
        window = {"window": CROP, "stride": CROP // 2, "batch_size": 8}
        for title, test in tests.items():
            results = evaluate_network(network, LabelledImages(as_rows(test), "image"), Accelerator(cpu=True), **window)
            classes = " ".join("-" if value is None else f"{value:.2f}" for value in results["iou"].values())
            print(f"{name}, {len(files)} scenes, {options.steps} steps, {title} ({len(test)}): ", end="")
            print(f"mIoU {results['mean_iou']:.3f}, IoU 0..8 {classes}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    options = build_parser().parse_args(arguments)
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    try:
        {"statistics": run_statistics, "figure": run_figure, "networks": run_networks}[options.command](options)
    except (DatasetError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    statistics = commands.add_parser("statistics", help="print statistics and simple learners' scores")
    figure = commands.add_parser("figure", help="draw real and generated scenes beside each other")
    networks = commands.add_parser("networks", help="train a small network three times, minutes each")
    for command in (statistics, figure, networks):
        command.add_argument("--world", metavar="DIR", type=Path, required=True, help="of make_synthetic_dataset.py")
    statistics.add_argument("--real", metavar="DIR", type=Path, help="real scenes, printed beside it")
    figure.add_argument("--real", metavar="DIR", type=Path, required=True, help="real scenes")
    figure.add_argument("--output", metavar="PNG", type=Path, required=True, help="image to write")
    networks.add_argument("--steps", metavar="N", type=int, default=1500, help="training steps (%(default)s)")
    names = ("sar_clean", "sar_noisy", "optical")
    networks.add_argument("--runs", nargs="+", choices=names, help="only these")
    return parser


if __name__ == "__main__":
    sys.exit(main())
