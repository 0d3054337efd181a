"""Small finished output folders of every kind, as the recipes write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.arguments import (
    EnsembleArguments,
    PseudoLabelArguments,
    Stage1Arguments,
    Stage2Arguments,
    dump_recipe,
    portable_settings,
    write_recipe,
)
from hf_seg.data.pseudo_label_dataset import LabelledTile, plan_shards, summarize, write_manifest, write_shard
from hf_seg.hub.cards import write_model_card, write_pseudo_label_card
from hf_seg.hub.export import export_model, write_training_data
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import build_model

CROP = 64
SYNTHETIC = {
    domain: {
        "name": f"synthetic dataset, {kind} tiles",
        "layout": layout,
        "description": f"The {kind} tiles were generated.",
        "license": "Apache-2.0",
        "synthetic": True,
        "released": False,
        "labels": {"train": "simulated noisy labels", "val": "exact"},
    }
    for domain, layout, kind in (("source", "OpenEarthMap", "optical"), ("target", "OpenEarthMap-SAR", "SAR"))
}
RELEASED = {
    domain: {**found, "name": found["layout"], "description": None, "license": None, "synthetic": False}
    | {"released": True, "labels": None}
    for domain, found in SYNTHETIC.items()
}


def make_results(seed: int, n_images: int = 3) -> dict[str, Any]:
    """Score a random prediction; no building is in the reference labels."""
    rng = np.random.default_rng(seed)
    counts = ConfusionMatrix()
    counts.update(
        rng.integers(1, OPEN_EARTH_MAP.num_labels, (64, 64)), rng.integers(1, OPEN_EARTH_MAP.num_labels - 1, (64, 64))
    )
    return {**counts.compute(), "n_images": n_images}


def build_toy(name: str, seed: int) -> PreTrainedModel:
    """Build a toy network whose random head lets several classes win."""
    torch.manual_seed(seed)
    model: Any = build_model(name, crop_size=CROP, from_scratch=True).eval()
    torch.nn.init.normal_(model.decode_head.classifier.weight)
    return model


def make_folder(folder: Path) -> Path:
    """Create a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_figures(folder: Path, *names: str) -> None:
    """Write a small picture under each name."""
    for name in names:
        (folder / "figures" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "figures" / name)


def make_stage2(folder: Path, name: str = "toy-segformer", seed: int = 0, scored: bool = True) -> Path:
    """Write an output folder of stage 2, with files that must not be sent."""
    args = Stage2Arguments(model_name_or_path=name, from_scratch=True, crop_size=CROP, data_dir="/home/me/tiles")
    args.pseudo_labels = str(make_folder(folder.parent / "pseudo_labels"))
    results = {**make_results(seed), "step": 500} if scored else None
    export_model(build_toy(name, seed), folder, crop_size=CROP, recipe=dump_recipe(args), results=results)
    write_recipe(args, folder)
    write_figures(folder, "curves.png", "confusion_matrix.png", "panel.png")
    for path in ("checkpoints/step_00000500/model.safetensors", "tracker/events", "best/config.json", ".partial/half"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("stays here")
    (folder / "metrics.jsonl").write_text('{"step": 500, "loss": 1.0}\n')
    write_model_card(folder)
    return folder


def make_stage1(folder: Path) -> Path:
    """Write an output folder of stage 1: teacher and student."""
    args = Stage1Arguments(model_name_or_path="toy-segformer", from_scratch=True, crop_size=CROP)
    args.source_dir = args.data_dir = str(folder.parent)
    write_recipe(args, make_folder(folder))
    for seed, place in enumerate((folder, folder / "student"), start=5):
        results = {**make_results(seed), "target": make_results(seed + 10, n_images=4), "step": 90}
        model = build_toy("toy-segformer", seed)
        export_model(model, place, crop_size=CROP, recipe=dump_recipe(args), results=results)
    write_figures(folder, "curves.png", "source/panel.png", "target/panel.png", "mixes/step_00000010.png")
    write_model_card(folder)
    return folder


def make_ensemble(folder: Path, members: list[Path]) -> Path:
    """Write an output folder of the ensemble's recipe."""
    EnsembleForSemanticSegmentation.from_members(members, weights=range(1, 1 + len(members))).save_pretrained(folder)
    write_recipe(EnsembleArguments(model=[str(member) for member in members]), folder)
    results: dict[str, Any] = make_results(20)
    results["members"] = [
        {"origin": str(member), "revision": None, **make_results(21 + index)} for index, member in enumerate(members)
    ]
    (folder / "eval_results.json").write_text(json.dumps(results))
    write_figures(folder, "members.png", "panel.png")
    write_model_card(folder)
    return folder


def make_pseudo_labels(folder: Path, n_tiles: int = 3, training_data: dict[str, Any] | None = None) -> Path:
    """Write an output folder of the pseudo-label recipe: a tile a shard."""
    rng = np.random.default_rng(0)
    stage1 = make_folder(folder.parent / "stage1")
    args = PseudoLabelArguments(tiles_per_shard=1, model=[str(stage1)])
    shards = plan_shards(folder / "data", "train", n_tiles, 1)
    for number, path in enumerate(shards):
        label = rng.integers(1, OPEN_EARTH_MAP.num_labels, (32, 32)).astype(np.uint8)
        counts = np.bincount(label.ravel(), minlength=OPEN_EARTH_MAP.num_labels)
        tile = LabelledTile(
            f"TrainArea_{number:03d}", label, np.ones(label.shape, np.float32), counts, counts, {"no": 0}
        )
        write_shard(path, [tile])
    write_recipe(args, folder)
    models = [{"name": str(stage1), "revision": None, "sha256": "0" * 64}]
    (folder / "inputs.json").write_text(json.dumps({"models": models}))
    if training_data is not None:
        write_training_data(folder, training_data)
    write_figures(folder, "panel.png", "confidence.png")
    settings = portable_settings(args)
    summary = {"models": models, "settings": settings, "n_tiles": n_tiles, **summarize([*shards])}
    assert {*summary["class_histogram"]} == {*OPEN_EARTH_MAP.names[1:]}
    write_pseudo_label_card(folder, summary)
    write_manifest(folder, summary)
    return folder
