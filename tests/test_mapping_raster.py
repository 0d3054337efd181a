"""Properties of the map of a scene: georeference, nodata, seams, and the content of the files."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import write_tiff
from mapping_networks import ROTATED, Constant, contextual, pointwise, predict, probs_of, read, speckled
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import Compression, Interleaving
from rasterio.transform import from_origin
from torch import Tensor, nn

import hf_seg.mapping.polygons
from hf_seg.errors import UserError
from hf_seg.inference.load import LoadedNetwork
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.mapping.raster import predict_raster


@pytest.mark.parametrize(
    ("height", "width", "window", "stride"),
    [(40, 50, 32, 0.5), (32, 32, 32, 1.0), (70, 33, 32, 0.3), (10, 90, 32, 0.5), (5, 4, 16, 0.25), (1, 1, 8, 1.0)],
)
def test_a_constant_network_gives_a_constant_map(
    tmp_path: Path, height: int, width: int, window: int, stride: float
) -> None:
    write_tiff(tmp_path / "a.tif", speckled(height, width))
    summary = predict(Constant(), tmp_path / "a.tif", tmp_path / "b.tif", window=window, stride=stride)
    assert np.array_equal(read(tmp_path / "b.tif"), np.full((height, width), 6))
    assert summary.pixels["water"] == height * width and sum(summary.pixels.values()) == height * width
    assert summary.nodata_pixels == 0 and summary.seam_score is None


@pytest.mark.parametrize("bands", [1, 3])
def test_a_pointwise_network_gives_the_map_of_one_full_pass(tmp_path: Path, bands: int) -> None:
    image = np.stack([speckled(560, 90, seed) for seed in range(bands)])
    write_tiff(tmp_path / "a.tif", image)
    network = pointwise()
    expected = probs_of(network, image[0] if bands == 1 else np.moveaxis(image, 0, -1))
    predict(network, tmp_path / "a.tif", tmp_path / "b.tif", confidence=True, probabilities=True)
    assert np.array_equal(read(tmp_path / "b.tif"), expected[1:].argmax(0) + 1)
    confidence, probs = read(tmp_path / "b_confidence.tif"), read(tmp_path / "b_probabilities.tif")
    assert abs(confidence - 254 * expected[1:].max(0)).max() < 0.51
    assert abs(probs - 254 * expected).max() < 0.51


@pytest.mark.parametrize(
    "name",
    [
        "georef/RGB.byte.tif",
        "georef/solaris_sample_geotiff.tif",
        "OpenEarthMap_wo_xBD/koeln/images/koeln_50.tif",
        "OpenEarthMap_wo_xBD/houston/images/houston_16.tif",
    ],
)
@pytest.mark.parametrize("cog", [False, True])
def test_the_map_of_a_real_scene_has_its_georeference_and_footprint(
    tmp_path: Path, realdata: Path, name: str, cog: bool
) -> None:
    summary = predict(pointwise(), realdata / name, tmp_path / "b.tif", window=256, cog=cog)
    with rasterio.open(realdata / name) as scene, rasterio.open(tmp_path / "b.tif") as result:
        assert (result.crs, result.transform, result.shape) == (scene.crs, scene.transform, scene.shape)
        assert result.nodata == 0 and (scene.nodata is None or scene.nodata == result.nodata)
        assert np.array_equal(result.dataset_mask(), scene.dataset_mask())
        assert (result.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG") is cog
        on_plane = np.linalg.det(np.array(scene.transform).reshape(3, 3)) * -1e-6 * sum(summary.pixels.values())
    if scene.crs.is_projected:  # in a UTM zone areas are distorted by about 0.1 %
        assert sum(summary.areas_km2.values()) == pytest.approx(on_plane, rel=4e-3)


@pytest.mark.parametrize("cog", [False, True])
def test_rotated_transforms_and_control_points_are_preserved(tmp_path: Path, cog: bool) -> None:
    write_tiff(tmp_path / "a.tif", speckled(60, 70), crs="EPSG:32633", transform=ROTATED)
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", cog=cog)
    with rasterio.open(tmp_path / "b.tif") as result:
        assert result.transform.almost_equals(ROTATED) and result.crs == CRS.from_epsg(32633)
    points = [GroundControlPoint(row, col, 9 + col / 1000, 50 - row / 1000) for row in (0, 59) for col in (0, 69)]
    write_tiff(tmp_path / "c.tif", speckled(60, 70), gcps=points, crs="EPSG:4326")
    predict(pointwise(), tmp_path / "c.tif", tmp_path / "d.tif", cog=cog)
    with rasterio.open(tmp_path / "d.tif") as result:
        found, crs = result.gcps
        assert crs == CRS.from_epsg(4326) and [(p.row, p.col, p.x, p.y) for p in found] == [
            (p.row, p.col, p.x, p.y) for p in points
        ]


@pytest.mark.parametrize("cog", [False, True])
def test_the_map_has_tiles_colours_names_overviews_and_tags(tmp_path: Path, cog: bool) -> None:
    noise = np.random.default_rng(0).integers(1, 255, (700, 1100), dtype=np.uint8)
    write_tiff(tmp_path / "a.tif", noise, crs="EPSG:32633", transform=from_origin(4e5, 4e6, 2, 2))
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", window=256, cog=cog, confidence=True, abstain=0.2)
    with rasterio.open(tmp_path / "b.tif") as result:
        colors = result.colormap(1)
        assert [colors[i][:3] for i in range(OPEN_EARTH_MAP.num_labels)] == [
            tuple(color) for color in OPEN_EARTH_MAP.palette.tolist()
        ]
        assert result.profile["tiled"] and result.block_shapes == [(512, 512)]
        assert result.compression == Compression.deflate and result.descriptions == ("land cover",)
        assert [result.tags(1)[f"class_{i}"] for i in range(OPEN_EARTH_MAP.num_labels)] == list(OPEN_EARTH_MAP.names)
        tags = result.tags()
        assert [tags[key] for key in ("scene", "windows", "strides", "tta", "abstain")] == [
            "a.tif",
            "256",
            "128",
            "none",
            "0.2",
        ]
        assert float(tags["seam_score"]) == pytest.approx(1, abs=0.1)
        assert result.overviews(1)[:2] == [2, 4]
        small = result.read(1, out_shape=(350, 550))
        assert np.isin(small, result.read(1)).all()  # ids, never averages of ids
    with rasterio.open(tmp_path / "b_confidence.tif") as confidence:
        assert confidence.nodata == 255 and confidence.scales == (1 / 254,) and confidence.overviews(1)
        assert confidence.interleaving == Interleaving.band


def test_pixels_below_the_threshold_get_no_class_and_keep_their_confidence(tmp_path: Path) -> None:
    image = speckled(50, 60)
    image[:, :9] = 0
    write_tiff(tmp_path / "a.tif", image)
    network = pointwise()
    expected = probs_of(network, image)[1:]
    threshold = float(np.median(expected.max(0)))
    summary = predict(network, tmp_path / "a.tif", tmp_path / "b.tif", abstain=threshold, confidence=True)
    sure = (expected.max(0) >= threshold) & (image > 0)
    near = abs(expected.max(0) - threshold) < 1e-5
    assert np.array_equal(read(tmp_path / "b.tif")[~near], np.where(sure, expected.argmax(0) + 1, 0)[~near])
    confidence = read(tmp_path / "b_confidence.tif")
    assert (confidence[:, :9] == 255).all() and (confidence[:, 9:] < 255).all()
    assert summary.nodata_pixels == (read(tmp_path / "b.tif") == 0).sum()


def test_an_ensemble_averages_probabilities_and_reports_disagreement(tmp_path: Path) -> None:
    image = speckled(530, 45)
    write_tiff(tmp_path / "a.tif", image)
    networks, weights = [pointwise(seed) for seed in (1, 2, 6)], [1.0, 3.0, 2.0]
    members = [
        LoadedNetwork(module=network, crop_size=window, weight=weight)
        for network, window, weight in zip(networks, (32, 48, 16), weights, strict=True)
    ]
    predict(members, tmp_path / "a.tif", tmp_path / "b.tif", window=None, disagreement=True, confidence=True)
    probs = np.stack([probs_of(network, image) for network in networks])
    mean = np.average(probs, axis=0, weights=weights)
    winner = mean[1:].argmax(0) + 1
    near = np.diff(np.sort(mean[1:], axis=0)[-2:], axis=0)[0] < 1e-5
    assert near.mean() < 0.01 and np.array_equal(read(tmp_path / "b.tif")[~near], winner[~near])
    assert abs(read(tmp_path / "b_confidence.tif") - 254 * mean[1:].max(0)).max() < 0.51
    others = np.average(probs[:, 1:].argmax(1) + 1 != winner, axis=0, weights=weights)
    wrong = abs(read(tmp_path / "b_disagreement.tif") - 254 * others) > 0.51
    assert wrong.mean() < 0.01 and len(np.unique(others)) >= 3
    with rasterio.open(tmp_path / "b.tif") as result:
        assert result.tags()["windows"] == "32 48 16"


def fill_zero_tag(path: Path, image: np.ndarray, gap: np.ndarray, value: float) -> None:
    write_tiff(path, np.where(gap, np.uint8(value), image), nodata=value)


def fill_float_tag(path: Path, image: np.ndarray, gap: np.ndarray, value: float) -> None:
    write_tiff(path, np.where(gap, np.float32(value), image.astype(np.float32)), nodata=value)


def fill_under_mask(path: Path, image: np.ndarray, gap: np.ndarray, value: float) -> None:
    write_tiff(path, np.where(gap, np.uint8(value), image))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~gap)


@pytest.mark.parametrize(
    ("write", "values"),
    [
        (fill_zero_tag, (0, 255)),
        (fill_float_tag, (-9999.0, 1e30)),
        (fill_float_tag, (float("nan"), 254.0)),
        (fill_under_mask, (0, 200)),
    ],
)
def test_the_values_of_nodata_pixels_do_not_affect_other_pixels(
    tmp_path: Path, write: Callable[..., None], values: tuple[float, float]
) -> None:
    image = np.clip(speckled(100, 110), 1, 250)
    gap = np.zeros(image.shape, dtype=bool)
    gap[:, :20] = gap[40:60, 50:80] = gap[70, 100] = True
    results = []
    for name, value in zip(("x", "y"), values, strict=True):
        write(tmp_path / name / "a.tif", image, gap, value)
        predict(contextual(), tmp_path / name / "a.tif", tmp_path / name / "b.tif", window=64, confidence=True)
        results.append((read(tmp_path / name / "b.tif"), read(tmp_path / name / "b_confidence.tif")))
        assert np.array_equal(results[-1][0] == 0, gap) and np.array_equal(results[-1][1] == 255, gap)
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


def test_the_zero_collar_gets_no_class_and_zeros_inside_the_swath_do(tmp_path: Path) -> None:
    image = speckled(600, 80)
    collar = np.add.outer(np.arange(600), 8 * np.arange(80)) < 400
    image[collar] = 0
    image[300:310, 60:70] = 0
    write_tiff(tmp_path / "a.tif", image)
    predict(contextual(), tmp_path / "a.tif", tmp_path / "b.tif", window=64)
    assert np.array_equal(read(tmp_path / "b.tif") == 0, collar)
    predict(contextual(), tmp_path / "a.tif", tmp_path / "c.tif", window=64, zero_collar=False)
    assert (read(tmp_path / "c.tif") > 0).all()


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_the_bytes_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    write_tiff(tmp_path / "a.tif", speckled(150, 170))
    settings = {"window": 64, "confidence": True, "probabilities": True}
    predict(contextual(), tmp_path / "a.tif", tmp_path / "b.tif", batch_size=1, **settings)
    predict(contextual(), tmp_path / "a.tif", tmp_path / "c.tif", batch_size=batch_size, **settings)
    for layer in ("", "_confidence", "_probabilities"):
        assert (tmp_path / f"b{layer}.tif").read_bytes() == (tmp_path / f"c{layer}.tif").read_bytes()


def test_a_network_with_one_class_per_window_has_a_high_seam_score(tmp_path: Path) -> None:
    class Blocks(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            index = (images.mean((1, 2, 3)) * 1000).long() % 8 + 1
            return (
                nn.functional.one_hot(index, OPEN_EARTH_MAP.num_labels).float()[:, :, None, None].expand(-1, -1, 32, 32)
                * 9
            )

    write_tiff(tmp_path / "a.tif", np.random.default_rng(0).integers(1, 255, (320, 320), dtype=np.uint8))
    assert predict(Blocks(), tmp_path / "a.tif", tmp_path / "b.tif", stride=1.0).seam_score == float("inf")
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "c.tif", stride=1.0)
    with rasterio.open(tmp_path / "c.tif") as result:
        assert float(result.tags()["seam_score"]) == pytest.approx(1, abs=0.15)


def test_overlap_removes_the_seams_of_a_network_with_context(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.random.default_rng(0).integers(1, 255, (320, 320), dtype=np.uint8))
    apart, blended = (
        predict(contextual(), tmp_path / "a.tif", tmp_path / f"{stride}.tif", window=64, stride=stride).seam_score
        for stride in (1.0, 0.5)
    )
    assert apart > 2 and blended < 1.5


def test_a_scene_without_a_geographic_crs_has_pixel_counts_and_no_areas(tmp_path: Path) -> None:
    engineering = 'ENGCRS["site",EDATUM["x"],CS[Cartesian,2],AXIS["(E)",east],AXIS["(N)",north],LENGTHUNIT["metre",1]]'
    write_tiff(tmp_path / "a.tif", speckled(40, 40))
    write_tiff(tmp_path / "b.tif", speckled(40, 40), crs=engineering, transform=from_origin(0, 0, 1, 1))
    for name in ("a", "b"):
        summary = predict(pointwise(), tmp_path / f"{name}.tif", tmp_path / f"{name}_map.tif")
        assert summary.areas_km2 is None and sum(summary.pixels.values()) == 1600
        assert "km2" not in str(summary)


def test_the_preview_shows_scene_classes_and_legend(tmp_path: Path) -> None:
    image = speckled(300, 500)
    image[:, :50] = 0
    write_tiff(tmp_path / "a.tif", image)
    predict(Constant(), tmp_path / "a.tif", tmp_path / "b.tif", preview=True)
    pixels = np.moveaxis(read(tmp_path / "b_preview.png")[:3], 0, -1).reshape(-1, 3)
    water = (pixels == OPEN_EARTH_MAP.palette[6]).all(axis=1).mean()
    assert 0.2 < water < 0.6  # the map covers about half of the figure
    for color in OPEN_EARTH_MAP.palette[1:]:
        assert (pixels == color).all(axis=1).sum() > 50  # the patch in the legend


@pytest.mark.skipif(importlib.util.find_spec("pyogrio") is None, reason="needs the extra `vector`")
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".fgb"])
def test_polygons_cover_the_area_of_each_class(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyogrio.raw
    import shapely

    monkeypatch.setattr(hf_seg.mapping.polygons, "BATCH_SIZE", 100)
    image = speckled(120, 140)
    image[:, :20] = 0
    write_tiff(tmp_path / "a.tif", image, crs="EPSG:32633", transform=ROTATED)
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", polygons=suffix)
    meta, _, geometry, (ids, names) = pyogrio.raw.read(
        tmp_path / f"b{suffix}", layer="land_cover" if suffix == ".gpkg" else None
    )
    assert meta["crs"] == "EPSG:32633" and meta["geometry_type"] == "Polygon" and len(geometry) > 300
    assert all(OPEN_EARTH_MAP.names[index] == name for index, name in zip(ids, names, strict=True))
    areas = shapely.area(shapely.from_wkb(geometry))
    pixels = np.bincount(read(tmp_path / "b.tif").ravel(), minlength=OPEN_EARTH_MAP.num_labels)
    assert [areas[ids == index].sum() for index in range(1, OPEN_EARTH_MAP.num_labels)] == pytest.approx(
        pixels[1:] * 0.25
    )


@pytest.mark.skipif(importlib.util.find_spec("pyogrio") is None, reason="needs the extra `vector`")
@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".fgb"])
def test_a_map_without_any_class_has_a_file_without_polygons(tmp_path: Path, suffix: str) -> None:
    import pyogrio.raw

    write_tiff(tmp_path / "a.tif", speckled(40, 50), crs="EPSG:32633", transform=ROTATED)
    predict(Constant(), tmp_path / "a.tif", tmp_path / "b.tif", polygons=suffix, abstain=0.999)
    meta, _, geometry, _ = pyogrio.raw.read(tmp_path / f"b{suffix}", layer="land_cover" if suffix == ".gpkg" else None)
    assert len(geometry) == 0 and [*meta["fields"]] in (["class_id", "class_name"], [])  # GeoJSON has no list of fields


@pytest.mark.skipif(importlib.util.find_spec("pyogrio") is not None, reason="the extra `vector` is installed")
def test_polygons_name_the_packages_they_need(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", speckled(40, 40))
    with pytest.raises(UserError, match=r"polygons need pyogrio.*: pip install 'hf_seg\[vector\]'"):
        predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", polygons="b.gpkg")


def test_the_package_exports_predict_raster_and_is_light_to_import() -> None:
    assert hf_seg.predict_raster is predict_raster
    with pytest.raises(AttributeError, match="has no attribute 'predict_rasters'"):
        _ = hf_seg.predict_rasters
    code = "import sys, hf_seg; print('torch' in sys.modules, 'predict_raster' in hf_seg.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
