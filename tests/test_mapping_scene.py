"""Rasters as the networks expect them: values, nodata, and the zero collar."""

import logging
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import write_tiff
from rasterio.enums import ColorInterp

from hf_seg.errors import UserError
from hf_seg.mapping.gdal import open_raster
from hf_seg.mapping.scene import READ_ROWS, SAR_LEVELS, Scene


def speckle(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw amplitudes around 1."""
    return np.sqrt(rng.gamma(4, 1 / 4, shape)).astype(np.float32)


def read(path: Path, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    with Scene(path, **settings) as scene:
        return scene.rows(0, scene.height)


def test_uint8_is_unchanged_and_rows_do_not_depend_on_the_order_of_reads(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 256, (2 * READ_ROWS + 70, 40), dtype=np.uint8)
    write_tiff(tmp_path / "a.tif", image)
    with Scene(tmp_path / "a.tif") as scene:
        assert scene.stretch is None and scene.bands == [1]
        for top, bottom in [(0, 582), (0, 1), (255, 257), (200, 560), (581, 582), (3, 4)]:
            pixels, valid = scene.rows(top, bottom)
            assert np.array_equal(pixels, image[None, top:bottom]) and valid.all() and valid.shape == (bottom - top, 40)


def test_values_near_the_end_of_float32_are_the_brightest(tmp_path: Path) -> None:
    image = np.full((1, 4, 8), 0.5, np.float32)
    image[0, 0, :2] = 3e38, -3e38
    write_tiff(tmp_path / "a.tif", image)
    with np.errstate(over="raise"):
        pixels, valid = read(tmp_path / "a.tif", stretch=(0, 1), zero_collar=False)
    assert pixels[0, 0, :3].tolist() == [255, 1, 128] and valid.all()


def test_zeros_inside_the_swath_are_data_and_the_search_for_the_collar_is_optional(tmp_path: Path) -> None:
    image = np.full((30, 30), 9, np.uint8)
    image[:, :5] = 0
    image[10:14, 10:14] = 0
    write_tiff(tmp_path / "a.tif", image)
    pixels, valid = read(tmp_path / "a.tif")
    assert np.array_equal(valid, np.arange(30)[None, :].repeat(30, 0) >= 5) and np.array_equal(pixels[0], image)
    assert read(tmp_path / "a.tif", zero_collar=False)[1].all()


@pytest.mark.parametrize("nodata", [0, 77])
def test_declared_nodata_is_used_instead_of_the_collar(tmp_path: Path, nodata: int) -> None:
    image = np.full((30, 30), 9, np.uint8)
    image[:, :5], image[10:14, 10:14], image[20:, 20:] = 0, 0, 77
    write_tiff(tmp_path / "a.tif", image, nodata=nodata)
    pixels, valid = read(tmp_path / "a.tif")
    assert np.array_equal(valid, image != nodata)
    assert np.array_equal(pixels[0], np.where(image == nodata, 0, image))


def test_an_integer_pixel_is_nodata_in_all_bands_and_a_float_pixel_in_any(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 255, (3, 20, 20), dtype=np.uint8)
    image[0, :10], image[:, :5] = 0, 0
    write_tiff(tmp_path / "byte.tif", image, nodata=0)
    assert np.array_equal(read(tmp_path / "byte.tif")[1], image.any(axis=0))
    floats = np.where(image == 0, np.float32(-9999), image.astype(np.float32))
    floats[1, 15, 3], floats[2, 16, 3] = np.nan, np.inf
    write_tiff(tmp_path / "float.tif", floats, nodata=-9999)
    expected = image[0] > 0
    expected[15:17, 3] = False
    assert np.array_equal(read(tmp_path / "float.tif")[1], expected)


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_masks_and_alpha_declare_nodata(tmp_path: Path, kind: str) -> None:
    image = np.random.default_rng(0).integers(1, 255, (4, 20, 20), dtype=np.uint8)
    image[:3, 12:15] = 0  # black, and valid
    image[3] = 255
    image[3, :8] = 0
    if kind == "mask":
        write_tiff(tmp_path / "a.tif", image[:3], photometric="rgb")
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tmp_path / "a.tif", "r+") as file:
            file.write_mask(image[3])
    else:
        write_tiff(tmp_path / "a.tif", image, photometric="rgb", alpha="yes")
    pixels, valid = read(tmp_path / "a.tif")
    assert pixels.shape == (3, 20, 20) and np.array_equal(valid, image[3] > 0) and not pixels[:, :8].any()


def test_decibels_and_power_give_the_same_pixels_as_amplitude(tmp_path: Path) -> None:
    amplitude = speckle(np.random.default_rng(0), 300, 200) * 0.1
    write_tiff(tmp_path / "linear.tif", amplitude)
    write_tiff(tmp_path / "power.tif", amplitude**2)
    write_tiff(tmp_path / "db.tif", 20 * np.log10(amplitude))
    expected = read(tmp_path / "linear.tif", stretch=(0, 0.4))[0].astype(int)
    assert np.array_equal(expected[0], np.clip(np.rint(amplitude / 0.4 * 255), 1, 255))
    for units in ("power", "db"):
        pixels = read(tmp_path / f"{units}.tif", units=units, stretch=(0, 0.4))[0].astype(int)
        assert abs(pixels - expected).max() <= 1 and (pixels != expected).mean() < 0.01


def test_the_default_stretch_matches_the_training_data_and_can_be_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    image = speckle(np.random.default_rng(0), 400, 300) * 700
    image[:, :100] = 0  # the collar must not affect it
    for dtype in (np.uint16, np.float32):
        write_tiff(tmp_path / "a.tif", image.astype(dtype))
        pixels, valid = read(tmp_path / "a.tif")
        assert np.array_equal(valid, image > 0) and pixels[0, valid].min() >= 1 and not pixels[0, ~valid].any()
        assert abs(np.percentile(pixels[0, valid], (5, 95)) - SAR_LEVELS).max() <= 1
        found = re.search(r"--stretch (\S+) (\S+) is used", caplog.records[-1].message)
        assert found is not None
        low, high = (float(number) for number in found.groups())
        assert np.array_equal(read(tmp_path / "a.tif", stretch=(low, high))[0], pixels)


def test_the_scale_of_a_band_is_applied(tmp_path: Path) -> None:
    decibels = np.random.default_rng(0).normal(-12, 3, (50, 50)).astype(np.float32)
    write_tiff(tmp_path / "float.tif", decibels)
    write_tiff(tmp_path / "short.tif", np.rint(decibels * 100).astype(np.int16))
    with rasterio.open(tmp_path / "short.tif", "r+") as file:
        file.scales = (0.01,)
    float_pixels, short_pixels = (
        read(tmp_path / name, units="db", stretch=(0, 1))[0].astype(int) for name in ("float.tif", "short.tif")
    )
    assert abs(float_pixels - short_pixels).max() <= 1 and float_pixels.std() > 10


def test_bands_are_chosen_by_number_or_by_colour(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 255, (4, 20, 20), dtype=np.uint8)
    write_tiff(tmp_path / "a.tif", image)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    assert np.array_equal(read(tmp_path / "a.tif")[0], image[[2, 1, 0]])
    assert np.array_equal(read(tmp_path / "a.tif", bands=[4])[0], image[[3]])
    assert np.array_equal(read(tmp_path / "a.tif", bands=[4, 1, 1])[0], image[[3, 0, 0]])


def test_a_damaged_row_is_named_when_it_is_read(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(1, 255, (600, 50), dtype=np.uint8)
    write_tiff(tmp_path / "a.tif", image, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) * 3 // 4])
    with Scene(tmp_path / "a.tif", zero_collar=False) as scene:
        assert np.array_equal(scene.rows(0, 200)[0][0], image[:200])
        with pytest.raises(
            UserError, match=r"a\.tif: rows 256 to 511 cannot be read; the file is damaged or truncated"
        ):
            scene.rows(256, 300)
    with pytest.raises(UserError, match="rows 256 to 511 cannot be read"):
        Scene(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (10**9, 1, "1,000,000,000 x 1 pixels; a scene may have 1,000,000 along a side"),
        (10**6, 10**6, "1,000,000 x 1,000,000 pixels, but the file has 186 bytes"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused_at_once(tmp_path: Path, width: int, height: int, message: str) -> None:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: 0}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    content = struct.pack("<2sHI", b"II", 42, 72) + bytes(64) + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.tif: its header says {message}"):
        Scene(tmp_path / "a.tif")


BANDS = "a network takes one (SAR) or three (optical) of them"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": "dB"}, "unknown units 'dB'; choose one of linear, power, db"),
        ({"stretch": (3, 3)}, "stretch must be two ascending numbers, for 0 and 255; got [3, 3]"),
        ({"stretch": (0, float("nan"))}, "stretch must be two ascending numbers, for 0 and 255; got [0, nan]"),
        ({"bands": [2]}, "{path} has bands 1 to 1; " + BANDS + ", not 2; choose with --bands"),
        ({"bands": [0]}, "{path} has bands 1 to 1; " + BANDS + ", not 0; choose with --bands"),
        (
            {"bands": [1, 1]},
            "{path} has bands 1 to 1; " + BANDS + ", not 1, 1; choose with --bands",
        ),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.tif"
    write_tiff(path, np.ones((5, 5), np.uint8))
    with pytest.raises(UserError) as error:
        Scene(path, **settings)
    assert str(error.value) == message.format(path=path)


def test_a_file_called_tif_points_to_no_other_file(tmp_path: Path) -> None:
    write_tiff(tmp_path / "other.tif", np.ones((8, 8), np.uint8))
    vrt = (
        '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{tmp_path / 'other.tif'}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for name in ("scene.tif", "scene.vrt"):
        (tmp_path / name).write_text(vrt)
    with pytest.raises(UserError, match=r"scene\.tif cannot be opened as a raster"):
        open_raster(str(tmp_path / "scene.tif"))
    with open_raster(str(tmp_path / "scene.vrt")) as dataset:
        assert dataset.read(1).tolist() == np.ones((8, 8)).tolist()
