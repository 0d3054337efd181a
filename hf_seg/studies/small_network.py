"""A network of half a million weights that trains on one core in minutes, to measure how hard a dataset is."""

import torch
from torch import Tensor, nn

from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.models import SegmentationLogits


class SmallNetwork(nn.Module):
    """Three strided stages, dilated convolutions, two skip connections; random weights.

    Args:
        width: channels of the first stage.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        wide = 4 * width
        self.stage1 = nn.Sequential(_block(3, width, 2), _block(width, width))
        self.stage2 = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width))
        dilated = [_block(wide, wide, dilation=dilation) for dilation in (1, 2, 4)]
        self.stage3 = nn.Sequential(_block(2 * width, wide, 2), *dilated)
        self.fuse_quarter, self.fuse_half = _block(wide + 2 * width, 2 * width), _block(3 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, OPEN_EARTH_MAP.num_labels, 1)

    def forward(self, pixel_values: Tensor) -> SegmentationLogits:
        """Map (B, 3, H, W) to logits of the same height and width."""
        half = self.stage1(pixel_values)
        quarter = self.stage2(half)
        features = self.fuse_quarter(torch.cat([quarter, _resize(self.stage3(quarter), quarter)], 1))
        features = self.fuse_half(torch.cat([half, _resize(features, half)], 1))
        return SegmentationLogits(_resize(self.head(features), pixel_values), None)


def _block(width_in: int, width_out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(width_in, width_out, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU())


def _resize(features: Tensor, like: Tensor) -> Tensor:
    return nn.functional.interpolate(features, size=like.shape[-2:], mode="bilinear")
