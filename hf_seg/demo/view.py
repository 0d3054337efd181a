"""What the page's map shows: reduced images of the scene and of its map, as JSON that `static/viewer.js` draws.

The browser gets class ids and confidences, not a picture of them: it can fade what is uncertain, hide classes and tell
what is under the pointer without asking the server.
"""

import base64
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine

from hf_seg.bands import rgb_indices, valid_pixels
from hf_seg.errors import FileError
from hf_seg.labels import LabelSet
from hf_seg.mapping.gdal import GDAL_ERRORS, RED_GREEN_BLUE, gdal_reason, gdal_session
from hf_seg.mapping.legend import list_classes
from hf_seg.mapping.statistics import MapSummary, pixel_areas
from hf_seg.report.style import SAR_GAMMA

MAX_SIDE = 2048  # longest side of what is shown, in pixels
WEBP = {"quality": 88, "method": 2}  # method: 0 is fast, 6 is small


def view_scene(scene: Path) -> dict[str, Any]:
    """Return what the page shows of a scene that is not mapped yet.

    Raises:
        FileError: it is damaged.
    """
    try:
        return _view_scene(scene)
    except GDAL_ERRORS as error:
        hint = "the file is damaged or truncated"
        raise FileError(f"{scene.name} cannot be read; {hint} ({gdal_reason(error)})") from None


def _view_scene(scene: Path) -> dict[str, Any]:
    with gdal_session(), rasterio.open(scene) as dataset:
        zoom = min(1.0, MAX_SIDE / max(dataset.shape))
        height, width = (max(1, round(zoom * length)) for length in dataset.shape)
        transform = dataset.transform * Affine.scale(dataset.width / width, dataset.height / height)
        return {
            "title": scene.name,
            "width": width,
            "height": height,
            "image": _to_data_uri(_draw_scene(dataset, height, width)),
            "transform": None if dataset.transform.is_identity else list(transform)[:6],
            "decimals": 5 if dataset.crs and dataset.crs.is_geographic else 1,
            "crs": dataset.crs and dataset.crs.to_string() if dataset.crs and dataset.crs.to_epsg() else None,
            "metres": _metres(dataset, transform, height, width),
        }


def view_map(
    scene: Path, class_map: Path, confidence: Path, label_set: LabelSet, summary: MapSummary
) -> dict[str, Any]:
    """Return what the page shows of a scene and its map.

    Args:
        class_map, confidence: GeoTIFFs of class ids and of probabilities, 255 where there is none.
    """
    view = view_scene(scene)
    for key, path in (("classes", class_map), ("confidence", confidence)):
        with rasterio.open(path) as dataset:
            values = dataset.read(1, out_shape=(view["height"], view["width"]), resampling=Resampling.nearest)
        view[key] = base64.b64encode(zlib.compress(values.tobytes())).decode()
    land = sum(summary.pixels.values())
    areas = summary.areas_km2
    view["legend"] = [
        {
            "id": each.value,
            "name": each.name,
            "color": each.color,
            "share": summary.pixels[each.name] / max(land, 1),
            "area": area_text(areas[each.name]) if areas else f"{summary.pixels[each.name]:,d} px",
        }
        for each in list_classes(label_set)
    ]
    view["no_class"] = summary.nodata_pixels / (land + summary.nodata_pixels)
    return view


def area_text(km2: float) -> str:
    """Format an area with the unit that suits its size."""
    if km2 >= 1:
        return f"{km2:,.{max(0, 2 - math.floor(math.log10(km2)))}f} km²"
    return f"{100 * km2:.2f} ha" if km2 >= 1e-4 else f"{1e6 * km2:.0f} m²"


def _draw_scene(dataset: rasterio.DatasetReader, height: int, width: int) -> np.ndarray:
    """Return (height, width, 4) uint8: grey or colours, stretched between percentiles, transparent without data."""
    bands = _bands_to_show(dataset)
    shape = (len(bands), height, width)
    raw = dataset.read(bands, out_shape=shape, resampling=Resampling.average)
    masks = dataset.read_masks(bands, out_shape=shape) > 0
    valid = valid_pixels(raw, masks) & (raw != 0).any(axis=0)
    values = np.where(valid, raw, 0).astype(np.float32)
    low, high = np.percentile(values[:, valid], (1, 99)) if valid.any() else (0.0, 1.0)
    shown = np.clip((values - low) / max(high - low, 1e-12), 0, 1) ** (SAR_GAMMA if len(bands) == 1 else 1)
    colors = np.broadcast_to((255 * shown).astype(np.uint8), (3, height, width))
    return np.dstack([*colors, np.where(valid, np.uint8(255), np.uint8(0))])


def _bands_to_show(dataset: rasterio.DatasetReader) -> list[int]:
    """Return the bands of red, green and blue, or the first band."""
    colors = dict(zip(dataset.colorinterp, dataset.indexes, strict=True))
    if colors.keys() >= {*RED_GREEN_BLUE}:
        return [colors[kind] for kind in RED_GREEN_BLUE]
    named = rgb_indices([description or "" for description in dataset.descriptions])
    intensities = [
        band for band, kind in zip(dataset.indexes, dataset.colorinterp, strict=True) if kind != ColorInterp.alpha
    ]
    return [1 + index for index in named] or (intensities if len(intensities) == 3 else [1])


def _metres(dataset: rasterio.DatasetReader, transform: Affine, height: int, width: int) -> float | None:
    """Return the side on the ground of a shown pixel in the middle; None if that is unknown."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None
    areas = pixel_areas(dataset.crs, transform, width, [height // 2])
    return None if areas is None else math.sqrt(float(areas[0]))


def _to_data_uri(pixels: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "webp", **WEBP)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
