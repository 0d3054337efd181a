"""Tiles as Parquet shards, written and read: the rows of `hf_seg.data.open_earth_map` with the bytes of each file.

data/train-00003-of-00012.parquet    {image_id, optical, sar, label} or {image_id, region, image, label}

Stock `load_dataset` opens them, and what `Dataset.push_to_hub` writes of rows with embedded bytes is read too.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_seg.data.scan import Row
from hf_seg.data.tile_files import BANDS, EmbeddedRow, TileBytes, example_of, image_feature
from hf_seg.errors import DISK_HINT, DatasetError, file_errors
from hf_seg.labels import LabelSet

COLUMNS = {
    "OpenEarthMap": ("image_id", "region", "image", "label"),
    "OpenEarthMap-SAR": ("image_id", "optical", "sar", "label"),
}
SHARD_BYTES = 256 * 2**20  # of the files in a shard; a download that is cut loses at most this
ROWS = 8  # in memory, and in a row group: an embedded one takes 5 MB
PUSH_HINT = "scripts/prepare_data.py push makes such a dataset from a folder"


def tile_features(layout: str, bands: Mapping[str, Sequence[str]]) -> datasets.Features:
    """Return the columns of a layout; those that `bands` names are not decoded."""
    return datasets.Features(
        {
            name: image_feature(name, decode=name not in bands) if name in BANDS else datasets.Value("string")
            for name in COLUMNS[layout]
        }
    )


def plan_tile_shards(split: str, rows: Sequence[Row], limit: int = SHARD_BYTES) -> dict[str, Sequence[Row]]:
    """Cut a split into shards of at most `limit` bytes of files, or one row.

    Returns:
        The rows of each shard by its name in the repository.
    """
    shards: list[list[Row]] = []
    used = 0
    for row in rows:
        size = sum(Path(path).stat().st_size for path in row.files.values() if path is not None)
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(row)
        used += size
    return {f"data/{split}-{number:05d}-of-{len(shards):05d}.parquet": each for number, each in enumerate(shards)}


def write_tile_shard(
    file: IO[bytes], rows: Sequence[Row], layout: str, label_set: LabelSet, bands: Mapping[str, Sequence[str]]
) -> None:
    """Check tiles and write them as one Parquet file; equal files give equal bytes.

    Raises:
        DatasetError: a file that cannot be trained on.
        FileError: the shard cannot be written.
    """
    schema = tile_features(layout, bands).arrow_schema
    images = [column for column in COLUMNS[layout] if column in BANDS]
    place = f"a temporary file in {tempfile.gettempdir()}"
    with (
        file_errors(place, "cannot be written", DISK_HINT),
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for first in range(0, len(rows), ROWS):
            examples = [example_of(row, label_set, bands, embed=True) for row in rows[first : first + ROWS]]
            for example in examples:
                for column in images:
                    content = example[column]
                    example[column] = content and {"bytes": content, "path": f"{example['image_id']}.tif"}
            writer.write_table(pa.Table.from_pylist(examples, schema=schema))


def read_tile_shard(path: Path, name: str, layout: str) -> Iterator[EmbeddedRow]:
    """Yield the rows of a shard.

    Args:
        path: the file.
        name: what errors call it.
        layout: whose columns it must have.

    Raises:
        DatasetError: it is damaged or has other columns, or a row has no bytes or a name that is no file name.
    """
    images = [column for column in COLUMNS[layout] if column in BANDS]
    seen: set[str] = set()
    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            _check_columns(file.schema_arrow, name, layout)
            for batch in file.iter_batches(batch_size=ROWS, columns=["image_id", *images]):
                for row in batch.to_pylist():
                    yield _embedded_row(row, images, f"{name}, row {len(seen)}", seen)
                    seen.add(row["image_id"])
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{name} is damaged ({reason}); delete {path.resolve()}, and it is downloaded again"
        ) from None


def layout_of(path: Path, name: str) -> str:
    """Return the layout whose columns a shard has.

    Raises:
        DatasetError: it has those of none, or is damaged.
    """
    try:
        found = {*pq.read_schema(path).names}
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{name} is damaged ({' '.join(str(error).split())[:200]})") from None
    for layout, columns in COLUMNS.items():
        if found >= {*columns}:
            return layout
    expected = " or ".join(", ".join(columns) for columns in COLUMNS.values())
    raise DatasetError(f"{name}: expected the columns {expected}, found {', '.join(sorted(found))}; {PUSH_HINT}")


def _check_columns(schema: pa.Schema, name: str, layout: str) -> None:
    """Make sure that a shard has the columns of a layout, images as {bytes, path}."""
    wanted = {column for column in COLUMNS[layout] if column != "region"}  # the region stands in the image_id, too
    if missing := wanted - {*schema.names}:
        raise DatasetError(
            f"{name}: no column {', '.join(sorted(missing))} of {layout} among {', '.join(schema.names)}; {PUSH_HINT}"
        )
    for column in sorted(wanted):
        kind = schema.field(column).type
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        content = fields.get("bytes")
        is_image = content is not None and (pa.types.is_binary(content) or pa.types.is_large_binary(content))
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not (is_text if column == "image_id" else is_image or pa.types.is_null(kind)):
            expected = "text" if column == "image_id" else "images with their bytes"
            raise DatasetError(f"{name}: column {column} must be {expected}; it is {kind}; {PUSH_HINT}")


def _embedded_row(row: dict[str, Any], images: Sequence[str], name: str, seen: set[str]) -> EmbeddedRow:
    """Return a row that can be used as one of a folder: its name is a file name, and it points to no file."""
    image_id = row["image_id"]
    if not image_id or image_id.startswith(".") or not image_id.isprintable() or {*image_id} & {*"/\\"}:
        raise DatasetError(f"{name}: image_id must be a file name without its extension; it is {image_id!r}")
    if image_id in seen:
        raise DatasetError(f"{name}: image_id {image_id!r} occurs twice")
    files: dict[str, TileBytes | None] = {}
    for column in images:
        image = row[column]
        if image is not None and image["bytes"] is None and image.get("path") is None:
            image = None
        if image is not None and image["bytes"] is None:  # the path would be one of this machine
            raise DatasetError(f"{name} ({image_id}): {column} has no bytes, only a path; push it with them embedded")
        files[column] = image and TileBytes(f"{name} ({image_id}, {column})", image["bytes"])
    return EmbeddedRow(image_id, files)
