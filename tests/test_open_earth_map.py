"""The datasets: layouts, missing tiles, content checks, cache. All tiles are GeoTIFFs, made here or real."""

import errno
import logging
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import rasterio
from conftest import write_tiff

from hf_seg.data import open_earth_map
from hf_seg.data.open_earth_map import load_open_earth_map, load_open_earth_map_sar
from hf_seg.data.scan import FROM_XBD, SAR_FOLDERS, SPLITS, Scan, scan_open_earth_map, scan_open_earth_map_sar
from hf_seg.data.tile_files import read_tile
from hf_seg.errors import DatasetError, FileError
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.studies.images import read_image

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def random_tile(seed: int, bands: int, high: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (bands, size, size), dtype=np.uint8)


def write_pair(root: Path, name: str, seed: int = 0, extension: str = ".tif", label: bool = True) -> None:
    """Write image and label `name` of OpenEarthMap under their region."""
    region = root / name.rpartition("_")[0]
    write_tiff(region / "images" / f"{name}{extension}", random_tile(seed, 3, 256))
    if label:
        write_tiff(region / "labels" / f"{name}{extension}", random_tile(seed + 1, 1, OPEN_EARTH_MAP.num_labels))


def make_oem(root: Path) -> Path:
    """Four training pairs, one validation pair, one test image without label."""
    for seed, name in enumerate(("al_qurnah_2", "al_qurnah_10", "kujawsko-pomorskie_1", "aachen_1000", "tonga_1")):
        write_pair(root, name, 10 * seed)
    write_pair(root, "tonga_2", 90, label=False)
    training = ("al_qurnah_10", "al_qurnah_2", "kujawsko-pomorskie_1", "aachen_1000")
    (root / "train.txt").write_text("".join(f"{name}.tif\n" for name in training))
    (root / "val.txt").write_text("tonga_1.tif\n")
    (root / "test.txt").write_text("tonga_2.tif")
    return root


def make_sar(root: Path, names: tuple[str, ...] = ("TrainArea_999", "TrainArea_1000"), split: str = "train") -> Path:
    for seed, name in enumerate(names):
        write_tiff(root / split / "sar_images" / f"{name}.tif", random_tile(seed, 1, 256))
        write_tiff(root / split / "rgb_images" / f"{name}.tif", random_tile(seed, 3, 256))
        write_tiff(root / split / "labels" / f"{name}.tif", random_tile(seed, 1, OPEN_EARTH_MAP.num_labels))
    return root


def missing_from(scan: Scan) -> dict[tuple[str | None, str], list[str]]:
    return {(each.split, each.reason): each.names for each in scan.missing}


def pixels_of(dataset: Any) -> list[dict[str, Any]]:
    """Decode every image to a nested list, so that rows compare with ==."""
    return [
        {name: np.asarray(value).tolist() if hasattr(value, "size") else value for name, value in row.items()}
        for row in dataset
    ]


# --- layouts


@pytest.mark.parametrize("nesting", [".", "OpenEarthMap_wo_xBD", "OpenEarthMap/OpenEarthMap_wo_xBD", "data/copy"])
def test_root_is_found_at_any_of_three_depths(tmp_path: Path, nesting: str):
    root = make_oem(tmp_path / "download" / nesting)
    assert scan_open_earth_map(tmp_path / "download").root == root


@pytest.mark.parametrize("nesting", [".", "dfc25_track1", "data/copy"])
def test_sar_root_is_found_at_any_of_three_depths(tmp_path: Path, nesting: str):
    root = make_sar(tmp_path / "download" / nesting)
    assert scan_open_earth_map_sar(str(tmp_path / "download")).root == root


def test_two_equally_deep_roots_are_an_error_that_names_both(tmp_path: Path):
    make_sar(tmp_path / "one")
    make_sar(tmp_path / "two")
    with pytest.raises(DatasetError, match=r"several folders fit.*one, .*two"):
        scan_open_earth_map_sar(tmp_path)


def test_rows_are_in_natural_order_with_region_up_to_the_last_underscore(tmp_path: Path):
    dataset = load_open_earth_map(make_oem(tmp_path), "train")
    assert list(zip(dataset["image_id"], dataset["region"], strict=True)) == [
        ("aachen_1000", "aachen"),
        ("al_qurnah_2", "al_qurnah"),
        ("al_qurnah_10", "al_qurnah"),
        ("kujawsko-pomorskie_1", "kujawsko-pomorskie"),
    ]


def test_pixels_are_those_of_the_files(tmp_path: Path):
    row = load_open_earth_map(make_oem(tmp_path), "train")[1]
    assert np.array_equal(np.moveaxis(np.asarray(row["image"]), -1, 0), random_tile(0, 3, 256))
    assert np.array_equal(np.asarray(row["label"]), random_tile(1, 1, OPEN_EARTH_MAP.num_labels)[0])


def test_withheld_test_label_is_none_and_not_missing(tmp_path: Path):
    root = make_oem(tmp_path)
    assert load_open_earth_map(root, "test")[0]["label"] is None
    assert scan_open_earth_map(root).missing == []


def test_lists_may_have_crlf_blank_lines_and_a_byte_order_mark(tmp_path: Path):
    root = make_oem(tmp_path)
    expected = scan_open_earth_map(root).rows
    names = (root / "train.txt").read_text().split()
    (root / "train.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(names).encode() + b"\r\n \r\n")
    scan = scan_open_earth_map(root)
    assert scan.rows == expected
    assert scan.missing == []


def test_extension_may_be_of_any_case_and_hidden_files_are_skipped(tmp_path: Path):
    (tmp_path / "train.txt").write_text("oslo_1.tif\noslo_2.tif\noslo_3.tif\n")
    for index, extension in enumerate((".TIF", ".tiff", ".tif")):
        write_pair(tmp_path, f"oslo_{index + 1}", extension=extension)
    (tmp_path / "oslo/images/._oslo_1.tif").write_bytes(b"resource fork")
    (tmp_path / "oslo/images/oslo_1.tif.aux.xml").write_text("<PAMDataset/>")
    assert load_open_earth_map(tmp_path, "train")["image_id"][:] == ["oslo_1", "oslo_2", "oslo_3"]


def test_two_files_with_the_same_stem_are_an_error_that_names_both(tmp_path: Path):
    root = make_oem(tmp_path)
    write_pair(root, "tonga_1", extension=".tiff")
    with pytest.raises(DatasetError, match=r"tonga_1\.tif.* have the same image_id"):
        scan_open_earth_map(root)


def test_every_reason_for_a_missing_tile_is_counted_and_none_is_fatal(tmp_path: Path):
    root = make_oem(tmp_path)
    write_pair(root, "tonga_3", label=False)
    write_pair(root, "tonga_4")
    for name in ("oslo_1", "oslo_2"):
        write_tiff(root / f"oslo/labels/{name}.tif", random_tile(0, 1, OPEN_EARTH_MAP.num_labels))
    (root / "paris/images").mkdir(parents=True)
    (root / "xbd_files.csv").write_bytes(b"quake_0001_pre_disaster.png,oslo_1.tif\r\n")
    names = ["tonga_3", "oslo_1", "oslo_2", "rome_7", "al_qurnah_2", "al_qurnah_2", "tonga_1"]
    (root / "train.txt").write_text("\n".join(f"{name}.tif" for name in names))
    scan = scan_open_earth_map(root)
    assert [row.image_id for row in scan.rows["train"]] == ["al_qurnah_2", "tonga_1"]
    assert scan.rows["val"] == []
    assert missing_from(scan) == {
        ("train", FROM_XBD): ["oslo_1"],
        ("train", "label without image"): ["oslo_2"],
        ("train", "image without label"): ["tonga_3"],
        ("train", "listed but not on disk"): ["rome_7"],
        ("train", "listed twice"): ["al_qurnah_2"],
        ("val", "listed in an earlier split too"): ["tonga_1"],
        (None, "on disk but in no split list"): ["aachen_1000", "al_qurnah_10", "kujawsko-pomorskie_1", "tonga_4"],
        (None, "region folder without tiles"): ["paris"],
    }


def test_absent_sar_folder_is_a_missing_modality_and_an_absent_file_a_missing_tile(tmp_path: Path):
    root = make_sar(tmp_path, ("TrainArea_001", "TrainArea_002", "TrainArea_003"))
    write_tiff(root / "val/sar_images/ValArea_001.tif", random_tile(0, 1, 256))
    (root / "train/labels/TrainArea_001.tif").unlink()
    (root / "train/sar_images/TrainArea_003.tif").unlink()
    scan = scan_open_earth_map_sar(root)
    assert [row.image_id for row in scan.rows["train"]] == ["TrainArea_002"]
    assert missing_from(scan) == {
        ("train", "no file in train/labels"): ["TrainArea_001"],
        ("train", "no file in train/sar_images"): ["TrainArea_003"],
    }
    row = load_open_earth_map_sar(root, "val")[0]
    assert (row["optical"], row["label"], row["sar"].mode) == (None, None, "L")


def test_sar_numbers_of_three_and_four_digits_sort_by_value(tmp_path: Path):
    dataset = load_open_earth_map_sar(make_sar(tmp_path), "train")
    assert dataset["image_id"][:] == ["TrainArea_999", "TrainArea_1000"]
    assert dataset.column_names == ["image_id", "optical", "sar", "label"]


def test_official_lists_give_the_published_counts(tmp_path: Path, realdata: Path):
    lists = realdata / "oem_splits"
    for path in lists.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stems = {split: (lists / f"{split}.txt").read_text().replace(".tif", "").split() for split in SPLITS}
    from_xbd = {line.split(",")[1].removesuffix(".tif") for line in (lists / "xbd_files.csv").read_text().splitlines()}
    for split, names in stems.items():
        for name in names:
            region = tmp_path / name.rpartition("_")[0]
            for kind, present in (("images", name not in from_xbd), ("labels", split != "test")):
                (region / kind).mkdir(parents=True, exist_ok=True)
                if present:
                    (region / kind / f"{name}.tif").touch()
    scan = scan_open_earth_map(tmp_path)
    assert len(from_xbd) == 1162
    assert {split: len(rows) for split, rows in scan.rows.items()} == {"train": 2303, "val": 384, "test": 1500 - 349}
    assert {each.split: len(each.names) for each in scan.missing if each.reason == FROM_XBD} == {
        "train": 697,
        "val": 116,
        "test": 349,
    }
    assert {each.reason for each in scan.missing} <= {FROM_XBD, "region folder without tiles"}


def test_real_samples_load_with_their_counts(realdata: Path):
    for split, count in (("train", 9), ("val", 2), ("test", 1)):
        assert len(load_open_earth_map(realdata, split)) == count
    assert len(load_open_earth_map_sar(realdata, "train")) == 5
    val = load_open_earth_map_sar(realdata, "val")[0]
    assert val["optical"] is None
    assert val["sar"].size == val["label"].size == (576, 576)


def test_name_that_is_not_utf8_is_a_missing_tile(tmp_path: Path):
    root = make_oem(tmp_path)
    (root / "val.txt").write_bytes(b"tonga_1.tif\nk\xf6ln_1.tif\n")
    assert [row.image_id for row in scan_open_earth_map(root).rows["val"]] == ["tonga_1"]
    assert missing_from(scan_open_earth_map(root)) == {("val", "listed but not on disk"): ["k\ufffdln_1"]}


# --- contents of the files


@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"interleave": "band"}])
@pytest.mark.parametrize("compress", ["none", "lzw", "deflate", "zstd", "packbits"])
def test_every_common_encoding_decodes_to_the_written_pixels(tmp_path: Path, compress: str, options: dict[str, Any]):
    predictor = {"predictor": 2} if compress in ("lzw", "deflate", "zstd") else {}
    written = {"optical": random_tile(0, 3, 256), "sar": random_tile(1, 1, 256), "label": random_tile(2, 1, 9)}
    for column, folder in SAR_FOLDERS.items():
        path = tmp_path / "train" / folder / "TrainArea_001.tif"
        write_tiff(path, written[column], compress=compress, **options, **predictor)
    row = next(iter(load_open_earth_map_sar(tmp_path, "train", streaming=True)))
    for column, pixels in written.items():
        assert np.array_equal(np.moveaxis(np.atleast_3d(np.asarray(row[column])), -1, 0), pixels), column


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Too many requests</html>")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def one_bit(path: Path) -> None:
    write_tiff(path, random_tile(0, 1, 2), nbits=1)


def sixteen_bit(path: Path) -> None:
    write_tiff(path, random_tile(0, 3, 256).astype(np.uint16))


def four_bands(path: Path) -> None:
    write_tiff(path, random_tile(0, 4, 256))


def ignore_index_in_file(path: Path) -> None:
    write_tiff(path, np.full((1, 32, 32), 255, np.uint8))


def smaller(path: Path) -> None:
    write_tiff(path, random_tile(0, 1, 9, size=16))


def colour_table(path: Path) -> None:
    write_tiff(path, random_tile(0, 1, 9), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {index: (28 * index, 0, 200, 255) for index in range(9)})


def unknown_to_pillow(path: Path) -> None:
    write_tiff(path, random_tile(0, 1, 9), compress="lerc")


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        (
            "images",
            html,
            r"expected a complete GeoTIFF, found b'<!DOCTYPE html>.*Download it again.*prepare_data\.py check",
        ),
        ("labels", truncate, r"expected a complete GeoTIFF, found b'II.*Download it again"),
        ("images", empty, r"expected a complete GeoTIFF, found b''"),
        ("images", sixteen_bit, r"expected bands 3 x uint8 \(image\), found 3 x uint16.*gdal_translate"),
        ("images", four_bands, r"expected bands 3 x uint8 \(image\), found 4 x uint8"),
        ("labels", ignore_index_in_file, r"expected ids 0\.\.8, found 255.*unknown is 0"),
        ("labels", one_bit, r"Pillow and GDAL decode different pixels"),
        ("labels", smaller, r"expected one height and width, found .*images.* 32 x 32, .*labels.* 16 x 16"),
        ("labels", colour_table, r"Pillow and GDAL decode different pixels.*gdal_translate"),
        ("labels", unknown_to_pillow, r"Pillow cannot decode this TIFF.*gdal_translate"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path: Path, kind: str, spoil: Callable[[Path], None], message: str):
    path = make_oem(tmp_path) / "al_qurnah" / kind / "al_qurnah_10.tif"
    spoil(path)
    with pytest.raises(DatasetError, match=message) as caught:
        load_open_earth_map(tmp_path, "train")
    assert str(path) in str(caught.value)
    assert caught.value.__suppress_context__


def lying_tiff(width: int, height: int, **tags: int) -> bytes:
    """Return a grey TIFF of one strip whose header claims any size."""
    entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 64}
    entries |= {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return struct.pack("<2sHI", b"II", 42, 72) + bytes(64) + struct.pack("<H", len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lying_tiff(10**9, 10**9), "1,000,000,000 x 1,000,000,000 pixels in one piece"),
        (lying_tiff(10**5, 10**5, tag273=0, tag279=0, tag278=100), "100,000 x 100,000 pixels in one piece"),
    ],
    ids=["cut", "sparse"],
)
def test_header_that_claims_more_than_memory_is_refused_before_a_pixel_is_read(
    tmp_path: Path, content: bytes, message: str
):
    path = tmp_path / "tile.tif"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"tile\.tif: its header says {message}"):
        read_tile(str(path), "sar")
    with pytest.raises(DatasetError, match=rf"tile\.tif: its header says {message}"):
        read_image(path)


@pytest.mark.parametrize("line", ["9" * 5000, "a" * 200_000], ids=["digits", "letters"])
def test_endless_name_in_a_split_list_is_no_crash(tmp_path: Path, line: str):
    root = make_oem(tmp_path)
    (root / "train.txt").write_text(f"{line}\nal_qurnah_2.tif\n")
    if line.startswith("a"):
        with pytest.raises(DatasetError, match=r"train\.txt: expected a file name in each line"):
            scan_open_earth_map(root)
    else:
        scan = scan_open_earth_map(root)
        assert [row.image_id for row in scan.rows["train"]] == ["al_qurnah_2"]
        assert f"e.g. {'9' * 255})" in scan.describe_missing("train")


def test_file_name_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path):
    root = make_sar(tmp_path)
    (root / "train/sar_images" / os.fsdecode(b"Tile_\xff.tif")).touch()
    with pytest.raises(DatasetError, match=r"Tile_.*its name has letters that cannot be printed; rename it"):
        scan_open_earth_map_sar(root)


def test_control_letters_in_a_split_list_stay_out_of_the_message(tmp_path: Path):
    root = make_oem(tmp_path)
    (root / "train.txt").write_text("a\x1eb\nal_qurnah_2.tif\n")
    assert "(e.g. a?b)" in scan_open_earth_map(root).describe_missing("train")


def test_bad_file_of_another_split_does_no_harm(tmp_path: Path):
    html(make_oem(tmp_path) / "tonga/images/tonga_1.tif")
    assert len(load_open_earth_map(tmp_path, "train")) == 4


def test_bad_file_stops_a_stream_where_it_lies(tmp_path: Path):
    html(make_oem(tmp_path) / "al_qurnah/images/al_qurnah_10.tif")
    rows = iter(load_open_earth_map(tmp_path, "train", streaming=True))
    assert [next(rows)["image_id"], next(rows)["image_id"]] == ["aachen_1000", "al_qurnah_2"]
    with pytest.raises(DatasetError, match="al_qurnah_10"):
        next(rows)


# --- wrong calls


def test_absent_folder_wrong_folder_archive_and_unknown_split_say_what_was_looked_for(tmp_path: Path):
    (tmp_path / "OpenEarthMap.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match=r"nowhere does not exist; looked for OpenEarthMap_wo_xBD"):
        load_open_earth_map(tmp_path / "nowhere", "train")
    with pytest.raises(DatasetError, match=r"zip is a file: unpack it"):
        load_open_earth_map(tmp_path / "OpenEarthMap.zip", "train")
    with pytest.raises(DatasetError, match=r"two levels below for dfc25_track1, a folder with train/sar_images"):
        load_open_earth_map_sar(tmp_path, "train")
    with pytest.raises(DatasetError, match=r"unknown split 'validation': choose one of train, val, test"):
        load_open_earth_map(tmp_path, "validation")


def test_empty_split_says_why(tmp_path: Path):
    root = make_oem(tmp_path / "oem")
    (root / "val.txt").unlink()
    with pytest.raises(
        DatasetError, match=r"'val' has no usable tile; found 1 x split list not found \(e.g. val.txt\)"
    ):
        load_open_earth_map(root, "val")
    (root / "tonga/images/tonga_2.tif").unlink()
    (root / "xbd_files.csv").write_text("x.png,tonga_2.tif\n")
    with pytest.raises(DatasetError, match=r"'test' has no usable tile; found 1 x image from xBD.*https://xview2\.org"):
        load_open_earth_map(root, "test")
    sar = make_sar(tmp_path / "sar")
    for path in (sar / "train/sar_images").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"'train' has no usable tile; found 2 x no file in train/sar_images"):
        load_open_earth_map_sar(sar, "train")
    shutil.rmtree(sar / "train/sar_images")
    (sar / "val/sar_images").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"'train' has no usable tile; found 2 x no file in train/sar_images"):
        load_open_earth_map_sar(sar, "train")
    with pytest.raises(DatasetError, match=r"'test' has no usable tile; found no file of it"):
        load_open_earth_map_sar(sar, "test")


def test_one_summary_per_load_warns_only_of_missing_tiles(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, logger=open_earth_map.__name__)
    root = make_oem(tmp_path)
    load_open_earth_map(root, "train")
    (root / "al_qurnah/labels/al_qurnah_2.tif").unlink()
    load_open_earth_map(root, "train")
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert levels == [
        ("DEBUG", f"OpenEarthMap: 4 train tiles in {root}; missing: none"),
        ("WARNING", f"OpenEarthMap: 3 train tiles in {root}; missing: 1 x image without label (e.g. al_qurnah_2)"),
    ]


# --- storage


def test_unchanged_folder_is_not_read_again_and_a_changed_one_is(tmp_path: Path):
    path = make_oem(tmp_path) / "al_qurnah/images/al_qurnah_2.tif"
    before = path.stat()
    good = path.read_bytes()
    load_open_earth_map(tmp_path, "train")
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(load_open_earth_map(tmp_path, "train")) == 4  # same size and time: the check is not repeated
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(DatasetError, match="al_qurnah_2"):
        load_open_earth_map(tmp_path, "train")


def test_added_file_appears_in_the_next_load(tmp_path: Path):
    root = make_oem(tmp_path)
    load_open_earth_map(root, "val")
    write_pair(root, "tonga_5")
    (root / "val.txt").write_text("tonga_1.tif\ntonga_5.tif\n")
    assert load_open_earth_map(root, "val")["image_id"][:] == ["tonga_1", "tonga_5"]


def test_failed_build_leaves_nothing_that_a_later_load_could_take_for_complete(tmp_path: Path):
    path = make_oem(tmp_path) / "kujawsko-pomorskie/images/kujawsko-pomorskie_1.tif"
    good, times = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DatasetError):
        load_open_earth_map(tmp_path, "train")
    path.write_bytes(good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # so that both builds share one cache folder
    assert len(load_open_earth_map(tmp_path, "train")) == 4


def test_streamed_embedded_parallel_and_stored_rows_are_equal(tmp_path: Path):
    root = make_oem(tmp_path)
    expected = pixels_of(load_open_earth_map(root, "train"))
    assert pixels_of(load_open_earth_map(root, "train", streaming=True)) == expected
    assert pixels_of(load_open_earth_map(root, "train", embed=True)) == expected
    parallel = load_open_earth_map(make_oem(tmp_path / "again/root"), "train", num_proc=2)
    assert pixels_of(parallel) == expected


def test_embedded_bytes_need_no_files_whatever_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = make_sar(tmp_path / "data")
    monkeypatch.chdir(root / "train/sar_images")  # contains files named as every column's
    embedded = load_open_earth_map_sar(root, "train", embed=True)
    expected = pixels_of(embedded)
    for path in root.rglob("*.tif"):
        path.unlink()
    assert pixels_of(embedded) == expected
    assert np.array_equal(expected[0]["sar"], random_tile(0, 1, 256)[0])


def test_path_dataset_stores_paths(tmp_path: Path):
    dataset = load_open_earth_map_sar(make_sar(tmp_path), "train").cast_column("sar", datasets.Image(decode=False))
    assert dataset[0]["sar"] == {"bytes": None, "path": str(tmp_path / "train/sar_images/TrainArea_999.tif")}


@pytest.mark.parametrize("embed", [False, True])
def test_parquet_round_trip_keeps_pixels(tmp_path: Path, embed: bool):
    root = make_oem(tmp_path / "data")
    dataset = load_open_earth_map(root, "train", embed=embed)
    expected = pixels_of(dataset)
    dataset.to_parquet(tmp_path / "train.parquet")
    if embed:  # the bytes travel along; paths still point at the files
        shutil.rmtree(root)
    assert pixels_of(datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"))) == expected


def test_bad_file_in_a_worker_process_is_the_same_clear_error(tmp_path: Path):
    html(make_oem(tmp_path) / "kujawsko-pomorskie/images/kujawsko-pomorskie_1.tif")
    with pytest.raises(DatasetError, match=r"kujawsko-pomorskie_1\.tif: expected a complete GeoTIFF"):
        load_open_earth_map(tmp_path, "train", num_proc=2)


def test_a_cache_that_cannot_be_written_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(FileError, match=r"file cannot be used as a cache .*HF_DATASETS_CACHE"):
        load_open_earth_map(make_oem(tmp_path / "data"), "train")


def test_a_full_disk_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write", fail)
    with pytest.raises(FileError, match=r"cannot be used as a cache .*No space left on device.*; free disk space"):
        load_open_earth_map(make_oem(tmp_path), "train")


def test_two_processes_may_build_one_split_at_once_in_the_cache_of_the_environment(tmp_path: Path):
    root = make_oem(tmp_path / "data")
    code = (
        "import sys; from hf_seg.data.open_earth_map import load_open_earth_map as load;"
        "rows = list(load(sys.argv[1], 'train')); print(*(row['image_id'] for row in rows))"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "shared")}
    command = [sys.executable, "-c", code, str(root)]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert outputs == {"aachen_1000 al_qurnah_2 al_qurnah_10 kujawsko-pomorskie_1"}
    assert len(list((tmp_path / "shared").rglob("*.arrow"))) == 1
