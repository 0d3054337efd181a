"""From uint8 images to a network's input, and back."""

import numpy as np
import torch
from torch import Tensor

# RGB statistics of ImageNet, on which every encoder was pretrained; replicated SAR takes them channel by channel.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def to_pixel_values(image: np.ndarray) -> Tensor:
    """Return the network's input, as the saved image processor computes it too.

    Args:
        image: (H, W) or (H, W, 3) uint8; one band is replicated to three.

    Returns:
        (3, H, W) float32, ImageNet-normalised.
    """
    bands = torch.from_numpy(np.ascontiguousarray(image))
    bands = bands.expand(3, *bands.shape) if image.ndim == 2 else bands.permute(2, 0, 1)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    return bands.to(torch.float32).sub_(mean).div_(std).contiguous()  # to the bit what the processor computes


def to_image(pixel_values: Tensor) -> np.ndarray:
    """Return (H, W, 3) uint8 from (3, H, W) of `to_pixel_values`, on any device."""
    mean, std = (255 * pixel_values.new_tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    levels = (pixel_values * std + mean).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
