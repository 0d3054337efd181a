"""Pseudo-labels as a dataset: what is in it, who made it, and that neither kills nor processes change a byte."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import typing
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import write_tiff
from huggingface_hub import DatasetCard
from PIL import Image
from recipe_process import Result, run_recipe

from hf_seg.arguments import PseudoLabelArguments
from hf_seg.data.nodata import outside_swath
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.pseudo_label_dataset import (
    CONFIDENCE_STEP,
    LabelledTile,
    load_pseudo_labels,
    summarize,
    write_shard,
)
from hf_seg.data.samples import LabelledImages
from hf_seg.hub.cards import write_pseudo_label_card
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.inference.tta import TTA_PRESETS
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.models import build_model
from hf_seg.settings import parse_arguments

CONFIGS = sorted((Path(__file__).parents[1] / "recipes" / "configs" / "pseudo_label").glob("*.yaml"))

SECOND = "train-00001-of-00003.parquet"


def launch(*argv: object, **how: Any) -> Result:
    """Run the recipe with a command line in processes of its own."""
    return run_recipe("pseudo_label", *map(str, argv), **how)


@pytest.fixture(scope="session")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stage-1 outputs: the teacher at the root, the student in its folder, four different networks."""
    folders = [tmp_path_factory.mktemp("stage1") / name for name in ("first", "second")]
    for seed, place in enumerate((folders[0], folders[0] / "student", folders[1], folders[1] / "student")):
        save_network(place, seed)
    return folders


def save_network(place: Path, seed: int) -> None:
    """Export a toy network with weights of this seed."""
    torch.manual_seed(seed)
    model = build_model("toy-segformer", crop_size=32, from_scratch=True)
    export_model(model, place, crop_size=32, recipe="seed: 0\n", results=None)


@pytest.fixture(scope="session")
def tiles(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training tiles of the tiny OpenEarthMap-SAR with gaps: no optical data, a swath's edge, dark pixels."""
    root = tmp_path_factory.mktemp("tiles") / "dfc25_track1"
    shutil.copytree(oem_sar, root)
    for name in ("TrainArea_001", "TrainArea_002"):
        for folder, fill in (("rgb_images", _cut_optical), ("sar_images", _cut_sar)):
            path = root / "train" / folder / f"{name}.tif"
            pixels = np.array(Image.open(path))
            fill(pixels)
            write_tiff(path, np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels)
    return root


def _cut_optical(pixels: np.ndarray) -> None:
    pixels[40:60, 30:70] = 0
    pixels[70, 70] = (0, 1, 0)  # almost black is data


def _cut_sar(pixels: np.ndarray) -> None:
    pixels[np.add.outer(np.arange(len(pixels)), np.arange(len(pixels))) < 30] = 0  # beyond the swath
    pixels[50:55, 50:55] = 0  # a shadow
    pixels[15, 15] = 0  # touches the corner of what lies beyond


def settings(tiles: Path, models: list[Path], output_dir: Path, *more: object) -> list[object]:
    """Return a command line: three shards, each window seen once."""
    common = ["--data_dir", tiles, "--output_dir", output_dir, "--tiles_per_shard", 2, "--stride", 1]
    return ["--model", *models, *common, "--batch_size", 16, *more]


@pytest.fixture(scope="module")
def finished(tiles: Path, stage1: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of one teacher, made by one process that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("finished") / "labels"
    result = launch(*settings(tiles, stage1[:1], output_dir), log=output_dir.parent / "log")
    assert result.exit_codes == [0], result.output
    assert "6 tiles in 3 shards, 0 of them complete and kept" in result.output
    return output_dir


def stock_rows(folder: Path) -> datasets.Dataset:
    """Load the dataset as a stranger would."""
    return datasets.load_dataset(str(folder), split="train")


def expected_probs(tiles: Path, place: Path, column: str = "optical", **settings: str) -> dict[str, np.ndarray]:
    """Predict every tile without the recipe; background gets 0."""
    networks = load_networks(place)
    predictor = Predictor(networks, device=torch.device("cpu"), stride=1, batch_size=16, **settings)
    probs = {}
    for row in load_open_earth_map_sar(tiles, "train"):
        probs[row["image_id"]] = predictor.predict(np.array(row[column])).probs().numpy()
        probs[row["image_id"]][BACKGROUND] = 0
    return probs


def check_tiles(folder: Path, probs: dict[str, np.ndarray], ignored: dict[str, np.ndarray]) -> None:
    """Compare a dataset with the probabilities that it should come from and the pixels without a label."""
    rows = stock_rows(folder)
    assert rows["image_id"][:] == list(probs)
    for row in rows:
        each = probs[row["image_id"]]
        label = np.where(ignored[row["image_id"]], IGNORE_INDEX, each.argmax(0))
        assert np.array_equal(np.array(row["pseudo_label"]), label), row["image_id"]
        steps = np.rint(each.max(0) * 255 / CONFIDENCE_STEP).astype(int)
        found = np.array(row["confidence"]).astype(int)
        assert (found % CONFIDENCE_STEP == 0).all()
        assert (abs(found // CONFIDENCE_STEP - steps) <= (abs(each.max(0) * 51 % 1 - 0.5) < 1e-4)).all()


def no_optical_data(tiles: Path) -> dict[str, np.ndarray]:
    """Find the pixels of each tile that are black in every band."""
    rows = load_open_earth_map_sar(tiles, "train")
    return {row["image_id"]: (np.array(row["optical"]) == 0).all(axis=-1) for row in rows}


def test_stock_datasets_reads_the_labels_of_the_teacher(finished: Path, tiles: Path, stage1: list[Path]) -> None:
    rows = stock_rows(finished)
    assert list(rows.features) == ["image_id", "pseudo_label", "confidence"]
    assert {row["pseudo_label"].mode for row in rows} == {row["confidence"].mode for row in rows} == {"L"}
    missing = no_optical_data(tiles)
    assert [int(mask.sum()) for mask in missing.values()] == [800, 800, 0, 0, 0, 0]
    check_tiles(finished, expected_probs(tiles, stage1[0]), missing)


def test_a_finished_folder_holds_nothing_else(finished: Path) -> None:
    shards = {f"data/train-0000{number}-of-00003.parquet" for number in range(3)}
    others = {
        "README.md",
        "training_data.json",
        "local_paths.yaml",
        "inputs.json",
        "manifest.json",
        "recipe.yaml",
        "figures/panel.png",
        "figures/confidence.png",
    }
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert files == shards | others


def result_of(folder: Path) -> dict[str, bytes]:
    """Return every file's bytes but those that name the folder itself, which is another one in each run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if name not in ("recipe.yaml", "manifest.json")}
    manifest = json.loads(files["manifest.json"].read_text())
    manifest["files"].pop("recipe.yaml")
    return {**found, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("disturb", "kept"),
    [
        (f"kill_before_rename:{SECOND}", 1),
        (f"kill_after_cutting:{SECOND}", 1),
        ("kill_after_cutting:manifest.json", 3),
    ],
)
def test_killed_and_launched_again_gives_the_same_bytes(
    disturb: str, kept: int, finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    argv = settings(tiles, stage1[:1], tmp_path / "labels")
    killed = launch(*argv, log=tmp_path / "killed", disturb=disturb)
    assert killed.exit_codes == [-signal.SIGKILL], killed.output
    assert not (tmp_path / "labels" / "manifest.json").exists()
    resumed = launch(*argv, log=tmp_path / "resumed")
    assert resumed.exit_codes == [0], resumed.output
    assert f"{kept} of them complete and kept" in resumed.output
    assert result_of(tmp_path / "labels") == result_of(finished)


def test_two_processes_give_the_bytes_of_one_and_mend_a_damaged_shard(
    finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    argv = settings(tiles, stage1[:1], tmp_path / "labels")
    result = launch(*argv, log=tmp_path / "log", processes=2)
    assert result.exit_codes == [0, 0], result.output
    assert "2 process(es)" in result.output
    assert result_of(tmp_path / "labels") == result_of(finished)
    shard = tmp_path / "labels" / "data" / SECOND
    os.truncate(shard, shard.stat().st_size - 1)
    again = launch(*argv, log=tmp_path / "again", processes=2)
    assert again.exit_codes == [0, 0] and "2 of them complete and kept" in again.output
    assert result_of(tmp_path / "labels") == result_of(finished)


def test_a_shard_with_a_flipped_bit_is_labelled_anew(
    finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    argv = settings(tiles, stage1[:1], copy_of(finished, tmp_path / "labels"))
    shard = tmp_path / "labels" / "data" / SECOND
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    again = launch(*argv, log=tmp_path / "again")
    assert again.exit_codes == [0] and "2 of them complete and kept" in again.output, again.output
    assert result_of(tmp_path / "labels") == result_of(finished)


def test_several_networks_are_averaged_and_agreement_ignores_where_they_disagree(
    tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    """And all else that leaves a pixel without a label, each counted for its first reason."""
    first, second = (expected_probs(tiles, folder / "student", tta="flips") for folder in stage1)
    probs = {name: (first[name] + second[name]) / 2 for name in first}
    optical = no_optical_data(tiles)
    swath = {row["image_id"]: outside_swath(np.array(row["sar"])) for row in load_open_earth_map_sar(tiles, "train")}
    disagree = {name: first[name].argmax(0) != second[name].argmax(0) for name in first}
    low = {name: probs[name].max(0) < 0.25 for name in first}

    more = ["--combine", "agreement", "--network", "student", "--tta", "flips", "--mask_nodata"]
    argv = settings(tiles, stage1, tmp_path / "labels", *more, "--min_confidence", 0.25)
    result = launch(*argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    masks = (optical, swath, disagree, low)
    check_tiles(tmp_path / "labels", probs, {name: np.any([mask[name] for mask in masks], axis=0) for name in probs})

    counts, left = [], {name: np.ones_like(mask) for name, mask in optical.items()}
    for mask in masks:
        counts.append(sum(int((mask[name] & left[name]).sum()) for name in left))
        left = {name: left[name] & ~mask[name] for name in left}
    manifest = json.loads((tmp_path / "labels" / "manifest.json").read_text())
    assert list(manifest["ignored"].values()) == counts
    assert all(counts)

    predicted = sum(
        np.bincount(probs[name].argmax(0)[~optical[name]], minlength=OPEN_EARTH_MAP.num_labels) for name in probs
    )
    kept = sum(np.bincount(probs[name].argmax(0)[left[name]], minlength=OPEN_EARTH_MAP.num_labels) for name in probs)
    assert manifest["class_histogram"] == dict(zip(OPEN_EARTH_MAP.names[1:], kept[1:].tolist(), strict=True))
    shares = {name: k / p if p else None for name, k, p in zip(OPEN_EARTH_MAP.names, kept, predicted, strict=True)}
    assert manifest["kept_share"] == {name: shares[name] for name in OPEN_EARTH_MAP.names[1:]}


def test_a_second_round_labels_the_sar_images(tiles: Path, stage1: list[Path], tmp_path: Path) -> None:
    argv = settings(tiles, stage1[:1], tmp_path / "labels", "--column", "sar")
    result = launch(*argv, log=tmp_path / "log")
    assert result.exit_codes == [0], result.output
    rows = load_open_earth_map_sar(tiles, "train")
    outside = {row["image_id"]: outside_swath(np.array(row["sar"])) for row in rows}
    assert sum(mask.sum() for mask in outside.values()) > 0
    check_tiles(tmp_path / "labels", expected_probs(tiles, stage1[0], column="sar"), outside)
    manifest = json.loads((tmp_path / "labels" / "manifest.json").read_text())
    assert manifest["ignored"]["no SAR data"] == sum(mask.sum() for mask in outside.values())
    assert "6 SAR tiles" in (tmp_path / "labels" / "README.md").read_text()


def test_manifest_says_what_every_file_is(finished: Path, stage1: list[Path]) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    files = {path.relative_to(finished).as_posix(): path for path in finished.rglob("*") if path.is_file()}
    del files["manifest.json"], files["local_paths.yaml"]
    assert manifest["files"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    labels = np.concatenate([np.array(row["pseudo_label"]).ravel() for row in stock_rows(finished)])
    histogram = {name: int((labels == index).sum()) for index, name in enumerate(OPEN_EARTH_MAP.names)}
    assert histogram.pop("background") == 0
    assert manifest["class_histogram"] == histogram
    assert manifest["ignored"]["no optical data"] == (labels == IGNORE_INDEX).sum() == 1600
    assert manifest["n_tiles"] == 6
    (model,) = manifest["models"]
    assert (model["name"], model["revision"]) == (stage1[0].name, None)
    assert re.fullmatch("[0-9a-f]{64}", model["sha256"])
    assert manifest["settings"]["network"] == "teacher" and "output_dir" not in manifest["settings"]


def test_card_is_one_and_says_what_was_measured(finished: Path) -> None:
    card = DatasetCard.load(finished / "README.md")
    (config,) = card.data.configs
    assert config["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    manifest = json.loads((finished / "manifest.json").read_text())
    water, n_labelled = manifest["class_histogram"]["water"], sum(manifest["class_histogram"].values())
    assert f"| 6 | water | {100 * water / n_labelled:.2f} | {'100.00' if water else '-'} |" in card.text
    assert "| no optical data | 2.45 |" in card.text  # 1600 of 3 x 112 x 112 + 3 x 96 x 96 pixels
    assert manifest["models"][0]["sha256"][:16] in card.text
    assert "{{" not in card.text and "{%" not in card.text
    for figure in re.findall(r"\]\((figures/.*?)\)", card.text):
        assert (finished / figure).exists()


def test_new_labels_in_an_old_place_are_read_anew(finished: Path, tmp_path: Path) -> None:
    """What `datasets` keeps in its cache goes by the card's header, not by the files."""
    labels = copy_of(finished, tmp_path / "labels")
    before = stock_rows(labels)
    tiles = []
    for row in before.select([2, 3]):
        water = np.full(
            (row["pseudo_label"].height, row["pseudo_label"].width), OPEN_EARTH_MAP.label2id["water"], np.uint8
        )
        counts = np.bincount(water.ravel(), minlength=OPEN_EARTH_MAP.num_labels)
        ignored = dict.fromkeys(json.loads((finished / "manifest.json").read_text())["ignored"], 0)
        tiles.append(LabelledTile(row["image_id"], water, np.ones(water.shape, np.float32), counts, counts, ignored))
    write_shard(labels / "data" / SECOND, tiles)
    summary = json.loads((labels / "manifest.json").read_text()) | summarize(sorted(labels.glob("data/*")))
    write_pseudo_label_card(labels, summary)
    after = stock_rows(labels)
    assert (np.array(after[2]["pseudo_label"]) == OPEN_EARTH_MAP.label2id["water"]).all()
    assert np.array_equal(np.array(after[0]["pseudo_label"]), np.array(before[0]["pseudo_label"]))


def test_figures_are_of_the_tiles_and_whole(finished: Path) -> None:
    for name in ("panel.png", "confidence.png"):
        with Image.open(finished / "figures" / name) as figure:
            figure.load()
            assert figure.width == 1500 and figure.height > 2000  # four rows


def test_labels_are_joined_by_image_id_in_whatever_order(finished: Path, tiles: Path) -> None:
    labels = {row["image_id"]: np.array(row["pseudo_label"]) for row in stock_rows(finished)}
    shuffled = load_pseudo_labels(str(finished)).select([3, 0, 5, 1, 4, 2])
    samples = LabelledImages(load_open_earth_map_sar(tiles, "train"), "sar", pseudo_labels=shuffled)
    assert len(samples) == 6
    for sample in samples:
        assert np.array_equal(sample.label, labels[sample.image_id])


def copy_of(finished: Path, folder: Path) -> Path:
    """Copy a finished dataset, to be launched on again."""
    shutil.copytree(finished, folder)
    return folder


def test_a_complete_dataset_stays_complete_while_it_is_described_again(
    finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "labels")
    argv = settings(tiles, stage1[:1], tmp_path / "labels")
    killed = launch(*argv, log=tmp_path / "log", disturb="kill_before_rename:manifest.json")
    assert killed.exit_codes == [-signal.SIGKILL]
    rows = load_pseudo_labels(str(tmp_path / "labels"))
    assert rows["image_id"] == stock_rows(finished)["image_id"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tta", "d4", "--min_confidence", "0.5"], "tta: 'none' then, 'd4' now; min_confidence: 0.0 then, 0.5 now"),
        (["--tiles_per_shard", "3"], "tiles_per_shard: 2 then, 3 now"),
        (["--network", "student"], "began with other networks, "),
    ],
)
def test_launching_again_with_other_settings_is_refused(
    more: list[str], message: str, finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    before = (finished / "manifest.json").read_bytes()
    result = launch(*settings(tiles, stage1[:1], finished, *more), log=tmp_path / "log")
    check_mistake(result, message)
    assert (finished / "manifest.json").read_bytes() == before


def check_mistake(result: Result, message: str) -> None:
    """The user sees one line, and no traceback."""
    assert result.exit_codes == [2], result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.output
    assert "Traceback" not in result.output


def test_a_network_that_moved_is_the_same_and_one_that_learned_is_not(
    finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    labels = copy_of(finished, tmp_path / "labels")
    shutil.copytree(stage1[0], tmp_path / "moved")
    argv = settings(tiles, [tmp_path / "moved"], labels, "--batch_size", 8)
    result = launch(*argv, log=tmp_path / "same")
    assert result.exit_codes == [0] and "3 of them complete and kept" in result.output
    save_network(tmp_path / "moved", seed=7)
    check_mistake(launch(*argv, log=tmp_path / "trained"), "began with other networks, ")
    check_mistake(launch(*settings(tiles, stage1, labels), log=tmp_path / "two"), "moved (sha256 ")


def test_other_tiles_and_foreign_folders_are_refused(
    finished: Path, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(tiles, tmp_path / "fewer")
    for folder in ("rgb_images", "sar_images", "labels"):
        (tmp_path / "fewer" / "train" / folder / "TrainArea_006.tif").unlink()
    result = launch(*settings(tmp_path / "fewer", stage1[:1], finished), log=tmp_path / "tiles")
    check_mistake(result, "began with other tiles (6 then, 5 now)")
    result = launch(*settings(tiles, stage1[:1], stage1[0]), log=tmp_path / "foreign")
    check_mistake(result, "already contains other files, e.g. config.json; choose another --output_dir")


BAD_SETTINGS = [
    (["--model", "nowhere"], "nowhere was not found locally or on the Hub"),
    (["--model", "{tmp}/other"], "is no segmentation model of this project: its class 0 must be 'background'"),
    (["--model", "{tmp}/alone", "--network", "student"], "alone has no folder student with a model"),
    (["--model", "{tmp}/empty"], "is neither a model nor an ensemble"),
    (["--split", "val"], "3 of 3 tiles have no optical image, first ValArea_001"),
    (["--split", "test"], "split 'test' has no usable tile"),
    (["--tta", "all"], "--tta: invalid choice: 'all' (choose from 'none', 'flips', 'd4', 'paper')"),
    (["--combine", "agreement"], "combine must be average for a single network; it is 'agreement'"),
    (["--stride", "1.5"], "stride must be more than 0 and at most 1; it is 1.5"),
    (["--tiles_per_shard", "0"], "tiles_per_shard must be at least 1; it is 0"),
    (["--push_to_hub"], "hub_model_id must be user/name to push to; it is None"),
]


@pytest.mark.parametrize(("more", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_mistake_gives_one_line_and_writes_nothing(
    more: list[str], message: str, tiles: Path, stage1: list[Path], tmp_path: Path
) -> None:
    save_network(tmp_path / "alone", seed=0)
    shutil.copytree(tmp_path / "alone", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["id2label"]["0"] = "sky"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    more = [word.format(tmp=tmp_path) for word in more]
    result = launch(*settings(tiles, stage1[:1], tmp_path / "labels", *more), log=tmp_path / "log")
    check_mistake(result, message)
    assert not (tmp_path / "labels").exists()


def test_a_network_of_the_hub_is_known_by_its_commit(stage1: list[Path]) -> None:
    """From the cache of downloads, since there is no network."""
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--me--stage1"
    first, second = "1" * 40, "2" * 40
    for commit, place in zip((first, second), stage1, strict=True):
        shutil.copytree(place, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(second)
    digests = set()
    for name, commit, place in (("me/stage1", second, stage1[1]), (f"me/stage1@{first}", first, stage1[0])):
        for subfolder in ("", "student"):
            (found,), (local,) = (load_networks(each, subfolder=subfolder) for each in (name, place))
            assert (found.name, found.revision, found.sha256) == ("me/stage1", commit, local.sha256)
            digests.add(found.sha256)
    assert len(digests) == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_say_all_that_makes_the_labels(path: Path) -> None:
    args = parse_arguments(PseudoLabelArguments, ["--config", str(path), "--model", "first", "second"])
    said = {line.partition(":")[0] for line in path.read_text().splitlines() if not line.startswith("#")}
    assert said >= {field.name for field in dataclasses.fields(args) if not field.metadata["free"]}


def test_every_preset_of_tta_can_be_asked_for() -> None:
    assert typing.get_args(typing.get_type_hints(PseudoLabelArguments)["tta"]) == TTA_PRESETS
