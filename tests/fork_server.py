"""Runs commands in processes of their own that start in no time: forked from a server with all slow imports done."""

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hf_seg import cli

context = multiprocessing.get_context("forkserver")
# all that is slow to import; the server of Python 3.11 does not find modules of this folder
context.set_forkserver_preload(
    [
        "hf_seg.ensemble",
        "hf_seg.hub.push",
        "hf_seg.mapping.raster",
        "hf_seg.report.run_report",
        "hf_seg.studies.label_audit_report",
        "hf_seg.training.run",
        "hf_seg.training.evaluation",
        "torch.utils.tensorboard",
    ]
)


def can_run(command: str) -> bool:
    """Tell whether `run_command` runs this command; others need a shell, or a program of another package."""
    unquoted = re.sub(r"'[^']*'", "", command)
    return command.startswith(("hf-seg ", "python scripts/", "python recipes/", "python -m hf_seg.")) and not (
        set("|&;<>$*'\"") & {*unquoted}
    )


def run_command(
    command: str,
    *,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float = 240,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `hf-seg ...`, `python FILE ...` or `python -m MODULE ...` as a shell would.

    Variables that a package reads while it is imported have the values of this process; `before`, which can be
    pickled, is called first in the new one.
    """
    words = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(words, str(cwd), dict(env), [*map(str, outputs)], before))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode or 0, *(path.read_text() for path in outputs))


def _run(
    words: list[str], cwd: str, env: dict[str, str], outputs: list[str], before: Callable[[], None] | None
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if before is not None:
        before()
    if words[0] == "hf-seg":
        cli.main(words[1:])
    elif words[1] == "-m":
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words[1:]
        cli.run_file(Path(words[1]))
