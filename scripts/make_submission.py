"""Pack maps of OpenEarthMap-SAR's val or test tiles for the contest (DFC 2025, track 1).

    hf-seg predict data/dfc25_track1/val/sar_images maps/ --model runs/ensemble
    python scripts/make_submission.py maps/ --data_dir data/dfc25_track1 --split val --output submission.zip

The zip contains one `<stem>.png` per tile, one band of uint8 class ids. It is written only if every tile has a map of
the tile's size, with ids from 1 up (1..8 in the contest) wherever the SAR image has data. Outside the swath (zeros
connected with the border) the ids are set to 0; `--keep_outside` keeps those of the maps, which are classes if mapped
with `--no_zero_collar`.
"""

import argparse
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

from hf_seg.errors import FileError, UserError, file_errors, one_line_errors
from hf_seg.files import atomic_file
from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet
from hf_seg.mapping.gdal import GDAL_ERRORS, gdal_reason, gdal_session
from hf_seg.mapping.scene import Scene
from hf_seg.settings import Parser

TILES = {"val": 210, "test": 490}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "maps", type=Path, metavar="MAPS", help="folder of <stem>.tif (or .png), as hf-seg predict writes them"
    )
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR")
    parser.add_argument("--split", default="val", choices=sorted(TILES), help="split of the tiles (val)")
    parser.add_argument("--output", type=Path, required=True, help="zip file to write")
    parser.add_argument("--keep_outside", action="store_true", help="keep the ids outside the swath")
    parser.add_argument("--partial", action="store_true", help="accept a data folder without all tiles of the contest")
    return parser.parse_args()


def find_maps(folder: Path, stems: set[str]) -> dict[str, Path]:
    """Return the map of each tile.

    Raises:
        UserError: no such folder, tiles without a map, or two maps of one tile.
    """
    with file_errors(folder, "cannot be read"):
        files = sorted(folder.iterdir())
    maps: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() not in (".tif", ".png") or path.stem not in stems:
            continue
        if path.stem in maps:
            raise UserError(f"{maps[path.stem]} and {path} are both maps of one tile; delete one of them")
        maps[path.stem] = path
    missing = sorted(stems - maps.keys())
    if missing:
        raise UserError(f"{folder} has no map of {len(missing)} of {len(stems)} tiles, e.g. {missing[0]}")
    return maps


def read_map(path: Path, tile: str, *, keep_outside: bool, label_set: LabelSet = OPEN_EARTH_MAP) -> np.ndarray:
    """Return the checked ids of one tile's map; (H, W) uint8.

    Raises:
        UserError: a map of another size or type, or pixels with data but without a class.
    """
    try:
        with rasterio.open(path) as file:
            bands = file.read()
    except GDAL_ERRORS as error:
        raise FileError(f"{path} cannot be read ({gdal_reason(error)})") from None
    with Scene(tile) as scene:
        inside = scene.rows(0, scene.height)[1]
    if bands.shape != (1, *inside.shape) or bands.dtype != np.uint8:
        size = " x ".join(map(str, inside.shape))
        found = f"{len(bands)} x {bands.shape[1]} x {bands.shape[2]} {bands.dtype}"
        raise UserError(f"{path} must be one band of uint8, {size} pixels like its tile; it is {found}")
    ids: np.ndarray = bands[0]
    if ids.max() >= label_set.num_labels:
        raise UserError(f"{path} contains {ids.max()}, which is not a class id; ids are 1..{label_set.num_labels - 1}")
    unknown = int((inside & (ids == BACKGROUND)).sum())
    if unknown:
        raise UserError(f"{path}: {unknown} pixels of the swath have no class; map it again without --abstain")
    if not keep_outside:
        ids = np.where(inside, ids, BACKGROUND).astype(np.uint8)
    return ids


def write_zip(images: Iterable[tuple[str, np.ndarray]], output: Path) -> None:
    """Write PNGs to a flat zip, atomically; its bytes depend on the images alone.

    Args:
        images: (stem, (H, W) uint8).
        output: zip file.
    """
    with atomic_file(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for stem, ids in images:
            png = io.BytesIO()
            Image.fromarray(ids).save(png, format="png", optimize=True)
            archive.writestr(zipfile.ZipInfo(f"{stem}.png"), png.getvalue())  # dated 1980, not compressed again


def main() -> None:
    """Check the maps and pack them."""
    args = parse()
    from hf_seg.data.provenance import find_label_set
    from hf_seg.data.scan import scan_open_earth_map_sar

    label_set = find_label_set(args.data_dir, "OpenEarthMap-SAR")
    rows = scan_open_earth_map_sar(args.data_dir).rows[args.split]
    tiles = {row.image_id: str(row.files["sar"]) for row in rows}
    if len(tiles) != TILES[args.split] and not args.partial:
        raise UserError(
            f"{args.data_dir} has {len(tiles)} {args.split} tiles, the contest has {TILES[args.split]}; "
            "complete it, or add --partial"
        )
    maps = find_maps(args.maps, set(tiles))
    how = {"keep_outside": args.keep_outside, "label_set": label_set}
    images = ((stem, read_map(maps[stem], tile, **how)) for stem, tile in tiles.items())
    with gdal_session():
        write_zip(images, args.output)
    print(f"{len(tiles)} maps: {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
