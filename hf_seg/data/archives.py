"""The archives of OpenEarthMap and OpenEarthMap-SAR on Zenodo, and where their files belong.

<destination>/OpenEarthMap/OpenEarthMap_wo_xBD/<region>/{images,labels}/...     name oem
<destination>/dfc25_track1/{train,val,test}/{rgb_images,sar_images,labels}/...  names oem-sar*
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

OPEN_EARTH_MAP_ROOT = PurePosixPath("OpenEarthMap", "OpenEarthMap_wo_xBD")
SAR_ROOT = PurePosixPath("dfc25_track1")

Place = Callable[[PurePosixPath], PurePosixPath]  # of a member of an archive -> of the file below the destination


def place_open_earth_map(member: PurePosixPath) -> PurePosixPath:
    """Put `OpenEarthMap_wo_xBD/`, wherever it lies in the archive, under `OpenEarthMap/`; keep the rest as it is."""
    parts, (top, root) = member.parts, OPEN_EARTH_MAP_ROOT.parts
    start = parts.index(root) if root in parts else int(parts[0] == top)
    return PurePosixPath(top, *parts[start:])


def place_open_earth_map_sar(member: PurePosixPath, *, labels_only: bool = False) -> PurePosixPath:
    """Map a member of a DFC 2025 track 1 archive to its place under `dfc25_track1/`.

    The split of a tile follows from its name (`ValArea_001.tif` -> val), its kind from the nearest enclosing
    `rgb_images`, `sar_images` or `labels`. Tiles without such a folder are labels in a label archive (`labels_only`,
    where the enclosing folders are ignored) and otherwise SAR, the only image that val and test have. Other files keep
    their path from their first `train`, `val` or `test` folder on.
    """
    *folders, name = member.parts
    if tile := re.fullmatch(r"(Train|Val|Test)Area_\d+\.tif", name):
        split = tile[1].lower()
        kinds = [folder for folder in folders if folder in ("rgb_images", "sar_images", "labels")]
        if labels_only:
            kinds = ["labels"]
        elif not kinds and split != "train":
            kinds = ["sar_images"]
        if kinds:
            return SAR_ROOT / split / kinds[-1] / name
    for index, folder in enumerate(folders):
        if folder in ("train", "val", "test"):
            return SAR_ROOT.joinpath(*member.parts[index:])
    return SAR_ROOT.joinpath(*[folder for folder in folders if not folder.startswith(SAR_ROOT.name)], name)


@dataclass(frozen=True)
class Archive:
    """One zip file of a Zenodo record.

    `unpacked_bytes` is an estimate from above: every band of every tile, uncompressed at 1024 x 1024 pixels. `md5` is
    None where only the record knows it.
    """

    record: int
    file_name: str
    unpacked_bytes: int
    root: PurePosixPath
    place: Place
    md5: str | None = None


_BAND_BYTES = 1 << 20
_OEM_MD5 = "64155d1dc9d3b68536063f79878e1a67"
_place_label = partial(place_open_earth_map_sar, labels_only=True)


def _sar_archive(record: int, content: str, n_bands: int, place: Place = place_open_earth_map_sar) -> Archive:
    return Archive(record, f"dfc25_track1_{content}.zip", n_bands * _BAND_BYTES, SAR_ROOT, place)


ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "oem": (
        Archive(7223446, "OpenEarthMap.zip", 16_000 * _BAND_BYTES, OPEN_EARTH_MAP_ROOT, place_open_earth_map, _OEM_MD5),
    ),
    "oem-sar": (_sar_archive(14622048, "trainval", 5 * 4333 + 210),),
    "oem-sar-val-labels": (_sar_archive(14950559, "val_labels", 210, _place_label),),
    "oem-sar-test": (_sar_archive(14950559, "test", 490),),
    "oem-sar-test-labels": (_sar_archive(14950559, "test_labels", 490, _place_label),),
}
ARCHIVES["oem-sar-all"] = sum((archives for name, archives in ARCHIVES.items() if name != "oem"), ())
