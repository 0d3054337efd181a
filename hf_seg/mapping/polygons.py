"""A map as polygons for a GIS, written by pyogrio (an extra: `pip install 'hf_seg[vector]'`)."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.features

from hf_seg.labels import BACKGROUND, LabelSet
from hf_seg.mapping.legend import qgis_style

BATCH_SIZE = 10_000  # polygons per write
LAYER, GEOMETRY = "land_cover", "geom"
STYLES = "layer_styles"  # the table in which QGIS looks for the styles of a GeoPackage's layers


def write_polygons(class_map: Path, output: Path, label_set: LabelSet) -> None:
    """Write each connected area of one class as a polygon with the fields `class_id` and `class_name`.

    A GeoPackage contains the style of the polygons too. GDAL finds all areas before the first is written, so memory
    grows with their number, but not with the map's size.

    Args:
        class_map: GeoTIFF of class ids.
        output: vector file in the map's CRS, of the format that its suffix names; replaced if it exists.
        label_set: names of the classes.

    Raises:
        OSError: it cannot be written.
    """
    import pyogrio.errors
    from shapely import to_wkb
    from shapely.geometry import shape

    names = np.array(label_set.names, dtype=object)
    output.unlink(missing_ok=True)
    try:
        with rasterio.open(class_map) as file:
            crs = file.crs.to_wkt() if file.crs else None
            areas = rasterio.features.shapes(rasterio.band(file, 1), transform=file.transform)
            polygons = ((geometry, int(value)) for geometry, value in areas if int(value) != BACKGROUND)
            # a map without any class is a file without polygons
            while (batch := list(itertools.islice(polygons, BATCH_SIZE))) or not output.exists():
                ids = np.array([class_id for _, class_id in batch], dtype=np.int32)
                shapes = np.array([to_wkb(shape(geometry)) for geometry, _ in batch], dtype=object)
                _write(output, LAYER, {"class_id": ids, "class_name": names[ids]}, shapes, crs)
        if output.suffix == ".gpkg":
            _write(output, STYLES, _style_row(label_set), None, None)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise OSError(" ".join(str(error).split())[:200]) from None


def _write(path: Path, layer: str, fields: dict[str, np.ndarray], shapes: np.ndarray | None, crs: str | None) -> None:
    """Append to a layer of a file, or add the layer, or create both."""
    import pyogrio
    import pyogrio.raw

    exists = path.exists() and layer in pyogrio.list_layers(path)[:, 0]
    options: dict[str, Any] = {"geometry_name": GEOMETRY} if path.suffix == ".gpkg" and shapes is not None else {}
    pyogrio.raw.write(
        str(path),
        geometry=shapes,
        field_data=[*fields.values()],
        fields=np.array([*fields]),
        geometry_type=None if shapes is None else "Polygon",
        crs=crs,
        layer=layer,
        append=exists,
        **options,
    )


def _style_row(label_set: LabelSet) -> dict[str, np.ndarray]:
    """Return the columns that QGIS reads of a style, in its own names."""
    text = {
        "f_table_catalog": "",
        "f_table_schema": "",
        "f_table_name": LAYER,
        "f_geometry_column": GEOMETRY,
        "styleName": LAYER,
        "styleQML": qgis_style(label_set).decode(),
        "styleSLD": "",
    }
    row = {key: np.array([value], dtype=object) for key, value in text.items()}
    row["useAsDefault"] = np.array([True])
    row["description"] = np.array(["colours of the classes"], dtype=object)
    row["owner"] = np.array([""], dtype=object)
    row["update_time"] = np.array(["NaT"], dtype="datetime64[ms]")
    return row
