"""LoRA: train an encoder by small adapters, merge them for export (Hu et al. 2021), through `peft`.

    add_adapters(model, rank=8, alpha=16, targets=["all-linear"], base="facebook/dinov2-base")
    save_adapter(model, folder)         # in peft's format
    merge_adapters(model)               # a stock model without adapters

The adapters are layers of the stock model, so that training, averaging and checkpoints treat them as any other weight.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_seg.encoders import tensors_of_backbone_alone
from hf_seg.errors import UserError
from hf_seg.models import encoder_and_heads

ADAPTER_FOLDER = "adapter"
_ALL_LINEAR = "all-linear"
_NAME = "default"  # of the only adapter, in peft's names of tensors


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str], base: str) -> None:
    """Freeze the encoder of a stock model and give its layers adapters, which change nothing at first.

    The heads stay trained as a whole, and so do the parts of the encoder that no pretrained file has: the norms of
    levels, BEiT's pyramid, a stem of another number of bands. BatchNorm of the encoder keeps the statistics of the
    pretraining, in training too, so that the adapter contains all that was learned.

    Args:
        rank: of the adapters' matrices.
        alpha: the adapters' output is scaled by this over the rank.
        targets: "all-linear", or ends of the names of linear and convolutional layers.
        base: name of the model that the adapters are for, kept in their configuration.

    Raises:
        UserError: peft is not installed, or no layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora_rank needs a package: pip install 'hf_seg[lora]'; or set it to 0") from None
    from timm.layers import freeze_batch_norm_2d  # timm trains networks; maps can do without it

    encoder, heads = encoder_and_heads(model)
    names = {module: name for name, module in model.named_modules()}
    learned = [*heads, *_new_parts(encoder)]
    stem = next(module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    if stem.in_channels != 3:
        learned.append(stem)
    layers = [f"{names[encoder]}.{name}" for name, layer in _find_layers(encoder, targets) if layer not in learned]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]
    for name, part in encoder.named_children():
        if part not in learned:
            setattr(encoder, name, freeze_batch_norm_2d(part))
    inject_adapter_in_model(config, model)  # freezes all that is not an adapter
    for part in learned:
        part.requires_grad_(True)
    config.modules_to_save = [names[part] for part in learned]
    config.base_model_name_or_path = base
    config.inference_mode = True  # of who loads it


def has_adapters(model: nn.Module) -> bool:
    """Tell whether `add_adapters` was called."""
    return hasattr(model, "peft_config")


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its adapters merged into the layers: the stock model that it was, in eval mode."""
    from timm.layers import unfreeze_batch_norm_2d

    merged = copy.deepcopy(model)
    for name, layer in list(_adapted_layers(merged)):
        layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    encoder, _ = encoder_and_heads(merged)
    for name, part in encoder.named_children():
        setattr(encoder, name, unfreeze_batch_norm_2d(part))
    del merged.peft_config
    return merged.eval()


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write adapters and heads in peft's format: `PeftModel.from_pretrained(build_model(...), folder)` opens them."""
    config: Any = model.peft_config[_NAME]
    config.save_pretrained(str(folder))
    save_file(_adapter_tensors(model), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of parameters that are trained, and of all."""
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(number for number, is_trained in numbers if is_trained), sum(number for number, _ in numbers)


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    config: Any = model.peft_config[_NAME]  # type: ignore[index]
    learned = tuple(f"{name}." for name in config.modules_to_save)
    return {
        f"base_model.model.{key.replace(f'.{_NAME}', '')}": tensor.contiguous()
        for key, tensor in model.state_dict().items()
        if ".lora_" in key or key.startswith(learned)
    }


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _new_parts(encoder: nn.Module) -> list[nn.Module]:
    """Return the parts of an encoder that begin at random, whatever it was pretrained on."""
    if not hasattr(encoder, "out_features"):  # SegFormer's, not a backbone
        return []
    new = {key.partition(".")[0] for key in tensors_of_backbone_alone(encoder)}
    return [part for name, part in encoder.named_children() if name in new]


def _find_layers(encoder: nn.Module, targets: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return the layers of an encoder that get adapters, by name."""
    modules = dict(encoder.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    whole = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and module.groups == 1]
    possible = linear + whole
    if list(targets) == [_ALL_LINEAR] and linear:
        return [(name, modules[name]) for name in linear]
    for end in targets:
        if not any(_ends(name, end) for name in possible):
            ends = sorted({name.rpartition(".")[2] for name in possible})
            raise UserError(f"lora_targets: {end} is no layer of the encoder; it has {', '.join(ends)}")
    return [(name, modules[name]) for name in possible if any(_ends(name, end) for end in targets)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
