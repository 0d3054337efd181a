"""The land-cover classes of OpenEarthMap: ids as in the label files, names, colours."""

import numpy as np

CLASS_NAMES: tuple[str, ...] = (
    "background",
    "bareland",
    "rangeland",
    "developed space",
    "road",
    "tree",
    "water",
    "agriculture land",
    "building",
)
NUM_LABELS: int = len(CLASS_NAMES)
ID2LABEL: dict[int, str] = dict(enumerate(CLASS_NAMES))
LABEL2ID: dict[str, int] = {name: index for index, name in ID2LABEL.items()}

# Background (0, "unknown") is no land cover: never learned unless asked for, never predicted, never scored.
BACKGROUND: int = 0
IGNORE_INDEX: int = 255

# (9, 3) RGB, as published with OpenEarthMap.
PALETTE: np.ndarray = np.array(
    [
        (0x00, 0x00, 0x00),
        (0x80, 0x00, 0x00),
        (0x00, 0xFF, 0x24),
        (0x94, 0x94, 0x94),
        (0xFF, 0xFF, 0xFF),
        (0x22, 0x61, 0x26),
        (0x00, 0x45, 0xFF),
        (0x4B, 0xB5, 0x49),
        (0xDE, 0x1F, 0x07),
    ],
    dtype=np.uint8,
)
PALETTE.setflags(write=False)
