"""Settings of resolution alignment (RAA) from two folders of optical images: measure, compare, propose.

The proposal is the mixture of sharp and aligned source images whose power spectra make the target's most likely
(`hf_seg.studies.power_spectra`, which also states the limits of the method). Images are measured at their own pixels: a
recipe that zooms source and target differently needs other ratios.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from hf_seg.errors import DatasetError, UserError
from hf_seg.studies import power_spectra as spectra
from hf_seg.studies.images import ANY_IMAGE, list_images, read_image
from hf_seg.studies.power_spectra import Mixture, Spectra

UNALIGNED = Mixture(0.0, 0.5, 1.0)
MAX_PROB, MIN_PROB = 0.8, 0.05  # limits of a proposal
FEW_IMAGES = 20
SHARPER_DB = 1.5  # halves of one domain differ by up to 0.7


class ImageSet(NamedTuple):
    """The images of a domain that could be measured, and their spectra."""

    folder: Path
    files: list[Path]
    spectra: Spectra  # source: (N, len(RATIOS), ...); target: (N, ...)
    sharpness_db: float  # fine detail relative to coarse detail, of the median image
    noise_levels: float  # standard deviation of the noise in grey levels, of the median image


class Proposal(NamedTuple):
    """Proposed settings, and the reasons for them."""

    mixture: Mixture
    ratios: np.ndarray  # (N,), the ratio of source images that resembles each target image most
    reasons: list[str]


def find_images(folder: Path) -> list[Path]:
    """Return the images below a folder; of OpenEarthMap its `images`, of OpenEarthMap-SAR the optical ones of train.

    Raises:
        UserError: there is no image.
    """
    folder = optical if (optical := folder / "train/rgb_images").is_dir() else folder
    files = list_images(folder, "**/*", ANY_IMAGE)
    files = [path for path in files if path.parent.name == "images"] or files
    if not files:
        raise UserError(f"{folder}: no folder with images in it or below; looked for {', '.join(ANY_IMAGE)}")
    return files


def read_optical(path: Path) -> np.ndarray:
    """Return the first three bands, (H, W, 3) uint8; DatasetError if there are fewer or of another type."""
    image = np.atleast_3d(read_image(path))
    bands = image.shape[2]
    if bands < 3 or image.dtype != np.uint8:
        hint = "pass a folder of optical images, converted with gdal_translate -ot Byte -scale if need be"
        raise DatasetError(f"{path}: expected 3 bands of uint8, found {bands} of {image.dtype}; {hint}")
    return np.ascontiguousarray(image[..., :3])


def luminance(image: np.ndarray) -> np.ndarray:
    """Return (H, W) float32 of (H, W, 3) uint8."""
    return cv2.cvtColor(image.astype(np.float32), cv2.COLOR_RGB2GRAY)


def measure_folder(folder: Path, max_images: int, *, aligned: bool) -> ImageSet:
    """Measure images spread evenly over the images of a folder; those without a usable patch are skipped.

    Args:
        aligned: measure each image at all of `RATIOS`, which the source needs.

    Raises:
        UserError: an image that cannot be read, or no image with a usable patch.
    """
    files = find_images(folder)
    chosen = np.linspace(0, len(files) - 1, min(max_images, len(files))).round().astype(int)
    measured = []
    for path in tqdm([files[index] for index in chosen], desc=folder.name, unit="image"):
        image = read_optical(path)
        if windows := spectra.choose_patches(image):
            measure = spectra.measure_aligned if aligned else spectra.measure
            measured.append((path, measure(luminance(image), windows)))
    if not measured:
        needed, (height, width) = f"{spectra.PATCH} x {spectra.PATCH} pixels", image.shape[:2]
        raise UserError(
            f"{folder}: no image shows {needed} of varied ground without nodata; {path.name} is {height} x {width}. "
            "Pass larger or uncropped images"
        )
    stacked = spectra.stack([each for _, each in measured])
    unaligned = Spectra(stacked.power[:, -1], stacked.noise[:, -1]) if aligned else stacked
    sharpness_db = float(np.median(spectra.sharpness(unaligned)))
    noise_levels = float(np.sqrt(np.median(unaligned.noise)))
    return ImageSet(folder, [path for path, _ in measured], stacked, sharpness_db, noise_levels)


def propose(source: ImageSet, target: ImageSet) -> Proposal:
    """Fit the mixture, limit it to sensible settings, and give reasons."""
    costs = spectra.ratio_costs(target.spectra, spectra.reference_curves(source.spectra))
    prob, low, high = spectra.fit_mixture(costs)
    limited = Mixture(min(prob, MAX_PROB), low, high)
    detail = target.sharpness_db - source.sharpness_db
    before, after = (mismatch_db(source, target, each) for each in (UNALIGNED, limited))
    mixture = UNALIGNED
    if prob >= MIN_PROB and after < before:
        mixture = limited
        reasons = [
            f"{prob:.0%} of the target's images look like source images aligned by ratios of {low:.2f} to {high:.2f}; "
            f"the spectra differ by {before:.1f} dB, and by {after:.1f} dB after alignment."
        ]
        if prob > MAX_PROB:
            reasons.append(f"The probability is limited to {MAX_PROB}: small objects are learned from sharp images.")
        if low <= spectra.RATIOS[0]:
            reasons.append(f"Some may be blurrier still; below a ratio of {low:.2f} labels no longer fit the images.")
    elif prob >= MIN_PROB:
        reasons = [
            f"The target seems blurrier, but alignment does not make source images more similar ({before:.1f} dB "
            f"before, {after:.1f} dB after): the difference has another cause, such as content or noise."
        ]
    elif detail > SHARPER_DB:
        reasons = [
            f"The target is sharper than the source ({detail:+.1f} dB of fine detail), and alignment cannot sharpen. "
            "Swap the folders to see how much the target would have to be blurred, or enlarge the source."
        ]
    else:
        reasons = [f"The target is not measurably blurrier than the source ({detail:+.1f} dB of fine detail)."]
    return Proposal(mixture, spectra.RATIOS[costs.argmin(1)], reasons + cautions(source, target))


def cautions(source: ImageSet, target: ImageSet) -> list[str]:
    """Return sentences on what the proposal does not cover."""
    found = []
    before, after = source.noise_levels, target.noise_levels
    if after > 1.5 * before + 0.5:
        levels = f"{after:.1f} against {before:.1f} grey levels"
        found.append(f"The target is noisier ({levels}); RAA does not change noise.")
    for images in (source, target):
        if len(images.files) < FEW_IMAGES:
            found.append(f"{images.folder} has only {len(images.files)} usable images: this is a rough estimate.")
    return found


def mismatch_db(source: ImageSet, target: ImageSet, mixture: Mixture) -> float:
    """Return how much the source's spectra, aligned by a mixture, differ from the target's."""
    return spectra.mismatch(spectra.image_bands(target.spectra), spectra.mixture_bands(source.spectra, mixture))
