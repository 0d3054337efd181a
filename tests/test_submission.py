"""The zip for the contest: its content, what is refused, and the pixels outside the swath."""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from conftest import write_tiff
from PIL import Image
from torch import nn

from hf_seg.errors import one_line_errors
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.mapping.raster import predict_raster

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import make_submission


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return OpenEarthMap-SAR with three validation tiles, one with a collar, and a map of each."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 40), (40, 50), (64, 32)], start=1):
        sar = rng.integers(1, 256, (height, width), dtype=np.uint8)
        if number == 2:
            sar[:, :7] = 0
        write_tiff(tmp_path / "data" / "val" / "sar_images" / f"ValArea_{number:03d}.tif", sar)
        ids = rng.integers(1, OPEN_EARTH_MAP.num_labels, sar.shape, dtype=np.uint8)
        write_tiff(tmp_path / "maps" / f"ValArea_{number:03d}.tif", ids)
    return tmp_path / "data"


def submit(monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str) -> int:
    maps, output = str(data.parent / "maps"), str(data.parent / "out" / "submission.zip")
    argv = ["make_submission.py", maps, "--data_dir", str(data), "--output", output, "--partial", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        with one_line_errors():
            make_submission.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def contents(data: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(data.parent / "out" / "submission.zip") as archive:
        assert archive.testzip() is None
        images = {name: Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    assert all(image.mode == "L" for image in images.values())
    return {name: np.asarray(image) for name, image in images.items()}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        band: np.ndarray = file.read(1)
    return band


def test_the_zip_is_flat_and_contains_each_map_with_zeros_outside_the_swath(
    monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    assert submit(monkeypatch, data) == 0
    images = contents(data)
    assert sorted(images) == [f"ValArea_{number:03d}.png" for number in (1, 2, 3)]
    for name, ids in images.items():
        sar = read(data / "val" / "sar_images" / name.replace("png", "tif"))
        expected = read(data.parent / "maps" / name.replace("png", "tif"))
        assert np.array_equal(ids, np.where(sar > 0, expected, 0))
    first = (data.parent / "out" / "submission.zip").read_bytes()
    assert submit(monkeypatch, data) == 0
    assert (data.parent / "out" / "submission.zip").read_bytes() == first
    assert submit(monkeypatch, data, "--keep_outside") == 0
    assert (contents(data)["ValArea_002.png"] > 0).all()


def test_maps_of_the_mapping_command_are_accepted(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    for path in sorted((data / "val" / "sar_images").iterdir()):
        target = data.parent / "maps" / path.name
        predict_raster(nn.Conv2d(3, 9, 1), path, target, window=16, overwrite=True, show_progress=False)
    assert submit(monkeypatch, data) == 0
    ids = contents(data)["ValArea_002.png"]
    assert (ids[:, :7] == 0).all() and (ids[:, 7:] > 0).all()


def test_maps_that_the_contest_would_refuse_are_refused(
    monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = data.parent / "maps"
    good = read(maps / "ValArea_002.tif")
    gaps, too_high = good.copy(), good.copy()
    gaps[3:5, 6:10], too_high[9, 9] = 0, 9
    tif = maps / "ValArea_002.tif"
    cases = [
        (gaps, f"{tif}: 6 pixels of the swath have no class; map it again without --abstain"),
        (too_high, f"{tif} contains 9, which is not a class id; ids are 1..8"),
        (good[:-1], f"{tif} must be one band of uint8, 40 x 50 pixels like its tile; it is 1 x 39 x 50 uint8"),
        (
            np.stack([good] * 3),
            f"{tif} must be one band of uint8, 40 x 50 pixels like its tile; it is 3 x 40 x 50 uint8",
        ),
        (
            good.astype(np.uint16),
            f"{tif} must be one band of uint8, 40 x 50 pixels like its tile; it is 1 x 40 x 50 uint16",
        ),
    ]
    for ids, message in cases:
        write_tiff(tif, ids)
        assert submit(monkeypatch, data) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
        assert not (data.parent / "out" / "submission.zip").exists()
    tif.unlink()
    assert submit(monkeypatch, data) == 2
    assert capsys.readouterr().err == f"error: {maps} has no map of 1 of 3 tiles, e.g. ValArea_002\n"
    Image.fromarray(good).save(maps / "ValArea_001.png")
    assert submit(monkeypatch, data) == 2
    png, other = maps / "ValArea_001.png", maps / "ValArea_001.tif"
    assert capsys.readouterr().err == f"error: {png} and {other} are both maps of one tile; delete one of them\n"


def test_a_data_folder_without_all_tiles_of_the_contest_is_refused(
    monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["make_submission.py", str(data.parent / "maps"), "--data_dir", str(data), "--output", "x.zip"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit), one_line_errors():
        make_submission.main()
    message = f"{data} has 3 val tiles, the contest has 210; complete it, or add --partial"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_files_that_cannot_be_read_or_written_are_named(
    monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = data.parent / "out" / "submission.zip"
    output.mkdir(parents=True)
    assert submit(monkeypatch, data) == 2
    hint = "free disk space or choose another place"
    assert capsys.readouterr().err == f"error: {output} cannot be written (Is a directory); {hint}\n"
    assert [path.name for path in output.parent.iterdir()] == ["submission.zip"]
    (data.parent / "maps").rename(data.parent / "other")
    assert submit(monkeypatch, data) == 2
    error = f"error: {data.parent / 'maps'} cannot be read (No such file or directory)\n"
    assert capsys.readouterr().err == error
