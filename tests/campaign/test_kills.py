"""Every command, killed at random instants and run again to its end, leaves the bits of a run that nothing broke."""

import contextlib
import hashlib
import io
import json
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
import yaml
from accelerate.utils import load
from hub_server import Hub, serve_hub
from killing import Command, Ended, Launched, count_survivors, draw_moment
from PIL import Image
from safetensors.torch import load_file

from hf_seg.arguments import Stage2Arguments, dump_recipe
from hf_seg.data.archives import ARCHIVES
from hf_seg.hub.export import export_model
from hf_seg.models import build_model

pytestmark = pytest.mark.timeout(1500)
TOKEN = "hf_markerMARKERmarker"
TRAINING = (
    "--model_name_or_path toy-segformer --from_scratch true --crop_size 32 --max_train_steps 8 --warmup_steps 2 "
    "--per_device_train_batch_size {batch} --learning_rate 1e-3 --head_lr_multiplier 1 --eval_steps 4 "
    "--checkpointing_steps 3 --logging_steps 1 --report_to none --mixed_precision no --save_total_limit 1 "
    "--dataloader_num_workers {workers} --resume_from_checkpoint latest --output_dir run"
)


@dataclass
class Series:
    """What a series of kills does with one command.

    Args:
        name: in the table.
        command: what is run.
        kills: how many.
        workers: of its data loader.
        content: returns what must have the same bits, by name, and reads every file in full.
        renew: what a new beginning needs besides a new folder.
        processes: for the table, where it is not the command's.
        refusal: how the command ends where a killed run had completed its result.
    """

    name: str
    command: Command
    kills: int
    workers: int | str = "-"
    content: Callable[[Path], dict[str, str]] = lambda place: read_folder(place / "run")
    renew: Callable[[], object] = lambda: None
    processes: int | str = ""
    refusal: str = ""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_folder(folder: Path) -> dict[str, str]:
    """Open every file that a reader would open, and return its digest; what depends on the clock is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found[name] = digest(read_whole(path))
    return found


def read_whole(path: Path) -> bytes:
    """Open a file as its readers do, to its end, and return its bytes without what depends on the clock."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix in (".json", ".yaml"):
        assert yaml.safe_load(content) is not None
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".parquet":
        pq.read_table(path)
    elif path.suffix == ".tif":
        with rasterio.open(path) as raster:
            raster.read()
    elif path.suffix == ".bin":
        torch.load(path, weights_only=True)
    elif path.suffix == ".pkl":  # NumPy's and Python's random states, and no other objects
        load(path)
    elif path.suffix == ".jsonl":  # a line that a kill has cut short is dropped by its readers
        lines = [json.loads(line) for line in content.decode().splitlines(keepends=True) if line.endswith("\n")]
        content = json.dumps([{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]).encode()
    elif path.name != "test.txt":  # a split without tiles
        assert content
    return content


def leftovers(place: Path) -> list[str]:
    """Return what is temporary: partial, replaced and lock files, and what lies in the folder for temporary files."""
    found = [path for path in place.rglob(".*") if "cache" not in path.relative_to(place).parts]
    found = [path for path in found if not path.name.endswith(".files.json")]  # the inventory of a download
    of_torch = {*(place / "tmp").glob("torchelastic_*")}  # empty folders for logs, which a killed launcher leaves
    temporary = [path for path in (place / "tmp").iterdir() if path not in of_torch]
    return sorted(str(path.relative_to(place)) for path in [*found, *place.rglob("*.part"), *temporary])


def kill_often(series: Series, folder: Path, random: Random, results: Any) -> None:
    """Kill a command at random instants until it has been killed often enough; compare each run that ends."""
    whole = folder / "whole"
    series.renew()
    ended = series.command.run(whole)
    assert not ended.was_killed, ended.output
    expected, calls = series.content(whole), Counter[str]()
    if (whole / "calls.json").exists():
        calls.update(json.loads((whole / "calls.json").read_text()))
    family, seconds = {*ended.family}, ended.seconds
    counts = Counter(kills=0, completed=0, same=0, half=0, left=0)
    problems: list[str] = []
    place = folder / "0"
    series.renew()
    is_complete = True
    while counts["kills"] < series.kills or not is_complete:
        moment = None
        if counts["kills"] < series.kills:
            moment = draw_moment(random, seconds, calls)
        victims = random.choice([(0,), (1,), (0, 1)]) if series.command.processes > 1 else (0,)
        ended = series.command.run(place, moment, victims)
        family |= ended.family
        is_complete = not ended.was_killed or bool(series.refusal and series.refusal in ended.output)
        if not is_complete:
            counts["kills"] += 1
            assert moment is not None and "Traceback" not in last_run(ended), ended.output
            try:
                series.content(place)
            except Exception as error:  # whatever a reader may raise
                counts["half"] += 1
                problems.append(f"{moment}: {error!r}")
            continue
        counts["completed"] += 1
        found = series.content(place)
        counts["same"] += found == expected
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        left = leftovers(place)
        counts["left"] += len(left)
        problems += [f"{place.name}: {different} {left}"] if different or left else []
        place = folder / str(counts["completed"])
        series.renew()
    orphans = count_survivors(family)
    results.add(
        **{
            "command": series.name,
            "data loader workers": series.workers,
            "processes": series.processes or series.command.processes,
            "kills": counts["kills"],
            "completed": counts["completed"],
            "same bits": counts["same"],
            "half-written files": counts["half"],
            "orphans": orphans,
            "leftovers": counts["left"],
        }
    )
    assert not problems and not orphans, "\n".join([*problems, f"{orphans} orphans"])


def last_run(ended: Ended) -> str:
    """Return what the processes printed, unless several were running: one that loses its peer may complain."""
    return ended.output if len(ended.codes) == 1 else ""


def train(stage: int, data: str, workers: int, processes: int) -> Command:
    """Return the command of a tiny training."""
    words = f"stage{stage} {data} {TRAINING.format(batch=2 // processes, workers=workers)}"
    words += " --ema_decay 0.8 --confidence_threshold 0.2 --panel_steps 4 --raa_prob 0.5" if stage == 1 else ""
    return Command(words.split(), processes)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks with random weights."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        model: Any = build_model("toy-segformer", crop_size=32, from_scratch=True)
        torch.nn.init.normal_(model.decode_head.classifier.weight)
        folders.append(tmp_path_factory.mktemp("networks") / f"network_{seed}")
        export_model(model, folders[-1], crop_size=32, recipe=dump_recipe(Stage2Arguments()), results=None)
    return folders


@pytest.mark.parametrize(("workers", "processes", "kills"), [(0, 1, 9), (2, 1, 8), (0, 2, 6)])
@pytest.mark.parametrize("stage", [1, 2])
def test_training(
    stage: int,
    workers: int,
    processes: int,
    kills: int,
    oem: Path,
    oem_sar: Path,
    tmp_path: Path,
    random: Random,
    results: Any,
) -> None:
    data = f"--data_dir {oem_sar}" + (f" --source_dir {oem}" if stage == 1 else "")
    command = train(stage, data, workers, processes)
    kill_often(Series(f"stage{stage}", command, kills, workers), tmp_path, random, results)


def test_a_killed_launcher(oem_sar: Path, tmp_path: Path, random: Random, results: Any) -> None:
    """The processes of a launcher that is killed end."""
    words = train(2, f"--data_dir {oem_sar}", 0, 2).words
    series = Series("stage2, the launcher is killed", Launched([*words, "--nproc", "2"]), 4, 0, processes=2)
    kill_often(series, tmp_path, random, results)


def test_synthetic_dataset(tmp_path: Path, random: Random, results: Any) -> None:
    sizes = "--source 8 --train 8 --val 2 --test 2 --size 128"
    command = Launched(f"synth --output run --num_workers 2 {sizes}".split())
    kill_often(Series("synth", command, 4, processes="1 + 2", refusal="error: run exists"), tmp_path, random, results)


@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 6)])
def test_pseudo_labels(
    processes: int, kills: int, networks: list[Path], oem_sar: Path, tmp_path: Path, random: Random, results: Any
) -> None:
    words = f"pseudo-label --model {networks[0]} {networks[1]} --data_dir {oem_sar} --tiles_per_shard 1 --stride 1"
    command = Command(f"{words} --output_dir run".split(), processes)
    kill_often(Series("pseudo-label", command, kills), tmp_path, random, results)


@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 4)])
def test_ensemble(
    processes: int, kills: int, networks: list[Path], oem_sar: Path, tmp_path: Path, random: Random, results: Any
) -> None:
    words = f"ensemble --model {networks[0]} {networks[1]} --data_dir {oem_sar} --stride 1 --output_dir run"
    kill_often(Series("ensemble", Command(words.split(), processes), kills), tmp_path, random, results)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene of several bands of rows."""
    path = tmp_path_factory.mktemp("scene") / "scene.tif"
    pixels = np.random.default_rng(0).integers(1, 256, (1, 2000, 96), dtype=np.uint8)
    place = {"crs": "EPSG:32654", "transform": rasterio.Affine(1, 0, 400_000, 0, -1, 4_000_000)}
    with rasterio.open(path, "w", "GTiff", 96, 2000, 1, dtype="uint8", **place) as raster:
        raster.write(pixels)
    return path


@pytest.mark.parametrize(("processes", "kills"), [(1, 10), (2, 6)])
def test_maps(
    processes: int, kills: int, networks: list[Path], scene: Path, tmp_path: Path, random: Random, results: Any
) -> None:
    words = f"predict {scene} run/map.tif --model {networks[0]} --confidence --preview --stac --polygons .gpkg"
    words += " --overwrite --stride 1 --datetime 2024-05-01T00:00:00Z"
    clock = {"OGR_CURRENT_DATE": "2024-05-01T00:00:00Z"}  # else a GeoPackage has the time of its writing
    kill_often(Series("predict", Command(words.split(), processes, env=clock), kills), tmp_path, random, results)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub."""
    with serve_hub({TOKEN}) as hub:
        yield hub


@pytest.mark.parametrize("kind", ["model", "tiles"])
def test_pushes(
    kind: str, networks: list[Path], oem_sar: Path, hub: Hub, tmp_path: Path, random: Random, results: Any
) -> None:
    """A push arrives in full or not at all."""
    words = f"push {networks[0]} me/pushed" if kind == "model" else f"data push {oem_sar} me/pushed --public"
    command = Command(words.split(), hub=(hub.url, TOKEN))

    def content(_: Path) -> dict[str, str]:
        found = {}
        for repository in hub.repositories.values():
            found = {name: digest(file) for name, file in repository.files().items()}
            assert all(repository.files(commit) == repository.files() for commit in list(repository.commits)[1:])
        return found

    series = Series(f"push, {kind}", command, 8, content=content, renew=hub.repositories.clear)
    kill_often(series, tmp_path, random, results)


def test_training_on_a_dataset_and_a_model_from_the_hub(
    networks: list[Path], oem_sar: Path, hub: Hub, tmp_path: Path, random: Random, results: Any
) -> None:
    for number, words in enumerate((f"push {networks[0]} me/model", f"data push {oem_sar} me/tiles --public")):
        assert not Command(words.split(), hub=(hub.url, TOKEN)).run(tmp_path / f"push_{number}").was_killed
    words = "ensemble --model me/model --data_dir me/tiles --stride 1 --output_dir run"
    command = Command(words.split(), hub=(hub.url, TOKEN))
    kill_often(Series("ensemble, all from the Hub", command, 8), tmp_path, random, results)


def test_downloads(tmp_path: Path, random: Random, results: Any) -> None:
    with serve_zenodo() as url:
        env = {"HF_SEG_ZENODO_URL": url, "no_proxy": "127.0.0.1"}
        command = Command(f"data download {ARCHIVE_NAME} run".split(), env=env)
        kill_often(Series("data download", command, 10), tmp_path, random, results)


ARCHIVE_NAME = "oem-sar-val-labels"


@contextlib.contextmanager
def serve_zenodo() -> Iterator[str]:
    """Serve an archive of tiles slowly, and parts of it."""
    file_name, buffer = ARCHIVES[ARCHIVE_NAME][0].file_name, io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(20):
            archive.writestr(f"val_labels/ValArea_{number:03d}.txt", bytes([65 + number]) * 50_000)
    content = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/api/records/"):
                url = f"http://127.0.0.1:{server.server_port}/file"
                file = {"key": file_name, "size": len(content), "checksum": f"md5:{hashlib.md5(content).hexdigest()}"}
                body, status = json.dumps({"files": [file | {"links": {"self": url}}]}).encode(), 200
            else:
                start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                body, status = content[start:], 206 if start else 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for first in range(0, len(body), 50_000):
                    self.wfile.write(body[first : first + 50_000])
                    time.sleep(0.02)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
