"""Encoders for UperNet: any backbone of transformers or timm whose levels fit the training crop.

    unused = fit_encoder("facebook/dinov2-base", config, crop_size=448)

What fits is found by running the backbone on the meta device, which computes shapes and no values.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel, PretrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from hf_seg.errors import UserError
from hf_seg.normalization import IMAGENET, Normalization

_STRIDES = (4, 8, 16, 32)  # of UperNet's levels, where an encoder has them
_N_LEVELS = 4
_CROP_STEP, _LARGEST_CROP = 32, 2048
_CROPS_SHOWN, _CROPS_TRIED = 3, 14
_NOT_OF_SHAPES = {"dtype", "id2label", "label2id"}


class Level(NamedTuple):
    """A feature map that an encoder can give; its side is the crop's divided by the stride."""

    stage: int  # number of the encoder's stage
    stride: int


class UnfitError(Exception):
    """An encoder cannot give UperNet levels of a crop."""


def is_encoder(config: PretrainedConfig) -> bool:
    """Tell whether transformers has a backbone class for a configuration."""
    return config.model_type in MODEL_FOR_BACKBONE_MAPPING_NAMES


def fit_encoder(
    name: str, config: PretrainedConfig, crop_size: int, *, from_scratch: bool = False, keep_levels: bool = False
) -> list[str]:
    """Choose an encoder's levels and prove that it takes crops of a size.

    Hierarchical encoders give the levels of strides 4, 8, 16 and 32, or their four deepest. A plain vision transformer
    gives four layers, evenly spread, which all have the stride of its patches; where its configuration knows a feature
    pyramid of its own (`add_fpn` of BEiT), that is turned on.

    Args:
        name: of the model, for errors.
        config: of a backbone; changed in place.
        crop_size: side of the crops in pixels. `image_size` becomes the same, as Swin's windows need, where no
            tensor's shape depends on it.
        from_scratch: `image_size` may change the shape of tensors.
        keep_levels: they were chosen when the model was built.

    Returns:
        The names of the parameters that no level depends on, e.g. the mask token of self-supervised training.

    Raises:
        UserError: the encoder gives no levels, or not at this crop; the message says at which.
    """
    kind, values = _as_key(config)
    fit = functools.partial(_fit, kind, values, keep_levels=keep_levels)
    resize = from_scratch or _follows_crop(kind, values, crop_size)
    try:
        changes, unused = fit(crop_size, resize)
    except UnfitError as error:
        encoder = getattr(config, "backbone", None) or config.model_type
        if fitting := list(_fitting_crops(config, crop_size, functools.partial(fit, resize=resize))):
            sizes = f"sizes that fit: {', '.join(map(str, sorted(fitting)))}"
            raise UserError(f"{name}: {encoder} does not fit crop_size {crop_size} ({error}); {sizes}") from None
        raise UserError(f"{name}: {encoder} gives UperNet no levels at crop_size {crop_size} ({error})") from None
    config.update(json.loads(changes))
    return list(unused)


def tensors_of_backbone_alone(backbone: nn.Module) -> set[str]:
    """Return the names of the tensors that a backbone class adds to its model, so that no pretrained file has them."""
    config: Any = backbone.config
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            published = {*AutoModel.from_config(config).state_dict()}
    except ValueError:  # there is the backbone alone
        return set()
    ours, prefix = {*backbone.state_dict()}, getattr(backbone, "base_model_prefix", "")
    as_part = {f"{prefix}.{key}" for key in published}  # a backbone is its model, or has it as a part
    return ours - max(published, as_part, key=lambda keys: len(ours & keys))


def published_normalization(name: str) -> Normalization:
    """Return the normalisation in the `preprocessor_config.json` of a pretrained encoder, or ImageNet's without one."""
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name)
        mean, std = (tuple(map(float, found[key])) for key in ("image_mean", "image_std"))
    except (OSError, KeyError, TypeError, ValueError):
        return IMAGENET
    return Normalization(mean, std) if len(mean) == len(std) == 3 else IMAGENET


def _as_key(config: PretrainedConfig) -> tuple[Any, str]:
    """Return the class of a configuration and its settings as JSON, to look up what is known of it."""
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_OF_SHAPES}
    return type(config), json.dumps(settings)


@functools.lru_cache(maxsize=64)
def _fit(kind: Any, values: str, crop_size: int, resize: bool, *, keep_levels: bool) -> tuple[str, tuple[str, ...]]:
    """Return the settings of a configuration that fits, as JSON, and the names of the unused parameters."""
    config = kind.from_dict(json.loads(values))
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and crop_size % patch:  # the rest would be cut off, and the logits too large
        raise UnfitError(f"its patches of {patch} pixels do not divide the crop")
    changes = _image_size(config, crop_size) if resize else {}
    config.update(changes)
    if not keep_levels:
        levels = _choose_levels(_all_levels(config, crop_size))
        changes |= _settings_of_levels(config, [level.stage for level in levels])
        if len({level.stride for level in levels}) == 1 and hasattr(config, "add_fpn"):
            changes["add_fpn"] = True
        config.update(changes)
    backbone, maps = _run(config, crop_size)
    for features, channels in zip(maps, backbone.channels, strict=True):
        _stride(features, channels, crop_size)
    return json.dumps(changes), _unused_parameters(backbone, maps)


@functools.lru_cache(maxsize=64)
def _follows_crop(kind: Any, values: str, crop_size: int) -> bool:
    """Tell whether `image_size` may become the crop: in some encoders position embeddings or windows follow it."""
    config = kind.from_dict(json.loads(values))
    try:
        own = _shapes(config)
        config.update(_image_size(config, crop_size))
        return own == _shapes(config)
    except UnfitError:
        return False


def _shapes(config: PretrainedConfig) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in _build(config, "meta").state_dict().items()}


def _image_size(config: PretrainedConfig, crop_size: int) -> dict[str, Any]:
    """Return the setting that makes `image_size` the crop, in the form that the configuration has it."""
    size = getattr(config, "image_size", None)
    if size is None:
        return {}
    return {"image_size": [crop_size] * len(size) if isinstance(size, Sequence) else crop_size}


def _build(config: PretrainedConfig, device: str) -> Any:
    """Build a backbone without a trace in torch's random numbers."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return AutoBackbone.from_config(config).eval()
    except Exception as error:  # sizes that do not fit, an optional package: what a backbone raises is its own
        raise UnfitError(_one_line(error)) from None


@functools.lru_cache(maxsize=2)
def _build_on_meta(kind: Any, values: str) -> Any:
    return _build(kind.from_dict(json.loads(values)), "meta")


def _run(config: PretrainedConfig, crop_size: int) -> tuple[Any, Sequence[Tensor]]:
    """Build a backbone and return it with its feature maps of one crop."""
    problem = ""
    for device in ("meta", "cpu"):  # a few backbones compute with values, which the meta device does not have
        backbone = _build_on_meta(*_as_key(config)) if device == "meta" else _build(config, device)
        pixel_values = torch.zeros(1, getattr(config, "num_channels", 3), crop_size, crop_size, device=device)
        try:
            with torch.device(device):
                return backbone, backbone.forward_with_filtered_kwargs(pixel_values).feature_maps
        except Exception as error:  # see `_build`
            problem = _one_line(error)
            if "meta" not in problem:
                break
    raise UnfitError(problem)


def _all_levels(config: PretrainedConfig, crop_size: int) -> list[Level]:
    """Return the levels that an encoder can give, shallow to deep."""
    is_timm = config.model_type == "timm_backbone"  # with all levels, see `timm_backbone_config`
    stages = list(config.out_indices) if is_timm else list(range(len(config.stage_names)))

    def run(stages: Sequence[int]) -> tuple[Any, Sequence[Tensor]]:
        config.update(_settings_of_levels(config, stages))
        return _run(config, crop_size)

    try:
        backbone, maps = run(stages)
    except UnfitError:  # some of transformers refuse to give their stem
        stages = stages[1:]
        backbone, maps = run(stages)
    levels = []
    for stage, features, channels in zip(stages, maps, backbone.channels, strict=True):
        try:
            levels.append(Level(stage, _stride(features, channels, crop_size)))
        except UnfitError:
            if stage == stages[-1]:
                raise
    return levels


def _settings_of_levels(config: PretrainedConfig, stages: Sequence[int]) -> dict[str, Any]:
    if config.model_type == "timm_backbone":
        return {"out_indices": list(stages)}
    return {"out_features": [config.stage_names[stage] for stage in stages]}


def _choose_levels(levels: Sequence[Level]) -> list[Level]:
    """Choose UperNet's levels: by stride, the deepest of each; evenly spread where all have the same stride."""
    by_stride = {level.stride: level for level in levels}
    if {*_STRIDES} <= by_stride.keys():
        return [by_stride[stride] for stride in _STRIDES]
    if len(by_stride) == 1:
        step = len(levels) // _N_LEVELS
        if step == 0:
            raise UnfitError(f"it has {len(levels)} levels of one stride, {_N_LEVELS} are needed")
        return list(levels[::-1][: step * _N_LEVELS : step])[::-1]
    if len(by_stride) < _N_LEVELS - 1:  # the auxiliary head takes the third
        raise UnfitError(f"its levels have strides {', '.join(map(str, sorted(by_stride)))}; three are needed")
    return [by_stride[stride] for stride in sorted(by_stride)][-_N_LEVELS:]


def _stride(features: Tensor, channels: Any, crop_size: int) -> int:
    """Return the stride of an (N, C, H, W) feature map."""
    shape = " x ".join(map(str, features.shape[1:]))
    if features.ndim != 4 or features.shape[1] != channels or features.shape[2] != features.shape[3]:
        raise UnfitError(f"a level is {shape}, not {channels} channels x height x width")
    if crop_size % features.shape[2]:
        raise UnfitError(f"its level of {features.shape[2]} x {features.shape[2]} does not divide the crop")
    return crop_size // features.shape[2]


def _unused_parameters(backbone: nn.Module, maps: Sequence[Tensor]) -> tuple[str, ...]:
    torch.stack([features.sum() for features in maps]).sum().backward()
    return tuple(key for key, parameter in backbone.named_parameters() if parameter.grad is None)


def _fitting_crops(config: PretrainedConfig, crop_size: int, fit: Any) -> Iterator[int]:
    """Yield a few other crops that fit: the encoder's own size, then the nearest."""
    size = getattr(config, "image_size", None)
    own = size[0] if isinstance(size, Sequence) else size
    nearest = sorted(range(_CROP_STEP, _LARGEST_CROP + 1, _CROP_STEP), key=lambda crop: abs(crop - crop_size))
    crops = [own, *nearest] if own is not None and own % _CROP_STEP == 0 else nearest
    found = 0
    for crop in [each for each in dict.fromkeys(crops) if each != crop_size][:_CROPS_TRIED]:
        try:
            fit(crop)
        except UnfitError:
            continue
        yield crop
        found += 1
        if found == _CROPS_SHOWN:
            return


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
