"""Data of one's own, without a change of the code: from tiles to a map, and to the same map by ONNX Runtime."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from conftest import write_tiff
from recipe_process import run_recipe

from hf_seg.errors import UserError
from hf_seg.mapping.cli import run as map_scenes

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = "--from_scratch true --crop_size 64 --max_train_steps 6 --per_device_train_batch_size 2 --warmup_steps 1 "
TINY += "--eval_steps 6 --checkpointing_steps 0 --logging_steps 1 --report_to none --mixed_precision no "
TINY += "--dataloader_num_workers 0 --learning_rate 1e-3 --head_lr_multiplier 1"
WATER_LAND = {
    "classes": [
        {"id": 1, "name": "water", "colour": "#0045ff", "values": [6]},
        {"id": 2, "name": "land", "colour": "#c0c0c0", "values": [1, 2, 3, 4, 5, 7, 8]},
    ]
}
SIX = {  # what is not labelled in the Dubai tiles is a class here, so that a class has pixel value 0
    "classes": [
        {"id": number, "name": name, "values": [value]}
        for number, (name, value) in enumerate(
            {"sand": 1, "street": 4, "plants": 5, "sea": 6, "house": 8, "other": 0}.items(), start=1
        )
    ],
    "background": [],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def read(path: Path) -> np.ndarray:
    """Return all bands of a raster."""
    with rasterio.open(path) as file:
        return file.read()


def decibels(amplitude: np.ndarray) -> np.ndarray:
    """Return two bands in decibels, (2, H, W) float32; NaN where the amplitude is 0, and in a corner."""
    vv = np.where(amplitude == 0, np.nan, 20 * np.log10(np.maximum(amplitude, 1) / np.float32(255)))
    vv[:8, :8] = np.nan
    return np.stack([vv, vv - 6 + amplitude % 5]).astype(np.float32)


def dual_pol(release: Path, root: Path, side: int = 112) -> Path:
    """Write tiles of two bands in decibels from tiles in the layout of OpenEarthMap-SAR."""
    for path in release.glob("*/sar_images/*.tif"):
        write_tiff(root / path.relative_to(release), decibels(read(path)[0, :side, :side]))
        label = path.relative_to(release).parent.with_name("labels") / path.name
        write_tiff(root / label, read(release / label)[0, :side, :side])
    describe(root, {"bands": {"sar": ["VV", "VH"]}, **WATER_LAND})
    return root


def four_bands(release: Path, root: Path, side: int = 128) -> Path:
    """Write tiles of red, green, blue and a near infrared made of them, in uint16, from the tiles of Dubai."""
    for index, path in enumerate(sorted(release.glob("dubai/images/*.tif"))):
        image = read(path)[:, :side, :side].astype(np.uint16) * 16
        place = root / ("val" if index % 4 == 3 else "train")
        write_tiff(place / "sar_images" / path.name, np.concatenate([image, 4095 - image[:1]]))
        label = read(release / "dubai" / "labels" / path.name)[0, :side, :side]
        write_tiff(place / "labels" / path.name, label)
    describe(root, {"bands": {"sar": ["red", "green", "blue", "nir"]}, **SIX})
    return root


def describe(root: Path, content: dict[str, Any]) -> None:
    """Write dataset.json."""
    text = json.dumps({"name": "tiles of ours", "layout": "OpenEarthMap-SAR", **content})
    (root / "dataset.json").write_text(text)


def launch(recipe: str, folder: Path, *words: object) -> None:
    """Run a recipe to its end."""
    argv = [*map(str, words), "--output_dir", str(folder)]
    result = run_recipe(recipe, *argv, log=folder.parent / f"{folder.name}.log")
    assert result.exit_codes == [0], result.output


def script(monkeypatch: pytest.MonkeyPatch, name: str, *words: object) -> None:
    """Run a script's main."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(SCRIPTS / name))["main"]()


def check_pipeline(data: Path, work: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train two networks, evaluate, put them together, export, and map a tile by both; all with the classes."""
    runs = [work / name for name in ("toy-segformer", "toy-convnextv2")]
    for run in runs:
        launch("stage2", run, *TINY.split(), "--model_name_or_path", run.name, "--data_dir", data)
        config = json.loads((run / "config.json").read_text())
        assert [*config["id2label"].values()] == ["background", *names]
        card = (run / "README.md").read_text()
        assert all(f"| {name} |" in card for name in (*names, *config["input_bands"]["names"]))
    ensemble, exported = work / "ensemble", work / "exported"
    launch("ensemble", ensemble, "--model", *runs, "--data_dir", data)
    scores = work / "scores.json"
    script(monkeypatch, "evaluate_model.py", "--model", ensemble, "--data_dir", data, "--output", scores)
    assert [*json.loads(scores.read_text())["iou"]] == ["background", *names]
    script(monkeypatch, "export_model.py", "--model", ensemble, "--format", "onnx", "--output", exported)

    scene = sorted(data.glob("val/sar_images/*.tif"))[0]
    for model, target in ((ensemble, work / "map.tif"), (exported / "model.onnx", work / "onnx.tif")):
        map_scenes([str(scene), str(target), "--model", str(model)])
    ours, theirs = read(work / "map.tif")[0], read(work / "onnx.tif")[0]
    assert (ours != theirs).mean() < 1e-3  # pixels whose two largest probabilities are equal to rounding
    assert set(np.unique(ours)) <= {0, *range(1, len(names) + 1)}
    with rasterio.open(work / "map.tif") as file:
        assert [file.tags(1)[f"class_{number}"] for number in range(1, len(names) + 1)] == names
    without_data = ~np.isfinite(read(scene)).all(axis=0) if len(names) == 2 else np.zeros(ours.shape, bool)
    assert (ours[without_data] == 0).all() and (ours[~without_data] > 0).all()


def test_water_and_land_from_two_bands_in_decibels(
    oem_sar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_pipeline(dual_pol(oem_sar, tmp_path / "data"), tmp_path, ["water", "land"], monkeypatch)


@pytest.mark.slow
def test_water_and_land_from_two_bands_of_real_scenes(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_pipeline(dual_pol(realdata / "dfc25_track1", tmp_path / "data"), tmp_path, ["water", "land"], monkeypatch)


@pytest.mark.slow
def test_six_classes_from_four_bands_of_real_tiles(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = four_bands(realdata / "OpenEarthMap_wo_xBD", tmp_path / "data")
    check_pipeline(data, tmp_path, [each["name"] for each in SIX["classes"]], monkeypatch)


def test_a_model_of_other_bands_and_classes_is_told(oem_sar: Path, tmp_path: Path) -> None:
    data = dual_pol(oem_sar, tmp_path / "data")
    launch("stage2", tmp_path / "run", *TINY.split(), "--model_name_or_path", "toy-segformer", "--data_dir", data)
    other = {"classes": [{"id": 1, "name": "ice", "aliases": ["water"]}, {"id": 2, "name": "land"}]}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(other))
    argv = ["--model", tmp_path / "run", "--data_dir", data, "--label_set", tmp_path / "labels.yaml"]
    result = run_recipe("ensemble", *map(str, argv), "--output_dir", str(tmp_path / "out"), log=tmp_path / "log")
    assert result.exit_codes == [2] and "water" in result.output and "ice" in result.output
    shutil.copy(oem_sar / "val" / "sar_images" / "ValArea_001.tif", tmp_path / "scene.tif")
    with pytest.raises(UserError, match="the network takes 2: VV, VH"):
        map_scenes([str(tmp_path / "scene.tif"), str(tmp_path / "map.tif"), "--model", str(tmp_path / "run")])
