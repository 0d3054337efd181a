"""The classes: ids as in the label files, colours as published."""

import numpy as np
import pytest

from hf_seg.labels import BACKGROUND, CLASS_NAMES, ID2LABEL, IGNORE_INDEX, LABEL2ID, NUM_LABELS, PALETTE


def test_ids_are_those_of_the_label_files() -> None:
    names = "background bareland rangeland developed_space road tree water agriculture_land building"
    assert tuple(names.replace("_", "-").split()) == tuple(name.replace(" ", "-") for name in CLASS_NAMES)
    assert len(CLASS_NAMES) == NUM_LABELS == 9
    assert CLASS_NAMES[BACKGROUND] == "background"
    assert IGNORE_INDEX not in range(NUM_LABELS)
    assert np.iinfo(np.uint8).max == IGNORE_INDEX  # fits a label file


def test_names_and_ids_map_onto_each_other() -> None:
    assert list(ID2LABEL.items()) == list(enumerate(CLASS_NAMES))
    assert {LABEL2ID[name] for name in CLASS_NAMES} == {*range(NUM_LABELS)}
    assert all(LABEL2ID[ID2LABEL[index]] == index for index in range(NUM_LABELS))


def test_colours_are_the_published_ones() -> None:
    published = "000000 800000 00FF24 949494 FFFFFF 226126 0045FF 4BB549 DE1F07"
    assert [bytes(colour).hex().upper() for colour in PALETTE] == published.split()
    assert PALETTE.shape == (NUM_LABELS, 3)
    assert PALETTE.dtype == np.uint8


def test_colours_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        PALETTE[0] = 1
    with pytest.raises(TypeError):
        CLASS_NAMES[0] = "clouds"  # type: ignore[index]
