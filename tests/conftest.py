"""What all tests share. Everything runs offline, and caches go to a folder of the test session."""

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="hf_seg_cache_")
os.environ.update(  # before anything of Hugging Face is imported
    HF_HOME=_cache.name,
    HF_HUB_OFFLINE="1",
    HF_EVALUATE_OFFLINE="1",
    NO_ALBUMENTATIONS_UPDATE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",  # small models: threads cost more than they give, and the order of sums stays fixed
)

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from campaign_results import SEED, random, results  # noqa: F401 (fixtures)

torch.set_num_threads(1)
CAMPAIGN = Path(__file__).parent / "campaign"


def pytest_report_header() -> str:
    """Print the seed that repeats the campaign."""
    return f"campaign seed: {SEED} (CAMPAIGN_SEED={SEED} repeats it)"


@pytest.hookimpl(tryfirst=True)  # before markers are selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the campaign as slow, and leave out GPU tests where there is no GPU."""
    for item in items:
        if CAMPAIGN in item.path.parents:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real scenes and tiles in the releases' own layout, kept beside the project; never part of it."""
    folder = Path(__file__).parents[2] / "shared" / "realdata"
    if not folder.is_dir():
        pytest.skip("real samples are not here")
    return folder


def write_tiff(path: Path, array: np.ndarray, **profile: object) -> None:
    """Write (H, W) or (bands, H, W) as GeoTIFF."""
    bands = array[None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=bands.dtype, **profile) as file:
        file.write(bands)


def make_scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a SAR-like image and its label: blocks of classes 1..8 whose brightness follows the class."""
    blocks = rng.integers(1, 9, (size // 16 + 1, size // 16 + 1))
    label = np.kron(blocks, np.ones((16, 16), np.int64))[:size, :size].astype(np.uint8)
    speckle = rng.gamma(8, 1 / 8, label.shape)
    return np.clip(label * 25 * np.sqrt(speckle), 1, 255).astype(np.uint8), label


@pytest.fixture(scope="session")
def oem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OpenEarthMap in the release's layout: two regions, 6 training and 2 validation tiles."""
    root = tmp_path_factory.mktemp("oem") / "OpenEarthMap_wo_xBD"
    rng = np.random.default_rng(1)
    for number in range(1, 9):
        grey, label = make_scene(rng, 96 + 16 * (number % 2))
        name = f"{'acre' if number % 2 else 'north-town'}_{number}.tif"
        write_tiff(root / name.rpartition("_")[0] / "images" / name, np.stack([grey, grey, 255 - grey]))
        write_tiff(root / name.rpartition("_")[0] / "labels" / name, label)
        with (root / ("train.txt" if number <= 6 else "val.txt")).open("a") as split:
            split.write(f"{name}\n")
    return root


@pytest.fixture(scope="session")
def oem_sar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OpenEarthMap-SAR in the release's layout: 6 training and 3 validation tiles of different sizes."""
    root = tmp_path_factory.mktemp("oem_sar") / "dfc25_track1"
    rng = np.random.default_rng(0)
    for split, area, count in (("train", "TrainArea", 6), ("val", "ValArea", 3)):
        for number in range(1, count + 1):
            sar, label = make_scene(rng, 96 + 16 * (number % 2))
            name = f"{area}_{number:03d}.tif"
            write_tiff(root / split / "sar_images" / name, sar)
            write_tiff(root / split / "labels" / name, label)
            if split == "train":
                write_tiff(root / split / "rgb_images" / name, np.stack([sar] * 3))
    return root
