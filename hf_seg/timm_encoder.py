"""Encoders of timm for UperNet: find one, describe it to transformers, load its weights.

    source = find_timm_encoder("timm/tf_efficientnet_lite0")    # timm's repository on the Hub
    source = find_timm_encoder("pretrained/efficientnet_lite0") # a folder in timm's format

A folder in timm's format contains `config.json` with "architecture" and "pretrained_cfg", and `model.safetensors`.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hf_seg.errors import UserError
from hf_seg.hub_client import check_downloads, limit_waiting, one_line
from hf_seg.normalization import IMAGENET, Normalization

_PREFIX = "timm/"
# do not change the features of RGB images; position embeddings of another image size are refused with the weights
_HARMLESS_ARGUMENTS = {"in_chans", "num_classes", "global_pool", "drop_rate", "img_size"}


class TimmEncoder(NamedTuple):
    """An architecture of timm, and where its weights are."""

    name: str  # as the user gave it
    architecture: str
    normalization: Normalization
    folder: Path | None  # in timm's format; None: only random weights


def find_timm_encoder(name: str, *, from_scratch: bool = False) -> TimmEncoder | None:
    """Find an encoder of timm.

    Args:
        name: folder in timm's format, or `timm/ARCHITECTURE` or `timm/ARCHITECTURE.TAG`.
        from_scratch: its weights are not needed.

    Returns:
        None if the name is not one of timm's.

    Raises:
        UserError: no such architecture, or its weights were not found.
    """
    if Path(name).is_dir():
        config = _read_config(Path(name))
        return None if config is None else _in_folder(name, Path(name), config)
    if not name.startswith(_PREFIX):
        return None
    import timm  # slow

    tagged = name.removeprefix(_PREFIX)
    require_timm_architecture(name, tagged.partition(".")[0])
    try:
        published = timm.get_pretrained_cfg(tagged)
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from None
    if from_scratch:
        mean, std = (published.mean, published.std) if published is not None else (IMAGENET.mean, IMAGENET.std)
        return TimmEncoder(name, tagged.partition(".")[0], Normalization(tuple(mean), tuple(std)), None)
    if published is None or not published.hf_hub_id:
        raise UserError(f"{name} has no weights on the Hub; give a local folder, or add --from_scratch true")
    limit_waiting()
    try:
        folder = Path(snapshot_download(published.hf_hub_id, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # network, name: the Hub's client raises many kinds; each is about this name
        reason = one_line(error).partition(". ")[0][:200]
        raise UserError(
            f"model {name!r} was not found locally or on the Hub; fetch it where there is a network (`hf download "
            f"{published.hf_hub_id}`), or give a local folder, or add --from_scratch true ({reason})"
        ) from None
    check_downloads(folder.glob("*"), name)
    return _in_folder(name, folder, _read_config(folder) or {})


def timm_backbone_config(encoder: TimmEncoder) -> Any:
    """Return the `TimmBackboneConfig` of an encoder with all its levels, of which `fit_encoder` chooses.

    Raises:
        UserError: it has no levels, or gives them channels last, which `TimmBackbone` of transformers passes on as they
            are.
    """
    import timm
    from transformers import TimmBackboneConfig

    try:
        with torch.device("meta"):
            features: Any = timm.create_model(encoder.architecture, features_only=True)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # what an architecture raises is its own
        reason = " ".join(str(error).split())
        raise UserError(f"{encoder.name}: {encoder.architecture} gives no features ({reason})") from None
    levels = features.feature_info.info
    layout = getattr(features, "output_fmt", "NCHW")
    if layout != "NCHW":
        strides = ", ".join(str(level["reduction"]) for level in levels)
        raise UserError(
            f"{encoder.name}: UperNet needs levels as NCHW; {encoder.architecture} has {strides} as "
            f"{getattr(layout, 'value', layout)}; see whether transformers has it too, e.g. microsoft/swin-tiny-patch4-"
            "window7-224"
        )
    return TimmBackboneConfig(  # type: ignore[call-arg]
        backbone=encoder.architecture, out_indices=list(range(len(levels)))
    )


def load_timm_weights(backbone: nn.Module, encoder: TimmEncoder) -> tuple[list[str], int]:
    """Load the weights of an encoder into timm's features of the same architecture.

    Args:
        backbone: `TimmBackbone._backbone`.
        encoder: with a folder.

    Returns:
        The names of the tensors that the file does not have, or of another shape, and how many of the file are unused.

    Raises:
        UserError: the file is missing or damaged.
    """
    assert encoder.folder is not None
    try:
        tensors = load_file(encoder.folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{encoder.name}: no complete weights in safetensors format ({str(error).splitlines()[0]})"
        ) from None
    # timm's features name a module stages_0 or model.stages.0 where the file has stages.0
    saved = {key.replace(".", "_"): tensor for key, tensor in tensors.items()}
    state = backbone.state_dict()
    found = {}
    for key, tensor in state.items():
        match = saved.get(key.removeprefix("model.").replace(".", "_"))
        if match is not None and match.shape == tensor.shape:
            found[key] = match
    # this counter has no effect, and older files do not have it
    lost = [key for key in state if key not in found and not key.endswith("num_batches_tracked")]
    backbone.load_state_dict({**state, **found}, strict=True)
    return lost, len(tensors) - len(found)


def require_timm_architecture(name: str, architecture: str) -> None:
    """Raise `UserError` unless timm is installed and has an architecture; `name` is the model's."""
    try:
        import timm
    except ImportError:
        raise UserError(f"{name}: its encoder is one of timm: pip install timm, or 'hf_seg[train]'") from None
    if not timm.is_model(architecture) or "." in architecture:
        raise UserError(f"{name}: timm {timm.__version__} has no architecture {architecture!r}")


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Return `config.json` if it is one of timm's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None  # transformers says what is wrong with it
    return config if isinstance(config, dict) and "architecture" in config else None


def _in_folder(name: str, folder: Path, config: dict[str, Any]) -> TimmEncoder:
    architecture = str(config.get("architecture"))
    require_timm_architecture(name, architecture)
    if other := set(config.get("model_args") or {}) - _HARMLESS_ARGUMENTS:
        raise UserError(f"{name}/config.json has model_args that transformers cannot keep: {', '.join(sorted(other))}")
    try:
        published = config["pretrained_cfg"]
        mean, std = (tuple(map(float, published[key])) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{name}/config.json does not give mean and std in pretrained_cfg") from None
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"{name} takes images of {len(mean)} bands; supported are 3")
    return TimmEncoder(name, architecture, Normalization(mean, std), folder)
