"""The ensemble's recipe as a user runs it: one pass scores all, the scores are those of the folder that it leaves."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_scene, write_tiff
from PIL import Image
from recipe_process import Result, run_recipe

from hf_seg import EnsembleForSemanticSegmentation as Ensemble
from hf_seg.arguments import EnsembleArguments
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.samples import LabelledImages
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.labels import BACKGROUND, IGNORE_INDEX
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import build_model
from hf_seg.settings import parse_arguments
from hf_seg.training.evaluation import evaluate

CROPS = {"toy-segformer": 32, "toy-convnextv2": 64}
FIXED_KEYS = {"mean_iou", "overall_accuracy", "iou", "n_classes_present", "confusion_matrix", "n_images"}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two networks whose answers vary over an image."""
    folders = []
    for name, crop in CROPS.items():
        torch.manual_seed(0)
        model: Any = build_model(name, crop_size=crop, from_scratch=True)
        torch.nn.init.normal_(model.decode_head.classifier.weight)
        folders.append(tmp_path_factory.mktemp("members") / name)
        export_model(model, folders[-1], crop_size=crop, recipe="", results=None)
    return [str(folder) for folder in folders]


def run(members: list[str], output_dir: Path, data_dir: Path | str, *argv: str, processes: int = 1) -> Result:
    log = output_dir.parent / f"{output_dir.name}.log"
    log.unlink(missing_ok=True)
    command = ["--model", *members, "--output_dir", str(output_dir), "--data_dir", str(data_dir), *argv]
    return run_recipe("ensemble", *command, log=log, processes=processes)


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval_results.json").read_text())


@pytest.fixture(scope="module")
def finished(members: list[str], oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with weights 3 and 1, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "ensemble"
    result = run(members, folder, oem_sar, "--weights", "3", "1", "--batch_size", "3")
    assert result.exit_codes == [0], result.output
    return folder, result.output


def test_leaves_a_complete_folder(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    figures = {"confusion_matrix.png", "members.png", "panel.png", "uncertainty.png"}
    expected = {"ensemble.json", "eval_results.json", "recipe.yaml", "README.md"}
    expected |= {"local_paths.yaml", "training_data.json"}
    expected |= {f"figures/{name}" for name in figures} | {f"member_{i}/{name}" for i in range(2) for name in model}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == expected
    for name in figures:
        with Image.open(folder / "figures" / name) as figure:
            assert min(figure.size) > 300


@pytest.mark.parametrize("file", ["ensemble.json", "panel.png"])
def test_an_ensemble_that_is_replaced_stays_until_the_new_one_is_complete(
    file: str, finished: tuple[Path, str], members: list[str], oem_sar: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "ensemble")
    argv = ["--model", *members, "--output_dir", str(folder), "--data_dir", str(oem_sar), "--weights", "1", "1"]
    killed = run_recipe("ensemble", *argv, log=tmp_path / "log", disturb=f"kill_before_rename:{file}")
    assert killed.exit_codes == [-signal.SIGKILL], killed.output
    is_old = file == "ensemble.json"
    assert len({each.weight for each in load_networks(folder)}) == 1 + is_old
    assert (read_results(folder) == read_results(finished[0])) is is_old


def test_results_are_those_of_the_folder(finished: tuple[Path, str], oem_sar: Path) -> None:
    folder, _ = finished
    results = read_results(folder)
    counts = ConfusionMatrix()
    ensemble = Ensemble.from_pretrained(folder)
    for path in sorted((oem_sar / "val/sar_images").iterdir()):
        label = np.array(Image.open(oem_sar / "val/labels" / path.name))
        label[label == BACKGROUND] = IGNORE_INDEX
        counts.update(ensemble.predict(path, batch_size=3)[0].label_map, label)
    assert results["confusion_matrix"] == counts.matrix.tolist()
    assert results["mean_iou"] == counts.compute()["mean_iou"]
    assert results.keys() - FIXED_KEYS == {"split", "column", "tta", "stride", "members"}
    assert (results["n_images"], results["split"], results["tta"]) == (3, "val", "none")


def test_each_members_scores_are_those_that_it_gets_alone(
    finished: tuple[Path, str], members: list[str], oem_sar: Path
) -> None:
    images = LabelledImages(load_open_earth_map_sar(oem_sar, "val"), "sar")
    results = read_results(finished[0])
    for member, name, weight, crop in zip(results["members"], members, (3.0, 1.0), CROPS.values(), strict=True):
        predictor = Predictor(load_networks(name), device=torch.device("cpu"), batch_size=3)
        alone, _ = evaluate(predictor, images, Accelerator(cpu=True))
        assert {"n_images": 3, **{key: member[key] for key in FIXED_KEYS - {"n_images"}}} == alone
        described = {key: member[key] for key in member.keys() - FIXED_KEYS}
        assert described == {"origin": Path(name).name, "crop": crop, "weight": weight, "revision": None}
    matrices = [each["confusion_matrix"] for each in (*results["members"], results)]
    assert matrices[0] != matrices[1] != matrices[2] != matrices[0]


def test_two_processes_give_the_results_of_one(
    finished: tuple[Path, str], members: list[str], oem_sar: Path, tmp_path: Path
) -> None:
    two = run(members, tmp_path / "two", oem_sar, "--weights", "3", "1", "--batch_size", "3", processes=2)
    assert two.exit_codes == [0, 0] and "2 process(es)" in two.output
    for name in ("eval_results.json", "ensemble.json", "member_1/model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (finished[0] / name).read_bytes()


def test_prints_a_table_of_what_it_wrote(finished: tuple[Path, str], members: list[str]) -> None:
    folder, output = finished
    results = read_results(folder)
    assert f"member 0: {Path(members[0]).name}, weight 3, crop 32" in output
    (line,) = (line for line in output.splitlines() if line.startswith("mIoU"))
    scores = [*(member["mean_iou"] for member in results["members"]), results["mean_iou"]]
    assert line.split()[1:] == [f"{score:.4f}" for score in scores]
    assert "3 val tiles" in output and "background" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("water"))
    assert float(line.split()[-1]) == pytest.approx(results["iou"]["water"], abs=1e-4)


def test_the_recipe_in_the_folder_repeats_the_run(
    finished: tuple[Path, str], members: list[str], oem_sar: Path
) -> None:
    again = parse_arguments(EnsembleArguments, ["--config", str(finished[0] / "recipe.yaml")])
    assert (again.model, again.weights, again.batch_size) == (members, [3.0, 1.0], 3)
    assert (again.data_dir, again.eval) == (str(oem_sar), True)


def test_without_eval_it_exports_unscored_and_leaves_no_older_scores(
    finished: tuple[Path, str], members: list[str], oem_sar: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ensemble"
    result = run(members, folder, oem_sar, "--weights", "3", "1", "--tta", "flips", "--stride", "1")
    assert result.exit_codes == [0], result.output
    results = read_results(folder)
    assert (results["tta"], results["stride"]) == ("flips", 1.0)
    assert results["confusion_matrix"] != read_results(finished[0])["confusion_matrix"]

    result = run(members, folder, "nowhere", "--eval", "false", "--weights", "1", "2")
    assert result.exit_codes == [0] and "not scored: --eval is false" in result.output
    left = {path.name for path in folder.iterdir()}
    assert left == {"ensemble.json", "member_0", "member_1", "README.md", "recipe.yaml", "local_paths.yaml"}
    assert [member.weight for member in Ensemble.from_pretrained(folder, low_memory=True).members] == [1.0, 2.0]


def test_other_members_do_not_replace_an_ensemble(
    finished: tuple[Path, str], members: list[str], oem_sar: Path
) -> None:
    before = (finished[0] / "ensemble.json").read_bytes()
    result = run(members[::-1], finished[0], oem_sar)
    assert result.exit_codes == [2]
    assert "contains an ensemble of other networks" in result.output and "choose another --output_dir" in result.output
    assert (finished[0] / "ensemble.json").read_bytes() == before


def test_an_export_that_was_stopped_while_it_replaced_an_ensemble_is_repeated(
    finished: tuple[Path, str], members: list[str], oem_sar: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ensemble"
    shutil.copytree(finished[0], folder)
    (folder / "ensemble.json").unlink()
    result = run(members[::-1], folder, oem_sar)
    assert result.exit_codes == [2] and "already contains something else, e.g. README.md" in result.output
    result = run(members, folder, oem_sar, "--weights", "3", "1", "--batch_size", "3")
    assert result.exit_codes == [0], result.output
    assert (folder / "ensemble.json").read_bytes() == (finished[0] / "ensemble.json").read_bytes()


def test_another_run_is_not_written_over(members: list[str], oem_sar: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    result = run(members, folder, oem_sar)
    assert result.exit_codes == [2]
    assert f"error: {folder} already contains something else, e.g. model.safetensors" in result.output
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--split", "test"], "split 'test' has no usable tile"),
        (["--column", "optical"], "3 of 3 tiles have no optical image, first ValArea_001; or export without scores"),
        (["--weights", "1"], "1 weight(s) for 2 member(s): give one for each, or none"),
        (["--mixed_precision", "fp16"], "mixed_precision must be no or bf16 on a CPU; it is 'fp16'"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    members: list[str], oem_sar: Path, argv: list[str], words: str, tmp_path: Path
) -> None:
    result = run(members, tmp_path / "out", oem_sar, *argv)
    assert result.exit_codes == [2]
    (line,) = (line for line in result.output.splitlines() if line.startswith("error: "))
    assert words in line and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_tiles_without_labels_are_not_scored_silently(members: list[str], tmp_path: Path) -> None:
    sar, label = make_scene(np.random.default_rng(0), 64)
    for number in (1, 2):
        write_tiff(tmp_path / f"dfc/val/sar_images/ValArea_00{number}.tif", sar)
    result = run(members, tmp_path / "out", tmp_path / "dfc")
    assert result.exit_codes == [2] and "images have no label" in result.output and "--eval false" in result.output
    for number in (1, 2):
        write_tiff(tmp_path / f"dfc/val/labels/ValArea_00{number}.tif", 0 * label)
    result = run(members, tmp_path / "out", tmp_path / "dfc")
    assert result.exit_codes == [2] and "no pixel is of class 1 to 8" in result.output
    assert not (tmp_path / "out").exists()


def test_no_member_is_refused() -> None:
    with pytest.raises(UserError, match="model must be one value or more; it is empty"):
        EnsembleArguments(model=[])


def test_one_member_on_a_real_scene_is_the_ensemble(members: list[str], realdata: Path, tmp_path: Path) -> None:
    result = run(members[1:], tmp_path / "real", realdata / "dfc25_track1", "--stride", "1", "--batch_size", "16")
    assert result.exit_codes == [0], result.output
    results = read_results(tmp_path / "real")
    with Image.open(next((realdata / "dfc25_track1/val/labels").iterdir())) as file:
        labelled = int((np.array(file) != BACKGROUND).sum())
    assert np.sum(results["confusion_matrix"]) == labelled and results["n_images"] == 1
    (member,) = results["members"]
    keys = FIXED_KEYS - {"n_images"}
    assert {key: member[key] for key in keys} == {key: results[key] for key in keys}
