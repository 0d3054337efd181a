"""Strong augmentation of mixed images, on their device: colour jitter and Gaussian blur, drawn for each sample."""

import functools
import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from hf_seg.normalization import IMAGENET, Normalization

JITTER = 0.2  # brightness, contrast and saturation times 1 +- this; hue +- this share of the circle
BLUR_SIGMA = (0.15, 1.15)  # pixels
_BLUR_SIDE = 2 * math.ceil(4 * BLUR_SIGMA[1]) + 1


def strong_augment(
    pixel_values: Tensor,
    generators: list[torch.Generator],
    *,
    jitter_prob: float = 0.5,
    blur_prob: float = 0.5,
    normalization: Normalization = IMAGENET,
) -> Tensor:
    """Jitter the colours of each image and blur it, each with its own probability.

    Args:
        pixel_values: (B, 3, H, W) normalised RGB, or other bands, which have neither saturation nor hue.
        generators: B generators of the CPU, the only source of randomness, so that the augmentation of an image does
            not depend on the others in the batch.
        jitter_prob, blur_prob: of each image.
        normalization: of `pixel_values`.

    Returns:
        As `pixel_values`, a new tensor. Nodata, black in all bands, stays black.
    """
    mean, std = _constants(normalization, pixel_values.dtype, pixel_values.device)
    augmented = []
    for normalised, generator in zip(pixel_values, generators, strict=True):
        draws = torch.rand(7, generator=generator).tolist()  # always seven, whether they are used or not
        image = (normalised * std + mean).clamp(0, 1)
        nodata = (image < 0.5 / 255).all(dim=0)
        if draws[0] < jitter_prob:
            brightness, contrast, saturation = (1 + JITTER * (2 * draw - 1) for draw in draws[1:4])
            if len(image) == 3:
                image = F.adjust_brightness(image, brightness)
                image = F.adjust_contrast(image, contrast)
                image = F.adjust_saturation(image, saturation)
                image = F.adjust_hue(image, JITTER * (2 * draws[4] - 1))
            else:  # torchvision knows grey and RGB only
                image = (image * brightness).clamp(0, 1)
                image = (contrast * image + (1 - contrast) * image.mean(dim=(1, 2), keepdim=True)).clamp(0, 1)
        if draws[5] < blur_prob:
            sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * draws[6]
            image = F.gaussian_blur(image, [_BLUR_SIDE, _BLUR_SIDE], [sigma, sigma])
        augmented.append((image.masked_fill(nodata, 0) - mean) / std)
    return torch.stack(augmented)


@functools.lru_cache(maxsize=8)  # a copy to a device makes the host wait, so there is one for all steps
def _constants(normalization: Normalization, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (bands, 1, 1) each."""
    mean, std = (torch.tensor(each, dtype=dtype, device=device) for each in (normalization.mean, normalization.std))
    return mean[:, None, None], std[:, None, None]
