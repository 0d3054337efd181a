"""The legend of a map for a GIS, in files beside it: names, colours and pixel counts of the classes.

A GeoTIFF has room for colours, but not for class names or a table of classes. GDAL keeps these in a side-car file,
`map.tif.aux.xml`, which QGIS and ArcGIS read too. `map.qml` is the style that QGIS applies to `map.tif`, and to
polygons of the same name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from hf_seg.labels import BACKGROUND, LabelSet

Color = tuple[int, int, int]
INTEGER, REAL, STRING = range(3)  # GDALRATFieldType
# columns of the table, named as ArcGIS and QGIS expect them: name, GDALRATFieldType, GDALRATFieldUsage
COLUMNS = (
    ("Value", INTEGER, 5),
    ("Count", REAL, 1),  # a GDALRATFieldType of integers has 32 bits, too few for the pixels of a large map
    ("Class", STRING, 2),
    ("Red", INTEGER, 6),
    ("Green", INTEGER, 7),
    ("Blue", INTEGER, 8),
)
POLYGON = 2  # QgsWkbTypes::GeometryType


class LegendClass(NamedTuple):
    """One class of a map: its id, name and colour."""

    value: int
    name: str
    color: Color

    @property
    def hex(self) -> str:
        """The colour as RRGGBB."""
        return "{:02X}{:02X}{:02X}".format(*self.color)


def list_classes(label_set: LabelSet) -> list[LegendClass]:
    """Return the classes without the background, which stands for pixels without a class."""
    classes = zip(range(label_set.num_labels), label_set.names, label_set.colors, strict=True)
    return [LegendClass(*each) for each in classes if each[0] != BACKGROUND]


def attribute_table(label_set: LabelSet, pixels: Sequence[int]) -> bytes:
    """Return the content of `map.tif.aux.xml`: category names and a raster attribute table of band 1.

    Args:
        pixels: of the map by id.
    """
    root = Element("PAMDataset")
    band = SubElement(root, "PAMRasterBand", band="1")
    names = SubElement(band, "CategoryNames")
    for name in label_set.names:
        SubElement(names, "Category").text = name
    table = SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(COLUMNS):
        column = SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", kind), ("Usage", usage)):
            SubElement(column, tag).text = str(text)
    for index, each in enumerate(list_classes(label_set)):
        row = SubElement(table, "Row", index=str(index))
        for value in (each.value, int(pixels[each.value]), each.name, *each.color):
            SubElement(row, "F").text = str(value)
    return _to_bytes(root)


def qgis_style(label_set: LabelSet) -> bytes:
    """Return the content of `map.qml`: a paletted raster, and polygons by their field `class_id`.

    QGIS reads the part of the kind of layer that it opens, so one file is the style of both.
    """
    root = Element("qgis", version="3.22", styleCategories="Symbology")
    renderer = SubElement(
        SubElement(root, "pipe"), "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1"
    )
    SubElement(renderer, "rasterTransparency")
    palette = SubElement(renderer, "colorPalette")
    for each in list_classes(label_set):
        SubElement(
            palette, "paletteEntry", value=str(each.value), color=f"#{each.hex.lower()}", alpha="255", label=each.name
        )
    _add_polygon_renderer(root, label_set)
    SubElement(root, "layerGeometryType").text = str(POLYGON)
    return b"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n" + _to_bytes(root)


def _add_polygon_renderer(root: Element, label_set: LabelSet) -> None:
    renderer = SubElement(root, "renderer-v2", type="categorizedSymbol", attr="class_id", symbollevels="0")
    categories, symbols = SubElement(renderer, "categories"), SubElement(renderer, "symbols")
    for index, each in enumerate(list_classes(label_set)):
        category = {"value": str(each.value), "type": "long", "symbol": str(index), "label": each.name}
        SubElement(categories, "category", category, render="true")
        symbol = SubElement(symbols, "symbol", type="fill", name=str(index), alpha="1")
        layer = SubElement(symbol, "layer", {"class": "SimpleFill"}, enabled="1", locked="0")
        options = SubElement(layer, "Option", type="Map")
        color = "{},{},{},255".format(*each.color)
        for name, value in (("color", color), ("style", "solid"), ("outline_style", "no")):
            SubElement(options, "Option", type="QString", name=name, value=value)


def _to_bytes(root: Element) -> bytes:
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def side_car(path: Path) -> Path:
    """Return the file in which GDAL keeps what a raster has no room for."""
    return path.with_name(f"{path.name}.aux.xml")


def style_file(path: Path) -> Path:
    """Return the file in which QGIS looks for the style of a raster or of polygons."""
    return path.with_suffix(".qml")
