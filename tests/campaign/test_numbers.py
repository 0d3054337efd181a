"""Values that are no numbers, and bits that have flipped: found before they are used."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import rasterio
import torch
from machine_faults import Outcome, run
from safetensors.torch import load_file, save_file
from test_disk import TOY, WINDOWS, Sources, empty, sources

from hf_seg.data.pseudo_label_dataset import damaged_files, load_pseudo_labels
from hf_seg.errors import UserError
from hf_seg.inference.load import load_networks
from hf_seg.training.checkpoints import find_checkpoint

if TYPE_CHECKING:
    from campaign_results import Results

__all__ = ["sources"]  # the fixture
FLIPS = 100  # of each kind of folder
SIDE = 96


@pytest.fixture(scope="module")
def outcomes(results: "Results") -> Callable[..., None]:
    """Return what adds a row."""

    def add(fault: str, where: str, cases: int, *, refused: int, unharmed: int = 0, used: int = 0) -> None:
        names = ("refused by one line", "used, and not changed by it", "used with other values")
        results.add(fault=fault, where=where, cases=cases, **dict(zip(names, (refused, unharmed, used), strict=True)))

    return add


def write_scene(path: Path, pixels: np.ndarray, **how: Any) -> Path:
    """Write a float32 SAR scene with a place on the ground."""
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)}
    with rasterio.open(path, "w", "GTiff", *pixels.shape[::-1], 1, dtype="float32", **place, **how) as file:
        file.write(pixels[None].astype(np.float32))
    return path


def speckle(seed: int = 0) -> np.ndarray:
    """Draw a scene without a value that is special."""
    return np.random.default_rng(seed).gamma(4, 0.05, (SIDE, SIDE)).astype(np.float32) + 0.01


def predict(scene: Path, root: Path, model: Path, *more: str) -> tuple[Outcome, np.ndarray | None]:
    """Map a scene with a given stretch, and return the class ids."""
    empty(root)
    words = f"hf-seg predict {scene} {root}/out/map.tif --model {model} --window 32 --batch_size 16".split()
    outcome = run([*words, *more], root)
    if outcome.exit_code:
        return outcome, None
    with rasterio.open(root / "out" / "map.tif") as file:
        return outcome, file.read(1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nodata", [None, np.nan, -9999.0])
def test_pixels_that_are_no_numbers_have_no_class(
    value: float,
    nodata: float | None,
    sources: Sources,
    outcomes: Callable[..., None],
    tmp_path: Path,
) -> None:
    stretch = ("--stretch", "0", "1", "--no_zero_collar")
    clean, whole = predict(write_scene(tmp_path / "clean.tif", speckle()), tmp_path / "w", sources["model"], *stretch)
    assert whole is not None, clean.output
    pixels = speckle()
    bad = np.zeros(pixels.shape, bool)
    bad[:, 80:] = True
    pixels[bad] = value
    scene = write_scene(tmp_path / "scene.tif", pixels, **({} if nodata is None else {"nodata": nodata}))
    outcome, found = predict(scene, tmp_path / "w", sources["model"], *stretch)
    assert found is not None, outcome.output
    assert (found[bad] == 0).all() and (found[~bad] > 0).all()
    assert np.array_equal(found[:, :48], whole[:, :48])  # windows without such a pixel
    where = f"pixels of a float scene, nodata {'not declared' if nodata is None else nodata}"
    outcomes(f"{value} as value", where, 1, refused=0, unharmed=1)


@pytest.mark.parametrize("how", ["one pixel of 3e38", "one pixel of -3e38", "a tenth at 3e38", "all equal", "all nan"])
def test_extreme_scenes_are_mapped_or_refused(
    how: str,
    sources: Sources,
    outcomes: Callable[..., None],
    tmp_path: Path,
) -> None:
    pixels = speckle()
    if how.startswith("one"):
        pixels[5, 5] = float(how.split()[-1])
    elif how.startswith("a tenth"):
        pixels[: SIDE // 10] = 3e38
    else:
        pixels[:] = 0.5 if how == "all equal" else np.nan
    outcome, found = predict(write_scene(tmp_path / "scene.tif", pixels), tmp_path / "w", sources["model"])
    if found is None:
        line = outcome.one_line()
        assert "pixel" in line
    else:
        assert (found > 0).all() and "Warning" not in outcome.output, outcome.output
    outcomes(how, "pixels of a float scene", 1, refused=int(found is None), unharmed=int(found is not None))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_training_stops_at_a_value_that_is_no_number(
    stage: str,
    fault: str,
    sources: Sources,
    outcomes: Callable[..., None],
    tmp_path: Path,
) -> None:
    words = f"hf-seg {stage} {TOY} --data_dir {sources['oem_sar']} --output_dir {tmp_path}/w/out/run --report_to none"
    if stage == "stage1":
        words += f" --source_dir {sources['oem']} --method source_only"
    disturb = "spoil_gradient:3" if fault == "gradient" else "spoil_weights:2"
    outcome = run(words.split(), tmp_path / "w", disturb=disturb)
    line = outcome.one_line()
    saved = sorted((tmp_path / "w" / "out" / "run" / "checkpoints").iterdir())
    assert "at step 3" in line and str(saved[-1]) in line and saved[-1].name == "step_00000002", line
    for file in saved[-1].glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    resumed = run([*words.split(), "--resume_from_checkpoint", "latest"], tmp_path / "w")
    assert resumed.exit_code == 0 and "resumed from step_00000002" in resumed.output, resumed.output
    outcomes(f"nan in the {fault}", stage, 1, refused=1)


@pytest.mark.parametrize("command", ["predict", "pseudo-label", "ensemble", "evaluate", "stage2"])
def test_weights_that_are_no_numbers_are_refused(
    command: str,
    sources: Sources,
    outcomes: Callable[..., None],
    random: Random,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sources["model"], model)
    tensors = load_file(model / "model.safetensors")
    name = random.choice(sorted(name for name, tensor in tensors.items() if tensor.is_floating_point()))
    tensors[name].view(-1)[random.randrange(tensors[name].numel())] = random.choice([np.nan, np.inf])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data, out = sources["oem_sar"], f"{tmp_path}/w/out"
    words = {
        "predict": f"predict {sources['scene']} {out}/map.tif --model {model}",
        "pseudo-label": f"pseudo-label --model {model} --data_dir {data} --output_dir {out}/labels {WINDOWS}",
        "ensemble": f"ensemble --model {sources['model']} {model} --data_dir {data} --output_dir {out}/e {WINDOWS}",
        "evaluate": f"evaluate --model {model} --data_dir {data} --output {out}/scores.json {WINDOWS}",
        "stage2": f"stage2 {TOY} --from_scratch false --model_name_or_path {model} --data_dir {data} "
        f"--output_dir {out}/run --report_to none",
    }[command]
    line = run(["hf-seg", *words.split()], tmp_path / "w").one_line()
    assert str(model) in line and "not finite" in line, line
    outcomes("nan or inf in a weight", command, 1, refused=1)


def flip(path: Path, random: Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    bit = random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.unlink()  # what has mapped the file into memory keeps it
    path.write_bytes(content)


@contextlib.contextmanager
def flipped(folder: Path, random: Random, name: str = "*") -> Any:
    """Flip one bit of a file of a folder, each file as probable as the others, and flip it back afterwards."""
    path = random.choice(sorted(path for path in folder.rglob(name) if path.is_file() and path.stat().st_size))
    before = path.read_bytes()
    flip(path, random)
    yield path
    path.unlink()
    path.write_bytes(before)


def test_a_checkpoint_with_a_flipped_bit_is_never_used(
    sources: Sources,
    outcomes: Callable[..., None],
    random: Random,
    tmp_path: Path,
) -> None:
    words = f"hf-seg stage2 {TOY} --ema_decay 0.9 --data_dir {sources['oem_sar']} --output_dir {tmp_path}/w/run"
    outcome = run([*words.split(), "--report_to", "none"], tmp_path / "w")
    assert outcome.exit_code == 0, outcome.output
    older, newer = sorted((tmp_path / "w" / "run" / "checkpoints").iterdir())
    for _ in range(FLIPS):
        with flipped(newer, random) as path:
            assert find_checkpoint(tmp_path / "w" / "run", "latest") == older, path
            with pytest.raises(UserError, match=r"is damaged|no complete"):
                find_checkpoint(tmp_path / "w" / "run", str(newer))
    assert find_checkpoint(tmp_path / "w" / "run", "latest") == newer
    outcomes("one flipped bit", "all files of a checkpoint", FLIPS, refused=FLIPS)


def test_labels_with_a_flipped_bit_are_never_learned(
    sources: Sources,
    outcomes: Callable[..., None],
    random: Random,
    tmp_path: Path,
) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(sources["labels"], labels)
    clean = [np.array(row["pseudo_label"]) for row in load_pseudo_labels(str(labels))]
    for name, where in (("*.parquet", "the shards of pseudo-labels"), ("*", "all files of pseudo-labels")):
        refused = 0
        for _ in range(FLIPS // 2):
            with flipped(labels, random, name) as path:
                try:
                    found = [np.array(row["pseudo_label"]) for row in load_pseudo_labels(str(labels))]
                except UserError:
                    refused += 1
                    continue
                assert path.suffix != ".parquet"
                assert all(np.array_equal(*pair) for pair in zip(found, clean, strict=True)), path
        outcomes("one flipped bit", where, FLIPS // 2, refused=refused, unharmed=FLIPS // 2 - refused)
    assert damaged_files(labels) == []


def test_a_model_with_a_flipped_bit_is_refused_or_loads(
    sources: Sources,
    outcomes: Callable[..., None],
    random: Random,
    tmp_path: Path,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sources["model"], model)

    def weights() -> dict[str, torch.Tensor]:
        (network,) = load_networks(model)
        return network.network().state_dict()

    clean, refused, used = weights(), 0, 0
    for _ in range(FLIPS):
        with flipped(model, random):
            try:
                found = weights()
            except UserError:
                refused += 1
                continue
            used += not all(torch.equal(found[name], value) for name, value in clean.items())
    where = "a model's folder, which has no checksums"
    outcomes("one flipped bit", where, FLIPS, refused=refused, unharmed=FLIPS - refused - used, used=used)
