"""The training stream is a function of (seed, position); labels are joined and masked once."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from hf_seg.data.dataloaders import AugmentedStream, PositionSampler, index_at, seed_at, train_dataloader
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.rare_classes import RareClassSampling, class_pixels
from hf_seg.data.samples import LabelledImages, UnlabelledImages
from hf_seg.data.transforms import optical_transform, sar_transform
from hf_seg.errors import DatasetError, UserError
from hf_seg.labels import IGNORE_INDEX
from hf_seg.normalization import to_pixel_values

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def rows(oem_sar: Path) -> datasets.Dataset:
    return load_open_earth_map_sar(oem_sar, "train")


@pytest.fixture(scope="module")
def stream(rows: datasets.Dataset) -> AugmentedStream:
    transform = sar_transform(32, jitter_prob=0.5, speckle_prob=0.5, max_class_share=0.75)
    return AugmentedStream(LabelledImages(rows, "sar"), transform, seed=3)


def batches(stream: AugmentedStream, **settings: int) -> list[Batch]:
    return list(train_dataloader(stream, **{"start": 0, "stop": 20, "batch_size": 2} | settings))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a["image_id"] == b["image_id"]
        and torch.equal(a["pixel_values"], b["pixel_values"])
        and torch.equal(a["labels"], b["labels"])
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_sample_depends_on_seed_and_position_alone(rows: datasets.Dataset, stream: AugmentedStream) -> None:
    other = AugmentedStream(LabelledImages(rows, "sar"), sar_transform(32, speckle_prob=0.5, max_class_share=0.75), 3)
    forward = [stream[position] for position in range(8)]
    torch.rand(3)
    backward = [other[position] for position in reversed(range(8))][::-1]
    assert same([default_collate(forward)], [default_collate(backward)])
    assert len({sample["pixel_values"].numpy().tobytes() for sample in forward}) == 8
    reseeded = AugmentedStream(other.samples, other.transform, 4)
    assert not same([default_collate(forward)], [default_collate([reseeded[position] for position in range(8)])])


def test_a_sample_has_the_networks_shapes(stream: AugmentedStream) -> None:
    sample = stream[0]
    assert (sample["pixel_values"].shape, sample["pixel_values"].dtype) == ((3, 32, 32), torch.float32)
    assert (sample["labels"].shape, sample["labels"].dtype) == ((32, 32), torch.int64)
    batch = batches(stream)[0]
    assert (batch["pixel_values"].shape, batch["labels"].shape) == ((2, 3, 32, 32), (2, 32, 32))
    assert len(batch["image_id"]) == 2


def test_transforms_of_a_sample_draw_independently(rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = sar_transform(32, jitter_prob=1)
    crop, _, jitter, _ = transform.transforms
    sides, gains = [], []
    draw_crop, draw_jitter = crop.get_params_dependent_on_data, jitter.get_params

    def record_side(**given: Any) -> Any:
        drawn = draw_crop(**given)
        sides.append(drawn["side"])
        return drawn

    def record_gain() -> Any:
        drawn = draw_jitter()
        gains.append(drawn["gain"])
        return drawn

    monkeypatch.setattr(crop, "get_params_dependent_on_data", record_side)
    monkeypatch.setattr(jitter, "get_params", record_gain)
    stream = AugmentedStream(LabelledImages(rows, "sar"), transform, 0)
    for position in range(300):
        stream[position]
    zooms = 32 / np.array(sides)
    assert abs(np.corrcoef(zooms, np.log(gains))[0, 1]) < 0.2


def test_an_image_looks_different_in_every_epoch(stream: AugmentedStream) -> None:
    position_in = [[index_at(3, epoch * 6 + offset, 6) for offset in range(6)].index(0) for epoch in range(5)]
    samples = [stream[epoch * 6 + offset] for epoch, offset in enumerate(position_in)]
    assert len({sample["image_id"] for sample in samples}) == 1
    assert len({sample["pixel_values"].numpy().tobytes() for sample in samples}) == 5


def test_workers_change_nothing(stream: AugmentedStream) -> None:
    assert same(batches(stream), batches(stream, num_workers=2))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_processes_share_each_global_batch(stream: AugmentedStream, accumulation: int) -> None:
    stop = 2 * 2 * 2 * accumulation
    alone = batches(stream, batch_size=4, stop=stop)
    shares = [batches(stream, stop=stop, process_index=index, num_processes=2) for index in range(2)]
    together: list[Batch] = [
        {key: [*a[key], *b[key]] if key == "image_id" else torch.cat([a[key], b[key]]) for key in a}
        for a, b in zip(*shares, strict=True)
    ]
    assert len(alone) == 2 * accumulation
    assert same(alone, together)


@pytest.mark.parametrize("seen", [2, 6, 18])
def test_a_resumed_stream_equals_one_that_never_stopped(stream: AugmentedStream, seen: int) -> None:
    assert same(batches(stream)[seen // 2 :], batches(stream, start=seen))


def test_a_finished_stream_is_empty(stream: AugmentedStream) -> None:
    assert batches(stream, start=20) == []
    assert len(PositionSampler(20, 20, 2)) == 0


@pytest.mark.parametrize(("batch_size", "num_processes"), [(1, 1), (2, 1), (3, 2), (2, 4)])
def test_every_position_is_drawn_once(batch_size: int, num_processes: int) -> None:
    stop = 5 + 2 * batch_size * num_processes
    samplers = [PositionSampler(5, stop, batch_size, index, num_processes) for index in range(num_processes)]
    drawn = [position for sampler in samplers for batch in sampler for position in batch]
    assert sorted(drawn) == [*range(5, stop)]
    assert {len(sampler) for sampler in samplers} == {2}


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_every_epoch_is_a_permutation_and_no_two_are_alike(length: int) -> None:
    epochs = [[index_at(0, epoch * length + offset, length) for offset in range(length)] for epoch in range(6)]
    assert all(sorted(epoch) == [*range(length)] for epoch in epochs)
    assert length < 7 or len({tuple(epoch) for epoch in epochs}) == 6
    assert length < 7 or epochs[0] != [index_at(1, offset, length) for offset in range(length)]


def test_random_access_to_the_order_agrees_with_sequential() -> None:
    sequence = [index_at(0, position, 7) for position in range(70)]
    shuffled = np.random.default_rng(0).permutation(70)
    assert [sequence[position] for position in shuffled] == [index_at(0, position, 7) for position in shuffled]


def test_seeds_of_positions_do_not_collide_more_than_by_chance() -> None:
    seeds = [seed_at(seed, position) for seed in range(2) for position in range(20_000)]
    assert len(set(seeds)) >= len(seeds) - 5  # 0.2 expected among 32 bits
    assert 0 <= min(seeds) < 2**20 * 5
    assert 2**32 - 2**20 * 5 < max(seeds) < 2**32
    assert np.corrcoef(seeds[:-1], seeds[1:])[0, 1] == pytest.approx(0, abs=0.02)


def test_loading_leaves_the_global_generators_alone(stream: AugmentedStream) -> None:
    torch.manual_seed(0)
    before, pythons_before = torch.get_rng_state(), random.getstate()
    batches(stream)
    iterator: Iterator[Batch] = iter(train_dataloader(stream, start=0, stop=8, batch_size=2, num_workers=1))
    next(iterator)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == pythons_before


def tiles(*labels: np.ndarray | None, **images: list[np.ndarray]) -> datasets.Dataset:
    """Rows like OpenEarthMap-SAR's; SAR images not given have the label's size, and their number as value."""
    shapes = [(4, 4) if label is None else label.shape for label in labels]
    images.setdefault("sar", [np.full(shape, number, np.uint8) for number, shape in enumerate(shapes)])
    columns = {
        "image_id": [f"TrainArea_{number:03d}" for number in range(len(labels))],
        "label": [label if label is None else Image.fromarray(label) for label in labels],
        **{column: [Image.fromarray(image) for image in values] for column, values in images.items()},
    }
    features = {"image_id": datasets.Value("string"), "label": datasets.Image(mode="L")}
    features |= {column: datasets.Image() for column in images}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def pseudo_labels_of(**labels: np.ndarray) -> datasets.Dataset:
    features = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": datasets.Image()})
    columns = {"image_id": [*labels], "pseudo_label": [Image.fromarray(label) for label in labels.values()]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_class_0_becomes_ignored_unless_it_is_kept() -> None:
    label = np.array([[0, 1, 8], [IGNORE_INDEX, 2, 0]], np.uint8)
    ignored = LabelledImages(tiles(label), "sar")[0].label
    np.testing.assert_array_equal(ignored, [[IGNORE_INDEX, 1, 8], [IGNORE_INDEX, 2, IGNORE_INDEX]])
    kept = LabelledImages(tiles(label), "sar", keep_background=True)[0].label
    np.testing.assert_array_equal(kept, label)
    assert ignored.dtype == kept.dtype == np.uint8


def test_pixels_outside_the_swath_are_masked_on_request() -> None:
    sar = np.full((4, 6), 9, np.uint8)
    sar[:, 0] = 0  # outside the swath
    sar[2, 3] = 0  # radar shadow
    rows = tiles(np.full((4, 6), 5, np.uint8), sar=[sar])
    masked, plain = (LabelledImages(rows, "sar", mask_nodata=mask)[0].label for mask in (True, False))
    assert (masked[:, 0] == IGNORE_INDEX).all() and (masked[:, 1:] == 5).all()
    assert (plain == 5).all()


def colour_tiles(*nodata_rows: int, size: int = 60) -> datasets.Dataset:
    """Fully labelled tiles with an optical image whose first rows are nodata."""
    images = np.random.default_rng(0).integers(1, 256, (len(nodata_rows), size, size, 3), dtype=np.uint8)
    for image, rows in zip(images, nodata_rows, strict=True):
        image[:rows] = 0
    return tiles(*[np.ones((size, size), np.uint8)] * len(nodata_rows), optical=[*images])


def test_an_unlabelled_sample_is_valid_where_any_band_has_data() -> None:
    sample = UnlabelledImages(colour_tiles(10), "optical")[0]
    assert sample.image_id == "TrainArea_000"
    assert (sample.valid_mask.shape, sample.valid_mask.dtype) == ((60, 60), bool)
    assert not sample.valid_mask[:10].any() and sample.valid_mask[10:].all()
    grey = UnlabelledImages(tiles(np.ones((4, 4), np.uint8)), "sar")[0]  # its only image is all zero
    assert not grey.valid_mask.any()


def test_an_unlabelled_stream_has_a_valid_mask_and_the_crops_of_a_labelled_one() -> None:
    rows = colour_tiles(0, 20, 60)
    transform = optical_transform(96, scale_range=(0.5, 2), jitter_prob=0)
    labelled = AugmentedStream(LabelledImages(rows, "optical"), transform, 5)
    unlabelled = AugmentedStream(UnlabelledImages(rows, "optical"), transform, 5)
    batch = next(iter(train_dataloader(unlabelled, start=0, stop=12, batch_size=12)))
    assert {*batch} == {"image_id", "pixel_values", "valid_mask"}
    assert (batch["valid_mask"].shape, batch["valid_mask"].dtype) == ((12, 96, 96), torch.bool)
    black = to_pixel_values(np.zeros((1, 1), np.uint8))[:, 0, 0]
    for position in range(12):
        expected = labelled[position]
        assert torch.equal(batch["pixel_values"][position], expected["pixel_values"])
        valid, is_padding = batch["valid_mask"][position], expected["labels"] == IGNORE_INDEX
        assert not (valid & is_padding).any()
        is_black = (expected["pixel_values"] == black.view(3, 1, 1)).all(0)
        assert (valid == ~is_black).float().mean() > 0.95  # but for bilinear pixels at the border of nodata
    assert batch["valid_mask"].any() and not batch["valid_mask"].all()


def test_nodata_does_not_redraw_the_crop_of_an_unlabelled_image() -> None:
    """What is valid is no class: an image without any data is cropped as one that is valid everywhere."""
    crops = []
    for nodata_rows in (0, 60):
        rows = colour_tiles(nodata_rows)
        valid = UnlabelledImages(rows, "optical")
        stream = AugmentedStream(valid, optical_transform(96, scale_range=(0.5, 0.6), jitter_prob=0), 2)
        crops.append([stream[position]["valid_mask"] for position in range(8)])
    full, empty = crops
    assert all(mask.any() for mask in full) and not any(mask.any() for mask in empty)
    inside = [mask.nonzero().amin(0).tolist() for mask in full]
    assert len({tuple(corner) for corner in inside}) == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_raises_its_own_error_from_workers_too(oem_sar: Path, tmp_path: Path, num_workers: int) -> None:
    root = tmp_path / oem_sar.name
    shutil.copytree(oem_sar, root)
    images = LabelledImages(load_open_earth_map_sar(root, "train"), "sar")
    (root / "train/sar_images/TrainArea_003.tif").write_bytes(b"damaged")
    loader = train_dataloader(
        AugmentedStream(images, sar_transform(32), 0), start=0, stop=6, batch_size=2, num_workers=num_workers
    )
    with pytest.raises(DatasetError) as caught:
        list(loader)
    assert type(caught.value) is DatasetError
    path = root / "train/sar_images/TrainArea_003.tif"
    assert str(caught.value).startswith(f"TrainArea_003: cannot be read any more ('{path}' not recognized as")
    assert "Traceback" not in str(caught.value) and "worker" not in str(caught.value)


def bytes_of(rows: datasets.Dataset) -> list[int]:
    return [2 * np.asarray(label).size for label in rows["label"]]  # SAR and label, a byte each


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("n_cached", [0, 2, 6])
def test_a_cache_of_any_size_changes_nothing(rows: datasets.Dataset, n_cached: int, num_workers: int) -> None:
    plain, images = LabelledImages(rows, "sar"), LabelledImages(rows, "sar")
    budget = sum(bytes_of(rows)[:n_cached]) / 2**30
    assert images.cache(budget, progress=False) == budget
    transform = sar_transform(32, jitter_prob=0.5, speckle_prob=0.5)
    ours, theirs = (AugmentedStream(each, transform, 3) for each in (images, plain))
    assert same(batches(ours, num_workers=num_workers), batches(theirs))


def test_a_cached_image_is_not_read_again_and_the_budget_is_kept(
    rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = LabelledImages(rows, "sar")
    read: list[int] = []
    decode = images._read

    def record(index: int) -> Any:
        read.append(index)
        return decode(index)

    monkeypatch.setattr(images, "_read", record)
    one_byte_short = sum(bytes_of(rows)[:3]) - 1
    used = images.cache(one_byte_short / 2**30, progress=False)
    assert used * 2**30 == sum(bytes_of(rows)[:2]) <= one_byte_short
    read.clear()
    assert [images[index].image_id for index in range(6)] == rows["image_id"][:]
    assert read == [2, 3, 4, 5]
    assert images.cache(0) == 0


def test_writing_to_a_cached_sample_does_not_change_the_next_one(rows: datasets.Dataset) -> None:
    images = LabelledImages(rows, "sar")
    images.cache(1, progress=False)
    sample = images[0]
    before = sample.image.copy(), sample.label.copy()
    sample.image[:], sample.label[:] = 0, 0
    np.testing.assert_array_equal(images[0].image, before[0])
    np.testing.assert_array_equal(images[0].label, before[1])


def test_unlabelled_images_are_cached_too(rows: datasets.Dataset) -> None:
    plain, images = UnlabelledImages(rows, "optical"), UnlabelledImages(rows, "optical")
    assert images.cache(1, progress=False) == pytest.approx(2 * sum(bytes_of(rows)) / 2**30)  # RGB and a mask
    for index in range(len(plain)):
        for ours, theirs in zip(images[index], plain[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_class_pixels_counts_each_class_of_each_image() -> None:
    labels = np.array([[1, 1, 2], [0, 8, IGNORE_INDEX]], np.uint8), np.full((2, 3), 5, np.uint8)
    counts = class_pixels(LabelledImages(tiles(*labels), "sar"), progress=False)
    np.testing.assert_array_equal(counts, [[0, 2, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 6, 0, 0, 0]])
    with_background = LabelledImages(tiles(*labels), "sar", keep_background=True)
    assert class_pixels(with_background, progress=False)[:, 0].tolist() == [1, 0]


def test_rare_class_sampling_draws_a_class_by_frequency_and_then_one_of_its_images() -> None:
    pixels = np.zeros((5, 9), int)
    pixels[:, 3] = 70, 100, 100, 100, 95  # frequency 0.93
    pixels[0, 2] = 30  # 0.06
    pixels[4, 4] = 5  # 0.01
    weights = np.exp((1 - np.array([0.06, 0.93, 0.01])) / 0.5)
    expected = weights / weights.sum()
    sampling = RareClassSampling(pixels, 0.5)
    np.testing.assert_allclose(sampling.probabilities[[2, 3, 4]], expected)
    assert sampling.probabilities[[0, 1, 5, 6, 7, 8]].sum() == 0
    drawn = np.bincount([sampling.index_at(0, position) for position in range(20_000)], minlength=5) / 20_000
    of_each = expected[1] / 5 + np.array([expected[0], 0, 0, 0, expected[2]])
    np.testing.assert_allclose(drawn, of_each, atol=0.015)  # four standard deviations


def test_the_rarest_class_dominates_at_a_low_temperature() -> None:
    pixels = np.array([[0, 97, 0], [0, 0, 2], [0, 0, 1]])
    assert RareClassSampling(pixels, 1e-3).probabilities.tolist() == [0, 0, 1]
    assert RareClassSampling(pixels, 1e6).probabilities == pytest.approx([0, 0.5, 0.5])


def test_an_image_with_too_few_pixels_of_a_class_is_not_drawn_for_it() -> None:
    pixels = np.array([[90, 10], [99, 1], [100, 0]])
    sampling = RareClassSampling(pixels, 0.01, min_fraction=0.05)
    assert [each.tolist() for each in sampling.images_of] == [[0, 1, 2], [0]]
    only_first = RareClassSampling(pixels, 0.01, min_fraction=0.2)
    assert only_first.probabilities.tolist() == [1, 0]


def test_rare_class_sampling_depends_on_seed_and_position_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 100, (50, 9))
    forward = [RareClassSampling(pixels, 0.1).index_at(3, position) for position in range(200)]
    sampling = RareClassSampling(pixels, 0.1)
    assert [sampling.index_at(3, position) for position in reversed(range(200))][::-1] == forward
    assert [sampling.index_at(4, position) for position in range(200)] != forward


def test_settings_and_labels_that_rare_class_sampling_cannot_use_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature .* must be > 0; it is 0"):
        RareClassSampling(np.ones((2, 9)), 0)
    with pytest.raises(DatasetError, match="none of the 2 images has a class"):
        RareClassSampling(np.zeros((2, 9)), 0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_with_rare_class_sampling_has_the_drawn_images(rows: datasets.Dataset, num_workers: int) -> None:
    images = LabelledImages(rows, "sar")
    sampling = RareClassSampling(class_pixels(images, progress=False), 0.01)
    stream = AugmentedStream(images, sar_transform(32), 3, sampling=sampling)
    ids = [image_id for batch in batches(stream, num_workers=num_workers) for image_id in batch["image_id"]]
    assert ids == [images.image_ids[sampling.index_at(3, position)] for position in range(20)]
    again = batches(AugmentedStream(images, sar_transform(32), 3, sampling=sampling), start=6)
    assert same(batches(stream, num_workers=num_workers)[3:], again)


def test_images_are_unchanged_and_have_their_ids(rows: datasets.Dataset) -> None:
    images = LabelledImages(rows, "sar", keep_background=True)
    assert len(images) == 6
    for index, row in enumerate(rows):
        sample = images[index]
        assert sample.image_id == row["image_id"]
        np.testing.assert_array_equal(sample.image, np.asarray(row["sar"]))
        np.testing.assert_array_equal(sample.label, np.asarray(row["label"]))
        assert sample.image.flags.writeable
        assert sample.label.flags.writeable


def test_the_optical_column_has_three_bands(rows: datasets.Dataset) -> None:
    sample = LabelledImages(rows, "optical")[0]
    assert sample.image.shape == (*sample.label.shape, 3)
    assert to_pixel_values(sample.image).shape == (3, *sample.label.shape)


def test_images_without_a_label_are_counted_and_the_first_is_named() -> None:
    label = np.ones((4, 4), np.uint8)
    with pytest.raises(DatasetError, match=r"2 of 4 images .*TrainArea_001"):
        LabelledImages(tiles(label, None, label, None), "sar")


def test_an_image_of_another_size_than_its_label_is_named() -> None:
    labels = pseudo_labels_of(TrainArea_000=np.ones((4, 4), np.uint8), TrainArea_001=np.ones((4, 5), np.uint8))
    images = LabelledImages(tiles(None, None), "sar", pseudo_labels=labels)
    assert images[0].label.shape == (4, 4)
    with pytest.raises(DatasetError, match=r"TrainArea_001: the image is \(4, 4\) and the label \(4, 5\) pixels"):
        images[1]


def test_a_file_that_disappears_during_training_is_named(oem_sar: Path, tmp_path: Path) -> None:
    root = tmp_path / oem_sar.name
    shutil.copytree(oem_sar, root)
    images = LabelledImages(load_open_earth_map_sar(root, "train"), "sar")
    assert images[2].image_id == "TrainArea_003"
    (root / "train/sar_images/TrainArea_003.tif").unlink()
    with pytest.raises(DatasetError, match="TrainArea_003: cannot be read any more"):
        images[2]


def test_pseudo_labels_are_joined_by_image_id_in_any_order() -> None:
    labels = {f"TrainArea_{number:03d}": np.full((4, 4), number + 1, np.uint8) for number in (2, 0, 3, 1)}
    official = [np.full((4, 4), 8, np.uint8)] * 3
    images = LabelledImages(tiles(*official), "sar", pseudo_labels=pseudo_labels_of(**labels))
    for number in range(3):
        image_id, image, label, _ = images[number]
        assert image_id == f"TrainArea_{number:03d}"
        assert (image == number).all()
        assert (label == number + 1).all()


def test_an_image_without_pseudo_label_is_named() -> None:
    labels = pseudo_labels_of(TrainArea_002=np.ones((4, 4), np.uint8), TrainArea_000=np.ones((4, 4), np.uint8))
    with pytest.raises(DatasetError, match=r"1 of 3 images .*pseudo-label.*TrainArea_001"):
        LabelledImages(tiles(None, None, None), "sar", pseudo_labels=labels)


def test_the_stream_of_a_real_folder_has_no_class_0(realdata: Path) -> None:
    rows = load_open_earth_map_sar(realdata / "dfc25_track1", "train")
    stream = AugmentedStream(LabelledImages(rows, "sar"), sar_transform(64), seed=0)
    batch = next(iter(train_dataloader(stream, start=0, stop=4, batch_size=4)))
    values = set(batch["labels"].unique().tolist())
    assert values <= {*range(1, 9), IGNORE_INDEX}
    assert len(values) > 1


class Greedy:
    """A transform that asks for 8 PiB."""

    def set_random_state(self, *_: object) -> None: ...

    def __call__(self, **_: object) -> None:
        np.empty(1 << 50)


def test_an_image_that_does_not_fit_into_a_workers_memory_is_one_line(rows: datasets.Dataset) -> None:
    stream = AugmentedStream(LabelledImages(rows, "sar"), Greedy(), seed=3)
    message = "do not fit into memory while they are augmented; lower --dataloader_num_workers"
    with pytest.raises(UserError, match=message) as error:
        batches(stream, num_workers=1)
    assert "\n" not in str(error.value)
