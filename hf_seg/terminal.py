"""The end of a command: a few lines of what was found and what to open, or one line of JSON (`hf-seg --json`)."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

JSON_DESCRIPTOR = "HF_SEG_JSON_DESCRIPTOR"  # an environment variable, since workers of a command have it too


def send_json_to_stdout() -> None:
    """Keep standard output for the JSON of `print_summary`; all else that is printed goes to standard error."""
    sys.stdout.flush()
    os.environ[JSON_DESCRIPTOR] = str(os.dup(1))
    os.dup2(2, 1)


def print_summary(
    text: str, facts: Mapping[str, Any], files: Iterable[str | Path] = (), *, hints: Iterable[str] = ()
) -> None:
    """Print what a command found and what it leaves to open; the JSON has the facts and the files.

    Args:
        text: the facts, for people; empty if they have been printed before.
        facts: for machines, whatever `json` can write.
        files: to open, the most telling first; those that do not exist are left out.
        hints: commands that may follow.
    """
    found = [str(file) for file in files if Path(file).exists()]
    if descriptor := os.environ.get(JSON_DESCRIPTOR):
        line = json.dumps({"files": found, **facts}, default=str) + "\n"
        os.write(int(descriptor), line.encode())
        return
    from rich.console import Console  # not at once: `--help` has no need of it
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)  # a path is never broken into lines
    if text:
        console.print(Text(text))
    if found:
        console.print(Text.assemble(("open  ", "dim"), "  ".join(found)))
    if "MAKELEVEL" not in os.environ:  # what follows is written in a Makefile
        for hint in hints:
            console.print(Text.assemble(("next  ", "dim"), hint))
