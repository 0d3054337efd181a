"""Laws of the scores, checked against sets of pixels, on random and on real maps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_seg import land_cover_iou
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.land_cover_iou import LandCoverIoU
from hf_seg.metrics import ConfusionMatrix

REAL_LABELS = Path(__file__).parents[2] / "shared/realdata/dfc25_track1/train/labels"
Maps = list[tuple[np.ndarray, np.ndarray]]


def random_maps(seed: int = 0, *, n_maps: int = 5, n_classes: int = OPEN_EARTH_MAP.num_labels) -> Maps:
    """(predictions, labels) of different sizes; labels hold the classes from 1 up and ignored pixels."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(n_maps):
        size = tuple(rng.integers(1, 40, 2))
        labels = rng.integers(0, n_classes, size).astype(np.uint8)
        predictions = np.where(rng.random(size) < 0.5, labels, rng.integers(1, n_classes, size)).astype(np.uint8)
        labels[labels == 0] = IGNORE_INDEX
        maps.append((predictions, labels))
    return maps


def scores_of(maps: Maps, **kwargs: int) -> dict[str, Any]:
    confusion = ConfusionMatrix(**kwargs)
    for predictions, labels in maps:
        confusion.update(predictions, labels)
    return confusion.compute()


def iou_of_pixel_sets(maps: Maps) -> dict[str, float | None]:
    """IoU per class from sets of (map, row, column), None where the truth has none."""
    iou: dict[str, float | None] = {}
    for index, name in enumerate(OPEN_EARTH_MAP.names):
        truth, predicted = set(), set()
        for number, (predictions, labels) in enumerate(maps):
            valid = labels != IGNORE_INDEX
            truth |= {(number, *pixel) for pixel in np.argwhere((labels == index) & valid).tolist()}
            predicted |= {(number, *pixel) for pixel in np.argwhere((predictions == index) & valid).tolist()}
        iou[name] = len(truth & predicted) / len(truth | predicted) if truth else None
    return iou


@pytest.mark.parametrize("seed", range(3))
def test_iou_is_intersection_over_union_of_the_pixels_of_the_whole_set(seed: int) -> None:
    maps = random_maps(seed)
    expected = iou_of_pixel_sets(maps)
    scores = scores_of(maps)
    assert scores["iou"] == expected
    present = [value for value in expected.values() if value is not None]
    assert scores["n_classes_present"] == len(present) == 8
    assert scores["mean_iou"] == pytest.approx(np.mean(present))
    right = np.concatenate([(predictions == labels)[labels != IGNORE_INDEX] for predictions, labels in maps])
    assert scores["overall_accuracy"] == pytest.approx(right.mean())


@pytest.mark.skipif(not REAL_LABELS.is_dir(), reason="real samples are not here")
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_real_label_maps_score_as_their_pixel_sets_do() -> None:
    import rasterio

    maps: Maps = []
    for path in sorted(REAL_LABELS.glob("*.tif"))[:2]:
        with rasterio.open(path) as raster:
            labels = raster.read(1)[::4, ::4]
        labels[labels == 0] = IGNORE_INDEX
        predictions = np.roll(labels, 3, axis=1)
        maps.append((np.where(predictions == IGNORE_INDEX, 1, predictions), labels))
    assert scores_of(maps)["iou"] == iou_of_pixel_sets(maps)
    assert 0 < scores_of(maps)["mean_iou"] < 1
    perfect = scores_of([(np.where(labels == IGNORE_INDEX, 1, labels), labels) for _, labels in maps])
    assert perfect["mean_iou"] == perfect["overall_accuracy"] == 1


def test_rows_of_the_matrix_are_the_truth() -> None:
    confusion = ConfusionMatrix()
    confusion.update(np.array([5, 5, 6]), np.array([4, 4, IGNORE_INDEX]))
    assert confusion.matrix.dtype == np.int64 and confusion.matrix.shape == (
        OPEN_EARTH_MAP.num_labels,
        OPEN_EARTH_MAP.num_labels,
    )
    assert confusion.matrix[4, 5] == confusion.matrix.sum() == 2


def test_a_class_that_is_predicted_but_not_in_the_truth_is_not_in_the_mean() -> None:
    scores = scores_of([(np.array([5, 7]), np.array([5, 5]))])
    assert scores["mean_iou"] == 0.5 and scores["n_classes_present"] == 1
    assert scores["iou"]["agriculture land"] is None


def test_background_in_the_truth_makes_false_positives_but_is_not_averaged() -> None:
    labels, predictions = np.array([5, 5, 0, 0]), np.array([5, 5, 5, 0])
    scores = scores_of([(predictions, labels)])
    assert scores["mean_iou"] == scores["iou"]["tree"] == 2 / 3 and scores["n_classes_present"] == 1
    assert scores["iou"]["background"] == 1 / 2 and scores["overall_accuracy"] == 3 / 4
    masked = scores_of([(predictions, np.where(labels == 0, IGNORE_INDEX, labels))])
    assert masked["mean_iou"] == masked["overall_accuracy"] == 1 and masked["iou"]["background"] is None


def test_predicted_background_is_a_miss_of_the_true_class() -> None:
    scores = scores_of([(np.array([5, 0]), np.array([5, 5]))])
    assert scores["mean_iou"] == scores["overall_accuracy"] == 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint16])
def test_numpy_and_torch_maps_of_any_integer_type_count_alike(dtype: type) -> None:
    expected = scores_of(random_maps())
    maps: Maps = [(p.astype(dtype), y.astype(dtype)) for p, y in random_maps()]
    assert scores_of(maps) == expected
    tensors = ConfusionMatrix()
    for predictions, labels in maps:
        tensors.update(torch.from_numpy(predictions), torch.from_numpy(labels))
    assert tensors.compute() == expected


def test_merged_counts_are_the_counts_of_the_whole_set() -> None:
    maps = random_maps()
    first, second = ConfusionMatrix(), ConfusionMatrix()
    for predictions, labels in maps[:2]:
        first.update(predictions, labels)
    for predictions, labels in maps[2:]:
        second.update(predictions, labels)
    assert first.merge(second) is first and first.compute() == scores_of(maps)
    with pytest.raises(ValueError, match="counts of 3 classes into 9"):
        first.merge(ConfusionMatrix(3))


def test_scores_of_nothing_are_none_and_json() -> None:
    confusion = ConfusionMatrix()
    confusion.update(np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8))
    confusion.update(np.ones((3, 3), np.uint8), np.full((3, 3), IGNORE_INDEX, np.uint8))
    scores = json.loads(json.dumps(confusion.compute(), allow_nan=False))
    assert scores["mean_iou"] is None and scores["overall_accuracy"] is None and scores["n_classes_present"] == 0
    assert scores["iou"] == dict.fromkeys(OPEN_EARTH_MAP.names)


@pytest.mark.parametrize("num_labels", [2, 16, 20, 300])
def test_other_numbers_of_classes_are_counted_under_their_ids(num_labels: int) -> None:
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(0, num_labels, (2, 50, 50))
    labels[0] = -100
    confusion = ConfusionMatrix(num_labels, ignore_index=-100)
    confusion.update(predictions, labels)
    expected = np.zeros((num_labels, num_labels), np.int64)
    np.add.at(expected, (labels[1:], predictions[1:]), 1)
    assert np.array_equal(confusion.matrix, expected)
    assert list(confusion.compute()["iou"]) == [str(index) for index in range(num_labels)]


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (9, 1, "prediction 9 is no class id 0..8"),
        (-1, 1, "prediction -1 is no class id"),
        (255, 255, "prediction 255 is no class id"),
        (1, 9, "label 9 is no class id 0..8: pixels without a class must be 255"),
        (1, -100, "label -100 is no class id"),
        (1.0, 1, "predictions must be integer class ids, got float64"),
        (1, 1.0, "labels must be integer class ids, got float64"),
        (True, 1, "predictions must be integer class ids, got bool"),
    ],
)
def test_what_is_no_class_is_named_and_not_counted(prediction: float, label: float, message: str) -> None:
    confusion = ConfusionMatrix()
    predictions, labels = np.array([1, 2, 3]).astype(type(prediction)), np.array([1, 2, 3]).astype(type(label))
    predictions[1], labels[1] = prediction, label
    with pytest.raises(ValueError, match=message):
        confusion.update(predictions, labels)
    assert confusion.matrix.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_tensors_that_hold_no_integers_are_refused_with_their_type(dtype: torch.dtype) -> None:
    labels = torch.ones(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"predictions must be integer class ids, got .*{str(dtype).split('.')[1]}"):
        ConfusionMatrix().update(labels.to(dtype), labels)


def test_maps_of_different_shapes_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"predictions \(4, 4\) and labels \(8, 8\)"):
        ConfusionMatrix().update(np.ones((4, 4), np.uint8), np.ones((8, 8), np.uint8))


def test_counting_does_not_import_the_hugging_face_stack() -> None:
    code = (
        "import sys, hf_seg.metrics as m\n"
        "print([n for n in ('transformers', 'datasets', 'accelerate', 'evaluate') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


def test_land_cover_iou_scores_as_the_confusion_matrix_and_starts_anew(cache_dir: Path) -> None:
    maps = random_maps()
    metric = LandCoverIoU(cache_dir=str(cache_dir))
    metric.add(prediction=maps[0][0], reference=maps[0][1])
    metric.add(predictions=torch.from_numpy(maps[1][0]), references=torch.from_numpy(maps[1][1]))
    metric.add_batch(predictions=[p for p, _ in maps[2:4]], references=[y for _, y in maps[2:4]])
    metric.add_batch(predictions=[], references=[])
    last = {"predictions": maps[4][0][None], "references": maps[4][1][None]}
    assert metric.compute(**last) == scores_of(maps)
    assert metric.compute(**last) == scores_of(maps[4:])
    assert metric.compute() == scores_of([])


def test_land_cover_iou_example_of_its_documentation_holds(cache_dir: Path) -> None:
    metric = LandCoverIoU(cache_dir=str(cache_dir))
    metric.add_batch(predictions=[[5, 5], [6, 8]], references=[[5, 5], [6, 6]])
    assert metric.compute()["mean_iou"] == 0.75
    assert set(metric.features) == {"predictions", "references"} and "Xia" in metric.citation


def test_land_cover_iou_stores_no_maps(cache_dir: Path) -> None:
    metric = LandCoverIoU(cache_dir=str(cache_dir))
    for predictions, labels in random_maps():
        metric.add(prediction=predictions, reference=labels)
    assert metric.writer is None and not [path for path in cache_dir.rglob("*") if path.is_file()]
    assert metric.compute()["confusion_matrix"] == scores_of(random_maps())["confusion_matrix"]


def test_land_cover_iou_names_mistakes_and_counts_nothing_of_a_bad_batch(cache_dir: Path) -> None:
    metric = LandCoverIoU(cache_dir=str(cache_dir))
    good, bad = np.ones((2, 2), np.uint8), np.full((2, 2), 77, np.uint8)
    with pytest.raises(ValueError, match="label 77 is no class id"):
        metric.add_batch(predictions=[good, good], references=[good, bad])
    with pytest.raises(ValueError, match="2 predictions do not match 1 references"):
        metric.add_batch(predictions=[good, good], references=[good])
    with pytest.raises(ValueError, match="needs predictions and references"):
        metric.compute(predictions=good)
    with pytest.raises(ValueError, match=r"got \['num_labels'\]"):
        metric.compute(num_labels=9)
    assert metric.compute()["overall_accuracy"] is None
    with pytest.raises(ValueError, match="num_process=2: gather"):
        LandCoverIoU(cache_dir=str(cache_dir), num_process=2)


def test_land_cover_iou_loads_offline_from_its_path(tmp_path: Path) -> None:
    script = Path(land_cover_iou.__file__)
    code = (
        "import evaluate, numpy as np, json\n"
        f"metric = evaluate.load({str(script)!r})\n"
        "print(json.dumps(metric.compute(predictions=np.array([[5, 7]]), references=np.array([[5, 5]]))))"
    )
    # The module caches are read from the environment once, so only a process of its own can have empty ones.
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == scores_of([(np.array([[5, 7]]), np.array([[5, 5]]))])
