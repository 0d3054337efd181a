"""Scenes and ensembles: around the network as little time as possible, and one member's memory for three."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import rasterio
import torch
from benchmarks.measure import Figure, Result, race
from rasterio.transform import from_origin

from hf_seg import EnsembleForSemanticSegmentation, predict_raster
from hf_seg.hub.export import image_processor
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.models import SegmentationNetwork, build_model, normalization_of

MEMBERS = ("nvidia/mit-b0", "nvidia/mit-b1", "nvidia/mit-b2")
# A process begins with the peak of the one that started it, so that is cleared first (Linux).
ONE_PREDICTION = """
from pathlib import Path
Path("/proc/self/clear_refs").write_text("5")
import sys
import numpy as np
from hf_seg import EnsembleForSemanticSegmentation
size, low_memory, *folders = sys.argv[1:]
ensemble = EnsembleForSemanticSegmentation.from_members(folders, low_memory=low_memory == "True")
ensemble.predict(np.random.default_rng(0).integers(1, 256, (int(size),) * 2, dtype=np.uint8))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def save_model(name: str, folder: Path, size: int) -> Path:
    """Write a model with random weights as a recipe exports it."""
    torch.manual_seed(0)
    model = build_model(name, crop_size=size, from_scratch=True)
    model.save_pretrained(folder)
    image_processor(size, normalization_of(model)).save_pretrained(folder)
    return folder


def write_scene(path: Path, size: int) -> Path:
    """Write speckle as uint8, in tiles, deflate."""
    levels = np.random.default_rng(0).gamma(4, 12, (size, size))
    profile = {"driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": "uint8", "tiled": True}
    georeference = {"crs": "EPSG:32654", "transform": from_origin(400_000, 4_000_000, 0.5, 0.5)}
    with rasterio.open(path, "w", **profile, **georeference, compress="deflate") as file:
        file.write(np.clip(levels, 1, 255).astype(np.uint8), 1)
    return path


@torch.no_grad()
def map_whole_array(network: SegmentationNetwork, source: Path, target: Path, window: int, stride: int) -> None:
    """Map a scene with all of it, and the sum of its probabilities, in memory."""
    with rasterio.open(source) as file:
        pixels, profile = file.read(1), file.profile
    image = network.normalization.apply(torch.from_numpy(pixels)[None].expand(3, -1, -1))
    total = torch.zeros(OPEN_EARTH_MAP.num_labels, *pixels.shape)
    starts = [[*range(0, side - window, stride), side - window] for side in pixels.shape]
    for top in starts[0]:
        for left in starts[1]:
            place = slice(None), slice(top, top + window), slice(left, left + window)
            total[place] += network(image[place][None]).logits[0].softmax(0)
    total[0] = 0
    with rasterio.open(target, "w", **profile) as file:
        file.write(total.argmax(0).to(torch.uint8).numpy(), 1)


def scene(size: int, repeats: int) -> list[Result]:
    """A scene of 2 size x 2 size by a toy against the loop over a whole array, and the time outside the network."""
    window = size // 2
    torch.manual_seed(0)
    network = SegmentationNetwork(build_model("toy-segformer", crop_size=window, from_scratch=True)).eval()
    with tempfile.TemporaryDirectory() as folder:
        source, target, whole = (
            write_scene(Path(folder, "s.tif"), 2 * size),
            Path(folder, "m.tif"),
            Path(folder, "w.tif"),
        )
        in_network, outside = [], []

        def ours() -> None:
            summary = predict_raster(network, source, target, window=window, overwrite=True, show_progress=False)
            in_network.append(summary.network_seconds)
            outside.append(summary.seconds - summary.network_seconds)

        loop = {"whole array": lambda: map_whole_array(network, source, whole, window, window // 2)}
        figures = race(ours, loop, repeats)
        with rasterio.open(target) as mine, rasterio.open(whole) as theirs:  # they differ in how windows are blended
            assert mine.shape == theirs.shape and mine.crs == theirs.crs
    name = f"scene, {2 * size} x {2 * size}, toy, windows of {window}"
    share = Result(
        f"{name}: outside the network", Figure.of(outside[1:]), {"network": Figure.of(in_network[1:])}, ">= 9"
    )
    return [Result(name, *figures, ""), share]


def members(size: int, repeats: int, names: tuple[str, ...] = MEMBERS) -> list[Result]:
    """Three networks as one: peak memory with `low_memory` against the largest alone, time against the sum."""
    window = size // 4
    image = np.random.default_rng(0).integers(1, 256, (size // 2, size // 2), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [save_model(name, Path(temporary, f"m{i}"), window) for i, name in enumerate(names)]
        ensemble = EnsembleForSemanticSegmentation.from_members(folders)
        singles = [EnsembleForSemanticSegmentation.from_members([folder]) for folder in folders]
        mean = torch.stack([torch.from_numpy(each.predict(image)[0].label_map) for each in singles])
        if torch.equal(mean.min(0).values, mean.max(0).values):
            np.testing.assert_array_equal(ensemble.predict(image)[0].label_map, mean[0].numpy())
        one_by_one = {"one by one": lambda: [each.predict(image) for each in singles]}
        figures = race(lambda: ensemble.predict(image), one_by_one, repeats)
        peaks = [
            _peak(size // 2, low, chosen) for low, chosen in ((True, folders), (False, folders[-1:]), (False, folders))
        ]
    low, largest, together = (Figure.of([peak]) for peak in peaks)
    peers = {"the largest alone": largest, "without low_memory": together}
    return [
        Result(f"{len(names)} members, {size // 2} px", *figures, ">= 0.95"),
        Result(f"{len(names)} members, low_memory: peak of the process", low, peers, "largest >= 0.83", "MiB"),
    ]


def _peak(size: int, low_memory: bool, folders: list[Path]) -> float:
    """Return the peak memory in MiB of a fresh process that predicts one image."""
    command = [sys.executable, "-c", ONE_PREDICTION, str(size), str(low_memory), *map(str, folders)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
