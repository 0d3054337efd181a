"""A synthetic dataset in the layout of OpenEarthMap and OpenEarthMap-SAR, to try and to test every stage on.

Nothing is downloaded: land cover, optical images, SAR images and label noise are computed from a seed.

    python scripts/make_synthetic_dataset.py --output data/synthetic --seed 7 --scene 2048

    OpenEarthMap_wo_xBD           optical tiles with exact labels, split into train and val (`--source_dir`)
    dfc25_track1                  optical/SAR pairs (`--data_dir`): simulated noisy labels in train, exact ones in val
                                  and test. Unlike the release, val and test have optical images too: to score stage 1
    dfc25_track1_extra            the exact labels of train, which no recipe reads
    scene.tif, scene_label.tif    with `--scene 2048`: a large SAR scene to map, with districts of all regions, a river,
                                  and its exact labels

It is made to be hard: as in real SAR, brightness alone says little about a class. The SAR images are fitted to ten real
scenes, the label noise to the published agreement of the pseudo-labels with manual labels, the fine texture of each
class in optical images to real tiles. Bareland is rare and, as in reality, hardly learnable from SAR. Relief and
railways are missing. Scores on this dataset show that the method works; they say nothing about the accuracy on real
scenes.

Measured on 60 SAR scenes (`--source 56 --train 48 --val 12`, seed 7) with `scripts/calibrate_synthetic_dataset.py`, and
with `measure_synthetic_difficulty.py` from "networks" on:
    SAR          per class mean, std and local CV within 10 % of ten real scenes'; seeds 11 and 23: within 15 %
    labels       agreement within 0.05, IoU within 0.09 of the published ones, with all three seeds
    bareland     0.7 % of the pixels; 0.9 % and 1.6 % with seeds 11 and 23. It varies: 1.8 % on average over 15 seeds
    difficulty   mIoU on unseen scenes: histogram of single pixels 0.055, of 9 x 9 means and deviations 0.120
    networks     a small convolutional network, 400 steps, seed 1, 60 optical source tiles: 0.536 on unseen source
                 tiles, 0.405 on unseen target tiles
    resolution   `--steps 300 --model_name_or_path pretrained/efficientnet_lite0`, `--source 60` (52 to train on), 40
                 unseen target scenes: 0.637 rendered sharp, 0.533 coarse; seed 1: 0.631, 0.517. 10 to 11 points of mIoU
                 are lost; of fields 34 to 46, roads 17, rangeland 10, developed space 8, buildings 7.
                 Eleven real tiles lose 4 of 46 and 43, over seven classes: buildings 15, bareland 9, trees and roads 3;
                 rangeland and developed space were hardly learned, and there are no fields.
                 The small network (500 steps: 0.298, 0.311) learns hardly any texture, and loses nothing.

Modules: `parcels` divides a scene into streets, blocks and lots; `ground` adds land cover and heights; `optical` and
`sar` render the images; `noise` simulates noisy labels; `fields` has the random fields and the ray geometry.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import rasterio
from rasterio.transform import Affine
from tqdm import tqdm

from hf_seg.errors import UserError
from hf_seg.files import atomic_folder
from hf_seg.processes import end_with_parent
from hf_seg.settings import check_bounds, setting
from hf_seg.synthetic.ground import Ground, make_ground
from hf_seg.synthetic.noise import SYSTEMATIC, corrupt_labels
from hf_seg.synthetic.optical import SOURCE_CAMERA, TARGET_CAMERA, render_optical
from hf_seg.synthetic.parcels import MOSAIC, REGIONS, Region
from hf_seg.synthetic.sar import render_sar

SOURCE_FOLDER, TARGET_FOLDER, EXTRA_FOLDER = "OpenEarthMap_wo_xBD", "dfc25_track1", "dfc25_track1_extra"
MIN_SIZE = 64  # pixels; a smaller scene contains no street
MAX_SIZE = 2**15  # pixels; 400 GB of memory
MAX_WORKERS = 1024
GAIN_SPREAD = 0.28  # scenes are up to e^0.28 brighter or darker than the median
KINDS = ("source", "train", "val", "test", "scene")  # the order is fixed: random streams and coordinates depend on it


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """Content of the dataset; numbers of tiles are best multiples of the ten regions."""

    seed: int = setting(0, "the same seed gives the same bytes", low=0, high=2**31)
    source: int = setting(
        70, "labelled optical tiles; one in seven, at least one, is for validation", low=2, high=10**6
    )
    train: int = setting(160, "optical/SAR pairs with simulated noisy labels", low=1, high=10**6)
    val: int = setting(20, "optical/SAR pairs with exact labels", low=1, high=10**6)
    test: int = setting(100, "the same, for the final evaluation", low=0, high=10**6)
    size: int = setting(256, "side of a tile in pixels", low=MIN_SIZE, high=MAX_SIZE)
    label_noise: float = setting(1.0, "errors in the labels of train, 1 = as published; 0: none", low=0, high=2)
    systematic: float = setting(
        SYSTEMATIC, "how far what is visible determines where labels are wrong; 0: they are by chance", low=0, high=1
    )
    scene: int | None = setting(
        None, "side of a large SAR scene to map, in pixels; 400 bytes of memory each", low=MIN_SIZE, high=MAX_SIZE
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True)
class Scene:
    """One scene: everything in it follows from (seed, kind, index) and size."""

    seed: int
    kind: str
    index: int
    size: int

    @property
    def region(self) -> Region:
        """Return the region; each kind cycles through all of them, so that class frequencies are stable."""
        return MOSAIC if self.kind == "scene" else REGIONS[self.index % len(REGIONS)]

    @property
    def name(self) -> str:
        """Return the file stem, as in the releases."""
        if self.kind == "source":
            return f"{self.region.name}_{self.index // len(REGIONS) + 1}"
        return f"{self.kind.capitalize()}Area_{self.index + 1:03d}"

    @property
    def gain(self) -> float:
        """Return the radar's gain: a low-discrepancy sequence over a region's scenes, balanced after few scenes."""
        quantile = (self.index // len(REGIONS) * 0.6180 + self.index % len(REGIONS) * 0.3819 + self.seed * 0.2360) % 1
        return float(1.03 * np.exp(GAIN_SPREAD * (2 * quantile - 1)))

    def generators(self) -> list[np.random.Generator]:
        """Return independent generators for ground, optical image, SAR image and label noise."""
        sequence = np.random.SeedSequence([self.seed, KINDS.index(self.kind), self.index])
        return [np.random.default_rng(child) for child in sequence.spawn(4)]

    def make_ground(self, rng: np.random.Generator) -> Ground:
        """Draw the ground; the pixels of the source (OpenEarthMap) are smaller than those of the target."""
        gsd = rng.uniform(0.38, 0.52) if self.kind == "source" else rng.uniform(0.42, 0.6)
        return make_ground(rng, self.size, self.region, gsd)


def check_synthetic_dataset(folder: Path) -> None:
    """Raise `UserError` if `folder` is not what `make_synthetic_dataset` writes."""
    for name in (SOURCE_FOLDER, TARGET_FOLDER, EXTRA_FOLDER):
        if not (folder / name).is_dir():
            hint = "make a dataset with scripts/make_synthetic_dataset.py"
            raise UserError(f"--data {folder} has no folder {name}; {hint}")


def make_synthetic_dataset(output: str | Path, *, num_workers: int = 1, **settings: float | None) -> Path:
    """Write a synthetic dataset atomically.

    Args:
        output: folder to create; the module's docstring lists its content.
        num_workers: processes; the bytes do not depend on it.
        **settings: fields of `SyntheticSettings`.

    Raises:
        UserError: `output` exists or cannot be written, or a setting is out of range.
    """
    output, chosen = Path(output), SyntheticSettings(**settings)  # type: ignore[arg-type]
    if not 1 <= num_workers <= MAX_WORKERS:
        raise UserError(f"num_workers must be at least 1 and at most {MAX_WORKERS}; it is {num_workers}")
    if os.path.lexists(output):
        raise UserError(f"{output} exists; remove it or choose a new folder")
    counts = {kind: getattr(chosen, kind) for kind in KINDS[:-1]}
    scenes = [Scene(chosen.seed, kind, index, chosen.size) for kind, count in counts.items() for index in range(count)]
    if chosen.scene:  # first, since it takes longest
        scenes.insert(0, Scene(chosen.seed, "scene", 0, chosen.scene))
    with atomic_folder(output) as folder:
        for _ in tqdm(_write_all(scenes, folder, chosen, num_workers), "synthetic dataset", len(scenes), unit="scene"):
            pass
        _write_lists(folder / SOURCE_FOLDER, [scene for scene in scenes if scene.kind == "source"])
        _write_descriptions(folder, chosen)
    return output


def write_sar_scene(path: Path, *, size: int, seed: int = 0) -> Path:
    """Write the SAR scene of `make_synthetic_dataset(scene=size, seed=seed)` alone, and return its path."""
    scene = Scene(seed, "scene", 0, size)
    ground_rng, _, sar_rng, _ = scene.generators()
    ground = scene.make_ground(ground_rng)
    _write_tiff(path, render_sar(sar_rng, ground, scene.gain), scene, ground.gsd)
    return path


def _write_all(scenes: list[Scene], root: Path, settings: SyntheticSettings, num_workers: int) -> Iterator[None]:
    """Write every scene, yielding after each."""
    if num_workers == 1:
        yield from map(_write_scene, scenes, itertools.repeat(root), itertools.repeat(settings))
        return
    # spawned, not forked: a forked process inherits the locks of threads that it does not have
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        yield from pool.map(_write_scene, scenes, itertools.repeat(root), itertools.repeat(settings))


def _start_worker(parent: int) -> None:
    cv2.setNumThreads(1)
    end_with_parent(parent)


def _write_scene(scene: Scene, root: Path, settings: SyntheticSettings) -> None:
    """Render one scene and write its files."""
    ground_rng, optical_rng, sar_rng, noise_rng = scene.generators()
    ground = scene.make_ground(ground_rng)
    label = ground.crop(ground.label)
    file, target = f"{scene.name}.tif", root / TARGET_FOLDER / scene.kind
    if scene.kind == "source":
        region = root / SOURCE_FOLDER / scene.region.name
        images = {region / "images" / file: render_optical(optical_rng, ground, SOURCE_CAMERA)}
        images[region / "labels" / file] = label
    elif scene.kind == "scene":
        images = {root / "scene.tif": render_sar(sar_rng, ground, scene.gain), root / "scene_label.tif": label}
    else:
        images = {target / "sar_images" / file: render_sar(sar_rng, ground, scene.gain)}
        images[target / "rgb_images" / file] = render_optical(optical_rng, ground, TARGET_CAMERA)
        images[target / "labels" / file] = label
    if scene.kind == "train":
        noise = {"amount": settings.label_noise, "systematic": settings.systematic}
        noisy = corrupt_labels(noise_rng, ground.label, ground.parcel, ground.gsd, **noise)
        images[target / "labels" / file] = ground.crop(noisy)
        images[root / EXTRA_FOLDER / "train_clean_labels" / file] = label
    for path, image in images.items():
        _write_tiff(path, image, scene, ground.gsd)


def _write_tiff(path: Path, image: np.ndarray, scene: Scene, gsd: float) -> None:
    """Write (H, W) or (3, H, W) uint8 as a GeoTIFF.

    The tiles of a kind lie side by side, in the open sea of three UTM zones, so that they are not mistaken for images
    of a real place.
    """
    bands = np.atleast_3d(image.T).T  # (H, W) -> (1, H, W)
    region = scene.index % len(REGIONS)
    east = 420_000 + 10_000 * region + scene.index * scene.size
    north = 5_100_000 + 20_000 * region - 10_000 * KINDS.index(scene.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=scene.size,
        width=scene.size,
        count=len(bands),
        dtype=bands.dtype,
        crs=f"EPSG:326{scene.region.utm_zone}",
        transform=Affine(gsd, 0, east, 0, -gsd, north),
        compress="deflate",
        predictor=2,
        photometric="RGB" if len(bands) == 3 else "MINISBLACK",
        interleave="pixel",
    ) as file:
        file.write(bands)


def _write_lists(folder: Path, scenes: list[Scene]) -> None:
    """Write OpenEarthMap's split lists: one tile in seven for validation, none for test."""
    val = [scene for scene in scenes if scene.index % 7 == 6] or scenes[-1:]
    lists = {"train": [scene for scene in scenes if scene not in val], "val": val, "test": []}
    for split, members in lists.items():
        text = "".join(f"{scene.name}.tif\n" for scene in members)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")


def _write_descriptions(root: Path, settings: SyntheticSettings) -> None:
    """Write the `dataset.json` of both datasets, which `hf_seg.data.provenance` reads."""
    source = {
        "name": "hf_seg synthetic dataset, optical tiles",
        "layout": "OpenEarthMap",
        "description": "Computed optical images of imaginary places, with their exact land-cover labels.",
        "labels": {"train": "exact", "val": "exact"},
    }
    target = {
        "name": "hf_seg synthetic dataset, optical/SAR pairs",
        "layout": "OpenEarthMap-SAR",
        "description": "Computed optical and SAR images of imaginary places, with their land-cover labels.",
        "labels": {
            "train": "simulated noisy labels" if settings.label_noise else "exact",
            "val": "exact",
            "test": "exact",
        },
    }
    common = {"license": "Apache-2.0", "synthetic": True, "settings": dataclasses.asdict(settings)}
    for folder, description in ((SOURCE_FOLDER, source), (TARGET_FOLDER, target)):
        text = json.dumps({**description, **common}, indent=2) + "\n"
        (root / folder / "dataset.json").write_text(text, encoding="utf-8")
