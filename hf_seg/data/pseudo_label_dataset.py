"""A dataset of pseudo-labels, written and read: Parquet shards, what they were made from, and a manifest.

data/train-00003-of-00012.parquet    rows {image_id, pseudo_label, confidence}; pixel counts in the file's metadata
inputs.json                          networks and tiles; a later launch must have the same
manifest.json                        written last: a folder without it is not finished
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_seg.data.hub_dataset import HubDataset, find_hub_dataset, is_shard
from hf_seg.errors import UserError, file_errors, is_out_of_memory, shown
from hf_seg.files import atomic_file, sha256_of, write_atomic
from hf_seg.hub_client import one_line
from hf_seg.label_sets import hex_colors, require_same_classes
from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet
from hf_seg.settings import LOCAL_PATHS_FILE

CONFIDENCE_STEP = 5  # of 255; in finer steps a tile of 1024 pixels from a noisy network could exceed 1 MB
MANIFEST_FILE = "manifest.json"
_COUNTS_KEY = b"hf_seg.counts"
_MAP = datasets.Image(mode="L")
_FEATURES = datasets.Features({"image_id": datasets.Value("string"), "pseudo_label": _MAP, "confidence": _MAP})


class LabelledTile(NamedTuple):
    """The pseudo-labels of one tile, and its pixel counts."""

    image_id: str
    label: np.ndarray  # (H, W) uint8 class ids, IGNORE_INDEX where there is none
    confidence: np.ndarray  # (H, W) float32 in 0..1
    predicted: np.ndarray  # (N,) valid pixels that the networks predicted as each class
    kept: np.ndarray  # (N,) those of them that are labelled
    ignored: dict[str, int]  # pixels without a label by reason, each counted once


def plan_shards(folder: Path, split: str, n_tiles: int, tiles_per_shard: int) -> dict[Path, range]:
    """Return the file of each shard and the tiles that it contains."""
    starts = range(0, n_tiles, tiles_per_shard)
    return {
        folder / f"{split}-{number:05d}-of-{len(starts):05d}.parquet": range(n_tiles)[start : start + tiles_per_shard]
        for number, start in enumerate(starts)
    }


def write_shard(path: Path, tiles: Sequence[LabelledTile]) -> None:
    """Write tiles atomically as one Parquet file that stock `load_dataset` reads; equal tiles give equal bytes.

    Raises:
        FileError: it cannot be written.
    """
    with ThreadPoolExecutor() as pool:  # zlib releases the interpreter's lock
        rows = list(pool.map(_encode, tiles))
    counts = _add_counts([tile._asdict() for tile in tiles])
    table = pa.Table.from_pylist(rows, schema=_FEATURES.arrow_schema)
    table = table.replace_schema_metadata({**table.schema.metadata, _COUNTS_KEY: json.dumps(counts)})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="none")  # PNG is compressed already


def _encode(tile: LabelledTile) -> dict[str, Any]:
    steps = np.rint(tile.confidence * (255 // CONFIDENCE_STEP))
    maps = {"pseudo_label": tile.label, "confidence": (steps * CONFIDENCE_STEP).astype(np.uint8)}
    row: dict[str, Any] = {"image_id": tile.image_id}
    for column, values in maps.items():
        row[column] = {**_MAP.encode_example(values), "path": f"{tile.image_id}.png"}
    return row


def _add_counts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up `predicted`, `kept` and `ignored` of tiles or of shards."""
    return {
        "predicted": np.sum([each["predicted"] for each in counts], axis=0).tolist(),
        "kept": np.sum([each["kept"] for each in counts], axis=0).tolist(),
        "ignored": {reason: sum(each["ignored"][reason] for each in counts) for reason in counts[0]["ignored"]},
    }


def is_complete(path: Path) -> bool:
    """Tell whether a shard exists and is not truncated."""
    try:
        return _COUNTS_KEY in (pq.read_metadata(path).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False


def read_maps(path: Path, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return label and confidence of one row of a shard, (H, W) uint8 each."""
    (example,) = pq.read_table(path).slice(row, 1).to_pylist()
    decoded = _FEATURES.decode_example(example)
    return np.array(decoded["pseudo_label"]), np.array(decoded["confidence"])


def check_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Check that a folder is empty, or was begun with the same `models` ({name, revision, sha256}) and `image_ids`.

    Raises:
        UserError: it contains something else.
    """
    hint = "choose another --output_dir"
    recorded = folder / "inputs.json"
    if not recorded.exists():
        # a launch that was killed at once may have left what is written before inputs.json
        if others := sorted({file.name for file in folder.glob("[!.]*")} - {"recipe.yaml", LOCAL_PATHS_FILE}):
            raise UserError(f"{folder} already contains other files, e.g. {others[0]}; {hint}")
        return
    try:
        with file_errors(recorded, "cannot be read"):
            began_with = json.loads(recorded.read_text(encoding="utf-8"))
        digests = [each["sha256"] for each in began_with["models"]]
        then, old = _list_networks(began_with["models"]), [*began_with["image_ids"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{recorded} is damaged ({shown(error)}); {hint}") from None
    if digests != [each["sha256"] for each in inputs["models"]]:
        now = _list_networks(inputs["models"])
        raise UserError(f"{folder} began with other networks, {then}; now they are {now}; {hint}")
    new = inputs["image_ids"]
    if old != new:
        raise UserError(f"{folder} began with other tiles ({len(old)} then, {len(new)} now); {hint}")


def _list_networks(models: list[dict[str, str]]) -> str:
    return ", ".join(f"{model['name']} (sha256 {model['sha256'][:12]})" for model in models)


def summarize(shards: Sequence[Path], label_set: LabelSet = OPEN_EARTH_MAP) -> dict[str, Any]:
    """Add up the pixel counts of all shards.

    Returns:
        `label_set`, names and colours by id; `labels_sha256` of all shards; `class_histogram`, labelled pixels by
        class; `kept_share`, labelled pixels over those predicted as the class, None for a class that was never
        predicted; `ignored`, pixels by reason.
    """
    digests = "".join(sha256_of(path) for path in shards)
    counts = _add_counts([json.loads(pq.read_metadata(path).metadata[_COUNTS_KEY]) for path in shards])
    predicted, kept = (dict(zip(label_set.names, counts[key], strict=True)) for key in ("predicted", "kept"))
    del kept[label_set.names[BACKGROUND]]
    return {
        "label_set": {"names": [*label_set.names], "colors": hex_colors(label_set)},
        "labels_sha256": hashlib.sha256(digests.encode()).hexdigest(),
        "class_histogram": kept,
        "kept_share": {name: n / predicted[name] if predicted[name] else None for name, n in kept.items()},
        "ignored": counts["ignored"],
    }


def write_manifest(folder: Path, summary: dict[str, Any]) -> None:
    """Write `manifest.json`: a summary, and the sha256 of every other file that is shared.

    Raises:
        FileError: a file cannot be read, or the manifest cannot be written.
    """
    found = sorted([*folder.glob("[!.]*"), *folder.glob("[!.]*/[!.]*")])
    shared = [file for file in found if file.is_file() and file.name not in ("manifest.json", LOCAL_PATHS_FILE)]
    files = {file.relative_to(folder).as_posix(): sha256_of(file) for file in shared}
    write_atomic(folder / "manifest.json", json.dumps({**summary, "files": files}, indent=1))


def damaged_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a finished dataset whose bytes are not those that its manifest has a checksum of.

    Raises:
        UserError: the manifest is damaged itself.
    """
    manifest = _read_manifest(str(folder), None)
    if "files" not in manifest and ("label_set" not in manifest or len(manifest) == 1):
        return []  # not finished, or made by others
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise UserError(f"{folder}: {MANIFEST_FILE} is damaged (it has no checksums)")
    found = sorted(folder.glob("[!.]*/[!.]*.parquet"))
    return [path for path in found if sha256_of(path) != files.get(path.relative_to(folder).as_posix())]


def load_pseudo_labels(
    path: str, columns: Sequence[str] = ("image_id", "pseudo_label"), *, label_set: LabelSet = OPEN_EARTH_MAP
) -> datasets.Dataset:
    """Load a dataset of pseudo-labels from a folder of Parquet files, or one commit of a dataset on the Hub.

    Args:
        path: folder, or Hub id, org/name or org/name@revision.
        columns: what each row contains; "confidence" only where the dataset has it.
        label_set: classes of the training.

    Raises:
        UserError: no such folder or repository, not a dataset of pseudo-labels, a damaged file, its manifest says other
            classes, or a label is not in the dataset itself.
    """
    hub = None if Path(path).exists() else find_hub_dataset(path)
    if Path(path, "inputs.json").exists() and not Path(path, "manifest.json").exists():
        raise UserError(f"{path} is not finished; launch recipes/pseudo_label.py on it again")
    if Path(path).is_dir() and (damaged := damaged_files(Path(path))):
        hint = "launch recipes/pseudo_label.py on it again, which makes that file anew"
        raise UserError(f"{damaged[0]} is damaged: its checksum is not the one in manifest.json; {hint}")
    try:
        loaded = _load(path, hub)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds; each is about this path
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: pseudo-labels cannot be loaded ({one_line(error)})") from None
    found = [column for column in columns if column in loaded.column_names]
    if missing := set(columns) - {*found, "confidence"}:
        raise UserError(f"{path}: no column {', '.join(sorted(missing))} among {loaded.column_names}")
    for column in found:
        kind, wanted = (datasets.Value, "text") if column == "image_id" else (datasets.Image, "images (datasets.Image)")
        feature = loaded.features[column]
        if not isinstance(feature, kind) or (column == "image_id" and feature.dtype not in ("string", "large_string")):
            raise UserError(f"{path}: column {column} must be {wanted}; it is {shown(feature)}")
    _require_embedded(loaded, found, path)
    recorded = _read_manifest(path, hub).get("label_set")
    if recorded is not None:  # labels that others made may have no manifest
        hint = "; give the label_set of the pseudo-labels"
        if not isinstance(recorded, dict) or not isinstance(recorded.get("names"), list):
            raise UserError(f"{path}: {MANIFEST_FILE} is damaged: its label_set has no names")
        require_same_classes(recorded["names"], label_set.names, path, "the label set", hint)
    return loaded.select_columns(found)


def _load(path: str, hub: HubDataset | None) -> datasets.Dataset:
    """Load the train split: of our own layout exactly its shards, else what `datasets` makes of it."""
    if hub is None:
        shards = sorted(Path(path).glob("data/train-*.parquet"))
        # not by the folder: `datasets` would name its cache by the card's header alone, which others may copy
        files = [str(shard.resolve()) for shard in shards if is_shard(f"data/{shard.name}")]
        if not files:
            return datasets.load_dataset(str(Path(path).resolve()), split="train")
    elif "train" in hub.splits:
        files = [str(hub.fetch(name)) for name in hub.shards("train")]
    else:
        return datasets.load_dataset(hub.repository, split="train", revision=hub.revision)
    return datasets.load_dataset("parquet", data_files={"train": files}, split="train")


def _require_embedded(rows: datasets.Dataset, columns: Sequence[str], path: str) -> None:
    """Raise `UserError` for an image that is a path: it would be read from this machine, or from any host."""
    for column in columns:
        values = rows.data.column(column)
        if pa.types.is_struct(values.type) and pc.struct_field(values, "bytes").null_count:
            raise UserError(f"{path}: {column} has images without their bytes, only a path; embed them")


def _read_manifest(path: str, hub: HubDataset | None) -> dict[str, Any]:
    """Return the manifest of pseudo-labels in a folder or on the Hub; empty if there is none."""
    if hub is not None and MANIFEST_FILE not in hub.files:
        return {}
    file = Path(path, MANIFEST_FILE) if hub is None else hub.fetch(MANIFEST_FILE)
    if not file.is_file():
        return {}
    hint = "" if hub else "; delete it and launch recipes/pseudo_label.py again"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {MANIFEST_FILE} is damaged ({one_line(error)}){hint}") from None
