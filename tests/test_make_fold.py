"""Folds of the labelled tiles: each tile is validated on once, and what cannot be is one line."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.provenance import read_provenance

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import make_fold


def test_each_tile_is_validated_on_once(oem_sar: Path, tmp_path: Path) -> None:
    validated = []
    for fold in range(4):
        make_fold.main(
            ["--data_dir", str(oem_sar), "--folds", "4", "--fold", str(fold), "--output", str(tmp_path / str(fold))]
        )
        train, val = (load_open_earth_map_sar(tmp_path / str(fold), split)["image_id"] for split in ("train", "val"))
        assert len(train) + len(val) == 9 and not set(train) & set(val)
        validated += val
    assert len(validated) == len(set(validated)) == 9
    copied = tmp_path / "3" / "train" / "sar_images" / "TrainArea_001.tif"
    assert copied.read_bytes() == (oem_sar / "train" / "sar_images" / "TrainArea_001.tif").read_bytes()
    assert not (tmp_path / "3" / "train" / "rgb_images").exists()  # val has none
    assert read_provenance(tmp_path / "3", "OpenEarthMap-SAR")["name"] == "data laid out as OpenEarthMap-SAR"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--folds": "1"}, "--folds must be from 2 to 9"),
        ({"--fold": "4"}, "--fold must be from 0 to 3; it is 4"),
        ({"--data_dir": "nothing"}, "nothing does not exist"),
    ],
)
def test_what_cannot_be_divided_is_one_line(
    oem_sar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], message: str
) -> None:
    flags = {"--data_dir": str(oem_sar), "--folds": "4", "--fold": "0", "--output": str(tmp_path / "out"), **changes}
    with pytest.raises(SystemExit):
        make_fold.main([word for flag in flags.items() for word in flag])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (tmp_path / "out").exists()


def test_real_scenes_can_be_divided(realdata: Path, tmp_path: Path) -> None:
    counts = make_fold.make_fold(realdata / "dfc25_track1", tmp_path / "fold", 6, 5)
    assert counts == {"train": 5, "val": 1}
    with Image.open(tmp_path / "fold" / "val" / "labels" / "ValArea_001.tif") as label:
        assert label.size[0] > 400
