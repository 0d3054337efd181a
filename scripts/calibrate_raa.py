"""Propose the settings of resolution alignment (RAA) from two folders of optical images, and show what they do.

    python scripts/calibrate_raa.py data/OpenEarthMap_wo_xBD data/dfc25_track1 --output runs/raa

prints `raa_prob`, `raa_min_scale` and `raa_max_scale` for a stage-1 recipe, and writes to DIR

    raa.json      the proposal, the reasons, the figures behind it and the ratio that each target image resembles
    spectra.png   power spectra of source, target and aligned source, and the ratios that the images resemble
    examples.png  source | the same, aligned | target, pixel by pixel

A folder is searched for GeoTIFF, PNG and JPEG; of OpenEarthMap the images are taken, of OpenEarthMap-SAR the optical
ones of train.
The proposal is the mixture of sharp and aligned source images whose radial power spectra make the target's most
likely (hf_seg/report/power_spectra.py, which also says what deceives it: JPEG above all). Measured at each image's own
pixels: a recipe that zooms source and target differently needs other ratios.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import rasterio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from tqdm import tqdm

from hf_seg.data.transforms import align_resolution
from hf_seg.errors import UserError, one_line_errors
from hf_seg.report.plots import DPI, save_figure, style_axes
from hf_seg.studies import power_spectra as spectra
from hf_seg.studies.power_spectra import Mixture, Spectra

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
UNALIGNED = Mixture(0.0, 0.5, 1.0)
MAX_PROB, MIN_PROB = 0.8, 0.05  # what is worth proposing
FEW_IMAGES = 20
SHARPER_DB = 1.5  # halves of one domain differ by up to 0.7
COLORS = {"source": "#3572b0", "target": "#1b1b1b", "aligned": "#c8553d"}


class ImageSet(NamedTuple):
    """The images of a domain that can be measured, and what was measured."""

    folder: Path
    files: list[Path]
    spectra: Spectra  # source: (N, len(RATIOS), ...); target: (N, ...)

    @property
    def unaligned(self) -> Spectra:
        """The images as they are."""
        power, noise = self.spectra
        return self.spectra if noise.ndim == 1 else Spectra(power[:, -1], noise[:, -1])


class Proposal(NamedTuple):
    """What to set, and the sentences that say why."""

    mixture: Mixture
    reasons: list[str]

    def as_yaml(self) -> str:
        """Lines for the recipe's settings."""
        prob, low, high = self.mixture
        scales = f"\nraa_min_scale: {low:.2f}\nraa_max_scale: {high:.2f}" if prob else ""
        return f"raa_prob: {prob:.2f}{scales}"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE_IMAGES", type=Path, help="folder of the labelled domain's images")
    parser.add_argument("target", metavar="TARGET_IMAGES", type=Path, help="folder of the other domain's images")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the three files")
    parser.add_argument(
        "--max_images", metavar="N", type=int, default=200, help="measured of each, spread evenly (200)"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, propose, show."""
    args = parse()
    if args.max_images < 1:
        raise UserError(f"--max_images must be at least 1; it is {args.max_images}")
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    source = measure_folder(args.source, args.max_images, aligned=True)
    target = measure_folder(args.target, args.max_images, aligned=False)
    costs = spectra.ratio_costs(target.spectra, spectra.reference_curves(source.spectra))
    ratios = spectra.RATIOS[costs.argmin(1)]
    proposal = propose(source, target, spectra.fit_mixture(costs))
    args.output.mkdir(parents=True, exist_ok=True)
    report, curves, examples = (args.output / name for name in ("raa.json", "spectra.png", "examples.png"))
    content = describe(source, target, proposal, ratios)
    report.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw_spectra(source, target, proposal.mixture, ratios, curves)
    draw_examples(source, target, proposal.mixture, ratios, examples)
    print(*proposal.reasons, "", proposal.as_yaml(), "", report, curves, examples, sep="\n")


def find_images(folder: Path) -> list[Path]:
    """List the images under a folder; of OpenEarthMap the `images`, of OpenEarthMap-SAR the optical ones of train."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass one that holds {', '.join(SUFFIXES)} images")
    folder = optical if (optical := folder / "train/rgb_images").is_dir() else folder
    files = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())
    files = [path for path in files if path.parent.name == "images"] or files
    if not files:
        raise UserError(f"{folder}: no image in it or below; looked for {', '.join(SUFFIXES)}")
    return files


def read_image(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8."""
    try:
        with rasterio.open(path) as file:
            bands = file.read()
    except RasterioError as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); remove it or download it again") from None
    if len(bands) < 3 or bands.dtype != np.uint8:
        hint = "pass a folder of optical images, converted with gdal_translate -ot Byte -scale if need be"
        raise UserError(f"{path}: expected 3 bands of uint8, found {len(bands)} of {bands.dtype}; {hint}")
    return np.ascontiguousarray(np.moveaxis(bands[:3], 0, -1))


def luminance(image: np.ndarray) -> np.ndarray:
    """Return (H, W) float32 of (H, W, 3) uint8."""
    return cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY)


def measure_folder(folder: Path, max_images: int, *, aligned: bool) -> ImageSet:
    """Measure a folder's images, at all ratios if `aligned`; those without a usable patch are left out."""
    files = find_images(folder)
    chosen = np.linspace(0, len(files) - 1, min(max_images, len(files))).round().astype(int)
    measured = []
    for path in tqdm([files[index] for index in chosen], desc=folder.name, unit="image"):
        image = read_image(path)
        if windows := spectra.choose_patches(image):
            measure = spectra.measure_aligned if aligned else spectra.measure
            measured.append((path, measure(luminance(image), windows)))
    if not measured:
        side = spectra.PATCH
        height, width = image.shape[:2]
        raise UserError(
            f"{folder}: no image shows {side} x {side} pixels of varied ground without nodata; "
            f"{path.name} is {height} x {width}. Pass larger or uncropped images"
        )
    return ImageSet(folder, [path for path, _ in measured], spectra.stack([one for _, one in measured]))


def propose(source: ImageSet, target: ImageSet, mixture: Mixture) -> Proposal:
    """Turn the likeliest mixture into settings within sensible limits, and say why."""
    share, low, high = mixture
    capped = Mixture(min(share, MAX_PROB), low, high)
    detail = sharpness_db(target) - sharpness_db(source)
    before, after = (gap(source, target, one) for one in (UNALIGNED, capped))
    helps = share >= MIN_PROB and after < before
    if helps:
        reasons = [
            f"{share:.0%} of the target's images look like source images aligned by ratios of {low:.2f} to {high:.2f}; "
            f"the spectra are {before:.1f} dB apart, {after:.1f} dB after alignment."
        ]
        if share > MAX_PROB:
            reasons.append(f"The probability is held at {MAX_PROB}: small objects are learned from sharp images.")
        if low <= spectra.RATIOS[0]:
            reasons.append(f"Some may be blurrier still; below a ratio of {low:.2f} labels fit no image any more.")
    elif share >= MIN_PROB:
        reasons = [
            f"The target seems blurrier, but aligned source images resemble it no more ({before:.1f} dB apart, "
            f"{after:.1f} dB after alignment): the gap is of another kind, such as content or noise."
        ]
    elif detail > SHARPER_DB:
        reasons = [
            f"The target is sharper than the source ({detail:+.1f} dB of fine detail), and alignment cannot sharpen. "
            "Swap the folders to see how far the target would have to be blurred, or enlarge the source."
        ]
    else:
        reasons = [f"The target is not measurably blurrier than the source ({detail:+.1f} dB of fine detail)."]
    return Proposal(capped if helps else UNALIGNED, reasons + cautions(source, target))


def cautions(source: ImageSet, target: ImageSet) -> list[str]:
    """Say what the proposal leaves open."""
    grain = [noise_levels(one) for one in (source, target)]
    noisier = grain[1] > 1.5 * grain[0] + 0.5
    noise = f"The target is noisier ({grain[1]:.1f} against {grain[0]:.1f} grey levels), which RAA does not change."
    few = [one for one in (source, target) if len(one.files) < FEW_IMAGES]
    hint = "{} has only {} usable images: take this as a hint."
    return [noise] * noisier + [hint.format(one.folder, len(one.files)) for one in few]


def sharpness_db(images: ImageSet) -> float:
    """Return the median image's fine detail over its coarse detail."""
    return float(np.median(spectra.sharpness(images.unaligned)))


def noise_levels(images: ImageSet) -> float:
    """Return the standard deviation of the median image's noise in grey levels."""
    return float(np.sqrt(np.median(images.unaligned.noise)))


def gap(source: ImageSet, target: ImageSet, mixture: Mixture) -> float:
    """Return how far the source's spectra, aligned by `mixture`, are from the target's, in dB."""
    return spectra.mismatch(spectra.image_bands(target.spectra), spectra.mixture_bands(source.spectra, mixture))


def describe(source: ImageSet, target: ImageSet, proposal: Proposal, ratios: np.ndarray) -> dict[str, Any]:
    """Return the content of raa.json."""
    prob, low, high = proposal.mixture
    mixtures = {"before": UNALIGNED, "after": proposal.mixture}
    sets = {"source": source, "target": target}
    return {
        "raa_prob": round(prob, 2),
        "raa_min_scale": round(low, 2) if prob else None,
        "raa_max_scale": round(high, 2) if prob else None,
        "reasons": proposal.reasons,
        "mismatch_db": {when: round(gap(source, target, mixture), 2) for when, mixture in mixtures.items()},
        "n_images": {name: len(one.files) for name, one in sets.items()},
        "sharpness_db": {name: round(sharpness_db(one), 2) for name, one in sets.items()},
        "noise_levels": {name: round(noise_levels(one), 2) for name, one in sets.items()},
        "folders": {name: str(one.folder) for name, one in sets.items()},
        "ratio_percentiles": {str(q): round(float(np.percentile(ratios, q)), 2) for q in (10, 50, 90)},
        "ratios": {
            path.relative_to(target.folder).as_posix(): round(float(ratio), 2)
            for path, ratio in zip(target.files, ratios, strict=True)
        },
    }


def draw_spectra(source: ImageSet, target: ImageSet, mixture: Mixture, ratios: np.ndarray, output: Path) -> None:
    """Draw median spectra with the band of the middle 80 % of images, their difference, and the images' ratios."""
    aimed = spectra.image_bands(target.spectra)
    bands = {
        "source": (spectra.mixture_bands(source.spectra, UNALIGNED), COLORS["source"]),
        "target": (aimed, COLORS["target"]),
    }
    if mixture.prob:
        aligned = spectra.mixture_bands(source.spectra, mixture)
        bands[f"source, {mixture.prob:.0%} aligned"] = (aligned, COLORS["aligned"])
    figure = Figure(figsize=(14, 4.6), dpi=DPI, layout="constrained")
    levels, difference, histogram = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    rings = spectra.RINGS[spectra.SEEN]
    for name, (deciles, color) in bands.items():
        in_db = spectra.DB * deciles[:, spectra.SEEN]
        levels.fill_between(rings, in_db[0], in_db[-1], color=color, alpha=0.15, linewidth=0)
        label = name if deciles is aimed else f"{name}: {spectra.mismatch(deciles, aimed):.1f} dB from the target"
        levels.plot(rings, in_db[4], color=color, linewidth=2, label=label)
        difference.plot(rings, in_db[4] - spectra.DB * aimed[4, spectra.SEEN], color=color, linewidth=2)
    levels.legend(frameon=False, loc="lower left")
    titles = {levels: "power, dB: median and middle 80 % of images", difference: "medians less that of the target, dB"}
    for axes, title in titles.items():
        axes.set_xscale("log")
        axes.set_xlabel("cycles per pixel")
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
        axes.set_xticks([], minor=True)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        style_axes(axes)
    draw_ratios(histogram, mixture, ratios)
    save_figure(figure, output)


def draw_ratios(axes: Axes, mixture: Mixture, ratios: np.ndarray) -> None:
    """Draw how many target images resemble the source most at each ratio."""
    axes.hist(ratios, np.arange(0.075, 1.03, 0.05).tolist(), color=COLORS["target"], alpha=0.75, rwidth=0.85)
    if mixture.prob:
        low, high = mixture.min_ratio, mixture.max_ratio
        span = f"proposed: {low:.2f} to {high:.2f}"
        axes.axvspan(low, high, color=COLORS["aligned"], alpha=0.2, linewidth=0, label=span, zorder=0)
        axes.legend(frameon=False, loc="upper left")
    axes.margins(y=0.2)  # room for the legend
    axes.set(xlim=(0.05, 1.05), xlabel="ratio (1: at least as sharp as the source)")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title("target images by the ratio each fits best", loc="left", fontsize=11, fontweight="bold")
    style_axes(axes)


def draw_examples(source: ImageSet, target: ImageSet, mixture: Mixture, ratios: np.ndarray, output: Path) -> None:
    """Draw source images aligned by the least, middle and largest proposed ratio beside target images like them."""
    wanted = np.linspace(mixture.min_ratio, mixture.max_ratio, 3) if mixture.prob else np.ones(3)
    wanted = wanted[: len(target.files)]
    originals = np.linspace(0, len(source.files) - 1, 2 * len(wanted) + 1).round().astype(int)[1::2]
    left = set(range(len(target.files)))
    figure = Figure(figsize=(11.5, 3.95 * len(wanted)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(wanted), 3, squeeze=False)
    for cells, ratio, index in zip(grid, wanted.tolist(), originals, strict=True):
        like = min(left, key=lambda other: (abs(ratios[other] - ratio), other))
        left.remove(like)
        image, example = read_image(source.files[index]), read_image(target.files[like])
        at = busiest(image)
        images = {
            f"source: {source.files[index].stem}": image[at],
            f"aligned by {ratio:.2f}" if ratio < 1 else "not aligned": align_resolution(image, ratio)[at],
            f"target: {target.files[like].stem}, fits {ratios[like]:.2f}": example[busiest(example)],
        }
        for axes, (title, pixels) in zip(cells, images.items(), strict=True):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(title, loc="left", fontsize=11)
            axes.set(xticks=[], yticks=[])
    save_figure(figure, output)


def busiest(image: np.ndarray) -> tuple[slice, slice]:
    """Return the patch with the most contrast, where blur shows."""
    return max(spectra.choose_patches(image), key=lambda at: float(luminance(image[at]).std()))


if __name__ == "__main__":
    with one_line_errors():
        main()
