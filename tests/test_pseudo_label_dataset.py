"""The dataset of pseudo-labels: small shards, complete or absent, the same bytes for the same tiles."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hf_seg.data.pseudo_label_dataset import (
    LabelledTile,
    check_inputs,
    damaged_files,
    is_complete,
    load_pseudo_labels,
    plan_shards,
    read_maps,
    summarize,
    write_manifest,
    write_shard,
)
from hf_seg.errors import FileError, UserError
from hf_seg.files import sha256_of
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP


def make_tile(image_id: str, label: np.ndarray, confidence: np.ndarray, ignored: int = 0) -> LabelledTile:
    """Make a tile whose predictions equal its label, but for two more pixels of class 1."""
    kept = np.bincount(label[label != IGNORE_INDEX], minlength=OPEN_EARTH_MAP.num_labels)
    predicted = kept + 2 * (np.arange(OPEN_EARTH_MAP.num_labels) == 1)
    return LabelledTile(image_id, label, confidence, predicted, kept, {"some reason": ignored})


def random_tile(seed: int) -> LabelledTile:
    """Make a tile of random classes 1..8."""
    rng = np.random.default_rng(seed)
    label = rng.integers(1, OPEN_EARTH_MAP.num_labels, (20, 30), dtype=np.uint8)
    return make_tile(f"TrainArea_{seed:03d}", label, rng.random((20, 30), dtype=np.float32), ignored=seed)


@pytest.mark.parametrize(("n_tiles", "tiles_per_shard", "expected"), [(5, 2, 3), (4, 2, 2), (1, 16, 1), (3, 1, 3)])
def test_every_tile_is_in_one_shard(n_tiles: int, tiles_per_shard: int, expected: int) -> None:
    shards = plan_shards(Path("data"), "train", n_tiles, tiles_per_shard)
    assert [tile for tiles in shards.values() for tile in tiles] == list(range(n_tiles))
    assert [path.name for path in shards] == [
        f"train-{number:05d}-of-{expected:05d}.parquet" for number in range(expected)
    ]


def test_a_shard_contains_the_maps_and_equal_tiles_give_equal_bytes(tmp_path: Path) -> None:
    tiles = [random_tile(seed) for seed in (1, 2, 3)]
    for name in ("first", "second"):
        write_shard(tmp_path / name / "a.parquet", tiles)
    assert (tmp_path / "first" / "a.parquet").read_bytes() == (tmp_path / "second" / "a.parquet").read_bytes()
    for row, tile in enumerate(tiles):
        assert np.array_equal(read_maps(tmp_path / "first" / "a.parquet", row)[0], tile.label)


def test_a_truncated_shard_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert not is_complete(path)
    write_shard(path, [random_tile(0)])
    assert is_complete(path)
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_complete(path), length


def test_counts_of_all_shards_are_added(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.parquet" for seed in (1, 2)]
    tiles = [random_tile(seed) for seed in (1, 2)]
    for path, tile in zip(paths, tiles, strict=True):
        write_shard(path, [tile])
    summary = summarize(paths)
    counts = sum(np.bincount(tile.label.ravel(), minlength=OPEN_EARTH_MAP.num_labels) for tile in tiles)
    assert list(summary["class_histogram"].values()) == counts[1:].tolist()
    assert summary["kept_share"]["bareland"] == counts[1] / (counts[1] + 4)
    assert summary["kept_share"]["water"] == 1
    assert summary["ignored"] == {"some reason": 3}
    write_shard(paths[0], [tiles[1]])
    assert summarize(paths)["labels_sha256"] != summary["labels_sha256"]


def test_a_class_that_was_never_predicted_has_no_kept_share(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [make_tile("a", np.full((4, 4), 6, np.uint8), np.ones((4, 4), np.float32))])
    shares = summarize([tmp_path / "a.parquet"])["kept_share"]
    assert shares["water"] == 1 and shares["bareland"] == 0 and shares["road"] is None


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / ".partial.inputs.json").touch()
    check_inputs(tmp_path, {"models": [], "image_ids": []})  # of a launch that was killed at once
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"already contains other files, e.g. metrics.jsonl; choose another"):
        check_inputs(tmp_path, {"models": [], "image_ids": []})


def network_like_noise(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels and confidence of logits that are pure noise at a quarter of the resolution, where the heads compute."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(1, 8, 256, 256, generator=generator)
    probs = torch.nn.functional.interpolate(logits, size=(1024, 1024), mode="bilinear")[0].softmax(0)
    confidence, choice = probs.max(0)
    return (choice + 1).to(torch.uint8).numpy(), confidence.numpy()


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_a_tile_takes_less_than_a_megabyte_even_from_a_noisy_network(spread: float, tmp_path: Path) -> None:
    label, confidence = network_like_noise(0, spread)
    counts = np.bincount(label.ravel(), minlength=OPEN_EARTH_MAP.num_labels)
    write_shard(tmp_path / "a.parquet", [LabelledTile("TrainArea_1", label, confidence, counts, counts, {})])
    assert 500_000 < (tmp_path / "a.parquet").stat().st_size < 1_000_000


def test_confidence_keeps_its_ends_and_is_rounded_to_the_nearest_step(tmp_path: Path) -> None:
    confidence = np.array([[0, 0.004, 1 / 51, 0.5, 0.99, 0.9999, 1]], np.float32)
    counts = np.zeros(OPEN_EARTH_MAP.num_labels, int)
    write_shard(tmp_path / "a.parquet", [LabelledTile("a", np.ones((1, 7), np.uint8), confidence, counts, counts, {})])
    found = read_maps(tmp_path / "a.parquet", 0)[1]
    assert found.tolist() == [[0, 0, 5, 130, 250, 255, 255]]


def make_dataset(**labels: np.ndarray) -> datasets.Dataset:
    """Make rows {image_id, pseudo_label}."""
    features = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": datasets.Image()})
    columns = {"image_id": [*labels], "pseudo_label": [Image.fromarray(label) for label in labels.values()]}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("layout", ["train.parquet", "data/train-00000-of-00001.parquet"])
def test_pseudo_labels_load_from_a_folder_of_parquet(tmp_path: Path, layout: str) -> None:
    labels = {f"TrainArea_{number:03d}": np.full((3, 5), number + 1, np.uint8) for number in range(2)}
    labels["TrainArea_001"][0] = IGNORE_INDEX
    saved = make_dataset(**labels)
    saved = saved.add_column("kept_share", [1.0, 0.9])
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    saved.to_parquet(tmp_path / layout)
    (tmp_path / "manifest.json").write_text('{"models": []}')
    loaded = load_pseudo_labels(str(tmp_path))
    assert loaded.column_names == ["image_id", "pseudo_label"]
    assert loaded["image_id"][:] == [*labels]
    for row, label in zip(loaded, labels.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(row["pseudo_label"]), label)


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "other columns"])
def test_a_folder_without_pseudo_labels_is_named(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "labels"
    if kind != "absent":
        folder.mkdir()
    if kind == "text":
        (folder / "train.parquet").write_text("not parquet")
    if kind == "other columns":
        make_dataset(a=np.ones((4, 4), np.uint8)).rename_column("pseudo_label", "label").to_parquet(
            folder / "train.parquet"
        )
    message = "no column pseudo_label among" if kind == "other columns" else "pseudo-labels cannot be loaded"
    with pytest.raises(UserError, match=f"{folder}: {message}"):
        load_pseudo_labels(str(folder))


@pytest.mark.parametrize("content", ["{", "[1]", '{"label_set": {"a": 1}}', '{"label_set": 5}', "[" * 100_000])
def test_a_manifest_nested_too_deeply_or_without_names_is_named(tmp_path: Path, content: str) -> None:
    make_dataset(a=np.ones((4, 4), np.uint8)).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_pseudo_labels(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": [1], "image_ids": []}', "[" * 100_000])
def test_damaged_inputs_of_an_earlier_launch_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(UserError, match=r"inputs\.json is damaged .*; choose another --output_dir"):
        check_inputs(tmp_path, {"models": [], "image_ids": []})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"image_id": [1], "pseudo_label": [b""]}, "column image_id must be text"),
        ({"image_id": ["a"], "pseudo_label": [1]}, "column pseudo_label must be images"),
        ({"image_id": ["a"], "pseudo_label": [[[1, 2]]]}, "column pseudo_label must be images"),
    ],
)
def test_columns_of_another_type_are_named(tmp_path: Path, rows: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=f"{tmp_path}: {message}"):
        load_pseudo_labels(str(tmp_path))


def test_confidence_is_loaded_if_asked_for_and_present(tmp_path: Path) -> None:
    columns = ("image_id", "pseudo_label", "confidence")
    write_shard(tmp_path / "with" / "train.parquet", [random_tile(0)])
    loaded = load_pseudo_labels(str(tmp_path / "with"), columns)
    assert loaded.column_names == [*columns]
    stored = read_maps(tmp_path / "with" / "train.parquet", 0)[1]
    np.testing.assert_array_equal(np.asarray(loaded[0]["confidence"]), stored)
    assert load_pseudo_labels(str(tmp_path / "with")).column_names == ["image_id", "pseudo_label"]
    (tmp_path / "without").mkdir()
    make_dataset(a=np.ones((4, 4), np.uint8)).to_parquet(tmp_path / "without" / "train.parquet")
    assert load_pseudo_labels(str(tmp_path / "without"), columns).column_names == ["image_id", "pseudo_label"]


def test_the_manifest_lists_every_shared_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "train.parquet", [random_tile(0)])
    for name in ("recipe.yaml", "local_paths.yaml", ".partial.README.md"):
        (tmp_path / name).touch()
    write_manifest(tmp_path, {"n_tiles": 1})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["n_tiles"] == 1
    assert {*manifest["files"]} == {"data/train.parquet", "recipe.yaml"}
    assert manifest["files"]["data/train.parquet"] == sha256_of(tmp_path / "data" / "train.parquet")


@pytest.mark.parametrize("name", ["data/train.parquet", "manifest.json"])
def test_labels_with_a_flipped_bit_are_not_learned(name: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "data" / "train.parquet", [random_tile(0)])
    write_manifest(tmp_path, {"label_set": {"names": [*OPEN_EARTH_MAP.names]}})
    assert damaged_files(tmp_path) == []
    content = bytearray((tmp_path / name).read_bytes())
    content[content.index(b"train.parquet") if name == "manifest.json" else len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    assert damaged_files(tmp_path) == [tmp_path / "data" / "train.parquet"]
    with pytest.raises(UserError, match=r"train\.parquet is damaged: its checksum is not the one in manifest\.json"):
        load_pseudo_labels(str(tmp_path))


def test_a_shard_that_cannot_be_written_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(FileError, match=r"a\.parquet cannot be written"):
        write_shard(tmp_path / "data" / "a.parquet", [random_tile(0)])


def test_a_label_that_is_a_path_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    images = pa.array(
        [{"bytes": None, "path": "/etc/hostname"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    schema = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": datasets.Image()}).arrow_schema
    table = pa.table({"image_id": ["a"], "pseudo_label": images}, schema=schema)
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="pseudo_label has images without their bytes, only a path"):
        load_pseudo_labels(str(tmp_path))


def test_labels_with_the_card_of_others_are_not_taken_for_them(tmp_path: Path) -> None:
    found = []
    for name, value in (("mine", 1), ("copied", 2)):
        label = np.full((4, 4), value, np.uint8)
        counts = np.zeros(9, np.int64)
        tile = LabelledTile("a", label, np.ones((4, 4), np.float32), counts, counts, {"no": 0})
        write_shard(tmp_path / name / "data" / "train-00000-of-00001.parquet", [tile])
        (tmp_path / name / "README.md").write_text("---\nconfigs:\n- config_name: default\n  description: x\n---\n")
        found.append(np.unique(load_pseudo_labels(str(tmp_path / name))[0]["pseudo_label"]).tolist())
    assert found == [[1], [2]]


@pytest.mark.parametrize("content", ["{", "[1]", '{"label_set": 5}'])
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    counts = np.zeros(9, np.int64)
    tile = LabelledTile("a", np.ones((4, 4), np.uint8), np.ones((4, 4), np.float32), counts, counts, {"no": 0})
    write_shard(tmp_path / "data" / "train-00000-of-00001.parquet", [tile])
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        load_pseudo_labels(str(tmp_path))
