"""From uint8 images to a network's input, and back."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_seg.errors import UserError

# RGB statistics of ImageNet, on which every encoder was pretrained; replicated SAR takes them channel by channel.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class Normalization(NamedTuple):
    """Subtract a mean and divide by a deviation, channel by channel, as an image processor does.

    Args:
        mean, std: one value for each band of the input, in units of `scale`.
        scale: the pixel value that counts as 1.
    """

    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD
    scale: float = 255.0

    def apply(self, pixels: Tensor) -> Tensor:
        """Return (..., bands, H, W) float32 from pixels of any type; for three bands, one is replicated.

        Raises:
            UserError: another number of bands.
        """
        mean, std = self._constants(pixels.device)
        n_bands = len(self.mean)
        if pixels.shape[-3] != n_bands and (pixels.shape[-3], n_bands) != (1, 3):
            raise UserError(f"the image has {pixels.shape[-3]} bands, the network takes {n_bands}")
        bands = pixels.expand(*pixels.shape[:-3], n_bands, *pixels.shape[-2:])
        return bands.to(torch.float32, copy=True).sub_(mean).div_(std)  # to the bit what the processor computes

    def invert(self, pixel_values: Tensor) -> Tensor:
        """Return float32 pixels in units of 0..255 from what `apply` returned."""
        mean, std = self._constants(pixel_values.device)
        return pixel_values * std + mean

    def _constants(self, device: torch.device) -> list[Tensor]:
        return [
            self.scale * torch.tensor(values, device=device).view(len(values), 1, 1) for values in (self.mean, self.std)
        ]


IMAGENET = Normalization()


def to_pixel_values(image: np.ndarray, normalization: Normalization = IMAGENET) -> Tensor:
    """Return the network's input, as the saved image processor computes it too.

    Args:
        image: (H, W) or (H, W, bands) uint8; for three bands, one is replicated.
        normalization: of the network.

    Returns:
        (bands, H, W) float32.
    """
    bands = torch.from_numpy(np.ascontiguousarray(image))
    return normalization.apply(bands[None] if image.ndim == 2 else bands.permute(2, 0, 1)).contiguous()


def to_image(pixel_values: Tensor, normalization: Normalization = IMAGENET) -> np.ndarray:
    """Return (H, W, bands) uint8 from (bands, H, W) of `to_pixel_values`, on any device."""
    levels = normalization.invert(pixel_values).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()
