"""Cards: everything they say comes from the folder, and every figure was measured."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_folders import RELEASED, SYNTHETIC, make_ensemble, make_pseudo_labels, make_stage1, make_stage2
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from hf_seg.arguments import EnsembleArguments, PseudoLabelArguments, Stage1Arguments, Stage2Arguments
from hf_seg.errors import UserError
from hf_seg.hub.cards import read_header, write_model_card
from hf_seg.hub.export import read_training_data, write_training_data
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.settings import parse_arguments


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
def test_every_figure_was_measured(kind: str, folders: dict[str, Path]) -> None:
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
    first = "data laid out as OpenEarthMap" + ("-SAR" if kind != "stage1" else "")
    expected = [(first, "mean_iou", results["mean_iou"]), (first, "accuracy", results["overall_accuracy"])]
    if kind == "stage1":
        name, target = "data laid out as OpenEarthMap-SAR", results["target"]
        expected += [(name, "mean_iou", target["mean_iou"]), (name, "accuracy", target["overall_accuracy"])]
    assert told == expected
    assert (data.pipeline_tag, data.license) == ("image-segmentation", "other")
    assert ("optical" if kind == "stage1" else "sar") in data.tags


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_the_card_runs(
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


def test_models_and_labels_from_the_hub_are_linked(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folders["segformer"] / file).read_bytes())
    recipe = yaml.safe_load((folders["segformer"] / "recipe.yaml").read_text())
    write_training_data(tmp_path, SYNTHETIC)
    assert recipe["pseudo_labels"] == "pseudo_labels"
    for labels, linked in (("org/labels@v1", ["org/labels"]), (str(tmp_path), None), (None, None)):
        recipe |= {"model_name_or_path": "nvidia/mit-b5", "from_scratch": False, "pseudo_labels": labels}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        write_model_card(tmp_path)
        assert (card_of(tmp_path).data.base_model, card_of(tmp_path).data.datasets) == ("nvidia/mit-b5", linked)
        assert ("`org/labels` of optical networks" in card_of(tmp_path).text) == (linked is not None)
        assert "The terms of `nvidia/mit-b5`" in card_of(tmp_path).text
        assert ("labels that come with them (simulated noisy labels)" in card_of(tmp_path).text) == (labels is None)
        assert ("The terms of `org/labels`" in card_of(tmp_path).text) == (linked is not None)
        assert card_of(tmp_path).data.license == "other"  # whatever the data's licence is


def test_every_class_has_its_row_of_id_colour_and_score(folders: dict[str, Path]) -> None:
    text = card_of(folders["segformer"]).text
    results = json.loads((folders["segformer"] / "eval_results.json").read_text())
    for index, name in enumerate(OPEN_EARTH_MAP.names):
        assert f"| {index} | {name} | `#{bytes(OPEN_EARTH_MAP.palette[index]).hex().upper()}` |" in text
        if index:
            iou = results["iou"][name]
            assert f"\n| {name} | {'-' if iou is None else f'{iou:.4f}'} |\n" in text
    assert "\n| building | - |\n" in text  # not in the truth


def test_the_interval_of_a_report_counts_if_it_is_of_the_same_predictions(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["ensemble"], tmp_path / "ensemble")
    results = json.loads((folder / "eval_results.json").read_text())
    interval = {"value": results["mean_iou"], "low": 0.1234, "high": 0.5678}
    report = {**results, "intervals": {"tiles": {"mean_iou": interval}}}
    (folder / "report.json").write_text(json.dumps(report))
    write_model_card(folder)
    assert "\n| 95 % interval of the mean, over tiles | - | - | - | 0.1234 to 0.5678 |\n" in card_of(folder).text
    report["confusion_matrix"][1][1] += 1  # another stride, or an older training
    (folder / "report.json").write_text(json.dumps(report))
    write_model_card(folder)
    assert "95 % interval" not in card_of(folder).text


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_shown_where_they_exist(kind: str, folders: dict[str, Path]) -> None:
    shown = re.findall(r"!\[[^\]]+\]\((.+?)\)", card_of(folders[kind]).text)
    there = {path.relative_to(folders[kind]).as_posix() for path in (folders[kind] / "figures").rglob("*.png")}
    assert {*shown} == {path for path in there if "mixes" not in path}
    assert len(shown) == len({*shown})


def test_only_the_card_of_swin_explains_its_windows(folders: dict[str, Path]) -> None:
    told = [kind for kind in KINDS if "Windows of SwinV2" in card_of(folders[kind]).text]
    assert told == ["swinv2"]
    assert "the window is 4 in every stage" in " ".join(card_of(folders["swinv2"]).text.split())


def test_all_settings_of_the_recipe_are_in_the_card(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        text = card_of(folders[kind]).text
        for key, value in yaml.safe_load((folders[kind] / "recipe.yaml").read_text()).items():
            shown = ", ".join(value) if isinstance(value, list) else "-" if value is None else value
            assert f"| `{key}` | {shown} |" in text
        assert "/home/me" not in text
    assert "cross entropy + reverse cross entropy + Lovász-softmax" in card_of(folders["segformer"]).text


def test_stage_1_says_where_each_network_is(folders: dict[str, Path]) -> None:
    text = card_of(folders["stage1"]).text
    assert "The root folder contains the **teacher**; `student/` contains the student" in text
    assert "| | teacher, source | teacher, target | student, source | student, target |" in text
    student = json.loads((folders["stage1"] / "student" / "eval_results.json").read_text())
    assert f" **{student['target']['mean_iou']:.4f}** |\n" in text


def test_an_ensemble_lists_its_members(folders: dict[str, Path]) -> None:
    text = card_of(folders["ensemble"]).text
    assert "| `member_1` | UperNet ConvNeXtV2 | `convnextv2` | - | 2.0 | 64 |" in text
    assert "| | member_0 | member_1 | member_2 | ensemble |" in text
    assert str(folders["segformer"].parent) not in text.replace(str(folders["ensemble"]), "")


def test_a_model_without_scores_is_not_measured(tmp_path: Path) -> None:
    card = card_of(make_stage2(tmp_path / "run", scored=False))
    assert "## Results\n\nNot measured.\n" in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("source", "mIoU on the source's validation images; no target label was used."),
        ("weight", "mean weight (lambda) of the target's pseudo-labels; no target label was used."),
        ("target", "That choice uses target labels, so `best/` is not unsupervised."),
    ],
)
def test_stage_1_says_how_its_best_model_was_chosen(
    choice: str, sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["stage1"], tmp_path / "run"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"select_best_by": choice}))
    write_model_card(folder)
    assert sentence in " ".join(card_of(folder).text.split())
    assert card_of(folder).text.count("`best/` is the teacher") == 1


# What the data is


def card_with(folder: Path, training_data: dict[str, Any] | None, copy: Path) -> ModelCard:
    """Write the card of a copy of a folder whose training data is known."""
    shutil.copytree(folder, copy)
    if training_data is not None:
        write_training_data(copy, training_data)
    write_model_card(copy)
    return card_of(copy)


def licence_of(card: ModelCard) -> str:
    return " ".join(card.text.partition("## Licence")[2].partition("\n## ")[0].split())


@pytest.mark.parametrize("kind", ["segformer", "stage1"])
def test_a_model_of_synthetic_data_is_apache_and_says_so(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    card = card_with(folders[kind], SYNTHETIC, tmp_path / "run")
    assert (card.data.license, card.data.license_name) == ("apache-2.0", None)
    assert licence_of(card).endswith("The weights were trained on synthetic data, Apache-2.0.")
    assert "OpenEarthMap (" not in card.text and "Zenodo" not in card.text and "laid out as" not in card.text
    assert "The SAR tiles were generated." in card.text
    assert "Trained or scored on synthetic images: the scores say nothing about real ones." in card.text
    names = {"synthetic dataset, SAR tiles"} | ({"synthetic dataset, optical tiles"} if kind == "stage1" else set())
    assert {each.dataset_name for each in card.data.eval_results} == names
    assert all(each.dataset_type.startswith("synthetic-openearthmap") for each in card.data.eval_results)


@pytest.mark.parametrize("kind", ["segformer", "stage1"])
def test_a_model_of_the_release_has_its_terms(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    card = card_with(folders[kind], RELEASED, tmp_path / "run")
    assert (card.data.license, card.data.license_name) == ("other", "terms-of-the-training-data")
    assert "OpenEarthMap-SAR: as its Zenodo records say (14622048, 14950559)." in licence_of(card)
    assert ("CC BY-NC-SA 4.0" in licence_of(card)) == (kind == "stage1")
    assert "laid out as" not in card.text and "synthetic" not in card.text
    assert "The data: OpenEarthMap (Xia et al., arXiv:2210.10732)" in card.text
    types = {"openearthmap-sar": "OpenEarthMap-SAR"} | ({"openearthmap": "OpenEarthMap"} if kind == "stage1" else {})
    assert {each.dataset_type: each.dataset_name for each in card.data.eval_results} == types


@pytest.mark.parametrize("kind", ["segformer", "stage1"])
def test_a_model_of_unknown_data_has_the_terms_of_that_data(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    card = card_with(folders[kind], None, tmp_path / "run")
    assert (card.data.license, card.data.license_name) == ("other", "terms-of-the-training-data")
    assert "Data laid out as OpenEarthMap-SAR: the terms of your data apply." in licence_of(card)
    assert "Zenodo" not in card.text and "CC BY" not in card.text and "synthetic" not in card.text
    types = {"like-openearthmap-sar"} | ({"like-openearthmap"} if kind == "stage1" else set())
    assert {each.dataset_type for each in card.data.eval_results} == types


def test_synthetic_and_released_data_together_are_not_apache(folders: dict[str, Path], tmp_path: Path) -> None:
    mixed = {"source": RELEASED["source"], "target": SYNTHETIC["target"]}
    card = card_with(folders["stage1"], mixed, tmp_path / "run")
    assert card.data.license == "other"
    assert "CC BY-NC-SA 4.0" in licence_of(card) and "SAR tiles: synthetic, Apache-2.0." in licence_of(card)


@pytest.mark.parametrize(
    ("training_data", "expected"),
    [
        (SYNTHETIC, "The data that it was scored on: Synthetic dataset, SAR tiles: synthetic, Apache-2.0."),
        (RELEASED, "The data that it was scored on: OpenEarthMap-SAR: as its Zenodo records say"),
        (None, "The data that it was scored on: Data laid out as OpenEarthMap-SAR: the terms of your data apply."),
    ],
    ids=["synthetic", "released", "unknown"],
)
def test_an_ensemble_has_the_terms_of_its_members(
    training_data: Any, expected: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    card = card_with(folders["ensemble"], training_data, tmp_path / "run")
    assert (card.data.license, card.data.license_name) == ("other", "terms-of-the-members")
    assert "The weights have the terms of each member" in licence_of(card)
    assert expected in licence_of(card)
    name = read_training_data(tmp_path / "run")["target"]["name"]
    assert {each.dataset_name for each in card.data.eval_results} == {name}
    assert f"were scored on val tiles of {name}." in card.text


@pytest.mark.parametrize(
    ("training_data", "license", "terms"),
    [
        (SYNTHETIC, "apache-2.0", "Synthetic dataset, SAR tiles: synthetic, Apache-2.0."),
        (RELEASED, "other", "The terms of OpenEarthMap-SAR apply."),
        (None, "other", "Data laid out as OpenEarthMap-SAR: the terms of your data apply."),
    ],
    ids=["synthetic", "released", "unknown"],
)
def test_pseudo_labels_say_which_tiles_they_label(training_data: Any, license: str, terms: str, tmp_path: Path) -> None:
    folder = make_pseudo_labels(tmp_path / "labels", training_data=training_data)
    card = DatasetCard.load(folder / "README.md")
    name = read_training_data(folder)["target"]["name"]
    assert card.data.pretty_name == f"Land-cover pseudo-labels of {name}"
    assert f"3 optical tiles ({name}, `train`)" in card.text
    assert card.data.license == license
    assert terms in " ".join(card.text.partition("## Licence")[2].split())
    assert str(tmp_path) not in card.content
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined", card.text)


def test_the_record_of_the_data_has_no_other_keys(tmp_path: Path) -> None:
    write_training_data(tmp_path, {"target": {**SYNTHETIC["target"], "root": "/home/me/data"}})
    assert json.loads((tmp_path / "training_data.json").read_text()) == {"target": SYNTHETIC["target"]}
    (tmp_path / "training_data.json").write_text("{")
    with pytest.raises(UserError, match=r"training_data\.json is damaged"):
        read_training_data(tmp_path)


# Commands


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("segformer", Stage2Arguments, {"pseudo_labels": "pseudo_labels"}),
        ("stage1", Stage1Arguments, {"source_dir": "data/OpenEarthMap_wo_xBD"}),
        ("ensemble", EnsembleArguments, {"model": ["segformer", "convnextv2", "swinv2"]}),
        ("labels", PseudoLabelArguments, {"model": ["stage1"]}),
    ],
)
def test_the_command_of_the_card_repeats_the_recipe(
    kind: str,
    arguments: Any,
    expected: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_pseudo_labels(tmp_path / "labels") if kind == "labels" else folders[kind]
    text = card_of(folder).text
    (block,) = re.findall(r"^    (accelerate launch .*\\\n +--config recipe\.yaml .*)$", text, re.MULTILINE)
    words = shlex.split(block.replace("\\\n", " "))
    assert words[:4] == ["accelerate", "launch", "-q", "--config_file"]
    assert all((Path(__file__).parents[1] / word).is_file() for word in words[4:6])
    monkeypatch.chdir(folder)
    (folder / "local_paths.yaml").unlink(missing_ok=True)  # it is not on the Hub
    parsed = vars(parse_arguments(arguments, words[6:]))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    overridden = {"data_dir": "data/dfc25_track1", **expected}
    assert {key: parsed[key] for key in overridden} == overridden
    assert {key: parsed[key] for key in recipe} == recipe
    assert parsed["output_dir"].startswith("runs/")


# Mistakes


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
    with pytest.raises(UserError, match=r"contains no model: neither config\.json nor ensemble\.json"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("file", ["recipe.yaml", "config.json", "eval_results.json"])
def test_a_damaged_file_is_named(file: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["segformer"], tmp_path / "run"))
    (folder / file).write_text("{[")
    with pytest.raises(UserError, match=re.escape(f"{folder / file} is damaged")):
        write_model_card(folder)


def test_a_recipe_of_another_program_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["segformer"], tmp_path / "run"))
    (folder / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match=r"run/recipe\.yaml has no model_name_or_path; it is not one"):
        write_model_card(folder)


@pytest.mark.parametrize("kind", ["segformer", "labels"])
def test_no_name_starts_a_tag_and_none_is_a_template(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name = "<script>alert(1)</script> {{ 7 * 7 }}"
    data = {"target": {**SYNTHETIC["target"], "name": name, "description": name}}
    if kind == "labels":
        folder = make_pseudo_labels(tmp_path / "labels", training_data=data)
    else:
        folder = Path(shutil.copytree(folders[kind], tmp_path / "run"))
        (folder / "training_data.json").write_text(json.dumps(data))
        write_model_card(folder)
    body = (folder / "README.md").read_text().split("---")[2]
    assert "<script>" not in body and "&lt;script>alert(1)&lt;/script> {{ 7 * 7 }}" in body


def test_a_header_that_is_no_plain_yaml_is_named(tmp_path: Path) -> None:
    for text in ("a: !!python/object/apply:os.getcwd []", "a: [", "a: 'b"):
        with pytest.raises(UserError, match=r"README\.md: its header cannot be read"):
            read_header(f"---\n{text}\n---\n", tmp_path / "README.md")
