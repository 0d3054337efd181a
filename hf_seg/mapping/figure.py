"""The preview of a map: the scene, the classes, and the percentage of the land that each class covers."""

from pathlib import Path

import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.labels import BACKGROUND, CLASS_NAMES, IGNORE_INDEX, NUM_LABELS
from hf_seg.mapping.scene import Scene
from hf_seg.report.style import DPI, class_legend, colorize

MAX_SIDE = 1200  # longest side of the map in the figure, in pixels


def plot_map(class_map: Path, scene: Scene, output: Path, *, title: str) -> None:
    """Draw a scene and its map side by side, with a legend that gives the percentage of each class.

    Args:
        class_map: GeoTIFF of class ids.
        scene: the scene that was mapped.
        output: PNG to write.
        title: title of the scene.
    """
    with rasterio.open(class_map) as file:
        zoom = min(1.0, MAX_SIDE / max(file.shape))
        classes = file.read(1, out_shape=tuple(max(1, round(zoom * length)) for length in file.shape))
    image = _for_display(scene.quicklook(classes != BACKGROUND))
    height, width = classes.shape
    is_wide = width > 1.6 * height
    rows, columns = (2, 1) if is_wide else (1, 2)
    inches_per_pixel = min((10.0 if is_wide else 6.2) / width, 7.5 / height)
    size = (
        max(columns * inches_per_pixel * width + 0.4, 9.0),
        max(rows * inches_per_pixel * height, 2.0) + 1.2 + 0.3 * rows,
    )
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    scene_axes, map_axes = figure.subplots(rows, columns).tolist()
    scene_axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    map_axes.imshow(colorize(np.where(classes == BACKGROUND, IGNORE_INDEX, classes)), interpolation="nearest")
    for axes, text in ((scene_axes, title), (map_axes, "land cover")):
        axes.set_title(text, loc="left", fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#888888")
    figure.legend(handles=_legend(classes), loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    figure.savefig(output, format="png")


def _for_display(pixels: np.ndarray) -> np.ndarray:
    """Stretch (bands, h, w) uint8 between percentiles 1 and 99 of the nonzero pixels; (h, w) or (h, w, 3) uint8."""
    values = pixels[pixels > 0]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 255.0)
    shown = np.clip((pixels - low) * (255 / max(high - low, 1.0)), 0, 255).astype(np.uint8)
    return shown[0] if len(shown) == 1 else np.moveaxis(shown, 0, -1)


def _legend(classes: np.ndarray) -> list[Patch]:
    """Build the legend of (h, w) class ids: a patch per class with its percentage, and one for pixels without class."""
    counts = np.bincount(classes.ravel(), minlength=NUM_LABELS)
    has_nodata = counts[BACKGROUND] > 0
    patches = class_legend({IGNORE_INDEX} if has_nodata else set())
    labels = [
        f"{CLASS_NAMES[i]} {100 * counts[i] / max(counts[BACKGROUND + 1 :].sum(), 1):.1f} %"
        for i in range(NUM_LABELS)
        if i != BACKGROUND
    ]
    for patch, label in zip(patches, [*labels, "no class"], strict=False):
        patch.set_label(label)
    return patches
