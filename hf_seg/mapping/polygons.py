"""A map as polygons for a GIS, written by pyogrio (an extra: `pip install 'hf_seg[vector]'`)."""

import itertools
from pathlib import Path

import numpy as np
import rasterio
import rasterio.features

from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet

BATCH_SIZE = 10_000  # polygons per write


def write_polygons(class_map: Path, output: Path, label_set: LabelSet = OPEN_EARTH_MAP) -> None:
    """Write each connected area of one class as a polygon with the fields `class_id` and `class_name`.

    GDAL finds all areas before the first is written, so memory grows with their number, but not with the map's size.

    Args:
        class_map: GeoTIFF of class ids.
        output: vector file in the map's CRS, of the format that its suffix names; replaced if it exists.
        label_set: names of the classes.

    Raises:
        OSError: it cannot be written.
    """
    import pyogrio.errors
    import pyogrio.raw
    from shapely import to_wkb
    from shapely.geometry import shape

    output.unlink(missing_ok=True)
    with rasterio.open(class_map) as file:
        crs = file.crs.to_wkt() if file.crs else None
        areas = rasterio.features.shapes(rasterio.band(file, 1), transform=file.transform)
        polygons = ((geometry, int(value)) for geometry, value in areas if int(value) != BACKGROUND)
        while batch := list(itertools.islice(polygons, BATCH_SIZE)):
            ids = np.array([class_id for _, class_id in batch], dtype=np.int32)
            try:
                pyogrio.raw.write(
                    str(output),
                    geometry=np.array([to_wkb(shape(geometry)) for geometry, _ in batch], dtype=object),
                    field_data=[ids, np.array(label_set.names, dtype=object)[ids]],
                    fields=np.array(["class_id", "class_name"]),
                    geometry_type="Polygon",
                    crs=crs,
                    layer="land_cover",
                    append=output.exists(),
                )
            except pyogrio.errors.DataSourceError as error:
                raise OSError(str(error)) from None
