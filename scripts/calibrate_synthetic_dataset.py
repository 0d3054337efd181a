"""Compare a synthetic dataset with real scenes.

    python scripts/make_synthetic_dataset.py --output data/synthetic --seed 7 --source 56 --train 48 --val 12
    python scripts/calibrate_synthetic_dataset.py statistics --data data/synthetic [--real REAL]
    python scripts/calibrate_synthetic_dataset.py figure --data data/synthetic --real REAL --output comparison.png

REAL is a folder of real scenes in the layout of OpenEarthMap-SAR (dfc25_track1), with optical images in train.

`statistics` prints class frequencies, SAR levels and local variation per class, label noise, and the mIoU of two simple
classifiers on unseen scenes. Pixels where SAR is 0 are nodata and not measured, nor are classes of under 1000 pixels.
`figure` draws real and synthetic scenes side by side, their histograms and power spectra.
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import cv2
import numpy as np

from hf_seg.errors import DatasetError, one_line_errors
from hf_seg.files import atomic_file
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.settings import Parser
from hf_seg.synthetic import EXTRA_FOLDER, SOURCE_FOLDER, TARGET_FOLDER, check_synthetic_dataset

CLASSES = range(1, OPEN_EARTH_MAP.num_labels)
MIN_PIXELS = 1000
N_FIT, N_SCORE = 5, 4  # scenes


class Tile(NamedTuple):
    """One scene; `noisy` is its simulated noisy label, if it has one."""

    sar: np.ndarray  # (H, W) uint8
    label: np.ndarray  # (H, W) uint8
    optical: np.ndarray | None  # (H, W, 3) uint8
    noisy: np.ndarray | None


class SARStatistics(NamedTuple):
    """SAR levels of one class, pooled over scenes."""

    mean: float
    std: float
    percentiles: tuple[float, ...]  # 5, 50, 95, 99
    local_cv: float  # median of std / mean over the windows that lie inside the class; NaN if none does


def sar_statistics(tiles: Sequence[Tile]) -> dict[int, SARStatistics]:
    """Measure the classes that occur in `tiles`."""
    from hf_seg.studies.baselines import WINDOW, local_moments

    result = {}
    window = np.ones((WINDOW, WINDOW), np.uint8)
    for index in CLASSES:
        levels, ratios = [], []
        for tile in tiles:
            inside = (tile.label == index) & (tile.sar > 0)
            mean, deviation = local_moments(tile.sar)
            pure = cv2.erode(inside.astype(np.uint8), window) > 0
            levels.append(tile.sar[inside])
            ratios.append((deviation / np.maximum(mean, 1))[pure])
        pixels, ratio = np.concatenate(levels), np.concatenate(ratios)
        if len(pixels) >= MIN_PIXELS:
            percentiles = tuple(np.percentile(pixels, (5, 50, 95, 99)).tolist())
            local_cv = float(np.median(ratio)) if len(ratio) else np.nan
            result[index] = SARStatistics(float(pixels.mean()), float(pixels.std()), percentiles, local_cv)
    return result


def optical_statistics(tiles: Sequence[Tile]) -> dict[int, tuple[float, ...]]:
    """Return {class: (R, G, B, std)}; std is the mean over the three channels."""
    result = {}
    images = [(tile.optical, tile.label) for tile in tiles if tile.optical is not None]
    for index in CLASSES if images else ():
        pixels = np.concatenate([image[label == index] for image, label in images])
        if len(pixels) >= MIN_PIXELS:
            result[index] = (*pixels.mean(0).tolist(), float(pixels.std(0).mean()))
    return result


def segment_sizes(labels: Sequence[np.ndarray]) -> dict[int, float]:
    """Return {class: mean area in pixels of its connected segments}."""
    result = {}
    for index in CLASSES:
        counts = [cv2.connectedComponents((label == index).astype(np.uint8), connectivity=4)[0] - 1 for label in labels]
        area = sum(int((label == index).sum()) for label in labels)
        result[index] = area / max(sum(counts), 1)
    return result


def difficulty(tiles: Sequence[Tile], feature: str, repeats: int = 10) -> np.ndarray:
    """Return the mIoU of the histogram on random disjoint sets of more than `N_FIT` scenes: (repeats,)."""
    from hf_seg.studies.baselines import score_histogram

    rng = np.random.default_rng(0)
    scores = []
    for _ in range(repeats):
        shuffled = [(tiles[i].sar, tiles[i].label) for i in rng.permutation(len(tiles))]
        scores.append(score_histogram(shuffled[:N_FIT], shuffled[N_FIT : N_FIT + N_SCORE], feature))
    return np.array(scores)


def read(path: str | Path, column: str) -> np.ndarray:
    """Return the pixels of an image (H, W, 3) or of SAR or a label (H, W)."""
    from hf_seg.data.tile_files import read_tile

    return np.moveaxis(read_tile(str(path), column), 0, -1).squeeze()


def read_scenes(folder: Path, splits: Iterable[str]) -> list[Tile]:
    """Read splits of OpenEarthMap-SAR, real or synthetic, with the exact labels of train if they exist."""
    from hf_seg.data.scan import scan_open_earth_map_sar

    tiles, rows = [], scan_open_earth_map_sar(folder).rows
    clean = folder.parent / EXTRA_FOLDER / "train_clean_labels"
    for split in splits:
        for row in rows[split]:
            if row.files["label"] is None:
                raise DatasetError(f"{folder}: {split} has no labels; they are needed for the statistics")
            pixels = {column: read(path, column) for column, path in row.files.items() if path is not None}
            exact, noisy = pixels["label"], None
            if split == "train" and clean.is_dir():
                exact, noisy = read(clean / f"{row.image_id}.tif", "label"), exact
            tiles.append(Tile(pixels["sar"], exact, pixels.get("optical"), noisy))
    if not tiles:
        raise DatasetError(f"{folder}: no tiles in {' or '.join(splits)}")
    return tiles


def print_statistics(name: str, tiles: list[Tile]) -> None:
    """Print the statistics of one set of scenes."""
    from hf_seg.metrics import ConfusionMatrix

    levels = np.concatenate([tile.sar.ravel() for tile in tiles])
    means = [tile.sar[tile.sar > 0].mean() for tile in tiles]
    print(f"\n{name}: {len(tiles)} scenes")
    print(f"SAR mean {levels.mean():.1f} std {levels.std():.1f}, zeros {100 * (levels == 0).mean():.2f} %, percentiles")
    print("  1 5 25 50 75 95 99 99.9:", np.percentile(levels, (1, 5, 25, 50, 75, 95, 99, 99.9)).round().astype(int))
    print("  scene means p5 p50 p95:", np.percentile(means, (5, 50, 95)).round(1), f"from {min(means):.1f}")
    sar, sizes, optical = (
        sar_statistics(tiles),
        segment_sizes([tile.label for tile in tiles]),
        optical_statistics(tiles),
    )
    noise = ConfusionMatrix()
    for tile in tiles:
        if tile.noisy is not None:
            noise.update(tile.noisy, tile.label)
    counts = np.bincount(np.concatenate([tile.label.ravel() for tile in tiles]), minlength=OPEN_EARTH_MAP.num_labels)
    percent, confusion, iou = 100 * counts / counts.sum(), noise.matrix, noise.compute()["iou"]
    print("class            pixels segment | SAR mean/std   p5/p50/p95/p99  CV   | RGB (std)        | agreement / IoU")
    for index in CLASSES:
        line = f"{OPEN_EARTH_MAP.names[index]:16s} {percent[index]:5.1f}% {sizes[index]:7.0f} | "
        if index in sar:
            mean, std, percentiles, cv = sar[index]
            line += f"{mean:5.1f}/{std:4.1f}  {'/'.join(f'{p:.0f}' for p in percentiles):>15s}  {cv:.2f} | "
        if index in optical:
            red, green, blue, std = optical[index]
            line += f"{red:.0f},{green:.0f},{blue:.0f} ({std:.0f})"
        if confusion[index].sum():
            line += (
                f" | {confusion[index, index] / confusion[index].sum():.3f} / {iou[OPEN_EARTH_MAP.names[index]]:.3f}"
            )
        print(line)
    for feature in ("level", "window") if len(tiles) > N_FIT else ():
        scores = difficulty(tiles, feature)
        print(f"mIoU of the {feature} histogram on unseen scenes: {scores.mean():.3f} (std {scores.std():.3f})")


def run_statistics(options: argparse.Namespace) -> None:
    """Print the statistics of the synthetic dataset, and of real scenes if given."""
    from hf_seg.data.scan import scan_open_earth_map

    folders = {"synthetic": options.data / TARGET_FOLDER} | ({"real": options.real} if options.real else {})
    for name, folder in folders.items():
        print_statistics(name, read_scenes(folder, ("train", "val")))
    rows = scan_open_earth_map(options.data / SOURCE_FOLDER).rows["train"]
    pixels = np.concatenate([read(str(row.files["image"]), "image").reshape(-1, 3) for row in rows])
    print(f"\nsource optical: mean {pixels.mean(0).round(1)} std {pixels.std(0).round(1)}")


def run_figure(options: argparse.Namespace) -> None:
    """Draw real scenes beside synthetic ones, their histograms and power spectra."""
    from matplotlib.figure import Figure

    sets = {
        "real": read_scenes(options.real, ("train",)),
        "synthetic": read_scenes(options.data / TARGET_FOLDER, ("train",)),
    }
    rows = 6
    figure = Figure(figsize=(15, 2.5 * rows + 4.4), dpi=100, layout="constrained")
    upper, lower = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(2.5 * rows, 4.4)))
    draw_scenes(upper.subplots(rows, 6), sets)
    draw_statistics(lower.subplots(1, 4), sets)
    with atomic_file(options.output) as file:
        figure.savefig(file, format="png")
    print(options.output)


def draw_scenes(grid: np.ndarray, sets: dict[str, list[Tile]]) -> None:
    """Draw SAR, optical image and label of a scene per row, three columns per set."""
    from hf_seg.report.style import colorize

    side = min(tile.sar.shape[0] for tile in sets["synthetic"])
    for column, (name, tiles) in enumerate(sets.items()):
        for row in range(len(grid)):
            # there are few real scenes, so two rows may show two corners of one
            tile, corner = tiles[row % len(tiles)], slice(0, side) if row < len(tiles) else slice(-side, None)
            sar = np.clip(tile.sar[corner, corner] / 160, 0, 1) ** 0.7
            optical = np.zeros((side, side, 3), np.uint8) if tile.optical is None else tile.optical[corner, corner]
            images = {"SAR": sar, "optical": optical, "label": colorize(tile.label[corner, corner])}
            for axes, (title, image) in zip(grid[row, 3 * column :], images.items(), strict=False):
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                if row == 0:
                    axes.set_title(f"{name}: {title}", fontsize=11)


def draw_statistics(panels: np.ndarray, sets: dict[str, list[Tile]]) -> None:
    """Draw SAR levels, their percentiles per class, and the power spectra of SAR and optical images."""
    from hf_seg.studies.power_spectra import RINGS, power_spectrum

    level_axes, class_axes, sar_axes, optical_axes = panels
    for offset, (name, tiles) in zip((-0.15, 0.15), sets.items(), strict=True):
        color = {"real": "#1b1b1b", "synthetic": "#c8553d"}[name]
        counts = np.bincount(np.concatenate([tile.sar.ravel() for tile in tiles]), minlength=256)
        level_axes.plot(np.arange(1, 256), counts[1:] / counts[1:].sum(), color=color, label=name)
        for index, classes in sar_statistics(tiles).items():
            class_axes.plot([index + offset] * 2, classes.percentiles[:3:2], color=color)
            class_axes.plot(index + offset, classes.mean, "o", color=color, markersize=5)
        groups = [tile.sar for tile in tiles], [tile.optical.mean(-1) for tile in tiles if tile.optical is not None]
        for axes, group in zip((sar_axes, optical_axes), groups, strict=True):
            squares = (image[: min(image.shape), : min(image.shape)] for image in group)
            spectra = [power_spectrum(image) / image.var() for image in squares]
            if spectra:
                axes.loglog(RINGS, np.exp(np.mean(np.log(spectra), 0)), color=color)
            axes.set_xticks([0.02, 0.1, 0.5], ["0.02", "0.1", "0.5"])
            axes.set_xticks([], minor=True)
    level_axes.set(title="SAR level, fraction of pixels", xlim=(0, 200))
    level_axes.legend(frameon=False)
    class_axes.set(title="SAR per class: mean, p5 to p95", ylim=(0, None))
    class_axes.set_xticks(CLASSES, [OPEN_EARTH_MAP.names[index] for index in CLASSES], rotation=60, ha="right")
    sar_axes.set(title="power spectrum, SAR", xlabel="cycles per pixel")
    optical_axes.set(title="power spectrum, optical", xlabel="cycles per pixel")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line and check that `--data` is a synthetic dataset."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    statistics = commands.add_parser("statistics", help="print statistics and the scores of simple classifiers")
    figure = commands.add_parser("figure", help="draw real and synthetic scenes side by side")
    for command in (statistics, figure):
        command.add_argument("--data", metavar="DIR", type=Path, required=True, help="of make_synthetic_dataset.py")
    statistics.add_argument("--real", metavar="DIR", type=Path, help="real scenes, measured too")
    figure.add_argument("--real", metavar="DIR", type=Path, required=True, help="real scenes")
    figure.add_argument("--output", metavar="PNG", type=Path, required=True, help="image to write")
    options = parser.parse_args(arguments)
    check_synthetic_dataset(options.data)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake is one line on stderr."""
    with one_line_errors():
        options = parse(arguments)
        from rasterio.errors import NotGeoreferencedWarning

        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        {"statistics": run_statistics, "figure": run_figure}[options.command](options)


if __name__ == "__main__":
    main()
