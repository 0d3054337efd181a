"""Shards of pseudo-labels: small, whole or absent, the same bytes for the same tiles."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_seg.data.pseudo_label_dataset import (
    LabelledTile,
    beyond_swath,
    check_inputs,
    is_whole,
    plan_shards,
    read_maps,
    summarize,
    write_shard,
)
from hf_seg.errors import UserError
from hf_seg.labels import IGNORE_INDEX, NUM_LABELS


def make_tile(image_id: str, label: np.ndarray, confidence: np.ndarray, ignored: int = 0) -> LabelledTile:
    """Make a tile in which the networks gave each class what the label says, and two pixels of class 1 more."""
    kept = np.bincount(label[label != IGNORE_INDEX], minlength=NUM_LABELS)
    predicted = kept + 2 * (np.arange(NUM_LABELS) == 1)
    return LabelledTile(image_id, label, confidence, predicted, kept, {"some reason": ignored})


def random_tile(seed: int) -> LabelledTile:
    """Make a tile of random classes 1..8."""
    rng = np.random.default_rng(seed)
    label = rng.integers(1, NUM_LABELS, (20, 30), dtype=np.uint8)
    return make_tile(f"TrainArea_{seed:03d}", label, rng.random((20, 30), dtype=np.float32), ignored=seed)


def test_beyond_the_swath_are_zeros_joined_to_the_border_side_by_side() -> None:
    sar = np.full((6, 7), 9, np.uint8)
    sar[0, 2] = sar[1, 2] = 0  # from the border inwards
    sar[2, 3] = 0  # touches that at a corner only
    sar[4, 4:6] = 0  # inside
    sar[5, 0] = 0  # a corner of the image
    beyond = np.zeros((6, 7), bool)
    beyond[0, 2] = beyond[1, 2] = beyond[5, 0] = True
    assert np.array_equal(beyond_swath(sar), beyond)
    assert beyond_swath(np.zeros((3, 4), np.uint8)).all()
    assert not beyond_swath(np.ones((3, 4), np.uint8)).any()


@pytest.mark.parametrize(("n_tiles", "tiles_per_shard", "expected"), [(5, 2, 3), (4, 2, 2), (1, 16, 1), (3, 1, 3)])
def test_every_tile_is_in_one_shard(n_tiles: int, tiles_per_shard: int, expected: int) -> None:
    shards = plan_shards(Path("data"), "train", n_tiles, tiles_per_shard)
    assert [tile for tiles in shards.values() for tile in tiles] == list(range(n_tiles))
    assert [path.name for path in shards] == [
        f"train-{number:05d}-of-{expected:05d}.parquet" for number in range(expected)
    ]


def test_a_shard_holds_the_maps_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    tiles = [random_tile(seed) for seed in (1, 2, 3)]
    for name in ("first", "second"):
        write_shard(tmp_path / name / "a.parquet", tiles)
    assert (tmp_path / "first" / "a.parquet").read_bytes() == (tmp_path / "second" / "a.parquet").read_bytes()
    for row, tile in enumerate(tiles):
        assert np.array_equal(read_maps(tmp_path / "first" / "a.parquet", row)[0], tile.label)


def test_a_shard_that_is_cut_short_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert not is_whole(path)
    write_shard(path, [random_tile(0)])
    assert is_whole(path)
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole(path), length


def test_counts_of_all_shards_are_added(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.parquet" for seed in (1, 2)]
    tiles = [random_tile(seed) for seed in (1, 2)]
    for path, tile in zip(paths, tiles, strict=True):
        write_shard(path, [tile])
    summary = summarize(paths)
    counts = sum(np.bincount(tile.label.ravel(), minlength=NUM_LABELS) for tile in tiles)
    assert list(summary["class_histogram"].values()) == counts[1:].tolist()
    assert summary["kept_share"]["bareland"] == counts[1] / (counts[1] + 4)
    assert summary["kept_share"]["water"] == 1
    assert summary["ignored"] == {"some reason": 3}
    write_shard(paths[0], [tiles[1]])
    assert summarize(paths)["labels_sha256"] != summary["labels_sha256"]


def test_a_class_that_nobody_chose_has_no_kept_share(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [make_tile("a", np.full((4, 4), 6, np.uint8), np.ones((4, 4), np.float32))])
    shares = summarize([tmp_path / "a.parquet"])["kept_share"]
    assert shares["water"] == 1 and shares["bareland"] == 0 and shares["road"] is None


def test_a_folder_that_holds_a_run_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "inputs.json.partial").touch()
    check_inputs(tmp_path, {"models": [], "image_ids": []})  # of a launch that was killed at once
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"already holds something else, metrics.jsonl for one; choose another"):
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
    counts = np.bincount(label.ravel(), minlength=NUM_LABELS)
    write_shard(tmp_path / "a.parquet", [LabelledTile("TrainArea_1", label, confidence, counts, counts, {})])
    assert 500_000 < (tmp_path / "a.parquet").stat().st_size < 1_000_000


def test_confidence_keeps_its_ends_and_is_rounded_to_the_nearest_step(tmp_path: Path) -> None:
    confidence = np.array([[0, 0.004, 1 / 51, 0.5, 0.99, 0.9999, 1]], np.float32)
    counts = np.zeros(NUM_LABELS, int)
    write_shard(tmp_path / "a.parquet", [LabelledTile("a", np.ones((1, 7), np.uint8), confidence, counts, counts, {})])
    found = read_maps(tmp_path / "a.parquet", 0)[1]
    assert found.tolist() == [[0, 0, 5, 130, 250, 255, 255]]
