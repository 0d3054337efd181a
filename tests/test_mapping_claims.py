"""Workers that know nothing of each other share scenes through the folder of the maps; scenes are read over HTTP."""

import functools
import http.server
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_scene, write_tiff
from mapping_networks import export_toy_network

from hf_seg.errors import UserError
from hf_seg.mapping import claims, cli
from hf_seg.mapping.claims import claim, clear_finished, last_change, require_claim, share_scenes

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a toy network."""
    return export_toy_network(tmp_path_factory.mktemp("model") / "toy")


def write_scenes(folder: Path, count: int, size: int) -> None:
    for number in range(count):
        image, _ = make_scene(np.random.default_rng(number), size)
        write_tiff(folder / f"s{number}.tif", image)


def test_a_claim_excludes_others_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "maps" / "a.tif"
    with claim(target) as first, claim(target) as second, claim(tmp_path / "maps" / "b.tif") as other:
        assert (first, second, other) == (True, False, True)
        with pytest.raises(UserError, match=f"{target} is being made by another process"):
            require_claim(second, target)
    with claim(target) as again:
        assert again
    assert list(tmp_path.iterdir()) == []


def test_a_scene_of_another_worker_is_waited_for_and_not_mapped_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    pairs = [(name, tmp_path / f"{name}.tif") for name in "abc"]
    mapped: list[str] = []

    def map_one(source: str, destination: Path) -> bool:
        mapped.append(source)
        destination.touch()
        return source != "c"

    other = claim(pairs[0][1])
    assert other.__enter__()

    def finish() -> None:
        (tmp_path / "a.tif").touch()
        other.__exit__(None, None, None)

    threading.Timer(0.2, finish).start()
    assert share_scenes(pairs, map_one, replaced={}) == 1
    assert mapped == ["b", "c"]
    replaced = {path: last_change(path) for _, path in pairs}
    os.utime(tmp_path / "b.tif", (0, 0))  # another worker has replaced it
    share_scenes(pairs, map_one, replaced=replaced)
    assert mapped == ["b", "c", "a", "c"]


def test_what_a_kill_left_of_a_finished_map_is_deleted(tmp_path: Path) -> None:
    target, bands = tmp_path / "a.tif", tmp_path / ".a.tif.partial"
    bands.mkdir()
    (bands / "rows_00000.z").touch()
    (tmp_path / ".a.tif.lock").touch()
    clear_finished(target, bands)
    assert len([*bands.iterdir()]) == 1  # there is no map yet
    target.touch()
    clear_finished(target, bands)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tif", ".a.tif.partial"}  # bands of a map to come
    (bands / claims.FINISHED).touch()
    with claim(target):
        clear_finished(target, bands)
        assert bands.exists()  # another process works there
    clear_finished(target, bands)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


def start_worker(scenes: Path, maps: Path, model: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "hf_seg.cli", "predict", f"{scenes}/*.tif", f"{maps}/", "--model", str(model)]
    with log.open("wb") as output:
        return subprocess.Popen([*command, "--stride", "0.5"], stdout=output, stderr=output, env=environment)


@pytest.mark.slow
def test_workers_share_scenes_and_take_over_what_a_killed_one_leaves(tmp_path: Path, model: Path) -> None:
    write_scenes(tmp_path / "scenes", 4, 450)
    alone, maps = tmp_path / "alone", tmp_path / "maps"
    cli.main([str(tmp_path / "scenes"), str(alone), "--model", str(model), "--stride", "0.5"])

    workers = [start_worker(tmp_path / "scenes", maps, model, tmp_path / f"log{i}") for i in range(2)]
    deadline = time.monotonic() + 120
    while len(list(maps.glob(".*.partial"))) < 2 and time.monotonic() < deadline and workers[0].poll() is None:
        time.sleep(0.02)
    workers[0].send_signal(signal.SIGKILL)
    assert workers[0].wait(10) == -signal.SIGKILL
    left = {path.name for path in maps.glob(".*.partial")}
    assert workers[1].wait(200) == 0, (tmp_path / "log1").read_text()
    logs = [(tmp_path / f"log{i}").read_text() for i in range(2)]
    assert len(left) >= 1 and sum(log.count("seam score") for log in logs) == 4  # each scene once
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == {
        path.name: path.read_bytes() for path in alone.iterdir()
    }


class RangeRequests(http.server.SimpleHTTPRequestHandler):
    """A file server that answers a range with a part, as object stores do."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            super().do_GET()
            return
        content, (first, last) = path.read_bytes(), self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1 if last else None]
        with (Path(self.directory) / "ranges.txt").open("a") as log:
            print(self.headers["Range"], file=log)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(RangeRequests, directory=str(tmp_path))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # in a process of its own, since GDAL waits for it without releasing the interpreter
    process = multiprocessing.get_context("fork").Process(target=served.serve_forever, daemon=True)
    process.start()
    yield f"http://127.0.0.1:{served.server_port}"
    process.kill()
    process.join()
    served.server_close()


@pytest.mark.parametrize("prefix", ["/vsicurl/", ""])
def test_a_scene_is_read_over_http_by_ranges(prefix: str, tmp_path: Path, model: Path, server: str) -> None:
    write_scenes(tmp_path / "scenes", 1, 200)
    scene = f"{prefix}{server}/scenes/s0.tif"
    cli.main([scene, str(tmp_path / "remote.tif"), "--model", str(model)])
    cli.main([str(tmp_path / "scenes" / "s0.tif"), str(tmp_path / "local.tif"), "--model", str(model)])
    assert (tmp_path / "remote.tif").read_bytes() == (tmp_path / "local.tif").read_bytes()
    assert (tmp_path / "ranges.txt").read_text().startswith("bytes=0-")
