"""The stages one after another on real tiles, as the README says."""

import json
from pathlib import Path

import datasets
import numpy as np
from recipe_process import run_recipe

TOY = {
    "model_name_or_path": "toy-segformer",
    "from_scratch": "true",
    "crop_size": "128",
    "max_train_steps": "3",
    "per_device_train_batch_size": "2",
    "warmup_steps": "1",
    "report_to": "none",
    "mixed_precision": "no",
    "dataloader_num_workers": "0",
}


def command_line(**settings: object) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def run(recipe: str, log: Path, **settings: object) -> None:
    result = run_recipe(recipe, *command_line(**settings), log=log)
    assert result.exit_codes == [0], result.output


def test_real_tiles_go_from_labelled_optical_images_to_a_sar_network(realdata: Path, tmp_path: Path) -> None:
    source, target = realdata / "OpenEarthMap_wo_xBD", realdata / "dfc25_track1"
    stage1, labels, stage2 = (tmp_path / name for name in ("stage1", "labels", "stage2"))
    places = {"source_dir": source, "data_dir": target, "output_dir": stage1}
    run("stage1", tmp_path / "log1", **TOY, **places, eval_steps=3, panel_steps=3)
    scores = json.loads((stage1 / "eval_results.json").read_text())
    assert scores["n_images"] >= 1 and scores["target"] is None  # val has SAR alone
    assert (stage1 / "figures" / "mixes" / "step_00000003.png").exists()

    run("pseudo_label", tmp_path / "log2", model=stage1, data_dir=target, output_dir=labels, tta="flips", stride=1.0)
    rows = datasets.load_dataset(str(labels), split="train")
    assert sorted(rows["image_id"]) == sorted(path.stem for path in (target / "train" / "rgb_images").iterdir())
    assert all(np.array(row["pseudo_label"]).min() > 0 for row in rows)

    places = {"data_dir": target, "output_dir": stage2, "pseudo_labels": labels}
    run("stage2", tmp_path / "log3", **TOY, **places, eval_steps=3)
    assert json.loads((stage2 / "eval_results.json").read_text())["n_images"] == 1
