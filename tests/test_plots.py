import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report import panels, plots, style

TREE, WATER, ROAD, BUILDING = (OPEN_EARTH_MAP.label2id[name] for name in ("tree", "water", "road", "building"))
REAL_SAR = Path(__file__).parents[2] / "shared/realdata/dfc25_track1"
BEST_COLOR = (0xC8, 0x55, 0x3D)


def read(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def where(image: np.ndarray, color: object) -> np.ndarray:
    """(H, W) bool, true where a picture has exactly this colour."""
    return (image == np.asarray(color, dtype=np.uint8)).all(axis=-1)


def write_metrics(file: Path, entries: list[dict]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def halves(left: int, right: int, size: int = 96) -> np.ndarray:
    label_map = np.full((size, size), left, dtype=np.uint8)
    label_map[:, size // 2 :] = right
    return label_map


@pytest.fixture
def sar() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (96, 96), dtype=np.uint8)


def test_colorize_paints_every_class_in_its_colour() -> None:
    ids = np.arange(OPEN_EARTH_MAP.num_labels, dtype=np.uint8).reshape(3, 3)
    assert (style.colorize(ids).reshape(-1, 3) == OPEN_EARTH_MAP.palette).all()
    assert style.colorize(ids).dtype == np.uint8


def test_ignored_pixels_are_striped_far_from_every_class_even_when_blurred() -> None:
    ignored = style.colorize(np.full((128, 128), IGNORE_INDEX, dtype=np.uint8))
    assert len(np.unique(ignored.reshape(-1, 3), axis=0)) == 2
    blurred = ignored.reshape(-1, 3).mean(axis=0)
    distances = np.linalg.norm(OPEN_EARTH_MAP.palette.astype(float) - blurred, axis=1)
    assert distances.min() > 60
    assert (style.colorize(halves(IGNORE_INDEX, ROAD))[:, 48:] == 255).all()


def test_colorize_rejects_ids_that_are_not_classes() -> None:
    with pytest.raises(ValueError, match=r"label ids \[9, 77\] are not classes; expected 0\.\.8 or 255"):
        style.colorize(np.array([[1, 9, 77, 255]], dtype=np.uint8))


def test_panel_shows_grey_image_label_and_prediction_from_left_to_right(sar: np.ndarray, tmp_path: Path) -> None:
    panels.plot_panel([("a", sar, halves(TREE, WATER), halves(WATER, BUILDING))], tmp_path / "panel.png")
    picture = read(tmp_path / "panel.png")[:500]  # above the legend
    third = picture.shape[1] // 3
    cells = [picture[:, column * third : (column + 1) * third] for column in range(3)]
    assert 1200 <= picture.shape[1] <= 1600
    assert (np.ptp(cells[0].astype(int), axis=-1) == 0).mean() > 0.99  # grey
    for cell, (left, right) in zip(cells[1:], ((TREE, WATER), (WATER, BUILDING)), strict=True):
        columns = [np.nonzero(where(cell, OPEN_EARTH_MAP.palette[index]))[1] for index in (left, right)]
        assert len(columns[0]) == pytest.approx(len(columns[1]), rel=0.02)
        assert len(columns[0]) > 0.35 * cell.shape[0] * cell.shape[1]
        assert columns[0].max() < columns[1].min()
    assert not where(cells[1], OPEN_EARTH_MAP.palette[BUILDING]).any()


def test_panel_without_a_label_has_an_empty_cell_not_the_colour_of_road(sar: np.ndarray, tmp_path: Path) -> None:
    panels.plot_panel([("a", sar, None, halves(TREE, WATER))], tmp_path / "panel.png")
    picture = read(tmp_path / "panel.png")
    center = picture[100:400, 560:680]
    assert (center == 0xF0).all()


def test_panel_accepts_optical_images_as_they_are(tmp_path: Path) -> None:
    optical = np.full((64, 64, 3), (10, 120, 200), dtype=np.uint8)
    panels.plot_panel([("a", optical, None, halves(TREE, WATER, 64))], tmp_path / "panel.png")
    assert where(read(tmp_path / "panel.png")[:, :500], (10, 120, 200)).sum() > 100_000


def test_panel_rejects_maps_of_another_size_and_keeps_the_older_file(sar: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "panel.png"
    output.write_bytes(b"older")
    with pytest.raises(ValueError, match=r"scene_7: prediction is \(64, 64\), its image \(96, 96\)"):
        panels.plot_panel([("scene_7", sar, None, halves(TREE, WATER, 64))], output)
    with pytest.raises(ValueError, match="no rows"):
        panels.plot_panel([], output)
    assert output.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [output]


def test_panel_score_equals_the_metric_of_the_package() -> None:
    generator = np.random.default_rng(1)
    label = generator.integers(1, OPEN_EARTH_MAP.num_labels - 1, (50, 60))
    prediction = np.where(
        generator.random(label.shape) < 0.5, label, generator.integers(0, OPEN_EARTH_MAP.num_labels, label.shape)
    )
    label[:5] = IGNORE_INDEX
    confusion = ConfusionMatrix()
    confusion.update(prediction, label)
    assert panels._mean_iou(label, prediction) == pytest.approx(confusion.compute()["mean_iou"])
    assert panels._mean_iou(np.full((4, 4), BACKGROUND), prediction[:4, :4]) is None


def test_stretch_ignores_nodata_and_outliers() -> None:
    image = np.full((100, 100), 40, dtype=np.uint8)
    image[:50] = 80
    image[:, :10] = 0  # swath edge
    image[0, 99] = 255
    stretched = style.stretch(image)
    assert (stretched[:, :10] == 0).all()
    assert stretched[20, 50] == 1
    assert style.stretch(np.zeros((4, 4), dtype=np.uint8)).max() == 0


def test_curves_skip_null_nan_unknown_keys_and_a_truncated_last_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries: list[dict] = [
        {"step": s, "loss": 2.0 / s, "ce": None if s == 3 else 1.0, "host": "x", "iou": {}} for s in range(1, 90)
    ]
    entries += [{"step": 40, "mean_iou": 0.2}, {"step": 80, "mean_iou": math.nan}, {"step": 85, "loss": math.inf}]
    file = write_metrics(tmp_path / "metrics.jsonl", entries)
    file.write_text(file.read_text() + '{"step": 90, "lo')
    plots.plot_curves(file, tmp_path / "curves.png")
    assert "line 93 is not a JSON object" in caplog.text
    picture = read(tmp_path / "curves.png")
    assert where(picture, BEST_COLOR).sum() > 50  # the star
    assert where(picture[:, :500], (0x35, 0x72, 0xB0)).any()  # ce, in the first panel


def test_curves_mark_no_best_without_validation(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    plots.plot_curves(file, tmp_path / "curves.png")
    assert not where(read(tmp_path / "curves.png"), BEST_COLOR).any()


def test_steps_logged_again_after_a_resume_count_once_with_the_later_value(tmp_path: Path) -> None:
    steps = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)]
    file = write_metrics(tmp_path / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in steps])
    losses = plots.read_series(file)["loss"]
    assert losses.index.tolist() == [1, 2, 3]
    assert losses.tolist() == [9.0, 5.0, 4.0]


def test_metrics_without_any_value_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl contains no metrics"):
        plots.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_lines_that_are_no_metrics_are_skipped(tmp_path: Path) -> None:
    lines = [
        "{",
        "[" * 100_000,
        '{"step": Infinity}',
        '{"step": 1, "loss": 2.0}',
        f'{{"step": 2, "loss": 1{"0" * 400}}}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff")
    losses = plots.read_series(tmp_path / "metrics.jsonl")["loss"]
    assert losses.index.tolist() == [1, 2] and losses[1] == 2.0 and np.isnan(losses[2])


def perfect_results(classes: list[int]) -> dict:
    matrix = np.zeros((OPEN_EARTH_MAP.num_labels, OPEN_EARTH_MAP.num_labels), dtype=int)
    matrix[classes, classes] = 1000
    iou = {name: (1.0 if index in classes else None) for index, name in enumerate(OPEN_EARTH_MAP.names)}
    return {"confusion_matrix": matrix.tolist(), "iou": iou, "mean_iou": 1.0, "overall_accuracy": 1.0, "n_images": 3}


def test_confusion_matrix_shades_the_diagonal_and_paints_iou_in_class_colours(tmp_path: Path) -> None:
    plots.plot_confusion_matrix(perfect_results(list(range(1, OPEN_EARTH_MAP.num_labels))), tmp_path / "matrix.png")
    picture = read(tmp_path / "matrix.png")
    assert 1200 <= picture.shape[1] <= 1600
    rows, columns = np.nonzero(where(picture, (0x08, 0x30, 0x6B)))  # the end of the Blues colour map
    assert np.corrcoef(rows, columns)[0, 1] > 0.9  # a diagonal
    for index in range(1, OPEN_EARTH_MAP.num_labels):
        assert where(picture[:, 1100:], OPEN_EARTH_MAP.palette[index]).sum() > 3000, OPEN_EARTH_MAP.names[index]
    assert where(picture, (0xD9, 0xD9, 0xD9)).mean() < 1e-3


def test_absent_classes_are_grey_and_have_no_bar(tmp_path: Path) -> None:
    plots.plot_confusion_matrix(perfect_results([TREE, WATER]), tmp_path / "matrix.png")
    picture = read(tmp_path / "matrix.png")
    grey_rows = np.nonzero(where(picture[:, 200:1000], (0xD9, 0xD9, 0xD9)).mean(axis=1) > 0.5)[0]
    assert len(grey_rows) == pytest.approx(6 / 8 * 640, rel=0.1)  # six of eight rows
    assert not where(picture[:, 1100:], OPEN_EARTH_MAP.palette[BUILDING]).any()


def test_confusion_matrix_of_an_empty_or_partial_evaluation_is_drawn(tmp_path: Path) -> None:
    empty = np.zeros((OPEN_EARTH_MAP.num_labels, OPEN_EARTH_MAP.num_labels)).tolist()
    plots.plot_confusion_matrix({"confusion_matrix": empty, "mean_iou": None}, tmp_path / "empty.png")
    assert where(read(tmp_path / "empty.png"), (0xD9, 0xD9, 0xD9)).mean() > 0.3
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(9, 9\)"):
        plots.plot_confusion_matrix({"confusion_matrix": [[1, 0], [0, 1]]}, tmp_path / "wrong.png")


def test_figures_are_deterministic_and_leave_no_temporary_file(sar: np.ndarray, tmp_path: Path) -> None:
    for output in (tmp_path / "new/a.png", tmp_path / "new/b.png"):
        panels.plot_panel([("a", sar, halves(TREE, IGNORE_INDEX), halves(TREE, WATER))], output)
    assert (tmp_path / "new/a.png").read_bytes() == (tmp_path / "new/b.png").read_bytes()
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]


def test_module_needs_neither_pyplot_nor_torch() -> None:
    code = "import hf_seg.report.plots, sys; print({'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.skipif(not REAL_SAR.is_dir(), reason="real samples not found")
def test_real_scene_fills_the_panel_with_the_shares_of_its_classes(tmp_path: Path) -> None:
    sar_image = np.asarray(Image.open(REAL_SAR / "val/sar_images/ValArea_001.tif"))
    label = np.asarray(Image.open(REAL_SAR / "val/labels/ValArea_001.tif"))
    panels.plot_panel([("ValArea_001", sar_image, label, label)], tmp_path / "panel.png")
    cell = read(tmp_path / "panel.png")[:500, 510:990]
    share = (label == TREE).mean()
    assert where(cell, OPEN_EARTH_MAP.palette[TREE]).mean() == pytest.approx(share, rel=0.08)
