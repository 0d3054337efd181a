"""What all figures share: the colours of the classes, their legend, the look of charts, and how a file is written.

Drawn through `matplotlib.figure.Figure`, without pyplot: no display, no global state, nothing to close.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.files import atomic_file
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet

DPI = 120
LINE_COLORS = ("#1b1b1b", "#3572b0", "#c8553d", "#4c9a6a", "#8a6fb0", "#b58b2a")
GRID_COLOR = "#e3e3e3"
SAR_GAMMA = 0.7  # amplitudes have a long bright tail: linear, three quarters of a scene would be nearly black

# Ignored pixels are striped in two dark violet greys: no class is striped, and even where a small map blurs the stripes
# their mean stays far from background (black), developed space (mid-grey), tree (dark green) and road (white).
IGNORE_STRIPES = np.array([(0x30, 0x2A, 0x3C), (0x6A, 0x62, 0x78)], dtype=np.uint8)


def colorize(label_map: np.ndarray, label_set: LabelSet = OPEN_EARTH_MAP) -> np.ndarray:
    """Draw (H, W) class ids in the colours of the classes, (H, W, 3) uint8; `IGNORE_INDEX` is striped.

    Raises:
        ValueError: an id is neither a class nor `IGNORE_INDEX`.
    """
    ignored = label_map == IGNORE_INDEX
    ids = np.where(ignored, BACKGROUND, label_map)
    if ids.size and not 0 <= ids.min() <= ids.max() < label_set.num_labels:
        wrong = sorted({int(index) for index in np.unique(ids) if not 0 <= index < label_set.num_labels})
        raise ValueError(
            f"label ids {wrong} are not classes; expected 0..{label_set.num_labels - 1} or {IGNORE_INDEX} (ignored)"
        )
    colors = label_set.palette[ids]
    height, width = label_map.shape
    stripe_width = max(min(height, width) // 64, 1)
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // stripe_width) % 2
    colors[ignored] = IGNORE_STRIPES[stripes[ignored]]
    return colors


def class_legend(ids: set[int], label_set: LabelSet = OPEN_EARTH_MAP) -> list[Patch]:
    """Return a patch for each class from 1 up, and for background and ignored pixels if they are among the ids."""
    shown = [index for index in range(label_set.num_labels) if index != BACKGROUND or index in ids]
    names, colors = label_set.names, label_set.palette / 255
    patches = [Patch(facecolor=colors[i], edgecolor="#555555", label=names[i]) for i in shown]
    if IGNORE_INDEX in ids:
        dark, light = IGNORE_STRIPES / 255
        patches.append(Patch(facecolor=dark, edgecolor=light, hatch="////", label="ignored"))
    return patches


def stretch(image: np.ndarray) -> np.ndarray:
    """Map the 1st and 99th percentile of an amplitude image to 0 and 1, and brighten its dark half; 0 is nodata."""
    valid = image[image > 0]
    low, high = np.percentile(valid, (1, 99)) if valid.size else (0.0, 1.0)
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** SAR_GAMMA


def style_axes(axes: Axes, title: str) -> None:
    """Give a chart a bold title, a pale grid behind it, and no frame above and to the right."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def show_image(
    axes: Axes, title: str, image: np.ndarray | None, *, missing: str = "none", interpolation: str = "nearest"
) -> None:
    """Draw an image without ticks.

    Args:
        image: (H, W), which is stretched, (H, W, 3) uint8, or (H, W, bands), of which the first three are drawn as RGB,
            or the first alone if there are fewer; if None, an empty cell with the text `missing`.
    """
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xticks=[], yticks=[], aspect="equal", facecolor="#f0f0f0")  # not white, which is road
    axes.spines[:].set_color("#888888")
    if image is None:
        axes.text(0.5, 0.5, missing, transform=axes.transAxes, ha="center", va="center", color="#777777")
    else:
        if image.ndim == 3:
            image = image[..., :3] if image.shape[2] >= 3 else image[..., 0]
        shown = stretch(image) if image.ndim == 2 else image
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation=interpolation)


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure atomically, in the format that the file's suffix names.

    Raises:
        FileError: it cannot be written.
    """
    with atomic_file(output) as temporary:
        figure.savefig(temporary, format=output.suffix.lstrip(".") or "png")


def percent(fraction: float | None, unknown: str = "-") -> str:
    """Format a fraction as a percentage with one decimal, or return `unknown` for None and NaN."""
    return unknown if fraction is None or fraction != fraction else f"{100 * fraction:.1f} %"
