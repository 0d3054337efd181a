"""The SAR image of a scene: reflectivity, side-looking geometry, speckle, and the edge of the swath.

A radar measures distance, so heights are displaced towards the sensor (layover), walls that face it are bright, above
all at their foot (double bounce), and what they hide is dark (shadow). Speckle multiplies the amplitude. Levels are
those of 8-bit amplitude images.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.synthetic.fields import RayFrame, fractal_noise, smooth_noise
from hf_seg.synthetic.ground import Ground
from hf_seg.synthetic.parcels import BUILDING, DEVELOPED, FIELD, ROAD, TREE, WATER


@dataclass(frozen=True)
class Backscatter:
    """How a class reflects; fitted to the statistics of real scenes (scripts/calibrate_synthetic_dataset.py)."""

    amplitude: float  # typical 8-bit level
    parcel: float  # standard deviation of the log level between lots
    texture: float  # the same of the smooth variation inside a lot
    speckle: float  # exponent of the speckle; above 1 the class is rougher than the scene


BACKSCATTER = (
    Backscatter(40.0, 0.00, 0.00, 1.00),  # background does not occur
    Backscatter(37.9, 0.31, 0.10, 1.15),  # bareland
    Backscatter(42.6, 0.10, 0.05, 0.89),  # rangeland
    Backscatter(43.2, 0.30, 0.15, 1.01),  # developed space
    Backscatter(35.6, 0.18, 0.08, 1.27),  # road
    Backscatter(50.0, 0.11, 0.16, 0.40),  # tree
    Backscatter(23.4, 0.15, 0.18, 1.20),  # water
    Backscatter(44.0, 0.35, 0.04, 0.90),  # agriculture land
    Backscatter(51.0, 0.19, 0.20, 0.54),  # building: its roof
)
SHADOW_POWER = 0.16  # fraction of the power that remains in radar shadow, as noise and side lobes
LEAF_SHADOW_POWER = 0.7  # the same in the shadow of trees
CANOPY = 0.25  # fraction of a tree's height from which its echo seems to come
REGISTRATION = 0.6  # fraction of a building's height that is not displaced: tiles are registered by their buildings
WALL = 36.5  # 8-bit level of a facing wall, without its windows
DOUBLE_BOUNCE = 122.0  # at the foot of a facing wall
GLINT_RATE = {BUILDING: 0.03, DEVELOPED: 0.009, ROAD: 0.001, WATER: 0.045}  # bright points per square metre
DEGREES_OF_FREEDOM = (3, 9)  # of the speckle's intensity: twice the number of looks
WEDGE_PROB = 0.14  # probability that the edge of the swath crosses a scene


def render_sar(rng: np.random.Generator, ground: Ground, gain: float) -> np.ndarray:
    """Render the SAR image of a scene.

    Args:
        gain: factor of the amplitude; scenes differ in calibration and incidence angle.

    Returns:
        (H, W) uint8 amplitude without the margin; 0 is nodata beyond the edge of the swath.
    """
    power = _reflectivity(rng, ground) ** 2
    frame = RayFrame(ground.label.shape, rng.uniform(0, 2 * np.pi))
    power = _project(rng, ground, frame, power, layover=1 / np.tan(np.deg2rad(rng.uniform(40, 56))))
    exponent = np.array([b.speckle for b in BACKSCATTER], np.float32)[ground.label]
    exponent = cv2.GaussianBlur(exponent, (0, 0), 1.0)
    amplitude = np.float32(gain) * np.sqrt(np.maximum(power, 0)) * _speckle(rng, power.shape) ** exponent
    image = ground.crop(np.clip(np.rint(amplitude), 1, 255).astype(np.uint8))
    if rng.random() < WEDGE_PROB:
        image[_wedge(rng, image.shape)] = 0
    return image


def _reflectivity(rng: np.random.Generator, ground: Ground) -> np.ndarray:
    """Return the amplitude of the scene as if it were flat: (H, W) float32."""
    shape, label = ground.label.shape, ground.label
    level, parcel, texture = (
        np.array([getattr(b, name) for b in BACKSCATTER], np.float32)[label]
        for name in ("amplitude", "parcel", "texture")
    )
    # unit variance; bounded and stratified, so that no single field dominates the statistics of a small dataset
    n_parcels = int(ground.parcel.max()) + 1
    strata = rng.permuted(np.tile(np.arange(n_parcels)[:, None], OPEN_EARTH_MAP.num_labels), axis=0)
    offsets = (3**0.5 * (2 * (strata + rng.random(strata.shape)) / n_parcels - 1)).astype(np.float32)
    field = fractal_noise(rng, shape, 6 / ground.gsd, 2)
    lot = np.where(np.isin(label, (ROAD, TREE, WATER)), 0, ground.parcel)  # these cross the borders of lots
    amplitude = level * np.exp(parcel * offsets[lot, label] + texture * field)
    crowns = rng.lognormal(0, 0.05, int(ground.crown.max()) + 1).astype(np.float32)
    amplitude *= np.where(label == TREE, crowns[ground.crown], 1)
    rows = ground.draw_stripes(rng, 2, 6)
    depth = rng.random(n_parcels)[ground.parcel]
    furrows = np.where(label == FIELD, 0.4 * rows, 0)
    ridges = np.where(label == BUILDING, 0.6 * (0.5 + 0.5 * rows) ** 4, furrows)  # sheds and ducts on roofs
    return (amplitude * (1 + depth * ridges)).astype(np.float32)


def _project(
    rng: np.random.Generator, ground: Ground, frame: RayFrame, power: np.ndarray, *, layover: float
) -> np.ndarray:
    """Move the (H, W) power to where the radar sees it.

    Args:
        layover: displacement towards the sensor per height = descent of the ray per pixel of travel.
    """
    label = frame.rotate(ground.label)
    height = frame.rotate(ground.height) / np.float32(ground.gsd)
    power = frame.rotate(power)
    building = label == BUILDING
    # the side of a roof that faces the sensor gets more power per pixel
    facing = np.gradient(cv2.GaussianBlur(height, (0, 0), 0.8), axis=1)
    power *= np.exp(np.where(building, np.clip(0.5 * facing, -0.7, 0.9), 0))
    floor = SHADOW_POWER * power
    power *= np.where(frame.shadow_depth(np.where(building, height, 0), layover) > 0.5, SHADOW_POWER, 1)
    leaf_shadow = (frame.shadow_depth(height, layover) > 0.5) & (label != TREE)
    power *= np.where(leaf_shadow, LEAF_SHADOW_POWER, 1)
    shift = layover * height * np.where(label == TREE, CANOPY, 1 - REGISTRATION)

    rows, columns = np.indices(power.shape)
    sources = [(rows.ravel(), (columns - shift).ravel(), power.ravel())]
    sources.append(_walls(rng, frame, ground, np.where(building, height, 0), layover))
    sources.append(_glints(rng, label, shift, ground.gsd))
    row, column, energy = (np.concatenate(parts) for parts in zip(*sources, strict=True))
    return frame.rotate_back(np.maximum(_splat(row, column, energy, power.shape), floor))


def _walls(
    rng: np.random.Generator, frame: RayFrame, ground: Ground, height: np.ndarray, layover: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows, columns, power) of the echoes of walls that face the sensor, windows and foot."""
    rise = np.diff(height, axis=1, prepend=height[:, :1])
    row, column = np.nonzero(rise * ground.gsd > 2.0)
    top = height[row, column]
    bottom = top - rise[row, column]
    # walls perpendicular to the rays are bright: cosine between wall normal and ray, sharpened
    smooth = cv2.GaussianBlur(height, (0, 0), 1.5)
    along, across = np.gradient(smooth, axis=1)[row, column], np.gradient(smooth, axis=0)[row, column]
    facing = (np.abs(along) / (np.hypot(along, across) + 1e-3)) ** 3
    n_steps = max(int(np.ceil(layover * float((top - bottom).max(initial=1.0)))), 1)
    z = np.arange(n_steps, dtype=np.float32)[:, None] / layover  # pixels above the foot, one per image pixel
    on_wall = z < (top - bottom)
    wall_axis = (frame.rotate(ground.u) + frame.rotate(ground.v))[row, column]  # increases along any wall
    floors = 0.5 + 0.5 * np.sin(z * (ground.gsd * 2 * np.pi / 3.1))
    windows = 0.5 + 0.5 * np.sin(wall_axis * (2 * np.pi / rng.uniform(2.5, 4)))
    brightness = rng.lognormal(0, 0.6, int(ground.parcel.max()) + 1)[frame.rotate(ground.parcel)[row, column]]
    pattern = 0.25 + 9 * (floors * windows) ** 3
    energy = (WALL**2 * brightness * (0.15 + facing)) * pattern * rng.lognormal(0, 0.5, pattern.shape)
    foot_column = column - layover * (bottom - REGISTRATION * top)
    columns = foot_column - layover * z
    rows = np.broadcast_to(row, columns.shape)
    foot = DOUBLE_BOUNCE**2 * (0.04 + facing) * brightness * rng.lognormal(-0.2, 0.6, row.shape)
    return (
        np.concatenate([rows[on_wall], row]),
        np.concatenate([columns[on_wall], foot_column]),
        np.concatenate([energy[on_wall], foot]),
    )


def _glints(
    rng: np.random.Generator, label: np.ndarray, shift: np.ndarray, gsd: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows, columns, power) of bright points, e.g. cars, poles and fences."""
    rate = np.zeros(OPEN_EARTH_MAP.num_labels, np.float32)
    rate[list(GLINT_RATE)] = list(GLINT_RATE.values())
    row, column = np.nonzero(rng.random(label.shape, dtype=np.float32) < rate[label] * gsd**2)
    return row, column - shift[row, column], (60 * rng.lognormal(0, 0.6, row.shape)) ** 2


def _splat(row: np.ndarray, column: np.ndarray, power: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add up power at fractional columns, divided between the two nearest pixels: float32 of `shape`."""
    column = np.clip(column, 0, shape[1] - 1.001)
    left = column.astype(np.int64)
    right = (column - left) * power
    start = row * shape[1] + left
    total = np.bincount(start, power - right, shape[0] * shape[1])
    total += np.bincount(start + 1, right, shape[0] * shape[1])
    return total.reshape(shape).astype(np.float32)


def _speckle(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return multiplicative amplitude speckle of unit mean power, correlated between neighbours."""
    smoothness = rng.random()  # a scene averaged over more looks is also smoother
    n_fields = round(DEGREES_OF_FREEDOM[0] + smoothness * np.ptp(DEGREES_OF_FREEDOM))
    width = 1.0 + 0.8 * smoothness
    intensity = np.zeros(shape, np.float32)
    for _ in range(n_fields):
        intensity += smooth_noise(rng, shape, width) ** 2
    return np.sqrt(intensity / n_fields)


def _wedge(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return (H, W) bool: True beyond the straight edge of the swath, at a corner or a side."""
    rows, columns = np.indices(shape, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    across = np.cos(angle) * columns + np.sin(angle) * rows
    return across > np.quantile(across, 1 - rng.uniform(0.02, 0.22))
