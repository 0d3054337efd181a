"""OpenEarthMap and OpenEarthMap-SAR as `datasets`; this docstring is their datasheet.

OpenEarthMap (OEM): 5000 aerial and satellite RGB tiles of 97 regions, labelled by hand (Xia et al., arXiv:2210.10732).

- Source: https://zenodo.org/records/7223446, `OpenEarthMap.zip` (9,099,481,727 bytes). GSD 0.25-0.5 m.
- Layout: `OpenEarthMap_wo_xBD/<region>/{images,labels}/<region>_<n>.tif`, at its root `train.txt`, `val.txt` and
  `test.txt` (file names) and `xbd_files.csv` (xBD file, OEM file). A region's name may contain `_` and `-`.
- Splits: 3000 / 500 / 1500 listed. 697 / 116 / 349 images come from xBD and are not in the archive, so 2303 / 384
  labelled pairs are usable as shipped. The labels of the test split are withheld.
- Licence: follows the region; CC BY-NC-SA 4.0 where nothing else is stated. CRS and tile sizes are mixed.

OpenEarthMap-SAR (OEM-SAR; IEEE GRSS Data Fusion Contest 2025, track 1): optical/SAR pairs of 35 regions in Japan,
France and the USA (Xia et al., arXiv:2501.10891).

- Source: https://zenodo.org/records/14622048 (train, val), https://zenodo.org/records/14950559 (test, more labels).
  GSD 0.15-0.5 m. SAR: Umbra Spotlight amplitude, VV or HH; (c) 2024 Umbra, CC BY 4.0.
- Layout: `{train,val,test}/{sar_images,rgb_images,labels}/{Train,Val,Test}Area_<3 or 4 digits>.tif`
- Splits: 4333 / 210 / 490 tiles of 1024 x 1024. `rgb_images` is in train only.
- Defects: `train/labels` are pseudo-labels; published IoU with manual ones: 2 % (bareland) to 85 % (water). Exact zeros
  at a SAR swath's edge are nodata, although labelled 1..8. Labels may lack a CRS.

Both: uint8 GeoTIFF; 3-band optical, 1-band SAR and label. Classes: 0 background/unknown, 1 bareland, 2 rangeland,
3 developed space, 4 road, 5 tree, 6 water, 7 agriculture land, 8 building; other ones if `dataset.json` lists them.

Data of your own in one of these layouts may have other bands of any number type: `dataset.json` in its root names them
(`hf_seg.data.provenance`). Such a column yields {path, bytes}, which `hf_seg.data.band_images` reads.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_seg.data import tile_files
from hf_seg.data.hub_dataset import HubDataset, find_hub_dataset
from hf_seg.data.provenance import declared_bands, find_label_set
from hf_seg.data.samples import has_image
from hf_seg.data.scan import SCANS, SPLITS, Row, scan_open_earth_map_sar
from hf_seg.data.tile_files import example_of
from hf_seg.data.tile_shards import read_tile_shard, tile_features
from hf_seg.errors import DatasetError, UserError, file_errors
from hf_seg.labels import LabelSet

logger = logging.getLogger(__name__)

DOWNLOADS = 2  # shards at a time
CACHE_HINT = "free disk space, or choose another folder with the environment variable HF_DATASETS_CACHE"


def _examples(
    rows: list[Row], label_set: LabelSet, bands: Mapping[str, Sequence[str]], embed: bool = False
) -> Iterator[dict[str, Any]]:
    """Check and yield the rows of a folder."""
    for row in rows:
        yield example_of(row, label_set, bands, embed=embed)


def _shard_examples(
    shards: list[str], hub: HubDataset, layout: str, label_set: LabelSet, bands: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """Download shards, check and yield their rows; the next shards are downloaded meanwhile."""
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        try:
            for name, path in zip(shards, pool.map(hub.fetch, shards), strict=True):
                for row in read_tile_shard(path, f"{hub}, {name}", layout):
                    yield example_of(row, label_set, bands, embed=True)
        finally:
            pool.shutdown(cancel_futures=True)


def load_open_earth_map(
    data_dir: str | Path,
    split: str,
    *,
    label_set: LabelSet | None = None,
    embed: bool = False,
    streaming: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap: {image_id, region, image, label}; `label` is None where withheld.

    Args:
        data_dir: the unpacked release, or a folder around it; or a dataset on the Hub (`hf_seg.data.hub_dataset`),
            whose rows always have bytes.
        split: train, val or test.
        label_set: its `values` are those that label files may have; None: as `find_label_set` finds them. Labels are
            not translated here, but in `LabelledImages`.
        embed: store the files' bytes, so that `to_parquet` carries them (`push_to_hub` always does), not their paths.
        streaming: check and yield rows on the fly, without a cache; an IterableDataset.
        num_proc: processes that check the files, the first time.

    Raises:
        DatasetError: a wrong folder, an unknown or empty split, or a file that cannot be trained on.
        FileError: the cache cannot be written.
    """
    return _load("OpenEarthMap", data_dir, split, label_set, embed, streaming, num_proc)


def load_open_earth_map_sar(
    data_dir: str | Path,
    split: str,
    *,
    label_set: LabelSet | None = None,
    embed: bool = False,
    streaming: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load one split of OpenEarthMap-SAR: {image_id, optical, sar, label}; else as `load_open_earth_map`.

    `optical` or `label` is None where this copy has no such folder.
    """
    return _load("OpenEarthMap-SAR", data_dir, split, label_set, embed, streaming, num_proc)


def has_labelled_images(data_dir: str | Path, split: str, column: str, label_set: LabelSet) -> bool:
    """Tell whether a split of OpenEarthMap-SAR has tiles, and all of them this image and a label.

    On the Hub, this downloads and checks the split.
    """
    hub = find_hub_dataset(data_dir)
    if hub is None:
        found = scan_open_earth_map_sar(data_dir).rows[split]
        return bool(found) and all(row.files[column] and row.files["label"] for row in found)
    if split not in hub.splits:
        return False
    rows: Any = load_open_earth_map_sar(data_dir, split, label_set=label_set)
    return all(has_image(rows, column)) and all(has_image(rows, "label"))


def _load(
    layout: str,
    data_dir: str | Path,
    split: str,
    label_set: LabelSet | None,
    embed: bool,
    streaming: bool,
    num_proc: int | None,
) -> datasets.Dataset | datasets.IterableDataset:
    if split not in SPLITS:
        raise DatasetError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    hub = find_hub_dataset(data_dir)
    if hub is None:
        scan = SCANS[layout](data_dir)
        rows, missing = scan.rows[split], scan.describe_missing(split)
        if not rows:
            raise DatasetError(f"{scan.root}: split {split!r} has no usable tile; found {missing or 'no file of it'}")
        level = logging.WARNING if missing else logging.DEBUG
        logger.log(level, "%s: %d %s tiles in %s; missing: %s", layout, len(rows), split, scan.root, missing or "none")
        data_dir = scan.root
    label_set = label_set or find_label_set(data_dir, layout)
    bands = declared_bands(data_dir, layout)
    how: dict[str, Any] = {"label_set": label_set, "bands": bands}
    generate: Callable[..., Iterator[dict[str, Any]]]
    options: dict[str, Any] = {"features": tile_features(layout, bands), "split": split}
    described = f"{layout} {split} {embed} {sorted(label_set.values)} {bands or ''}"
    if hub is None:
        generate, how = _examples, {"rows": rows, **how, "embed": embed}
        fingerprint = _fingerprint(described, [path for row in rows for path in row.files.values() if path is not None])
    else:
        generate, how = _shard_examples, {"shards": hub.shards(split), "hub": hub, "layout": layout, **how}
        fingerprint = _fingerprint(f"{described} {hub.repository} {hub.revision}")
    if streaming:
        return datasets.IterableDataset.from_generator(generate, gen_kwargs=how, **options)
    return _build(generate, how, num_proc, fingerprint=fingerprint, **options)


def _build(
    generate: Callable[..., Iterator[dict[str, Any]]], how: dict[str, Any], num_proc: int | None, **options: Any
) -> datasets.Dataset:
    """Check all rows and write them to the cache, from which they are mapped into memory; done once."""
    options["writer_batch_size"] = 16  # rows in memory: an embedded one takes 5 MB
    with file_errors(datasets.config.HF_DATASETS_CACHE, "cannot be used as a cache", CACHE_HINT):
        try:
            return datasets.Dataset.from_generator(generate, gen_kwargs=how, num_proc=num_proc, **options)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError | OSError):
                raise error.__cause__.with_traceback(None) from None
            for _ in generate(**how):  # an exception in a worker process arrives without its cause, so find it again
                pass
            raise


def _fingerprint(options: str, paths: Sequence[str] = ()) -> str:
    """Name the cache: a change of a file's path, size or time, of the options or of the checks makes a new one."""
    digest = hashlib.sha256(options.encode())
    for module in (Path(__file__), Path(tile_files.__file__)):
        digest.update(module.read_bytes())
    for path in paths:
        with file_errors(path, "cannot be read"):
            status = os.stat(path)
        digest.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
