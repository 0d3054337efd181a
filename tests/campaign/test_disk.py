"""Disks that are full, broken, read-only or gone: every command says so in one line, and loses nothing."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from machine_faults import Fault, Outcome, PeakUse, run, small_disk
from PIL import Image
from safetensors import safe_open

if TYPE_CHECKING:
    from campaign_results import Results

PROJECT = Path(__file__).parents[2]
# of each command: writes that fail, disks too small, folders that vanish, writes over an earlier result that fail
CALLS, SIZES, VANISHED, OVER = 8, 3, 2, 4
TOY = (
    "--model_name_or_path toy-segformer --from_scratch true --crop_size 32 --max_train_steps 4 --eval_steps 2 "
    "--checkpointing_steps 1 --logging_steps 1 --per_device_train_batch_size 2 --warmup_steps 1 --mixed_precision no "
    "--dataloader_num_workers 0"
)
WINDOWS = "--batch_size 4 --stride 1"


class Command(NamedTuple):
    """A command line with the names of what it reads and `{out}`, and the files that it must leave."""

    words: str
    files: tuple[str, ...]
    samples: int = CALLS


COMMANDS = {
    "synth": Command(
        "hf-seg synth --output {out}/d --source 2 --train 1 --val 1 --test 1 --size 64 --num_workers 1",
        ("d/dfc25_track1/dataset.json",),
    ),
    "data check": Command("hf-seg data check {oem_sar} --output {out}/check.json", ("check.json",)),
    "make_fold": Command(
        "python scripts/make_fold.py --data_dir {oem_sar} --folds 3 --fold 0 --output {out}/fold",
        ("fold/dataset.json",),
    ),
    "calibrate_raa": Command(
        "python scripts/calibrate_raa.py {large} {large} --output {out}/raa", ("raa/raa.json", "raa/spectra.png")
    ),
    "convert_pretrained": Command(
        "python scripts/convert_pretrained.py --output {out}/lite0", ("lite0/model.safetensors",), samples=6
    ),
    "stage1": Command(
        f"hf-seg stage1 {TOY} --source_dir {{oem}} --data_dir {{oem_sar}} --output_dir {{out}}/run "
        "--resume_from_checkpoint latest --report_to tensorboard",
        ("run/model.safetensors", "run/student/model.safetensors", "run/eval_results.json", "run/README.md"),
    ),
    "pseudo-label": Command(
        f"hf-seg pseudo-label --model {{model}} --data_dir {{oem_sar}} --output_dir {{out}}/labels "
        f"--tiles_per_shard 2 {WINDOWS}",
        ("labels/data/train-00002-of-00003.parquet", "labels/README.md"),
    ),
    "audit": Command(
        "hf-seg audit {oem_sar}/train/labels {labels} --output {out}/audit", ("audit/audit.json", "audit/index.html")
    ),
    "stage2": Command(
        f"hf-seg stage2 {TOY} --ema_decay 0.9 --data_dir {{oem_sar}} --pseudo_labels {{labels}} "
        "--output_dir {out}/run --resume_from_checkpoint latest --report_to tensorboard",
        ("run/model.safetensors", "run/best/model.safetensors", "run/eval_results.json", "run/README.md"),
    ),
    "ensemble": Command(
        f"hf-seg ensemble --model {{model}} {{model2}} --data_dir {{oem_sar}} --output_dir {{out}}/both {WINDOWS}",
        ("both/member_1/model.safetensors", "both/ensemble.json", "both/eval_results.json"),
    ),
    "evaluate": Command(
        f"hf-seg evaluate --model {{model}} --data_dir {{oem_sar}} --output {{out}}/scores.json {WINDOWS}",
        ("scores.json", "scores.npz", "scores_figures/panel.png"),
    ),
    "report": Command(
        f"hf-seg report {{model}} --data_dir {{oem_sar}} --output {{out}}/report.html {WINDOWS}",
        ("report.html", "report.json"),
    ),
    "predict": Command(
        "hf-seg predict {scene} {out}/map.tif --model {model} --window 64 --preview --polygons .gpkg --stac "
        "--confidence --datetime 2024-01-01T00:00:00Z",
        ("map.tif", "map_confidence.tif"),
    ),
    "predict --cog": Command(
        "hf-seg predict {scene} {out}/map.tif --model {model} --window 64 --cog --probabilities --polygons .geojson",
        ("map.tif", "map_probabilities.tif"),
        samples=6,
    ),
    "export": Command(
        "hf-seg export --model {model} --format onnx --output {out}/onnx", ("onnx/model.onnx",), samples=3
    ),
    "make_submission": Command(
        "python scripts/make_submission.py {maps} --data_dir {oem_sar} --split val --partial --output {out}/maps.zip",
        ("maps.zip",),
    ),
}


class Sources(dict[str, Path]):
    """What the commands read, by name."""


@pytest.fixture(scope="module")
def sources(oem: Path, oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Two toy networks, pseudo-labels, a scene and maps of the validation tiles."""
    from hf_seg.hub.export import export_model
    from hf_seg.models import build_model

    folder = tmp_path_factory.mktemp("sources")
    found = Sources(oem=oem, oem_sar=oem_sar, scene=folder / "scene.tif")
    for seed, name in enumerate(("model", "model2")):
        torch.manual_seed(seed)
        network = build_model("toy-segformer", crop_size=64, from_scratch=True)
        export_model(network, folder / name, crop_size=64, recipe="seed: 0\n", results=None)
        found[name] = folder / name
    pixels = np.random.default_rng(0).integers(1, 256, (1, 1400, 160), dtype=np.uint8)
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)}
    with rasterio.open(found["scene"], "w", "GTiff", 160, 1400, 1, dtype="uint8", **place) as file:
        file.write(pixels)
    found["large"] = folder / "large"
    found["large"].mkdir()
    pixels = np.random.default_rng(1).integers(1, 256, (3, 256, 256), dtype=np.uint8)
    with rasterio.open(found["large"] / "a.tif", "w", "GTiff", 256, 256, 3, dtype="uint8") as file:
        file.write(pixels)
    work = folder / "work"
    for name, words in (
        ("labels", f"hf-seg pseudo-label --model {found['model']} --data_dir {oem_sar} --output_dir {folder}/labels"),
        ("maps", f"hf-seg predict {oem_sar}/val/sar_images {folder}/maps/ --model {found['model']} --window 64"),
    ):
        done = run(words.split(), work)
        assert done.exit_code == 0, done.output
        found[name] = folder / name
    return found


@dataclass
class Case:
    """A command, the folder that it writes to, and what it leaves when nothing fails."""

    command: Command
    words: list[str]
    root: Path
    writes: list[str]
    names: set[str]  # of all files
    digests: dict[str, str]  # of the files that two runs leave with equal bits
    peak_mib: float = 0.0

    def run(self, fault: Fault | None = None) -> Outcome:
        """Run the command on what is in the folder."""
        return run(self.words, self.root, fault=fault)

    def require_same_result(self) -> None:
        """Compare what is in the folder with what an unbroken run leaves."""
        found = digests_of(self.root / "out")
        differ = [name for name, digest in self.digests.items() if found.get(name) != digest]
        assert not differ, f"other bits than of an unbroken run: {differ}"
        absent = [name for name in self.names if name not in found and "tfevents" not in name]
        assert not absent, f"not written: {absent}"
        require_whole(self.root / "out")
        hidden = [str(path) for path in (self.root / "out").rglob(".*") if ".lock" not in path.name]
        assert not hidden, f"left behind: {hidden}"


def digests_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def empty(root: Path) -> None:
    """Delete what is in a folder, which may be a mounted one."""
    root.mkdir(exist_ok=True)
    for path in root.iterdir():
        shutil.rmtree(path)
    (root / "out").mkdir()


def prepare(name: str, sources: Sources, root: Path, command: Command | None = None) -> Case:
    """Run a command twice without a fault, and keep what is equal in both."""
    command, found = command or COMMANDS[name], []
    words = command.words.format(out=root / "out", **sources).split()
    for _ in range(2):
        empty(root)
        peak = PeakUse(root) if os.path.ismount(root) else None
        outcome = run(words, root)
        assert outcome.exit_code == 0, outcome.output
        mib = peak.stop() if peak else 0.0
        found.append(digests_of(root / "out"))
    equal = {key: digest for key, digest in found[0].items() if found[1].get(key) == digest}
    assert {*command.files} <= equal.keys(), sorted({*command.files} - equal.keys())
    return Case(command, words, root, outcome.writes, {*found[0]} & {*found[1]}, equal, mib)


def require_whole(folder: Path) -> None:
    """Open every file that has its own name, and every checkpoint that is taken for complete."""
    from hf_seg.training.checkpoints import find_checkpoint

    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            open_file(path)
    for checkpoints in folder.rglob("checkpoints"):
        find_checkpoint(checkpoints.parent, "latest")


def open_file(path: Path) -> None:
    """Read a file to its end, as its suffix says; fails if it is not whole."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no mapping)
    elif path.suffix == ".parquet":
        assert len(pq.read_table(path)) > 0
    elif path.suffix in (".png", ".jpg"):
        Image.open(path).load()
    elif path.suffix == ".tif":
        with rasterio.open(path) as file:
            file.read()
    elif path.suffix == ".geojson":
        assert json.loads(path.read_text())["features"]
    elif path.suffix == ".gpkg":
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
            assert database.execute("select count(*) from land_cover").fetchone() > (0,)
            assert database.execute("select count(*) from layer_styles").fetchone() == (1,)
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>"), path
    elif path.suffix == ".npz":
        np.load(path)
    elif path.suffix == ".md":
        assert path.stat().st_size, path


class Counts(NamedTuple):
    """What failed, and what went on without what failed."""

    failed: int
    went_on: int


def fail_and_repeat(case: Case, fail: Callable[[], Outcome], repair: Callable[[], object]) -> bool:
    """Let a command fail, look at what it left, run it again; False if it went on and left everything."""
    outcome = fail()
    if outcome.exit_code == 0:
        case.require_same_result()
        return False
    line = outcome.one_line()
    assert any(word in line for word in ("space", "Input/output", "written", "read-only", "cache")), line
    require_whole(case.root / "out")
    repair()
    again = case.run()
    if again.exit_code == 2 and "exist" in again.one_line():
        again = Outcome(0, again.output)  # it was complete: only its flush to the disk had failed
    assert again.exit_code == 0, f"after: {line}\n{again.output}"
    try:
        case.require_same_result()
    except AssertionError as error:
        raise AssertionError(f"after: {line}\n{error}") from None
    return True


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_failing_write_is_one_line_and_the_same_command_completes(
    name: str, sources: Sources, results: "Results", random: Random, tmp_path: Path
) -> None:
    case = prepare(name, sources, tmp_path / "work")
    count = len(case.writes)
    numbers = sorted(random.sample(range(1, count + 1), min(case.command.samples, count)))
    faults = [
        Fault(number, *((errno.EIO, True) if index % 2 else (errno.ENOSPC, False)))
        for index, number in enumerate(numbers)
    ]
    failed = 0
    for fault in faults:
        empty(case.root)
        print(name, fault, case.writes[fault.number - 1])
        failed += fail_and_repeat(case, functools.partial(case.run, fault), lambda: None)
    small = fill_disks(name, sources, tmp_path / "disk")
    disks = SIZES if small is not None else 0
    failed += small or 0
    went_on = len(faults) + disks - failed
    add(results, name, count, len(faults), disks, one_line=failed, went_on=went_on, same_bits="yes")


def add(
    results: "Results", name: str, writes: int, failed: int, disks: int, *, one_line: int, went_on: int, same_bits: str
) -> None:
    """Add a row of a test in which nothing was lost."""
    results.add(
        command=name,
        writes=writes,
        **{"faults": failed, "disks too small": disks, "one line": one_line, "went on": went_on},
        **{"lost or half written": 0, "same bits when run again": same_bits},
    )


def fill_disks(name: str, sources: Sources, root: Path) -> int | None:
    """Run a command on disks that are too small; returns how often it failed, None where none can be mounted."""
    try:
        disk = small_disk(root, 512)
        with disk as resize:
            case = prepare(name, sources, root)
            failed = 0
            for part in range(SIZES):
                empty(case.root)
                mib = max(case.peak_mib * (part + 0.5) / SIZES, 0.02)
                resize(mib)
                print(name, f"disk of {mib:.2f} of {case.peak_mib:.2f} MiB")
                failed += fail_and_repeat(case, case.run, lambda: resize(512))
                resize(512)
            return failed
    except OSError as error:
        print(f"no small disk: {error}")
        return None


@pytest.mark.timeout(600)
def test_a_read_only_disk_is_one_line_of_every_command(
    sources: Sources, results: "Results", random: Random, tmp_path: Path
) -> None:
    try:
        with small_disk(tmp_path / "disk", 64) as resize:
            for folder in ("out", "tmp"):
                (tmp_path / "disk" / folder).mkdir()
            resize(64, "ro")
            for name, command in COMMANDS.items():
                outcome = run(command.words.format(out=tmp_path / "disk" / "out", **sources).split(), tmp_path / "disk")
                print(name, outcome.output)
                assert "Read-only file system" in outcome.one_line()
            resize(64)
    except OSError as error:
        pytest.skip(f"no file system can be mounted: {error}")
    many = len(COMMANDS)
    add(results, "all, on a read-only disk", many, many, 0, one_line=many, went_on=0, same_bits="not run again")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["stage1", "stage2", "pseudo-label", "ensemble", "predict", "evaluate", "synth"])
@pytest.mark.parametrize("what", ["out", "data"])
def test_a_folder_that_vanishes_is_one_line_or_does_not_matter(
    name: str, what: str, sources: Sources, results: "Results", random: Random, tmp_path: Path
) -> None:
    if (name, what) == ("synth", "data"):
        pytest.skip("reads no data")
    work, vanishing = tmp_path / "work", tmp_path / "vanishing"
    found, failed = Sources(sources), 0
    writes = prepare(name, sources, work).writes
    for number in sorted(random.sample(range(len(writes) // 4, len(writes)), min(VANISHED, len(writes)))):
        empty(work)
        if what == "data":
            shutil.rmtree(vanishing, ignore_errors=True)
            vanishing.mkdir()
            found["oem_sar"] = shutil.copytree(sources["oem_sar"], vanishing / "dfc25_track1")
            found["oem"] = shutil.copytree(sources["oem"], vanishing / "OpenEarthMap_wo_xBD")
            found["scene"] = shutil.copy(sources["scene"], vanishing)
        words = COMMANDS[name].words.format(out=work / "out", **found).split()
        outcome = run(words, work, fault=Fault(number, once=True, vanish=work / "out" if what == "out" else vanishing))
        print(name, what, number, outcome.output)
        if outcome.exit_code:
            outcome.one_line()
            failed += 1
        else:
            assert "Traceback" not in outcome.output, outcome.output
    described = "output folder deleted" if what == "out" else "data deleted"
    how = {"one_line": failed, "went_on": VANISHED - failed, "same_bits": "not run again"}
    add(results, f"{name}, {described}", len(writes), VANISHED, 0, **how)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["audit", "evaluate", "report", "predict", "ensemble"])
def test_what_was_there_before_is_kept_or_made_again(
    name: str, sources: Sources, results: "Results", random: Random, tmp_path: Path
) -> None:
    command = COMMANDS[name]
    words = command.words + " --overwrite" * (name == "predict")
    case = prepare(name, sources, tmp_path / "work", Command(words, command.files))
    writes = case.run().writes  # over what is there
    numbers = sorted(random.sample(range(1, len(writes) + 1), OVER))
    failed = 0
    for number in numbers:
        outcome = case.run(Fault(number, errno.EIO, once=True))
        print(name, number, writes[number - 1], outcome.output)
        if outcome.exit_code:
            outcome.one_line()
            failed += 1
        if name != "ensemble":  # which deletes the scores and figures of the one before at its start
            found = digests_of(case.root / "out")
            assert not [key for key, digest in case.digests.items() if found.get(key) != digest]
        again = case.run()
        assert again.exit_code == 0, again.output
        case.require_same_result()
    how = {"one_line": failed, "went_on": OVER - failed, "same_bits": "yes"}
    add(results, f"{name}, over an earlier result", len(writes), OVER, 0, **how)
