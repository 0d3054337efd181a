"""Streets, blocks and lots: a hierarchy of oriented rectangles in gently bent coordinates.

A district is split by streets (the wider the earlier) into blocks of one land use each, and a block into lots. The
splits run along two coordinates u and v that are rotated and bent, so streets curve while all that is built in (u, v)
stays aligned with them.
"""

from dataclasses import dataclass

import numpy as np

from hf_seg.labels import LABEL2ID

BARE, RANGE, DEVELOPED, ROAD, TREE, WATER, FIELD, BUILDING = (
    LABEL2ID[name]
    for name in ("bareland", "rangeland", "developed space", "road", "tree", "water", "agriculture land", "building")
)


@dataclass(frozen=True)
class LandUse:
    """What fills a block. Lengths in metres, the rest are probabilities or shares."""

    lot: float  # side at which lots are no longer split
    cover: tuple[tuple[int, float], ...]  # open ground of a lot: (class, probability)
    built: float = 0.0  # probability that a lot has a building
    margin: tuple[float, float] = (0.1, 0.25)  # share of a lot's sides left open on each side of its building
    ring: float = 0.0  # depth of a closed row of buildings around the block; 0 = detached
    storeys: tuple[int, int] = (1, 2)
    pitched: float = 0.0  # probability of a pitched roof
    trees: float = 0.0  # crowns per square metre of open ground
    crown: float = 2.5  # typical radius
    clumped: float = 0.0  # 0 = crowns spread evenly, 1 = groups only
    hedge: float = 0.0  # probability of a hedge around a lot
    pools: float = 0.0  # probability of a swimming pool on a lot
    cars: float = 0.0  # per square metre of developed ground
    paths: float = 0.0  # width of winding paths; 0 = none
    scrapes: float = 0.0  # share of open ground scraped bare


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
        scrapes=0.03,
    ),
    "forest": LandUse(cover=((RANGE, 1.0),), lot=200, trees=0.075, crown=3.8, clumped=0.6, scrapes=0.01),
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
class Parcels:
    """The plan of a scene; N lots, rectangles as (u0, u1, v0, v1) in metres."""

    u: np.ndarray  # (H, W) metres
    v: np.ndarray
    lot: np.ndarray  # (H, W) int32 lot, -1 on streets
    rectangles: np.ndarray  # (N, 4)
    blocks: np.ndarray  # (N, 4): the block of each lot
    uses: list[LandUse]  # N
    street: np.ndarray  # (H, W) metres to the nearest street's edge, negative on it
    is_main: np.ndarray  # (H, W) bool, on a main street


@dataclass(frozen=True)
class StreetPlan:
    """How a district is divided; lengths in metres."""

    uses: dict[str, float]  # names in `LAND_USES` and their weights among blocks
    block: float  # side at which blocks are no longer split
    street_share: float  # probability that a border between blocks is a street
    main_width: float
    minor_width: float


@dataclass
class _Node:
    """A rectangle that may be split; `use` and `block` are known from the block on."""

    pixels: np.ndarray  # flat indices
    rectangle: tuple[float, float, float, float]
    use: LandUse | None = None
    block: tuple[float, float, float, float] | None = None

    def split(self, coordinate: np.ndarray, axis: int, cut: float, width: float) -> "list[_Node]":
        """Return the two sides of a street of `width` along `coordinate` = `cut`."""
        sides = []
        offset = coordinate[self.pixels] - cut
        for edge, inside in ((1, offset < -width / 2), (0, offset > width / 2)):  # its high or its low edge moves
            rectangle = list(self.rectangle)
            rectangle[2 * axis + edge] = cut - width / 2 if edge else cut + width / 2
            u0, u1, v0, v1 = rectangle
            sides.append(_Node(self.pixels[inside], (u0, u1, v0, v1), self.use, self.block))
        return sides


def lay_out(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, plan: StreetPlan) -> Parcels:
    """Split a district into streets, blocks and lots.

    Args:
        u, v: (H, W) coordinates of each pixel in metres.
    """
    lot = np.full(u.size, -1, np.int32)
    street = np.full(u.size, 1e3, np.float32)
    is_main = np.zeros(u.size, bool)
    leaves: list[_Node] = []
    axes = (u.ravel(), v.ravel())
    stack = [_Node(np.arange(u.size), _bounds(rng, u, v, plan.block))]
    while stack:
        node = stack.pop()
        if not node.pixels.size:
            continue
        u0, u1, v0, v1 = node.rectangle
        long_side = max(u1 - u0, v1 - v0)
        if long_side < (plan.block if node.use is None else node.use.lot) * rng.uniform(0.9, 1.5):
            if node.use is None:
                node.use, node.block = _draw_use(rng, plan.uses), node.rectangle
                stack.append(node)
            else:
                lot[node.pixels] = len(leaves)
                leaves.append(node)
            continue
        axis = int(v1 - v0 > u1 - u0)
        spread = 0.17 if node.use is None else 0.06
        cut = node.rectangle[2 * axis] + long_side * rng.uniform(0.5 - spread, 0.5 + spread)
        width = 0.0
        if node.use is None and rng.random() < plan.street_share:
            is_wide = long_side > 2.2 * plan.block
            width = (plan.main_width if is_wide else plan.minor_width) * rng.uniform(0.8, 1.25)
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


def _bounds(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, block: float) -> tuple[float, float, float, float]:
    """Return a rectangle around the scene, larger at random: else the first street would always cross its middle."""
    grow = rng.uniform(0.05, 1.2, 4) * block
    return (
        float(u.min() - grow[0]),
        float(u.max() + grow[1]),
        float(v.min() - grow[2]),
        float(v.max() + grow[3]),
    )


def _draw_use(rng: np.random.Generator, uses: dict[str, float]) -> LandUse:
    weights = np.array(list(uses.values()))
    return LAND_USES[list(uses)[rng.choice(len(weights), p=weights / weights.sum())]]
