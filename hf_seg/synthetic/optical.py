"""The optical image of a scene: colours of the materials, sun and shadow, atmosphere and camera."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike

from hf_seg.synthetic.fields import RayFrame, fractal_noise, smooth_noise
from hf_seg.synthetic.ground import Ground
from hf_seg.synthetic.parcels import BARE, BUILDING, DEVELOPED, FIELD, RANGE, ROAD, TREE, WATER

# 8-bit RGB in full sun; a lot takes one of the colours of its class.
ROOFS = ((95, 98, 104), (154, 152, 150), (183, 105, 80), (202, 136, 107), (220, 218, 212), (122, 107, 99), (76, 80, 91))
PAVINGS = ((160, 158, 152), (137, 137, 135), (184, 175, 158), (120, 122, 122), (203, 188, 156))
CROPS = ((79, 100, 54), (110, 113, 69), (130, 116, 85), (100, 82, 64), (90, 105, 74), (144, 131, 92))
GRASSES = ((86, 105, 62), (100, 109, 71), (117, 111, 79), (77, 98, 60), (133, 124, 92))
SOILS = ((184, 162, 130), (164, 138, 110), (200, 184, 156))
CARS = ((240, 240, 240), (40, 42, 46), (150, 152, 156), (160, 40, 36), (50, 70, 120), (96, 98, 102))


@dataclass(frozen=True)
class Camera:
    """How the images of a domain are taken. A pair is a range from which each scene draws a value."""

    zoom: tuple[float, float]  # optical resolution over pixel size; below 1 the image is blurred
    coarse_zoom: tuple[float, float]  # the same for scenes of a coarser sensor, resampled to this grid
    coarse_prob: float  # fraction of these scenes
    gain: tuple[float, float]
    contrast: tuple[float, float]
    haze: tuple[float, float]  # fraction of the light that the atmosphere scatters
    cast: tuple[float, float, float]  # RGB factors
    saturation: tuple[float, float]
    dryness: tuple[float, float]  # season: 0 = green, 1 = dry grass and bare trees
    sun: tuple[float, float]  # tangent of the sun's elevation
    noise: float


# OpenEarthMap: many cameras, sharp, green, high sun. OpenEarthMap-SAR: half of it coarse, greyer, later, a lower sun.
SOURCE_CAMERA = Camera(
    zoom=(0.8, 1.0),
    coarse_zoom=(0.8, 1.0),
    coarse_prob=0.0,
    gain=(0.86, 1.05),
    contrast=(0.85, 1.0),
    haze=(0.05, 0.14),
    cast=(1.02, 1.04, 1.04),
    saturation=(0.9, 1.2),
    dryness=(0.0, 0.35),
    sun=(0.9, 1.6),
    noise=3.0,
)
TARGET_CAMERA = Camera(
    zoom=(0.6, 1.0),
    coarse_zoom=(0.22, 0.4),
    coarse_prob=0.5,
    gain=(0.95, 1.15),
    contrast=(1.0, 1.2),
    haze=(0.0, 0.1),
    cast=(0.97, 1.03, 1.07),
    saturation=(0.45, 0.85),
    dryness=(0.25, 0.9),
    sun=(0.55, 1.1),
    noise=2.0,
)


def render_optical(rng: np.random.Generator, ground: Ground, camera: Camera) -> np.ndarray:
    """Render the optical image of a scene.

    Returns:
        (3, H, W) uint8 RGB without the margin.
    """
    dryness = rng.uniform(*camera.dryness)
    image = _paint(rng, ground, dryness)
    image *= _light(rng, ground, rng.uniform(*camera.sun))[..., None]
    image = _expose(rng, image, camera)
    return np.moveaxis(ground.crop(np.clip(np.rint(image), 0, 255).astype(np.uint8)), -1, 0).copy()


def _paint(rng: np.random.Generator, ground: Ground, dryness: float) -> np.ndarray:
    """Return (H, W, 3) float32 colours in full sun, with the textures of the materials."""
    shape, label, gsd = ground.label.shape, ground.label, ground.gsd
    n_parcels = int(ground.parcel.max()) + 1
    image = np.empty((*shape, 3), np.float32)
    fine, mid = smooth_noise(rng, shape, 1.2), fractal_noise(rng, shape, 12 / gsd, 4)
    wide = fractal_noise(rng, shape, 60 / gsd, 3)

    def fill(where: np.ndarray, palette: ArrayLike, spread: float, texture: np.ndarray) -> None:
        """Fill with one colour of `palette` per lot, jittered by `spread`, times 1 + texture."""
        colors = rng.choice(np.asarray(palette, np.float32), n_parcels)
        colors *= rng.lognormal(0, spread, (n_parcels, 1)) * rng.lognormal(0, spread / 5, (n_parcels, 3))
        image[where] = colors.astype(np.float32)[ground.parcel[where]] * (1 + texture[where])[:, None]

    grass = (1 - 0.5 * dryness) * rng.permutation(GRASSES)[:3] + 0.5 * dryness * np.array((150, 136, 100))
    tufts = np.maximum(smooth_noise(rng, shape, 1.1 / gsd), 0)
    fill(label == RANGE, grass, 0.1, 0.04 * fine + 0.12 * tufts + 0.13 * mid)
    fill(label == TREE, grass, 0.0, np.zeros_like(fine))  # below the crowns
    markings = np.where(rng.random(n_parcels) < 0.4, 0.2, 0.06)[ground.parcel]  # of parking bays; joints of slabs
    paving = 0.05 * fine + markings * (ground.draw_stripes(rng, 2.4, 2.8) > 0.8)
    fill(label == DEVELOPED, PAVINGS, 0.12, paving + 0.08 * mid)
    fill(label == BARE, SOILS, 0.08, 0.05 * fine + 0.12 * mid)
    depth = rng.uniform(0.05, 0.22, n_parcels)[ground.parcel]
    fill(label == FIELD, CROPS, 0.1, 0.03 * fine + 0.08 * mid + depth * ground.draw_stripes(rng, 1.1, 3.2))
    seams = rng.uniform(0.03, 0.16, n_parcels)[ground.parcel] * ground.draw_stripes(rng, 1.0, 2.4)
    skylights = 0.35 * (smooth_noise(rng, shape, 1.2 / gsd) > 1.8)  # and other small things on roofs
    fill(label == BUILDING, ROOFS, 0.14, 0.04 * fine + 0.05 * mid + seams + skylights)
    asphalt = np.float32(rng.uniform(118, 172)) * np.array((1, 1, 0.99), np.float32)
    image[label == ROAD] = asphalt * (1 + 0.03 * fine + 0.07 * mid)[label == ROAD, None]
    deep = np.array(rng.permutation([(44, 66, 62), (38, 62, 72), (64, 82, 74)])[0], np.float32)
    image[label == WATER] = deep * (1 + 0.08 * fine + 0.06 * wide)[label == WATER, None]

    tree = label == TREE
    crown = ground.crown[tree]
    n_crowns = int(ground.crown.max()) + 1
    hue = rng.random((n_crowns, 1)) ** (1.5 - dryness)  # more autumn colours in the dry season
    autumn = np.array((122, 104, 62)) * dryness + np.array((88, 104, 58)) * (1 - dryness)
    crowns = ((1 - hue) * np.array((62, 84, 48)) + hue * autumn) * rng.lognormal(0, 0.14, (n_crowns, 1))
    leaves = 1 + 0.12 * fine[tree] + 0.12 * smooth_noise(rng, shape, 3)[tree]
    image[tree] = crowns.astype(np.float32)[crown] * leaves[:, None]

    car = ground.car > 0
    colors = np.array(CARS, np.float32)[rng.integers(0, len(CARS), int(ground.car.max()) + 1)]
    image[car] = colors[ground.car[car]]
    return image * (1 + 0.04 * wide)[..., None]


def _light(rng: np.random.Generator, ground: Ground, sun_slope: float) -> np.ndarray:
    """Return (H, W) brightness: shading of slopes, and cast shadows with a soft edge."""
    azimuth = rng.uniform(0, 2 * np.pi)
    relief = cv2.GaussianBlur(ground.height, (0, 0), 0.7)
    slope_y, slope_x = np.gradient(relief / np.float32(ground.gsd))
    rough = (ground.label == TREE) | (ground.label == BUILDING)
    facing = -(np.cos(azimuth) * slope_x + np.sin(azimuth) * slope_y)
    shading = np.where(rough, 0.34 * np.tanh(facing / 1.5), 0)
    frame = RayFrame(ground.height.shape, azimuth)
    depth = frame.shadow_depth(frame.rotate(ground.height) / np.float32(ground.gsd), sun_slope)
    shadow = cv2.GaussianBlur(frame.rotate_back((depth > 0.5).astype(np.float32)), (0, 0), 0.6)
    return ((1 + shading) * (1 - rng.uniform(0.5, 0.68) * shadow)).astype(np.float32)


def _expose(rng: np.random.Generator, image: np.ndarray, camera: Camera) -> np.ndarray:
    """Apply atmosphere, lens and sensor to (H, W, 3) float32 colours."""
    grey = image.mean(-1, keepdims=True)
    image = grey + np.float32(rng.uniform(*camera.saturation)) * (image - grey)
    cast = np.array(camera.cast) * rng.lognormal(0, 0.03, 3)
    image = image * (cast * rng.uniform(*camera.gain)).astype(np.float32)
    image = 110 + np.float32(rng.uniform(*camera.contrast)) * (image - 110)
    image += np.float32(rng.uniform(*camera.haze)) * (np.array((168, 178, 190), np.float32) - image)
    zoom = rng.uniform(*(camera.coarse_zoom if rng.random() < camera.coarse_prob else camera.zoom))
    if zoom < 0.95:
        image = coarsen(image, zoom)
    return image + np.float32(camera.noise) * rng.standard_normal(image.shape, dtype=np.float32)


def coarsen(image: np.ndarray, zoom: float) -> np.ndarray:
    """Sample (H, W, 3) more coarsely by `zoom` < 1, each pixel the mean of an area, and resample to the old grid."""
    small = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
