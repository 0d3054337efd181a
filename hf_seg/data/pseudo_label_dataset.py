"""A folder of pseudo-labels: Parquet shards that are whole or absent, what made them, and the manifest of the whole.

data/train-00003-of-00012.parquet    rows {image_id, pseudo_label, confidence}, and the counts of their pixels
inputs.json                          networks and tiles; a later launch must have the same
manifest.json                        written last: a folder without it is not finished
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import ndimage

from hf_seg.errors import UserError
from hf_seg.labels import BACKGROUND, CLASS_NAMES

CONFIDENCE_STEP = 5  # of 255; in finer steps a tile of 1024 pixels from a noisy network could exceed 1 MB
_FULL = np.iinfo(np.uint8).max
_COUNTS_KEY = b"hf_seg.counts"
_FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("string"),
        "pseudo_label": datasets.Image(mode="L"),
        "confidence": datasets.Image(mode="L"),
    }
)


class LabelledTile(NamedTuple):
    """One tile's labels, and how its pixels came to them."""

    image_id: str
    label: np.ndarray  # (H, W) uint8 class ids, IGNORE_INDEX where there is none
    confidence: np.ndarray  # (H, W) float32 in 0..1
    predicted: np.ndarray  # (NUM_LABELS,) pixels that the networks gave to each class, where there is ground
    kept: np.ndarray  # (NUM_LABELS,) those of them that are labelled
    ignored: dict[str, int]  # pixels without a label by reason, each counted once


def beyond_swath(sar: np.ndarray) -> np.ndarray:
    """Find where the SAR sensor did not look: zeros joined to the image's border through zeros, side by side.

    A zero inside, as of radar shadow or still water, is data.

    Args:
        sar: (H, W) uint8.

    Returns:
        (H, W) bool.
    """
    regions, count = ndimage.label(sar == 0)
    at_border = np.zeros(count + 1, dtype=bool)
    for side in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        at_border[side] = True
    at_border[0] = False  # region 0 is all that is not zero
    return at_border[regions]


def plan_shards(folder: Path, split: str, n_tiles: int, tiles_per_shard: int) -> dict[Path, range]:
    """Return the file of each shard and the tiles that it holds."""
    starts = range(0, n_tiles, tiles_per_shard)
    return {
        folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet": range(
            start, min(start + tiles_per_shard, n_tiles)
        )
        for number, start in enumerate(starts)
    }


def write_shard(path: Path, tiles: Sequence[LabelledTile]) -> None:
    """Write tiles as one Parquet file that stock `load_dataset` reads; the same tiles give the same bytes."""
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter
        rows = list(pool.map(_encode, tiles))
    counts = {
        "predicted": np.sum([tile.predicted for tile in tiles], axis=0).tolist(),
        "kept": np.sum([tile.kept for tile in tiles], axis=0).tolist(),
        "ignored": {reason: sum(tile.ignored[reason] for tile in tiles) for reason in tiles[0].ignored},
    }
    table = pa.Table.from_pylist(rows, schema=_FEATURES.arrow_schema)
    table = table.replace_schema_metadata({**table.schema.metadata, _COUNTS_KEY: json.dumps(counts)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # PNG is compressed already
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def _encode(tile: LabelledTile) -> dict[str, Any]:
    steps = np.rint(tile.confidence * (_FULL // CONFIDENCE_STEP))
    maps = {"pseudo_label": tile.label, "confidence": (steps * CONFIDENCE_STEP).astype(np.uint8)}
    row: dict[str, Any] = {"image_id": tile.image_id}
    for column, values in maps.items():
        png = io.BytesIO()
        Image.fromarray(values).save(png, "PNG")
        row[column] = {"bytes": png.getvalue(), "path": f"{tile.image_id}.png"}
    return row


def is_whole(path: Path) -> bool:
    """Tell whether a shard is there, to its end."""
    try:
        return _COUNTS_KEY in (pq.read_metadata(path).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False


def read_maps(path: Path, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return label and confidence of one row of a shard, (H, W) uint8 each."""
    (columns,) = pq.read_table(path, columns=["pseudo_label", "confidence"]).slice(row, 1).to_pylist()
    label, confidence = (np.array(Image.open(io.BytesIO(png["bytes"]))) for png in columns.values())
    return label, confidence


def check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Make sure that a folder is empty, or was begun with these very networks and tiles.

    Args:
        folder: of the pseudo-labels.
        inputs: `models`, a list of {name, revision, sha256}, and `image_ids`.

    Raises:
        UserError: naming what is in the way.
    """
    way_out = "choose another --output_dir"
    if not (folder / "inputs.json").exists():
        # recipe.yaml is written first, so a launch that was killed at once may have left it
        others = sorted(file.name for file in folder.glob("*") if file.name != "recipe.yaml")
        if others := [name for name in others if not name.endswith(".partial")]:
            raise UserError(f"{folder} already holds something else, {others[0]} for one; {way_out}")
        return
    began_with = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    old, new = began_with["models"], inputs["models"]
    if len(old) != len(new):
        raise UserError(f"{folder} began with {len(old)} network(s), now there are {len(new)}; {way_out}")
    for then, now in zip(old, new, strict=True):
        if then["sha256"] != now["sha256"]:
            raise UserError(
                f"{folder} began with another network than {now['name']} is now (sha256 {then['sha256'][:12]} of "
                f"{then['name']} then, {now['sha256'][:12]} now); {way_out}"
            )
    if began_with["image_ids"] != inputs["image_ids"]:
        n_tiles = len(began_with["image_ids"])
        raise UserError(f"{folder} began with other tiles ({n_tiles} then, {len(inputs['image_ids'])} now); {way_out}")


def summarize(shards: Sequence[Path]) -> dict[str, Any]:
    """Add up what the shards say about their pixels.

    Returns:
        `labels_sha256` of all shards; `class_histogram`, labelled pixels by class; `kept_share`, labelled pixels over
        those that the networks gave to the class, None for a class that they never chose; `ignored`, pixels by reason.
    """
    digests = "".join(sha256_of(path) for path in shards)
    counts = [json.loads(pq.read_metadata(path).metadata[_COUNTS_KEY]) for path in shards]
    predicted, kept = (np.sum([shard[key] for shard in counts], axis=0).tolist() for key in ("predicted", "kept"))
    classes = [index for index in range(len(CLASS_NAMES)) if index != BACKGROUND]
    return {
        "labels_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "class_histogram": {CLASS_NAMES[index]: kept[index] for index in classes},
        "kept_share": {
            CLASS_NAMES[index]: kept[index] / predicted[index] if predicted[index] else None for index in classes
        },
        "ignored": {reason: sum(shard["ignored"][reason] for shard in counts) for reason in counts[0]["ignored"]},
    }


def write_manifest(folder: Path, summary: dict[str, Any]) -> None:
    """Write `manifest.json`: a summary, and the sha256 of every other file of the folder."""
    found = sorted([*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")])
    own = [file for file in found if file.is_file() and file.suffix != ".partial" and file.name != "manifest.json"]
    files = {file.relative_to(folder).as_posix(): sha256_of(file) for file in own}
    write_whole(folder / "manifest.json", json.dumps({**summary, "files": files}, indent=1).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
