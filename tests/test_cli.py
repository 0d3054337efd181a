"""The command hf-seg."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_seg import __version__, cli
from hf_seg.errors import UserError, one_line_errors

PROJECT = Path(__file__).parents[1]


def hf_seg(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hf_seg.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_help_lists_every_command_and_needs_no_slow_import() -> None:
    code = (
        "import sys\nfrom hf_seg import cli\ncli.main(['--help'])\n"
        "print('slow:', {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("slow: set()\n")
    for name, command in cli.COMMANDS.items():
        assert f"    {name}" in printed and command.help in printed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_the_help_of_its_file(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-seg"])
    with pytest.raises(SystemExit) as end:
        cli.run([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code in (0, None) and printed.startswith(f"usage: hf-seg {name}")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert capsys.readouterr().out == f"hf_seg {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stag2"], "unknown command 'stag2'; did you mean 'stage2'?; hf-seg --help lists them"),
        (["audit", "--nproc", "2"], "hf-seg audit runs in one process; leave --nproc out"),
        (["stage2", "--nproc"], "--nproc must be a number of processes, at least 1; it is ''"),
        (["stage2", "--nproc=0"], "--nproc must be a number of processes, at least 1; it is '0'"),
    ],
)
def test_a_mistake_is_told(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.run(words)
    assert str(error.value) == message


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_is_one_line_and_exit_code_2_on_any_number_of_processes(processes: int) -> None:
    done = hf_seg("stage2", "--nproc", processes, "--data_dir", "nowhere", "--report_to", "none")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1


def raised_by(action: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 (of any kind)
        action()
    return error.value


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
            "runs/a cannot be read or written (No space left on device); free disk space or choose another place",
        ),
        (
            lambda: RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "a file cannot be read or written (No space left on device); free disk space or choose another place",
        ),
        (
            lambda: raised_by(Path("/dev/null/file").read_bytes),
            "/dev/null/file cannot be read or written (Not a directory)",
        ),
        (
            lambda: raised_by(lambda: np.empty(1 << 50)),
            "out of memory (Unable to allocate 8.00 PiB for an array with shape (1125899906842624,) and data type "
            "float64); lower --size",
        ),
        (
            lambda: raised_by(lambda: torch.empty(1 << 55)),
            "DefaultCPUAllocator: can't allocate memory",
        ),
        (lambda: torch.OutOfMemoryError("CUDA out of memory."), "out of memory (CUDA out of memory.); lower --size"),
        (
            lambda: RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "out of memory (DataLoader worker (pid 7) is killed by signal: Killed.); lower --size",
        ),
    ],
    ids=["full disk", "full disk in Rust", "no folder", "numpy", "torch", "GPU", "worker"],
)
def test_what_the_machine_lacks_is_one_line(
    raised: Callable[[], Exception], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors("lower --size"):
        raise raised()
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert line in printed


@pytest.mark.parametrize("mistake", [RuntimeError("shapes differ"), OSError("no such thing"), KeyError("a")])
def test_a_mistake_of_the_program_keeps_its_traceback(mistake: Exception) -> None:
    with pytest.raises(type(mistake)), one_line_errors():
        raise mistake


def test_json_is_all_that_standard_output_has(oem_sar: Path, tmp_path: Path) -> None:
    options = """--json --nproc 2 --config toy/stage2_segformer.yaml --crop_size 32 --max_train_steps 2
        --warmup_steps 0 --per_device_train_batch_size 2 --eval_steps 2 --checkpointing_steps 0
        --dataloader_num_workers 0 --report_to none"""
    done = hf_seg("stage2", *options.split(), "--data_dir", oem_sar, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    scores = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert found["output_dir"] == str(tmp_path / "run") and found["mean_iou"] == scores["mean_iou"]
    assert found["files"][0] == str(tmp_path / "run" / "README.md")
    assert "2 process(es)" in done.stderr and "mIoU after step 2" in done.stderr


def test_a_summary_names_what_to_open(tmp_path: Path) -> None:
    done = hf_seg("synth", "--output", tmp_path / "data", "--source", 2, "--train", 2, "--val", 1, "--size", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"OpenEarthMap: {tmp_path}/data/OpenEarthMap_wo_xBD, OpenEarthMap-SAR: {tmp_path}/data/dfc25_track1\n"
    )


def test_what_needs_another_extra_says_so() -> None:
    code = (
        "import sys\nsys.modules['albumentations'] = None\nfrom hf_seg import cli\n"
        "cli.main(['stage2', '--data_dir', 'nowhere'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: hf-seg stage2 needs albumentations: pip install 'hf_seg[train]'\n"


def test_an_encoder_of_timm_says_what_it_needs() -> None:
    code = (
        "import sys\nsys.modules['timm'] = None\nfrom hf_seg.timm_encoder import require_timm_architecture\n"
        "require_timm_architecture('runs/lite0', 'tf_efficientnet_lite0')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: runs/lite0: its encoder is one of timm: pip install timm, or 'hf_seg[train]'" in done.stderr


@pytest.mark.parametrize("value", ["9" * 5000, "100000", "\u00b2", "two", "00"])
def test_a_number_of_processes_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--nproc must be a number of"):
        cli.take_processes(["--nproc", value])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("two\nlines"), "error: two lines\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "aaa"),
            "error: aaa cannot be read or written (File name too long)\n",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    assert end.value.code == 2 and capsys.readouterr().err == line
    with pytest.raises(OSError, match="without a file"), one_line_errors():
        raise OSError("without a file")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hf-seg st", {"stage1", "stage2"}),
        ("hf-seg --json pse", {"pseudo-label"}),
        ("hf-seg stage2 --rce", {"--rce_weight", "--rce_epsilon"}),
        ("hf-seg predict --mixed_precision b", {"bf16"}),
        ("hf-seg data ch", {"check"}),
    ],
)
def test_a_shell_completes_commands_and_settings(line: str, expected: set[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9"}
    hf_seg(COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE_STDOUT_FILENAME=str(answer), **shell)
    assert {word.strip() for word in answer.read_text().splitlines()} == expected


def test_the_doctor_finds_this_environment_well() -> None:
    done = hf_seg("--json", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["packages"]["text"] == "all that maps need" and "[train]" not in found
    assert found["cpu"]["text"].startswith("torch ")


def test_the_doctor_tells_how_to_repair_torchvision(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    done = hf_seg("doctor", PYTHONPATH=f"{tmp_path}{os.pathsep}{PROJECT}")
    first, repair = (line for line in done.stdout.splitlines() if "torchvision" in line)
    assert done.returncode == 1 and first.startswith("problem  torchvision")
    assert repair.startswith("repair torchvision: python") and repair.endswith("repair_torchvision.py")
