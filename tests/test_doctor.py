"""The doctor: counts that can be checked by hand, and every problem listed."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiff

from hf_seg.data.doctor import SHOWN, examine
from hf_seg.data.scan import XBD_HINT
from hf_seg.errors import DatasetError
from hf_seg.labels import OPEN_EARTH_MAP

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

IMAGE = np.full((3, 20, 10), 7, np.uint8)


def make_oem(root: Path) -> Path:
    """Three training tiles of two regions: half of all label pixels is water (6), half building (8)."""
    for name in ("oslo_1", "oslo_2", "al_qurnah_1"):
        label = np.full((20, 10), 6, np.uint8)
        label[10:] = 8
        region = root / name.rpartition("_")[0]
        write_tiff(region / "images" / f"{name}.tif", IMAGE, crs="EPSG:32633")
        write_tiff(region / "labels" / f"{name}.tif", label)
    (root / "train.txt").write_text("oslo_1.tif\noslo_2.tif\nal_qurnah_1.tif\n")
    return root


def make_sar(root: Path, count: int = 2) -> Path:
    """Tiles whose SAR is zero in one row of twenty."""
    for number in range(1, count + 1):
        sar = np.full((20, 10), 40, np.uint8)
        sar[0] = 0
        write_tiff(root / f"train/sar_images/TrainArea_{number:03d}.tif", sar)
        write_tiff(root / f"train/rgb_images/TrainArea_{number:03d}.tif", IMAGE)
    return root


def test_healthy_open_earth_map_is_counted_and_has_no_problems(tmp_path: Path):
    report = examine(make_oem(tmp_path))
    train = report.splits["train"]
    assert report.problems == []
    assert (report.kind, train.rows, train.labelled, train.files, train.with_crs) == ("OpenEarthMap", 3, 3, 6, 3)
    assert train.regions == {"oslo": 2, "al_qurnah": 1}
    assert train.shapes == {"20 x 10": 6}
    assert train.dtypes == {"image 3 x uint8": 3, "label 1 x uint8": 3}
    assert [*train.class_percent.values()] == [0, 0, 0, 0, 0, 0, 50, 0, 50]


def test_sar_zeros_are_counted_and_a_missing_modality_is_no_problem(tmp_path: Path):
    report = examine(make_sar(tmp_path))
    train = report.splits["train"]
    assert (report.kind, report.problems, report.notes) == ("OpenEarthMap-SAR", [], [])
    assert (train.rows, train.labelled, train.files, train.sar_zero_percent) == (2, 0, 4, 5.0)
    assert train.class_pixels.tolist() == [0] * len(OPEN_EARTH_MAP.names)


def test_every_bad_file_is_listed_and_the_good_ones_are_still_counted(tmp_path: Path):
    root = make_oem(tmp_path)
    (root / "oslo/images/oslo_1.tif").write_text("<html>")
    write_tiff(root / "oslo/labels/oslo_2.tif", np.full((20, 10), 255, np.uint8))
    write_tiff(root / "al_qurnah/labels/al_qurnah_1.tif", np.full((5, 10), 1, np.uint8))
    report = examine(root, num_workers=2)
    patterns = [r"al_qurnah_1: expected one height", r"oslo_1\.tif: .*<html>", r"oslo_2\.tif: expected ids 0\.\.8"]
    assert len(report.problems) == len(patterns)
    for problem, pattern in zip(report.problems, patterns, strict=True):
        assert re.search(pattern, problem)
    train = report.splits["train"]
    assert (train.rows, train.files, sum(train.shapes.values())) == (3, 6, 5)
    assert train.class_pixels[1] == 50
    assert train.class_pixels[6] == 100


def test_data_type_of_a_bad_file_is_in_the_histogram(tmp_path: Path):
    root = make_oem(tmp_path)
    write_tiff(root / "oslo/images/oslo_1.tif", IMAGE.astype(np.uint16))
    assert examine(root).splits["train"].dtypes["image 3 x uint16"] == 1


def test_missing_xbd_images_are_a_note_that_says_where_to_get_them(tmp_path: Path):
    root = make_oem(tmp_path)
    (root / "oslo/images/oslo_1.tif").unlink()
    (root / "xbd_files.csv").write_text("quake_1.png,oslo_1.tif\n")
    report = examine(root)
    assert report.problems == []
    assert report.notes[0] == "train: 1 x image from xBD, not in the release (e.g. oslo_1)"
    assert report.notes[-1] == XBD_HINT


def test_split_without_a_usable_tile_is_a_problem_that_says_why(tmp_path: Path):
    root = make_sar(tmp_path)
    (root / "train/labels").mkdir()
    assert examine(root).problems == [
        f"{root}: no usable tile",
        "split 'train' has no usable tile: 2 x no file in train/labels (e.g. TrainArea_001)",
    ]


def test_text_shows_counts_shares_and_at_most_twenty_problems(tmp_path: Path):
    root = make_sar(tmp_path, count=SHOWN + 3)
    for path in (root / "train/sar_images").iterdir():
        path.write_bytes(b"")
    report = examine(root)
    text = str(report)
    assert len(report.problems) == SHOWN + 3
    assert text.count("expected a complete GeoTIFF") == SHOWN
    assert text.endswith("- and 3 more")
    healthy = str(examine(make_oem(tmp_path / "oem"))).splitlines()
    assert ["train", "3", "3", "6", "3", "0", "2", "-"] in [line.split() for line in healthy]
    assert "train regions: oslo (2), al_qurnah (1)" in healthy
    assert healthy[-1] == "no problems"


def test_report_survives_json(tmp_path: Path):
    restored = json.loads(json.dumps(examine(make_oem(tmp_path)).as_dict()))
    assert restored["problems"] == []
    assert restored["splits"]["train"]["regions"] == {"oslo": 2, "al_qurnah": 1}
    assert restored["splits"]["train"]["class_percent"]["water"] == 50


def test_threads_neither_change_the_report_nor_leak_warnings(tmp_path: Path):
    root = make_sar(tmp_path, count=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SAR tiles without georeference make rasterio warn
        filters = list(warnings.filters)
        assert examine(root, num_workers=4).as_dict() == examine(root, num_workers=1).as_dict()
        assert warnings.filters == filters


def test_folder_of_neither_or_both_datasets_is_one_error(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"(?s)for OpenEarthMap_wo_xBD.*for dfc25_track1"):
        examine(tmp_path)
    make_oem(tmp_path / "oem")
    make_sar(tmp_path / "sar")
    with pytest.raises(DatasetError, match=r"contains OpenEarthMap in .*oem and OpenEarthMap-SAR in .*sar: check one"):
        examine(tmp_path)


@pytest.mark.parametrize(("name", "rows"), [("OpenEarthMap_wo_xBD", (9, 2, 1)), ("dfc25_track1", (5, 1, 0))])
def test_real_samples_are_healthy(realdata: Path, name: str, rows: tuple[int, ...]):
    report = examine(realdata / name)
    assert report.problems == []
    assert tuple(split.rows for split in report.splits.values()) == rows
