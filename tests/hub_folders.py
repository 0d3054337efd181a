"""Small finished output folders of every kind, as the recipes leave them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.arguments import EnsembleArguments, PseudoLabelArguments, Stage1Arguments, Stage2Arguments, dump_recipe
from hf_seg.data.pseudo_label_dataset import LabelledTile, plan_shards, summarize, write_manifest, write_shard
from hf_seg.hub.cards import TEMPLATES, write_model_card, write_pseudo_label_card
from hf_seg.hub.export import export_model
from hf_seg.labels import CLASS_NAMES, NUM_LABELS
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import build_model

CROP = 64


def make_results(seed: int, n_images: int = 3) -> dict[str, Any]:
    """Score a random prediction; no building is in the truth."""
    rng = np.random.default_rng(seed)
    counts = ConfusionMatrix()
    counts.update(rng.integers(1, NUM_LABELS, (64, 64)), rng.integers(1, NUM_LABELS - 1, (64, 64)))
    return {**counts.compute(), "n_images": n_images}


def build_toy(name: str, seed: int) -> PreTrainedModel:
    """Build a toy network whose random head lets several classes win."""
    torch.manual_seed(seed)
    model: Any = build_model(name, crop_size=CROP, from_scratch=True).eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return model


def write_figures(folder: Path, *names: str) -> None:
    """Write a small picture under each name."""
    for name in names:
        (folder / "figures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "figures" / name)


def make_stage2(folder: Path, name: str = "toy-segformer", seed: int = 0, scored: bool = True) -> Path:
    """Write what stage 2 leaves, with what must not leave this machine."""
    args = Stage2Arguments(model_name_or_path=name, from_scratch=True, crop_size=CROP, data_dir="/home/me/tiles")
    results = {**make_results(seed), "step": 500} if scored else None
    export_model(build_toy(name, seed), folder, crop_size=CROP, recipe=dump_recipe(args), results=results)
    write_figures(folder, "curves.png", "confusion_matrix.png", "panel.png")
    for path in ("checkpoints/step_00000500/model.safetensors", "tracker/events", "best/config.json", ".partial/half"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("stays here")
    (folder / "metrics.jsonl").write_text('{"step": 500, "loss": 1.0}\n')
    write_model_card(folder)
    return folder


def make_stage1(folder: Path) -> Path:
    """Write what stage 1 leaves: teacher and student."""
    args = Stage1Arguments(model_name_or_path="toy-segformer", from_scratch=True, crop_size=CROP)
    for seed, place in enumerate((folder, folder / "student"), start=5):
        results = {**make_results(seed), "target": make_results(seed + 10, n_images=4), "step": 90}
        model = build_toy("toy-segformer", seed)
        export_model(model, place, crop_size=CROP, recipe=dump_recipe(args), results=results)
    write_figures(folder, "curves.png", "source/panel.png", "target/panel.png", "mixes/step_00000010.png")
    write_model_card(folder)
    return folder


def make_ensemble(folder: Path, members: list[Path]) -> Path:
    """Write what the ensemble's recipe leaves."""
    EnsembleForSemanticSegmentation.from_members(members, weights=range(1, 1 + len(members))).save_pretrained(folder)
    args = EnsembleArguments(members=[str(member) for member in members])
    (folder / "recipe.yaml").write_text(dump_recipe(args))
    results = {**make_results(20), "members": [make_results(21 + index) for index in range(len(members))]}
    (folder / "eval_results.json").write_text(json.dumps(results))
    write_figures(folder, "members.png", "panel.png")
    write_model_card(folder)
    return folder


def make_pseudo_labels(folder: Path, n_tiles: int = 3) -> Path:
    """Write what the pseudo-label recipe leaves: a tile a shard."""
    rng = np.random.default_rng(0)
    args = PseudoLabelArguments(tiles_per_shard=1)
    shards = plan_shards(folder / "data", "train", n_tiles, 1)
    for number, path in enumerate(shards):
        label = rng.integers(1, NUM_LABELS, (32, 32)).astype(np.uint8)
        counts = np.bincount(label.ravel(), minlength=NUM_LABELS)
        tile = LabelledTile(
            f"TrainArea_{number:03d}", label, np.ones(label.shape, np.float32), counts, counts, {"no": 0}
        )
        write_shard(path, [tile])
    (folder / "recipe.yaml").write_text(dump_recipe(args))
    (folder / "inputs.json").write_text("{}")
    write_figures(folder, "panel.png", "confidence.png")
    models = [{"name": "runs/stage1", "revision": None, "sha256": "0" * 64}]
    summary = {"models": models, "settings": {"split": "train"}, "n_tiles": n_tiles, **summarize([*shards])}
    assert {*summary["class_histogram"]} == {*CLASS_NAMES[1:]}
    write_pseudo_label_card(TEMPLATES / "pseudo_labels.md", folder / "README.md", summary)
    write_manifest(folder, summary)
    return folder
