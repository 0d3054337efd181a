"""Two classes, water and land, through the pipeline, on tiles whose labels are coded as OpenEarthMap's."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio.raw
import pytest
import rasterio
from recipe_process import run_recipe

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.mapping.cli import run as map_scenes
from hf_seg.models import build_model

SCRIPTS = Path(__file__).parents[1] / "scripts"
WATER_LAND = Path(__file__).parents[1] / "recipes/configs/label_sets/water_land.yaml"
TINY = {
    "model_name_or_path": "toy-segformer",
    "from_scratch": "true",
    "crop_size": "32",
    "max_train_steps": "2",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-3",
    "warmup_steps": "1",
    "eval_steps": "2",
    "checkpointing_steps": "0",
    "logging_steps": "1",
    "report_to": "none",
    "mixed_precision": "no",
    "dataloader_num_workers": "0",
}

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def launch(recipe: str, folder: Path, *, exit_code: int = 0, **settings: Any) -> str:
    """Run a recipe, which ends with an exit code, and return the last line that it printed."""
    words = [word for key, value in settings.items() for word in (f"--{key}", *map(str, np.atleast_1d(value)))]
    result = run_recipe(recipe, *words, "--output_dir", str(folder), log=folder.parent / f"{folder.name}.log")
    assert result.exit_codes == [exit_code], result.output
    return result.output.strip().splitlines()[-1]


def script(name: str) -> Callable[..., Any]:
    main: Callable[..., Any] = runpy.run_path(str(SCRIPTS / name))["main"]
    return main


@pytest.fixture(scope="module")
def run(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of stage 2."""
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    launch("stage2", folder, **TINY, data_dir=oem_sar, label_set=WATER_LAND)
    return folder


@pytest.fixture(scope="module")
def ensemble(run: Path, oem_sar: Path) -> Path:
    """The network twice."""
    folder = run.parent / "ensemble"
    launch("ensemble", folder, model=[run, run / "best"], data_dir=oem_sar, label_set=WATER_LAND)
    return folder


def test_the_network_its_scores_and_its_card_have_the_two_classes(run: Path) -> None:
    config, results = (json.loads((run / name).read_text()) for name in ("config.json", "eval_results.json"))
    assert config["id2label"] == {"0": "background", "1": "water", "2": "land"}
    assert config["label_colors"] == ["#000000", "#0045ff", "#c0c0c0"]
    assert [*results["iou"]] == ["background", "water", "land"] and results["n_classes_present"] == 2
    matrix = np.array(results["confusion_matrix"])
    assert matrix.shape == (3, 3) and matrix[1:, 1:].sum() == matrix.sum() > 0
    card = (run / "README.md").read_text()
    assert "| 1 | water | `#0045FF` |\n| 2 | land | `#C0C0C0` |\n" in card
    assert f"| water | {results['iou']['water']:.4f} |" in card and "building" not in card
    assert "--label_set water_land.yaml" in card and str(WATER_LAND) not in card


def test_the_truth_is_that_of_the_label_files(run: Path, oem_sar: Path) -> None:
    water = land = 0
    for path in (oem_sar / "val/labels").iterdir():
        with rasterio.open(path) as file:
            label = file.read(1)
        water, land = water + (label == 6).sum(), land + ((label > 0) & (label != 6)).sum()
    matrix = np.array(json.loads((run / "eval_results.json").read_text())["confusion_matrix"])
    assert matrix.sum(axis=1).tolist() == [0, water, land]


def test_another_evaluation_gives_the_same_scores_and_needs_the_label_set(
    run: Path, oem_sar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate_model.py", "--model", str(run), "--data_dir", str(oem_sar), "--output", str(tmp_path / "s.json")]
    main = script("evaluate_model.py")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError) as caught:
        main()
    assert str(caught.value) == (
        f"class 1 is 'water' in {run} and 'bareland' in the labels; give the --label_set that the networks were "
        "trained with"
    )
    monkeypatch.setattr(sys, "argv", [*words, "--label_set", str(WATER_LAND)])
    main()
    scores, expected = (json.loads(path.read_text()) for path in (tmp_path / "s.json", run / "eval_results.json"))
    assert {key: scores[key] for key in ("iou", "confusion_matrix")} == {
        key: expected[key] for key in ("iou", "confusion_matrix")
    }
    assert np.load(tmp_path / "s.npz")["confusion_matrices"].shape == (3, 3, 3)


def test_the_ensemble_has_the_classes_of_its_members(ensemble: Path) -> None:
    opened = EnsembleForSemanticSegmentation.from_pretrained(ensemble)
    assert opened.id2label == {0: "background", 1: "water", 2: "land"}
    (result,) = opened.predict(np.full((32, 32), 200, np.uint8), return_uncertainty=True)
    assert set(result.class_names) <= {1, 2} and result.entropy is not None
    assert result.entropy.max() <= np.log(2) + 1e-5
    assert "| 2 | land | `#C0C0C0` |" in (ensemble / "README.md").read_text()


def test_networks_of_other_classes_are_no_ensemble(run: Path, oem_sar: Path, tmp_path: Path) -> None:
    other = tmp_path / "nine"
    nine = build_model("toy-segformer", crop_size=32, from_scratch=True)
    export_model(nine, other, crop_size=32, recipe="", results=None)
    settings = {"model": [run, other], "data_dir": oem_sar, "label_set": WATER_LAND}
    line = launch("ensemble", tmp_path / "mixed", exit_code=2, **settings)
    assert line == f"error: class 1 is 'water' in {run} and 'bareland' in {other}"


def test_a_map_has_two_colours_and_their_names(ensemble: Path, oem_sar: Path, tmp_path: Path) -> None:
    scene, target = oem_sar / "val/sar_images/ValArea_001.tif", tmp_path / "map.tif"
    map_scenes(
        [str(scene), str(target), "--model", str(ensemble), "--probabilities", "--preview", "--polygons", ".gpkg"]
    )
    with rasterio.open(target) as file:
        ids, colors, tags = file.read(1), file.colormap(1), file.tags(1)
    assert {1, 2} >= set(np.unique(ids)) and ids.all()
    assert (colors[1], colors[2]) == ((0, 0x45, 0xFF, 255), (0xC0, 0xC0, 0xC0, 255))
    assert {color for index, color in colors.items() if index > 2} == {(0, 0, 0, 255)}  # GDAL's for ids without one
    assert {key: tags[key] for key in tags if key.startswith("class_")} == {
        "class_0": "background",
        "class_1": "water",
        "class_2": "land",
    }
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        assert file.descriptions == ("background", "water", "land")
    *_, (class_ids, class_names) = pyogrio.raw.read(tmp_path / "map.gpkg", read_geometry=False)
    assert {*zip(class_ids.tolist(), class_names, strict=True)} <= {(1, "water"), (2, "land")}


def test_pseudo_labels_keep_the_classes_and_are_checked(run: Path, oem_sar: Path, tmp_path: Path) -> None:
    labels, data = tmp_path / "labels", {"data_dir": oem_sar}
    launch("pseudo_label", labels, model=run, column="sar", **data, label_set=WATER_LAND)
    manifest = json.loads((labels / "manifest.json").read_text())
    assert manifest["label_set"] == {
        "names": ["background", "water", "land"],
        "colors": ["#000000", "#0045ff", "#c0c0c0"],
    }
    assert [*manifest["class_histogram"]] == ["water", "land"]
    assert "| 2 | land |" in (labels / "README.md").read_text()
    line = launch("stage2", tmp_path / "wrong", exit_code=2, **TINY, **data, pseudo_labels=labels)
    assert f"error: class 1 is 'water' in {labels} and 'bareland' in the label set" in line
    launch("stage2", tmp_path / "second", **TINY, **data, pseudo_labels=labels, label_set=WATER_LAND)
    results = json.loads((tmp_path / "second" / "eval_results.json").read_text())
    assert [*results["iou"]] == ["background", "water", "land"]

    audit = script("audit_labels.py")
    audit([str(oem_sar / "train/labels"), str(labels), "--label_set", str(WATER_LAND), "--output", str(tmp_path / "a")])
    result = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert np.array(result["agreement"]["transition"]).shape == (3, 3)
    assert [*result["agreement"]["iou"]] == ["water", "land"]


def test_self_training_and_its_report_have_the_two_classes(oem: Path, oem_sar: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "stage1", {"data_dir": oem_sar, "source_dir": oem, "label_set": WATER_LAND}
    launch("stage1", folder, **TINY, **data, panel_steps=2)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = [key for key in log[0] if key.startswith("pseudo_share_")]
    assert shares == ["pseudo_share_background", "pseudo_share_water", "pseudo_share_land"]
    assert "| 1 | water | `#0045FF` |" in (folder / "README.md").read_text()
    report = script("report.py")
    where = [
        "--data_dir",
        str(oem_sar),
        "--split",
        "train",
        "--column",
        "optical",
        "--output",
        str(tmp_path / "r.html"),
    ]
    report([str(folder), *where, "--label_set", str(WATER_LAND), "--tiles", "1"])
    intervals = json.loads((tmp_path / "r.json").read_text())["intervals"]["tiles"]["iou"]
    assert [*intervals] == ["water", "land"]
