"""Propose the settings of resolution alignment (RAA) from two folders of optical images, and show what they do.

    python scripts/calibrate_raa.py data/OpenEarthMap_wo_xBD data/dfc25_track1 --output runs/raa

prints `raa_prob`, `raa_min_scale` and `raa_max_scale` for a stage-1 recipe, with the reasons. With --output it also
writes raa.json, spectra.png and examples.png, which hf_seg/studies/README.md explains.

A folder is searched for GeoTIFF, PNG and JPEG images; of OpenEarthMap its images are taken, of OpenEarthMap-SAR the
optical images of train.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_seg.errors import UserError, one_line_errors
from hf_seg.files import atomic_update, write_atomic
from hf_seg.report.style import DPI, save_figure, show_image, style_axes
from hf_seg.settings import Parser

if TYPE_CHECKING:
    from hf_seg.studies.raa_calibration import ImageSet, Proposal

COLORS = {"source": "#3572b0", "target": "#1b1b1b", "aligned": "#c8553d"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, propose, print, draw."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="SOURCE_IMAGES", type=Path, help="folder of the labelled domain's images")
    parser.add_argument("target", metavar="TARGET_IMAGES", type=Path, help="folder of the other domain's images")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for raa.json and the figures (not written)")
    parser.add_argument(
        "--max_images", metavar="N", type=int, default=200, help="images measured of each, spread evenly (%(default)s)"
    )
    args = parser.parse_args(argv)
    if args.max_images < 1:
        raise UserError(f"--max_images must be at least 1; it is {args.max_images}")
    if args.output and args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is not a folder; choose another name")

    from hf_seg.studies.raa_calibration import measure_folder, propose

    source = measure_folder(args.source, args.max_images, aligned=True)
    target = measure_folder(args.target, args.max_images, aligned=False)
    proposal = propose(source, target)
    settings = {key: value for key, value in as_settings(proposal).items() if value is not None}
    print(*proposal.reasons, "", *(f"{key}: {value:.2f}" for key, value in settings.items()), sep="\n")
    if args.output:
        print("", *write_files(args.output, source, target, proposal), sep="\n")


def write_files(output: Path, source: "ImageSet", target: "ImageSet", proposal: "Proposal") -> list[Path]:
    """Write raa.json and two figures into a folder and return their paths; other files in it stay."""
    with atomic_update(output) as temporary:
        draw_spectra(source, target, proposal, temporary / "spectra.png")
        draw_examples(source, target, proposal, temporary / "examples.png")
        write_atomic(temporary / "raa.json", json.dumps(describe(source, target, proposal), indent=1) + "\n")
    return [output / name for name in ("raa.json", "spectra.png", "examples.png")]


def as_settings(proposal: "Proposal") -> dict[str, float | None]:
    """Return the settings for a stage-1 recipe, rounded; without alignment the scales are None."""
    prob, low, high = proposal.mixture
    return {
        "raa_prob": round(prob, 2),
        "raa_min_scale": round(low, 2) if prob else None,
        "raa_max_scale": round(high, 2) if prob else None,
    }


def describe(source: "ImageSet", target: "ImageSet", proposal: "Proposal") -> dict[str, Any]:
    """Return the content of raa.json."""
    from hf_seg.studies.raa_calibration import UNALIGNED, mismatch_db

    mixtures = {"before": UNALIGNED, "after": proposal.mixture}
    sets = {"source": source, "target": target}
    return {
        **as_settings(proposal),
        "reasons": proposal.reasons,
        "mismatch_db": {when: round(mismatch_db(source, target, each), 2) for when, each in mixtures.items()},
        "n_images": {name: len(images.files) for name, images in sets.items()},
        "sharpness_db": {name: round(images.sharpness_db, 2) for name, images in sets.items()},
        "noise_levels": {name: round(images.noise_levels, 2) for name, images in sets.items()},
        "folders": {name: str(images.folder) for name, images in sets.items()},
        "ratio_percentiles": {str(q): round(float(np.percentile(proposal.ratios, q)), 2) for q in (10, 50, 90)},
        "ratios": {
            path.relative_to(target.folder).as_posix(): round(float(ratio), 2)
            for path, ratio in zip(target.files, proposal.ratios, strict=True)
        },
    }


def draw_spectra(source: "ImageSet", target: "ImageSet", proposal: "Proposal", output: Path) -> None:
    """Draw the median spectra with the middle 80 % of images, their difference, and the target images' ratios."""
    from hf_seg.studies import power_spectra as spectra
    from hf_seg.studies.raa_calibration import UNALIGNED

    mixture = proposal.mixture
    wanted = spectra.image_bands(target.spectra)
    bands = {
        "source": (spectra.mixture_bands(source.spectra, UNALIGNED), COLORS["source"]),
        "target": (wanted, COLORS["target"]),
    }
    if mixture.prob:
        aligned = spectra.mixture_bands(source.spectra, mixture)
        bands[f"source, {mixture.prob:.0%} aligned"] = (aligned, COLORS["aligned"])
    figure = Figure(figsize=(14, 4.6), dpi=DPI, layout="constrained")
    levels, difference, histogram = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    compared = spectra.COMPARED_RINGS
    frequencies = spectra.RINGS[compared]
    for name, (deciles, color) in bands.items():
        in_db = spectra.DB * deciles[:, compared]
        levels.fill_between(frequencies, in_db[0], in_db[-1], color=color, alpha=0.15, linewidth=0)
        label = name if deciles is wanted else f"{name}: {spectra.mismatch(deciles, wanted):.1f} dB from the target"
        levels.plot(frequencies, in_db[4], color=color, linewidth=2, label=label)
        difference.plot(frequencies, in_db[4] - spectra.DB * wanted[4, compared], color=color, linewidth=2)
    levels.legend(frameon=False, loc="lower left")
    titles = {levels: "power, dB: median and middle 80 % of images", difference: "medians minus the target's, dB"}
    for axes, title in titles.items():
        axes.set_xscale("log")
        axes.set_xlabel("cycles per pixel")
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
        axes.set_xticks([], minor=True)
        style_axes(axes, title)
    draw_ratios(histogram, proposal)
    save_figure(figure, output)


def draw_ratios(axes: Axes, proposal: "Proposal") -> None:
    """Draw a histogram of the ratios that the target images resemble most."""
    prob, low, high = proposal.mixture
    axes.hist(proposal.ratios, np.arange(0.075, 1.03, 0.05).tolist(), color=COLORS["target"], alpha=0.75, rwidth=0.85)
    if prob:
        label = f"proposed: {low:.2f} to {high:.2f}"
        axes.axvspan(low, high, color=COLORS["aligned"], alpha=0.2, linewidth=0, label=label, zorder=0)
        axes.legend(frameon=False, loc="upper left")
    axes.margins(y=0.2)  # room for the legend
    axes.set(xlim=(0.05, 1.05), xlabel="ratio (1: at least as sharp as the source)")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    style_axes(axes, "target images by the ratio that fits best")


def draw_examples(source: "ImageSet", target: "ImageSet", proposal: "Proposal", output: Path) -> None:
    """Draw source images aligned by the smallest, middle and largest proposed ratio beside similar target images."""
    from hf_seg.data.transforms import align_resolution
    from hf_seg.studies.power_spectra import choose_patches
    from hf_seg.studies.raa_calibration import luminance, read_optical

    def patch_with_contrast(image: np.ndarray) -> tuple[slice, slice]:  # where blur is easiest to see
        return max(choose_patches(image), key=lambda patch: float(luminance(image[patch]).std()))

    mixture = proposal.mixture
    wanted = np.linspace(mixture.min_ratio, mixture.max_ratio, 3) if mixture.prob else np.ones(3)
    wanted = wanted[: len(target.files)]
    originals = np.linspace(0, len(source.files) - 1, 2 * len(wanted) + 1).round().astype(int)[1::2]
    unused = set(range(len(target.files)))
    figure = Figure(figsize=(11.5, 3.95 * len(wanted)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(wanted), 3, squeeze=False)
    for cells, ratio, index in zip(grid, wanted.tolist(), originals, strict=True):
        similar = min(unused, key=lambda other: (abs(proposal.ratios[other] - ratio), other))
        unused.remove(similar)
        image, example = read_optical(source.files[index]), read_optical(target.files[similar])
        crop, example_crop = patch_with_contrast(image), patch_with_contrast(example)
        images = {
            f"source: {source.files[index].stem}": image[crop],
            f"aligned by {ratio:.2f}" if ratio < 1 else "not aligned": align_resolution(image, ratio)[crop],
            f"target: {target.files[similar].stem}, fits {proposal.ratios[similar]:.2f}": example[example_crop],
        }
        for axes, (title, pixels) in zip(cells, images.items(), strict=True):
            show_image(axes, title, pixels)
    save_figure(figure, output)


if __name__ == "__main__":
    with one_line_errors():
        main()
