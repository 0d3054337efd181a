"""Networks with known maps, and scenes for them."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from conftest import make_scene
from rasterio.transform import Affine
from torch import Tensor, nn

from hf_seg.hub.export import export_model
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.mapping.raster import predict_raster
from hf_seg.mapping.statistics import MapSummary
from hf_seg.models import build_model
from hf_seg.normalization import to_pixel_values

ROTATED = Affine.translation(400_000, 4_000_000) * Affine.rotation(-33) * Affine.scale(0.5, -0.5)


class Constant(nn.Module):
    """The same logits everywhere, with the largest for class 0, which must never be predicted."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), OPEN_EARTH_MAP.num_labels, *images.shape[2:])
        logits[:, 0], logits[:, 6] = 9, 3
        return logits


def pointwise(seed: int = 1) -> nn.Module:
    """Return a 1x1 convolution, whose output does not depend on the window."""
    generator = torch.Generator().manual_seed(seed)
    network = nn.Conv2d(3, OPEN_EARTH_MAP.num_labels, 1).requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(generator=generator)
    return network


def contextual() -> nn.Module:
    """Return a toy network with a large receptive field."""
    torch.manual_seed(0)
    return build_model("toy-segformer", crop_size=64, from_scratch=True)


def speckled(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw blocks of different brightness under speckle, without zeros; (height, width) uint8."""
    image, _ = make_scene(np.random.default_rng(seed), max(height, width))
    return image[:height, :width]


def predict(network: Any, source: Path, destination: Path, **settings: Any) -> MapSummary:
    """Map a scene with small windows and without a progress bar."""
    settings = {"window": 32, "show_progress": False} | settings
    return predict_raster(network, source, destination, **settings)


def read(path: Path) -> np.ndarray:
    """Return the bands of a raster, or the only one."""
    with rasterio.open(path) as file:
        bands: np.ndarray = file.read()
    return bands[0] if len(bands) == 1 else bands


def probs_of(network: nn.Module, image: np.ndarray) -> np.ndarray:
    """Return the class probabilities of one pass over a whole image."""
    with torch.no_grad():
        return network(to_pixel_values(image)[None])[0].softmax(0).numpy()


def export_toy_network(folder: Path) -> Path:
    """Write the folder of a toy network with random weights, always the same, and return it."""
    torch.manual_seed(0)
    network = build_model("toy-segformer", crop_size=64, from_scratch=True)
    export_model(network, folder, crop_size=64, recipe="", results=None)
    return folder
