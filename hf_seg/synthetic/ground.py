"""The ground truth of a scene: land cover, heights, and all else that the optical and the SAR image depend on."""

from dataclasses import dataclass

import cv2
import numpy as np

from hf_seg.synthetic.fields import fractal_noise, smooth_noise, to_uniform
from hf_seg.synthetic.parcels import (
    BARE,
    BUILDING,
    COVERS,
    DEVELOPED,
    FIELD,
    RANGE,
    ROAD,
    TREE,
    WATER,
    Parcels,
    Region,
    lay_out,
)

MARGIN = 32  # pixels around a scene, cropped after rendering, so that shadow and layover reach in from outside


@dataclass(frozen=True)
class Ground:
    """A scene before any sensor; every array is (H, W), with `MARGIN` pixels on each side."""

    gsd: float  # metres per pixel
    label: np.ndarray  # uint8 class ids
    height: np.ndarray  # float32 metres above ground
    parcel: np.ndarray  # int32, 0 on streets, else 1 + lot
    crown: np.ndarray  # int32 id of the tree crown, 0 = none
    car: np.ndarray  # int32 id of the car, 0 = none
    u: np.ndarray  # float32 metres along the streets
    v: np.ndarray  # float32 metres across the streets

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Remove the margin of an (H, W) or (H, W, 3) image."""
        return np.ascontiguousarray(image[MARGIN:-MARGIN, MARGIN:-MARGIN])

    def draw_stripes(self, rng: np.random.Generator, shortest: float, longest: float) -> np.ndarray:
        """Return (H, W): a sine wave per lot, e.g. its furrows, with its own direction and period in metres."""
        n_parcels = int(self.parcel.max()) + 1
        period = rng.uniform(shortest, longest, n_parcels)[self.parcel] / (2 * np.pi)
        axis = np.where(rng.random(n_parcels)[self.parcel] < 0.5, self.u, self.v)
        return np.sin(axis / period)


def make_ground(rng: np.random.Generator, size: int, region: Region, gsd: float) -> Ground:
    """Draw a scene.

    Args:
        rng: the only source of randomness.
        size: side of the scene in pixels, without the margin.
        region: where it lies.
        gsd: metres per pixel.
    """
    side = size + 2 * MARGIN
    shape = (side, side)
    y, x = np.meshgrid(*[np.arange(side, dtype=np.float32) * np.float32(gsd)] * 2, indexing="ij")
    angle = rng.uniform(0, np.pi / 2)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    bends = [np.float32(region.bend) * smooth_noise(rng, shape, 130 / gsd) for _ in range(2)]
    u, v = cos * x + sin * y + bends[0], cos * y - sin * x + bends[1]
    plan = lay_out(rng, u, v, region)
    shore = _draw_water(rng, region, x, y, gsd)
    label = _cover_lots(rng, plan, gsd)
    _draw_paths(rng, plan, label, gsd)
    label[plan.lot < 0] = ROAD
    _shape_shore(rng, region, label, shore, plan, gsd)
    height = _build(rng, plan, label)
    crown, crown_height = _plant(rng, plan, label, gsd)
    label[crown > 0] = TREE
    height = np.where(crown > 0, crown_height, height)
    car = _park_cars(rng, plan, label, angle, gsd)
    height = np.maximum(height, 1.5 * (car > 0)).astype(np.float32)
    return Ground(gsd, label, height, plan.lot + 1, crown, car, u, v)


def _draw_water(rng: np.random.Generator, region: Region, x: np.ndarray, y: np.ndarray, gsd: float) -> np.ndarray:
    """Return metres to the shore, negative in water; 1000 m everywhere if the scene has no water."""
    if not region.water or rng.random() > region.water_prob:
        return np.full(x.shape, 1e3, np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    extent = float(x.max())
    px, py = (x - extent * rng.uniform(0.25, 0.75)), (y - extent * rng.uniform(0.25, 0.75))
    across = np.float32(np.cos(angle)) * px + np.float32(np.sin(angle)) * py
    wobble = fractal_noise(rng, x.shape, 110 / gsd, 3)
    if region.water == "river":
        width = rng.uniform(*region.river_width)
        shore = np.abs(across + 9 * wobble) - width / 2
    elif region.water == "coast":
        shore = across + rng.choice([0.4, 6.0]) * wobble + rng.uniform(0.0, 0.3) * extent
    else:
        radius = rng.uniform(18, 55)
        shore = np.hypot(px, rng.uniform(1, 1.8) * py) - radius + 0.3 * radius * wobble
    return shore.astype(np.float32)


def _cover_lots(rng: np.random.Generator, plan: Parcels, gsd: float) -> np.ndarray:
    """Return the class of the open ground, with bare patches and the strips along streets and field borders."""
    _, block = np.unique(plan.blocks, axis=0, return_inverse=True)
    shared = rng.random(block.max() + 1)[block]  # lots of a block mostly look alike
    own = np.where(rng.random(len(block)) < 0.15, rng.random(len(block)), shared)
    probs = np.stack([plan.uses[name] for name in COVERS], axis=1)
    covers = np.array(list(COVERS.values()))[(own[:, None] <= probs.cumsum(1)).argmax(1)]
    label = np.append(covers, ROAD).astype(np.uint8)[plan.lot]  # lot -1, the streets, takes the last one
    edge = _distance_to_edge(plan, plan.rectangles)
    town = _per_lot(plan, plan.uses.built > 0.5)
    # pavements in towns; front yards are mixed; rough grass around fields
    label[town & (plan.street < rng.uniform(1.8, 4.5))] = DEVELOPED
    patchy = fractal_noise(rng, label.shape, 9 / gsd, 2)
    label[town & (label == RANGE) & (patchy > 1.7)] = DEVELOPED
    label[town & (label == DEVELOPED) & (plan.street > 3) & (patchy < -1.8)] = RANGE
    field = label == FIELD
    label[field & ((edge < _per_lot(plan, rng.uniform(0.1, 1.3, len(plan.uses)))) | (plan.street < 1.2))] = RANGE
    bare = _per_lot(plan, plan.uses.bare)
    label[(label == RANGE) & (to_uniform(fractal_noise(rng, label.shape, 22 / gsd, 3)) < bare)] = BARE
    return label


def _draw_paths(rng: np.random.Generator, plan: Parcels, label: np.ndarray, gsd: float) -> None:
    """Draw winding paths, and round or rectangular sports grounds, in parks and meadows."""
    width = _per_lot(plan, plan.uses.paths)
    bed = smooth_noise(rng, label.shape, 60 / gsd)
    slope = np.hypot(*np.gradient(bed)).astype(np.float32) / gsd
    path = np.abs(bed - rng.uniform(-0.5, 0.5)) < slope * width / 2  # a level line, of constant width
    label[path & (label == RANGE)] = DEVELOPED
    for i in [i for i, use in enumerate(plan.uses) if use.paths > 2 and rng.random() < 0.45]:
        u0, u1, v0, v1 = plan.rectangles[i]
        radius = rng.uniform(0.14, 0.26) * min(u1 - u0, v1 - v0)
        du = plan.u - np.float32(u0 + (u1 - u0) * rng.uniform(0.3, 0.7))
        dv = plan.v - np.float32(v0 + (v1 - v0) * rng.uniform(0.3, 0.7))
        inside = np.hypot(du, dv) < radius if rng.random() < 0.6 else (abs(du) < 1.5 * radius) & (abs(dv) < radius)
        label[inside & (plan.lot == i)] = DEVELOPED


def _shape_shore(
    rng: np.random.Generator, region: Region, label: np.ndarray, shore: np.ndarray, plan: Parcels, gsd: float
) -> None:
    """Draw the water with its bank (quay, beach or grass), the bridges of main streets, and swimming pools."""
    quay, beach = {"coast": (0.35, 0.45), "river": (0.3, 0.1), "lake": (0.0, 0.15)}.get(region.water, (0, 0))
    draw = rng.random()
    bank = DEVELOPED if draw < quay else BARE if draw < quay + beach else RANGE
    width = rng.uniform(3, 14) if bank != RANGE else rng.uniform(2, 9)
    wobble = 1.5 * smooth_noise(rng, label.shape, 14 / gsd) if bank != DEVELOPED else 0
    label[(shore + wobble < width) & (label != ROAD)] = bank
    flooded = shore < 0
    if region.water == "river":
        flooded &= ~plan.is_main  # bridges
    label[flooded] = WATER
    for i, use in enumerate(plan.uses):
        if rng.random() < use.pools:
            u0, u1, v0, v1 = plan.rectangles[i]
            radius = rng.uniform(1.8, 3.2)
            cu, cv = rng.uniform(u0 + radius, u1 - radius), rng.uniform(v0 + radius, v1 - radius)
            pool = np.hypot(plan.u - np.float32(cu), 1.5 * (plan.v - np.float32(cv))) < radius
            label[pool & (plan.lot == i)] = WATER


def _build(rng: np.random.Generator, plan: Parcels, label: np.ndarray) -> np.ndarray:
    """Draw the buildings of dry lots into `label`; return heights in metres, 0 elsewhere."""
    lots, uses = plan.rectangles, plan.uses
    n = len(lots)
    margins = uses.min_margin, uses.max_margin
    sizes = lots[:, 1::2] - lots[:, ::2]  # (N, 2)
    low = lots[:, ::2] + sizes * rng.uniform(*margins, (2, n)).T
    high = lots[:, 1::2] - sizes * rng.uniform(*margins, (2, n)).T
    extent = np.maximum(high - low, 0.1)  # a lot may be narrower than its margins
    pixel_extent = [np.maximum(_per_lot(plan, extent[:, k]), 0.1) for k in range(2)]  # 0 on streets
    a, b = ((axis - _per_lot(plan, low[:, k])) / pixel_extent[k] for k, axis in enumerate((plan.u, plan.v)))
    inside = (a > 0) & (a < 1) & (b > 0) & (b < 1) & (plan.lot >= 0)
    notch = rng.uniform(0.25, 0.6, (n, 2)) * (rng.random((n, 1)) < 0.5)  # L-shaped half of the time
    corner = rng.integers(0, 2, (n, 2)) == 1
    ka, kb = (np.where(_per_lot(plan, corner[:, k]), c, 1 - c) for k, c in enumerate((a, b)))
    ring = _per_lot(plan, uses.ring)
    inside &= (ring > 0) | (ka > _per_lot(plan, notch[:, 0])) | (kb > _per_lot(plan, notch[:, 1]))
    inside &= (ring == 0) | (_distance_to_edge(plan, plan.blocks) < ring)
    wet = np.zeros(n, bool)
    wet[np.unique(plan.lot[inside & (label == WATER)])] = True
    built = (rng.random(n) < uses.built) & ~wet & (extent.min(1) > 4)
    inside &= _per_lot(plan, built)
    inside &= (plan.street > 0.8) | (ring == 0)  # rows of buildings stay off the street

    storeys = rng.integers(uses.min_storeys.astype(int), uses.max_storeys.astype(int), endpoint=True)
    eaves = 3.1 * storeys + rng.uniform(0, 1.5, n)
    pitch = np.where(rng.random(n) < uses.pitched, rng.uniform(0.35, 0.8, n), 0)
    across = np.where(_per_lot(plan, extent[:, 0] < extent[:, 1]), a, b)  # the ridge runs along the longer side
    rise = _per_lot(plan, pitch * extent.min(1)) * (0.5 - np.abs(across - 0.5))
    label[inside] = BUILDING
    return np.where(inside, _per_lot(plan, eaves) + rise, 0).astype(np.float32)


def _plant(rng: np.random.Generator, plan: Parcels, label: np.ndarray, gsd: float) -> tuple[np.ndarray, np.ndarray]:
    """Plant trees and hedges on open ground; return the id of the crown (0 = none) and its height in metres."""
    density = _per_lot(plan, plan.uses.trees)
    clumps = _per_lot(plan, plan.uses.clumped)
    group = np.exp(2.2 * fractal_noise(rng, label.shape, 30 / gsd, 2) - 1.6)
    density = density * ((1 - clumps) + clumps * group)
    verge = (plan.lot < 0) & (plan.street > -1.5)
    density = np.where(verge, 0.012 if rng.random() < 0.5 else 0.0, density)
    density[~verge & ~np.isin(label, (RANGE, DEVELOPED, FIELD))] = 0
    spacing = 2.4
    count = int(label.shape[0] * gsd / spacing)
    grid = (np.stack(np.meshgrid(*[np.arange(count)] * 2), -1).reshape(-1, 2) + rng.random((count**2, 2))) * spacing
    points = np.minimum((grid / gsd).astype(int), label.shape[0] - 1)
    points = rng.permutation(points[rng.random(len(points)) < density[points[:, 1], points[:, 0]] * spacing**2])
    mean_radius = np.append(plan.uses.crown, 2.6)[plan.lot[points[:, 1], points[:, 0]]]
    radii = mean_radius * rng.lognormal(0, 0.3, len(points))
    crown = np.zeros(label.shape, np.int32)
    circles = np.column_stack([points * 8, radii / gsd * 8]).astype(int).tolist()  # in eighths of a pixel
    for i, (column, row, radius) in enumerate(circles, start=1):
        cv2.circle(crown, (column, row), radius, i, cv2.FILLED, shift=3)
    rough = [(0.8 / gsd) * smooth_noise(rng, label.shape, 4 / gsd) for _ in range(2)]
    rows, columns = np.indices(label.shape, dtype=np.float32)
    crown = cv2.remap(crown.astype(np.float32), columns + rough[0], rows + rough[1], cv2.INTER_NEAREST).astype(np.int32)
    centre, size = np.vstack([[0, 0], points]), np.append(1.0, radii)
    radial = np.hypot(columns - centre[crown, 0], rows - centre[crown, 1]) * gsd / size[crown]
    height = 1.6 * size[crown] + 2.5 + size[crown] * np.sqrt(np.clip(1 - radial**2, 0, 1))
    hedge = _per_lot(plan, rng.random(len(plan.uses)) < plan.uses.hedge)
    hedge &= (_distance_to_edge(plan, plan.rectangles) < 1.1 + 0.4 * rough[0]) & np.isin(label, (RANGE, DEVELOPED))
    hedge &= crown == 0
    crown[hedge] = len(points) + 1 + plan.lot[hedge]
    height[hedge] = 2.2
    crown[np.isin(label, (BUILDING, WATER))] = 0
    return crown, np.where(crown > 0, height, 0)


def _park_cars(rng: np.random.Generator, plan: Parcels, label: np.ndarray, angle: float, gsd: float) -> np.ndarray:
    """Return ids of cars, 4.4 m x 1.8 m, on developed space and streets, along or across the streets."""
    per_area = np.append(plan.uses.cars, 0.003)[plan.lot] * np.isin(label, (DEVELOPED, ROAD))
    flat = np.flatnonzero(rng.random(label.shape, dtype=np.float32) < per_area * gsd**2)
    turns = angle + np.pi / 2 * rng.integers(0, 2, len(flat))
    car = np.zeros(label.shape, np.int32)
    along = np.stack([np.cos(turns), np.sin(turns)], -1) * 2.2 / gsd
    side = np.stack([-np.sin(turns), np.cos(turns)], -1) * 0.9 / gsd
    centre = np.stack([flat % label.shape[1], flat // label.shape[1]], -1)
    corners = np.stack([centre + s * along + t * side for s, t in ((1, 1), (1, -1), (-1, -1), (-1, 1))], 1)
    for i, outline in enumerate((corners * 8).astype(np.int32), start=1):
        cv2.fillConvexPoly(car, outline, i, shift=3)
    car[~np.isin(label, (DEVELOPED, ROAD))] = 0
    return car


def _per_lot(plan: Parcels, values: list[float] | list[bool] | np.ndarray) -> np.ndarray:
    """Return (H, W): the value of each pixel's lot, 0 on streets."""
    values = np.asarray(values)
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    return np.append(values, np.zeros(1, values.dtype))[plan.lot]


def _distance_to_edge(plan: Parcels, rectangles: np.ndarray) -> np.ndarray:
    """Return metres from each pixel to the nearest side of its lot's rectangle."""
    u0, u1, v0, v1 = (_per_lot(plan, rectangles[:, k]) for k in range(4))
    return np.minimum(np.minimum(plan.u - u0, u1 - plan.u), np.minimum(plan.v - v0, v1 - plan.v))
