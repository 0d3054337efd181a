"""Model cards: what they say is in the folder, and no figure was not measured."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_folders import make_ensemble, make_results, make_stage1, make_stage2
from huggingface_hub import ModelCard
from PIL import Image

from hf_seg.errors import UserError
from hf_seg.hub.cards import write_model_card
from hf_seg.labels import CLASS_NAMES, PALETTE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    found = {name: make_stage2(root / name, f"toy-{name}", seed) for seed, name in enumerate(NETWORKS)}
    return found | {
        "stage1": make_stage1(root / "stage1"),
        "ensemble": make_ensemble(root / "ensemble", [*found.values()]),
    }


NETWORKS = ("segformer", "convnextv2", "swinv2")
KINDS = (*NETWORKS, "stage1", "ensemble")


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def measured(results: Any) -> set[str]:
    """Every number of some results, as a card writes it."""
    if isinstance(results, dict):
        return set().union(*map(measured, results.values()))
    if isinstance(results, list):
        return set().union(*map(measured, results))
    return {f"{results:.4f}", str(results)} if isinstance(results, int | float) else set()


@pytest.mark.parametrize("kind", KINDS)
def test_no_figure_that_was_not_measured(kind: str, folders: dict[str, Path]) -> None:
    text = card_of(folders[kind]).text
    section = text.partition("## Results")[2].partition("\n## ")[0]
    cells = re.findall(r"(?<=\| )\**([\d.]+)\**(?= \|)", section)
    results = [json.loads(path.read_text()) for path in folders[kind].rglob("eval_results.json")]
    assert len(cells) >= 10
    assert {*cells} <= measured(results)
    assert not re.search(r"\d\.\d{3}", text.partition("## Results")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_has_the_metrics_as_the_hub_shows_them(kind: str, folders: dict[str, Path]) -> None:
    data = card_of(folders[kind]).data
    results = json.loads((folders[kind] / "eval_results.json").read_text())
    told = [(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results]
    first = "3 tile(s) laid out as OpenEarthMap" + ("-SAR" if kind != "stage1" else "")
    expected = [(first, "mean_iou", results["mean_iou"]), (first, "accuracy", results["overall_accuracy"])]
    if kind == "stage1":
        name, target = "4 tile(s) laid out as OpenEarthMap-SAR", results["target"]
        expected += [(name, "mean_iou", target["mean_iou"]), (name, "accuracy", target["overall_accuracy"])]
    assert told == expected
    assert (data.pipeline_tag, data.license) == ("image-segmentation", "other")
    assert ("optical" if kind == "stage1" else "sar") in data.tags


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_use_work_when_pasted(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save("scene.png")
    first, *others = re.findall(r"```python\n(.*?)```", card_of(folders[kind]).text, re.DOTALL)
    found: dict[str, Any] = {}
    exec(first, found)
    if kind == "ensemble":
        assert found["result"].label_map.shape == (64, 64)
        exec(others[0], found)
        assert found["model"].config.model_type == "segformer"
    else:
        assert {segment["mask"].size for segment in found["segments"]} == {(64, 64)}


def test_what_came_from_the_hub_is_linked(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folders["segformer"] / file).read_bytes())
    recipe = yaml.safe_load((folders["segformer"] / "recipe.yaml").read_text())
    for labels, linked in (("org/labels@v1", ["org/labels"]), (str(tmp_path), None), (None, None)):
        recipe |= {"model_name_or_path": "nvidia/mit-b5", "from_scratch": False, "pseudo_labels": labels}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        write_model_card(tmp_path)
        assert (card_of(tmp_path).data.base_model, card_of(tmp_path).data.datasets) == ("nvidia/mit-b5", linked)
        assert ("`org/labels` of optical networks" in card_of(tmp_path).text) == (linked is not None)
        assert "The terms of the pretrained `nvidia/mit-b5`" in card_of(tmp_path).text


def test_every_class_has_its_row_of_id_colour_and_score(folders: dict[str, Path]) -> None:
    text = card_of(folders["segformer"]).text
    results = json.loads((folders["segformer"] / "eval_results.json").read_text())
    for index, name in enumerate(CLASS_NAMES):
        assert f"| {index} | {name} | `#{bytes(PALETTE[index]).hex().upper()}` |" in text
        if index:
            iou = results["iou"][name]
            assert f"\n| {name} | {'-' if iou is None else f'{iou:.4f}'} |\n" in text
    assert "\n| building | - |\n" in text  # not in the truth


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_shown_if_they_are_there(kind: str, folders: dict[str, Path]) -> None:
    shown = re.findall(r"!\[[^\]]+\]\((.+?)\)", card_of(folders[kind]).text)
    there = {path.relative_to(folders[kind]).as_posix() for path in (folders[kind] / "figures").rglob("*.png")}
    assert {*shown} == {path for path in there if "mixes" not in path}
    assert len(shown) == len({*shown})


def test_windows_of_swin_are_told_and_of_no_other(folders: dict[str, Path]) -> None:
    told = [kind for kind in KINDS if "Windows of SwinV2" in card_of(folders[kind]).text]
    assert told == ["swinv2"]
    assert "the window is 4 in every stage" in " ".join(card_of(folders["swinv2"]).text.split())


def test_settings_are_told_and_places_are_not(folders: dict[str, Path]) -> None:
    text = card_of(folders["segformer"]).text
    recipe = yaml.safe_load((folders["segformer"] / "recipe.yaml").read_text())
    for key in ("learning_rate", "max_train_steps", "rce_weight", "crop_size", "mixed_precision"):
        assert f"| `{key}` | {recipe[key]} |" in text
    assert recipe["data_dir"] == "/home/me/tiles" and "/home/me" not in text
    assert "cross entropy + reverse cross entropy + Lovász-softmax" in text


def test_stage_1_says_which_network_lies_where(folders: dict[str, Path]) -> None:
    text = card_of(folders["stage1"]).text
    assert "At the root lies the **teacher**; `student/` holds the student" in text
    assert "| | teacher, source | teacher, target | student, source | student, target |" in text
    student = json.loads((folders["stage1"] / "student" / "eval_results.json").read_text())
    assert f" **{student['target']['mean_iou']:.4f}** |\n" in text


def test_an_ensemble_lists_its_members(folders: dict[str, Path]) -> None:
    text = card_of(folders["ensemble"]).text
    assert "| `member_1` | UperNet ConvNeXtV2 | `convnextv2` | - | 2.0 | 64 |" in text
    assert "| | member_0 | member_1 | member_2 | ensemble |" in text
    assert str(folders["segformer"].parent) not in text.replace(str(folders["ensemble"]), "")


def test_what_was_not_scored_is_not_measured(tmp_path: Path) -> None:
    card = card_of(make_stage2(tmp_path / "run", scored=False))
    assert "## Results\n\nNot measured.\n" in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("n_images", "name"), [(210, "OpenEarthMap-SAR"), (209, "209 tile(s) laid out as OpenEarthMap-SAR")]
)
def test_the_release_is_named_only_for_as_many_tiles(
    n_images: int, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in ("config.json", "preprocessor_config.json", "recipe.yaml"):
        (tmp_path / file).write_bytes((folders["segformer"] / file).read_bytes())
    (tmp_path / "eval_results.json").write_text(json.dumps(make_results(0, n_images)))
    write_model_card(tmp_path)
    assert {each.dataset_name for each in card_of(tmp_path).data.eval_results} == {name}
    assert ("data laid out as" in card_of(tmp_path).text) == (n_images != 210)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_template_is_left(kind: str, folders: dict[str, Path]) -> None:
    text = card_of(folders[kind]).text
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined", text)
    assert "\n\n\n" not in text
    for heading in ("Use", "Classes", "Results", "Limits", "Licence", "Citation"):
        assert text.count(f"\n## {heading}\n") == 1


def test_a_folder_without_a_model_gets_no_card(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        write_model_card(tmp_path)
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"holds no model: neither config\.json nor ensemble\.json"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
