"""Streets, blocks and lots: a hierarchy of rectangles in gently bent coordinates.

A scene is split by streets (first by wide ones) into blocks of one land use each, and a block into lots. The splits
run along two coordinates u and v that are rotated and bent, so streets curve and buildings stay aligned with them.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_seg.labels import OPEN_EARTH_MAP

BARE, RANGE, DEVELOPED, ROAD, TREE, WATER, FIELD, BUILDING = (
    OPEN_EARTH_MAP.label2id[name]
    for name in ("bareland", "rangeland", "developed space", "road", "tree", "water", "agriculture land", "building")
)


# What fills a block, one column per land use. Lengths in metres; the rest are probabilities or fractions.
#   lot                        side below which lots are no longer split
#   developed ... crops        classes of a lot's open ground, one per lot
#   built                      probability that a lot has a building
#   min_margin, max_margin     fraction of a lot's side left open on each side of its building
#   ring                       depth of a closed row of buildings around the block; 0: detached
#   pitched                    probability of a pitched roof
#   trees, crown, clumped      crowns per square metre of open ground, their typical radius, fraction of them in groups
#   hedge, pools               probability of a hedge around a lot, of a swimming pool on it
#   cars                       per square metre of developed ground
#   paths                      width of winding paths; 0: none
#   bare                       fraction of the grass that is bare
_LAND_USES = """
                 rows   houses cottages    slabs    works    paved     park   meadow   forest   fields    plots     site
lot                15       22       14       48       62       46       90       75      200       85       34       70
developed        0.75     0.35     0.85      0.6     0.88     0.96     0.08        0        0        0        0     0.15
grass            0.24    0.635    0.135     0.39     0.08     0.02     0.92        1        1     0.05     0.08        0
soil             0.01    0.015    0.015     0.01     0.04     0.02        0        0        0        0        0     0.85
crops               0        0        0        0        0        0        0        0        0     0.95     0.92        0
built            0.93     0.93     0.92      0.9     0.88     0.06     0.04     0.02        0     0.02     0.04      0.1
min_margin          0     0.11     0.05      0.2     0.08     0.25     0.36      0.4      0.1      0.4      0.3      0.2
max_margin          0     0.24     0.14     0.33     0.24      0.4     0.44     0.45     0.25     0.45      0.4     0.35
ring               13        0        0        0        0        0        0        0        0        0        0        0
min_storeys         3        1        2        3        2        1        1        1        1        1        1        1
max_storeys         6        2        2        7        3        2        2        2        2        2        2        4
pitched          0.35      0.8      0.7      0.1      0.1        0        0        0        0        1        1        0
trees           0.004   0.0026   0.0014   0.0026   0.0004    0.001    0.009   0.0016    0.075        0        0        0
crown             3.2        3      2.4      3.6      2.5      2.5      4.2      3.4      3.8      2.5      2.5      2.5
clumped           0.4      0.4      0.4      0.5        0        0     0.85     0.95      0.6        0        0        0
hedge               0     0.15     0.08        0        0        0        0        0        0      0.2     0.08        0
pools               0     0.12        0        0        0        0        0        0        0        0        0        0
cars            0.004    0.004    0.005    0.006    0.007    0.014        0        0        0        0        0    0.003
paths               0        0        0        0        0        0      2.4      1.6        0        0        0        0
bare                0        0        0        0        0        0     0.01     0.03     0.01        0        0        0
"""
COVERS = {"developed": DEVELOPED, "grass": RANGE, "soil": BARE, "crops": FIELD}
LAND_USE_NAMES, *_rows = [line.split() for line in _LAND_USES.strip().splitlines()]
LAND_USES = np.rec.fromarrays(
    [np.array(values, float) for _, *values in _rows], dtype=[(name, float) for name, *_ in _rows]
)


@dataclass(frozen=True)
class Region:
    """A place of the dataset with its own look. Lengths in metres."""

    name: str
    utm_zone: int
    uses: dict[str, float]  # {name of a land use: weight among blocks}
    block: float  # side below which blocks are no longer split
    street_prob: float  # probability that a border between blocks is a street
    main_width: float
    minor_width: float
    bend: float  # how far streets deviate from a straight line
    water: str = ""  # "", river, lake or coast
    water_prob: float = 1.0
    river_width: tuple[float, float] = (12.0, 45.0)
    districts: tuple["Region", ...] = ()  # each fills a part of the scene with its own streets and land uses


# The order is fixed: scenes cycle through the regions. Names contain `-` and `_`, as in the release.
REGIONS = (
    # suburb, farmland, riverside, industry, woodland
    Region("maple_grove", 14, {"houses": 5, "park": 0.9, "paved": 1, "forest": 0.5}, 78, 0.85, 7, 4.5, 10),
    Region("plaine", 27, {"fields": 6, "meadow": 0.9, "houses": 0.5, "forest": 0.5}, 120, 0.4, 6, 4, 14),
    Region(
        "riverton", 14, {"meadow": 2, "park": 2, "houses": 2, "slabs": 1.7}, 90, 0.6, 8, 4.5, 9, "river", 1.0, (34, 80)
    ),
    Region("portworks", 27, {"works": 4.2, "paved": 2.2, "meadow": 0.7, "site": 0.2, "slabs": 0.8}, 105, 0.75, 8, 5, 2),
    Region("north_wood", 14, {"forest": 3.6, "meadow": 2.6, "site": 0.12}, 115, 0.25, 6, 4, 22, "lake", 0.3),
    # city on a grid, coast, old town, lakes, mixed
    Region(
        "shin-machi", 55, {"cottages": 3.5, "slabs": 1.2, "paved": 1.5, "plots": 0.8, "park": 0.8}, 70, 0.9, 8, 4, 0.5
    ),
    Region("seabreeze", 14, {"houses": 1.6, "paved": 1.5, "works": 1.7, "park": 1}, 85, 0.7, 8, 4.5, 6, "coast"),
    Region("altstadt", 27, {"rows": 5, "park": 1, "paved": 1.5, "slabs": 1.5}, 82, 0.85, 8, 4.5, 5, "river", 0.3),
    Region("haute-combe", 27, {"meadow": 3, "forest": 1, "houses": 2.2, "park": 0.6}, 105, 0.5, 6, 4, 14, "lake"),
    Region(
        "midway",
        55,
        {"meadow": 3, "rows": 0.6, "slabs": 1.4, "works": 1.2, "houses": 1, "paved": 1.3},
        95,
        0.5,
        8,
        4.5,
        12,
    ),
)

# a river between districts of all styles, for a large scene
MOSAIC = Region("mosaic", 14, {}, 95, 0.85, 9, 5, 10, "river", 1.0, (40, 80), REGIONS)
DISTRICT = 0.3  # of the scene's extent: side below which a part of the scene becomes one district


@dataclass(frozen=True)
class Parcels:
    """The plan of a scene; N lots, rectangles as (u0, u1, v0, v1) in metres."""

    u: np.ndarray  # (H, W) metres
    v: np.ndarray
    lot: np.ndarray  # (H, W) int32 index of the lot, -1 on streets
    rectangles: np.ndarray  # (N, 4)
    blocks: np.ndarray  # (N, 4) rectangle of each lot's block
    uses: Any  # (N,) records of `LAND_USES`
    street: np.ndarray  # (H, W) metres to the nearest street's edge, negative on it
    is_main: np.ndarray  # (H, W) bool, True on main streets


@dataclass(frozen=True)
class _Node:
    """A rectangle that may be split; `use` and `block` are set in blocks and lots."""

    pixels: np.ndarray  # flat indices
    rectangle: tuple[float, ...]
    region: Region
    use: int | None = None  # in `LAND_USES`
    block: tuple[float, ...] = ()

    def split(self, coordinate: np.ndarray, axis: int, cut: float, width: float) -> "list[_Node]":
        """Return the two sides of a street of `width` along `coordinate` = `cut`."""
        offset = coordinate[self.pixels] - cut
        low, high = list(self.rectangle), list(self.rectangle)
        low[2 * axis + 1], high[2 * axis] = cut - width / 2, cut + width / 2
        return [
            replace(self, pixels=self.pixels[offset < -width / 2], rectangle=tuple(low)),
            replace(self, pixels=self.pixels[offset > width / 2], rectangle=tuple(high)),
        ]


def lay_out(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, region: Region) -> Parcels:
    """Split a scene into streets, blocks and lots.

    Args:
        u, v: (H, W) coordinates of each pixel in metres.
    """
    lot = np.full(u.size, -1, np.int32)
    street = np.full(u.size, 1e3, np.float32)
    is_main = np.zeros(u.size, bool)
    leaves: list[_Node] = []
    axes = (u.ravel(), v.ravel())
    bounds = _bounds(rng, u, v, region.block)
    extent = max(bounds[1] - bounds[0], bounds[3] - bounds[2])
    districts = itertools.cycle([region.districts[i] for i in rng.permutation(len(region.districts))])
    stack = [_Node(np.arange(u.size), bounds, region)]
    while stack:
        node = stack.pop()
        if not node.pixels.size:
            continue
        u0, u1, v0, v1 = node.rectangle
        long_side = max(u1 - u0, v1 - v0)
        if node.region.districts and long_side < max(DISTRICT * extent, 2 * node.region.block):
            node = replace(node, region=next(districts))  # in turn, so that neighbours differ
        region = node.region
        if long_side < (region.block if node.use is None else LAND_USES.lot[node.use]) * rng.uniform(0.9, 1.5):
            if node.use is None:
                weights = np.array(list(region.uses.values()))
                name = str(rng.choice(list(region.uses), p=weights / weights.sum()))
                stack.append(replace(node, use=LAND_USE_NAMES.index(name), block=node.rectangle))
            else:
                lot[node.pixels] = len(leaves)
                leaves.append(node)
            continue
        axis = int(v1 - v0 > u1 - u0)
        spread = 0.17 if node.use is None else 0.06
        cut = node.rectangle[2 * axis] + long_side * rng.uniform(0.5 - spread, 0.5 + spread)
        width = 0.0
        if node.use is None and rng.random() < region.street_prob:
            is_wide = long_side > 2.2 * region.block
            width = (region.main_width if is_wide else region.minor_width) * rng.uniform(0.8, 1.25)
            edge = np.abs(axes[axis][node.pixels] - cut) - width / 2
            street[node.pixels] = np.minimum(street[node.pixels], edge)
            is_main[node.pixels] |= is_wide & (edge <= 0)
        stack += node.split(axes[axis], axis, cut, width)
    return Parcels(
        u,
        v,
        lot.reshape(u.shape),
        np.array([leaf.rectangle for leaf in leaves]),
        np.array([leaf.block for leaf in leaves]),
        LAND_USES[np.array([leaf.use for leaf in leaves])],
        street.reshape(u.shape),
        is_main.reshape(u.shape),
    )


def _bounds(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, block: float) -> tuple[float, ...]:
    """Return a rectangle around the scene, randomly larger, so that the first street may cross it anywhere."""
    grow = rng.uniform(0.05, 1.2, 4) * block
    bounds = (u.min() - grow[0], u.max() + grow[1], v.min() - grow[2], v.max() + grow[3])
    return tuple(map(float, bounds))  # NumPy scalars would promote the coordinates to float64
