"""A map as polygons for a GIS, written by pyogrio (an extra: `pip install 'hf_seg[vector]'`)."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.features

from hf_seg.errors import UserError
from hf_seg.labels import BACKGROUND, CLASS_NAMES

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".fgb": "FlatGeobuf"}
AT_ONCE = 10_000  # polygons per write


def check_polygon_target(path: Path) -> None:
    """Raise `UserError` where polygons cannot be written to a file of this name, or at all."""
    if path.suffix not in DRIVERS:
        raise UserError(f"polygons go to a file that ends in {', '.join(DRIVERS)}; not to {path}")
    missing = [name for name in ("pyogrio", "shapely") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"polygons need {' and '.join(missing)}: pip install 'hf_seg[vector]'")


def map_polygons(class_map: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the connected areas of one class, as GeoJSON-like geometries in the map's CRS, and their class ids.

    GDAL finds them all before the first is yielded, so memory grows with their number, if not with the map's size.
    """
    with rasterio.open(class_map) as file:
        for geometry, value in rasterio.features.shapes(rasterio.band(file, 1), transform=file.transform):
            if int(value) != BACKGROUND:
                yield geometry, int(value)


def write_polygons(class_map: Path, output: Path) -> None:
    """Write the connected areas of a map, each with the fields `class_id` and `class_name`.

    Args:
        class_map: GeoTIFF of class ids.
        output: vector file in the map's CRS; replaced if it is there.

    Raises:
        OSError: it cannot be written.
    """
    import pyogrio.errors
    import pyogrio.raw
    import shapely.geometry

    with rasterio.open(class_map) as file:
        crs = file.crs.to_wkt() if file.crs else None
    output.unlink(missing_ok=True)
    polygons = map_polygons(class_map)
    while batch := list(itertools.islice(polygons, AT_ONCE)):
        geometries = [shapely.to_wkb(shapely.geometry.shape(geometry)) for geometry, _ in batch]
        ids = np.array([class_id for _, class_id in batch], dtype=np.int32)
        names = np.array([CLASS_NAMES[class_id] for class_id in ids], dtype=object)
        try:
            pyogrio.raw.write(
                str(output),
                geometry=np.array(geometries, dtype=object),
                field_data=[ids, names],
                fields=np.array(["class_id", "class_name"]),
                geometry_type="Polygon",
                crs=crs,
                driver=DRIVERS[output.suffix],
                layer="land_cover",
                append=output.exists(),
            )
        except pyogrio.errors.DataSourceError as error:
            raise OSError(f"{output.name}: {error}") from None
