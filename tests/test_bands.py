"""Bands of any number and type: stretched alike in training and mapping, in stock models with a wider stem."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from conftest import write_tiff
from recipe_process import run_recipe
from torch import nn
from transformers import AutoModelForSemanticSegmentation

from hf_seg import predict_raster
from hf_seg.bands import Bands, rgb_indices, valid_pixels
from hf_seg.data.band_images import measure_bands
from hf_seg.data.doctor import examine
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.samples import LabelledImages, UnlabelledImages
from hf_seg.errors import UserError
from hf_seg.inference.load import load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.mapping.scene import Scene
from hf_seg.models import SegmentationNetwork, build_model, encoder_and_heads
from hf_seg.normalization import Normalization
from hf_seg.stem import set_input_bands

TWO = Bands(("VV", "VH"), (-30.0, -36.0), (0.0, -6.0))
TOYS = ["toy-segformer", "toy-convnextv2", "toy-swinv2", "toy-efficientnet-lite0"]
TINY = "--from_scratch true --crop_size 32 --max_train_steps 4 --per_device_train_batch_size 2 --warmup_steps 1 "
TINY += "--eval_steps 4 --checkpointing_steps 2 --logging_steps 1 --report_to none --mixed_precision no "
TINY += "--dataloader_num_workers 0 --learning_rate 1e-3 --head_lr_multiplier 1"


def to_decibels(sar: np.ndarray) -> np.ndarray:
    """Return VV and VH, (2, H, W) float32 in decibels, NaN in both where the amplitude is 0."""
    with np.errstate(divide="ignore"):
        vv = 20 * np.log10(sar / np.float32(255))
    vv[sar == 0] = np.nan
    return np.stack([vv, vv - 6 + sar % 7]).astype(np.float32)


@pytest.fixture(scope="module")
def dual_pol(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OpenEarthMap-SAR with SAR in two bands of decibels, and a corner without data."""
    root = tmp_path_factory.mktemp("dual_pol") / "data"
    shutil.copytree(oem_sar, root)
    for path in root.glob("*/sar_images/*.tif"):
        with rasterio.open(path) as file:
            sar = file.read(1)
        sar[:20, :20] = 0
        write_tiff(path, to_decibels(sar))
    description = {"name": "dual-pol", "layout": "OpenEarthMap-SAR", "bands": {"sar": ["VV", "VH"]}}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture(scope="module")
def trained(dual_pol: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny networks on two bands."""
    folders = []
    for name in ("toy-segformer", "toy-convnextv2"):
        folder = tmp_path_factory.mktemp("trained") / name
        argv = [*TINY.split(), "--model_name_or_path", name, "--data_dir", str(dual_pol), "--output_dir", str(folder)]
        result = run_recipe("stage2", *argv, log=folder.parent / "log")
        assert result.exit_codes == [0], result.output
        folders.append(folder)
    return folders


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int16", "float64"])
def test_stretch_maps_the_range_to_levels_and_cuts_off_the_rest(dtype: str) -> None:
    bands = Bands(("a", "b"), (0.0, 100.0), (254.0, 354.0))
    raw = np.array([[[0, 100, 254, 300]], [[0, 100, 227, 354]]]).astype(dtype)
    valid = np.array([[True, True, True, False]])
    assert bands.to_uint8(raw, valid).tolist() == [[[1, 101, 255, 0]], [[1, 1, 128, 0]]]


def test_nan_in_one_band_is_no_data_and_zero_in_one_integer_band_is_data() -> None:
    floats = np.array([[[1, np.nan, np.inf, 0]], [[1, 1, 1, 0]]], np.float32)
    assert valid_pixels(floats).tolist() == [[True, False, False, True]]
    integers = np.array([[[1, 0, 0]], [[1, 1, 0]]], np.uint16)
    assert valid_pixels(integers).tolist() == [[True, True, False]]
    masks = np.array([[[True, False, False]], [[True, True, False]]])
    assert valid_pixels(integers, masks).tolist() == [[True, True, False]]
    assert valid_pixels(floats[..., :3], masks).tolist() == [[True, False, False]]


def test_bands_survive_a_config_and_say_what_is_wrong_with_one() -> None:
    assert Bands.from_config(json.loads(json.dumps(TWO.as_config()))) == TWO
    assert Bands.from_config(None) is None
    for wrong in ({"names": ["a"]}, {"names": ["a"], "low": [1], "high": [1]}, {"names": [], "low": [], "high": []}):
        with pytest.raises(ValueError, match="input_bands must have"):
            Bands.from_config(wrong)
    assert rgb_indices(("NIR", "Red", "Green", "Blue")) == [1, 2, 3]
    assert rgb_indices(("VV", "VH")) == []


def test_statistics_are_those_of_the_valid_pixels(dual_pol: Path) -> None:
    rows = load_open_earth_map_sar(dual_pol, "train")
    bands, normalization = measure_bands(rows, "sar", ("VV", "VH"), progress=False)
    images = [to_decibels_of(path) for path in sorted(dual_pol.glob("train/sar_images/*.tif"))]
    values = np.concatenate([image[:, np.isfinite(image).all(axis=0)] for image in images], axis=1)
    low, high = np.percentile(values, (1, 99), axis=1)
    np.testing.assert_allclose(bands.low, low - 0.1 * (high - low), rtol=1e-5)
    np.testing.assert_allclose(bands.high, high + 0.1 * (high - low), rtol=1e-5)
    levels = np.concatenate([bands.to_uint8(values[:, None], np.ones((1, values.shape[1]), bool))[:, 0]]) / 255
    np.testing.assert_allclose(normalization.mean, levels.mean(axis=1), atol=1e-3)
    np.testing.assert_allclose(normalization.std, levels.std(axis=1), atol=1e-3)
    assert measure_bands(rows, "sar", ("VV", "VH"), progress=False) == (bands, normalization)


def to_decibels_of(path: Path) -> np.ndarray:
    """Read the bands of a tile."""
    with rasterio.open(path) as file:
        return file.read()


def test_samples_are_stretched_and_the_place_without_data_has_no_label(dual_pol: Path) -> None:
    rows = load_open_earth_map_sar(dual_pol, "train")
    sample = LabelledImages(rows, "sar", bands=TWO, mask_nodata=True)[0]
    assert sample.image.dtype == np.uint8 and sample.image.shape == (*sample.label.shape, 2)
    assert (sample.image[:20, :20] == 0).all() and (sample.label[:20, :20] == 255).all()
    assert (sample.image[20:] > 0).all() and (sample.label[20:] < 255).all()
    assert not UnlabelledImages(rows, "sar", bands=TWO)[0].valid_mask[:20, :20].any()


def test_rows_embed_their_files(dual_pol: Path) -> None:
    rows = load_open_earth_map_sar(dual_pol, "train", embed=True)
    paths = load_open_earth_map_sar(dual_pol, "train")
    assert rows[0]["sar"]["bytes"] is not None and paths[0]["sar"]["bytes"] is None
    embedded, plain = (LabelledImages(each, "sar", bands=TWO)[2].image for each in (rows, paths))
    assert np.array_equal(embedded, plain)


@pytest.mark.parametrize("name", TOYS)
def test_a_wider_stem_is_a_stock_model_that_starts_as_the_rgb_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(name, crop_size=64, from_scratch=True).eval()
    rgb = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(pixel_values=rgb).logits
    names = ("nir", "red", "green", "blue")
    set_input_bands(model, names, Normalization((0.5,) * 4, (0.2,) * 4), bands=Bands(names, (0.0,) * 4, (9.0,) * 4))
    mean = rgb.mean(dim=1, keepdim=True)
    with torch.no_grad():  # nir has the mean of the weights: where it is the mean of RGB, the sums are 4 / 3 x 3 / 4
        grey = model(pixel_values=mean.expand(2, 4, 64, 64)).logits
        model.save_pretrained(tmp_path)
        stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
        assert stock.config.input_bands["names"] == list(names)
        torch.testing.assert_close(stock(pixel_values=mean.expand(2, 4, 64, 64)).logits, grey)
        torch.manual_seed(0)
        same = build_model(name, crop_size=64, from_scratch=True).eval()(pixel_values=mean.expand(2, 3, 64, 64)).logits
    torch.testing.assert_close(grey, same, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(grey, before)


def test_a_new_random_stem_draws_other_weights_for_every_band() -> None:
    model = build_model("toy-segformer", crop_size=32, from_scratch=True)
    stem = next(module for module in encoder_and_heads(model)[0].modules() if isinstance(module, nn.Conv2d))
    before = stem.weight.std()
    set_input_bands(model, ("VV", "VH"), Normalization((0.5, 0.5), (0.2, 0.2)), from_scratch=True)
    assert stem.weight.shape[1] == 2 and not torch.allclose(stem.weight[:, 0], stem.weight[:, 1])
    torch.testing.assert_close(stem.weight.std(), before * 1.5**0.5, rtol=0.1, atol=0)
    with pytest.raises(UserError, match="takes 2 bands already"):
        set_input_bands(model, ("a", "b", "c"), Normalization((0.5,) * 3, (0.2,) * 3))


def test_two_bands_from_training_to_the_map_of_an_ensemble(dual_pol: Path, trained: list[Path], tmp_path: Path) -> None:
    config = json.loads((trained[0] / "config.json").read_text())
    assert config["num_channels"] == 2 and config["input_bands"]["names"] == ["VV", "VH"]
    argv = ["--model", *map(str, trained), "--data_dir", str(dual_pol), "--output_dir", str(tmp_path / "ensemble")]
    result = run_recipe("ensemble", *argv, "--stride", "1", log=tmp_path / "log")
    assert result.exit_codes == [0], result.output

    scene = dual_pol / "val" / "sar_images" / "ValArea_001.tif"
    predict_raster(tmp_path / "ensemble", scene, tmp_path / "map.tif", stride=1, show_progress=False)
    networks = load_networks(tmp_path / "ensemble")
    sample = LabelledImages(load_open_earth_map_sar(dual_pol, "val"), "sar", bands=networks[0].bands)[0]
    expected = Predictor(networks, device=torch.device("cpu"), stride=1).predict(sample.image).label_map().numpy()
    with rasterio.open(tmp_path / "map.tif") as file:
        found = file.read(1)
    assert (found[:20, :20] == 0).all()
    valid = sample.image.max(axis=2) > 0
    assert (found[valid] == expected[valid]).mean() > 0.99  # windows are blended, not averaged
    card = (trained[0] / "README.md").read_text()
    assert "VV, VH" in card and "hf-seg predict" in card


def test_a_second_round_of_labels_and_more_training_keep_the_stretch(
    dual_pol: Path, trained: list[Path], tmp_path: Path
) -> None:
    argv = ["--model", str(trained[0]), "--data_dir", str(dual_pol), "--column", "sar", "--stride", "1"]
    result = run_recipe("pseudo_label", *argv, "--output_dir", str(tmp_path / "labels"), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    settings = TINY.replace("--from_scratch true", "").split()
    settings += ["--model_name_or_path", str(trained[0]), "--data_dir", str(dual_pol)]
    settings += ["--pseudo_labels", str(tmp_path / "labels"), "--output_dir", str(tmp_path / "run")]
    result = run_recipe("stage2", *settings, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    configs = [json.loads((folder / "config.json").read_text()) for folder in (trained[0], tmp_path / "run")]
    assert configs[0]["input_bands"] == configs[1]["input_bands"]
    assert configs[0]["image_mean"] == configs[1]["image_mean"]


def test_a_resumed_run_has_the_same_bits(dual_pol: Path, trained: list[Path], tmp_path: Path) -> None:
    argv = [*TINY.split(), "--model_name_or_path", "toy-segformer", "--data_dir", str(dual_pol)]
    argv += ["--output_dir", str(tmp_path / "run")]
    broken = run_recipe("stage2", *argv, log=tmp_path / "log", disturb="kill_at_step:3")
    assert broken.exit_codes != [0]
    result = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    weights = [(folder / "model.safetensors").read_bytes() for folder in (trained[0], tmp_path / "run")]
    assert weights[0] == weights[1]


def test_stage_1_adapts_four_bands_of_two_types(oem: Path, oem_sar: Path, tmp_path: Path) -> None:
    """Source RGB + NIR in uint8, target in uint16 with a declared nodata value."""
    names = ["red", "green", "blue", "nir"]
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(oem, source)
    shutil.copytree(oem_sar, target)
    for path in source.glob("*/images/*.tif"):
        image = to_decibels_of(path)
        write_tiff(path, np.concatenate([image, 255 - image[:1]]))
    for path in target.glob("train/rgb_images/*.tif"):
        image = to_decibels_of(path).astype(np.uint16) * 40
        image = np.concatenate([image, image[:1] // 2])
        image[:, :16, :16] = 65535
        write_tiff(path, image, nodata=65535)
    for root, layout, column in ((source, "OpenEarthMap", "image"), (target, "OpenEarthMap-SAR", "optical")):
        (root / "dataset.json").write_text(json.dumps({"name": "own", "layout": layout, "bands": {column: names}}))
    argv = [*TINY.split(), "--model_name_or_path", "toy-segformer", "--output_dir", str(tmp_path / "run")]
    argv += ["--source_dir", str(source), "--data_dir", str(target), "--panel_steps", "2"]
    result = run_recipe("stage1", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    (network,) = load_networks(tmp_path / "run")
    assert network.bands is not None and network.bands.names == tuple(names) and network.bands.high[0] > 1000
    argv = ["--model", str(tmp_path / "run"), "--data_dir", str(target), "--output_dir", str(tmp_path / "labels")]
    result = run_recipe("pseudo_label", *argv, "--stride", "1", log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    ignored = json.loads((tmp_path / "labels" / "manifest.json").read_text())["ignored"]
    assert ignored["no optical data"] == 6 * 16 * 16


def test_one_band_alone_has_a_stem_of_its_own_if_asked_for(oem_sar: Path, tmp_path: Path) -> None:
    argv = [*TINY.split(), "--model_name_or_path", "toy-segformer", "--data_dir", str(oem_sar)]
    argv += ["--native_stem", "true", "--output_dir", str(tmp_path / "run")]
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    (network,) = load_networks(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_channels"] == 1
    assert len(network.normalization.mean) == 1 and network.bands is None
    scene = oem_sar / "val" / "sar_images" / "ValArea_001.tif"
    summary = predict_raster(tmp_path / "run", scene, tmp_path / "map.tif", show_progress=False)
    assert summary.nodata_pixels == 0


def test_scene_bands_are_found_by_description(trained: list[Path], tmp_path: Path) -> None:
    bands = np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)
    write_tiff(tmp_path / "scene.tif", bands)
    with rasterio.open(tmp_path / "scene.tif", "r+") as file:
        file.descriptions = ("VH", "angle", "VV")
    stretch = Bands(("VV", "VH"), (0.0, 0.0), (254.0, 254.0))
    with Scene(tmp_path / "scene.tif", input_bands=stretch) as scene:
        assert scene.bands == [3, 1]
        pixels, valid = scene.rows(0, 8)
    assert valid.all() and pixels[1, 0, 3] == 4 and pixels[0, 0, 0] == 129
    with Scene(tmp_path / "scene.tif", input_bands=stretch, bands=[1, 2]) as scene:
        assert scene.bands == [1, 2]


def test_what_does_not_fit_is_named(dual_pol: Path, oem_sar: Path, trained: list[Path], tmp_path: Path) -> None:
    rows, plain = load_open_earth_map_sar(dual_pol, "val"), load_open_earth_map_sar(oem_sar, "val")
    with pytest.raises(UserError, match=r"are of bands that dataset\.json names, but the network takes 8-bit"):
        LabelledImages(rows, "sar")
    with pytest.raises(UserError, match="sar tiles are of 8-bit SAR or RGB, but the network takes bands VV, VH"):
        LabelledImages(plain, "sar", bands=TWO)
    three = Bands(("a", "b", "c"), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UserError, match=r"ValArea_001.tif has 2 bands; the network takes 3: a, b, c"):
        LabelledImages(rows, "sar", bands=three)[0]
    with pytest.raises(UserError, match="the image has 3 bands, the network takes 2"):
        Predictor(load_networks(trained[0]), device=torch.device("cpu")).predict(np.ones((8, 8, 3), np.uint8))

    argv = TINY.replace("--from_scratch true", "").split()
    argv += ["--model_name_or_path", str(trained[0]), "--data_dir", str(oem_sar), "--output_dir", str(tmp_path / "run")]
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2] and "takes bands VV, VH, but" in result.output and "8-bit images" in result.output
    scene = oem_sar / "val" / "sar_images" / "ValArea_001.tif"
    with pytest.raises(UserError, match="has bands 1 to 1; the network takes 2: VV, VH; choose them with --bands"):
        predict_raster(trained[0], scene, tmp_path / "map.tif", show_progress=False)
    scene = dual_pol / "val" / "sar_images" / "ValArea_001.tif"
    with pytest.raises(UserError, match="leave out --stretch and --units"):
        predict_raster(trained[0], scene, tmp_path / "map.tif", units="db", show_progress=False)
    torch.manual_seed(0)
    other = load_networks(trained[0])
    other[0].bands = TWO
    with pytest.raises(UserError, match="same bands with the same stretch; these take VV, VH"):
        Predictor([*load_networks(trained[1]), *other], device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({"optical": []}, "bands of optical must be different names"),
        ({"sar": ["VV", "vv"]}, "bands of sar must be different names"),
        ({"sar": "VV"}, "bands of sar must be different names"),
        ({"radar": ["VV"]}, "bands has 'radar'; the images of OpenEarthMap-SAR are optical and sar"),
        (["VV"], "bands must be an object"),
        ({"sar": ["VV", "VH", "HH"]}, "dataset.json says that sar has VV, VH, HH; found bands 2 x float32"),
    ],
)
def test_wrong_descriptions_are_told(dual_pol: Path, tmp_path: Path, bands: Any, message: str) -> None:
    shutil.copytree(dual_pol, tmp_path / "data")
    description = {"name": "own", "layout": "OpenEarthMap-SAR", "bands": bands}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        load_open_earth_map_sar(tmp_path / "data", "train")


def test_the_doctor_knows_the_bands(dual_pol: Path) -> None:
    report = examine(dual_pol)
    assert report.problems == [] and report.splits["train"].dtypes["sar 2 x float32"] == 6


def test_networks_of_more_bands_learn(dual_pol: Path) -> None:
    """The loss of a batch falls, so that gradients reach the stem."""
    torch.manual_seed(0)
    model = build_model("toy-segformer", crop_size=32, from_scratch=True)
    set_input_bands(model, TWO.names, Normalization((0.5, 0.5), (0.2, 0.2)), bands=TWO, from_scratch=True)
    network = SegmentationNetwork(model).train()
    stem = next(module for module in encoder_and_heads(model)[0].modules() if isinstance(module, nn.Conv2d))
    images, labels = torch.randn(2, 2, 32, 32), torch.randint(1, 9, (2, 32, 32))
    loss = nn.functional.cross_entropy(network(images).logits, labels)
    loss.backward()
    assert stem.weight.grad is not None and stem.weight.grad.abs().sum() > 0
