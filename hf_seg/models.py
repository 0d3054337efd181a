"""SegFormer and UperNet as transformers defines them: build, load with proof, logits at the input's size.

    model = build_model("nvidia/mit-b5", crop_size=896)          # a stock model; model.save_pretrained(folder)
    network = SegmentationNetwork(model)                         # what the loops train
    logits, auxiliary_logits = network(pixel_values)

UperNet takes ConvNeXtV2 or SwinV2 as encoder. Whatever is saved opens with `AutoModelForSemanticSegmentation`.
"""

import functools
import logging
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    ConvNextV2Config,
    PretrainedConfig,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_seg.errors import UserError
from hf_seg.labels import ID2LABEL, IGNORE_INDEX, LABEL2ID

logger = logging.getLogger(__name__)

_MIT_DEPTHS = {"b0": (2, 2, 2, 2), "b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3)}
_MIT_DEPTHS |= {"b4": (3, 8, 27, 3), "b5": (3, 6, 40, 3)}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _presets() -> dict[str, PretrainedConfig]:
    """Return the configurations that need no download: the recipes' encoders, and toys for a CPU."""
    presets: dict[str, PretrainedConfig] = {
        f"nvidia/mit-{size}": SegformerConfig(
            depths=list(depths),
            hidden_sizes=[32, 64, 160, 256] if size == "b0" else [64, 128, 320, 512],
            decoder_hidden_size=256 if size in ("b0", "b1") else 768,
        )
        for size, depths in _MIT_DEPTHS.items()
    }
    presets["facebook/convnextv2-base-22k-384"] = ConvNextV2Config(
        depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], image_size=384
    )
    presets["microsoft/swinv2-base-patch4-window12to24-192to384-22kto1k-ft"] = Swinv2Config(
        image_size=384,
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=24,
        pretrained_window_sizes=[12, 12, 12, 6],
    )
    presets["toy-segformer"] = SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 96],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=64,
        initializer_range=0.1,  # the usual 0.02 is for wide layers
    )
    presets["toy-convnextv2"] = ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 64, 96])
    presets["toy-swinv2"] = Swinv2Config(
        embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 8], window_size=4, drop_path_rate=0.0
    )
    return presets


PRESETS = tuple(_presets())
# UperNet's decoder and auxiliary head are 512 and 256 wide (METHOD); that is far too slow for a toy.
_HEAD_WIDTHS = {"toy-convnextv2": (64, 32), "toy-swinv2": (64, 32)}


def build_model(model_name_or_path: str, *, crop_size: int, from_scratch: bool = False) -> PreTrainedModel:
    """Build a stock segmentation model of the nine land-cover classes.

    Args:
        model_name_or_path: Hub id or folder of an encoder (SegFormer's MiT, ConvNeXtV2, SwinV2) or of a complete
            SegFormer or UperNet; with `from_scratch` also one of `PRESETS`.
        crop_size: training crop and inference window in pixels. SwinV2 fixes its windows and shifts by it.
        from_scratch: random weights (drawn from torch's global generator) instead of pretrained ones.

    Returns:
        `SegformerForSemanticSegmentation` or `UperNetForSemanticSegmentation`.

    Raises:
        UserError: no such model here or on the Hub, an architecture that is not supported, or weights that do not
            fill the encoder.
    """
    config = _find_config(model_name_or_path, from_scratch)
    encoder = getattr(config, "backbone_config", None) or config
    kind = " on ".join(dict.fromkeys((config.model_type, encoder.model_type)))
    if kind not in ("segformer", "convnextv2", "swinv2", "upernet on convnextv2", "upernet on swinv2"):
        kinds = "SegFormer, ConvNeXtV2, SwinV2, and UperNet on the latter two"
        raise UserError(f"{model_name_or_path} is a {kind}; supported are {kinds}")
    if encoder.model_type == "swinv2":
        encoder.image_size = crop_size
    is_bare_encoder = config.model_type in ("convnextv2", "swinv2")
    if is_bare_encoder:
        config = _upernet_config(config, *_HEAD_WIDTHS.get(model_name_or_path, (512, 256)))
    stock, ignore = {
        "segformer": (SegformerForSemanticSegmentation, "semantic_loss_ignore_index"),
        "upernet": (UperNetForSemanticSegmentation, "loss_ignore_index"),
    }[config.model_type]
    config.update({"id2label": ID2LABEL, "label2id": LABEL2ID, ignore: IGNORE_INDEX})
    if from_scratch:
        model = stock(config)
    elif is_bare_encoder:
        model = stock(config)
        backbone = type(model.backbone)
        model.backbone = load_weights(
            backbone, model_name_or_path, config.backbone_config, may_be_new=("hidden_states_norms",)
        )
    else:
        model = load_weights(stock, model_name_or_path, config, may_be_new=("decode_head", "auxiliary_head"))
    _assert_windows(model, crop_size)
    return model


def _find_config(name: str, from_scratch: bool) -> PretrainedConfig:
    if from_scratch and name in PRESETS:
        return _presets()[name]
    if name in PRESETS and name.startswith("toy-"):
        raise UserError(f"{name} is a size without pretrained weights; add --from_scratch true")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "fetch it where there is a network (`hf download`), or give a local folder, or add --from_scratch true"
        if from_scratch:
            hint = f"sizes known without a download: {', '.join(PRESETS)}"
        raise UserError(
            f"model {name!r} was not found locally or on the Hub; {hint} ({str(error).strip().splitlines()[0]})"
        ) from None


def _upernet_config(encoder: PretrainedConfig, width: int, auxiliary_width: int) -> UperNetConfig:
    # a classifier's thousands of label names have no place in the saved config
    encoder.update({"out_features": _STAGES, "id2label": ID2LABEL, "label2id": LABEL2ID})
    return UperNetConfig(
        backbone_config=encoder,
        hidden_size=width,
        auxiliary_channels=auxiliary_width,
        auxiliary_in_channels=None,  # those of stage 3
        auxiliary_loss_weight=0.4,
    )


def load_weights(cls: Any, name: str, config: PretrainedConfig, may_be_new: Collection[str]) -> Any:
    """Load weights and prove that they arrived: only tensors under the prefixes `may_be_new` may start at random."""
    try:
        model, report = cls.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # whatever the file has: mixed precision keeps float32 weights
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{name}: no complete weights in safetensors format ({str(error).splitlines()[0]})") from None
    random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    lost = sorted(key for key in random if not key.startswith(tuple(may_be_new)))
    if lost:
        raise UserError(
            f"{name}: {len(lost)} of {len(model.state_dict())} tensors are not among its weights, e.g. {lost[0]}; "
            "it is damaged or another model than its config.json says"
        )
    loaded, unused = len(model.state_dict()) - len(random), len(report["unexpected_keys"])
    logger.info(
        "%s: %d tensors loaded, %d new (%s), %d unused", name, loaded, len(random), ", ".join(may_be_new), unused
    )
    return model


def _assert_windows(model: PreTrainedModel, crop_size: int) -> None:
    """SwinV2 fixes windows and shifts at construction; make sure they are those of the crop."""
    encoder = getattr(model, "backbone", None)
    if encoder is None or encoder.config.model_type != "swinv2":
        return
    config = encoder.config
    for level, stage in enumerate(encoder.encoder.layers):
        side = crop_size // config.patch_size // 2**level
        for number, block in enumerate(stage.blocks):
            window = min(config.window_size, side)
            shift = config.window_size // 2 if number % 2 and side > config.window_size else 0
            assert (block.window_size, block.shift_size) == (window, shift), (level, number, block.window_size)


class SegmentationLogits(NamedTuple):
    """Logits at the input's size; the auxiliary head's only in training mode, and only where there is one."""

    logits: Tensor  # (B, C, H, W)
    auxiliary_logits: Tensor | None  # (B, C, H, W)


class SegmentationNetwork(nn.Module):
    """A stock model whose forward returns what a custom loss needs.

    Stock UperNet computes its auxiliary logits and drops them when no labels are given, which breaks distributed
    training. The stock model stays what it is, in `.model`, and is what gets saved.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> SegmentationLogits:
        """Map (B, 3, H, W) to logits of the same height and width."""
        size = pixel_values.shape[-2:]
        if isinstance(self.model, UperNetForSemanticSegmentation):
            features = self.model.backbone.forward_with_filtered_kwargs(pixel_values).feature_maps
            logits = self.model.decode_head(features)
            auxiliary = None
            if self.training and self.model.auxiliary_head is not None:
                auxiliary = _resize(self.model.auxiliary_head(features), size)
            return SegmentationLogits(_resize(logits, size), auxiliary)
        return SegmentationLogits(_resize(self.model(pixel_values=pixel_values).logits, size), None)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the encoder's activations in the backward pass; works for all three encoders."""
        encoder: Any = getattr(self.model, "backbone", self.model)
        if encoder.config.model_type == "convnextv2":  # transformers has no switch for it
            for stage in encoder.encoder.stages:
                stage.forward = functools.partial(_checkpoint_in_training, stage, stage.forward)
        else:
            # renamed in 5.23; the old name goes in 6
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False})


def _resize(logits: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _checkpoint_in_training(stage: nn.Module, forward: Any, *inputs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False) if stage.training else forward(*inputs)


def encoder_and_heads(model: PreTrainedModel) -> tuple[nn.Module, list[nn.Module]]:
    """Split a stock model into its encoder and its new heads, which learn at another rate."""
    parts = dict(model.named_children())
    encoder = parts.pop("backbone" if isinstance(model, UperNetForSemanticSegmentation) else "segformer")
    return encoder, list(parts.values())
