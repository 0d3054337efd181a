"""The repair of a CUDA torchvision with a CPU torch, tested in a fresh environment."""

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "repair_torchvision.py"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A fresh environment that finds torch and torchvision through a path file, without this one's hooks."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    installed = Path(importlib.util.find_spec("torch").origin).parents[1]
    (site / "installed.py").write_text(f"import sys; sys.path.append({str(installed)!r})")  # runs no path files there
    (site / "installed.pth").write_text("import installed\n")
    return python


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=120)


def test_a_mismatched_torchvision_is_made_to_import_and_a_sound_one_is_left_alone(environment: Path) -> None:
    broken = run(environment, "-c", "import torchvision")
    repair = run(environment, SCRIPT)
    assert repair.returncode == 0, repair.stderr
    hooks = sorted(environment.parents[1].glob("lib/python*/site-packages/_declare_torchvision*"))
    if broken.returncode == 0:
        assert "nothing to repair" in repair.stdout and not hooks
        return
    assert "torchvision::nms does not exist" in broken.stderr
    assert [hook.suffix for hook in hooks] == [".pth", ".py"] and str(hooks[0]) in repair.stdout
    again = run(environment, SCRIPT)
    assert again.stdout == "torchvision imports; nothing to repair\n"
    assert run(environment, "-c", "import timm").returncode == 0
    untouched = run(environment, "-c", "import sys; print('torch' in sys.modules)")
    assert untouched.stdout == "False\n", "the hook must cost nothing until torchvision is imported"


def test_help_and_a_wrong_argument_repair_nothing(environment: Path) -> None:
    shown = run(environment, SCRIPT, "--help")
    assert shown.returncode == 0 and "To undo the repair" in shown.stdout
    wrong = run(environment, SCRIPT, "--undo")
    assert (wrong.returncode, wrong.stderr) == (2, "error: unknown argument '--undo'; the script takes none\n")
    for result in (shown, wrong):
        assert "nothing to repair" not in result.stdout and "repaired by" not in result.stdout
    assert not list(environment.parents[1].glob("lib/python*/site-packages/_declare_torchvision*"))


def test_another_defect_is_reported_and_not_repaired(environment: Path) -> None:
    (site,) = environment.parents[1].glob("lib/python*/site-packages")
    (site / "torchvision.py").write_text("raise ImportError('some other defect')")
    repair = run(environment, SCRIPT)
    assert repair.returncode == 1 and "some other defect" in repair.stderr
    assert not list(site.glob("_declare_torchvision*"))


def test_all_eight_packages_and_the_accelerate_command_work_here() -> None:
    names = "torch, transformers, accelerate, datasets, timm, evaluate, huggingface_hub, albumentations"
    assert run(Path(sys.executable), "-c", f"import {names}").returncode == 0
    accelerate = run(Path(sys.executable).with_name("accelerate"), "launch", "--help")
    assert accelerate.returncode == 0, accelerate.stderr
