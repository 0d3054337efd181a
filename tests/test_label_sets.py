"""Label sets: read from YAML, refused in one line where they are wrong, mapped onto each other, kept by a model."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from conftest import write_tiff

from hf_seg.data.doctor import examine
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set
from hf_seg.data.pseudo_label_dataset import load_pseudo_labels
from hf_seg.data.rare_classes import class_pixels
from hf_seg.data.samples import LabelledImages
from hf_seg.errors import UserError
from hf_seg.label_sets import (
    config_of,
    label_set_of,
    map_classes,
    parse_label_set,
    read_label_set,
    require_same_classes,
)
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.models import build_model
from hf_seg.report.style import class_legend, colorize

WATER_LAND = """\
classes:
  - {id: 1, name: water, colour: "#0045ff", aliases: [lake, River], values: [6]}
  - {id: 2, name: land, color: "#c0c0c0", values: [1, 2, 3, 4, 5, 7, 8]}
"""
# as LoveDA codes its classes: 0 no data, 1 anything else
LOVEDA: dict[str, Any] = {
    "classes": [
        {"id": 1, "name": "Building", "values": [2]},
        {"id": 2, "name": "road", "values": [3]},
        {"id": 3, "name": "water", "values": [4]},
        {"id": 4, "name": "barren", "aliases": ["bareland"], "values": [5]},
        {"id": 5, "name": "forest", "aliases": ["tree"], "values": [6]},
        {"id": 6, "name": "agriculture", "aliases": ["agriculture land"], "values": [7]},
    ],
    "background": [0, 1],
}
TWO = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


@pytest.fixture
def water_land(tmp_path: Path) -> LabelSet:
    (tmp_path / "set.yaml").write_text(WATER_LAND)
    return read_label_set(tmp_path / "set.yaml")


def changed(number: int, **changes: Any) -> dict[str, Any]:
    """Two classes, one of which has other keys."""
    return {"classes": [{**row, **changes} if index == number else row for index, row in enumerate(TWO)]}


def make_tiles(root: Path, label: np.ndarray, **description: Any) -> Path:
    """Write an OpenEarthMap-SAR of one training tile."""
    write_tiff(root / "train/sar_images/TrainArea_1.tif", np.full(label.shape, 9, np.uint8))
    write_tiff(root / "train/labels/TrainArea_1.tif", label.astype(np.uint8))
    (root / "dataset.json").write_text(json.dumps({"name": "x", "layout": "OpenEarthMap-SAR", **description}))
    return root


# Reading


def test_names_colours_and_values_are_those_of_the_file(water_land: LabelSet) -> None:
    assert water_land.names == ("background", "water", "land")
    assert water_land.palette.tolist() == [[0, 0, 0], [0, 0x45, 0xFF], [0xC0] * 3]
    assert water_land.values == {0: 0, 6: 1, 255: IGNORE_INDEX, **dict.fromkeys((1, 2, 3, 4, 5, 7, 8), 2)}
    assert water_land.aliases == ((), ("lake", "River"), ())
    assert (water_land.table[[0, 6, 8, 9, 255]] == [0, 1, 2, -1, 255]).all()


def test_the_built_in_set_is_known_by_name() -> None:
    assert read_label_set("OpenEarthMap") is OPEN_EARTH_MAP
    assert OPEN_EARTH_MAP.table[:10].tolist() == [*range(9), -1] and OPEN_EARTH_MAP.table[255] == -1


def test_values_default_to_ids_and_a_class_may_have_the_usual_value_of_background() -> None:
    plain = parse_label_set({"classes": TWO}, "x")
    assert plain.values == {0: 0, 1: 1, 2: 2, 255: IGNORE_INDEX}
    coded = parse_label_set({**changed(0, values=[0, 255]), "ignore": [7]}, "x")
    assert coded.values == {0: 1, 255: 1, 2: 2, 7: IGNORE_INDEX}  # nothing means background


def test_classes_without_a_colour_get_distinct_ones() -> None:
    rows = [{"id": index, "name": f"class {index}"} for index in range(1, 255)]
    rows[3]["colour"] = "#1f77b4"  # the first that would be chosen
    many = parse_label_set({"classes": rows}, "x")
    assert len(set(many.colors)) == many.num_labels == 255
    assert many.colors[4] == (0x1F, 0x77, 0xB4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"clases": TWO},
            "unknown key 'clases'; did you mean 'classes'?; known: classes, background, ignore, unmapped",
        ),
        ({}, "classes must be a list of 2 to 254 classes; it is None"),
        ({"classes": TWO[:1]}, "classes must be a list of 2 to 254 classes; it is a list of 1"),
        ({"classes": ["water", "land"]}, "class number 1 must have the keys id and name; it is 'water'"),
        (changed(1, colur="#000001"), "class number 2: unknown key 'colur'; did you mean 'colour'?"),
        (changed(1, id="2"), "class number 2 must have an id, a whole number 1..254; it is '2'"),
        (changed(1, id=True), "class number 2 must have an id, a whole number 1..254; it is True"),
        (changed(1, id=0), "class number 2 has id 0, which is background: list its pixel values under `background:`"),
        (changed(1, id=-1), "class number 2 must have an id, a whole number 1..254; it is -1"),
        (changed(1, id=255), "class number 2 must have an id, a whole number 1..254; it is 255"),
        (changed(1, id=1), "id 1 has two names, 'a' and 'b'; keep one"),
        (
            changed(1, id=100),
            "no class has id 2, but one has id 100; number the 2 classes 1..2, and give the pixel values",
        ),
        (changed(0, name=3), "class number 1 (id 1) must have a name, text of one line; it is 3"),
        (changed(0, name="B"), "'b' is a name of class 1 (B) and class 2 (b); a name or alias belongs to one class"),
        (changed(0, name="background"), "'background' is a name of class 0 (background) and class 1 (background)"),
        (
            changed(0, aliases=["b"]),
            "'b' is a name of class 1 (a) and class 2 (b); a name or alias belongs to one class",
        ),
        (changed(0, aliases="lake"), "class number 1 (a): aliases must be a list of names; it is 'lake'"),
        (
            changed(0, colour=None),
            "(a): colour must be like '#0045ff', in quotes, since # starts a comment in YAML; it is",
        ),
        (
            changed(0, color="blue"),
            "(a): color must be like '#0045ff', in quotes, since # starts a comment in YAML; it is",
        ),
        (changed(0, color="#000001", colour="#000001"), "class number 1 (a) has both colour and color; keep one"),
        (changed(0, colour="#000000"), "background and a have one colour, #000000"),
        ({"classes": [{**row, "colour": "#0045FF"} for row in TWO]}, "a and b have one colour, #0045FF"),
        (changed(0, values=[]), "class number 1 (a): values must be a list of pixel values, e.g. [6]; it is []"),
        (changed(0, values=6), "class number 1 (a): values must be a list of pixel values, e.g. [6]; it is 6"),
        (changed(0, values=[256]), "values must be whole numbers 0..255, as label files are 8-bit; found 256"),
        (changed(0, values=[1, 2]), "pixel value 2 is one of a and of b; give each value one meaning"),
        (changed(0, values=[1, 1]), "pixel value 1 is one of a, twice; give each value one meaning"),
        (
            {"classes": TWO, "background": [0, 1]},
            "pixel value 1 is one of a and of background; give each value one meaning",
        ),
        (
            {"classes": TWO, "ignore": [0]},
            "pixel value 0 is one of background and of ignore; give each value one meaning",
        ),
        ({"classes": TWO, "ignore": 255}, "ignore must be a list of pixel values, e.g. [6]; it is 255"),
        ({"classes": TWO, "unmapped": "drop"}, "unmapped must be error or ignore; it is 'drop'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_value(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as caught:
        read_label_set(tmp_path / "set.yaml")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/set.yaml: ") and message in text and "\n" not in text


BOMB = "[&x0 [lol]" + "".join(f", &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)) + "]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as a label set (built in: OpenEarthMap)"),
        ("classes: [", "cannot be read as YAML: while parsing"),
        ("classes: []\nclasses: []\n", "duplicate key 'classes'"),
        ("- water\n", "a label set has the keys classes, background, ignore, unmapped; found ['water']"),
        ("[" * 10_000, "cannot be read as YAML: too many lists or mappings in each other"),
        (f"{BOMB}\n", "a label set has the keys classes, background, ignore, unmapped; found [['lol'], "),
        (f"classes: [{{id: 1, name: {BOMB}}}, {{id: 2, name: b}}]", "must have a name, text of one line; it is [["),
    ],
)
def test_a_file_that_is_no_label_set_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "set.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_label_set(str(tmp_path / "set.yaml"))
    assert str(tmp_path / "set.yaml") in str(caught.value) and message in str(caught.value)


# Mapping


def test_a_dataset_of_other_classes_is_mapped_by_name_and_alias() -> None:
    mapped = map_classes(OPEN_EARTH_MAP, parse_label_set(LOVEDA, "LoveDA"), "LoveDA")
    assert (mapped.names, mapped.colors) == (OPEN_EARTH_MAP.names, OPEN_EARTH_MAP.colors)
    ids = {name: OPEN_EARTH_MAP.label2id[name] for name in ("building", "road", "water", "bareland", "tree")}
    expected = dict(zip(range(2, 7), ids.values(), strict=True)) | {7: 7, 0: 0, 1: 0, 255: IGNORE_INDEX}
    assert mapped.values == expected


def test_classes_without_a_counterpart_are_an_error_or_ignored(water_land: LabelSet) -> None:
    own = parse_label_set(LOVEDA, "LoveDA")
    with pytest.raises(UserError) as caught:
        map_classes(water_land, own, "LoveDA")
    lost = "Building, road, barren, forest, agriculture"
    assert str(caught.value).startswith(
        f"LoveDA: its classes {lost} are none of water, land; add aliases, or `unmapped"
    )
    ignoring = parse_label_set({**yaml.safe_load(WATER_LAND), "unmapped": "ignore"}, "x")
    for chosen, theirs in ((ignoring, own), (water_land, parse_label_set({**LOVEDA, "unmapped": "ignore"}, "LoveDA"))):
        mapped = map_classes(chosen, theirs, "LoveDA")
        assert mapped.values == {4: 1, 0: 0, 1: 0, **dict.fromkeys((2, 3, 5, 6, 7, 255), IGNORE_INDEX)}


def test_aliases_of_two_classes_are_an_error(water_land: LabelSet) -> None:
    own = parse_label_set(changed(0, aliases=["lake", "land"]), "x")
    with pytest.raises(UserError, match=r"^x: the aliases of class 'a' are of water and land; remove one$"):
        map_classes(water_land, own, "x")


def test_sets_that_disagree_are_told_apart_at_the_first_class() -> None:
    require_same_classes(["background", "road"], ("background", "road"), "A", "B")
    with pytest.raises(UserError, match=r"^class 1 is 'road' in A and 'street' in B; hint$"):
        require_same_classes(["background", "road"], ["background", "street"], "A", "B", "; hint")
    with pytest.raises(UserError, match=r"^class 2 is missing in A and 'sea' in B$"):
        require_same_classes(["background", "road"], ["background", "road", "sea"], "A", "B")


# Data


def test_labels_are_translated_where_they_are_read(water_land: LabelSet, tmp_path: Path) -> None:
    root = make_tiles(tmp_path / "data", np.array([[0, 6, 8], [1, 255, 6]]))
    assert find_label_set(root, "OpenEarthMap-SAR") is OPEN_EARTH_MAP
    label_set = find_label_set(root, "OpenEarthMap-SAR", str(tmp_path / "set.yaml"))
    assert label_set == water_land
    images = LabelledImages(load_open_earth_map_sar(root, "train", label_set=label_set), "sar", label_set=label_set)
    assert images[0].label.tolist() == [[255, 1, 2], [2, 255, 1]] and images[0].label.dtype == np.uint8
    assert class_pixels(images, progress=False).tolist() == [[0, 2, 2]]
    rows = load_open_earth_map_sar(root, "train", label_set=label_set)
    kept = LabelledImages(rows, "sar", label_set=label_set, keep_background=True)
    assert kept[0].label.tolist() == [[0, 1, 2], [2, 255, 1]]


def test_a_dataset_tells_its_own_classes(tmp_path: Path) -> None:
    root = make_tiles(tmp_path / "data", np.array([[1, 2, 3, 4], [5, 6, 7, 0]]), **LOVEDA)
    own = find_label_set(root, "OpenEarthMap-SAR")
    images = LabelledImages(load_open_earth_map_sar(root, "train"), "sar", label_set=own)
    assert images[0].label.tolist() == [[255, 1, 2, 3], [4, 5, 6, 255]]
    mapped = find_label_set(root, "OpenEarthMap-SAR", "OpenEarthMap")
    images = LabelledImages(load_open_earth_map_sar(root, "train"), "sar", label_set=mapped)
    assert images[0].label.tolist() == [[255, 8, 4, 6], [1, 5, 7, 255]]

    report = examine(root, num_workers=1)
    assert report.problems == []
    assert report.splits["train"].class_percent == {
        "background": 25.0,
        **dict.fromkeys([row["name"] for row in LOVEDA["classes"]], 12.5),
    }
    percent = examine(root, label_set="OpenEarthMap", num_workers=1).splits["train"].class_percent
    assert percent["building"] == 12.5 and percent["rangeland"] == 0 and list(percent) == [*OPEN_EARTH_MAP.names]


def test_values_outside_the_set_are_named(water_land: LabelSet, tmp_path: Path) -> None:
    root = make_tiles(tmp_path / "data", np.array([[0, 6, 8], [1, 99, 6]]))
    expected = r"TrainArea_1.tif: expected values 0\.\.8, 255, found 99\. Add the value to a class, to `background` or"
    with pytest.raises(UserError, match=expected):
        load_open_earth_map_sar(root, "train", label_set=water_land)
    (problem,) = examine(root, label_set=water_land, num_workers=1).problems
    assert "expected values 0..8, 255, found 99" in problem
    feature = {"image_id": datasets.Value("string"), "sar": datasets.Image(), "label": datasets.Image(mode="L")}
    column = np.full((1, 1), 99, np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image_id": ["x"], "sar": [column], "label": [column]}, features=datasets.Features(feature)
    )
    with pytest.raises(UserError, match=r"x: label 99 is no pixel value of the label set; add it to `ignore`"):
        LabelledImages(rows, "sar", label_set=water_land)[0]


def test_a_wrong_label_set_in_dataset_json_is_refused(tmp_path: Path) -> None:
    root = make_tiles(tmp_path / "data", np.ones((2, 2)), classes=TWO[:1])
    with pytest.raises(
        UserError, match=r"dataset\.json: classes must be a list of 2 to 254 classes; it is a list of 1"
    ):
        find_label_set(root, "OpenEarthMap-SAR")


def test_pseudo_labels_of_other_classes_are_refused(water_land: LabelSet, tmp_path: Path) -> None:
    ids = datasets.Dataset.from_dict({"image_id": ["x"], "pseudo_label": [np.ones((1, 1), np.uint8)]})
    ids.cast_column("pseudo_label", datasets.Image(mode="L")).to_parquet(tmp_path / "data.parquet")
    assert len(load_pseudo_labels(str(tmp_path), label_set=water_land)) == 1  # nothing says what they are
    (tmp_path / "manifest.json").write_text(json.dumps({"label_set": {"names": [*water_land.names]}}))
    assert len(load_pseudo_labels(str(tmp_path), label_set=water_land)) == 1
    with pytest.raises(UserError, match=f"class 1 is 'water' in {tmp_path} and 'bareland' in the label set; give"):
        load_pseudo_labels(str(tmp_path))


# Models and pictures


def test_a_model_keeps_its_classes(water_land: LabelSet) -> None:
    model: Any = build_model("toy-segformer", crop_size=32, from_scratch=True, label_set=water_land)
    assert model.config.num_labels == 3 and model.config.label_colors == ["#000000", "#0045ff", "#c0c0c0"]
    found = label_set_of(json.loads(model.config.to_json_string()), "x")
    assert (found.names, found.colors) == (water_land.names, water_land.colors)
    assert found.values == {0: 0, 1: 1, 2: 2}
    default: Any = build_model("toy-segformer", crop_size=32, from_scratch=True)
    assert not hasattr(default.config, "label_colors")
    assert label_set_of(default.config.to_dict(), "x") is OPEN_EARTH_MAP


def test_a_model_of_another_origin_is_named() -> None:
    coloured = {**config_of(OPEN_EARTH_MAP), "label_colors": ["#000000"]}
    with pytest.raises(UserError, match=r"^x: label_colors must be 9 colours like '#0045ff'; it is"):
        label_set_of(coloured, "x")
    for id2label, first in (({0: "wall", 1: "sky", 2: "sea"}, "'wall'"), ({}, "None"), ({"a": "b"}, "None")):
        with pytest.raises(UserError, match=f"^x is no segmentation model of this project: .*the first is {first}$"):
            label_set_of({"id2label": id2label}, "x")
    foreign = label_set_of({"id2label": {0: "background", 1: "sky", 2: "sea"}}, "x")
    assert foreign.names[2] == "sea" and len(set(foreign.colors)) == 3


def test_figures_have_the_colours_of_the_set(water_land: LabelSet) -> None:
    assert colorize(np.array([[1, 2]], np.uint8), water_land).tolist() == [[[0, 0x45, 0xFF], [0xC0] * 3]]
    assert [patch.get_label() for patch in class_legend({255}, water_land)] == ["water", "land", "ignored"]
    with pytest.raises(ValueError, match=r"label ids \[3\] are not classes; expected 0\.\.2 or 255"):
        colorize(np.array([[3]], np.uint8), water_land)


def test_the_name_of_a_class_is_one_printable_line(tmp_path: Path) -> None:
    for name in ("a\n```python", "a\u001b[2J", "a\u2028b"):
        with pytest.raises(UserError, match="printable text of one line"):
            label_set_of({"id2label": {0: "background", 1: name, 2: "b"}}, "model")
        with pytest.raises(UserError, match="must have a name, text of one line"):
            parse_label_set({"classes": [{"id": 1, "name": name}, {"id": 2, "name": "b"}]}, "file")
