"""Maps that are interrupted, resumed or run out of disk space, and the memory they need."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rasterio.shutil
import torch
from conftest import write_tiff
from mapping_networks import pointwise, predict, speckled
from torch import nn

from hf_seg.errors import UserError
from hf_seg.inference.load import use_network
from hf_seg.inference.predict import Predictor
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.mapping.job import MapJob
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.polygons import write_polygons


def fork(function: Callable[[], None]) -> int | None:
    """Run a function in a forked process and return its exit code; negative: killed by that signal."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson"])
def test_polygons_that_do_not_fit_on_the_disk_are_an_error_of_the_disk(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("pyogrio")
    write_tiff(tmp_path / "map.tif", speckled(64, 64) % 8 + 1)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            write_polygons(tmp_path / "map.tif", tmp_path / f"a{suffix}", OPEN_EARTH_MAP)
        except OSError:
            os._exit(7)

    assert fork(run) == 7


def kill_at_call(owner: Any, name: str, number: int) -> None:
    """Kill this process before the `number`-th call of a function."""
    function, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


# files are replaced in this order: map.json, three bands, the attribute table, the style, the confidence, the map
@pytest.mark.parametrize(
    ("owner", "name", "number", "kept"),
    [
        (nn.Conv2d, "forward", 40, 0),
        (nn.Conv2d, "forward", 150, 1),
        (os, "replace", 2, 0),
        (os, "replace", 4, 2),
        (os, "fsync", 4, 2),
        (rasterio.shutil, "copy", 2, 3),
        (os, "replace", 5, 3),
        (os, "replace", 6, 3),
        (os, "replace", 7, 3),
        (os, "replace", 8, 3),
    ],
)
def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    tmp_path: Path, owner: Any, name: str, number: int, kept: int
) -> None:
    write_tiff(tmp_path / "a.tif", speckled(1300, 60))
    network, settings, calls = pointwise(), {"confidence": True, "cog": True}, []
    network.register_forward_hook(lambda *_: calls.append(1))
    predict(network, tmp_path / "a.tif", tmp_path / "complete.tif", **settings)
    total = len(calls)

    def run() -> None:
        kill_at_call(owner, name, number)
        predict(network, tmp_path / "a.tif", tmp_path / "b.tif", **settings)

    assert fork(run) == -signal.SIGKILL
    assert not (tmp_path / "b.tif").exists()
    assert len(list((tmp_path / ".b.tif.partial").glob("rows_*.z"))) == kept
    predict(network, tmp_path / "a.tif", tmp_path / "b.tif", **settings)
    for end in (".tif", "_confidence.tif", ".tif.aux.xml", ".qml"):
        assert (tmp_path / f"b{end}").read_bytes() == (tmp_path / f"complete{end}").read_bytes()
    assert len(calls) - total == {0: 243, 1: 150, 2: 54, 3: 0}[kept] and total == 243
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("a.tif", "b.qml", "b.tif", "b.tif.aux.xml", "b_confidence.tif"),
        *("complete.qml", "complete.tif", "complete.tif.aux.xml", "complete_confidence.tif"),
    ]


def test_bands_of_another_network_scene_or_setting_are_not_used(tmp_path: Path) -> None:
    image = speckled(1100, 40)
    write_tiff(tmp_path / "a.tif", image)

    def missing(compute: tuple[int, ...] = (), seed: int = 1, **settings: Any) -> list[int]:
        predictor = Predictor([use_network(pointwise(seed), crop_size=32)], device=torch.device("cpu"))
        job = MapJob(predictor, tmp_path / "a.tif", tmp_path / "b.tif", RasterOptions(**settings))
        job.prepare()
        job.compute(compute, show_progress=False)
        job.close()
        return job.missing()

    assert missing((0, 2)) == [1] and missing(batch_size=9, cog=True, preview=True) == [1]
    for changed in ({"stride": 1.0}, {"abstain": 0.5}, {"confidence": True}, {"zero_collar": False}, {"seed": 2}):
        assert missing((1,)) != [0, 1, 2]
        assert missing(**changed) == [0, 1, 2]
    assert missing((1,)) == [0, 2]
    write_tiff(tmp_path / "a.tif", image[::-1])
    assert missing() == [0, 1, 2]


def test_a_damaged_band_is_named_and_computed_again(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", speckled(1100, 40))
    predictor = Predictor([use_network(pointwise(), crop_size=32)], device=torch.device("cpu"))
    job = MapJob(predictor, tmp_path / "a.tif", tmp_path / "b.tif", RasterOptions())
    job.prepare()
    job.compute(job.missing(), show_progress=False)
    band = tmp_path / ".b.tif.partial" / "rows_00001.z"
    band.write_bytes(band.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rows_00001\.z was damaged and is deleted; run the same command again"):
        job.finish()
    assert job.missing() == [1] and not (tmp_path / "b.tif").exists()
    job.close()
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif")
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "c.tif")
    assert (tmp_path / "b.tif").read_bytes() == (tmp_path / "c.tif").read_bytes()


@pytest.mark.parametrize("stage", ["compute", "finish"])
def test_a_full_disk_loses_no_finished_band_and_leaves_no_incomplete_map(tmp_path: Path, stage: str) -> None:
    write_tiff(tmp_path / "a.tif", speckled(1100, 400))
    message = tmp_path / "message.txt"
    message.touch()

    def run() -> None:
        predictor = Predictor([use_network(pointwise(), crop_size=32)], device=torch.device("cpu"))
        job = MapJob(predictor, tmp_path / "a.tif", tmp_path / "b.tif", RasterOptions(stride=1.0))
        job.prepare()
        out = message.open("w")
        if stage == "finish":
            job.compute(job.missing(), show_progress=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # largest file that this process may write
        try:
            job.compute(job.missing(), show_progress=False)
            job.finish()
        except UserError as error:
            out.write(str(error))
            out.flush()
            os._exit(7)

    assert fork(run) == 7
    folder = tmp_path / ".b.tif.partial"
    text = message.read_text()
    unwritten = tmp_path / "b.tif" if stage == "finish" else folder / "rows_00000.z"
    assert text.startswith(f"{unwritten} cannot be written (") and "\n" not in text
    assert text.endswith(
        f"free disk space or choose another place; the same command resumes from the bands in {folder}"
    )
    assert not (tmp_path / "b.tif").exists()
    assert len(list(folder.glob("rows_*.z"))) == (3 if stage == "finish" else 0)
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "b.tif", stride=1.0)
    predict(pointwise(), tmp_path / "a.tif", tmp_path / "c.tif", stride=1.0)
    assert (tmp_path / "b.tif").read_bytes() == (tmp_path / "c.tif").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_memory_does_not_grow_with_the_area_of_the_scene(tmp_path: Path) -> None:
    def measure(width: int, height: int) -> dict[str, Any]:
        script = Path(__file__).parents[1] / "scripts" / "benchmark_raster.py"
        options = ("--window", "512", "--stride", "1", "--output_dir", str(tmp_path / f"{width}x{height}"))
        command = [sys.executable, str(script), "--width", str(width), "--height", str(height), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures

    low, high = measure(20_000, 5_000), measure(20_000, 20_000)
    assert high["peak_rss_mib"] <= 2048
    assert high["peak_rss_mib"] - low["peak_rss_mib"] < 250  # the larger scene has 286 MiB more, and so has its map


def test_progress_is_told_and_what_it_raises_stops_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    write_tiff(tmp_path / "scene.tif", speckled(600, 64))
    seen: list[tuple[int, int]] = []

    def stop_in_the_second_band(done: int, total: int) -> None:
        seen.append((done, total))
        if (tmp_path / ".map.tif.partial" / "rows_00000.z").exists():
            raise KeyboardInterrupt

    settings = {"window": 64, "stride": 1.0}
    with pytest.raises(KeyboardInterrupt):
        predict(
            pointwise(), tmp_path / "scene.tif", tmp_path / "map.tif", on_progress=stop_in_the_second_band, **settings
        )
    assert [total for _, total in seen] == [10] * len(seen) and 8 <= seen[-1][0] < 10
    seen.clear()
    predict(
        pointwise(), tmp_path / "scene.tif", tmp_path / "map.tif", on_progress=lambda *now: seen.append(now), **settings
    )
    assert 0 < len(seen) < 10 and seen[-1][0] == seen[-1][1]
