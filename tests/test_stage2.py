"""The loop as a user runs it: learns, scores itself, exports, survives kills, agrees with itself on two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from recipe_process import run_recipe
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, pipeline

PROJECT = Path(__file__).parents[1]
TINY = {
    "model_name_or_path": "toy-segformer",
    "from_scratch": "true",
    "crop_size": "32",
    "max_train_steps": "8",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-3",
    "head_lr_multiplier": "1",
    "warmup_steps": "2",
    "eval_steps": "4",
    "checkpointing_steps": "3",
    "logging_steps": "1",
    "report_to": "none",
    "mixed_precision": "no",
    "dataloader_num_workers": "0",
}


def command_line(oem_sar: Path, output_dir: Path, **settings: object) -> list[str]:
    """Return the tiny run's command line, with some settings replaced."""
    values = {**TINY, "data_dir": oem_sar, "output_dir": output_dir, **settings}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def read_log(output_dir: Path) -> list[dict]:
    """Return metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture(scope="module")
def finished_run(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    result = run_recipe("stage2", *command_line(oem_sar, output_dir), log=output_dir.parent / "log")
    assert result.exit_codes == [0], result.output
    return output_dir


def test_run_leaves_a_complete_folder(finished_run: Path) -> None:
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    model |= {"recipe.yaml", "eval_results.json", "training_data.json"}
    of_the_run = {"README.md", "metrics.jsonl", "local_paths.yaml"}
    for folder, wanted in ((finished_run, model | of_the_run), (finished_run / "best", model)):
        assert {path.name for path in folder.iterdir() if path.is_file()} == wanted
    assert {path.name for path in (finished_run / "figures").iterdir()} == {
        "curves.png",
        "confusion_matrix.png",
        "panel.png",
    }
    assert [path.name for path in sorted((finished_run / "checkpoints").iterdir())] == [
        "step_00000006",
        "step_00000008",
    ]


def test_the_last_and_the_best_score_are_printed(finished_run: Path) -> None:
    log = (finished_run.parent / "log").read_text()
    last, best = (json.loads((finished_run / part / "eval_results.json").read_text()) for part in ("", "best"))
    line = (
        f"mIoU after step {last['step']}: {last['mean_iou']:.4f}; best {best['mean_iou']:.4f} after step {best['step']}"
    )
    assert line in log.splitlines() and "from the beginning: steps 0 to 8" in log


def test_results_are_those_of_the_exported_weights(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    results = json.loads((finished_run / "eval_results.json").read_text())
    command = [
        sys.executable,
        PROJECT / "scripts" / "evaluate_model.py",
        "--model",
        finished_run,
        "--data_dir",
        oem_sar,
    ]
    subprocess.run([*command, "--split", "val", "--output", tmp_path / "scores.json"], check=True, timeout=120)
    again = json.loads((tmp_path / "scores.json").read_text())
    assert results["n_images"] == again["n_images"] == 3
    assert np.sum(results["confusion_matrix"]) == 2 * 112**2 + 96**2
    assert again["confusion_matrix"] == results["confusion_matrix"]
    assert again["mean_iou"] == results["mean_iou"]
    assert again["data"]["name"] == "data laid out as OpenEarthMap-SAR"


def test_stock_transformers_opens_the_folder(finished_run: Path) -> None:
    model = AutoModelForSemanticSegmentation.from_pretrained(finished_run)
    assert type(model).__name__ == "SegformerForSemanticSegmentation"
    assert model.config.id2label[8] == "building"
    grey = Image.fromarray(np.arange(96 * 96, dtype=np.uint8).reshape(96, 96), mode="L")
    segments = pipeline("image-segmentation", model=str(finished_run))(grey)
    assert {segment["mask"].size for segment in segments} == {(96, 96)}
    assert {segment["label"] for segment in segments} <= set(model.config.id2label.values())


def test_log_has_every_step_and_every_validation(finished_run: Path) -> None:
    log = read_log(finished_run)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in log if "mean_iou" in line] == [4, 8]
    for line in log:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["ce"] + line["rce"] + line["lovasz"], rel=1e-5)
    rates = [line["learning_rate"] for line in log if "loss" in line]
    assert rates[2] == max(rates) == 1e-3 and rates[-1] == pytest.approx(1e-3 / 6)


def test_best_is_the_best_validation(finished_run: Path) -> None:
    scores = {line["step"]: line["mean_iou"] for line in read_log(finished_run) if "mean_iou" in line}
    best = json.loads((finished_run / "best" / "eval_results.json").read_text())
    assert best["mean_iou"] == max(scores.values()) == scores[best["step"]]


@pytest.mark.parametrize(
    ("disturb", "workers"),
    [
        ("kill_before_step:2", 0),  # before the first checkpoint
        ("kill_after_step:5", 2),
        ("kill_in_checkpoint:2", 0),
        ("kill_in_export:1", 2),  # at the validation between two checkpoints
        ("kill_before_step:8", 0),
        ("terminate_after_step:5", 2),
        ("interrupt_after_step:7", 0),
    ],
)
def test_killed_and_resumed_run_ends_with_the_same_bits(
    disturb: str, workers: int, finished_run: Path, oem_sar: Path, tmp_path: Path
) -> None:
    output_dir = tmp_path / "run"
    argv = command_line(oem_sar, output_dir, dataloader_num_workers=workers)
    killed = run_recipe("stage2", *argv, log=tmp_path / "killed", disturb=disturb)
    expected = {"kill": -signal.SIGKILL, "terminate": 128 + signal.SIGTERM, "interrupt": 128 + signal.SIGINT}
    assert killed.exit_codes == [expected[disturb.split("_")[0]]], killed.output
    if not disturb.startswith("kill"):
        step = int(disturb[-1])
        assert (output_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()
        assert "--resume_from_checkpoint latest" in killed.output
    resumed = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "resumed")
    assert resumed.exit_codes == [0], resumed.output

    for name in ("model.safetensors", "eval_results.json", "best/model.safetensors", "best/eval_results.json"):
        assert (output_dir / name).read_bytes() == (finished_run / name).read_bytes(), name
    assert read_log(output_dir) == read_log(finished_run)
    assert not list(output_dir.rglob("*.partial*"))


def test_damaged_checkpoint_is_skipped(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    argv = command_line(oem_sar, output_dir)
    run_recipe("stage2", *argv, log=tmp_path / "killed", disturb="kill_after_step:7")
    newest = output_dir / "checkpoints" / "step_00000006" / "optimizer.bin"
    os.truncate(newest, newest.stat().st_size // 2)
    resumed = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / "resumed")
    assert f"{newest.parent} is incomplete" in resumed.output
    assert "resumed from step_00000003: steps 3 to 8" in resumed.output
    assert (output_dir / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_gradient_accumulation_sees_the_same_images(oem_sar: Path, tmp_path: Path) -> None:
    """Two micro-batches of two end where a batch of four ends, where BatchNorm and Lovász do not see the batch."""
    settings = {"model_name_or_path": _save_plain_segformer(tmp_path), "lovasz_weight": 0, "eval_steps": 0}
    runs = {}
    for batch, accumulation in ((4, 1), (2, 2)):
        output_dir = tmp_path / f"accumulation_{accumulation}"
        argv = command_line(oem_sar, output_dir, **settings, per_device_train_batch_size=batch)
        argv += ["--gradient_accumulation_steps", str(accumulation)]
        result = run_recipe("stage2", *argv, log=tmp_path / f"log_{accumulation}", disturb="freeze_batch_norm")
        assert result.exit_codes == [0], result.output
        runs[accumulation] = read_log(output_dir)
    losses = {key: [line["loss"] for line in lines] for key, lines in runs.items()}
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


def _save_plain_segformer(folder: Path) -> Path:
    """Save the config of a toy SegFormer without dropout, for comparisons between different batch layouts."""
    SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=64,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    ).save_pretrained(folder / "plain")
    return folder / "plain"


def test_two_processes_give_the_result_of_one(oem_sar: Path, tmp_path: Path) -> None:
    settings = {"model_name_or_path": _save_plain_segformer(tmp_path), "lovasz_weight": 0, "eval_steps": 8}
    runs = {}
    for processes in (1, 2):
        output_dir = tmp_path / f"processes_{processes}"
        argv = command_line(oem_sar, output_dir, **settings, per_device_train_batch_size=4 // processes)
        result = run_recipe(
            "stage2", *argv, log=tmp_path / f"log_{processes}", processes=processes, disturb="freeze_batch_norm"
        )
        assert result.exit_codes == [0] * processes, result.output
        assert f"4 of 6 images a step on {processes} process(es)" in result.output
        runs[processes] = output_dir
    losses = {key: [line["loss"] for line in read_log(run) if "loss" in line] for key, run in runs.items()}
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    weights = {key: load_file(run / "model.safetensors") for key, run in runs.items()}
    for name, weight in weights[1].items():
        torch.testing.assert_close(weights[2][name], weight, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    counts = {key: json.loads((run / "eval_results.json").read_text()) for key, run in runs.items()}
    assert counts[1]["n_images"] == counts[2]["n_images"] == 3  # uneven: two tiles on one process, one on the other
    assert np.sum(counts[1]["confusion_matrix"]) == np.sum(counts[2]["confusion_matrix"])


@pytest.mark.parametrize("model", ["toy-convnextv2", "toy-swinv2"])
def test_upernet_trains_on_two_processes_with_its_auxiliary_head(model: str, oem_sar: Path, tmp_path: Path) -> None:
    settings = {"max_train_steps": 3, "eval_steps": 0, "logging_steps": 50}  # the last step is logged in any case
    argv = command_line(oem_sar, tmp_path / "run", model_name_or_path=model, **settings)
    result = run_recipe("stage2", *argv, log=tmp_path / "log", processes=2)
    assert result.exit_codes == [0, 0], result.output
    reloaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert type(reloaded).__name__ == "UperNetForSemanticSegmentation"
    assert [line["step"] for line in read_log(tmp_path / "run")] == [3]


def test_sigterm_to_one_of_two_processes_leaves_a_complete_checkpoint(oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, tmp_path / "run", checkpointing_steps=0, max_train_steps=400, eval_steps=0)
    disturb = {"disturb": "terminate_after_step:3", "disturbed": range(1, 2)}
    result = run_recipe("stage2", *argv, log=tmp_path / "log", processes=2, **disturb)
    assert result.exit_codes == [128 + signal.SIGTERM] * 2, result.output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["step"] == 3 and manifest["samples_seen"] == 12 and manifest["num_processes"] == 2


def test_settings_saved_with_a_run_repeat_it(finished_run: Path, tmp_path: Path) -> None:
    argv = ["--config", str(finished_run / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def write_pseudo_labels(oem_sar: Path, folder: Path, value: int) -> Path:
    """Write constant pseudo-labels for every training tile, in another order than the tiles'."""
    names = sorted((path.stem for path in (oem_sar / "train" / "labels").iterdir()), reverse=True)
    shapes = [Image.open(oem_sar / "train" / "labels" / f"{name}.tif").size[::-1] for name in names]
    labels = [Image.fromarray(np.full(shape, value, np.uint8)) for shape in shapes]
    features = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image_id": names, "pseudo_label": labels}, features=features)
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    return folder


def test_pseudo_labels_replace_the_official_ones(oem_sar: Path, tmp_path: Path) -> None:
    """Constant pseudo-labels teach a constant map; the official labels would not."""
    labels = write_pseudo_labels(oem_sar, tmp_path / "labels", 6)
    settings = {"pseudo_labels": labels, "max_class_share": 1, "learning_rate": 1e-2, "max_train_steps": 20}
    argv = command_line(oem_sar, tmp_path / "run", **settings)
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    counts = np.array(json.loads((tmp_path / "run" / "eval_results.json").read_text())["confusion_matrix"])
    assert counts[:, 6].sum() == counts.sum()


@pytest.mark.parametrize("workers", [0, 2])
def test_pseudo_label_that_is_no_class_is_named(workers: int, oem_sar: Path, tmp_path: Path) -> None:
    labels = write_pseudo_labels(oem_sar, tmp_path / "labels", 9)
    argv = command_line(oem_sar, tmp_path / "run", pseudo_labels=labels, dataloader_num_workers=workers)
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2]
    assert "error: TrainArea_00" in result.output and "label 9 is no class 0..8" in result.output
    assert "Traceback" not in result.output


BAD_SETTINGS = [
    ({"learning_rte": 1}, "unknown setting '--learning_rte'; did you mean '--learning_rate'?"),
    ({"seed": "x"}, "--seed: invalid int value: 'x'"),
    ({"crop_size": 100}, "crop_size must be a multiple of 32; it is 100"),
    ({"warmup_steps": 8}, "warmup_steps must be below max_train_steps, 8; it is 8"),
    ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
    ({"lovasz_weight": 0, "ce_weight": 0, "rce_weight": 0}, "ce_weight must be above 0 if no other is"),
    ({"mixed_precision": "fp8"}, "invalid choice: 'fp8'"),
    ({"output_dir": "/proc/nowhere"}, "No such file or directory"),
    ({"report_to": "wandb"}, "pip install 'hf_seg[wandb]'"),
    ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read as settings"),
    ({"data_dir": "nowhere"}, "nowhere does not exist"),
    ({"model_name_or_path": "nvidia/mit-b9"}, "'nvidia/mit-b9' was not found locally or on the Hub"),
    ({"from_scratch": "false"}, "toy-segformer is a size without pretrained weights"),
    ({"model_name_or_path": "toy-swinv2", "per_device_train_batch_size": 1}, "at least 2 for UperNet; it is 1"),
    ({"pseudo_labels": "nowhere"}, "nowhere: pseudo-labels cannot be loaded"),
    ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere is no complete checkpoint"),
    ({"learning_rate": 1e6, "head_lr_multiplier": 1e6, "warmup_steps": 0}, "at step"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_mistake_gives_one_line(settings: dict, message: str, oem_sar: Path, tmp_path: Path) -> None:
    output_dir = settings.get("output_dir", tmp_path / "run")
    argv = command_line(oem_sar, **{"output_dir": output_dir, **settings})
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2], result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.output
    assert "Traceback" not in result.output
    assert message == "at step" or not Path(output_dir).exists()  # a failed start leaves nothing behind


def test_divergence_names_the_images(oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, tmp_path / "run", learning_rate=1e6, head_lr_multiplier=1e6, warmup_steps=0)
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert "the loss is nan at step" in result.output or "the loss is inf at step" in result.output
    assert result.output.count("TrainArea_") == 2


@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_a_gradient_that_is_no_number_stops_the_run(max_grad_norm: int, oem_sar: Path, tmp_path: Path) -> None:
    settings = {"max_grad_norm": max_grad_norm, "checkpointing_steps": 1, "eval_steps": 0}
    argv = command_line(oem_sar, tmp_path / "run", **settings)
    result = run_recipe("stage2", *argv, log=tmp_path / "log", disturb="spoil_gradient:3")
    saved = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert result.exit_codes == [2], result.output
    assert f"error: the gradient's norm is nan at step 3; {saved} is from before; try a lower" in result.output
    weights = load_file(saved / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert not (saved.parent / "step_00000003").exists()


def test_a_second_run_does_not_overwrite_the_first(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    before = (finished_run / "model.safetensors").read_bytes()
    result = run_recipe("stage2", *command_line(oem_sar, finished_run), log=tmp_path / "log")
    assert result.exit_codes == [2] and "already contains a run" in result.output
    assert (finished_run / "model.safetensors").read_bytes() == before


def test_resume_under_other_settings_is_refused(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, finished_run, learning_rate=2e-3, resume_from_checkpoint="latest")
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2] and "learning_rate: 0.001 then, 0.002 now" in result.output


def test_validation_without_labels_says_where_they_come_from(oem_sar: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "sar_images").symlink_to(oem_sar / split / "sar_images")
    (tmp_path / "data" / "train" / "labels").symlink_to(oem_sar / "train" / "labels")
    result = run_recipe("stage2", *command_line(tmp_path / "data", tmp_path / "run"), log=tmp_path / "log")
    assert result.exit_codes == [2]
    assert "ValArea_001" in result.output and "--eval_steps 0" in result.output


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator has fp16")
def test_fp16_on_a_cpu_is_refused(oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, tmp_path / "run", mixed_precision="fp16")
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [2]
    assert "error: mixed_precision must be no or bf16 on a CPU; it is 'fp16'" in result.output


def test_tiles_in_memory_give_the_same_bits(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, tmp_path / "run", cache_gib=1, dataloader_num_workers=2)
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (finished_run / "model.safetensors").read_bytes()


def test_averaged_weights_are_exported_and_survive_a_kill(oem_sar: Path, tmp_path: Path) -> None:
    for name, how in (("unbroken", {}), ("killed", {"disturb": "kill_before_teacher:5"})):
        argv = command_line(oem_sar, tmp_path / name, ema_decay=0.6)
        result = run_recipe("stage2", *argv, log=tmp_path / f"{name}.log", **how)
        if how:
            assert result.exit_codes == [-signal.SIGKILL], result.output
            result = run_recipe("stage2", *argv, "--resume_from_checkpoint", "latest", log=tmp_path / f"{name}.log")
        assert result.exit_codes == [0], result.output
    for path in ("model.safetensors", "student/model.safetensors", "best/model.safetensors", "eval_results.json"):
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "unbroken" / path).read_bytes(), path
    average, student = (load_file(tmp_path / "killed" / name / "model.safetensors") for name in (".", "student"))
    assert not torch.equal(average["decode_head.classifier.weight"], student["decode_head.classifier.weight"])
    assert not (tmp_path / "killed" / "student" / "eval_results.json").exists()
    assert "moving average of the weights" in (tmp_path / "killed" / "README.md").read_text()


def test_pixels_are_weighted_by_their_confidence(oem_sar: Path, tmp_path: Path) -> None:
    """Without any confidence, both cross entropies are 0; Lovász-softmax has no weights."""
    labels = write_pseudo_labels(oem_sar, tmp_path / "labels", 6)
    settings = {"pseudo_labels": labels, "confidence_weights": "true", "max_train_steps": 3, "max_class_share": 1}
    result = run_recipe("stage2", *command_line(oem_sar, tmp_path / "run", **settings), log=tmp_path / "no")
    assert result.exit_codes == [2] and "the pseudo-labels have no confidence" in result.output
    rows = datasets.Dataset.from_parquet(str(labels / "train.parquet"))
    rows = rows.map(lambda row: {"confidence": Image.new("L", row["pseudo_label"].size)})
    rows.to_parquet(labels / "train.parquet")
    result = run_recipe("stage2", *command_line(oem_sar, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert all(line["ce"] == line["rce"] == 0 and line["lovasz"] > 0 for line in lines) and len(lines) == 3


def test_an_encoder_of_timm_trains_with_its_own_normalisation(oem_sar: Path, tmp_path: Path) -> None:
    settings = {"model_name_or_path": "toy-efficientnet-lite0", "max_train_steps": 3, "rare_class_temperature": 0.1}
    result = run_recipe("stage2", *command_line(oem_sar, tmp_path / "run", **settings), log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    processor = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == processor["image_std"] == [0.5] * 3
    assert "`tf_efficientnet_lite0` of timm" in (tmp_path / "run" / "README.md").read_text()


def test_bf16_trains_on_a_cpu(oem_sar: Path, tmp_path: Path) -> None:
    argv = command_line(oem_sar, tmp_path / "run", mixed_precision="bf16", max_train_steps=3, eval_steps=3)
    result = run_recipe("stage2", *argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.is_floating_point()} == {torch.float32}


def test_evaluation_on_two_processes_counts_every_tile_once(finished_run: Path, oem_sar: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node", "2"]
    command += [PROJECT / "scripts" / "evaluate_model.py", "--model", finished_run, "--data_dir", oem_sar]
    subprocess.run([*command, "--output", tmp_path / "scores.json"], check=True, timeout=120)
    scores = json.loads((tmp_path / "scores.json").read_text())
    alone = json.loads((finished_run / "eval_results.json").read_text())
    assert scores["confusion_matrix"] == alone["confusion_matrix"]
    assert sorted(scores["images"]) == ["ValArea_001", "ValArea_002", "ValArea_003"]
    assert list(scores["images"].values()) == sorted(scores["images"].values())
    with np.load(tmp_path / "scores.npz") as counts:
        assert counts["image_ids"].tolist() == sorted(scores["images"])
        assert counts["confusion_matrices"].sum(axis=0).tolist() == scores["confusion_matrix"]


@pytest.mark.parametrize("path", sorted(PROJECT.glob("recipes/accelerate_configs/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.use_cpu == (path.stem == "cpu")
    assert config.num_processes == {"several_gpus": 4, "several_nodes": 8}.get(path.stem, 1)


def test_accelerate_launch_trains_a_toy_on_real_scenes(realdata: Path, tmp_path: Path) -> None:
    """The README's command, shortened."""
    command = [Path(sys.executable).with_name("accelerate"), "launch", PROJECT / "recipes" / "stage2.py"]
    command += ["--config", PROJECT / "recipes" / "configs" / "toy" / "stage2_segformer.yaml"]
    command += ["--data_dir", realdata / "dfc25_track1", "--output_dir", tmp_path / "run"]
    command += ["--max_train_steps", "4", "--warmup_steps", "1", "--dataloader_num_workers", "2"]
    subprocess.run(command, check=True, timeout=240)
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results["n_images"] == 1 and np.sum(results["confusion_matrix"]) == 576 * 576
    assert any((tmp_path / "run" / "tracker").rglob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("config", ["segformer", "upernet_convnextv2", "upernet_swinv2"])
def test_toy_beats_the_majority_class_on_real_scenes(config: str, realdata: Path, tmp_path: Path) -> None:
    """One validation scene, mostly trees: a map of nothing but trees has an mIoU of 0.0626."""
    argv = ["--config", str(PROJECT / "recipes" / "configs" / "toy" / f"stage2_{config}.yaml")]
    argv += ["--data_dir", str(realdata / "dfc25_track1"), "--output_dir", str(tmp_path / "run")]
    result = run_recipe("stage2", *argv, log=tmp_path / "log", timeout=500)
    assert result.exit_codes == [0], result.output
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    counts = np.array(results["confusion_matrix"])
    majority = counts.sum(axis=1).max() / counts.sum() / results["n_classes_present"]
    assert results["mean_iou"] > majority
