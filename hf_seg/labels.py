"""What a class is: id, name, colour, and the pixel values by which label files code it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

# Background (0, "unknown") is no class: never learned unless asked for, never predicted, never scored.
BACKGROUND: int = 0
BACKGROUND_NAME: str = "background"
IGNORE_INDEX: int = 255


@dataclass(frozen=True)
class LabelSet:
    """The classes of a training, 1 to N - 1; id 0 is background. `hf_seg.label_sets` reads them from YAML.

    Label files may code the classes by other values. They are translated once, where labels are read; everything behind
    has class ids, 0 for background and `IGNORE_INDEX` for pixels without a label.

    Args:
        names: by id; the first is "background".
        colors: by id, (red, green, blue) in 0..255.
        values: {pixel value in the label files: class id, or `IGNORE_INDEX`}; any other value is an error.
        aliases: other names of each class, by id.
        ignore_unmapped: labels of a dataset whose classes have no counterpart here are ignored, and no error.

    Raises:
        ValueError: names, colours and aliases that differ in number, or names without background.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    values: Mapping[int, int] = field(hash=False)
    aliases: tuple[tuple[str, ...], ...]
    ignore_unmapped: bool = False

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.colors) == len(self.aliases):
            raise ValueError(f"{len(self.names)} names, {len(self.colors)} colors and {len(self.aliases)} aliases")
        if self.names[BACKGROUND] != BACKGROUND_NAME:
            raise ValueError(f"class {BACKGROUND} must be {BACKGROUND_NAME!r}; it is {self.names[BACKGROUND]!r}")

    @property
    def num_labels(self) -> int:
        """Number of ids, background included."""
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """Names by id, as a model's config has them."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Ids by name."""
        return {name: index for index, name in enumerate(self.names)}

    @functools.cached_property
    def palette(self) -> np.ndarray:
        """Colours by id, (N, 3) uint8, read-only."""
        return _frozen(np.array(self.colors, dtype=np.uint8))

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Class id of each pixel value of a label file, (256,) int16, read-only; -1 for a value outside the set."""
        table = np.full(256, -1, dtype=np.int16)
        table[list(self.values)] = list(self.values.values())
        return _frozen(table)

    def to_ids(self, pixels: np.ndarray, *, are_ids: bool = False) -> np.ndarray:
        """Translate the pixel values of a label file to class ids, (H, W) int16; -1 for a value outside the set.

        Args:
            pixels: (H, W) whole numbers. `IGNORE_INDEX` means no label, unless a class has that value.
            are_ids: the pixels are class ids already, as in pseudo-labels.
        """
        values = np.arange(256, dtype=np.int16)
        table = np.where(values < self.num_labels, values, -1) if are_ids else self.table.copy()
        if table[IGNORE_INDEX] < 0:
            table[IGNORE_INDEX] = IGNORE_INDEX
        unchanged = int(np.argmin(table == values))  # values below it are their own ids
        is_whole = pixels.size and pixels.dtype.kind in "iu"
        if is_whole and pixels.min() >= 0 and pixels.max() < unchanged:  # a table takes ten times as long
            return pixels.astype(np.int16)
        as_bytes = pixels.astype(np.uint8)
        return np.where(as_bytes == pixels, np.take(table, as_bytes), np.int16(-1))


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


# Names, colours and ids as published; a label file contains the ids.
OPEN_EARTH_MAP = LabelSet(
    names=(
        BACKGROUND_NAME,
        "bareland",
        "rangeland",
        "developed space",
        "road",
        "tree",
        "water",
        "agriculture land",
        "building",
    ),
    colors=(
        (0x00, 0x00, 0x00),
        (0x80, 0x00, 0x00),
        (0x00, 0xFF, 0x24),
        (0x94, 0x94, 0x94),
        (0xFF, 0xFF, 0xFF),
        (0x22, 0x61, 0x26),
        (0x00, 0x45, 0xFF),
        (0x4B, 0xB5, 0x49),
        (0xDE, 0x1F, 0x07),
    ),
    values={index: index for index in range(9)},
    aliases=((),) * 9,
)
