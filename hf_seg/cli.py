"""One command for the whole pipeline.

    hf-seg synth --output data/synthetic
    hf-seg stage2 --config toy/stage2_segformer.yaml --data_dir data/synthetic/dfc25_track1 --output_dir runs/toy
    hf-seg predict scene.tif map.tif --model runs/toy

Each command runs the recipe or script of the same task, with the same settings: `hf-seg COMMAND --help` lists them.

    --nproc N    for commands marked with *: N processes of this machine, e.g. one for each GPU
    --json       standard output is one line of JSON with the results, of predict one for each scene; all else goes to
                 standard error

A mistake is one line on standard error, and the exit code is 2. Completion in bash and zsh:
eval "$(register-python-argcomplete hf-seg)"
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from hf_seg import __version__
from hf_seg.errors import UserError, one_line_errors, shown
from hf_seg.processes import LAUNCHER
from hf_seg.settings import is_completing, nearest, packaged_folder
from hf_seg.terminal import JSON_DESCRIPTOR, send_json_to_stdout

MOST_DIGITS = 4  # of the number of processes of one machine


class Command(NamedTuple):
    """A file of this project that does the work of a command."""

    folder: str  # recipes or scripts, as they stand in a checkout; or hf_seg
    file: str
    help: str
    takes_processes: bool = False


COMMANDS = {
    "data": Command("scripts", "prepare_data.py", "download the datasets, and check a dataset folder"),
    "synth": Command("scripts", "make_synthetic_dataset.py", "make a synthetic dataset"),
    "fit": Command("scripts", "fit.py", "predict memory, time and cost of a training run"),
    "stage1": Command("recipes", "stage1.py", "train an optical network, adapted to unlabelled images", True),
    "pseudo-label": Command("recipes", "pseudo_label.py", "label optical/SAR pairs with optical networks", True),
    "audit": Command("scripts", "audit_labels.py", "compare two sets of labels before training on them"),
    "stage2": Command("recipes", "stage2.py", "train a SAR network on noisy labels", True),
    "ensemble": Command("recipes", "ensemble.py", "score and export several networks as one", True),
    "evaluate": Command("scripts", "evaluate_model.py", "score a model on a split", True),
    "report": Command("scripts", "report.py", "write a report on a model as one HTML page"),
    "predict": Command("hf_seg", "mapping/cli.py", "map GeoTIFF scenes", True),
    "demo": Command("hf_seg", "demo/cli.py", "map scenes on a page in the browser"),
    "export": Command("scripts", "export_model.py", "export a model to ONNX or PyTorch's pt2"),
    "push": Command("scripts", "push_to_hub.py", "send a model or a dataset to the Hub"),
    "doctor": Command("scripts", "doctor.py", "check this installation"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; the exit code is that of its file, 2 after a user's mistake."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    with one_line_errors():
        try:
            run(words)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None


def run(words: list[str]) -> None:
    """Run a command line.

    Raises:
        UserError: an unknown command, or a wrong number of processes.
        SystemExit: the command's exit code.
    """
    if is_completing():
        words = _complete()
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(describe())
        return
    if words[0] == "--version":
        print(f"hf_seg {__version__}")
        return
    if words[0] not in COMMANDS:
        raise UserError(f"unknown command {words[0]!r}{nearest(words[0], COMMANDS)}; hf-seg --help lists them")
    name, command = words[0], COMMANDS[words[0]]
    processes, words = take_processes(words[1:])
    if processes is not None and not command.takes_processes:
        raise UserError(f"hf-seg {name} runs in one process; leave --nproc out")
    if processes is not None and processes > 1 and not {"-h", "--help"} & {*words}:
        launch([name, *words, *(["--json"] if as_json else [])], processes)
        return
    if as_json and JSON_DESCRIPTOR not in os.environ:
        send_json_to_stdout()
    folder = Path(__file__).parent if command.folder == "hf_seg" else packaged_folder(command.folder)
    sys.argv = [f"hf-seg {name}", *words]
    try:
        run_file(folder / command.file)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("hf_seg"):
            raise
        raise UserError(f"hf-seg {name} needs {error.name}: pip install 'hf_seg[train]'") from None


def run_file(path: Path) -> None:
    """Run a file as the main program, as `runpy.run_path` does, but with the program's name as it is in `sys.argv`."""
    module = ModuleType("__main__")
    module.__file__ = str(path)
    sys.modules["__main__"] = module
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))  # noqa: S102 (a file of this package)


def describe() -> str:
    """Return the help: the docstring, with a line for each command."""
    start, options, end = str(__doc__).partition("\n    --nproc")
    lines = [f"    {name + ' *' * each.takes_processes:14s} {each.help}" for name, each in COMMANDS.items()]
    return "\n".join([start.rstrip(), "", *lines]) + "\n" + options + end.rstrip()


def take_processes(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """Return the N of `--nproc N` or `--nproc=N`, and the other words."""
    kept = [*words]
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--nproc":
            value = value if equals else "".join(words[index + 1 : index + 2])
            is_number = value.isascii() and value.isdigit()
            if not is_number or not value.strip("0"):
                raise UserError(f"--nproc must be a number of processes, at least 1; it is {shown(value)}")
            if len(value) > MOST_DIGITS:
                raise UserError(f"--nproc must be a number of at most {MOST_DIGITS} digits; it is {shown(value)}")
            del kept[index : index + (1 if equals else 2)]
            return int(value), kept
    return None, kept


def launch(words: Sequence[str], processes: int) -> None:
    """Run a command in several processes, which end together.

    Raises:
        SystemExit: the exit code of the first process that failed, which has said why.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    os.environ[LAUNCHER] = str(os.getpid())
    arguments = ["--standalone", "--nproc_per_node", str(processes), "--module", "hf_seg.cli", *words]
    options = torchrun.parse_args(arguments)
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a user's mistake is one line
    try:
        torchrun.run(options)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # such a process could not say why
            raise UserError(f"process {rank} of {processes} was ended by {failure.signal_name()}") from None
        raise SystemExit(failure.exitcode) from None


def _complete() -> list[str]:
    """Return the words of a command whose file completes the rest; else print the commands that fit, and exit."""
    import argcomplete

    start = int(os.environ["_ARGCOMPLETE"])
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    before = argcomplete.split_line(line, point)[3]
    words = [word for word in before[start:] if word != "--json"]
    if words and words[0] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = str(start + before[start:].index(words[0]) + 1)
        return words[:1]
    parser = argparse.ArgumentParser(prog="hf-seg")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    argcomplete.autocomplete(parser)
    raise SystemExit


if __name__ == "__main__":
    main()
