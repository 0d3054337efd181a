"""The command line of prepare_data.py: exit codes, one-line errors, and downloads that resume."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from hf_seg.data.archives import ARCHIVES

SCRIPT = Path(__file__).parents[1] / "scripts/prepare_data.py"
ARCHIVE = ARCHIVES["oem-sar-val-labels"][0]
REAL_SAR = Path(__file__).parents[2] / "shared/realdata/dfc25_track1"


class StallingHandler(SimpleHTTPRequestHandler):
    """Serve a folder; stop in the middle of every zip file until `released`."""

    released = threading.Event()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        half = len(content) // 2 if self.path.endswith(".zip") else len(content)
        outputfile.write(content[:half])
        outputfile.flush()
        if half < len(content):
            self.released.wait(20)
            outputfile.write(content[half:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """Serve the validation labels, two tiles of them, from a folder laid out as Zenodo's addresses."""
    folder = tmp_path / "mirror"
    (folder / "api/records").mkdir(parents=True)
    with zipfile.ZipFile(folder / ARCHIVE.file_name, "w") as archive:
        for number in (1, 2):
            archive.writestr(f"labels/ValArea_00{number}.tif", bytes([number]) * 100_000)
    content = (folder / ARCHIVE.file_name).read_bytes()
    StallingHandler.released.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(StallingHandler, directory=str(folder))) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        file = {"key": ARCHIVE.file_name, "size": len(content), "links": {"self": f"{url}/{ARCHIVE.file_name}"}}
        file["checksum"] = f"md5:{hashlib.md5(content).hexdigest()}"
        (folder / f"api/records/{ARCHIVE.record}").write_text(json.dumps({"files": [file]}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield url
        StallingHandler.released.set()
        server.shutdown()
        thread.join()


def start(*arguments: object, url: str = "") -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_SEG_ZENODO_URL": url, "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell's background job ignores Ctrl-C, and so would what it starts
    return subprocess.Popen(
        command, **pipes, env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )


def run(*arguments: object, url: str = "") -> tuple[int, str, str]:
    process = start(*arguments, url=url)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def write_tile(file: Path, bands: int, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": bands, "height": values.shape[0], "width": values.shape[1]}
    with rasterio.open(file, "w", **profile) as raster:
        raster.write(np.stack([values] * bands))


@pytest.fixture
def sar_folder(tmp_path: Path) -> Path:
    """A small OpenEarthMap-SAR of two train tiles and one val tile."""
    root, generator = tmp_path / "dfc25_track1", np.random.default_rng(0)
    for split, area in (("train", "TrainArea_001"), ("train", "TrainArea_002"), ("val", "ValArea_001")):
        write_tile(root / split / f"sar_images/{area}.tif", 1, generator.integers(1, 200, (64, 64), dtype=np.uint8))
        write_tile(root / split / f"labels/{area}.tif", 1, generator.integers(1, 9, (64, 64), dtype=np.uint8))
        if split == "train":
            write_tile(root / f"train/rgb_images/{area}.tif", 3, generator.integers(1, 255, (64, 64), dtype=np.uint8))
    return root


def test_help_names_every_archive_without_a_slow_import() -> None:
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert set(ARCHIVES) <= set(re.findall(r"[a-z-]+", process.stdout))
    assert not re.search(r"\| +(numpy|torch|datasets|rasterio|tqdm)\b", process.stderr)


def test_interrupted_download_says_how_to_resume_and_then_does(mirror: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    process = start("download", "oem-sar-val-labels", data, url=mirror)
    deadline = time.monotonic() + 20
    while not any(part.stat().st_size for part in data.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; run the same command again to resume"
    assert "Traceback" not in stderr
    assert list(data.glob("*.part"))

    StallingHandler.released.set()
    status, stdout, _ = run("download", "oem-sar-val-labels", data, url=mirror)
    assert (status, stdout) == (0, f"oem-sar-val-labels: ready in {data / 'dfc25_track1'}\n")
    assert (data / "dfc25_track1/val/labels/ValArea_002.tif").read_bytes() == bytes([2]) * 100_000


def test_no_extract_stops_after_the_archive(mirror: str, tmp_path: Path) -> None:
    StallingHandler.released.set()
    status, stdout, _ = run("download", "oem-sar-val-labels", tmp_path / "data", "--no_extract", url=mirror)
    assert (status, stdout) == (0, f"oem-sar-val-labels: verified in {tmp_path / 'data'}\n")
    assert [file.name for file in (tmp_path / "data").iterdir()] == [ARCHIVE.file_name]


def test_wrong_usage_is_one_line_before_any_download(tmp_path: Path) -> None:
    status, _, stderr = run("download", "oem-sar-val-labels", "oem-rar", tmp_path)
    assert status == 2
    assert stderr.startswith("error: unknown dataset 'oem-rar'; usage: download NAME... DIR, names: oem, oem-sar,")
    status, _, stderr = run("download", "oem", "oem-sar")
    assert status == 2
    assert stderr.startswith("error: no DIR after 'oem-sar'; usage:")
    assert stderr.count("\n") == 1
    for wrong, message in (
        (["chekc", "data"], "argument command: invalid choice: 'chekc'"),
        (["check"], "the following arguments are required: DIR"),
        (["check", tmp_path, "--jsn", "x"], "unknown setting '--jsn'"),
    ):
        status, _, stderr = run(*wrong)
        assert status == 2
        assert stderr.startswith(f"error: {message}") and stderr.count("\n") == 1


def test_dashes_and_underscores_are_the_same(mirror: str, tmp_path: Path) -> None:
    StallingHandler.released.set()
    status, stdout, _ = run("download", "oem-sar-val-labels", tmp_path / "data", "--no-extract", url=mirror)
    assert (status, stdout) == (0, f"oem-sar-val-labels: verified in {tmp_path / 'data'}\n")


def test_failed_download_is_one_line_and_status_1(mirror: str, tmp_path: Path) -> None:
    status, _, stderr = run("download", "oem", tmp_path / "data", url=mirror)
    assert status == 1
    assert stderr == f"error: {mirror}/api/records/7223446 answered 404 File not found; check the address\n"


def test_check_of_a_folder_without_problems_exits_with_0_and_writes_json(sar_folder: Path, tmp_path: Path) -> None:
    status, stdout, stderr = run("check", sar_folder, "--output", tmp_path / "check.json")
    assert status == 0, stdout + stderr
    assert stdout.strip()
    assert isinstance(json.loads((tmp_path / "check.json").read_text()), dict)


def test_check_of_a_folder_with_a_damaged_label_exits_with_1_and_names_it(sar_folder: Path) -> None:
    (sar_folder / "train/labels/TrainArea_002.tif").write_bytes(b"no raster")
    status, stdout, _ = run("check", sar_folder)
    assert status == 1
    assert "TrainArea_002" in stdout


def test_report_that_cannot_be_written_is_one_line(sar_folder: Path, tmp_path: Path) -> None:
    status, _, stderr = run("check", sar_folder, "--output", tmp_path)
    assert status == 2
    assert stderr.splitlines()[-1].startswith(f"error: {tmp_path} cannot be written (Is a directory)")
    assert "Traceback" not in stderr


def test_check_of_no_dataset_exits_with_2_and_one_line(tmp_path: Path) -> None:
    status, stdout, stderr = run("check", tmp_path / "nowhere")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


@pytest.mark.skipif(not REAL_SAR.is_dir(), reason="real samples are not here")
def test_check_reads_real_scenes() -> None:
    status, stdout, stderr = run("check", REAL_SAR)
    assert status in (0, 1), stderr
    assert "Traceback" not in stderr
    assert stdout.strip()
