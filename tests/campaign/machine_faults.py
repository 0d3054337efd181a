"""Runs a command of the project where writes fail on purpose, the disk is too small, or memory is short.

The calls that are watched are those of Python: `open` for writing, `os.replace`, `os.rename`, `os.mkdir`, `os.fsync`.
What C and Rust libraries write by themselves fails on a small disk: a tmpfs of a given size.
"""

import builtins
import errno
import io
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fork_server

BOTH_SIDES = ("replace", "rename")  # of these the target counts


@dataclass(frozen=True)
class Fault:
    """The write that fails, counted from 1; as on a full disk all later ones fail too, unless `once`.

    With `vanish` it does not fail, but that folder is deleted just before it.
    """

    number: int
    code: int = errno.ENOSPC
    once: bool = False
    vanish: Path | None = None


@dataclass
class Outcome:
    """How a command ended, and its writes below the watched folder: call and path."""

    exit_code: int
    output: str
    writes: list[str] = field(default_factory=list)

    def one_line(self) -> str:
        """Return the only line of the error, without `error: `; fails if there is more or less."""
        lines = [line for line in self.output.splitlines() if line.startswith("error: ")]
        unwanted = ("Traceback", "Exception ignored", "Exception in thread")
        assert self.exit_code == 2 and len(lines) == 1, (self.exit_code, self.output)
        assert not any(phrase in self.output for phrase in unwanted), self.output
        return lines[0].removeprefix("error: ")


def run(
    words: Sequence[str],
    root: Path,
    *,
    fault: Fault | None = None,
    memory_mib: float | None = None,
    disturb: str = "",
    timeout: float = 240,
) -> Outcome:
    """Run `hf-seg ...` or `python FILE ...`; its caches and temporary files are below `root`, where writes may fail.

    Args:
        memory_mib: address space that the process may add to what it has once all is imported.
        disturb: see `recipe_process`.
    """
    logs = [root.parent / f"{root.name}.{name}" for name in ("stdout", "stderr", "writes")]
    for path in logs:
        path.write_text("")
    process = fork_server.context.Process(
        target=_run, args=([*words], str(root), fault, memory_mib, disturb, [*map(str, logs)])
    )
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired([*words], timeout)
    stdout, stderr, writes = (path.read_text() for path in logs)
    return Outcome(process.exitcode or 0, stdout + stderr, writes.splitlines())


def _run(
    words: list[str], root: str, fault: Fault | None, memory_mib: float | None, disturb: str, logs: list[str]
) -> None:
    import tempfile

    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(root) / "cache"
    tempfile.tempdir = str(Path(root) / "tmp")
    os.makedirs(tempfile.tempdir, exist_ok=True)
    watch_writes(root, os.open(logs[2], os.O_WRONLY | os.O_APPEND), fault)
    if disturb:
        import recipe_process

        event, _, argument = disturb.partition(":")
        recipe_process._DISTURBANCES[event](argument)
    if memory_mib is not None:
        limit = int((used_mib() + memory_mib) * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fork_server._run(words, os.getcwd(), dict(os.environ), logs[:2], None)


def used_mib() -> float:
    """Return the address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch_writes(root: str, log: int, fault: Fault | None) -> None:
    """Log each write below a folder to a descriptor, and let some fail."""
    count, lock = 0, threading.Lock()

    def count_write(call: str, path: Any) -> None:
        nonlocal count
        path = f"/proc/self/fd/{path}" if isinstance(path, int) else path
        place = os.path.realpath(path) if call == "fsync" else os.path.abspath(os.fsdecode(path))
        if not place.startswith(f"{root}/"):
            return
        with lock:
            count += 1
            os.write(log, f"{call} {os.path.relpath(place, root)}\n".encode())
            fails = fault and (count == fault.number if fault.once else count >= fault.number)
        if fault and fault.vanish:
            if count == fault.number:
                shutil.rmtree(fault.vanish)
            return
        if fault and fails:
            raise OSError(fault.code, os.strerror(fault.code), place)

    def watched(call: str, function: Callable[..., Any], is_write: Callable[..., bool]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if args and is_write(*args, **kwargs):
                count_write(call, args[1] if call in BOTH_SIDES else args[0])
            return function(*args, **kwargs)

        return wrapper

    def opens_to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return not isinstance(file, int) and bool(set("wax+") & {*mode})

    builtins.open = io.open = watched("open", io.open, opens_to_write)  # type: ignore[assignment]
    for call in ("fsync", "mkdir", *BOTH_SIDES):
        setattr(os, call, watched(call, getattr(os, call), lambda *_, **__: True))


@contextmanager
def small_disk(folder: Path, mib: float) -> Iterator[Callable[..., None]]:
    """Mount a file system of a given size; yields what changes its size, and makes it read-only or not.

    Raises:
        OSError: that is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={round(mib * 1024)}k", "tmpfs", str(folder))
    try:
        yield lambda size, mode="rw": _mount("-o", f"remount,{mode},size={round(size * 1024)}k", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*words: str) -> None:
    if os.name != "posix" or os.geteuid() != 0:
        raise OSError("only root may mount a file system")
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip() or "mount failed")


class PeakUse(threading.Thread):
    """Measures how many MiB a file system uses at most while it runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.mib, self._end = folder, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look again and again."""
        while not self._end.wait(0.002):
            status = os.statvfs(self.folder)
            self.mib = max(self.mib, (status.f_blocks - status.f_bfree) * status.f_frsize / 2**20)

    def stop(self) -> float:
        """End, and return the peak."""
        self._end.set()
        self.join()
        return self.mib
