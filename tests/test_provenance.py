"""What a dataset on disk is said to be: the release, a synthetic dataset, or other data in the same layout."""

import json
from pathlib import Path

import pytest

from hf_seg.data.provenance import DATASET_FILE, read_provenance
from hf_seg.errors import DatasetError, FileError

UNKNOWN = {"description": None, "license": None, "synthetic": False, "released": False, "labels": None, "bands": None}


def make_open_earth_map(root: Path, **counts: int) -> Path:
    """Empty files: a listing needs no pixels."""
    for kind in ("images", "labels"):
        (root / "region" / kind).mkdir(parents=True)
    for split, count in counts.items():
        names = [f"region_{split}{index}.tif" for index in range(count)]
        (root / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            (root / "region" / "images" / name).touch()
            (root / "region" / "labels" / name).touch()
    return root


def make_open_earth_map_sar(root: Path, **counts: int) -> Path:
    """Empty files, SAR only."""
    for split, count in counts.items():
        (root / split / "sar_images").mkdir(parents=True)
        for index in range(count):
            (root / split / "sar_images" / f"{split}{index}.tif").touch()
    return root


def describe(root: Path, content: object) -> None:
    (root / DATASET_FILE).write_text(json.dumps(content))


def test_other_data_are_named_by_their_layout(oem: Path, oem_sar: Path) -> None:
    for folder, layout in ((oem, "OpenEarthMap"), (oem_sar, "OpenEarthMap-SAR")):
        expected = {"name": f"data laid out as {layout}", "layout": layout, **UNKNOWN}
        assert read_provenance(folder, layout) == expected
        assert read_provenance(folder.parent, layout) == expected  # found as the loaders find it


@pytest.mark.parametrize(
    ("counts", "released"),
    [
        ({"train": 4333, "val": 210, "test": 490}, True),
        ({"train": 4333, "val": 210}, True),  # the test split is another download
        ({"train": 4333, "val": 209}, False),
        ({"train": 0}, False),
    ],
)
def test_released_sar_data_are_known_by_their_numbers(tmp_path: Path, counts: dict[str, int], released: bool) -> None:
    found = read_provenance(make_open_earth_map_sar(tmp_path / "sar", **counts), "OpenEarthMap-SAR")
    name = "OpenEarthMap-SAR" if released else "data laid out as OpenEarthMap-SAR"
    assert (found["name"], found["released"], found["license"]) == (name, released, None)


@pytest.mark.parametrize(
    ("counts", "released"),
    [
        ({"train": 2303, "val": 384, "test": 1151}, True),
        ({"train": 3000, "val": 500, "test": 1500}, True),
        ({"train": 2303, "val": 384, "test": 1152}, False),
    ],
)
def test_released_optical_data_are_known_with_and_without_xbd(
    tmp_path: Path, counts: dict[str, int], released: bool
) -> None:
    found = read_provenance(make_open_earth_map(tmp_path / "oem", **counts), "OpenEarthMap")
    assert (found["name"] == "OpenEarthMap", found["released"]) == (released, released)


def test_a_description_in_the_root_is_returned_whatever_the_numbers(tmp_path: Path) -> None:
    root = make_open_earth_map_sar(tmp_path / "sar", val=210)
    content = {
        "name": "my scenes",
        "layout": "OpenEarthMap-SAR",
        "description": "Scenes of mine.",
        "license": "CC0-1.0",
        "synthetic": True,
        "labels": {"val": "manual"},
        "bands": {"sar": ["HH"]},
        "settings": {"seed": 1},
    }
    describe(root, content)
    assert read_provenance(tmp_path, "OpenEarthMap-SAR") == {**content, "released": False}
    describe(root, {"name": "my scenes", "layout": "OpenEarthMap-SAR", "released": True})
    expected = {"name": "my scenes", "layout": "OpenEarthMap-SAR", **UNKNOWN}
    assert read_provenance(root, "OpenEarthMap-SAR") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ("[]", "must contain a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        (f'{{"name": {"9" * 5000}}}', "is not valid JSON"),
        ('{"layout": "OpenEarthMap-SAR"}', "name must be text; it is null"),
        ('{"name": "x"}', "layout must be text; it is null"),
        ('{"name": 3, "layout": "OpenEarthMap-SAR"}', "name must be text; it is 3"),
        ('{"name": "x", "layout": "OpenEarthMap"}', "layout is 'OpenEarthMap', but the folder is laid out as"),
        (
            '{"name": "x", "layout": "OpenEarthMap-SAR", "synthetic": "yes"}',
            'synthetic must be true or false; it is "y',
        ),
        ('{"name": "x", "layout": "OpenEarthMap-SAR", "license": 1}', "license must be text or null; it is 1"),
        ('{"name": "x", "layout": "OpenEarthMap-SAR", "labels": "x"}', "labels must be an object"),
    ],
)
def test_a_broken_description_is_an_error_that_names_the_file_and_the_key(
    tmp_path: Path, content: str, message: str
) -> None:
    file = make_open_earth_map_sar(tmp_path / "sar", val=1) / DATASET_FILE
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError) as caught:
        read_provenance(tmp_path, "OpenEarthMap-SAR")
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)
    assert "correct it" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_description_is_an_error_in_one_line(tmp_path: Path) -> None:
    (make_open_earth_map_sar(tmp_path / "sar", val=1) / DATASET_FILE).mkdir()
    with pytest.raises(FileError, match=r"dataset.json cannot be read \(Is a directory\)"):
        read_provenance(tmp_path, "OpenEarthMap-SAR")


def test_no_such_dataset_is_the_error_of_the_loaders(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist; looked for dfc25_track1"):
        read_provenance(tmp_path / "missing", "OpenEarthMap-SAR")
