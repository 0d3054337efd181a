"""What a dataset on disk is: the release, a synthetic dataset, or other data in the same layout.

A dataset may describe itself in `dataset.json` in its root folder:

    {"name": "...", "layout": "OpenEarthMap", "description": "one sentence", "license": "Apache-2.0",
     "synthetic": true, "labels": {"train": "simulated noisy labels", "val": "exact"}}

`name` and `layout` are required.
"""

import json
from pathlib import Path
from typing import Any

from hf_seg.data.open_earth_map import scan_open_earth_map, scan_open_earth_map_sar
from hf_seg.errors import DatasetError, file_errors

DATASET_FILE = "dataset.json"
_SCANS = {"OpenEarthMap": scan_open_earth_map, "OpenEarthMap-SAR": scan_open_earth_map_sar}
# Usable tiles of the releases' splits. OpenEarthMap: without and with the images that come from xBD.
_RELEASED: dict[str, dict[str, set[int]]] = {
    "OpenEarthMap": {"train": {2303, 3000}, "val": {384, 500}, "test": {1151, 1500}},
    "OpenEarthMap-SAR": {"train": {4333}, "val": {210}, "test": {490}},
}
_KEYS: dict[str, tuple[type | tuple[type, ...], str]] = {  # type, and how the error calls it
    "name": (str, "text"),
    "layout": (str, "text"),
    "description": ((str, type(None)), "text or null"),
    "license": ((str, type(None)), "text or null"),
    "synthetic": (bool, "true or false"),
    "labels": ((dict, type(None)), "an object {split: kind of labels} or null"),
}


def read_provenance(data_dir: str | Path, layout: str) -> dict[str, Any]:
    """Return what a dataset is: name, layout, description, license, synthetic, released, labels.

    Args:
        data_dir: the dataset, or a folder around it, as the loaders take it.
        layout: "OpenEarthMap" or "OpenEarthMap-SAR".

    Returns:
        The content of `dataset.json` if there is one. Otherwise the name is that of the release if the numbers of tiles
        are the release's, else "data laid out as ...". `description`, `license` (the name of a license) and `labels`
        ({split: kind of labels}) are None where they are not known; `released` is True for the release only.

    Raises:
        DatasetError: no such dataset, or a `dataset.json` that cannot be used.
    """
    scan = _SCANS[layout](data_dir)
    counts = {split: len(rows) for split, rows in scan.rows.items() if rows}
    has_file = (scan.root / DATASET_FILE).exists()
    released = not has_file and bool(counts) and all(n in _RELEASED[layout][split] for split, n in counts.items())
    unknown = {"description": None, "license": None, "synthetic": False, "labels": None}
    name = layout if released else f"data laid out as {layout}"
    described = _read(scan.root / DATASET_FILE, layout) if has_file else {}
    return {"name": name, "layout": layout, **unknown, **described, "released": released}


def _read(file: Path, layout: str) -> dict[str, Any]:
    hint = "correct it, or delete it if it does not describe these data"
    try:
        with file_errors(file, "cannot be read"):
            content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} is not valid JSON ({error}); {hint}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{file} must contain a JSON object; {hint}")
    for key in ("name", "layout"):
        if key not in content:
            raise DatasetError(f"{file} has no key {key!r}; {hint}")
    for key, (kind, expected) in _KEYS.items():
        if key in content and not isinstance(content[key], kind):
            raise DatasetError(f"{file}: {key} must be {expected}; it is {json.dumps(content[key])}; {hint}")
    if content["layout"] != layout:
        raise DatasetError(f"{file}: layout is {content['layout']!r}, but the folder is laid out as {layout}; {hint}")
    return content
