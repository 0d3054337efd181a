"""A map as an Item of a SpatioTemporal Asset Catalog, by pystac (an extra: `pip install 'hf_seg[stac]'`).

The item lies beside the map and names its files relative to itself. Its text depends on these files alone, not on the
time or on interruptions. Extensions: classification, file, processing, projection and raster.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rasterio
from rasterio.transform import AffineTransformer, GCPTransformer
from rasterio.warp import transform_geom

from hf_seg.files import sha256_of
from hf_seg.labels import BACKGROUND, LabelSet
from hf_seg.mapping.gdal import GDAL_ERRORS
from hf_seg.mapping.legend import list_classes
from hf_seg.mapping.provenance import Acquisition

if TYPE_CHECKING:
    import pystac

# pystac writes version 1 of the raster extension, which the bands of STAC 1.1 have replaced
RASTER = "https://stac-extensions.github.io/raster/v2.0.0/schema.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.1.0/schema.json"
SHA256_MULTIHASH = "1220"  # its code and its length in bytes
EDGE_POINTS = 8  # a straight edge of the map may be a curve in degrees
DEGREE_DIGITS = 7  # 1 cm
ROLES = {"attribute_table": ["metadata"], "style": ["metadata"], "polygon_style": ["metadata"], "preview": ["overview"]}


class MapFile(NamedTuple):
    """One file of a map: its place, and where it is while the map is not complete."""

    path: Path
    current: Path


def item_of(
    path: Path,
    files: Mapping[str, MapFile],
    *,
    label_set: LabelSet,
    pixels: Sequence[int],
    tags: Mapping[str, str],
    acquisition: Acquisition,
) -> bytes:
    """Return the content of `map.stac.json`.

    Args:
        path: of the item.
        files: of the map by the key of their asset, the class ids first.
        pixels: of the map by id.
        tags: of the map; they become properties of the item.
        acquisition: of the scene.
    """
    import pystac

    with rasterio.open(next(iter(files.values())).current) as class_map:
        geometry = footprint(class_map)
        is_interval = acquisition.end > acquisition.begin
        item = pystac.Item(
            id=path.name.removesuffix(".stac.json"),
            geometry=geometry,
            bbox=None if geometry is None else bounding_box(geometry),
            datetime=None if is_interval else acquisition.begin,
            start_datetime=acquisition.begin if is_interval else None,
            end_datetime=acquisition.end if is_interval else None,
            properties=_properties(tags, acquisition),
            stac_extensions=[RASTER, PROCESSING],
        )
        _add_projection(item, class_map)
    for key, file in files.items():
        _add_asset(item, path, key, file)
    _add_classes(next(iter(item.assets.values())), label_set, pixels)
    text = json.dumps(item.to_dict(include_self_link=False, transform_hrefs=False), indent=2, ensure_ascii=False)
    return text.encode() + b"\n"


def footprint(raster: rasterio.DatasetReader) -> dict[str, Any] | None:
    """Return the border of a raster as GeoJSON in degrees, cut at longitude 180; None if its place is unknown."""
    points, crs = raster.gcps
    transformer = GCPTransformer(points) if points else AffineTransformer(raster.transform)
    crs = crs if points else raster.crs
    if crs is None or not (crs.is_geographic or crs.is_projected):
        return None
    way, height, width = np.linspace(0, 1, EDGE_POINTS, endpoint=False), raster.height, raster.width
    # left side from the top, lower side from the left, and so on: counter-clockwise, as GeoJSON asks
    rows = np.concatenate([way * height, np.full(EDGE_POINTS, height), (1 - way) * height, np.zeros(EDGE_POINTS)])
    columns = np.concatenate([np.zeros(EDGE_POINTS), way * width, np.full(EDGE_POINTS, width), (1 - way) * width])
    xs, ys = transformer.xy(rows, columns, offset="ul")
    ring = [*zip(np.asarray(xs).tolist(), np.asarray(ys).tolist(), strict=True)]
    try:
        polygon = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
        geometry: dict[str, Any] = transform_geom(crs, "OGC:CRS84", polygon, precision=DEGREE_DIGITS)
    except (*GDAL_ERRORS, ValueError):
        return None
    degrees = np.array([point for polygon in _polygons(geometry) for point in polygon[0]])
    return geometry if np.isfinite(degrees).all() else None


def bounding_box(geometry: Mapping[str, Any]) -> list[float]:
    """Return west, south, east and north of a footprint; west is larger than east if it crosses longitude 180."""
    boxes = [(*np.min(polygon[0], axis=0), *np.max(polygon[0], axis=0)) for polygon in _polygons(geometry)]
    west, south, east, north = (np.array(side) for side in zip(*boxes, strict=True))
    left, right = west.min(), east.max()
    if len(boxes) > 1 and left == -180 and right == 180:
        left, right = west[east == 180].min(), east[west == -180].max()
    return [float(side) for side in (left, south.min(), right, north.max())]


def _polygons(geometry: Mapping[str, Any]) -> list[Any]:
    return [geometry["coordinates"]] if geometry["type"] == "Polygon" else [*geometry["coordinates"]]


def _properties(tags: Mapping[str, str], acquisition: Acquisition) -> dict[str, Any]:
    software = dict([tags["TIFFTAG_SOFTWARE"].rsplit(" ", 1)])
    own = {f"hf_seg:{key}": value for key, value in tags.items() if key != "TIFFTAG_SOFTWARE"}
    return {"processing:software": software, "hf_seg:datetime_source": acquisition.source, **own}


def _add_projection(item: "pystac.Item", raster: rasterio.DatasetReader) -> None:
    from pystac.extensions.projection import ProjectionExtension

    extension = ProjectionExtension.ext(item, add_if_missing=True)
    extension.shape = [raster.height, raster.width]
    if raster.crs is None:  # of control points, the CRS is that of the points
        return
    authority = raster.crs.to_authority()
    extension.apply(
        code=":".join(authority) if authority else None,
        wkt2=None if authority else raster.crs.to_wkt(version="WKT2_2019"),
        bbox=[*raster.bounds],
        shape=extension.shape,
        transform=[*raster.transform][:6],
    )


def _add_asset(item: "pystac.Item", path: Path, key: str, file: MapFile) -> None:
    import pystac
    from pystac.extensions.file import FileExtension

    href = Path(os.path.relpath(file.path, path.parent)).as_posix()
    asset = pystac.Asset(href=href if href.startswith("../") else f"./{href}", roles=ROLES.get(key, ["data"]))
    asset.media_type = _media_type(file.current)
    item.add_asset(key, asset)
    if file.path.suffix.lower() in (".tif", ".tiff"):
        with rasterio.open(file.current) as raster:
            asset.extra_fields |= {
                "data_type": raster.dtypes[0],
                "nodata": int(raster.nodata),
                "bands": [{"name": name} for name in raster.descriptions],
                "raster:sampling": raster.tags().get("AREA_OR_POINT", "Area").lower(),
            }
            if raster.scales[0] != 1:
                asset.extra_fields["raster:scale"] = raster.scales[0]
    extension = FileExtension.ext(asset, add_if_missing=True)
    extension.apply(size=file.current.stat().st_size, checksum=SHA256_MULTIHASH + sha256_of(file.current))


def _media_type(file: Path) -> str:
    import pystac

    kinds = {
        ".png": pystac.MediaType.PNG,
        ".gpkg": pystac.MediaType.GEOPACKAGE,
        ".geojson": pystac.MediaType.GEOJSON,
        ".fgb": pystac.MediaType.FLATGEOBUF,
        ".xml": pystac.MediaType.XML,
        ".qml": pystac.MediaType.XML,
    }
    if file.suffix in kinds:
        return kinds[file.suffix]
    with rasterio.open(file) as raster:
        is_cog = raster.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
    return pystac.MediaType.COG if is_cog else pystac.MediaType.GEOTIFF


def _add_classes(asset: "pystac.Asset", label_set: LabelSet, pixels: Sequence[int]) -> None:
    from pystac.extensions.classification import Classification, ClassificationExtension

    classes = list_classes(label_set)
    total = max(sum(int(pixels[each.value]) for each in classes), 1)
    names = [re.sub(r"[^0-9A-Za-z_-]+", "_", each.name) for each in classes]  # what the extension allows
    listed = [
        Classification.create(
            value=each.value,
            name=name if names.count(name) == 1 and name.strip("_") else f"class_{each.value}",
            title=each.name,
            color_hint=each.hex,
            count=int(pixels[each.value]),
            percentage=round(100 * int(pixels[each.value]) / total, 4),
        )
        for each, name in zip(classes, names, strict=True)
    ]
    nodata = Classification.create(
        value=BACKGROUND, name="nodata", title="no class", nodata=True, count=int(pixels[BACKGROUND])
    )
    ClassificationExtension.ext(asset, add_if_missing=True).classes = [nodata, *listed]
