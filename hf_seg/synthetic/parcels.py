"""Streets, blocks and lots: a hierarchy of rectangles in gently bent coordinates.

A scene is split by streets (first by wide ones) into blocks of one land use each, and a block into lots. The splits
run along two coordinates u and v that are rotated and bent, so streets curve and buildings stay aligned with them.
"""

from dataclasses import dataclass, replace

import numpy as np

from hf_seg.labels import LABEL2ID

BARE, RANGE, DEVELOPED, ROAD, TREE, WATER, FIELD, BUILDING = (
    LABEL2ID[name]
    for name in ("bareland", "rangeland", "developed space", "road", "tree", "water", "agriculture land", "building")
)


@dataclass(frozen=True)
class LandUse:
    """What fills a block. Lengths in metres; the rest are probabilities or fractions."""

    lot: float  # side below which lots are no longer split
    cover: tuple[tuple[int, float], ...]  # open ground of a lot: (class, probability)
    built: float = 0.0  # probability that a lot has a building
    margin: tuple[float, float] = (0.1, 0.25)  # fraction of a lot's side left open on each side of its building
    ring: float = 0.0  # depth of a closed row of buildings around the block; 0 = detached
    storeys: tuple[int, int] = (1, 2)
    pitched: float = 0.0  # probability of a pitched roof
    trees: float = 0.0  # crowns per square metre of open ground
    crown: float = 2.5  # typical radius of a crown
    clumped: float = 0.0  # 0 = trees spread evenly, 1 = in groups only
    hedge: float = 0.0  # probability of a hedge around a lot
    pools: float = 0.0  # probability of a swimming pool on a lot
    cars: float = 0.0  # per square metre of developed ground
    paths: float = 0.0  # width of winding paths; 0 = none
    bare: float = 0.0  # fraction of the open ground that is bare


LAND_USES: dict[str, LandUse] = {
    "rows": LandUse(
        cover=((DEVELOPED, 0.75), (RANGE, 0.25)),
        lot=15,
        built=0.93,
        margin=(0, 0),
        ring=13,
        storeys=(3, 6),
        pitched=0.35,
        trees=0.004,
        crown=3.2,
        clumped=0.4,
        cars=0.004,
    ),
    "houses": LandUse(
        cover=((DEVELOPED, 0.35), (RANGE, 0.65)),
        lot=22,
        built=0.93,
        margin=(0.11, 0.24),
        pitched=0.8,
        trees=0.0026,
        crown=3.0,
        clumped=0.4,
        hedge=0.15,
        pools=0.12,
        cars=0.004,
    ),
    "cottages": LandUse(
        cover=((DEVELOPED, 0.85), (RANGE, 0.15)),
        lot=14,
        built=0.92,
        margin=(0.05, 0.14),
        storeys=(2, 2),
        pitched=0.7,
        trees=0.0014,
        crown=2.4,
        clumped=0.4,
        hedge=0.08,
        cars=0.005,
    ),
    "slabs": LandUse(
        cover=((DEVELOPED, 0.6), (RANGE, 0.4)),
        lot=48,
        built=0.9,
        margin=(0.2, 0.33),
        storeys=(3, 7),
        pitched=0.1,
        trees=0.0026,
        crown=3.6,
        clumped=0.5,
        cars=0.006,
    ),
    "works": LandUse(
        cover=((DEVELOPED, 0.88), (RANGE, 0.08), (BARE, 0.04)),
        lot=62,
        built=0.88,
        margin=(0.08, 0.24),
        storeys=(2, 3),
        pitched=0.1,
        trees=0.0004,
        cars=0.007,
    ),
    "paved": LandUse(
        cover=((DEVELOPED, 0.96), (RANGE, 0.04)), lot=46, built=0.06, margin=(0.25, 0.4), trees=0.001, cars=0.014
    ),
    "park": LandUse(
        cover=((RANGE, 0.92), (DEVELOPED, 0.08)),
        lot=90,
        built=0.04,
        margin=(0.36, 0.44),
        trees=0.009,
        crown=4.2,
        clumped=0.85,
        paths=2.4,
    ),
    "meadow": LandUse(
        cover=((RANGE, 1.0),),
        lot=75,
        built=0.02,
        margin=(0.4, 0.45),
        trees=0.0016,
        crown=3.4,
        clumped=0.95,
        paths=1.6,
        bare=0.03,
    ),
    "forest": LandUse(cover=((RANGE, 1.0),), lot=200, trees=0.075, crown=3.8, clumped=0.6, bare=0.01),
    "fields": LandUse(
        cover=((FIELD, 0.95), (RANGE, 0.05)), lot=85, built=0.02, margin=(0.4, 0.45), pitched=1.0, hedge=0.2
    ),
    "plots": LandUse(
        cover=((FIELD, 0.92), (RANGE, 0.08)), lot=34, built=0.04, margin=(0.3, 0.4), pitched=1.0, hedge=0.08
    ),
    "site": LandUse(
        cover=((BARE, 0.85), (DEVELOPED, 0.15)), lot=70, built=0.1, margin=(0.2, 0.35), storeys=(1, 4), cars=0.003
    ),
}


@dataclass(frozen=True)
class Region:
    """A place of the dataset with its own look. Lengths in metres."""

    name: str
    utm_zone: int
    uses: dict[str, float]  # {name in `LAND_USES`: weight among blocks}
    block: float  # side below which blocks are no longer split
    street_prob: float  # probability that a border between blocks is a street
    main_width: float
    minor_width: float
    bend: float  # how far streets deviate from a straight line
    water: str = ""  # "", river, lake or coast
    water_prob: float = 1.0
    river_width: tuple[float, float] = (12.0, 45.0)


# The order is fixed: scenes cycle through the regions. Names contain `-` and `_`, as in the release.
REGIONS = (
    # suburb, farmland, riverside, industry, woodland
    Region("maple_grove", 14, {"houses": 5, "park": 0.9, "paved": 1, "forest": 0.5}, 78, 0.85, 7, 4.5, 10),
    Region("plaine", 27, {"fields": 6, "meadow": 0.9, "houses": 0.5, "forest": 0.5}, 120, 0.4, 6, 4, 14),
    Region(
        "riverton", 14, {"meadow": 2, "park": 2, "houses": 2, "slabs": 1.7}, 90, 0.6, 8, 4.5, 9, "river", 1.0, (34, 80)
    ),
    Region("portworks", 27, {"works": 4.2, "paved": 2.2, "meadow": 0.7, "site": 0.4, "slabs": 0.8}, 105, 0.75, 8, 5, 2),
    Region("north_wood", 14, {"forest": 3.6, "meadow": 2.6, "site": 0.25}, 115, 0.25, 6, 4, 22, "lake", 0.3),
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


@dataclass(frozen=True)
class Parcels:
    """The plan of a scene; N lots, rectangles as (u0, u1, v0, v1) in metres."""

    u: np.ndarray  # (H, W) metres
    v: np.ndarray
    lot: np.ndarray  # (H, W) int32 index of the lot, -1 on streets
    rectangles: np.ndarray  # (N, 4)
    blocks: np.ndarray  # (N, 4) rectangle of each lot's block
    uses: list[LandUse]  # N
    street: np.ndarray  # (H, W) metres to the nearest street's edge, negative on it
    is_main: np.ndarray  # (H, W) bool, True on main streets


@dataclass(frozen=True)
class _Node:
    """A rectangle that may be split; `use` and `block` are set in blocks and lots."""

    pixels: np.ndarray  # flat indices
    rectangle: tuple[float, ...]
    use: LandUse | None = None
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
    weights = np.array(list(region.uses.values()))
    axes = (u.ravel(), v.ravel())
    stack = [_Node(np.arange(u.size), _bounds(rng, u, v, region.block))]
    while stack:
        node = stack.pop()
        if not node.pixels.size:
            continue
        u0, u1, v0, v1 = node.rectangle
        long_side = max(u1 - u0, v1 - v0)
        if long_side < (region.block if node.use is None else node.use.lot) * rng.uniform(0.9, 1.5):
            if node.use is None:
                use = LAND_USES[str(rng.choice(list(region.uses), p=weights / weights.sum()))]
                stack.append(replace(node, use=use, block=node.rectangle))
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
        [leaf.use for leaf in leaves if leaf.use is not None],
        street.reshape(u.shape),
        is_main.reshape(u.shape),
    )


def _bounds(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, block: float) -> tuple[float, ...]:
    """Return a rectangle around the scene, randomly larger, so that the first street may cross it anywhere."""
    grow = rng.uniform(0.05, 1.2, 4) * block
    bounds = (u.min() - grow[0], u.max() + grow[1], v.min() - grow[2], v.max() + grow[3])
    return tuple(map(float, bounds))  # NumPy scalars would promote the coordinates to float64
