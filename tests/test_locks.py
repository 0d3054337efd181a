"""Two processes on one folder: the second one is refused, however the first one ends."""

import fcntl
import logging
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import psutil
import pytest
from recipe_process import run_recipe

from hf_seg.errors import UserError
from hf_seg.locks import exclusive, try_lock
from hf_seg.processes import end_with_launcher, end_with_parent

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, is_held: Event, *, with_child: bool = False) -> None:
    with exclusive(folder):
        if with_child:
            FORK.Process(target=time.sleep, args=(60,)).start()
        is_held.set()
        time.sleep(60)


@pytest.mark.parametrize("with_child", [False, True])
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path, with_child: bool) -> None:
    folder, is_held = tmp_path / "runs" / "new", FORK.Event()
    process = FORK.Process(target=hold, args=(folder, is_held), kwargs={"with_child": with_child})
    process.start()
    assert is_held.wait(20) and process.pid is not None
    children = psutil.Process(process.pid).children()
    words = rf"{folder} is in use by another process \(pid {process.pid}\); wait for it, or choose another --output_dir"
    with pytest.raises(UserError, match=words), exclusive(folder):
        pass
    process.kill()
    process.join()
    lock = folder / ".lock"
    os.utime(lock, (time.time() + 10**6,) * 2)  # the clock may have jumped meanwhile
    with exclusive(folder):  # although a worker of the killed process may still live
        assert lock.read_text().split()[0] == str(os.getpid())
    assert not lock.exists() and len(children) == with_child
    for child in children:
        child.kill()


def test_a_lock_leaves_nothing_but_what_was_written(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a" / "b"):
        pass
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "a" / "c"):
        raise ZeroDivisionError
    assert [*tmp_path.iterdir()] == []
    with exclusive(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "kept"]


def test_a_holder_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    with try_lock(tmp_path / ".lock"):
        (tmp_path / ".lock").write_text("17\nnode7\n")
        with pytest.raises(UserError, match=r"another process \(pid 17 on node7\); wait"), exclusive(tmp_path):
            pass
        (tmp_path / ".lock").write_bytes(b"\xff")
        with pytest.raises(UserError, match="another process; wait"), exclusive(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, "hf_seg"), exclusive(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
    assert f"{tmp_path / 'run'}: no lock (No locks available); make sure that no other process" in caplog.text
    with exclusive(Path("/proc/nowhere")):  # nothing can be created there: what writes says so
        pass


@pytest.mark.parametrize(("recipe", "processes"), [("stage1", 1), ("stage2", 2), ("pseudo_label", 1), ("ensemble", 1)])
def test_a_second_run_on_a_folder_is_refused_before_it_does_anything(
    recipe: str, processes: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with exclusive(folder):
        argv = ["--output_dir", str(folder), "--mixed_precision", "no"]
        result = run_recipe(recipe, *argv, log=tmp_path / "log", processes=processes)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert result.exit_codes == [2] * processes, result.output
    line = f"error: {folder} is in use by another process (pid {os.getpid()}); wait for it, or choose another"
    assert result.output.count(line) == processes and "Traceback" not in result.output


def _start_orphan(connection: Connection) -> None:
    child = FORK.Process(target=_wait_with_parent)
    child.start()
    connection.send(child.pid)
    time.sleep(60)


def _wait_with_parent() -> None:
    end_with_parent()
    time.sleep(60)


def test_a_process_ends_with_the_one_that_started_it() -> None:
    here, there = FORK.Pipe()
    parent = FORK.Process(target=_start_orphan, args=(there,))
    parent.start()
    child = psutil.Process(here.recv())
    time.sleep(0.3)
    os.kill(parent.pid or 0, signal.SIGKILL)
    child.wait(10)
    parent.join()
    assert not child.is_running()


def _join_launched() -> None:
    os.environ.update(WORLD_SIZE="2", HF_SEG_LAUNCHER="1")  # this process has another parent by now
    end_with_launcher()
    time.sleep(60)


def test_a_process_whose_launcher_was_killed_before_it_began_ends() -> None:
    child = FORK.Process(target=_join_launched)
    child.start()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM
