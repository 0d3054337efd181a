"""The preview of a map: the scene, the classes, and the percentage of the land that each class covers."""

from pathlib import Path

import numpy as np
import rasterio
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.mapping.scene import Scene
from hf_seg.report.style import DPI, class_legend, colorize, percent, show_image

MAX_SIDE = 1200  # longest side of the map in the figure, in pixels


def plot_map(class_map: Path, scene: Scene, output: Path, *, title: str, label_set: LabelSet = OPEN_EARTH_MAP) -> None:
    """Draw a scene and its map, a GeoTIFF of class ids, with a legend that gives the percentage of each class.

    Args:
        output: PNG to write.
        title: title of the scene.
        label_set: names and colours of the classes.
    """
    with rasterio.open(class_map) as file:
        zoom = min(1.0, MAX_SIDE / max(file.shape))
        classes = file.read(1, out_shape=tuple(max(1, round(zoom * length)) for length in file.shape))
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
    image = _for_display(scene.quicklook(classes != BACKGROUND))
    show_image(scene_axes, title, image, interpolation="auto")
    painted = colorize(np.where(classes == BACKGROUND, IGNORE_INDEX, classes), label_set)
    show_image(map_axes, "land cover", painted)
    figure.legend(handles=_legend(classes, label_set), loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    figure.savefig(output, format="png")


def _for_display(pixels: np.ndarray) -> np.ndarray:
    """Stretch (bands, h, w) uint8 between percentiles 1 and 99 of the nonzero pixels, for `show_image`."""
    values = pixels[pixels > 0]
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 255.0)
    shown = np.clip((pixels - low) / max(high - low, 1.0), 0, 1)
    return shown[0] if len(shown) < 3 else np.moveaxis(shown * 255, 0, -1).astype(np.uint8)


def _legend(classes: np.ndarray, label_set: LabelSet) -> list[Patch]:
    """Build the legend of (h, w) class ids: a patch per class with its percentage, and one for pixels without class."""
    counts = np.bincount(classes.ravel(), minlength=label_set.num_labels)
    land_cover = counts[BACKGROUND + 1 :]
    *patches, nodata = class_legend({IGNORE_INDEX}, label_set)
    for patch, count in zip(patches, land_cover, strict=True):
        patch.set_label(f"{patch.get_label()} {percent(count / max(land_cover.sum(), 1))}")
    nodata.set_label("no class")
    return [*patches, nodata] if counts[BACKGROUND] else patches
