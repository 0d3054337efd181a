"""The synthetic dataset: layout, statistics compared with real scenes, label noise, and command lines."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import rasterio
from transformers import ConvNextV2Config, ConvNextV2Model

from hf_seg.data.doctor import examine
from hf_seg.data.open_earth_map import load_open_earth_map, load_open_earth_map_sar
from hf_seg.data.provenance import read_provenance
from hf_seg.data.pseudo_label_dataset import LabelledTile, write_shard
from hf_seg.data.scan import scan_open_earth_map
from hf_seg.errors import FileError, UserError
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.synthetic import KINDS, REGIONS, Scene, make_synthetic_dataset
from hf_seg.synthetic.fields import RayFrame, smooth_noise, to_uniform
from hf_seg.synthetic.noise import corrupt_labels
from hf_seg.synthetic.optical import TARGET_CAMERA, render_optical
from hf_seg.synthetic.sar import render_sar

SCRIPTS = Path(__file__).parents[1] / "scripts"
SCRIPT = SCRIPTS / "make_synthetic_dataset.py"


def load_script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calibrate = load_script("calibrate_synthetic_dataset")
difficulty = load_script("measure_synthetic_difficulty")
replacing = load_script("replace_labels")
Tile = calibrate.Tile

SIZES = {"source": 8, "train": 4, "val": 2, "test": 1}
# Figures of the real data: percent of the pixels; SAR mean, std, local CV; published agreement and IoU of the labels.
FREQUENCIES = (1.6, 23.9, 23.1, 7.9, 14.3, 10.3, 6.5, 12.1)
REAL_SAR = {
    "rangeland": (42.5, 20.7, 0.27),
    "developed space": (44.0, 28.6, 0.34),
    "road": (36.6, 23.4, 0.40),
    "tree": (46.9, 20.9, 0.22),
    "water": (24.2, 15.1, 0.39),
    "agriculture land": (46.4, 25.3, 0.30),
    "building": (55.0, 33.8, 0.32),
}
AGREEMENT = (0.106, 0.783, 0.696, 0.704, 0.690, 0.940, 0.669, 0.871)
AGREEMENT_IOU = (0.021, 0.471, 0.525, 0.613, 0.641, 0.848, 0.581, 0.781)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset as the command writes it."""
    return make_synthetic_dataset(tmp_path_factory.mktemp("synthetic") / "data", seed=3, size=96, **SIZES)


@pytest.fixture(scope="module")
def tiles() -> list[Any]:
    """Eighty scenes of 192 pixels, eight of each region, without optical images."""
    drawn = []
    for index in range(80):
        scene = Scene(7, "train", index, 192)
        ground_rng, _, sar_rng, noise_rng = scene.generators()
        ground = scene.make_ground(ground_rng)
        noisy = corrupt_labels(noise_rng, ground.label, ground.parcel, ground.gsd)
        sar = render_sar(sar_rng, ground, scene.gain)
        drawn.append(Tile(sar, ground.crop(ground.label), None, ground.crop(noisy)))
    return drawn


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read().squeeze()


def frequencies_of(labels: Sequence[np.ndarray]) -> np.ndarray:
    counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=OPEN_EARTH_MAP.num_labels)
    return 100 * counts / counts.sum()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(data: Path, tmp_path: Path) -> None:
    again = make_synthetic_dataset(tmp_path / "again", seed=3, size=96, num_workers=2, **SIZES)
    assert files_of(again) == files_of(data)


def test_another_seed_gives_other_labels(data: Path, tmp_path: Path) -> None:
    other = files_of(make_synthetic_dataset(tmp_path / "other", seed=4, size=96, **SIZES))
    assert other.keys() == files_of(data).keys()
    labels = [name for name in other if "labels" in name]
    assert all(other[name] != content for name, content in files_of(data).items() if name in labels)


def test_a_scene_does_not_depend_on_how_many_there_are(data: Path, tmp_path: Path) -> None:
    larger = files_of(make_synthetic_dataset(tmp_path / "larger", seed=3, size=96, source=2, train=5, val=1, test=0))
    train = {name: content for name, content in files_of(data).items() if "TrainArea" in name}
    assert len(train) == 16 and all(larger[name] == content for name, content in train.items())


@pytest.mark.parametrize("folder", ["OpenEarthMap_wo_xBD", "dfc25_track1"])
def test_the_doctor_finds_no_problem(data: Path, folder: str) -> None:
    report = examine(data / folder)
    assert report.problems == [] and report.notes == []
    assert all(split.with_crs == split.files for split in report.splits.values())


def test_the_loaders_read_every_tile(data: Path) -> None:
    oem = [load_open_earth_map(data / "OpenEarthMap_wo_xBD", split) for split in ("train", "val")]
    assert [len(rows) for rows in oem] == [7, 1]
    assert len({row["region"] for row in oem[0]}) == 7
    sar = {split: load_open_earth_map_sar(data / "dfc25_track1", split) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in sar.items()} == {"train": 4, "val": 2, "test": 1}
    row = sar["train"][0]
    assert row["image_id"] == "TrainArea_001"
    assert (row["optical"].size, row["optical"].mode) == ((96, 96), "RGB")
    assert (row["sar"].size, row["sar"].mode) == ((96, 96), "L")
    assert all(row[column] is not None for row in sar["val"] for column in ("optical", "sar", "label"))


def test_exact_training_labels_are_in_a_folder_of_their_own(data: Path) -> None:
    extra = sorted(str(path.relative_to(data)) for path in (data / "dfc25_track1_extra").rglob("*.tif"))
    names = [f"train_clean_labels/TrainArea_00{n}.tif" for n in range(1, 5)]
    assert extra == sorted(f"dfc25_track1_extra/{name}" for name in names)
    clean, noisy = (
        read(data / folder / "TrainArea_001.tif")
        for folder in ("dfc25_track1_extra/train_clean_labels", "dfc25_track1/train/labels")
    )
    assert 0.02 < (clean != noisy).mean() < 0.6


def test_tiles_do_not_overlap_and_have_the_coordinates_of_their_label(data: Path) -> None:
    rows = scan_open_earth_map(data / "OpenEarthMap_wo_xBD").rows["train"]
    bounds = []
    for row in rows:
        with rasterio.open(row.files["image"]) as image, rasterio.open(row.files["label"]) as label:
            assert (image.crs, image.transform) == (label.crs, label.transform)
            assert 0.25 <= image.res[0] <= 0.6
            bounds.append((image.crs.to_epsg(), *image.bounds))
    assert len(set(bounds)) == len(rows)
    assert len({epsg for epsg, *_ in bounds}) == len({region.utm_zone for region in REGIONS})


def test_class_frequencies_are_those_of_real_scenes(tiles: list[Any]) -> None:
    frequencies = frequencies_of([tile.label for tile in tiles])
    assert frequencies[BACKGROUND] == 0
    assert np.abs(frequencies[1:] - FREQUENCIES).max() < 4  # percentage points


@pytest.mark.parametrize("name", REAL_SAR)
def test_sar_levels_of_a_class_are_those_of_real_scenes(tiles: list[Any], name: str) -> None:
    measured = calibrate.sar_statistics(tiles)[OPEN_EARTH_MAP.label2id[name]]
    assert (measured.mean, measured.std, measured.local_cv) == pytest.approx(REAL_SAR[name], rel=0.15)


def test_pooled_sar_levels_are_those_of_real_scenes(tiles: list[Any]) -> None:
    levels = np.concatenate([tile.sar.ravel() for tile in tiles])
    assert (levels.mean(), levels.std()) == pytest.approx((43.8, 26.8), rel=0.1)
    assert np.percentile(levels, (25, 50, 75, 95, 99)) == pytest.approx((26, 40, 56, 95, 136), rel=0.15)


def test_nodata_is_a_labelled_wedge_in_a_few_scenes(tiles: list[Any]) -> None:
    zeros = [(tile.sar == 0) for tile in tiles]
    wedges = [(zero, tile.label) for zero, tile in zip(zeros, tiles, strict=True) if zero.any()]
    assert 4 <= len(wedges) <= 30
    for zero, label in wedges:
        assert 0.01 < zero.mean() < 0.3
        assert label[zero].min() > BACKGROUND
        # beyond a straight edge: no row leaves and enters it again
        assert (np.abs(np.diff(zero.astype(int), axis=1)).sum(1) <= 1).all()


def test_noisy_labels_agree_with_the_exact_ones_as_published(tiles: list[Any]) -> None:
    counts = ConfusionMatrix()
    for tile in tiles:
        counts.update(tile.noisy, tile.label)
    agreement = (counts.matrix.diagonal() / np.maximum(counts.matrix.sum(1), 1))[1:]
    iou = [counts.compute()["iou"][name] for name in OPEN_EARTH_MAP.names[1:]]
    assert np.abs(agreement - AGREEMENT).max() < 0.1
    assert np.abs(np.subtract(iou, AGREEMENT_IOU)).max() < 0.13


def test_label_noise_is_not_salt_and_pepper(tiles: list[Any]) -> None:
    wrong = np.concatenate([(tile.noisy != tile.label)[None] for tile in tiles])
    neighbours = (wrong[:, 1:-1, :-2] + wrong[:, 1:-1, 2:] + wrong[:, :-2, 1:-1] + wrong[:, 2:, 1:-1]) > 0
    isolated = wrong[:, 1:-1, 1:-1] & ~neighbours
    assert isolated.sum() < 0.02 * wrong.sum()  # a third, if errors were independent


def error_ratio(labels: list[np.ndarray], noisy: list[np.ndarray]) -> float:
    """Return how much more often developed space is wrong in wide areas than in narrow ones."""
    where = [label == OPEN_EARTH_MAP.label2id["developed space"] for label in labels]
    density = np.concatenate([cv2.blur(w.astype(np.float32), (31, 31))[w] for w in where])  # developed space around
    wrong = np.concatenate([(a != b)[w] for a, b, w in zip(noisy, labels, where, strict=True)])
    return float(wrong[density > 0.95].mean() / wrong[(density > 0.4) & (density < 0.7)].mean())


def test_label_noise_depends_on_what_is_visible(tiles: list[Any]) -> None:
    """Wide areas are wrong more often than narrow ones, so that a network learns the errors."""
    assert error_ratio([tile.label for tile in tiles], [tile.noisy for tile in tiles]) > 1.5


def test_label_noise_has_an_amount_and_may_be_by_chance() -> None:
    wrong: dict[str, list[np.ndarray]] = {"none": [], "half": [], "full": [], "chance": []}
    labels = []
    noises = {"none": {"amount": 0}, "half": {"amount": 0.5}, "full": {}, "chance": {"systematic": 0}}
    for index in range(20):
        scene = Scene(7, "train", index, 192)
        *_, noise_rng = scene.generators()
        ground = scene.make_ground(scene.generators()[0])
        labels.append(ground.label)
        state = noise_rng.bit_generator.state
        for name, noise in noises.items():
            noise_rng.bit_generator.state = state
            wrong[name].append(corrupt_labels(noise_rng, ground.label, ground.parcel, ground.gsd, **noise))
    rate = {name: np.mean([(a != b).mean() for a, b in zip(maps, labels, strict=True)]) for name, maps in wrong.items()}
    assert rate["none"] == 0 and 0.4 * rate["full"] < rate["half"] < 0.7 * rate["full"]
    assert rate["chance"] == pytest.approx(rate["full"], rel=0.1)
    assert error_ratio(labels, wrong["chance"]) < 1.2 < 1.5 < error_ratio(labels, wrong["full"])


def test_histograms_of_pixels_and_windows_score_low_on_unseen_scenes(tiles: list[Any]) -> None:
    assert calibrate.difficulty(tiles, "level").mean() == pytest.approx(0.08, abs=0.05)
    assert calibrate.difficulty(tiles, "window").mean() == pytest.approx(0.11, abs=0.05)


def test_shadow_falls_behind_high_objects() -> None:
    height = np.zeros((40, 40), np.float32)
    height[18:22, 18:22] = 5
    frame = RayFrame(height.shape, 0.0)  # rays travel to the right
    shadow = frame.rotate_back((frame.shadow_depth(frame.rotate(height), 0.5) > 0.25).astype(np.float32)) > 0.5
    columns = np.flatnonzero(shadow[20])
    assert columns.min() >= 21 and columns.max() == pytest.approx(21 + 9, abs=1)  # 5 high at slope 0.5: 10 long
    assert not shadow[5].any()


@pytest.mark.parametrize("scale", [1.5, 4.0, 20.0])
def test_smooth_noise_is_standard_normal_over_many_fields(scale: float) -> None:
    rng = np.random.default_rng(0)
    fields = np.stack([smooth_noise(rng, (48, 48), scale) for _ in range(200)])
    assert fields.mean() == pytest.approx(0, abs=0.06)
    assert fields.std() == pytest.approx(1, abs=0.08)
    assert to_uniform(fields).mean() == pytest.approx(0.5, abs=0.02)


def test_a_large_scene_is_written_with_its_label_and_changes_no_tile(tmp_path: Path) -> None:
    sizes = {"source": 2, "train": 1, "val": 1, "test": 0, "size": 64}
    make_synthetic_dataset(tmp_path / "without", **sizes)
    make_synthetic_dataset(tmp_path / "with", **sizes, scene=640)
    files, others = files_of(tmp_path / "with"), files_of(tmp_path / "without")
    assert files.keys() - others.keys() == {"scene.tif", "scene_label.tif"}
    assert all(files[name] == content for name, content in others.items() if not name.endswith("dataset.json"))
    with rasterio.open(tmp_path / "with/scene.tif") as scene, rasterio.open(tmp_path / "with/scene_label.tif") as label:
        for file in (scene, label):
            assert (file.shape, file.count, file.dtypes[0]) == ((640, 640), 1, "uint8") and file.crs is not None
        assert (scene.crs, scene.transform) == (label.crs, label.transform)
        sar, truth = scene.read(1), label.read(1)
    assert truth.min() > BACKGROUND
    assert len(np.unique(truth)) >= 6  # styles of several regions
    assert (
        sar[truth == OPEN_EARTH_MAP.label2id["building"]].mean()
        > 1.1 * sar[truth == OPEN_EARTH_MAP.label2id["road"]].mean()
    )


@pytest.mark.parametrize(
    ("name", "value"), [("size", 32), ("scene", 10), ("train", 0), ("val", 0), ("source", 1), ("num_workers", 0)]
)
def test_a_value_out_of_range_is_an_error_that_names_it(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{name} must be at least \d+ and at most \S+; it is {value}"):
        make_synthetic_dataset(tmp_path / "data", **{name: value})
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_an_error_and_stays_unchanged(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run("--output", str(tmp_path), "--train", "1")
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path} exists; remove it or choose a new folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hf_seg.synthetic._write_lists", fail)
    with pytest.raises(FileError, match=r"data cannot be written \(disk full\)"):
        make_synthetic_dataset(tmp_path / "data", source=2, train=1, val=1, test=0, size=64)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_both_datasets(tmp_path: Path) -> None:
    numbers = ["--source", "2", "--train", "1", "--val", "1", "--test", "0", "--size", "64", "--num_workers", "1"]
    result = run("--output", str(tmp_path / "deep" / "data"), "--seed", "5", *numbers)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["data"]
    names = {path.name for path in (tmp_path / "deep" / "data").iterdir()}
    assert names == {"OpenEarthMap_wo_xBD", "dfc25_track1", "dfc25_track1_extra"}


def test_a_usage_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--outptu", "x"], "error: the following arguments are required: --output; --help lists the settings\n"),
        (["--output", "x", "--sise", "64"], "error: unknown setting '--sise'; did you mean '--size'?\n"),
        (["--output", "x", "--size", "32"], "error: size must be at least 64 and at most 32768; it is 32\n"),
        (["--output", str(tmp_path / "file" / "x"), "--size", "64"], "cannot be written (Not a directory)"),
    ):
        result = run(*arguments)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("folder", "layout", "labels"),
    [
        ("OpenEarthMap_wo_xBD", "OpenEarthMap", {"train": "exact", "val": "exact"}),
        (
            "dfc25_track1",
            "OpenEarthMap-SAR",
            {"train": "simulated noisy labels", "val": "exact", "test": "exact"},
        ),
    ],
)
def test_each_dataset_says_what_it_is(data: Path, folder: str, layout: str, labels: dict[str, str]) -> None:
    provenance = read_provenance(data / folder, layout)
    assert provenance["name"].startswith("hf_seg synthetic dataset")
    assert (provenance["synthetic"], provenance["released"], provenance["license"]) == (True, False, "Apache-2.0")
    assert provenance["labels"] == labels and provenance["description"].endswith(".")
    settings = json.loads((data / folder / "dataset.json").read_text())["settings"]
    assert settings == {"seed": 3, **SIZES, "size": 96, "scene": None, "label_noise": 1.0, "systematic": 0.97}


def test_every_scene_has_its_own_random_stream() -> None:
    draws = {(kind, i): Scene(0, kind, i, 64).generators()[0].random() for kind in KINDS for i in range(3)}
    assert len(set(draws.values())) == len(draws)


def test_statistics_and_figure_compare_with_other_scenes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = str(data / "dfc25_track1")
    calibrate.main(["statistics", "--data", str(data), "--real", real])
    printed = capsys.readouterr().out
    assert "synthetic: 6 scenes" in printed and "real: 6 scenes" in printed
    assert printed.count("mIoU of the window histogram on unseen scenes") == 2
    calibrate.main(["figure", "--data", str(data), "--real", real, "--output", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_networks_are_trained_and_scored(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    difficulty.main(["networks", "--data", str(data), "--steps", "2", "--runs", "sar_noisy"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "sar_noisy: 4 scenes, 2 steps" and second.startswith("unseen SAR (2): mIoU 0.")


def lost_points(printed: str) -> float:
    """Check the last four lines that `resolution` prints, and return the points lost."""
    sharp, coarse, lost, per_class = printed.splitlines()[-4:]
    scores = [float(line.split("mIoU ")[1][:5]) for line in (sharp, coarse)]
    assert sharp.startswith("sharp: mIoU 0.") and coarse.startswith("coarse: mIoU 0.")
    points = float(lost.removeprefix("lost on coarse images: ").removesuffix(" points of mIoU"))
    assert points == pytest.approx(100 * (scores[0] - scores[1]), abs=0.15)
    each = [float(part.rsplit(" ", 1)[1]) for part in per_class.removeprefix("lost IoU: ").split(", ")]
    assert np.mean(each) == pytest.approx(points, abs=0.15)
    return points


def test_resolution_is_measured_on_scenes_that_differ_in_nothing_else(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])
    ConvNextV2Model(config).save_pretrained(tmp_path / "encoder")
    command = ["resolution", "--data", str(data), "--steps", "2", "--scenes", "2"]
    lost = []
    for model in ([], ["--model_name_or_path", str(tmp_path / "encoder")]):
        difficulty.main([*command, *model])
        printed = capsys.readouterr().out
        assert printed.startswith("optical: 7 scenes, 2 steps\n")
        lost.append(lost_points(printed))
    assert lost[0] != lost[1]


def test_resolution_of_real_tiles_is_measured_on_the_half_that_was_not_seen(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = []

    def record(images: Any, options: Any) -> Any:
        folds.append(images)
        return train(images, options)

    train = difficulty.train_network
    monkeypatch.setattr(difficulty, "train_network", record)
    difficulty.main(["resolution", "--source_dir", str(data / "OpenEarthMap_wo_xBD"), "--steps", "2"])
    printed = capsys.readouterr().out
    assert printed.count("optical: 8 scenes, 2 steps\n") == 2
    lost_points(printed)
    left, right = ([images[index].image for index in range(8)] for images in folds)
    rows = scan_open_earth_map(data / "OpenEarthMap_wo_xBD").rows
    tile = np.moveaxis(read(Path(rows["train"][0].files["image"])), 0, -1)
    assert np.array_equal(np.hstack([left[0], right[0]]), tile)


def test_a_coarse_image_differs_from_a_sharp_one_in_resolution_only() -> None:
    images = []
    for coarse_prob in (0.0, 1.0):
        ground_rng, optical_rng, *_ = (scene := Scene(0, "test", 0, 96)).generators()
        camera = replace(TARGET_CAMERA, coarse_prob=coarse_prob, noise=0.0)
        images.append(render_optical(optical_rng, scene.make_ground(ground_rng), camera).astype(np.float32))
    sharp, coarse = images
    assert coarse.mean((1, 2)) == pytest.approx(sharp.mean((1, 2)), abs=1)
    assert np.abs(np.diff(coarse)).mean() < 0.7 * np.abs(np.diff(sharp)).mean()


def test_resolution_needs_labelled_tiles(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(data / "OpenEarthMap_wo_xBD", tmp_path / "oem")
    for split in ("train", "val"):
        (tmp_path / "oem" / f"{split}.txt").write_text("")
    with pytest.raises(SystemExit, match="2"):
        difficulty.main(["resolution", "--source_dir", str(tmp_path / "oem"), "--steps", "2"])
    assert capsys.readouterr().err.endswith("oem: no tile of train or val is labelled\n")


def test_furrows_tell_fields_from_grass_in_sharp_images_only() -> None:
    """What resolution alignment is tested on: colours stay in a coarse image, texture at 2 to 5 pixels does not."""
    energy: dict[tuple[float, int], list[np.ndarray]] = {}
    for index in (1, 6, 11, 16, 21, 26):
        for coarse_prob in (0.0, 1.0):
            ground_rng, optical_rng, *_ = (scene := Scene(7, "test", index, 192)).generators()
            ground = scene.make_ground(ground_rng)
            camera = replace(TARGET_CAMERA, coarse_prob=coarse_prob, noise=0.0)
            grey = render_optical(optical_rng, ground, camera).astype(np.float32).mean(0)
            texture = (grey - cv2.GaussianBlur(grey, (0, 0), 1.2)) / cv2.blur(grey, (9, 9))
            for name in ("rangeland", "agriculture land"):
                inside = (ground.crop(ground.label) == OPEN_EARTH_MAP.label2id[name]).astype(np.uint8)
                inside = cv2.erode(inside, np.ones((9, 9), np.uint8)) > 0
                energy.setdefault((coarse_prob, OPEN_EARTH_MAP.label2id[name]), []).append(texture[inside] ** 2)
    grass, field = OPEN_EARTH_MAP.label2id["rangeland"], OPEN_EARTH_MAP.label2id["agriculture land"]
    rms = {key: float(np.sqrt(np.concatenate(parts).mean())) for key, parts in energy.items()}
    assert rms[0.0, field] > 1.3 * rms[0.0, grass]
    assert rms[1.0, field] < 1.1 * rms[1.0, grass]
    assert rms[1.0, field] < 0.4 * rms[0.0, field]


def write_pseudo_labels(folder: Path, shape: tuple[int, int], count: int) -> Path:
    label = np.full(shape, OPEN_EARTH_MAP.label2id["water"], np.uint8)
    label[0] = IGNORE_INDEX
    counts = np.bincount(label[1:].ravel(), minlength=OPEN_EARTH_MAP.num_labels)
    names = [f"TrainArea_{number:03d}" for number in range(1, count + 1)]
    confidence = np.ones(shape, np.float32)
    tiles = [LabelledTile(name, label, confidence, counts, counts, {"no data": shape[1]}) for name in names]
    (folder / "data").mkdir(parents=True)
    write_shard(folder / "data/train-00000-of-00001.parquet", tiles)
    return folder


def test_pseudo_labels_replace_the_training_labels(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "dfc25_track1"
    shutil.copytree(data / "dfc25_track1", root)
    labels = write_pseudo_labels(tmp_path / "labels", (96, 96), 4)
    replacing.main(["--data_dir", str(root), "--pseudo_labels", str(labels)])
    before, after = files_of(data / "dfc25_track1"), files_of(root)
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed == {"dataset.json", *(f"train/labels/TrainArea_00{n}.tif" for n in range(1, 5))}
    replaced = read(root / "train/labels/TrainArea_002.tif")
    assert (replaced[0] == BACKGROUND).all() and (replaced[1:] == OPEN_EARTH_MAP.label2id["water"]).all()
    paths = [root / "train" / folder / "TrainArea_002.tif" for folder in ("labels", "sar_images")]
    with rasterio.open(paths[0]) as label, rasterio.open(paths[1]) as sar:
        assert (label.crs, label.transform) == (sar.crs, sar.transform)
    assert read_provenance(root, "OpenEarthMap-SAR")["labels"] == {
        "train": "predicted by a network trained on the source",
        "val": "exact",
        "test": "exact",
    }


@pytest.mark.parametrize(
    ("shape", "count", "synthetic", "message"),
    [
        ((96, 96), 3, True, "has no pseudo-label of TrainArea_004; label the whole train split"),
        ((90, 96), 4, True, "the pseudo-label of TrainArea_001 has another size than its tile"),
        ((96, 96), 4, False, "is not a synthetic dataset; other labels are never replaced"),
    ],
)
def test_labels_are_not_replaced_by_unsuitable_ones(
    data: Path, tmp_path: Path, shape: tuple[int, int], count: int, synthetic: bool, message: str
) -> None:
    root = tmp_path / "dfc25_track1"
    shutil.copytree(data / "dfc25_track1", root)
    if not synthetic:
        (root / "dataset.json").unlink()
    before = files_of(root)
    with pytest.raises(UserError, match=message):
        replacing.replace_labels(root, write_pseudo_labels(tmp_path / "labels", shape, count))
    assert files_of(root) == before


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (calibrate, ["statistics"], "the following arguments are required: --data"),
        (
            calibrate,
            ["statistics", "--data", "missing"],
            "--data missing has no folder OpenEarthMap_wo_xBD; make a dataset with",
        ),
        (difficulty, ["networks", "--data", "missing"], "--data missing has no folder OpenEarthMap_wo_xBD; make a"),
        (difficulty, ["networks", "--data", "DATA", "--steps", "1"], "--steps must be at least 2; it is 1"),
        (difficulty, ["resolution"], "one of the arguments --data --source_dir is required"),
        (difficulty, ["resolution", "--source_dir", "missing"], "missing does not exist"),
        (calibrate, ["figure", "--data", "DATA", "--real", "missing", "--output", "x.png"], "missing does not exist"),
    ],
)
def test_a_mistake_in_the_calibration_is_one_line(
    script: Any, data: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([str(data) if word == "DATA" else word for word in arguments])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
