"""A trained model as a folder: stock transformers opens it, and it is replaced atomically."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel, pipeline

from hf_seg.arguments import Stage2Arguments, dump_recipe
from hf_seg.errors import FileError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.normalization import to_pixel_values
from hf_seg.settings import parse_arguments

TOYS = ("toy-segformer", "toy-convnextv2", "toy-swinv2")
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "eval_results.json"}
ARGS = Stage2Arguments(model_name_or_path="toy-segformer", from_scratch=True, crop_size=64, learning_rate=6e-5)
RESULTS = {"mean_iou": 0.25, "iou": {"water": 0.5, "road": None}, "n_images": 3}


def build_toy(name: str = "toy-segformer", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build_model(name, crop_size=64, from_scratch=True).eval()
    head: Any = model
    torch.nn.init.normal_(head.decode_head.classifier.weight)  # so that several classes win
    return model


def export(model: PreTrainedModel, folder: Path, results: dict[str, Any] | None = RESULTS) -> None:
    export_model(model, folder, crop_size=64, recipe=dump_recipe(ARGS), results=results)


def load(folder: Path) -> PreTrainedModel:
    (loaded,) = load_networks(folder)
    network: Any = loaded.network()
    return network.model


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_stock_pipeline_predicts_the_same(name: str, mode: str, tmp_path: Path) -> None:
    model = build_toy(name)
    export(model, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64) if mode == "L" else (64, 64, 3), np.uint8)
    found = pipeline("image-segmentation", model=str(tmp_path))(Image.fromarray(pixels), subtask="semantic")
    theirs = np.zeros((64, 64), int)
    for segment in found:
        theirs[np.asarray(segment["mask"]) > 0] = OPEN_EARTH_MAP.label2id[segment["label"]]
    with torch.no_grad():
        ours = SegmentationNetwork(model)(to_pixel_values(pixels)[None]).logits.argmax(1)[0].numpy()
    np.testing.assert_array_equal(theirs, ours)
    assert len(np.unique(ours)) > 1


def test_the_folder_contains_the_files_of_a_model_and_no_others(tmp_path: Path) -> None:
    export(build_toy(), tmp_path / "runs/new")
    assert names(tmp_path / "runs/new") == FILES
    assert json.loads((tmp_path / "runs/new/eval_results.json").read_text()) == RESULTS


def test_the_recipe_in_the_folder_repeats_the_run(tmp_path: Path) -> None:
    export(build_toy(), tmp_path)
    again = parse_arguments(Stage2Arguments, ["--config", str(tmp_path / "recipe.yaml")])
    again.config = None
    assert again == ARGS


def test_the_processor_records_the_crop_and_never_resizes(tmp_path: Path) -> None:
    export(build_toy(), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["height"], processor.size["width"]) == (64, 64)
    values = processor(np.zeros((50, 70, 3), np.uint8), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 50, 70)


def test_the_config_on_disk_names_the_stock_class_and_the_classes(tmp_path: Path) -> None:
    export(build_toy(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["SegformerForSemanticSegmentation"]
    assert config["id2label"] == {str(index): OPEN_EARTH_MAP.names[index] for index in range(OPEN_EARTH_MAP.num_labels)}
    assert "auto_map" not in config


def test_a_new_export_replaces_the_old_one(tmp_path: Path) -> None:
    export(build_toy(seed=1), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    model = build_toy(seed=2)
    export(model, tmp_path, {**RESULTS, "mean_iou": 0.5})
    loaded = load(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    assert json.loads((tmp_path / "eval_results.json").read_text())["mean_iou"] == 0.5
    assert names(tmp_path) == FILES | {"checkpoints", "metrics.jsonl"}


def test_files_of_an_interrupted_export_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/model.safetensors").write_bytes(b"half")
    (tmp_path / ".partial/leftover.txt").write_text("of another version")
    export(build_toy(), tmp_path)
    assert names(tmp_path) == FILES


def test_an_export_without_results_removes_those_of_an_older_model(tmp_path: Path) -> None:
    export(build_toy(seed=1), tmp_path)
    export(build_toy(seed=2), tmp_path, results=None)
    assert names(tmp_path) == FILES - {"eval_results.json"}


def test_an_export_that_fails_leaves_the_older_model(tmp_path: Path) -> None:
    model = build_toy(seed=1)
    export(model, tmp_path)
    with pytest.raises(TypeError):
        export(build_toy(seed=2), tmp_path, {"mean_iou": object()})  # cannot be written
    loaded = load(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_an_export_that_is_killed_while_files_are_replaced_is_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(build_toy(seed=1), tmp_path)
    replace = os.replace

    def die(source: Path, destination: Path) -> None:
        if destination.name == "model.safetensors":
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        export(build_toy(seed=2), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file cannot be written \("):
        export(build_toy(), tmp_path / "file")


def test_a_fine_tuned_model_does_not_name_the_local_folder_that_it_began_with(tmp_path: Path) -> None:
    export(build_toy(), tmp_path / "began_here")
    model = load(tmp_path / "began_here")
    export(model, tmp_path / "tuned")
    for path in (tmp_path / "tuned").iterdir():
        assert b"began_here" not in path.read_bytes(), path
