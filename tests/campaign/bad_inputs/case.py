"""What a case is, and how its files are made.

Each case runs in a folder of its own with links to good inputs: `scene.tif`, the datasets `sar` and `oem`, the networks
`model` and `ensemble`, and the pseudo-labels `labels`. `make` replaces one of them, or adds a file.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio

Make = Callable[[Path], object]


class Case(NamedTuple):
    """One bad input, and what its command must answer."""

    what: str  # file or setting
    wrong: str
    make: Make  # gets the folder in which the command runs
    command: str
    says: str  # what the message must contain
    code: int = 2


TRAIN = (
    " --max_train_steps 1 --warmup_steps 0 --eval_steps 0 --checkpointing_steps 0 --crop_size 32 --report_to none"
    " --per_device_train_batch_size 2 --dataloader_num_workers 0"
)
PREDICT = "hf-seg predict scene.tif map.tif --model model"
STAGE2 = "hf-seg stage2 --config toy/stage2_segformer.yaml --data_dir sar --output_dir run"
STAGE1 = "hf-seg stage1 --config toy/stage1_segformer.yaml --source_dir oem --data_dir sar --output_dir run"
PSEUDO = "hf-seg pseudo-label --model model --data_dir sar --output_dir run"
ENSEMBLE = "hf-seg ensemble --model model model2 --data_dir sar --output_dir run"
EVALUATE = "hf-seg evaluate --model model --data_dir sar --output run.json"
REPORT = "hf-seg report model --data_dir sar --output run.html"
AUDIT = "hf-seg audit sar/train/labels labels --output run"
CHECK = "hf-seg data check sar --output run.json"
CHECK_OEM = "hf-seg data check oem --output run.json"
EXPORT = "hf-seg export --model model --format onnx --output run"
TILE = "sar/train/sar_images/TrainArea_001.tif"
LABEL = "sar/train/labels/TrainArea_001.tif"


def nothing(_: Path) -> None:
    """Change nothing: the command line itself is wrong."""


def own(work: Path, name: str) -> Path:
    """Return a file or folder of a case as a copy of its own instead of a link, so that it can be changed."""
    top = work / Path(name).parts[0]
    if top.is_symlink():
        target = top.resolve()
        top.unlink()
        if target.is_dir():
            shutil.copytree(target, top)
        else:
            shutil.copyfile(target, top)
    return work / name


def write(name: str, content: bytes | str) -> Make:
    """Write a file; its folder is created."""

    def make(work: Path) -> None:
        path = own(work, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def write_json(name: str, content: object) -> Make:
    """Write a file of JSON."""
    return write(name, json.dumps(content))


def edit_json(name: str, **changes: Any) -> Make:
    """Change keys of a file of JSON; None removes one."""

    def make(work: Path) -> None:
        path = own(work, name)
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return make


def cut(name: str, share: float) -> Make:
    """Keep the first part of a file."""

    def make(work: Path) -> None:
        path = own(work, name)
        os.truncate(path, int(path.stat().st_size * share))

    return make


def overwrite(name: str, at: float, content: bytes) -> Make:
    """Write bytes into a file at a part of its length."""

    def make(work: Path) -> None:
        path = own(work, name)
        with path.open("r+b") as file:
            file.seek(int(path.stat().st_size * at))
            file.write(content)

    return make


def remove(*names: str) -> Make:
    """Delete files or folders."""

    def make(work: Path) -> None:
        for name in names:
            path = own(work, name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def rename(name: str, new: str) -> Make:
    """Give a file another name."""

    def make(work: Path) -> None:
        own(work, name).rename(work / new)

    return make


def folder(name: str) -> Make:
    """Make an empty folder where there was something else."""

    def make(work: Path) -> None:
        path = own(work, name)
        if path.exists():
            remove(name)(work)
        path.mkdir(parents=True)

    return make


def both(*makes: Make) -> Make:
    """Do several things."""

    def make(work: Path) -> None:
        for each in makes:
            each(work)

    return make


def tiff(name: str, pixels: np.ndarray, **profile: Any) -> Make:
    """Write (H, W) or (bands, H, W) as a raster, GeoTIFF if no driver is named."""

    def make(work: Path) -> None:
        path = own(work, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        bands = pixels[None] if pixels.ndim == 2 else pixels
        count, height, width = bands.shape
        how = {"driver": "GTiff", "dtype": bands.dtype, **profile}
        with rasterio.open(path, "w", width=width, height=height, count=count, **how) as file:
            file.write(bands)

    return make


def colored(name: str) -> Make:
    """Give a raster a colour table."""

    def make(work: Path) -> None:
        with rasterio.open(work / name, "r+") as file:
            file.write_colormap(1, {index: (255 - index, 0, index, 255) for index in range(256)})

    return make


def raw_tiff(tags: Mapping[int, int | tuple[int, ...]], data: bytes = b"", *, big: bool = False) -> bytes:
    """Return a little-endian TIFF file of these tags (32-bit numbers), with any contradiction among them.

    `data` starts at byte 8, of BigTIFF at byte 16.
    """
    start = 16 if big else 8
    directory = start + len(data)
    entry, number = ("<HHQQ", "<Q") if big else ("<HHII", "<H")
    width = struct.calcsize(entry)
    values = {tag: value if isinstance(value, tuple) else (value,) for tag, value in sorted(tags.items())}
    extra_at = directory + struct.calcsize(number) + len(values) * width + (8 if big else 4)
    entries, extra = b"", b""
    for tag, found in values.items():
        packed = struct.pack(f"<{len(found)}I", *found)
        inline = len(packed) <= (8 if big else 4)
        value = int.from_bytes(packed, "little") if inline else extra_at + len(extra)
        entries += struct.pack(entry, tag, 4, len(found), value)
        extra += b"" if inline else packed
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, directory) if big else struct.pack("<2sHI", b"II", 42, directory)
    return head + data + struct.pack(number, len(values)) + entries + bytes(8 if big else 4) + extra


WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS, BYTES = (
    256,
    257,
    258,
    259,
    262,
    273,
    277,
    278,
    279,
)
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325


def grey(width: int, height: int, **changes: int) -> dict[int, int | tuple[int, ...]]:
    """Return the tags of an uncompressed grey image of 8 bits in one strip after the header."""
    tags: dict[int, int | tuple[int, ...]] = {
        WIDTH: width,
        HEIGHT: height,
        BITS: 8,
        COMPRESSION: 1,
        PHOTOMETRIC: 1,
        STRIPS: 8,
        SAMPLES: 1,
        ROWS: height,
        BYTES: min(width * height, 2**32 - 1),
    }
    return tags | {int(tag.removeprefix("tag")): value for tag, value in changes.items()}


def noise(*shape: int, seed: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    """Draw values 1..254."""
    return np.random.default_rng(seed).integers(1, 255, shape).astype(dtype)
