"""Runs a command in processes of its own and kills it at a random instant, again and again.

The processes are forked from the server of tests/fork_server.py, so each starts in no time and clean. A kill comes
after a random time, or before or after a random call of the system or of the optimizer.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import datasets
import huggingface_hub
import psutil
import torch
from fork_server import context
from hub_server import go_online

from hf_seg import cli, files

SECONDS_TO_FOLLOW = 3.0  # a process whose peer was killed gets SIGTERM, and SIGKILL after this, as from a launcher
SECONDS_TO_VANISH = 60.0  # what a killed process has started must be gone after this
SECONDS_BETWEEN_LOOKS = 0.25  # at what a process has started
TIMEOUT = 240.0
PROJECT = Path(__file__).parents[2]
CALLS: dict[str, tuple[object, str]] = {  # where a kill may come
    "replace": (os, "replace"),
    "exchange": (files, "_exchange"),
    "fsync": (os, "fsync"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
    "optimizer step": (torch.optim.AdamW, "step"),
}


@dataclass(frozen=True)
class Moment:
    """When a process is killed: at its `number`-th call, or `seconds` after the start."""

    seconds: float = 0.0
    call: str = ""
    number: int = 0
    after: bool = False


@dataclass
class Command:
    """A command of `hf-seg`, run in a folder; what it writes lies below.

    Args:
        words: the command line after `hf-seg`.
        processes: that share the work, over gloo.
        hub: address and token of a Hub.
        env: more variables.
    """

    words: list[str]
    processes: int = 1
    hub: tuple[str, str] | None = None
    env: dict[str, str] = field(default_factory=dict)

    def run(self, place: Path, moment: Moment | None = None, victims: tuple[int, ...] = (0,)) -> "Ended":
        """Run it to its end, or until the victims are killed."""
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        (place / "log").touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        started, begin = [], time.monotonic()
        for rank in range(self.processes):
            at = moment if rank in victims else None
            process = context.Process(target=_run, args=(self, str(place), rank, port, at))
            process.start()
            started.append(process)
        family, deadline, is_hit, looked = set[psutil.Process](), begin + TIMEOUT, False, 0.0
        while any(process.is_alive() for process in started):
            now = time.monotonic()
            is_due = moment is not None and moment.seconds > 0 and not is_hit and now > begin + moment.seconds
            if is_due or now > looked + SECONDS_BETWEEN_LOOKS:
                looked = now
                family |= find_family([process.pid or 0 for process in started])
            if is_due:
                is_hit = True
                for rank in victims:
                    started[rank].kill()
            if deadline > now + SECONDS_TO_FOLLOW and any(process.exitcode for process in started):
                deadline = now + SECONDS_TO_FOLLOW
                for process in started:
                    process.terminate()
            if now > deadline:
                for process in started:
                    process.kill()
            time.sleep(0.02)
        codes = [process.exitcode for process in started]
        return Ended(codes, time.monotonic() - begin, family, (place / "log").read_text())


@dataclass
class Ended:
    """How a command ended: exit codes (-9: killed), seconds, every process that was seen, and what was printed."""

    codes: list[int | None]
    seconds: float
    family: set[psutil.Process]
    output: str

    @property
    def was_killed(self) -> bool:
        """Whether the kill came before the end."""
        return any(code != 0 for code in self.codes)


class Launched(Command):
    """A command started as in a shell, with whatever it starts itself; a kill hits the first process alone."""

    def run(self, place: Path, moment: Moment | None = None, victims: tuple[int, ...] = (0,)) -> Ended:
        """Run it to its end, or kill it; return when all that it has started is gone, or does not go."""
        (place / "tmp").mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.env, "PYTHONPATH": str(PROJECT), "TMPDIR": f"{place}/tmp"}
        environment["HF_HOME"] = f"{place}/cache"
        begin, family, is_hit = time.monotonic(), set[psutil.Process](), False
        with (place / "log").open("ab") as log:
            words = [sys.executable, "-m", "hf_seg.cli", *self.words]
            process = subprocess.Popen(words, cwd=place, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            family |= find_family([process.pid])
            now = time.monotonic()
            if now > begin + TIMEOUT or (moment is not None and not is_hit and now > begin + moment.seconds):
                is_hit = True
                process.kill()
            time.sleep(0.1)
        seconds = time.monotonic() - begin
        psutil.wait_procs(family, timeout=SECONDS_TO_VANISH)
        # those that lose their launcher may complain
        return Ended([process.returncode], seconds, family, "" if is_hit else (place / "log").read_text())


def find_family(pids: list[int]) -> set[psutil.Process]:
    """Return processes with all that they have started, and these in turn."""
    found: set[psutil.Process] = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found |= {process, *process.children(recursive=True)}
    return found


def count_survivors(family: set[psutil.Process]) -> int:
    """Wait until all processes are gone, and return how many are not."""
    _, alive = psutil.wait_procs(family, timeout=SECONDS_TO_VANISH)
    for each in alive:
        each.kill()
    return len(alive)


def draw_moment(random: Random, seconds: float, calls: Counter[str]) -> Moment:
    """Draw a time, or a call of those that an unbroken run makes; all kinds of calls are equally likely."""
    kinds = sorted(name for name, count in calls.items() if count)
    if not kinds or random.random() < 0.5:
        return Moment(seconds=random.uniform(0.01, seconds))
    call = random.choice(kinds)
    return Moment(call=call, number=random.randint(1, calls[call]), after=random.random() < 0.5)


def _run(command: Command, place: str, rank: int, port: int, moment: Moment | None) -> None:
    os.chdir(place)
    descriptor = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(command.env, TMPDIR=f"{place}/tmp")
    tempfile.tempdir = f"{place}/tmp"
    # a cache of its own, in which kills leave their traces too
    datasets.config.HF_DATASETS_CACHE = Path(place) / "cache" / "datasets"
    huggingface_hub.constants.HF_HUB_CACHE = f"{place}/cache/hub"
    if command.processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(command.processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if command.hub is not None:
        go_online(*command.hub)
    counts: Counter[str] = Counter()
    for name, (owner, attribute) in CALLS.items():
        _watch(owner, attribute, name, counts, moment)
    try:
        cli.main(command.words)
    finally:
        if rank == 0:
            Path("calls.json").write_text(json.dumps(counts))


def _watch(owner: object, attribute: str, name: str, counts: Counter[str], moment: Moment | None) -> None:
    function: Callable[..., object] = getattr(owner, attribute)
    owner_pid = os.getpid()

    def watched(*args: object, **kwargs: object) -> object:
        if os.getpid() != owner_pid:
            return function(*args, **kwargs)
        counts[name] += 1
        is_due = moment is not None and moment.call == name and moment.number == counts[name]
        if is_due and moment is not None and not moment.after:
            os.kill(owner_pid, signal.SIGKILL)
        result = function(*args, **kwargs)
        if is_due:
            os.kill(owner_pid, signal.SIGKILL)
        return result

    setattr(owner, attribute, watched)


if sys.platform != "linux":
    raise ImportError("the campaign of kills needs Linux")
