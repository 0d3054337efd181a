"""Open maps in QGIS, print what its legend says of each, and draw map and legend as a picture.

    QT_QPA_PLATFORM=offscreen /usr/bin/python3 tests/render_in_qgis.py map.tif map.gpkg --output qgis.png

Runs in the Python that has QGIS (Debian: `apt install qgis python3-qgis`), which needs nothing of this project. It only
opens the files: names and colours come from what lies beside a map.
"""

import argparse
import json

from qgis.core import (
    QgsApplication,
    QgsLayoutExporter,
    QgsLayoutItemLegend,
    QgsLayoutItemMap,
    QgsLayoutPoint,
    QgsLayoutSize,
    QgsPrintLayout,
    QgsProject,
    QgsRasterLayer,
    QgsVectorLayer,
)

SIDE = 120  # of the map in mm


def open_layer(path):
    """Return a raster or vector layer with the style that QGIS finds for it."""
    kind = QgsRasterLayer if path.lower().endswith((".tif", ".tiff")) else QgsVectorLayer
    layer = kind(path, path.rpartition("/")[2])
    if not layer.isValid():
        raise SystemExit(f"error: {path} cannot be opened in QGIS")
    return layer


def legend_of(layer):
    """Return [value, name, colour] of each class in the legend of a layer; other renderers have none."""
    renderer = layer.renderer()
    if renderer.type() == "paletted":
        return [[each.value, each.label, each.color.name()] for each in renderer.classes()]
    if renderer.type() == "categorizedSymbol":
        return [[each.value(), each.label(), each.symbol().color().name()] for each in renderer.categories()]
    return []


def draw(layer, output, dpi):
    """Draw a layer beside its legend to a PNG, as a print layout of QGIS."""
    project = QgsProject.instance()
    layout = QgsPrintLayout(project)
    layout.initializeDefaults()
    extent = layer.extent()
    shape = extent.width() / extent.height()
    width, height = (SIDE, SIDE / shape) if shape > 1 else (SIDE * shape, SIDE)
    picture = QgsLayoutItemMap(layout)
    picture.setLayers([layer])
    picture.setCrs(layer.crs())
    picture.attemptMove(QgsLayoutPoint(3, 3))
    picture.attemptResize(QgsLayoutSize(width, height))
    picture.setExtent(extent)
    layout.addLayoutItem(picture)
    legend = QgsLayoutItemLegend(layout)
    layout.addLayoutItem(legend)
    legend.attemptMove(QgsLayoutPoint(width + 5, 3))
    layout.pageCollection().page(0).setPageSize(QgsLayoutSize(width + 75, max(height, 70) + 6))
    settings = QgsLayoutExporter.ImageExportSettings()
    settings.dpi = dpi
    if QgsLayoutExporter(layout).exportToImage(output, settings) != QgsLayoutExporter.Success:
        raise SystemExit(f"error: {output} cannot be written")


def main():
    """Open the files, print their legends as JSON, and draw the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="maps (.tif) and polygons")
    parser.add_argument("--output", help="picture of the first file and its legend, a PNG")
    parser.add_argument("--dpi", type=int, default=100, help="resolution of the picture (100)")
    args = parser.parse_args()
    application = QgsApplication([], False)
    application.initQgis()
    layers = [open_layer(path) for path in args.files]
    QgsProject.instance().addMapLayer(layers[0])
    print(json.dumps({path: legend_of(layer) for path, layer in zip(args.files, layers, strict=True)}))
    if args.output:
        draw(layers[0], args.output, args.dpi)


if __name__ == "__main__":
    main()
