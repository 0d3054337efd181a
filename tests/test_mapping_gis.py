"""What a GIS and a catalog find beside a map: class names, style, provenance, and the STAC item."""

import datetime
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from conftest import write_tiff
from mapping_networks import ROTATED, pointwise, predict, read, speckled
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from rasterio.warp import transform as transform_coordinates

import hf_seg
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks, use_network
from hf_seg.inference.predict import Predictor
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.mapping.job import MapJob
from hf_seg.mapping.legend import attribute_table, qgis_style
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.provenance import model_tags, parse_times
from hf_seg.models import build_model

CLASS_NAMES, PALETTE, NUM_LABELS = OPEN_EARTH_MAP.names, OPEN_EARTH_MAP.palette, OPEN_EARTH_MAP.num_labels
QGIS_PYTHON = Path("/usr/bin/python3")  # Debian's; no other Python can import its QGIS
HAS_QGIS = Path("/usr/lib/python3/dist-packages/qgis").is_dir()
HEX_COLORS = ["#{:02x}{:02x}{:02x}".format(*color) for color in PALETTE.tolist()]
needs_pystac = pytest.mark.skipif(importlib.util.find_spec("pystac") is None, reason="needs the extra `stac`")
needs_vector = pytest.mark.skipif(importlib.util.find_spec("pyogrio") is None, reason="needs the extra `vector`")


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Return a scene in UTM with a collar, so that its map has nodata."""
    image = speckled(80, 90)
    image[:, :12] = 0
    write_tiff(tmp_path / "a.tif", image, crs="EPSG:32633", transform=from_origin(4e5, 4e6, 2, 2))
    return tmp_path / "a.tif"


def read_xml(content: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(content)


def rows_of(band: ElementTree.Element) -> list[list[str | None]]:
    return [[cell.text for cell in row] for row in band.findall("GDALRasterAttributeTable/Row")]


@pytest.mark.parametrize("cog", [False, True])
def test_gdal_reads_the_class_names_and_a_table_of_the_classes(tmp_path: Path, scene: Path, cog: bool) -> None:
    predict(pointwise(), scene, tmp_path / "b.tif", cog=cog)
    with rasterio.open(tmp_path / "b.tif") as result:
        assert result.files == [str(tmp_path / "b.tif"), str(tmp_path / "b.tif.aux.xml")]
        assert (result.descriptions, result.nodata) == (("land cover",), 0)
        ids = result.read(1)
    rasterio.shutil.copy(tmp_path / "b.tif", tmp_path / "b.vrt", driver="VRT")  # what GDAL read, as text
    band = read_xml((tmp_path / "b.vrt").read_bytes()).find("VRTRasterBand")
    assert band is not None
    assert [name.text for name in band.findall("CategoryNames/Category")] == list(CLASS_NAMES)
    columns = [column.findtext("Name") for column in band.findall("GDALRasterAttributeTable/FieldDefn")]
    assert columns == ["Value", "Count", "Class", "Red", "Green", "Blue"]
    counts = np.bincount(ids.ravel(), minlength=NUM_LABELS)
    assert counts[0] == 12 * 80 and (counts[1:] > 0).sum() >= 2
    assert rows_of(band) == [
        [str(i), str(counts[i]), CLASS_NAMES[i], *map(str, PALETTE[i].tolist())] for i in range(1, NUM_LABELS)
    ]


def test_the_style_of_qgis_has_the_names_and_the_colours_of_the_map(tmp_path: Path, scene: Path) -> None:
    predict(pointwise(), scene, tmp_path / "b.tif")
    with rasterio.open(tmp_path / "b.tif") as result:
        colors, names = result.colormap(1), result.tags(1)
    expected = {str(i): (names[f"class_{i}"], "#{:02x}{:02x}{:02x}".format(*colors[i])) for i in range(1, NUM_LABELS)}
    style = read_xml((tmp_path / "b.qml").read_bytes())
    renderer = style.find("pipe/rasterrenderer")
    assert renderer is not None and renderer.attrib["type"] == "paletted" and renderer.attrib["band"] == "1"
    entries = renderer.findall("colorPalette/paletteEntry")  # without an entry, nodata stays transparent
    assert {each.attrib["value"]: (each.attrib["label"], each.attrib["color"]) for each in entries} == expected
    assert {each.attrib["alpha"] for each in entries} == {"255"} and len(entries) == NUM_LABELS - 1
    categories = style.findall("renderer-v2/categories/category")
    symbols = {each.attrib["name"]: each.find("layer/Option/Option[@name='color']") for each in style.iter("symbol")}
    for each in categories:
        red, green, blue, alpha = symbols[each.attrib["symbol"]].attrib["value"].split(",")  # type: ignore[union-attr]
        name, color = expected[each.attrib["value"]]
        assert (each.attrib["label"], alpha) == (name, "255")
        assert f"#{int(red):02x}{int(green):02x}{int(blue):02x}" == color
    assert len(categories) == NUM_LABELS - 1


OTHER_CLASSES = LabelSet(
    names=("background", 'a & <b> "c"', "Wälder"),
    colors=((0, 0, 0), (1, 2, 255), (3, 4, 5)),
    values={0: 0, 1: 1, 2: 2},
    aliases=((),) * 3,
)


def test_names_may_contain_any_character() -> None:
    legend = OTHER_CLASSES
    band = read_xml(attribute_table(legend, [5, 2**40, 0])).find("PAMRasterBand")
    assert band is not None
    assert rows_of(band) == [["1", str(2**40), legend.names[1], "1", "2", "255"], ["2", "0", "Wälder", "3", "4", "5"]]
    labels = [each.attrib["label"] for each in read_xml(qgis_style(legend)).iter("paletteEntry")]
    assert labels == list(legend.names[1:])


@needs_pystac
@needs_vector
def test_a_model_of_other_classes_has_their_legend(tmp_path: Path, scene: Path) -> None:
    network = torch.nn.Conv2d(3, 3, 1).requires_grad_(False)
    network.weight.zero_()
    network.bias.copy_(torch.tensor([9.0, 0.0, 1.0]))
    networks = [use_network(network, crop_size=32, label_set=OTHER_CLASSES)]
    predict(networks, scene, tmp_path / "b.tif", stac=True, datetime="2025-04-01", polygons=".gpkg", preview=True)
    band = read_xml((tmp_path / "b.tif.aux.xml").read_bytes()).find("PAMRasterBand")
    assert band is not None
    assert [name.text for name in band.findall("CategoryNames/Category")] == list(OTHER_CLASSES.names)
    assert rows_of(band)[1][:3] == ["2", str(80 * 78), "Wälder"]
    assert (tmp_path / "b.qml").read_bytes() == qgis_style(OTHER_CLASSES)
    item = read_item(tmp_path / "b.stac.json")
    listed = [
        (each["value"], each["name"], each["title"]) for each in item["assets"]["land_cover"]["classification:classes"]
    ]
    assert listed == [(0, "nodata", "no class"), (1, "a_b_c_", 'a & <b> "c"'), (2, "W_lder", "Wälder")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a toy network."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    torch.manual_seed(0)
    network = build_model("toy-segformer", crop_size=32, from_scratch=True)
    export_model(network, folder, crop_size=32, recipe="", results=None)
    return folder


def test_the_tags_name_the_model_its_checksum_and_the_software(tmp_path: Path, scene: Path, model: Path) -> None:
    predict(model, scene, tmp_path / "b.tif", confidence=True)
    predict(pointwise(), scene, tmp_path / "c.tif")
    (network,) = load_networks(model)
    for name in ("b.tif", "b_confidence.tif"):
        with rasterio.open(tmp_path / name) as result:
            tags = result.tags()
        assert (tags["model"], tags["model_sha256"]) == ("toy", network.sha256)
        assert tags["TIFFTAG_SOFTWARE"] == f"hf_seg {hf_seg.__version__}" and "model_revision" not in tags
    with rasterio.open(tmp_path / "c.tif") as result:  # a network in memory has no files and no name
        assert not {"model", "model_revision", "model_sha256"} & result.tags().keys()
    pair = load_networks(model, low_memory=True) * 2
    assert model_tags(pair)["model_sha256"] == f"{network.sha256} {network.sha256}"
    assert model_tags(pair)["model"] == "toy"


def validate(item: dict[str, Any]) -> None:
    """Check an item by the schemas of STAC that pystac contains."""
    from jsonschema import Draft7Validator
    from pystac.validation.local_validator import get_local_schema_cache
    from referencing import Registry, Resource

    schemas = get_local_schema_cache()
    registry = Registry().with_resources([(key, Resource.from_contents(value)) for key, value in schemas.items()])
    core = next(value for key, value in schemas.items() if key.endswith("/item.json"))
    errors = [*Draft7Validator(core, registry=registry).iter_errors(item)]
    assert not errors, errors


def read_item(path: Path) -> dict[str, Any]:
    item: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    validate(item)
    return item


@needs_pystac
@needs_vector
def test_the_item_describes_the_map_and_all_of_its_files(tmp_path: Path, scene: Path, model: Path) -> None:
    import pystac
    from pystac.extensions.classification import ClassificationExtension
    from pystac.extensions.file import FileExtension
    from pystac.extensions.projection import ProjectionExtension

    options = {"confidence": True, "probabilities": True, "polygons": ".gpkg", "preview": True, "cog": True}
    summary = predict(model, scene, tmp_path / "b.tif", stac=True, datetime="2025-04-01T12:30:00+02:00", **options)
    content = read_item(tmp_path / "b.stac.json")
    item = pystac.Item.from_dict(content)
    assert item.id == "b" and item.datetime == datetime.datetime(2025, 4, 1, 10, 30, tzinfo=datetime.UTC)
    with rasterio.open(tmp_path / "b.tif") as result:
        tags, ids = result.tags(), result.read(1)
        projection = ProjectionExtension.ext(item)
        assert (projection.code, projection.wkt2, projection.shape) == ("EPSG:32633", None, [80, 90])
        assert projection.transform == list(result.transform)[:6] and projection.bbox == list(result.bounds)
        xs, ys = zip(*(result.transform * corner for corner in ((0, 0), (90, 0), (90, 80), (0, 80))), strict=True)
    west, north = (float(side[0]) for side in transform_coordinates("EPSG:32633", "EPSG:4326", xs[:1], ys[:1]))
    assert (item.bbox[0], item.bbox[3]) == pytest.approx((west, north), abs=2e-5)
    assert all(item.properties[f"hf_seg:{key}"] == tags[key] for key in ("model", "model_sha256", "scene", "windows"))
    assert item.properties["processing:software"] == {"hf_seg": hf_seg.__version__}
    # every file of the map, by a path relative to the item, with size and checksum
    files = {(tmp_path / asset.href).resolve() for asset in item.assets.values()}
    assert files == {path for path in summary.files if path != tmp_path / "b.stac.json"}
    for asset in item.assets.values():
        stored = (tmp_path / asset.href).read_bytes()
        described = FileExtension.ext(asset)
        assert described.size == len(stored) and described.checksum == "1220" + hashlib.sha256(stored).hexdigest()
    assert item.assets["land_cover"].media_type == pystac.MediaType.COG
    assert item.assets["polygons"].media_type == pystac.MediaType.GEOPACKAGE
    assert [band["name"] for band in content["assets"]["probabilities"]["bands"]] == list(CLASS_NAMES)
    assert content["assets"]["confidence"]["raster:scale"] == 1 / 254
    assert content["assets"]["land_cover"]["raster:sampling"] == "area"
    nodata, *classes = ClassificationExtension.ext(item.assets["land_cover"]).classes or []
    counts = np.bincount(ids.ravel(), minlength=NUM_LABELS)
    assert (nodata.value, nodata.nodata, nodata.count) == (0, True, counts[0])
    assert [(each.value, each.title, each.count) for each in classes] == [
        (i, CLASS_NAMES[i], counts[i]) for i in range(1, NUM_LABELS)
    ]
    assert [f"#{each.color_hint}".lower() for each in classes] == HEX_COLORS[1:]
    assert classes[2].name == "developed_space"  # names are for machines: no spaces
    assert sum(each.percentage for each in classes) == pytest.approx(100, abs=0.01)


@needs_pystac
def test_an_interrupted_map_has_the_same_item(tmp_path: Path, scene: Path, model: Path) -> None:
    predict(model, scene, tmp_path / "x" / "b.tif", window=None, stac=True)
    predictor = Predictor(load_networks(model), device=torch.device("cpu"))
    job = MapJob(predictor, scene, tmp_path / "y" / "b.tif", RasterOptions(stac=True))
    job.prepare()
    job.compute(job.missing(), show_progress=False)
    job.close()
    assert not list((tmp_path / "y").glob("b*"))
    predict(model, scene, tmp_path / "y" / "b.tif", window=None, stac=True)
    names = ["b.qml", "b.stac.json", "b.tif", "b.tif.aux.xml"]
    for folder in ("x", "y"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


@needs_pystac
@pytest.mark.parametrize(
    ("domain", "tags", "given", "expected", "source"),
    [
        (None, {"TIFFTAG_DATETIME": "2024:05:06 07:08:09"}, None, ("2024-05-06T07:08:09Z",), "TIFFTAG_DATETIME"),
        (
            None,
            {"TIFFTAG_DATETIME": "2024:05:06 07:08:09", "ACQUISITION_START_TIME": "2024-05-01T01:00:00.250"},
            None,
            ("2024-05-01T01:00:00.250000Z",),
            "ACQUISITION_START_TIME",
        ),
        (
            None,
            {"ACQUISITION_START_TIME": "2024-05-01T01:00:00", "ACQUISITION_STOP_TIME": "2024-05-01T01:00:25"},
            None,
            ("2024-05-01T01:00:00Z", "2024-05-01T01:00:25Z"),
            "ACQUISITION_START_TIME",
        ),
        ("IMAGERY", {"ACQUISITIONDATETIME": "2024-05-02 03:04:05"}, None, ("2024-05-02T03:04:05Z",), None),
        (
            None,
            {"TIFFTAG_DATETIME": "2024:05:06 07:08:09"},
            "2025-01-01/2025-02-01",
            ("2025-01-01T00:00:00Z", "2025-02-01T00:00:00Z"),
            "given",
        ),
        (
            None,
            {"ACQUISITION_DATE": "soon"},
            None,
            ("2001-09-09T01:46:40Z",),
            "modification time of the scene's file",
        ),
    ],
)
def test_the_time_of_the_item_is_that_of_the_scene(
    tmp_path: Path,
    scene: Path,
    caplog: pytest.LogCaptureFixture,
    domain: str | None,
    tags: dict[str, str],
    given: str | None,
    expected: tuple[str, ...],
    source: str | None,
) -> None:
    with rasterio.open(scene, "r+") as file:
        file.update_tags(ns=domain, **tags)
    os.utime(scene, (1e9, 1e9))
    with caplog.at_level(logging.WARNING):
        predict(pointwise(), scene, tmp_path / "b.tif", stac=True, datetime=given)
    properties = read_item(tmp_path / "b.stac.json")["properties"]
    if len(expected) == 1:
        assert properties["datetime"] == expected[0] and "end_datetime" not in properties
    else:
        assert properties["datetime"] is None
        assert (properties["start_datetime"], properties["end_datetime"]) == expected
    assert properties["hf_seg:datetime_source"] == (source or "ACQUISITIONDATETIME")
    warned = "has the modification time of the file, 2001-09-09T01:46:40+00:00; pass --datetime" in caplog.text
    assert warned == (expected == ("2001-09-09T01:46:40Z",))


@needs_pystac
def test_the_footprint_is_cut_at_longitude_180(tmp_path: Path) -> None:
    # 177 degrees west is the central meridian of zone 1; this map begins 20 km west of longitude 180
    (x,), (y,) = transform_coordinates("EPSG:4326", "EPSG:32601", [179.9], [60.0])
    write_tiff(tmp_path / "a.tif", speckled(40, 40), crs="EPSG:32601", transform=from_origin(x, y, 1000, 1000))
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", stac=True)
    item = read_item(tmp_path / "b.stac.json")
    assert item["geometry"]["type"] == "MultiPolygon" and len(item["geometry"]["coordinates"]) == 2
    west, south, east, north = item["bbox"]
    assert 179.8 < west < 180 and -179.6 < east < -179.2 and 59 < south < north < 60.1
    longitudes = [point[0] for (ring,) in item["geometry"]["coordinates"] for point in ring]
    assert all(179.8 < abs(longitude) <= 180 or longitude <= east for longitude in longitudes)


@needs_pystac
def test_the_footprint_of_rotated_maps_and_of_control_points_follows_the_ground(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", speckled(40, 50), crs="EPSG:32633", transform=ROTATED)
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", stac=True)
    ring = np.array(read_item(tmp_path / "b.stac.json")["geometry"]["coordinates"][0])
    xs, ys = zip(*(ROTATED * corner for corner in ((0, 0), (0, 40), (50, 40), (50, 0))), strict=True)
    corners = np.transpose(transform_coordinates("EPSG:32633", "EPSG:4326", xs, ys))
    for corner in corners:
        assert abs(ring - corner).max(axis=1).min() < 1e-6
    east, north = np.diff(ring, axis=0).T
    area = (ring[:-1, 0] * north - ring[:-1, 1] * east).sum() / 2
    assert area > 0  # counter-clockwise
    points = [GroundControlPoint(row, col, 9 + col / 1000, 50 - row / 1000) for row in (0, 40) for col in (0, 50)]
    write_tiff(tmp_path / "c.tif", speckled(40, 50), gcps=points, crs="EPSG:4326")
    predict(pointwise(), tmp_path / "c.tif", tmp_path / "d.tif", stac=True)
    assert read_item(tmp_path / "d.stac.json")["bbox"] == pytest.approx([9, 49.96, 9.05, 50])


@needs_pystac
def test_a_map_without_a_place_has_an_item_without_a_footprint(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", speckled(40, 40))
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", stac=True)
    item = read_item(tmp_path / "b.stac.json")
    assert item["geometry"] is None and "bbox" not in item and item["properties"]["proj:shape"] == [40, 40]
    custom = "+proj=laea +lat_0=50 +lon_0=9 +ellps=WGS84"
    write_tiff(tmp_path / "c.tif", speckled(40, 40), crs=custom, transform=from_origin(0, 0, 10, 10))
    predict(pointwise(), tmp_path / "c.tif", tmp_path / "d.tif", stac=True)
    item = read_item(tmp_path / "d.stac.json")
    assert item["properties"]["proj:code"] is None and item["properties"]["proj:wkt2"].startswith("PROJCRS[")
    assert item["bbox"] == pytest.approx([9, 49.9964, 9.0056, 50], abs=2e-4)


@needs_pystac
def test_a_scene_without_a_time_and_a_file_needs_one(tmp_path: Path, scene: Path) -> None:
    with rasterio.MemoryFile(scene.read_bytes()) as memory:
        with pytest.raises(UserError, match=r"^/vsimem/.* does not tell when it was acquired, which .* --datetime$"):
            predict(pointwise(), memory.name, tmp_path / "b.tif", stac=True)
        predict(pointwise(), memory.name, tmp_path / "b.tif", stac=True, datetime="2025-01-02")
    assert read_item(tmp_path / "b.stac.json")["properties"]["datetime"] == "2025-01-02T00:00:00Z"


@needs_pystac
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stac": True, "datetime": "yesterday"},
            "datetime is 'yesterday'; expected ISO 8601, e.g. 2025-04-01T10:30:00Z, or begin/end of an interval",
        ),
        (
            {"stac": True, "datetime": "2025-04-02/2025-04-01"},
            "datetime is '2025-04-02/2025-04-01'; its end is before its begin",
        ),
        ({"datetime": "2025-04-02"}, "datetime is a property of the STAC item; add --stac (stac=True)"),
    ],
)
def test_a_wrong_time_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        RasterOptions(**options)
    assert str(error.value) == message


def test_times_without_a_zone_are_utc() -> None:
    begin, end = parse_times("2025-04-01T02:00:00+02:00")
    assert begin == end == parse_times("2025-04-01")[0] == datetime.datetime(2025, 4, 1, tzinfo=datetime.UTC)


def test_an_item_names_the_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as without the extra
    with pytest.raises(UserError) as error:
        RasterOptions(stac=True)
    assert str(error.value) == "a STAC item needs pystac: pip install 'hf_seg[stac]'"


@needs_pystac
@pytest.mark.parametrize("name", ["b.qml", "b.stac.json"])
def test_a_file_beside_the_map_is_replaced_only_if_asked_for(tmp_path: Path, scene: Path, name: str) -> None:
    (tmp_path / name).write_text("of another map")
    with pytest.raises(UserError) as error:
        predict(pointwise(), scene, tmp_path / "b.tif", stac=True)
    assert str(error.value) == (
        f"{tmp_path / name} already exists; add --overwrite (overwrite=True), or name another file"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.tif", name])
    assert (tmp_path / name).read_text() == "of another map"
    predict(pointwise(), scene, tmp_path / "b.tif", stac=True, overwrite=True)
    assert (tmp_path / name).read_text() != "of another map"


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path, scene: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tif cannot be written \(File name too long\)$"):
        predict(pointwise(), scene, tmp_path / f"{'x' * 300}.tif")
    with pytest.raises(UserError, match=r"x\.tif\.aux\.xml cannot be written \(File name too long\)$"):
        predict(pointwise(), scene, tmp_path / f"{'x' * 248}.tif")


def test_a_deleted_map_is_written_again_over_what_it_left(tmp_path: Path, scene: Path) -> None:
    predict(pointwise(), scene, tmp_path / "b.tif")
    contents = {path.name: path.read_bytes() for path in tmp_path.glob("b*")}
    (tmp_path / "b.tif").unlink()
    (tmp_path / "b.tif.aux.xml").write_text("<PAMDataset>statistics of a GIS</PAMDataset>")
    predict(pointwise(), scene, tmp_path / "b.tif")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("b*")} == contents


def test_what_a_gis_stored_about_a_replaced_file_is_deleted(tmp_path: Path, scene: Path) -> None:
    predict(pointwise(), scene, tmp_path / "b.tif", confidence=True)
    stale = tmp_path / "b_confidence.tif.aux.xml"
    stale.write_text("<PAMDataset/>")
    predict(pointwise(2), scene, tmp_path / "b.tif", confidence=True, overwrite=True)
    assert not stale.exists() and (tmp_path / "b_confidence.tif").exists()


@needs_vector
def test_polygons_carry_their_style_or_have_it_beside_them(tmp_path: Path, scene: Path) -> None:
    import pyogrio.raw

    predict(pointwise(), scene, tmp_path / "b.tif", polygons=str(tmp_path / "p.gpkg"))
    assert not (tmp_path / "p.qml").exists()
    meta, _, _, columns = pyogrio.raw.read(tmp_path / "p.gpkg", layer="layer_styles")
    (row,) = [dict(zip(meta["fields"], values, strict=True)) for values in zip(*columns, strict=True)]
    assert (row["f_table_name"], row["f_geometry_column"], bool(row["useAsDefault"])) == ("land_cover", "geom", True)
    assert row["styleQML"].encode() == (tmp_path / "b.qml").read_bytes()
    predict(pointwise(), scene, tmp_path / "c.tif", polygons=str(tmp_path / "q.geojson"))
    assert (tmp_path / "q.qml").read_bytes() == (tmp_path / "c.qml").read_bytes()


def test_the_summary_names_every_file_and_prints_the_legend_in_one_line(tmp_path: Path, scene: Path) -> None:
    summary = predict(pointwise(), scene, tmp_path / "b.tif", confidence=True)
    names = [path.name for path in summary.files]
    assert names == ["b.tif", "b_confidence.tif", "b.tif.aux.xml", "b.qml"]
    assert all(path.is_file() for path in summary.files)
    assert str(summary).endswith(
        f"written: {tmp_path / 'b.tif'}\nwritten: {tmp_path / 'b_confidence.tif'}\n"
        "class names and colours for a GIS: b.tif.aux.xml, b.qml"
    )


@pytest.mark.skipif(not HAS_QGIS, reason="needs QGIS: apt install python3-qgis")
@needs_vector
def test_qgis_shows_the_classes_by_name_and_colour(tmp_path: Path, scene: Path) -> None:
    for suffix in (".gpkg", ".geojson", ".fgb"):
        predict(pointwise(), scene, tmp_path / f"{suffix[1:]}_map.tif", polygons=suffix)
    (tmp_path / "alone").mkdir()
    (tmp_path / "gpkg_map.gpkg").rename(tmp_path / "alone" / "map.gpkg")  # with nothing beside it
    files = ["gpkg_map.tif", "alone/map.gpkg", "geojson_map.geojson", "fgb_map.fgb"]
    script = Path(__file__).with_name("render_in_qgis.py")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "QT_QPA_PLATFORM": "offscreen"}
    command = [str(QGIS_PYTHON), str(script), *files, "--output", "picture.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    legends = json.loads(done.stdout)
    for file in files:
        found = [(int(value), name, color) for value, name, color in legends[file]]
        assert found == [(i, CLASS_NAMES[i], HEX_COLORS[i]) for i in range(1, NUM_LABELS)], file
    pixels = np.moveaxis(read(tmp_path / "picture.png")[:3], 0, -1).reshape(-1, 3)
    counts = np.bincount(read(tmp_path / "gpkg_map.tif").ravel(), minlength=NUM_LABELS)
    most = int(counts[1:].argmax()) + 1
    for index in range(1, NUM_LABELS):
        drawn = (pixels == PALETTE[index]).all(axis=1).sum()
        assert drawn > (10_000 if index == most else 50)  # on the map; in the legend at least
    assert not (pixels == PALETTE[0]).all(axis=1).mean() > 0.02  # nodata is transparent, not black
