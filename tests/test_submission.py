"""The contest's zip: what goes in, what is refused, and the footprint."""

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
from hf_seg.labels import NUM_LABELS
from hf_seg.mapping.raster import predict_raster

sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # last: it holds an evaluate.py
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
        ids = rng.integers(1, NUM_LABELS, sar.shape, dtype=np.uint8)
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


def test_the_zip_is_flat_and_holds_each_map_blanked_outside_the_footprint(
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


def test_maps_of_the_command_line_are_accepted_as_they_are(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    for path in sorted((data / "val" / "sar_images").iterdir()):
        target = data.parent / "maps" / path.name
        predict_raster(nn.Conv2d(3, 9, 1), path, target, window=16, overwrite=True, show_progress=False)
    assert submit(monkeypatch, data) == 0
    ids = contents(data)["ValArea_002.png"]
    assert (ids[:, :7] == 0).all() and (ids[:, 7:] > 0).all()


def test_what_the_contest_would_refuse_is_refused_here(
    monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = data.parent / "maps"
    good = read(maps / "ValArea_002.tif")
    holes, too_high = good.copy(), good.copy()
    holes[3:5, 6:10], too_high[9, 9] = 0, 9
    tif = maps / "ValArea_002.tif"
    cases = [
        (holes, f"{tif}: 6 pixels of the footprint have no class; map it again without --abstain"),
        (too_high, f"{tif} holds 9, which is no class id; ids are 1..8"),
        (good[:-1], f"{tif} must be one band of uint8, 40 x 50 pixels as its tile; it is 1 x 39 x 50 uint8"),
        (np.stack([good] * 3), f"{tif} must be one band of uint8, 40 x 50 pixels as its tile; it is 3 x 40 x 50 uint8"),
        (
            good.astype(np.uint16),
            f"{tif} must be one band of uint8, 40 x 50 pixels as its tile; it is 1 x 40 x 50 uint16",
        ),
    ]
    for ids, message in cases:
        write_tiff(tif, ids)
        assert submit(monkeypatch, data) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
        assert not (data.parent / "out" / "submission.zip").exists()
    tif.unlink()
    assert submit(monkeypatch, data) == 2
    assert capsys.readouterr().err == f"error: {maps} has no map of 1 of 3 tiles, ValArea_002 for one\n"
    Image.fromarray(good).save(maps / "ValArea_001.png")
    assert submit(monkeypatch, data) == 2
    png, other = maps / "ValArea_001.png", maps / "ValArea_001.tif"
    assert capsys.readouterr().err == f"error: {png} and {other} are both maps of one tile; delete one of them\n"


def test_a_data_folder_without_all_tiles_of_the_contest_is_noticed(
    monkeypatch: pytest.MonkeyPatch, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["make_submission.py", str(data.parent / "maps"), "--data_dir", str(data), "--output", "x.zip"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit), one_line_errors():
        make_submission.main()
    message = f"{data} has 3 val tiles, the contest's val has 210; complete it, or add --partial"
    assert capsys.readouterr().err == f"error: {message}\n"
