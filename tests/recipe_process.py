"""Runs a recipe's `main` in processes of its own, which a test may kill at an exact moment.

The processes are forked from a server that has imported the recipe once, so each starts in no time and clean.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from fork_server import context

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import ensemble
import pseudo_label
import stage1
import stage2
from hub_server import go_online

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.errors import one_line_errors
from hf_seg.training import teacher_student

AFTER_A_KILL = 20.0  # seconds that the other processes have


@dataclass
class Result:
    """How a recipe ended: exit code (negative: killed by that signal) and what it printed, per process."""

    exit_codes: list[int | None]
    output: str


def run_recipe(
    recipe: str,
    *argv: str,
    log: Path,
    processes: int = 1,
    disturb: str = "",
    disturbed: range | None = None,
    timeout: float = 240,
    hub: tuple[str, str] | None = None,
) -> Result:
    """Run a recipe with a command line, on one or several processes that talk over gloo.

    Args:
        recipe: its file's name.
        argv: the command line.
        log: file that receives what is printed.
        disturb: "EVENT:ARGUMENT", see `_DISTURBANCES`: what happens to a process at its N-th such event, or at a file.
            Several are joined by "+".
        disturbed: the ranks that it happens to; all if None.
        hub: address of a Hub, and a token of it; offline if None.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        context.Process(
            target=_run,
            args=(
                recipe,
                argv,
                log,
                rank,
                processes,
                port,
                disturb if disturbed is None or rank in disturbed else "",
                hub,
            ),
        )
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if any((process.exitcode or 0) < 0 for process in started):  # gloo may not notice that its peer is gone
            deadline = min(deadline, time.monotonic() + AFTER_A_KILL)
        time.sleep(0.05)
    for process in started:
        process.kill()
        process.join()
    return Result([process.exitcode for process in started], log.read_text())


def _run(
    recipe: str,
    argv: tuple[str, ...],
    log: Path,
    rank: int,
    processes: int,
    port: int,
    disturb: str,
    hub: tuple[str, str] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if hub is not None:
        go_online(*hub)
    for each in filter(None, disturb.split("+")):
        event, _, argument = each.partition(":")
        _DISTURBANCES[event](argument)
    with one_line_errors():
        _RECIPES[recipe].main(list(argv))


def _at_call(owner: object, name: str, number: str, action: Callable[..., object], *, after: bool) -> None:
    """Do something before or after the `number`-th call of a function; the call itself stays what it is."""
    function, calls = getattr(owner, name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == int(number) and not after:
            action(*args)
        result = function(*args, **kwargs)
        if calls == int(number) and after:
            action(*args)
        return result

    setattr(owner, name, counted)


def _send(number: int) -> Callable[..., object]:
    return lambda *_: os.kill(os.getpid(), number)


def _cut_checkpoint(_: Accelerator, folder: str) -> None:
    """Leave a file of the checkpoint in progress half written, then die."""
    file = Path(folder) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    _send(signal.SIGKILL)()


def _kill_at_rename(wanted: str, *, half: bool) -> None:
    """Die where a file would get its name, after cutting it in half or not."""
    replace = os.replace

    def watched(temporary: Path, path: Path) -> None:
        if Path(path).name == wanted:
            if half:
                os.truncate(temporary, os.path.getsize(temporary) // 2)
            _send(signal.SIGKILL)()
        replace(temporary, path)

    os.replace = watched


def _kill_in_export(number: str) -> None:
    for module in (stage2, teacher_student):
        _at_call(module, "export_model", number, _send(signal.SIGKILL), after=False)


def _spoil_gradient(accelerator: Accelerator, *_: object) -> None:
    """Leave one value of the gradient not a number; the loss is finite."""
    weight = next(each for each in accelerator._models[0].parameters() if each.grad is not None)
    weight.grad.view(-1)[0] = float("nan")


def _spoil_weights(accelerator: Accelerator, *_: object) -> None:
    """Leave a weight not a number once a checkpoint is written."""
    with torch.no_grad():
        next(accelerator._models[0].parameters()).view(-1)[0] = float("nan")


def _is_last_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def _freeze_batch_norm(_: str) -> None:
    torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)  # type: ignore[method-assign]


_RECIPES: dict[str, ModuleType] = {each.__name__: each for each in (stage1, pseudo_label, stage2, ensemble)}

_DISTURBANCES: dict[str, Callable[[str], None]] = {
    "kill_before_step": lambda n: _at_call(torch.optim.AdamW, "step", n, _send(signal.SIGKILL), after=False),
    "kill_after_step": lambda n: _at_call(torch.optim.AdamW, "step", n, _send(signal.SIGKILL), after=True),
    "kill_last_rank_before_step": lambda n: _DISTURBANCES["kill_before_step"](n) if _is_last_rank() else None,
    "kill_before_teacher": lambda n: _at_call(MeanTeacher, "update", n, _send(signal.SIGKILL), after=False),
    "kill_in_checkpoint": lambda n: _at_call(Accelerator, "save_state", n, _cut_checkpoint, after=True),
    "kill_in_export": _kill_in_export,
    "terminate_after_step": lambda n: _at_call(torch.optim.AdamW, "step", n, _send(signal.SIGTERM), after=True),
    "interrupt_after_step": lambda n: _at_call(torch.optim.AdamW, "step", n, _send(signal.SIGINT), after=True),
    "spoil_gradient": lambda n: _at_call(Accelerator, "backward", n, _spoil_gradient, after=True),
    "spoil_weights": lambda n: _at_call(Accelerator, "save_state", n, _spoil_weights, after=True),
    "freeze_batch_norm": _freeze_batch_norm,
    "kill_before_rename": lambda name: _kill_at_rename(name, half=False),
    "kill_after_cutting": lambda name: _kill_at_rename(name, half=True),
}
