"""What a dataset is: the release, a synthetic dataset, or other data in the same layout; on disk or on the Hub.

A dataset may describe itself in `dataset.json` in its root folder, or in that of its repository:

    {"name": "...", "layout": "OpenEarthMap", "description": "one sentence", "license": "Apache-2.0",
     "synthetic": true, "labels": {"train": "simulated noisy labels", "val": "exact"},
     "bands": {"sar": ["VV", "VH"]}}

`name` and `layout` are required. `bands` names the bands of a column whose images are not the 8-bit SAR or RGB images
of the release: any number of bands, of any number type. Where the label files do not have OpenEarthMap's classes,
`classes` and the other keys of `hf_seg.label_sets` describe them.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from hf_seg.data.hub_dataset import DATASET_FILE, HubDataset, find_hub_dataset
from hf_seg.data.scan import SCANS, SPLITS
from hf_seg.errors import DatasetError, UserError, file_errors, shown
from hf_seg.label_sets import LABEL_SET_KEYS, map_classes, parse_label_set, read_label_set
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet

BENCHMARK_FILE = "eval.yaml"
# Usable tiles of the releases' splits. OpenEarthMap: without and with the images that come from xBD.
_RELEASED: dict[str, dict[str, set[int]]] = {
    "OpenEarthMap": {"train": {2303, 3000}, "val": {384, 500}, "test": {1151, 1500}},
    "OpenEarthMap-SAR": {"train": {4333}, "val": {210}, "test": {490}},
}
_UNKNOWN: dict[str, Any] = {"description": None, "license": None, "synthetic": False, "labels": None, "bands": None}
_KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {  # type, and how the error calls it
    "name": (str, "text"),
    "layout": (str, "text"),
    "description": ((str, type(None)), "text or null"),
    "license": ((str, type(None)), "text or null"),
    "synthetic": (bool, "true or false"),
    "labels": ((dict, type(None)), "an object {split: kind of labels} or null"),
    "bands": ((dict, type(None)), "an object {column: names of bands} or null"),
}


def read_provenance(data_dir: str | Path, layout: str) -> dict[str, Any]:
    """Return what a dataset is: name, layout, description, license, synthetic, released, labels, bands.

    Args:
        data_dir: as for the loaders.
        layout: "OpenEarthMap" or "OpenEarthMap-SAR".

    Returns:
        The content of `dataset.json` if there is one. Otherwise the name is that of the release if the numbers of tiles
        are the release's, else "data laid out as ...". `description`, `license` (the name of a license) and `labels`
        ({split: kind of labels}) are None where they are not known, `bands` where the images are those of the release;
        `released` is True for the release only. A dataset on the Hub also has `hub_id`, `revision` (its commit) and
        `benchmark_tasks` ({split: id} of its `eval.yaml`); it is the release if its `dataset.json` says so, as the
        folder was that was pushed.

    Raises:
        UserError: no such dataset, or a `dataset.json` that cannot be used.
    """
    if (hub := find_hub_dataset(data_dir)) is not None:
        unknown = {"name": hub.repository, "layout": layout, **_UNKNOWN}
        described = _read_description(data_dir, layout) or unknown
        where = {"hub_id": hub.repository, "revision": hub.revision, "benchmark_tasks": _benchmark_tasks(hub)}
        return {**described, "released": described.get("released") is True, **where}
    scan = SCANS[layout](data_dir)
    if (content := _read_description(scan.root, layout)) is not None:
        return {**content, "released": False}
    counts = {split: len(rows) for split, rows in scan.rows.items() if rows}
    released = bool(counts) and all(n in _RELEASED[layout][split] for split, n in counts.items())
    name = layout if released else f"data laid out as {layout}"
    return {"name": name, "layout": layout, **_UNKNOWN, "released": released}


def _benchmark_tasks(hub: HubDataset) -> dict[str, str]:
    """Return {split: task id} of the `eval.yaml` of a dataset that is a benchmark of the Hub; {} for any other.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    if BENCHMARK_FILE not in hub.files:
        return {}
    try:
        content = yaml.safe_load(hub.fetch(BENCHMARK_FILE).read_text(encoding="utf-8"))
        tasks = [(task["split"], task["id"]) for task in content["tasks"]]
    except (ValueError, yaml.YAMLError, TypeError, KeyError, RecursionError):
        return {}  # no description of a benchmark, whatever else it is
    return {split: task for split, task in tasks if split in SPLITS and isinstance(task, str)}


def declared_bands(data_dir: str | Path, layout: str) -> dict[str, tuple[str, ...]]:
    """Return {column: names of its bands} for the columns that are not 8-bit SAR or RGB images.

    Args:
        data_dir: root of the dataset, or its name on the Hub.
        layout: "OpenEarthMap" or "OpenEarthMap-SAR".

    Raises:
        UserError: a `dataset.json` that cannot be used.
    """
    bands = (_read_description(data_dir, layout) or _UNKNOWN)["bands"] or {}
    return {column: tuple(names) for column, names in bands.items()}


def _read_description(root: str | Path, layout: str) -> dict[str, Any] | None:
    """Return the content of `dataset.json`; None if there is none.

    Args:
        root: of the dataset, or its name on the Hub.
    """
    hub = find_hub_dataset(root)
    if hub is not None:
        return _read(hub.fetch(DATASET_FILE), f"{hub}/{DATASET_FILE}", layout) if DATASET_FILE in hub.files else None
    file = Path(root) / DATASET_FILE
    return _read(file, str(file), layout) if file.exists() else None


def _check_bands(file: str, bands: dict[str, Any], layout: str) -> None:
    columns = {"OpenEarthMap": ("image",), "OpenEarthMap-SAR": ("optical", "sar")}[layout]
    for column, names in bands.items():
        if column not in columns:
            raise DatasetError(f"{file}: bands has {column!r}; the images of {layout} are {' and '.join(columns)}")
        is_list = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
        if not is_list or len({name.lower() for name in names}) < len(names):
            raise DatasetError(
                f'{file}: bands of {column} must be different names, e.g. ["VV", "VH"]; they are {shown(names)}'
            )


def find_label_set(data_dir: str | Path, layout: str, chosen: str | LabelSet | None = None) -> LabelSet:
    """Return the classes to train or to score on, with `values` as the label files of a dataset have them.

    Args:
        data_dir, layout: as for `read_provenance`.
        chosen: YAML file of the classes, name of a built-in set, or the classes; None: those in `dataset.json`, or else
            OpenEarthMap's. Where `dataset.json` has classes of its own, they are mapped to the chosen ones; else the
            label files have the chosen `values`.

    Raises:
        UserError: a file that cannot be used, or classes of the dataset without a counterpart.
    """
    if isinstance(chosen, str):
        chosen = read_label_set(chosen)
    root = data_dir if find_hub_dataset(data_dir) is not None else SCANS[layout](data_dir).root
    content = _read_description(root, layout) or {}
    classes = {key: content[key] for key in LABEL_SET_KEYS if key in content}
    if not classes:
        return chosen or OPEN_EARTH_MAP
    name = f"{root}/{DATASET_FILE}"
    own = parse_label_set(classes, name)
    return map_classes(chosen, own, name) if chosen else own


def _read(path: Path, file: str, layout: str) -> dict[str, Any]:
    hint = "correct it, or delete it if it does not describe these data"
    try:
        with file_errors(file, "cannot be read"):
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise DatasetError(f"{file} is not valid JSON ({error}); {hint}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file} must contain a JSON object; {hint}")
    content = {"name": None, "layout": None, **_UNKNOWN, **content}
    for key, (kind, expected) in _KEYS.items():
        if not isinstance(content[key], kind):
            raise DatasetError(f"{file}: {key} must be {expected}; it is {json.dumps(content[key])[:200]}; {hint}")
    _check_bands(file, content["bands"] or {}, layout)
    if content["layout"] != layout:
        raise DatasetError(
            f"{file}: layout is {shown(content['layout'])}, but the folder is laid out as {layout}; {hint}"
        )
    return content
