"""Too little memory is one line that names the settings to lower; what was done before is kept."""

import signal
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from machine_faults import run
from test_disk import COMMANDS, Command, Sources, empty, prepare, require_whole, sources

if TYPE_CHECKING:
    from campaign_results import Results

__all__ = ["sources"]  # the fixture
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, 127)  # libraries in C that do not check what they allocate
LIMITS = 6  # of each command
FLOOR = 64  # MiB; with less, libraries cannot start their threads: glibc ends the process, pyarrow waits for ever
LARGE = "--batch_size 32 --stride 0.25"
NEEDY = {  # the commands of test_disk.py with more in a batch: a limit then falls into the work, not the start
    "stage1": "--crop_size 96 --per_device_train_batch_size 4",
    "stage2": "--crop_size 96 --per_device_train_batch_size 4",
    "pseudo-label": LARGE,
    "ensemble": LARGE,
    "predict": LARGE,
}
TRAINING = ["--per_device_train_batch_size", "--eval_batch_size"]
HINTS = {"stage1": TRAINING, "stage2": TRAINING}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NEEDY)
def test_short_memory_is_one_line_and_the_same_command_completes(
    name: str,
    sources: Sources,
    results: "Results",
    random: Random,
    tmp_path: Path,
) -> None:
    command = COMMANDS[name]
    case = prepare(name, sources, tmp_path / "work", Command(f"{command.words} {NEEDY[name]}", command.files))
    least, refused, crashed = enough_memory(case.words, case.root), 0, 0
    for number in range(LIMITS):
        empty(case.root)
        limit = FLOOR + (least - FLOOR) * (number + random.random()) / LIMITS
        outcome = run(case.words, case.root, memory_mib=limit)
        print(name, f"{limit:.0f} of {least} MiB: {outcome.output[-300:]}")
        if outcome.exit_code in CRASHES:
            crashed += 1
        elif outcome.exit_code != 0:
            line = outcome.one_line()
            assert "memory" in line and any(setting in line for setting in HINTS.get(name, ["--batch_size"])), line
            refused += 1
        require_whole(case.root / "out")
        if outcome.exit_code:
            again = case.run()
            assert again.exit_code == 0, again.output
        case.require_same_result()
    results.add(
        command=name,
        **{"enough beside imports, MiB": least, "lower limits": LIMITS, "one line": refused},
        **{"ended by a library": crashed, "went on": LIMITS - refused - crashed},
        **{"lost": 0, "same bits when run again": "yes"},
    )


def enough_memory(words: list[str], root: Path) -> int:
    """Find by doubling how many MiB a command needs beside what is imported."""
    for exponent in range(7, 14):
        empty(root)
        if run(words, root, memory_mib=2**exponent).exit_code == 0:
            return 2**exponent
    raise AssertionError(f"{words} needs more than 8 GiB")
