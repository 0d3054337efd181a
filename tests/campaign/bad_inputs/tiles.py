"""Tiles and labels that cannot be trained on."""

import os
from typing import Any

import numpy as np

from bad_inputs.case import (
    CHECK,
    CHECK_OEM,
    EVALUATE,
    LABEL,
    PSEUDO,
    STAGE1,
    STAGE2,
    TILE,
    TRAIN,
    Case,
    both,
    colored,
    cut,
    folder,
    grey,
    noise,
    overwrite,
    raw_tiff,
    remove,
    rename,
    tiff,
    write,
)

TRAINING = STAGE2 + TRAIN
NAME = "TrainArea_001"
OPTICAL = "sar/train/rgb_images/TrainArea_001.tif"
VAL = "sar/val/sar_images/ValArea_001.tif"
IMAGE = "oem/acre/images/acre_1.tif"


def _tile(wrong: str, make: Any, says: str = NAME, command: str = TRAINING, what: str = "tile", code: int = 2) -> Case:
    return Case(what, wrong, make, command, says, code)


def _label(wrong: str, pixels: np.ndarray, says: str = NAME, **profile: Any) -> Case:
    return Case("label", wrong, tiff(LABEL, pixels, **profile), TRAINING, says)


SIZE = (112, 112)
NO_UTF8 = os.fsdecode(b"Tile_\xff")
LATIN = both(*(rename(name, name.replace(NAME, NO_UTF8)) for name in (TILE, LABEL, OPTICAL)))
TILES = (
    _tile("empty file", write(TILE, b"")),
    _tile("cut in the middle", cut(TILE, 0.5)),
    _tile("cut after a fiftieth", cut(TILE, 0.02)),
    _tile("random bytes", write(TILE, noise(5000).tobytes())),
    _tile("16 bits", tiff(TILE, noise(*SIZE, dtype=np.uint16))),
    _tile("signed bytes", tiff(TILE, noise(*SIZE).astype(np.int8))),
    _tile("complex numbers", tiff(TILE, noise(*SIZE).astype(np.complex64))),
    _tile("three bands where one belongs", tiff(TILE, noise(3, *SIZE))),
    _tile("1 x 1 px beside a label of 112 x 112", tiff(TILE, noise(1, 1))),
    _tile("header of 0 x 0 px", write(TILE, raw_tiff(grey(0, 0), bytes(64)))),
    _tile("header of 10^9 x 10^9 px", write(TILE, raw_tiff(grey(10**9, 10**9), bytes(64)))),
    _tile("sparse file of 10^5 x 10^5 px", write(TILE, raw_tiff(grey(10**5, 10**5, tag273=0, tag279=0, tag278=100)))),
    _tile(
        "blocks of 60,000 x 60,000 px",
        write(
            TILE,
            raw_tiff(
                {256: 112, 257: 112, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 8, 325: 12544},
                bytes(12544),
            ),
        ),
    ),
    _tile("PNG under .tif", tiff(TILE, noise(*SIZE), driver="PNG")),
    _tile("JPEG under .tif", tiff(TILE, noise(*SIZE), driver="JPEG")),
    _tile("corrupt LZW", both(tiff(TILE, noise(*SIZE), compress="lzw"), overwrite(TILE, 0.5, bytes(100)))),
    _tile("1 bit a pixel", tiff(TILE, noise(*SIZE) % 2, nbits=1)),
    _tile("a folder named .tif", folder(TILE), "no file in train/sar_images", CHECK, code=0),
    _tile("two files of one name, .tif and .TIFF", tiff(TILE.replace(".tif", ".TIFF"), noise(*SIZE))),
    _tile("missing, its label is there", remove(TILE), "no file in train/sar_images", CHECK, code=0),
    _tile("a name that is no UTF-8", LATIN, "Tile_"),
    _tile("a name that is no UTF-8, in a check", LATIN, "Tile_", CHECK),
    _tile("optical with one band", tiff(OPTICAL, noise(*SIZE)), NAME, PSEUDO + " --column optical"),
    _tile("optical of another size than SAR", tiff(OPTICAL, noise(3, 50, 50)), NAME, PSEUDO),
    _tile("16 bits, at validation", tiff(VAL, noise(*SIZE, dtype=np.uint16)), "ValArea_001", EVALUATE),
    _tile("two bands, OpenEarthMap", tiff(IMAGE, noise(2, *SIZE)), "acre_1", STAGE1 + TRAIN),
    _tile("cut, OpenEarthMap", cut(IMAGE, 0.5), "acre_1", STAGE1 + TRAIN),
    _tile("cut, in the report of a check", cut(TILE, 0.5), NAME, CHECK, code=1),
    _tile(
        "header of 10^9 x 10^9 px, in a check", write(TILE, raw_tiff(grey(10**9, 10**9), bytes(9))), NAME, CHECK, code=1
    ),
    _tile("cut, OpenEarthMap, in a check", cut(IMAGE, 0.5), "acre_1", CHECK_OEM, code=1),
    _label("id 9", np.full(SIZE, 9, np.uint8)),
    _label("id 255", np.full(SIZE, 255, np.uint8)),
    _label("three bands", noise(3, *SIZE)),
    _tile("colour table", both(tiff(LABEL, noise(*SIZE) % 9), colored(LABEL)), what="label"),
    _label("16 bits", (noise(*SIZE) % 9).astype(np.uint16)),
    _label("floats", (noise(*SIZE) % 9).astype(np.float32)),
    _label("one row more than the image", np.ones((113, 112), np.uint8)),
    _label("turned by 90 degrees", np.ones((112, 96), np.uint8)),
    _label("empty file", np.ones((1, 1), np.uint8)),
)
