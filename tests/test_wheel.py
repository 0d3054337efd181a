"""The wheel: what `pip install` brings trains, writes a card and predicts, without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from conftest import write_tiff
from huggingface_hub import ModelCard

from hf_seg.arguments import Stage2Arguments
from hf_seg.settings import parse_arguments

PROJECT = Path(__file__).parents[1]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, without a network."""
    root = tmp_path_factory.mktemp("wheel")
    folders = {"hf_seg", "model_cards", "recipes", "scripts"}
    for folder in folders:
        shutil.copytree(PROJECT / folder, root / "sources" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / file, root / "sources")
    pip("wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", root, root / "sources")
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def run(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python outside the checkout, with the installed package before any other."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_the_wheel_contains_every_module_recipe_setting_and_template(wheel: Path) -> None:
    files = [path.relative_to(PROJECT) for path in PROJECT.glob("hf_seg/**/*") if path.is_file()]
    manuals = {".md"}
    expected = {path.as_posix() for path in files if path.suffix not in manuals and "__pycache__" not in path.parts}
    settings = ("recipes/*.py", "recipes/**/*.yaml", "recipes/slurm/*")
    for pattern in (*settings, "scripts/**/*.py", "model_cards/*.py", "model_cards/*.md"):
        expected |= {f"hf_seg/{path.relative_to(PROJECT).as_posix()}" for path in PROJECT.glob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        contained = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert contained == expected


def test_an_installed_package_trains_writes_a_card_and_predicts(installed: Path, oem_sar: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import hf_seg; print(hf_seg.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)

    options = """--config toy/stage2_segformer.yaml --crop_size 32 --max_train_steps 2 --warmup_steps 0
        --per_device_train_batch_size 2 --eval_steps 2 --checkpointing_steps 0 --dataloader_num_workers 0
        --report_to none --output_dir run"""
    done = run(installed, tmp_path, "-m", "hf_seg.cli", "stage2", *options.split(), "--data_dir", oem_sar)
    assert done.returncode == 0, done.stdout + done.stderr
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.model_name == "SegFormer for SAR land cover"
    assert "\n## Licence\n" in card.text
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["model_name_or_path"], recipe["rce_weight"], recipe["max_train_steps"]) == ("toy-segformer", 0.1, 2)

    pixels = np.random.default_rng(0).integers(1, 256, (40, 50), np.uint8)
    write_tiff(tmp_path / "scene.tif", pixels, crs="EPSG:32631", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6))
    done = run(installed, tmp_path, "-m", "hf_seg.cli", "predict", "scene.tif", "map.tif", "--model", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    with rasterio.open(tmp_path / "map.tif") as label_map:
        assert label_map.shape == (40, 50) and label_map.crs.to_epsg() == 32631
        assert {*np.unique(label_map.read(1))} <= {*range(1, 9)}


@pytest.mark.slow  # downloads every package
@pytest.mark.timeout(1800)
def test_in_an_empty_environment_the_wheel_maps_and_with_train_it_trains(
    wheel: Path, oem_sar: Path, tmp_path: Path
) -> None:
    """The pinned torch goes first, as in the Makefile; the model that maps is made by the environment that trains."""
    constraints = PROJECT / "constraints.txt"
    (torch,) = (line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
    pixels = np.random.default_rng(0).integers(1, 256, (40, 50), np.uint8)
    write_tiff(tmp_path / "scene.tif", pixels, crs="EPSG:32631", transform=rasterio.Affine(1, 0, 5e5, 0, -1, 5e6))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    train = f"""synth --output data --source 2 --train 2 --val 1 --size 64
        stage2 --config toy/stage2_segformer.yaml --crop_size 32 --max_train_steps 2 --warmup_steps 0 --eval_steps 2
        --per_device_train_batch_size 2 --dataloader_num_workers 0 --data_dir {oem_sar} --output_dir run
        report run --data_dir {oem_sar} --output report.html"""
    maps = """doctor
        predict scene.tif map.tif --model run --preview --overwrite"""
    for name, requirement, lines in (("train", f"{wheel}[train]", train), ("map", str(wheel), maps)):
        subprocess.run([sys.executable, "-m", "venv", tmp_path / name], check=True)
        binaries = tmp_path / name / "bin"
        install = [binaries / "python", "-m", "pip", "install", "-q", "-c", constraints]
        for package in (torch, requirement):
            subprocess.run([*install, package], check=True, timeout=900, capture_output=True)
        if name == "train":
            repair = [binaries / "python", "-m", "hf_seg.scripts.repair_torchvision"]
            subprocess.run(repair, cwd=tmp_path, env=environment, check=True)
        for line in lines.replace("\n        --", " --").splitlines():
            done = subprocess.run(
                [binaries / "hf-seg", *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "\n## Licence\n" in (tmp_path / "run" / "README.md").read_text()
    with rasterio.open(tmp_path / "map.tif") as label_map:
        assert label_map.shape == (40, 50) and {*np.unique(label_map.read(1))} <= {*range(1, 9)}


def test_a_config_is_first_looked_up_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "toy/stage2_segformer.yaml"]
    assert parse_arguments(Stage2Arguments, argv).model_name_or_path == "toy-segformer"
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "stage2_segformer.yaml").write_text("seed: 7\n")
    args = parse_arguments(Stage2Arguments, argv)
    assert (args.seed, args.model_name_or_path) == (7, "nvidia/mit-b5")
