"""The classes: ids as in the label files, colours as published."""

import numpy as np
import pytest

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP


def test_ids_are_those_of_the_label_files() -> None:
    names = "background bareland rangeland developed_space road tree water agriculture_land building"
    assert tuple(names.replace("_", "-").split()) == tuple(name.replace(" ", "-") for name in OPEN_EARTH_MAP.names)
    assert len(OPEN_EARTH_MAP.names) == OPEN_EARTH_MAP.num_labels == 9
    assert OPEN_EARTH_MAP.names[BACKGROUND] == "background"
    assert IGNORE_INDEX not in range(OPEN_EARTH_MAP.num_labels)
    assert np.iinfo(np.uint8).max == IGNORE_INDEX  # fits a label file


def test_names_and_ids_map_onto_each_other() -> None:
    assert list(OPEN_EARTH_MAP.id2label.items()) == list(enumerate(OPEN_EARTH_MAP.names))
    assert {OPEN_EARTH_MAP.label2id[name] for name in OPEN_EARTH_MAP.names} == {*range(OPEN_EARTH_MAP.num_labels)}
    assert all(
        OPEN_EARTH_MAP.label2id[OPEN_EARTH_MAP.id2label[index]] == index for index in range(OPEN_EARTH_MAP.num_labels)
    )


def test_colours_are_the_published_ones() -> None:
    published = "000000 800000 00FF24 949494 FFFFFF 226126 0045FF 4BB549 DE1F07"
    assert [bytes(colour).hex().upper() for colour in OPEN_EARTH_MAP.palette] == published.split()
    assert OPEN_EARTH_MAP.palette.shape == (OPEN_EARTH_MAP.num_labels, 3)
    assert OPEN_EARTH_MAP.palette.dtype == np.uint8


def test_colours_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        OPEN_EARTH_MAP.palette[0] = 1
    with pytest.raises(TypeError):
        OPEN_EARTH_MAP.names[0] = "clouds"  # type: ignore[index]
