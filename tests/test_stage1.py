"""Stage 1 as a user runs it: two networks, two domains, survives kills, agrees with itself on two processes."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from conftest import make_scene, write_tiff
from recipe_process import run_recipe
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, SegformerConfig

from hf_seg.labels import OPEN_EARTH_MAP

TINY = {
    "model_name_or_path": "toy-segformer",
    "from_scratch": "true",
    "crop_size": "32",
    "max_train_steps": "8",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-3",
    "head_lr_multiplier": "1",
    "warmup_steps": "2",
    "raa_prob": "0.5",
    "ema_decay": "0.8",
    "confidence_threshold": "0.2",
    "eval_steps": "4",
    "checkpointing_steps": "3",
    "logging_steps": "1",
    "panel_steps": "4",
    "report_to": "none",
    "mixed_precision": "no",
    "dataloader_num_workers": "0",
}


def command_line(oem: Path, oem_sar: Path, output_dir: Path, **settings: object) -> list[str]:
    """Return the tiny run's command line, with some settings replaced."""
    values = {**TINY, "source_dir": oem, "data_dir": oem_sar, "output_dir": output_dir, **settings}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def read_log(output_dir: Path) -> list[dict]:
    """Return metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def target(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OpenEarthMap-SAR with optical images in val too, and a black wedge in one training image."""
    root = tmp_path_factory.mktemp("target") / "dfc25_track1"
    shutil.copytree(oem_sar, root)
    for path in (root / "val" / "sar_images").iterdir():
        with rasterio.open(path) as file:
            write_tiff(root / "val" / "rgb_images" / path.name, np.repeat(file.read(), 3, axis=0))
    first = root / "train" / "rgb_images" / "TrainArea_001.tif"
    with rasterio.open(first) as file:
        pixels = file.read()
    pixels[:, :, :60] = 0
    write_tiff(first, pixels)
    return root


@pytest.fixture(scope="module")
def finished_run(oem: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run_recipe("stage1", *command_line(oem, target, output_dir), log=output_dir.parent / "log")
    assert result.exit_codes == [0], result.output
    return output_dir


def test_the_last_scores_are_printed_for_each_network_and_domain(finished_run: Path) -> None:
    results = {name: json.loads((finished_run / name / "eval_results.json").read_text()) for name in ("", "student")}
    (line,) = (line for line in (finished_run.parent / "log").read_text().splitlines() if line.startswith("mIoU"))
    for name, title in (("student", "student"), ("", "teacher")):
        assert f"{results[name]['mean_iou']:.4f} {title} source" in line
        assert f"{results[name]['target']['mean_iou']:.4f} {title} target" in line


def test_run_leaves_teacher_and_student_each_complete(finished_run: Path) -> None:
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json"}
    wanted |= {"recipe.yaml", "eval_results.json", "training_data.json"}
    for folder in (finished_run, finished_run / "student", finished_run / "best", finished_run / "best" / "student"):
        of_the_run = {"metrics.jsonl", "README.md", "local_paths.yaml"} if folder == finished_run else set()
        assert {path.name for path in folder.iterdir() if path.is_file()} == wanted | of_the_run, folder
        assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)).__name__.startswith("Segformer")
    figures = {str(path.relative_to(finished_run / "figures")) for path in (finished_run / "figures").rglob("*.png")}
    per_domain = {f"{domain}/{name}.png" for domain in ("source", "target") for name in ("confusion_matrix", "panel")}
    assert figures == per_domain | {"curves.png", "mixes/step_00000004.png", "mixes/step_00000008.png"}


def test_both_networks_are_scored_on_both_domains(finished_run: Path) -> None:
    scores = [line for line in read_log(finished_run) if "teacher_source_mean_iou" in line]
    assert [line["step"] for line in scores] == [4, 8]
    for folder, name in ((finished_run, "teacher"), (finished_run / "student", "student")):
        results = json.loads((folder / "eval_results.json").read_text())
        assert (results["n_images"], results["target"]["n_images"]) == (2, 3)
        assert results["mean_iou"] == scores[-1][f"{name}_source_mean_iou"]
        assert results["target"]["mean_iou"] == scores[-1][f"{name}_target_mean_iou"]
    best = json.loads((finished_run / "best" / "eval_results.json").read_text())
    assert best["mean_iou"] == max(line["teacher_source_mean_iou"] for line in scores)


def test_log_shows_how_self_training_goes(finished_run: Path) -> None:
    lines = [line for line in read_log(finished_run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert line["loss"] == pytest.approx(line["source_loss"] + line["target_loss"], rel=1e-5)
        assert 0 <= line["mean_weight"] <= 1 and 0 <= line["confident_pixels"] <= 1
        assert sum(line[f"pseudo_share_{name}"] for name in OPEN_EARTH_MAP.names) == pytest.approx(1, abs=1e-5)
        assert line["pseudo_share_background"] == 0
    assert max(line["mean_weight"] for line in lines) > 0


def test_teacher_follows_the_student_through_the_checkpoint(finished_run: Path) -> None:
    teacher = load_file(finished_run / "checkpoints" / "step_00000008" / "model_1.safetensors")
    student = load_file(finished_run / "checkpoints" / "step_00000008" / "model.safetensors")
    assert int(teacher["step"]) == 8
    exported = {folder: load_file(folder / "model.safetensors") for folder in (finished_run, finished_run / "student")}
    name = "decode_head.classifier.weight"
    assert torch.equal(exported[finished_run][name], teacher[f"model.model.{name}"])
    assert torch.equal(exported[finished_run / "student"][name], student[f"model.{name}"])
    assert not torch.equal(exported[finished_run][name], exported[finished_run / "student"][name])


@pytest.mark.parametrize(
    ("disturb", "workers"),
    [
        ("kill_before_teacher:5", 2),  # between the optimizer step and the teacher's update
        ("kill_after_step:7", 0),
        ("kill_in_checkpoint:2", 0),
        ("kill_in_export:2", 2),  # the student is replaced, the teacher not yet
        ("terminate_after_step:5", 0),
    ],
)
def test_killed_and_resumed_run_ends_with_the_same_bits(
    disturb: str, workers: int, finished_run: Path, oem: Path, target: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    argv = command_line(oem, target, output_dir, dataloader_num_workers=workers)
    killed = run_recipe("stage1", *argv, log=tmp_path / "killed", disturb=disturb)
    expected = {"kill": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM}
    assert killed.exit_codes == [expected[disturb.split("_")[0]]], killed.output
    resumed = run_recipe("stage1", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "resumed")
    assert resumed.exit_codes == [0], resumed.output

    for folder in ("", "student", "best", "best/student"):
        for name in ("model.safetensors", "eval_results.json"):
            path = Path(folder) / name
            assert (output_dir / path).read_bytes() == (finished_run / path).read_bytes(), path
    assert read_log(output_dir) == read_log(finished_run)
    assert not list(output_dir.rglob("*.partial*"))


def test_two_processes_give_the_result_of_one(oem: Path, target: Path, tmp_path: Path) -> None:
    """Where the loss of each process divides by as many valid pixels: no ignored ones in these tiles."""
    config = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    config.save_pretrained(tmp_path / "plain")
    settings = {"model_name_or_path": tmp_path / "plain", "eval_steps": 8, "min_scale": 1, "max_scale": 1}
    without_wedge = tmp_path / "without_wedge"
    shutil.copytree(target, without_wedge)
    shutil.copy(
        without_wedge / "train/rgb_images/TrainArea_003.tif", without_wedge / "train/rgb_images/TrainArea_001.tif"
    )
    runs = {}
    for processes in (1, 2):
        output_dir = tmp_path / f"processes_{processes}"
        argv = command_line(oem, without_wedge, output_dir, **settings, per_device_train_batch_size=4 // processes)
        log = tmp_path / f"log_{processes}"
        result = run_recipe("stage1", *argv, log=log, processes=processes, disturb="freeze_batch_norm")
        assert result.exit_codes == [0] * processes, result.output
        assert f"4 of 6 source and of 6 target images a step on {processes} process(es)" in result.output
        runs[processes] = output_dir
    for key in ("source_loss", "target_loss", "mean_weight"):
        values = {n: [line[key] for line in read_log(run) if key in line] for n, run in runs.items()}
        assert values[1] == pytest.approx(values[2], rel=1e-4), key
    for folder in ("", "student"):
        weights = {n: load_file(run / folder / "model.safetensors") for n, run in runs.items()}
        for name, weight in weights[1].items():
            torch.testing.assert_close(weights[2][name], weight, rtol=0, atol=1e-5)


def test_killed_on_two_processes_and_resumed_ends_with_the_same_bits(oem: Path, target: Path, tmp_path: Path) -> None:
    """Running statistics differ between processes, and the teacher's must not depend on a resume."""
    model = {"model_name_or_path": "toy-convnextv2", "learning_rate": 1e-2, "confidence_threshold": 0.3}
    model |= {"max_train_steps": 8, "eval_steps": 0, "checkpointing_steps": 4, "panel_steps": 0}
    for name in ("unbroken", "killed"):
        argv = command_line(oem, target, tmp_path / name, **model)
        disturb = {"disturb": "kill_before_teacher:6"} if name == "killed" else {}
        run_recipe("stage1", *argv, log=tmp_path / f"log_{name}", processes=2, **disturb)
    argv += ["--resume_from_checkpoint", "latest"]
    resumed = run_recipe("stage1", *argv, log=tmp_path / "resumed", processes=2)
    assert "steps 4 to 8" in resumed.output
    assert resumed.exit_codes == [0, 0], resumed.output
    for folder in ("", "student"):
        path = Path(folder) / "model.safetensors"
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "unbroken" / path).read_bytes()
    assert read_log(tmp_path / "killed") == read_log(
        tmp_path / "unbroken"
    )  # pixels near the threshold show small changes


def test_swinv2_trains_with_its_auxiliary_head_in_bf16(oem: Path, target: Path, tmp_path: Path) -> None:
    settings = {"model_name_or_path": "toy-swinv2", "max_train_steps": 3, "eval_steps": 3, "mixed_precision": "bf16"}
    result = run_recipe("stage1", *command_line(oem, target, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    for folder in (tmp_path / "run", tmp_path / "run" / "student"):
        assert type(AutoModelForSemanticSegmentation.from_pretrained(folder)).__name__.startswith("UperNet")


def test_source_only_is_the_same_source_stream_without_target(
    finished_run: Path, oem: Path, target: Path, tmp_path: Path
) -> None:
    argv = command_line(oem, target, tmp_path / "run", method="source_only", eval_steps=0)
    result = run_recipe("stage1", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    log, with_target = read_log(tmp_path / "run"), read_log(finished_run)
    assert not {"target_loss", "mean_weight"} & log[0].keys()
    losses, others = ([row["source_loss"] for row in rows if "source_loss" in row] for rows in (log, with_target))
    assert losses[0] == others[0] and losses[-1] != others[-1]  # the same images, the same start
    assert not (tmp_path / "run" / "figures" / "mixes").exists()


def test_gradient_accumulation_updates_the_teacher_once_a_step(oem: Path, target: Path, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "eval_steps": 0}
    result = run_recipe("stage1", *command_line(oem, target, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert int(load_file(checkpoint / "model_1.safetensors")["step"]) == 3
    assert json.loads((checkpoint / "manifest.json").read_text())["samples_seen"] == 12


def test_validation_needs_no_labels_of_the_target(oem: Path, oem_sar: Path, tmp_path: Path) -> None:
    """As released: val has SAR alone."""
    argv = command_line(oem, oem_sar, tmp_path / "target", max_train_steps=3, select_best_by="target")
    result = run_recipe("stage1", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2] and "val has no labelled optical tiles" in result.output
    argv = command_line(oem, oem_sar, tmp_path / "run", max_train_steps=3, eval_steps=3)
    result = run_recipe("stage1", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["target"] is None and results["n_images"] == 2


def test_self_training_that_collapses_or_stands_still_is_told(oem: Path, tmp_path: Path) -> None:
    """White target images, which no class of the source looks like, and a confidence that nothing reaches."""
    root, rng = tmp_path / "dfc25_track1", np.random.default_rng(0)
    for number in range(3):
        sar, _ = make_scene(rng, 96)
        write_tiff(root / f"train/sar_images/TrainArea_{number:03d}.tif", sar)
        write_tiff(root / f"train/rgb_images/TrainArea_{number:03d}.tif", np.full((3, 96, 96), 255, np.uint8))
    settings = {"eval_steps": 0, "max_train_steps": 14, "confidence_threshold": 1.0, "panel_steps": 0}
    result = run_recipe("stage1", *command_line(oem, root, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    assert re.search(r"step 10: (COLLAPSE: \S+ % of the pseudo-labels are|SELF-TRAINING STALLS)", result.output)


BAD = [
    ({"source_dir": "nowhere"}, "nowhere does not exist"),
    ({"raa_min_scale": 0.5, "raa_max_scale": 0.2}, "raa_max_scale must be at least raa_min_scale, 0.5; it is 0.2"),
    ({"ema_decay": 1.5}, "ema_decay must be at least 0 and at most 1; it is 1.5"),
    ({"select_best_by": "weight", "method": "source_only"}, "select_best_by must be source or target"),
    ({"method": "daformer"}, "invalid choice: 'daformer'"),
    ({"raa_resampling": "cubic"}, "invalid choice: 'cubic'"),
    ({"pseudo_labels": "x"}, "unknown setting '--pseudo_labels'"),
    ({"model_name_or_path": "toy-swinv2", "per_device_train_batch_size": 1}, "at least 2 for UperNet; it is 1"),
    ({"learning_rate": 1e6, "head_lr_multiplier": 1e6, "warmup_steps": 0}, "at step"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_end_in_one_line(settings: dict, message: str, oem: Path, target: Path, tmp_path: Path) -> None:
    result = run_recipe("stage1", *command_line(oem, target, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [2], result.output
    assert message in result.output and "Traceback" not in result.output
    assert message == "at step" or not (tmp_path / "run").exists()  # a failed start leaves nothing behind


@pytest.mark.parametrize("chosen_by", ["target", "weight"])
def test_best_is_chosen_by_what_was_asked_for(chosen_by: str, oem: Path, target: Path, tmp_path: Path) -> None:
    argv = command_line(oem, target, tmp_path / "run", select_best_by=chosen_by, eval_steps=2)
    result = run_recipe("stage1", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    key = {"target": "teacher_target_mean_iou", "weight": "mean_weight"}[chosen_by]
    values = {line["step"]: line[key] for line in read_log(tmp_path / "run") if key in line and line["step"] % 2 == 0}
    best = json.loads((tmp_path / "run" / "best" / "eval_results.json").read_text())
    assert best["step"] == max(values, key=lambda step: (values[step], -step))


def test_a_target_without_optical_images_is_named(oem: Path, target: Path, tmp_path: Path) -> None:
    root = tmp_path / "sar_only"
    shutil.copytree(target / "train" / "sar_images", root / "train" / "sar_images")
    result = run_recipe("stage1", *command_line(oem, root, tmp_path / "run"), log=tmp_path / "log")
    assert result.exit_codes == [2]
    assert "6 of 6 tiles have no optical image, first TrainArea_001" in result.output
