"""One graph of a network or an ensemble: raw pixels in, class probabilities out.

graph = ProbabilityGraph(load_networks("runs/ensemble"))
with traceable(graph):
    program = torch.export.export(graph, (pixels,), dynamic_shapes=...)
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_seg.errors import UserError
from hf_seg.inference.load import LoadedNetwork, common_label_set, normalized_weights, shared_bands
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.label_sets import hex_colors
from hf_seg.labels import BACKGROUND
from hf_seg.models import SegmentationNetwork

# Height and width may be any multiple of this, by the encoder; all others have a fixed size, as Swin's windows and the
# position embeddings of plain transformers do. Encoders of timm may pad by the input's size, which is constant for
# multiples of their largest stride only; those with attention are fixed too.
SIZE_MULTIPLES = {"segformer": 1, "convnext": 1, "convnextv2": 1, "dinov3_convnext": 1, "timm_backbone": 32}


class ProbabilityGraph(nn.Module):
    """Stretch, normalisation, networks, softmax and weighted mean, with the arithmetic of a prediction.

    Args:
        networks: stock models in memory, of the same classes and bands.

    Attributes:
        stretch: the bands that the networks take, if those are not 8-bit SAR or RGB.
        label_set: their classes.

    Raises:
        UserError: another kind of network, or networks that do not fit together.
    """

    mask: Tensor  # (K, 1, 1), 0 for background
    low: Tensor  # (bands, 1, 1) float64, the values that become 1 and 255
    high: Tensor

    def __init__(self, networks: Sequence[LoadedNetwork]) -> None:
        super().__init__()
        self.members, self.weights = tuple(networks), normalized_weights(networks)
        for each in networks:
            if not isinstance(each.module, SegmentationNetwork):
                raise UserError(f"{each.origin} cannot be exported: it is no SegFormer or UperNet")
        self.networks = nn.ModuleList(each.network() for each in networks).eval()
        self.stretch, self.label_set = shared_bands(networks), common_label_set(networks)
        mask = torch.ones(self.label_set.num_labels, 1, 1)
        mask[BACKGROUND] = 0
        self.register_buffer("mask", mask)
        for name in ("low", "high"):
            values = torch.tensor(getattr(self.stretch, name, ()), dtype=torch.float64)
            self.register_buffer(name, values[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (B, bands, H, W) float32 raw pixels to (B, K, H, W) mean probabilities; that of background is 0.

        What the networks gave to background is not shared among the other classes, so that maps of overlapping windows
        are the same as those of the networks themselves.
        """
        pixels = pixels if self.stretch is None else self._to_levels(pixels)
        accumulator = VoteAccumulator()
        for member, network, weight in zip(self.members, self.networks, self.weights, strict=True):
            logits = network(member.normalization.apply(pixels)).logits
            accumulator.add(logits.softmax(dim=1), weight)
        return accumulator.probs() * self.mask

    def _to_levels(self, raw: Tensor) -> Tensor:
        """Stretch as `Bands.to_uint8` does: to 1..255, and 0 where a band is NaN or infinite."""
        valid = torch.isfinite(raw).all(dim=1, keepdim=True)
        values = torch.where(valid, raw, 0).double()
        levels = 1 + (values - self.low) * (254 / (self.high - self.low))
        return torch.where(valid, levels.clamp(1, 255).round(), 0).float()

    def classes(self) -> list[dict[str, Any]]:
        """Return id, name and color ("#rrggbb") of each class."""
        colors = hex_colors(self.label_set)
        return [{"id": i, "name": name, "color": colors[i]} for i, name in enumerate(self.label_set.names)]

    def bands(self, wanted: int | None = None) -> int:
        """Return the number of the input's bands.

        Args:
            wanted: 1, to replicate one band for networks that take three; None: as many as the networks take.

        Raises:
            UserError: the networks take another number.
        """
        counts = {len(self.stretch.names)} if self.stretch else {len(each.normalization.mean) for each in self.members}
        possible = {1} if counts <= {1, 3} and not self.stretch else set()
        possible |= counts if len(counts) == 1 else set()
        if wanted is None and len(counts) == 1:
            return counts.pop()
        if wanted not in possible:
            listed = " or ".join(map(str, sorted(possible))) or "the same number of bands in all networks"
            raise UserError(f"the input has {wanted or 'different numbers of'} bands; these networks take {listed}")
        return wanted

    def crop_size(self, wanted: int | None = None) -> int:
        """Return the size of the windows to predict with: `wanted`, or that which all networks were trained at.

        Raises:
            UserError: the networks have different ones and none is wanted, or SwinV2 needs another one.
        """
        crops = {each.name: each.crop_size for each in self.members}
        listed = ", ".join(f"{name} {crop}" for name, crop in crops.items())
        if wanted is None and len({*crops.values()}) > 1:
            raise UserError(f"the networks have different crops ({listed}); choose one for all with --crop_size")
        crop = wanted or self.members[0].crop_size
        for each in self.members:
            if _size_multiple(each) is None and each.crop_size != crop:
                raise UserError(f"{each.name} computes windows of {each.crop_size} pixels only, not of {crop}")
        return crop

    def size_multiple(self, crop_size: int) -> int | None:
        """Return what height and width must be multiples of; None: they are fixed to the crop."""
        multiples = [_size_multiple(each) for each in self.members]
        largest = max((each or 0 for each in multiples), default=0)
        return None if None in multiples or crop_size % largest else largest


def describe_members(graph: ProbabilityGraph) -> list[dict[str, Any]]:
    """Return what is recorded of each network of a graph: where it came from, and how it is used."""
    return [
        {
            "name": each.name,
            "revision": each.revision,
            "weight": weight,
            "architecture": architecture(each),
            "crop_size": each.crop_size,
            "normalization": {key: _plain(value) for key, value in each.normalization._asdict().items()},
        }
        for each, weight in zip(graph.members, graph.weights, strict=True)
    ]


def architecture(network: LoadedNetwork) -> str:
    """Return the architecture of a network, e.g. "segformer", "upernet on swinv2"."""
    config = _model_of(network).config
    encoder = getattr(config, "backbone_config", None)
    names = [config.model_type]
    if encoder is not None:
        names.append(getattr(encoder, "backbone", None) or encoder.model_type)
    return " on ".join(names)


@contextmanager
def traceable(graph: ProbabilityGraph) -> Iterator[None]:
    """Let a graph be exported for all sizes: layers that depend on the input's size compute it as part of the graph."""
    changed: list[nn.Module] = []
    for module in graph.modules():
        replacement: Any = None
        if isinstance(module, nn.AdaptiveAvgPool2d):
            replacement = _average_pool
        elif type(module).__name__ == "Conv2dSame":  # of timm, which is slow to import
            replacement = _convolve_padded
        if replacement is not None:
            module.forward = functools.partial(replacement, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _average_pool(module: nn.AdaptiveAvgPool2d, features: Tensor) -> Tensor:
    """Pool adaptively as two products of matrices; the exporter would keep the bins of the size it saw."""
    size = module.output_size
    rows, columns = size if isinstance(size, tuple) else (size, size)
    assert rows is not None and columns is not None
    by_row = _bin_weights(features.shape[-2], rows, features)
    by_column = _bin_weights(features.shape[-1], columns, features)
    return by_row @ features @ by_column.T


def _bin_weights(length: int, bins: int, like: Tensor) -> Tensor:
    """Return (bins, length): bin i averages places floor(i * length / bins) to ceil((i + 1) * length / bins) - 1."""
    places = torch.arange(length, device=like.device)
    total, number = places[-1:] + 1, torch.arange(bins, device=like.device)[:, None]  # a tensor: exporters trace it
    inside = (places >= number * total // bins) & (places < ((number + 1) * total + bins - 1) // bins)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def _convolve_padded(convolution: Any, features: Tensor) -> Tensor:
    """Convolve with the padding that TensorFlow's "same" gives an input that is a multiple of the stride."""
    padding: list[int] = []
    for axis in (1, 0):  # columns first, as torch's pad takes them
        reach = (convolution.kernel_size[axis] - 1) * convolution.dilation[axis] + 1
        total = max(reach - convolution.stride[axis], 0)
        padding += [total // 2, total - total // 2]
    return nn.functional.conv2d(
        nn.functional.pad(features, padding),
        convolution.weight,
        convolution.bias,
        convolution.stride,
        0,
        convolution.dilation,
        convolution.groups,
    )


def _plain(value: Any) -> Any:
    """Return a tuple as a list, as JSON reads it back."""
    return list(value) if isinstance(value, tuple) else value


def _size_multiple(network: LoadedNetwork) -> int | None:
    model = _model_of(network)
    kind = (getattr(model.config, "backbone_config", None) or model.config).model_type
    has_attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    return None if kind == "timm_backbone" and has_attention else SIZE_MULTIPLES.get(kind)


def _model_of(network: LoadedNetwork) -> Any:
    return network.network().model
