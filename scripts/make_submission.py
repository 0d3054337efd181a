"""Pack maps of OpenEarthMap-SAR's val or test tiles as the contest (DFC 2025, track 1) takes them.

    hf-seg-predict data/dfc25_track1/val/sar_images maps/ --model runs/ensemble
    python scripts/make_submission.py maps/ --data_dir data/dfc25_track1 --split val --output submission.zip

A flat zip of `<stem>.png`, one band of uint8 class ids. Checked before it appears: a map for every tile, the tile's
size, ids 1..8 wherever the SAR image holds data. Outside its footprint (zeros connected with the border) the ids become
0; `--keep_outside` leaves there what the maps have, which are classes if they were made with `--no_zero_collar`.
"""

import argparse
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from hf_seg.data.scan import scan_open_earth_map_sar
from hf_seg.errors import UserError, one_line_errors
from hf_seg.labels import BACKGROUND, NUM_LABELS
from hf_seg.mapping.scene import Scene

TILES = {"val": 210, "test": 490}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "maps", type=Path, metavar="MAPS", help="folder of <stem>.tif (or .png), as hf-seg-predict writes"
    )
    parser.add_argument("--data_dir", required=True, help="root of OpenEarthMap-SAR")
    parser.add_argument("--split", default="val", choices=sorted(TILES), help="val")
    parser.add_argument("--output", type=Path, required=True, help="zip file to write")
    parser.add_argument("--keep_outside", action="store_true", help="do not blank what lies outside the footprint")
    parser.add_argument(
        "--partial", action="store_true", help="accept a data folder without all of the contest's tiles"
    )
    return parser.parse_args()


def find_maps(folder: Path, stems: set[str]) -> dict[str, Path]:
    """Return the map of each tile.

    Raises:
        UserError: tiles without a map, maps without a tile, or two maps of one tile.
    """
    maps: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() not in (".tif", ".png") or path.stem not in stems:
            continue
        if path.stem in maps:
            raise UserError(f"{maps[path.stem]} and {path} are both maps of one tile; delete one of them")
        maps[path.stem] = path
    missing = sorted(stems - maps.keys())
    if missing:
        raise UserError(f"{folder} has no map of {len(missing)} of {len(stems)} tiles, {missing[0]} for one")
    return maps


def read_map(path: Path, tile: str, *, keep_outside: bool) -> np.ndarray:
    """Return the ids of one tile's map, checked; (H, W) uint8.

    Raises:
        UserError: a map of another size or type, or pixels with data but without a class.
    """
    try:
        with rasterio.open(path) as file:
            bands = file.read()
    except RasterioError as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    with Scene(tile) as scene:
        inside = scene.rows(0, scene.height)[1]
    if bands.shape != (1, *inside.shape) or bands.dtype != np.uint8:
        size = " x ".join(map(str, inside.shape))
        found = f"{len(bands)} x {bands.shape[1]} x {bands.shape[2]} {bands.dtype}"
        raise UserError(f"{path} must be one band of uint8, {size} pixels as its tile; it is {found}")
    ids: np.ndarray = bands[0]
    if ids.max() >= NUM_LABELS:
        raise UserError(f"{path} holds {ids.max()}, which is no class id; ids are 1..{NUM_LABELS - 1}")
    unknown = int((inside & (ids == BACKGROUND)).sum())
    if unknown:
        raise UserError(f"{path}: {unknown} pixels of the footprint have no class; map it again without --abstain")
    if not keep_outside:
        ids = np.where(inside, ids, BACKGROUND).astype(np.uint8)
    return ids


def write_zip(images: Iterator[tuple[str, np.ndarray]], output: Path) -> int:
    """Write PNGs to a flat zip, aside and then renamed; its bytes depend on the images alone.

    Args:
        images: (stem, (H, W) uint8).
        output: zip file.

    Returns:
        The number of images.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.partial")
    count = 0
    with zipfile.ZipFile(aside, "w") as archive:
        for stem, ids in images:
            png = io.BytesIO()
            Image.fromarray(ids).save(png, format="png", optimize=True)
            archive.writestr(zipfile.ZipInfo(f"{stem}.png"), png.getvalue())  # dated 1980, stored
            count += 1
    os.replace(aside, output)
    return count


def main() -> None:
    """Check and pack."""
    args = parse()
    rows = scan_open_earth_map_sar(args.data_dir).rows[args.split]
    tiles = {row.image_id: str(row.files["sar"]) for row in rows}
    if len(tiles) != TILES[args.split] and not args.partial:
        raise UserError(
            f"{args.data_dir} has {len(tiles)} {args.split} tiles, the contest's {args.split} has {TILES[args.split]}; "
            "complete it, or add --partial"
        )
    maps = find_maps(args.maps, set(tiles))
    images = ((stem, read_map(maps[stem], tile, keep_outside=args.keep_outside)) for stem, tile in tiles.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        count = write_zip(images, args.output)
    print(f"{count} maps: {args.output}")


if __name__ == "__main__":
    with one_line_errors():
        main()
