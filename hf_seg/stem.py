"""The first convolution of a stock model: bands other than RGB, in place, so that the saved model stays a stock one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_seg.bands import Bands, rgb_indices
from hf_seg.errors import UserError
from hf_seg.models import encoder_and_heads
from hf_seg.normalization import Normalization


def set_input_bands(
    model: PreTrainedModel,
    names: Sequence[str],
    normalization: Normalization,
    *,
    bands: Bands | None = None,
    from_scratch: bool = False,
) -> None:
    """Let a model of RGB images take other bands.

    Pretrained weights of red, green and blue stay with the bands of these names; every other band gets their mean. All
    are scaled by 3 / bands, so that the activations keep their size. The encoder's config gets the number of bands, the
    model's the normalisation (`image_mean`, `image_std`) and, if there is one, the stretch (`input_bands`).

    Args:
        model: changed in place; its channels must be 3.
        names: of the bands.
        normalization: one value for each band.
        bands: the stretch of images that are not uint8.
        from_scratch: draw new random weights, of the same deviation per input value.

    Raises:
        UserError: its stem takes another number of channels than 3, or its configuration has none.
    """
    encoder, _ = encoder_and_heads(model)
    encoder_config: Any = encoder.config
    stem = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    n_before, n_bands = stem.in_channels, len(names)
    if n_before != 3 or stem.groups != 1:
        raise UserError(f"the encoder takes {n_before} bands already; {n_bands} ({', '.join(names)}) do not fit it")
    if n_bands != n_before and not hasattr(encoder_config, "num_channels"):  # stock transformers would build 3 again
        raise UserError(f"the configuration of a {encoder_config.model_type} has no number of bands: it takes 3 alone")
    if n_bands != n_before:
        scale = n_before / n_bands
        if from_scratch:
            noise = torch.randn(stem.out_channels, n_bands, *stem.kernel_size)
            weight = noise * stem.weight.detach().std() * scale**0.5
        else:
            weight = stem.weight.detach().mean(dim=1, keepdim=True).repeat(1, n_bands, 1, 1)
            if found := rgb_indices(names):
                weight[:, found] = stem.weight.detach()
            weight *= scale
        stem.weight = nn.Parameter(weight)
        stem.in_channels = n_bands
        holders: list[Any] = [*encoder.modules(), encoder_config, model.config]
        holders.append(getattr(model.config, "backbone_config", None))
        for holder in holders:  # configs, and modules that compare an input with it
            if getattr(holder, "num_channels", None) == n_before:
                holder.num_channels = n_bands
    model.config.update({"image_mean": [*normalization.mean], "image_std": [*normalization.std]})
    if bands is not None:
        model.config.update({"input_bands": bands.as_config()})


def input_bands_of(model: PreTrainedModel) -> Bands | None:
    """Return the bands that a model was trained on; None for 8-bit SAR and RGB images.

    Raises:
        UserError: the entry `input_bands` of its config cannot be used.
    """
    try:
        return Bands.from_config(getattr(model.config, "input_bands", None))
    except ValueError as error:
        raise UserError(f"{model.name_or_path}/config.json: {error}") from None
