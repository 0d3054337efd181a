"""Checkpoints are atomic, the right one is found, and a signal is asked for between steps."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from hf_seg import files
from hf_seg.errors import FileError, UserError
from hf_seg.files import atomic_folder
from hf_seg.training.checkpoints import (
    Progress,
    StopSignal,
    delete_old_checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


class Run:
    """A tiny training run whose loss depends on weights, optimizer and all random generators."""

    def __init__(self, output_dir: Path, width: int = 4) -> None:
        set_seed(0)
        self.output_dir = output_dir
        self.accelerator = Accelerator(cpu=True)
        network = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.BatchNorm1d(width), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.width = width

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            scale = random.random()
            loss = self.network(scale * torch.randn(8, self.width)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def save(self, step: int, keep: int = 2, best: float | None = None) -> Path:
        return save_checkpoint(self.accelerator, self.output_dir, Progress(step, 8 * step, best), keep)

    def tensors(self) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self.network.state_dict().items()}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def steps_on_disk(run: Run) -> list[int]:
    return sorted(int(folder.name.removeprefix("step_")) for folder in run.output_dir.glob("checkpoints/step_*"))


def damage(folder: Path, how: str) -> None:
    """Leave a checkpoint as a kill, a full disk or a careless hand may leave it."""
    weights = folder / "model.safetensors"
    if how == "file missing":
        weights.unlink()
    elif how == "file cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "manifest missing":
        (folder / "manifest.json").unlink()
    elif how == "manifest cut short":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[: len(text) // 2])
    elif how == "all files missing":
        shutil.rmtree(folder)
        folder.mkdir()


DAMAGES = ["file missing", "file cut short", "manifest missing", "manifest cut short", "all files missing"]


def test_a_restored_run_continues_bit_for_bit(run: Run) -> None:
    run.train(3)
    folder = run.save(3, best=0.25)
    losses, tensors = run.train(4), run.tensors()

    later = Run(run.output_dir)
    later.train(1)  # of other weights, and the generators elsewhere
    assert load_checkpoint(later.accelerator, folder) == Progress(step=3, samples_seen=24, best_score=0.25)
    assert later.train(4) == losses
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in later.tensors().items())


def test_saving_changes_nothing_in_the_run(tmp_path: Path) -> None:
    expected = Run(tmp_path).train(5)
    run = Run(tmp_path)
    losses = run.train(2)
    run.save(2)
    assert losses + run.train(3) == expected


def test_the_manifest_lists_every_file_with_its_size(run: Run) -> None:
    folder = run.save(7)
    assert folder == run.output_dir / "checkpoints/step_00000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == sizes
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= sizes.keys()
    assert (manifest["step"], manifest["samples_seen"], manifest["num_processes"]) == (7, 56, 1)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(run: Run, how: str, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = run.save(1), run.save(2)
    assert find_checkpoint(run.output_dir, "latest") == newer
    damage(newer, how)
    with caplog.at_level(logging.WARNING, "hf_seg"):
        assert find_checkpoint(run.output_dir, "latest") == older
    assert f"{newer} is incomplete" in caplog.text
    with pytest.raises(UserError, match=f"{newer} is no complete checkpoint; complete ones: {older}"):
        find_checkpoint(run.output_dir, str(newer))


@pytest.mark.parametrize("how", DAMAGES)
def test_with_every_checkpoint_damaged_the_run_begins_anew(run: Run, how: str) -> None:
    damage(run.save(1), how)
    assert find_checkpoint(run.output_dir, "latest") is None


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "step", "best_score", "sha256", "checksum"]
)
def test_a_flipped_bit_is_found_before_the_checkpoint_is_used(
    run: Run, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = run.save(1), run.save(2, best=0.25)
    file = newer / name if (newer / name).exists() else newer / "manifest.json"
    place = 0 if file.name == name else file.read_text().index(f'"{name}": ') + len(name) + 4
    place = file.read_text().index('": "', place) + 4 if name == "sha256" else place + 2 * (name == "checksum")
    flip_bit(file, 8 * (place if file.name != name else file.stat().st_size - 9))
    with caplog.at_level(logging.WARNING, "hf_seg"):
        assert find_checkpoint(run.output_dir, "latest") == older
    assert f"{newer} is damaged ({file.name} has other bytes" in caplog.text or f"{newer} is incomplete" in caplog.text
    with pytest.raises(UserError, match=rf"{newer} is (damaged|no complete checkpoint).*: {older}"):
        find_checkpoint(run.output_dir, str(newer))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_folder_that_cannot_be_replaced_keeps_what_it_had(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, function = tmp_path / "audit", getattr(os, call)
    with atomic_folder(folder) as temporary:
        (temporary / "old").touch()

    def fail(source: Any, *target: Path) -> None:
        path = os.readlink(f"/proc/self/fd/{source}") if call == "fsync" else source
        if Path(path) in (tmp_path / ".partial.audit", tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        function(source, *target)

    monkeypatch.setattr(os, call, fail)
    if call == "replace":  # as on systems that cannot exchange folders
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with (
        pytest.raises(FileError, match=r"audit cannot be written \(Input/output error\)"),
        atomic_folder(folder) as new,
    ):
        (new / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_a_checkpoint_of_an_older_version_has_no_checksums_and_is_used(run: Run) -> None:
    folder = run.save(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"], manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert find_checkpoint(run.output_dir, "latest") == find_checkpoint(run.output_dir, str(folder)) == folder


@pytest.mark.parametrize("content", ["[]", '{"files": []}', '{"files": {}}', "[" * 100_000])
def test_a_manifest_without_what_a_resumed_run_needs_is_incomplete(tmp_path: Path, content: str) -> None:
    place = tmp_path / "checkpoints/step_00000001"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(content)
    assert find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(UserError, match="is no complete checkpoint"):
        find_checkpoint(tmp_path, str(place))


def test_a_checkpoint_that_is_still_being_written_is_never_chosen(run: Run) -> None:
    complete = run.save(1)
    shutil.copytree(complete, complete.with_name(".partial.step_00000009"))
    assert find_checkpoint(run.output_dir, "latest") == complete


def test_what_a_killed_save_left_is_cleared_away(run: Run) -> None:
    temporary = run.output_dir / "checkpoints/.partial.step_00000003"
    temporary.mkdir(parents=True)
    (temporary / "leftover.bin").write_bytes(b"half")
    folder = run.save(3)
    assert not temporary.exists()
    assert not (folder / "leftover.bin").exists()


def test_what_a_killed_save_of_another_step_left_is_cleared_away(run: Run) -> None:
    for name in (".partial.step_00000005", ".replaced.step_00000002"):
        (run.output_dir / "checkpoints" / name).mkdir(parents=True)
    run.save(3)
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_none_in_half(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = run.save(1), run.save(2)

    def be_killed(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", be_killed)
        with pytest.raises(KeyboardInterrupt):
            delete_old_checkpoints(run.output_dir, new, keep=1)
    assert {path.name for path in (run.output_dir / "checkpoints").iterdir()} == {new.name, f".partial.{old.name}"}
    delete_old_checkpoints(run.output_dir, new, keep=1)
    assert [*(run.output_dir / "checkpoints").iterdir()] == [new]


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_the_clock_does_not_choose_the_checkpoint(run: Run, jump: int) -> None:
    older, newer = run.save(1), run.save(2)
    for path in (older, older / "manifest.json"):
        os.utime(path, (time.time() + jump,) * 2)
    assert find_checkpoint(run.output_dir, "latest") == newer


def test_a_step_saved_twice_keeps_the_second(run: Run) -> None:
    run.save(3, best=0.1)
    run.train(1)
    folder, tensors = run.save(3, best=0.2), run.tensors()
    run.train(1)
    assert load_checkpoint(run.accelerator, folder).best_score == 0.2
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in run.tensors().items())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(run: Run, keep: int) -> None:
    steps = [9, 10, 99, 100, 12_345_678]  # by number, not by name or time
    for step in steps:
        run.save(step, keep=keep)
    assert steps_on_disk(run) == steps[-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_resumed_further_back_keeps_what_it_saves(run: Run, keep: int) -> None:
    for step in (100, 200, 300):
        run.save(step, keep=3)
    saved = run.save(150, keep=keep)
    assert saved.exists()
    assert find_checkpoint(run.output_dir, "latest") == saved  # and not one of the course that was given up
    assert steps_on_disk(run) == [100, 150][-keep:]


def test_a_new_run_needs_an_empty_folder(run: Run) -> None:
    assert find_checkpoint(run.output_dir, None) is None
    run.output_dir.mkdir()
    (run.output_dir / "recipe.yaml").write_text("seed: 0")
    assert find_checkpoint(run.output_dir, None) is None
    (run.output_dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"{run.output_dir} already contains a run; .*--resume_from_checkpoint latest"):
        find_checkpoint(run.output_dir, None)
    (run.output_dir / "metrics.jsonl").unlink()
    run.save(1)
    with pytest.raises(UserError, match="--output_dir, or delete it"):
        find_checkpoint(run.output_dir, None)


def test_latest_without_a_checkpoint_begins_at_the_beginning(run: Run) -> None:
    assert find_checkpoint(run.output_dir, "latest") is None


def test_a_checkpoint_can_be_named(run: Run, tmp_path: Path) -> None:
    first, _ = run.save(1), run.save(2)
    assert find_checkpoint(run.output_dir, str(first)) == first
    assert find_checkpoint(tmp_path / "another run", str(first)) == first
    for wrong in (run.output_dir, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {wrong} is no complete checkpoint"):
            find_checkpoint(run.output_dir, str(wrong))
    with pytest.raises(UserError, match="complete ones: none"):
        find_checkpoint(tmp_path / "another run", "1")


def test_a_checkpoint_of_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    folder = run.save(1)
    other = Run(tmp_path / "other", width=5)
    with pytest.raises(UserError, match=f"{folder} contains another model or optimizer"):
        load_checkpoint(other.accelerator, folder)


def test_another_number_of_processes_is_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    folder = run.save(1)
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_processes": 4}))
    with caplog.at_level(logging.WARNING, "hf_seg"):
        assert load_checkpoint(run.accelerator, folder).step == 1
    assert "the checkpoint is of 4 processes, now there are 1" in caplog.text


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    stop = StopSignal(Accelerator(cpu=True))
    yield stop
    stop.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_caught_and_told_when_asked(stop: StopSignal, number: signal.Signals) -> None:
    assert stop.received() is None
    os.kill(os.getpid(), number)
    assert stop.received() is number
    assert stop.received() is number  # however often


def test_the_handlers_that_were_there_come_back() -> None:
    calls: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
        unused = StopSignal(Accelerator(cpu=True))
        assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
        unused.restore()
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]

        stop = StopSignal(Accelerator(cpu=True))
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.received(), calls) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does what it would have done without us
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl"])
def test_a_state_that_contains_code_is_refused_and_the_code_does_not_run(run: Run, file: str) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(run.output_dir / "canary"),)

    folder = run.save(1)
    torch.save({"state": Code()}, folder / file)
    with pytest.raises(UserError, match="is damaged, or contains code beside a state; none of it was run"):
        load_checkpoint(run.accelerator, folder)
    assert not (run.output_dir / "canary").exists()


def test_damaged_random_states_are_no_silent_new_beginning(run: Run) -> None:
    folder = run.save(1)
    (folder / "random_states_0.pkl").write_bytes(b"half")
    with pytest.raises(UserError, match="step_00000001"):
        load_checkpoint(run.accelerator, folder)
