"""A generated world in the layout of OpenEarthMap and OpenEarthMap-SAR, hard enough that learning shows.

    python scripts/make_synthetic_dataset.py --output data/toy --seed 7 --source 56 --train 48 --val 12 --size 256
    python scripts/calibrate_synthetic_dataset.py statistics --world data/toy      (and figure, networks)

ground     land cover, heights: streets, blocks and lots (parcels), buildings, water, trees, in ten region styles
optical    the source's and the target's camera: another sharpness, colour cast, contrast, season and sun
sar        side-looking geometry (layover, shadow, bright walls), overlapping reflectivities, correlated speckle,
           zero wedges at the swath's edge, labelled
noise      the train labels as automatic labelling makes them; val and test labels are clean
statistics what is measured on scenes, real or generated

Measured on the 60 OEM-SAR scenes of the world above, 256 px (0.13 s per scene on one core, all files):
    SAR          per class mean, std and local CV within 15 % of ten real scenes'. Three other seeds, 60 scenes each:
                 the same, but for agriculture's std (-21 % once), which hangs on a few fields.
    labels       agreement within 0.05, IoU within 0.08 of the published ones
    difficulty   mIoU on unseen scenes: histogram of single pixels 0.055, of 9 x 9 means and deviations 0.110
    networks     a small convolutional network, 1500 steps, one seed: SAR with clean labels 0.452, with noisy ones
                 0.381. Optical, trained on the source: 0.686 on the source, 0.436 on the target.

Bareland is rare (1 %) and, as in reality, hardly learnable from SAR. Of real scenes it has neither relief nor railways.
"""

import itertools
import json
import multiprocessing
import shutil
import tempfile
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
from hf_seg.synthetic.ground import STYLES, Ground, make_ground
from hf_seg.synthetic.noise import corrupt_labels
from hf_seg.synthetic.optical import SOURCE_CAMERA, TARGET_CAMERA, render_optical
from hf_seg.synthetic.sar import render_sar

MIN_SIZE = 64  # pixels: below, a scene holds no street
SOURCE_FOLDER, TARGET_FOLDER, EXTRA_FOLDER = "OpenEarthMap_wo_xBD", "dfc25_track1", "dfc25_track1_extra"
GAIN_SPREAD = 0.28  # scenes are up to e^0.28 brighter or darker than the middle one
KINDS = ("source", "train", "val", "test", "scene")  # never in another order: seeds and places hang on it


class SyntheticDatasetError(UserError):
    """The world cannot be made; the message names the value and the way out."""


@dataclass(frozen=True)
class Region:
    """A place of the generated world; its tiles lie in a row along the region's street of coordinates."""

    name: str
    style: str
    crs: str
    origin: tuple[float, float]  # easting and northing in metres


# Names as the release has them: with `-` and `_` too. Places in open sea of three UTM zones, so that nobody mistakes
# the tiles for imagery of somewhere.
REGIONS = tuple(
    Region(name, style, crs, (420_000 + 10_000 * i, 5_100_000 + 20_000 * i))
    for i, (name, style, crs) in enumerate(
        [
            ("maple_grove", "suburb", "EPSG:32614"),
            ("plaine", "farmland", "EPSG:32627"),
            ("riverton", "riverside", "EPSG:32614"),
            ("portworks", "works", "EPSG:32627"),
            ("north_wood", "woodland", "EPSG:32614"),
            ("shin-machi", "grid_city", "EPSG:32655"),
            ("seabreeze", "coast", "EPSG:32614"),
            ("altstadt", "old_town", "EPSG:32627"),
            ("haute-combe", "lakeland", "EPSG:32627"),
            ("midway", "mixed", "EPSG:32655"),
        ]
    )
)


@dataclass(frozen=True)
class Scene:
    """One scene to make: everything in it follows from (seed, kind, index) and size."""

    seed: int
    kind: str
    index: int
    size: int

    @property
    def region(self) -> Region:
        """Every kind visits all regions in turn, so that class shares are stable in small worlds too."""
        return REGIONS[self.index % len(REGIONS)]

    @property
    def name(self) -> str:
        """Return the file stem, as the release names its tiles."""
        if self.kind == "source":
            return f"{self.region.name}_{self.index // len(REGIONS) + 1}"
        return f"{self.kind.capitalize()}Area_{self.index + 1:03d}"

    @property
    def gain(self) -> float:
        """Return the radar's gain; a low-discrepancy sequence over a region's scenes, so that few are balanced too."""
        quantile = (self.index // len(REGIONS) * 0.6180 + self.index % len(REGIONS) * 0.3819 + self.seed * 0.2360) % 1
        return float(1.03 * np.exp(GAIN_SPREAD * (2 * quantile - 1)))

    def generators(self) -> list[np.random.Generator]:
        """Return independent generators for ground, optical, SAR and label noise."""
        sequence = np.random.SeedSequence([self.seed, KINDS.index(self.kind), self.index])
        return [np.random.default_rng(child) for child in sequence.spawn(4)]

    def make_ground(self, rng: np.random.Generator) -> Ground:
        """Draw the ground at the domain's pixel size: OpenEarthMap's is finer."""
        gsd = rng.uniform(0.38, 0.52) if self.kind == "source" else rng.uniform(0.42, 0.6)
        return make_ground(rng, self.size, STYLES[self.region.style], gsd)


def make_synthetic_dataset(
    output: str | Path,
    *,
    seed: int = 0,
    source: int = 24,
    train: int = 48,
    val: int = 12,
    test: int = 0,
    size: int = 256,
    scene: int = 0,
    num_workers: int = 1,
) -> Path:
    """Write a world; it appears whole or not at all.

    Args:
        output: folder to create. It receives `OpenEarthMap_wo_xBD`; `dfc25_track1`, unlike the release with optical
            images in val and test, which score stage 1; and `dfc25_track1_extra`, which no recipe reads: the clean
            labels of train.
        seed: the same seed gives the same bytes, whatever `num_workers`.
        source: labelled optical tiles in `OpenEarthMap_wo_xBD`; one in seven, at least one, is listed in val.txt.
        train: optical/SAR pairs with noisy labels.
        val, test: SAR scenes with clean labels.
        size: side of every tile in pixels.
        scene: side of one large SAR scene, `scene.tif`, to map; 0: none. It takes 400 bytes of memory a pixel.
        num_workers: processes.

    Raises:
        SyntheticDatasetError: `output` exists, or a number is too small.
    """
    output = Path(output)
    counts = {"source": source, "train": train, "val": val, "test": test}
    _check(output, seed, counts, size, scene, num_workers)
    scenes = [Scene(seed, kind, index, size) for kind, count in counts.items() for index in range(count)]
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for _ in tqdm(_write_all(scenes, aside, num_workers), total=len(scenes), desc="toy world", unit="scene"):
            pass
        if scene:
            _write_large_scene(Scene(seed, "scene", 0, scene), aside / "scene.tif")
        _write_lists(aside / SOURCE_FOLDER, [scene for scene in scenes if scene.kind == "source"])
        settings = {"seed": seed, **counts, "size": size, "scene": scene}
        (aside / "synthetic_dataset.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp's folder is private
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return output


def _check(output: Path, seed: int, counts: dict[str, int], size: int, scene: int, num_workers: int) -> None:
    if output.exists():
        raise SyntheticDatasetError(f"--output {output} exists; remove it or name a new folder")
    least = {"source": 2, "train": 1, "val": 1, "test": 0}
    limits = [(name, counts[name], low) for name, low in least.items()]
    limits += [("size", size, MIN_SIZE), ("scene", scene, MIN_SIZE if scene else 0)]
    for name, value, low in [*limits, ("seed", seed, 0), ("num_workers", num_workers, 1)]:
        if value < low:
            raise SyntheticDatasetError(f"--{name} {value} is too small; it must be at least {low}")


def _write_all(scenes: list[Scene], root: Path, num_workers: int) -> Iterator[None]:
    """Write every scene, yielding after each."""
    if num_workers == 1:
        yield from map(_write_scene, scenes, itertools.repeat(root))
        return
    # spawned, not forked: a forked process inherits the locks of threads that it does not have
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(_write_scene, scenes, itertools.repeat(root))


def _write_scene(scene: Scene, root: Path) -> None:
    """Render one scene and write its files."""
    ground_rng, optical_rng, sar_rng, noise_rng = scene.generators()
    ground = scene.make_ground(ground_rng)
    is_source = scene.kind == "source"
    optical = render_optical(optical_rng, ground, SOURCE_CAMERA if is_source else TARGET_CAMERA)
    label = ground.crop(ground.label)
    if is_source:
        folder = root / SOURCE_FOLDER / scene.region.name
        images = {folder / "images": optical, folder / "labels": label}
    else:
        folder, extra = root / TARGET_FOLDER / scene.kind, root / EXTRA_FOLDER
        images = {folder / "sar_images": render_sar(sar_rng, ground, scene.gain), folder / "rgb_images": optical}
        if scene.kind == "train":
            images[folder / "labels"] = ground.crop(corrupt_labels(noise_rng, ground.label, ground.parcel, ground.gsd))
            images[extra / "train_clean_labels"] = label
        else:
            images[folder / "labels"] = label
    for parent, image in images.items():
        _write_tiff(parent / f"{scene.name}.tif", image, scene, ground.gsd)


def _write_large_scene(scene: Scene, path: Path) -> None:
    """Write a SAR scene alone."""
    ground_rng, _, sar_rng, _ = scene.generators()
    ground = scene.make_ground(ground_rng)
    _write_tiff(path, render_sar(sar_rng, ground, scene.gain), scene, ground.gsd)


def _write_tiff(path: Path, image: np.ndarray, scene: Scene, gsd: float) -> None:
    """Write (H, W) or (3, H, W) uint8 as a GeoTIFF at the scene's place; tiles lie side by side."""
    bands = np.atleast_3d(image.T).T  # (H, W) -> (1, H, W)
    east, north = scene.region.origin
    transform = Affine(gsd, 0, east + scene.index * scene.size, 0, -gsd, north - 10_000 * KINDS.index(scene.kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=scene.size,
        width=scene.size,
        count=len(bands),
        dtype=bands.dtype,
        crs=scene.region.crs,
        transform=transform,
        compress="deflate",
        predictor=2,
        photometric="RGB" if len(bands) == 3 else "MINISBLACK",
        interleave="pixel",
    ) as file:
        file.write(bands)


def _write_lists(folder: Path, scenes: list[Scene]) -> None:
    """Write OpenEarthMap's split lists: one tile in seven validates; as in the release, test has no labels: none."""
    val = [scene for scene in scenes if scene.index % 7 == 6] or scenes[-1:]
    lists = {"train": [scene for scene in scenes if scene not in val], "val": val, "test": []}
    for split, members in lists.items():
        text = "".join(f"{scene.name}.tif\n" for scene in members)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")
