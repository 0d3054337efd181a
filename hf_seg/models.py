"""SegFormer and UperNet as transformers defines them: build, load with proof, logits at the input's size.

    model = build_model("nvidia/mit-b5", crop_size=896)          # a stock model; model.save_pretrained(folder)
    network = SegmentationNetwork(model)                         # what the loops train
    logits, auxiliary_logits = network(pixel_values)

UperNet takes any encoder of transformers or timm that gives feature levels (`hf_seg.encoders`). Whatever is saved opens
with `AutoModelForSemanticSegmentation`.
"""

import functools
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    ConvNextV2Config,
    DINOv3ConvNextConfig,
    PretrainedConfig,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_seg.encoders import fit_encoder, is_encoder, published_normalization, tensors_of_backbone_alone
from hf_seg.errors import UserError, is_out_of_memory
from hf_seg.hub_client import limit_waiting, one_line
from hf_seg.label_sets import config_of
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.normalization import IMAGENET, Normalization
from hf_seg.timm_encoder import (
    TimmEncoder,
    find_timm_encoder,
    load_timm_weights,
    require_timm_architecture,
    timm_backbone_config,
)

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"

_MIT_DEPTHS = {"b0": (2, 2, 2, 2), "b1": (2, 2, 2, 2), "b2": (3, 4, 6, 3), "b3": (3, 4, 18, 3)}
_MIT_DEPTHS |= {"b4": (3, 8, 27, 3), "b5": (3, 6, 40, 3)}


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
    presets["facebook/dinov3-convnext-base-pretrain-lvd1689m"] = DINOv3ConvNextConfig(
        depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024]
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
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    presets["toy-convnextv2"] = ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 64, 96])
    presets["toy-swinv2"] = Swinv2Config(
        embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 8], window_size=4, drop_path_rate=0.0
    )
    return presets


_TIMM_PRESETS = {"toy-efficientnet-lite0": "timm/tf_efficientnet_lite0"}
PRESETS = (*_presets(), *_TIMM_PRESETS)
_HEAD_WIDTH = 512  # UperNet's decoder (METHOD); that is far too slow for a toy
_TOY_HEAD_WIDTHS = {"toy-convnextv2": 64, "toy-swinv2": 64, "toy-efficientnet-lite0": 64}


def build_model(
    model_name_or_path: str,
    *,
    crop_size: int,
    from_scratch: bool = False,
    head_width: int | None = None,
    label_set: LabelSet = OPEN_EARTH_MAP,
) -> PreTrainedModel:
    """Build a stock segmentation model.

    Args:
        model_name_or_path: Hub id or folder of an encoder (SegFormer's MiT, a backbone of transformers, or one of timm,
            see `find_timm_encoder`) or of a complete SegFormer or UperNet; with `from_scratch` also one of `PRESETS`.
        crop_size: training crop and inference window in pixels. SwinV2 fixes its windows and shifts by it, and not
            every encoder takes every size.
        from_scratch: random weights (drawn from torch's global generator) instead of pretrained ones.
        head_width: channels of the decoder that UperNet adds to an encoder; its auxiliary head has half as many.
            None: 512, or 64 for a toy.
        label_set: its classes, whose names and colours its config gets.

    Returns:
        `SegformerForSemanticSegmentation` or `UperNetForSemanticSegmentation`; `normalization_of` tells its input's.

    Raises:
        UserError: no such model here or on the Hub, an architecture that is not supported, one that does not fit the
            crop, or weights that do not fill the encoder.
    """
    name = model_name_or_path
    if name in PRESETS and name.startswith("toy-") and not from_scratch:
        raise UserError(f"{name} is a size without pretrained weights; add --from_scratch true")
    timm_encoder = find_timm_encoder(_TIMM_PRESETS.get(name, name), from_scratch=from_scratch)
    config = timm_backbone_config(timm_encoder) if timm_encoder else _find_config(name, from_scratch)
    require_supported(name, config)
    adds_heads = is_encoder(config)
    if head_width is not None and not adds_heads:
        raise UserError(f"head_width is for UperNet on an encoder; {name} is a whole {config.model_type}")
    encoder, unused = getattr(config, "backbone_config", config), []
    if encoder.model_type != "segformer":
        unused = fit_encoder(name, encoder, crop_size, from_scratch=from_scratch, keep_levels=not adds_heads)
    if adds_heads:
        config = _upernet_config(encoder, head_width or _TOY_HEAD_WIDTHS.get(name, _HEAD_WIDTH), label_set)
        _set_normalization(config, name, timm_encoder, from_scratch)
    stock, ignore = {
        "segformer": (SegformerForSemanticSegmentation, "semantic_loss_ignore_index"),
        "upernet": (UperNetForSemanticSegmentation, "loss_ignore_index"),
    }[config.model_type]
    vars(config).pop("label_colors", None)  # of a whole model that had other classes
    config.update({**config_of(label_set), ignore: IGNORE_INDEX})
    if not from_scratch and not adds_heads:
        model = load_weights(stock, name, config, may_be_new=("decode_head", "auxiliary_head"))
    else:
        model = stock(config)
    if not from_scratch and timm_encoder:
        lost, unused_tensors = load_timm_weights(model.backbone._backbone, timm_encoder)
        _prove_loaded(name, model.backbone, lost=lost, unused=unused_tensors)
        _require_finite(name, model.backbone)
    elif not from_scratch and adds_heads:
        new = {*tensors_of_backbone_alone(model.backbone), *unused}
        model.backbone = load_weights(type(model.backbone), name, encoder, may_be_new=new)
    for key in unused:  # distributed training would wait for their gradients
        model.backbone.get_parameter(key).requires_grad_(False)
    _assert_windows(model, crop_size)
    return model


def normalization_of(model: PreTrainedModel) -> Normalization:
    """Return the normalisation of a stock model's input: that of its encoder's pretraining.

    It is in the config of UperNet where it is not ImageNet's.
    """
    mean, std = getattr(model.config, "image_mean", None), getattr(model.config, "image_std", None)
    return Normalization(tuple(mean), tuple(std)) if mean and std else IMAGENET


def require_supported(name: str, config: PretrainedConfig) -> None:
    """Raise `UserError` unless a model is of an architecture that this project trains.

    Args:
        name: of the model.
        config: of an encoder or a whole model.
    """
    encoder = getattr(config, "backbone_config", None) or config
    kind = " on ".join(dict.fromkeys((config.model_type, encoder.model_type)))
    is_upernet = is_encoder(encoder) and (encoder is config or config.model_type == "upernet")
    if kind != "segformer" and not is_upernet:
        kinds = "SegFormer, encoders of timm, those that transformers has a backbone class for, and UperNet on them"
        raise UserError(f"{name} is a {kind}; supported are {kinds}")
    if encoder.model_type == "timm_backbone":
        require_timm_architecture(name, encoder.backbone)


def _find_config(name: str, from_scratch: bool) -> PretrainedConfig:
    if from_scratch and name in (presets := _presets()):
        return presets[name]
    limit_waiting()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers checks little, so any kind may come; each is about this model
        hint = "fetch it where there is a network (`hf download`), or give a local folder, or add --from_scratch true"
        if from_scratch:
            hint = f"sizes known without a download: {', '.join(PRESETS)}"
        raise UserError(f"model {name!r} was not found locally or on the Hub; {hint} ({one_line(error)})") from None


def _upernet_config(encoder: PretrainedConfig, width: int, label_set: LabelSet) -> UperNetConfig:
    # a classifier's thousands of label names have no place in the saved config
    encoder.update({"id2label": label_set.id2label, "label2id": label_set.label2id})
    return UperNetConfig(
        backbone_config=encoder,
        hidden_size=width,
        auxiliary_channels=width // 2,
        auxiliary_in_channels=None,  # those of the third level
        auxiliary_loss_weight=0.4,
    )


def _set_normalization(config: UperNetConfig, name: str, timm_encoder: TimmEncoder | None, from_scratch: bool) -> None:
    """Keep the normalisation of an encoder's pretraining with the model, where it is not ImageNet's."""
    if timm_encoder is not None:
        found = timm_encoder.normalization
    else:
        found = IMAGENET if from_scratch else published_normalization(name)
    if timm_encoder is not None or found != IMAGENET:
        config.update({"image_mean": [*found.mean], "image_std": [*found.std]})


def load_weights(
    cls: Any, name: str, config: PretrainedConfig, may_be_new: Collection[str] = (), *, is_whole: bool = False
) -> Any:
    """Load weights and prove that they arrived: only tensors under the prefixes `may_be_new` may start at random.

    Where the weights are those of the whole model (`is_whole`), none of them may be left over either.
    """
    if Path(name, ADAPTER_CONFIG).exists():  # with peft installed, transformers would apply it to the weights
        raise UserError(f"{name} has an adapter beside its weights; merge it into them, or remove {ADAPTER_CONFIG}")
    try:
        model, report = cls.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # whatever the file has: mixed precision keeps float32 weights
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of a damaged file, a shard in another format, the network: of many kinds
        if is_out_of_memory(error):
            raise
        reason = one_line(error).partition(" This file can still be loaded")[0]  # by unpickling it
        raise UserError(f"{name}: no complete weights in safetensors format ({reason})") from None
    random = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    new = [key for key in random if key.startswith(tuple(may_be_new))]
    if is_whole and (extra := sorted(report["unexpected_keys"])):
        raise UserError(
            f"{name}: {len(extra)} tensors of its weights are of no layer of its config.json, e.g. {extra[0]}; it is "
            "damaged or another model than its config.json says"
        )
    _prove_loaded(name, model, lost=sorted(random - {*new}), new=new, unused=len(report["unexpected_keys"]))
    _require_finite(name, model)
    return model


def _require_finite(name: str, model: nn.Module) -> None:
    """Raise `UserError` if a weight is not a finite number: a training that diverged, or a damaged file."""
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} has values that are not finite; it is damaged, or its training diverged")


def _prove_loaded(name: str, model: nn.Module, *, lost: Sequence[str], new: Sequence[str] = (), unused: int) -> None:
    """Report how many tensors of a model were loaded.

    Raises:
        UserError: some are not among its weights, so they would start at random.
    """
    total = len(model.state_dict())
    if lost:
        raise UserError(
            f"{name}: {len(lost)} of {total} tensors are not among its weights, e.g. {lost[0]}; "
            "it is damaged or another model than its config.json says"
        )
    prefixes = ", ".join(sorted({key.partition(".")[0] for key in new})) or "none"
    level = logging.INFO if new or unused else logging.DEBUG  # all of a model of our own needs no mention
    logger.log(
        level, "%s: %d tensors loaded, %d new (%s), %d unused", name, total - len(new), len(new), prefixes, unused
    )


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

    Attributes:
        normalization: of its input.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # Faster, on a CPU by a fifth. Not for SegFormer: in this layout torch 2.13 computes a bf16 convolution wrongly
        # on a CPU if its kernel is 8 x 8 and as large as its input.
        if isinstance(model, UperNetForSemanticSegmentation):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        self.normalization = normalization_of(model)

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
        """Recompute the encoder's activations in the backward pass.

        BatchNorm in an encoder of timm then updates its running statistics twice a step, by the same batch.
        """
        encoder: Any = getattr(self.model, "backbone", self.model)
        if encoder.config.model_type == "timm_backbone":
            encoder._backbone.set_grad_checkpointing(True)
        elif encoder.supports_gradient_checkpointing:
            # renamed in 5.23; the old name goes in 6
            enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        else:  # convolutional encoders of transformers have no switch for it
            for stage in _stages(encoder):
                stage.forward = functools.partial(_checkpoint_in_training, stage, stage.forward)


def _stages(encoder: nn.Module) -> nn.ModuleList:
    """Return the stages of a convolutional encoder of transformers."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "stages":
            return module
    raise UserError(f"gradient_checkpointing must be false for {type(encoder).__name__}")


def _resize(logits: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _checkpoint_in_training(stage: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    if not stage.training:
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def encoder_and_heads(model: PreTrainedModel) -> tuple[nn.Module, list[nn.Module]]:
    """Split a stock model into its encoder and its new heads, which learn at another rate."""
    parts = dict(model.named_children())
    encoder = parts.pop("backbone" if isinstance(model, UperNetForSemanticSegmentation) else "segformer")
    return encoder, list(parts.values())


def synchronize_batch_norm(network: nn.Module) -> Any:
    """Let BatchNorm take its statistics over all processes (CUDA only); call before the optimizer is built.

    Torch's own function would drop the activations that many encoders of timm fuse into their BatchNorm.
    """
    from timm.layers import convert_sync_batchnorm  # slow

    return convert_sync_batchnorm(network)
