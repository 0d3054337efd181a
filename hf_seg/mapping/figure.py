"""The preview of a map: the scene, the classes, and what share of the land each has."""

from pathlib import Path

import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.labels import BACKGROUND, CLASS_NAMES, IGNORE_INDEX, NUM_LABELS, PALETTE
from hf_seg.mapping.scene import Scene
from hf_seg.report.plots import DPI, IGNORE_STRIPES, colorize

SIDE = 1200  # longest side of a map in the figure, in pixels


def plot_map(class_map: Path, scene: Scene, output: Path, *, title: str) -> None:
    """Draw a scene and its map side by side, with a legend that gives each class's share.

    Args:
        class_map: GeoTIFF of class ids.
        scene: what was mapped.
        output: PNG to write.
        title: of the scene.
    """
    with rasterio.open(class_map) as file:
        zoom = min(1.0, SIDE / max(file.shape))
        classes = file.read(1, out_shape=tuple(max(1, round(zoom * length)) for length in file.shape))
    image = _for_display(scene.quicklook(classes != BACKGROUND))
    height, width = classes.shape
    above = width > 1.6 * height  # one above the other
    rows, columns = (2, 1) if above else (1, 2)
    inches = min((10.0 if above else 6.2) / width, 7.5 / height)  # per pixel
    size = (max(columns * inches * width + 0.4, 9.0), max(rows * inches * height, 2.0) + 1.2 + 0.3 * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    left, right = figure.subplots(rows, columns).tolist()
    left.imshow(image, cmap="gray", vmin=0, vmax=255)
    right.imshow(colorize(np.where(classes == BACKGROUND, IGNORE_INDEX, classes)), interpolation="nearest")
    for axes, text in ((left, title), (right, "land cover")):
        axes.set_title(text, loc="left", fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#888888")
    figure.legend(handles=_legend(classes), loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    figure.savefig(output, format="png")


def _for_display(pixels: np.ndarray) -> np.ndarray:
    """Stretch (bands, h, w) uint8 between the percentiles 1 and 99 of what is not 0; (h, w) or (h, w, 3) uint8."""
    values = pixels[pixels > 0]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 255.0)
    shown = np.clip((pixels - low) * (255 / max(high - low, 1.0)), 0, 255).astype(np.uint8)
    return shown[0] if len(shown) == 1 else np.moveaxis(shown, 0, -1)


def _legend(classes: np.ndarray) -> list[Patch]:
    counts = np.bincount(classes.ravel(), minlength=NUM_LABELS)
    total = max(counts[BACKGROUND + 1 :].sum(), 1)
    patches = [
        Patch(
            facecolor=PALETTE[i] / 255, edgecolor="#555555", label=f"{CLASS_NAMES[i]} {100 * counts[i] / total:.1f} %"
        )
        for i in range(NUM_LABELS)
        if i != BACKGROUND
    ]
    if counts[BACKGROUND]:
        dark, light = IGNORE_STRIPES / 255
        patches.append(Patch(facecolor=dark, edgecolor=light, hatch="////", label="no class"))
    return patches
