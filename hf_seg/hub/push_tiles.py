"""Send a folder of tiles to the Hub as a dataset that every recipe reads: Parquet shards, `dataset.json` and a card."""

import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData
from tqdm import tqdm

from hf_seg.data.hub_dataset import DATASET_FILE, is_shard
from hf_seg.data.provenance import declared_bands, find_label_set, read_provenance
from hf_seg.data.scan import Row, Scan
from hf_seg.data.tile_shards import COLUMNS, SHARD_BYTES, plan_tile_shards, write_tile_shard
from hf_seg.errors import UserError
from hf_seg.hub.cards import without_tags_in
from hf_seg.hub.commit import Destination
from hf_seg.hub_client import one_line
from hf_seg.label_sets import hex_colors
from hf_seg.labels import LabelSet
from hf_seg.settings import packaged_folder


class Tiles(NamedTuple):
    """What is sent: the tiles of a folder, and what they are."""

    layout: str
    splits: dict[str, list[Row]]
    provenance: dict[str, Any]  # as `read_provenance` returns it
    label_set: LabelSet
    bands: Mapping[str, Sequence[str]]

    @classmethod
    def of_folder(cls, layout: str, scan: Scan) -> "Tiles":
        """Describe a folder.

        Raises:
            UserError: it has no usable tile, or its `dataset.json` cannot be used.
        """
        splits = {split: rows for split, rows in scan.rows.items() if rows}
        if not splits:
            raise UserError(f"{scan.root}: no usable tile")
        provenance = read_provenance(scan.root, layout)
        return cls(layout, splits, provenance, find_label_set(scan.root, layout), declared_bands(scan.root, layout))


def push_tiles(
    folder: Path,
    tiles: Tiles,
    repository: str,
    *,
    private: bool = True,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Check every tile and send all splits in one commit, which replaces those of an earlier push.

    Shards are written and uploaded one after the other, so that one of them is on the disk at a time. Equal files give
    equal shards: after a failure, those that the Hub has are not uploaded again.

    Args:
        folder: of the dataset, for errors.
        tiles: what it contains.
        repository: user/name; created if it is new.
        private: create it as private; an existing public one is refused.
        revision: branch, created if it is new; main if None.
        shard_bytes: of the files in a shard, at most.

    Returns:
        The address of the commit.

    Raises:
        UserError: a tile cannot be trained on, or the push failed; how to try again.
    """
    contents: dict[str, Any] = {
        DATASET_FILE: (json.dumps(tiles.provenance, indent=2, ensure_ascii=False) + "\n").encode(),
        "README.md": write_card(tiles, repository).encode(),
    }
    n_tiles = sum(map(len, tiles.splits.values()))
    try:
        destination = Destination(repository, "dataset", revision)
        destination.open(private=private, hint="give --public")
        uploaded = _upload_shards(destination, tiles, shard_bytes)
        return destination.commit(contents, f"{n_tiles} tiles in the layout of {tiles.layout}", is_shard, uploaded)
    except UserError:
        raise
    except Exception as error:  # network, login, name: of many kinds
        command = ["python", "scripts/prepare_data.py", "push", str(folder), repository]
        command += [] if private else ["--public"]
        command += [] if revision is None else ["--revision", revision]
        raise UserError(
            f"{folder} is not on the Hub ({one_line(error)}); the repository is unchanged; try again, without sending "
            f"twice what arrived: {shlex.join(command)}"
        ) from None


def _upload_shards(destination: Destination, tiles: Tiles, shard_bytes: int) -> list[CommitOperationAdd]:
    shards = {
        name: rows
        for split, found in tiles.splits.items()
        for name, rows in plan_tile_shards(split, found, shard_bytes).items()
    }
    uploaded = []
    for name, rows in tqdm(shards.items(), desc="shards", unit="shard"):
        with tempfile.TemporaryFile() as file:  # it has no name, so nothing is left of it after a kill
            write_tile_shard(file, rows, tiles.layout, tiles.label_set, tiles.bands)
            uploaded.append(destination.upload(name, file))
    return uploaded


def write_card(tiles: Tiles, repository: str) -> str:
    """Return the README.md of a dataset of tiles, by whose header stock `load_dataset` finds the shards."""
    data = tiles.provenance
    is_optical = tiles.layout == "OpenEarthMap"
    header = DatasetCardData(
        pretty_name=data["name"][0].upper() + data["name"][1:],
        task_categories=["image-segmentation"],
        tags=["remote-sensing", "land-cover", "optical" if is_optical else "sar"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in tiles.splits],
            }
        ],
        **_license(data["license"]),
    )
    colors = hex_colors(tiles.label_set)
    codes = [
        sorted(value for value, found in tiles.label_set.values.items() if found == index)
        for index in range(len(colors))
    ]
    facts: dict[str, Any] = {
        "data": data,
        "layout": tiles.layout,
        "columns": COLUMNS[tiles.layout],
        "bands": tiles.bands,
        "flag": "--source_dir" if is_optical else "--data_dir",
        "splits": {
            split: (len(rows), sum(row.files["label"] is not None for row in rows))
            for split, rows in tiles.splits.items()
        },
        "classes": [*zip(tiles.label_set.names, codes, colors, strict=True)],
        "repository": repository,
        "pretty_name": header.pretty_name,
    }
    template = packaged_folder("model_cards") / "tiles.md"
    return DatasetCard.from_template(header, template_path=str(template), **without_tags_in(facts)).content


def _license(name: str | None) -> dict[str, Any]:
    """Return the header's licence: what `dataset.json` says, in the Hub's own spelling if it knows it."""
    known = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}
    spelt = (name or "").lower().replace(" ", "-")
    return {"license": spelt} if spelt in known else {"license": "other", "license_name": "terms-of-the-data"}
