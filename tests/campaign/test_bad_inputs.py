"""Every bad input ends in one line that names it, soon, in bounded memory, and leaves nothing that looks complete."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
from bad_inputs import CASES
from bad_inputs.case import Case, noise, tiff
from fork_server import _run, context
from hub_folders import build_toy, make_ensemble

from hf_seg.data.pseudo_label_dataset import LabelledTile, plan_shards, summarize, write_manifest, write_shard
from hf_seg.hub.export import export_model
from hf_seg.labels import OPEN_EARTH_MAP

CPU_SECONDS = 10  # of the command and its children, not counting the imports that the server has done
MORE_MIB = 1024  # memory beyond that of the process at its start
WALL_SECONDS = 90
SPACE = 12 * 2**30  # bytes of addresses that a command may have, so that none can take the machine's memory
# files that would be taken for a result
COMPLETE = ("config.json", "manifest.json", "ensemble.json", "eval_results.json", "README.md", "run.json", "index.html")
SUFFIXES = (".tif", ".safetensors", ".parquet", ".html", ".onnx", ".pt2", ".gpkg", ".png")


class Finished(NamedTuple):
    """How a command ended, and what it took."""

    code: int
    stdout: str
    stderr: str
    cpu_seconds: float
    more_mib: float


def run_measured(command: str, work: Path, env: dict[str, str]) -> Finished:
    """Run a command in a process of its own."""
    outputs = [work.parent / f"{work.name}.{name}" for name in ("stdout", "stderr", "usage")]
    process = context.Process(target=_measured, args=(command, str(work), env, [*map(str, outputs)]))
    process.start()
    process.join(WALL_SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail(f"{command}: still running after {WALL_SECONDS} s")
    stdout, stderr = (path.read_text(errors="replace") for path in outputs[:2])
    usage = json.loads(outputs[2].read_text()) if outputs[2].exists() else {"cpu_seconds": 0, "more_mib": 0}
    return Finished(process.exitcode or 0, stdout, stderr, usage["cpu_seconds"], usage["more_mib"])


def _measured(command: str, work: str, env: dict[str, str], outputs: list[str]) -> None:
    import shlex

    before, mib = _usage(), 1024
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    try:
        _run(shlex.split(command), work, env, outputs[:2], None)
    finally:
        for child in multiprocessing.active_children():
            child.join(1)
        after = _usage()
        found = {"cpu_seconds": after[0] - before[0], "more_mib": (after[1] - before[1]) / mib}
        Path(outputs[2]).write_text(json.dumps(found))


def _usage() -> tuple[float, float]:
    """Return CPU seconds and the peak memory in KiB of this process and of the children that have ended."""
    mine, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = sum(each.ru_utime + each.ru_stime for each in (mine, children))
    return seconds, max(mine.ru_maxrss, children.ru_maxrss)


class Record(BaseHTTPRequestHandler):
    """A Zenodo record with the archive that a case has made."""

    def do_GET(self) -> None:
        file: Path = self.server.folder / "remote" / "dfc25_track1_trainval.zip"  # type: ignore[attr-defined]
        content = file.read_bytes() if file.exists() else b""
        if self.path.startswith("/api/records/"):
            host = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
            checksum = f"md5:{hashlib.md5(content).hexdigest()}"
            entry = {"key": file.name, "size": len(content), "checksum": checksum, "links": {"self": f"{host}/file"}}
            content = json.dumps({"files": [entry]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def zenodo() -> Iterator[ThreadingHTTPServer]:
    """A server of records."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Record)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, oem: Path, oem_sar: Path) -> Path:
    """A folder with one good input of every kind."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "sar").symlink_to(oem_sar)
    (folder / "oem").symlink_to(oem)
    tiff("scene.tif", noise(80, 80))(folder)
    for name, seed in (("model", 0), ("model2", 1)):
        export_model(build_toy("toy-segformer", seed), folder / name, crop_size=64, recipe="seed: 1\n", results=None)
    make_ensemble(folder / "ensemble", [folder / "model", folder / "model2"])
    tiles = sorted((oem_sar / "train" / "labels").iterdir())
    for path, span in plan_shards(folder / "labels" / "data", "train", len(tiles), 3).items():
        write_shard(path, [_labelled(tiles[number]) for number in span])
    write_manifest(folder / "labels", summarize(sorted((folder / "labels" / "data").iterdir())))
    return folder


def _labelled(tile: Path) -> LabelledTile:
    with rasterio.open(tile) as file:
        label = file.read(1)
    counts = np.bincount(label.ravel(), minlength=OPEN_EARTH_MAP.num_labels)
    return LabelledTile(tile.stem, label, np.ones(label.shape, np.float32), counts, counts, {"no": 0})


def list_files(work: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of every file below a folder; links are not followed."""
    found = {}
    for top, _, names in os.walk(work):
        for name in names:
            path = Path(top, name)
            status = path.lstat()
            found[str(path.relative_to(work))] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("case", CASES, ids=[f"{case.what}-{case.wrong}" for case in CASES])
def test_bad_input_is_refused_in_one_line(
    case: Case, good: Path, tmp_path: Path, zenodo: ThreadingHTTPServer, results: Any
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for entry in good.iterdir():
        (work / entry.name).symlink_to(entry.resolve())
    case.make(work)
    zenodo.folder = work  # type: ignore[attr-defined]
    before = list_files(work)
    env = {**os.environ, "HF_SEG_ZENODO_URL": f"http://127.0.0.1:{zenodo.server_port}", "COLUMNS": "80"}
    finished = run_measured(case.command, work, env)
    message = check(case, finished).replace(f"{work}/", "")
    written = {name for name, status in list_files(work).items() if before.get(name) != status}
    shown = [name for name in written if not any(part.startswith(".") for part in Path(name).parts)]
    complete = [name for name in shown if Path(name).name in COMPLETE or name.endswith(SUFFIXES)]
    assert complete == (["run.json"] if is_report(case) else [])
    assert finished.cpu_seconds < CPU_SECONDS, finished
    assert finished.more_mib < MORE_MIB, finished
    command = " ".join(case.command.split()[:2])
    results.add(
        **{"file or setting": case.what, "what is wrong": case.wrong, "command": command, "message": shorten(message)}
    )
    shutil.rmtree(work)


def check(case: Case, finished: Finished) -> str:
    """Return the message of a command that ended as the case says."""
    assert finished.code == case.code, finished
    assert "Traceback" not in finished.stderr + finished.stdout, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if is_report(case):
        assert not errors
        (message,) = [line for line in finished.stdout.splitlines() if case.says in line][:1]
        return message.strip()
    assert len(errors) == 1 and lines[-1] == errors[0], finished.stderr
    assert case.says in errors[0], errors[0]
    return errors[0].removeprefix("error: ")


def is_report(case: Case) -> bool:
    """Tell whether the answer is the report of a check, on standard output and in run.json."""
    return case.command.startswith("hf-seg data check") and case.code != 2


def shorten(text: str, length: int = 200) -> str:
    """Cut a long message for the table."""
    return text if len(text) <= length else f"{text[:length]}..."
