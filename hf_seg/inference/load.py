"""Trained networks from a folder or the Hub: a single model is an ensemble of one.

    for loaded in load_networks("runs/ensemble"):          # or org/name@revision
        loaded.network(), loaded.crop_size, loaded.normalization, loaded.weight

A model is a folder that stock transformers opens: config.json, model.safetensors, preprocessor_config.json. An ensemble
is a folder of such folders and

    ensemble.json    {"version", "masked_classes", "members": [{"folder", "origin", "crop", "weight", "revision"}, ...]}

A network or an ensemble that was exported to ONNX is one file, and counts as one network. The model classes of
transformers are imported only where a model of theirs is opened.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn

from hf_seg.bands import Bands
from hf_seg.errors import UserError, is_out_of_memory, shown
from hf_seg.files import finish_update, sha256_of
from hf_seg.hub_client import check_downloads, limit_waiting, one_line
from hf_seg.inference.exported import find_exported, open_exported
from hf_seg.label_sets import label_set_of, require_same_classes
from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP, LabelSet
from hf_seg.normalization import IMAGENET, Normalization

ENSEMBLE_FILE = "ensemble.json"
ENSEMBLE_FORMAT = {"version": 1, "masked_classes": [BACKGROUND]}
MOST_LABELS = 2**8  # a map is 8-bit
LARGEST_CROP = 2**14  # pixels
LARGEST_SIZE, MOST_BLOCKS = 2**16, 2**10  # of a layer, and of an encoder
NUMBERS_OF_HEADS = 10**8  # so many numbers of a network may be missing in its weights; loading says which
MODEL_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*")


@dataclass(eq=False, kw_only=True)
class LoadedNetwork:
    """One network and what a prediction needs to know of it.

    Args:
        crop_size: side in pixels of the crop that it was trained at, and of the window to predict with.
        normalization: of its input.
        bands: of its input, and their stretch to uint8; None: 8-bit SAR or RGB.
        weight: relative to the other networks of an ensemble.
        origin: folder or Hub id.
        revision: commit on the Hub; None for a folder.
        model, model_revision: name and commit of the model or ensemble that it was loaded with: the Hub id, or the last
            part of a folder, whose commit is None; no name for a network in memory.
        folder: of its files; None for a network in memory.
        module: the network, (B, bands, h, w) float32 -> logits (B, N, any, any), bare or as `.logits` of its output;
            None leaves it on disk.
        label_set: its N classes.
    """

    crop_size: int
    normalization: Normalization = IMAGENET
    bands: Bands | None = None
    weight: float = 1.0
    origin: str = "memory"
    revision: str | None = None
    model: str = ""
    model_revision: str | None = None
    folder: Path | None = None
    module: nn.Module | None = field(default=None, repr=False)
    label_set: LabelSet = OPEN_EARTH_MAP

    def network(self) -> nn.Module:
        """Return the network; one left on disk is loaded, in eval mode, and lives while the caller keeps it."""
        if self.module is not None:
            return self.module
        assert self.folder is not None
        return _open_model(self.folder, str(self.folder)).eval()

    @property
    def name(self) -> str:
        """The Hub id, or the last part of the folder: a name that may be published."""
        return self.origin if self.revision else Path(self.origin).resolve().name

    @functools.cached_property
    def sha256(self) -> str | None:
        """Digest of the files of weights, config and processor, in hexadecimal; None for a network in memory."""
        if self.folder is None:
            return getattr(self.module, "sha256", None)  # an exported network has one of its file
        files = sorted([*self.folder.glob("*config.json"), *self.folder.glob("*.safetensors")])
        return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def load_networks(
    name: str | Path, *, subfolder: str = "", low_memory: bool = False, **hub: Any
) -> list[LoadedNetwork]:
    """Load a trained network, or the networks of an ensemble.

    Args:
        name: folder, or Hub id; `id@revision` pins a commit, branch or tag; or an exported network, a file .onnx or
            the folder that contains it.
        subfolder: folder of a single network in it, e.g. "student".
        low_memory: leave the networks on disk, to be loaded one at a time.
        hub: settings of `snapshot_download`: revision (that of the name wins), token, cache_dir, force_download,
            local_files_only.

    Returns:
        The networks, in eval mode.

    Raises:
        UserError: not found, incomplete or damaged, not of this project, or members of different classes; the message
            names it.
    """
    if not subfolder and (exported := find_exported(str(name))):
        return [_describe_exported(exported, str(name))]
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [f"{prefix}{file}" for file in MODEL_FILES]
    if not subfolder:
        patterns += [ENSEMBLE_FILE, *(f"member_*/{file}" for file in MODEL_FILES)]
    root, revision = find_folder(str(name), patterns, **hub)
    folder = root / subfolder
    finish_update(folder)
    if not subfolder and (folder / ENSEMBLE_FILE).is_file():
        networks = _read_ensemble(folder, str(name))
    elif (folder / "config.json").is_file():
        networks = [_describe(folder, str(name), origin=str(name).partition("@")[0] if revision else str(name))]
        networks[0].revision = revision
    elif subfolder:
        raise UserError(f"{name} has no folder {subfolder} with a model")
    else:
        raise UserError(f"{name} is neither a model nor an ensemble: it has no config.json and no {ENSEMBLE_FILE}")
    for loaded in networks:
        loaded.model = str(name).partition("@")[0] if revision else folder.resolve().name
        loaded.model_revision = revision
        if not low_memory:
            loaded.module = loaded.network()
    return networks


def use_network(
    module: nn.Module, *, crop_size: int | None = None, label_set: LabelSet = OPEN_EARTH_MAP
) -> LoadedNetwork:
    """Describe a network in memory.

    Args:
        module: a stock model that came from a folder or the Hub brings its crop size and normalisation; one that
            was built has the normalisation of its encoder, any other module ImageNet's.
        crop_size: replaces that of the model.
        label_set: the classes of a module that is no stock model; those know theirs.

    Raises:
        UserError: the crop size is unknown, or the model is not of this project.
    """
    from transformers import SegformerForSemanticSegmentation, UperNetForSemanticSegmentation

    from hf_seg.models import SegmentationNetwork
    from hf_seg.stem import input_bands_of

    described, bands = None, None
    if isinstance(module, SegformerForSemanticSegmentation | UperNetForSemanticSegmentation):
        described, bands = _find_processor(module), input_bands_of(module)
        module = SegmentationNetwork(module)  # stock UperNet would also compute its auxiliary head
    if described is None and crop_size is None:
        raise UserError("this network does not tell the crop that it was trained at: pass window=..., in pixels")
    of_encoder = IMAGENET
    if isinstance(module, SegmentationNetwork):
        of_encoder, label_set = module.normalization, label_set_of(module.model.config.to_dict(), "this network")
    crop, normalization = described or (0, of_encoder)
    return LoadedNetwork(
        crop_size=crop_size or crop, normalization=normalization, bands=bands, module=module, label_set=label_set
    )


def normalized_weights(networks: Sequence[LoadedNetwork]) -> list[float]:
    """Return the networks' weights, scaled to a sum of 1.

    Raises:
        UserError: no network, or a weight that is not above 0.
    """
    if not networks:
        raise UserError("an ensemble needs one network or more")
    for network in networks:
        if not 0 < network.weight < math.inf:
            raise UserError(f"the weight of {network.origin} must be above 0 and finite; it is {network.weight}")
    total = sum(each.weight for each in networks)
    if total == math.inf:
        raise UserError(f"the weight of {networks[0].origin} and those of the others have an infinite sum; divide them")
    return [network.weight / total for network in networks]


def shared_bands(networks: Sequence[LoadedNetwork]) -> Bands | None:
    """Return the bands that all networks take; None for 8-bit SAR or RGB images.

    Raises:
        UserError: they differ, or are stretched differently.
    """
    bands = {each.bands for each in networks}
    if len(bands) > 1:
        found = " and ".join(sorted({", ".join(each.names) if each else "8-bit images" for each in bands}))
        raise UserError(f"networks of one ensemble take the same bands with the same stretch; these take {found}")
    return bands.pop()


def common_label_set(networks: Sequence[LoadedNetwork]) -> LabelSet:
    """Return the classes of networks that are used together; `UserError` where two networks disagree."""
    first, *others = networks
    for other in others:
        require_same_classes(first.label_set.names, other.label_set.names, first.origin, other.origin)
    return first.label_set


def find_folder(name: str, patterns: Sequence[str], **hub: Any) -> tuple[Path, str | None]:
    """Find a folder, or fetch its files from the Hub.

    Args:
        name: folder, or Hub id; `id@revision` pins a commit, branch or tag.
        patterns: the files that are needed.
        hub: settings of `snapshot_download`; its `revision` is weaker than that of the name.

    Returns:
        The folder, and the commit if it came from the Hub.

    Raises:
        UserError: neither.
    """
    if Path(name).is_dir():
        return Path(name), None
    repository, _, pinned = name.partition("@")
    hub["revision"] = pinned or hub.get("revision")
    limit_waiting()
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(patterns), **hub))
    except Exception as error:  # network, login, name: the Hub's client raises many kinds; each is about this name
        reason = one_line(error).partition(" To enable")[0][:200]
        raise UserError(
            f"{name} was not found locally or on the Hub ({reason}); check the name and the network; a private "
            "repository needs `hf auth login` or token=..."
        ) from None
    check_downloads((path for pattern in patterns for path in folder.glob(pattern)), name)
    return folder, folder.name  # a snapshot is named by its commit


def _describe(folder: Path, name: str, **known: Any) -> LoadedNetwork:
    """Describe the model in a folder without loading it."""
    if absent := [pattern for pattern in MODEL_FILES if not any(folder.glob(pattern))]:
        raise UserError(f"{name} is incomplete: it has no {absent[0]}; fetch or export it again")
    crop_size, normalization = _read_processor(folder)
    config = _read_config(folder, name)
    try:
        bands = Bands.from_config(getattr(config, "input_bands", None))
    except ValueError as error:
        raise UserError(f"{name}: config.json cannot be read ({error})") from None
    known["label_set"] = label_set_of(config.to_dict(), name)
    return LoadedNetwork(crop_size=crop_size, normalization=normalization, bands=bands, folder=folder, **known)


def _describe_exported(path: Path, name: str) -> LoadedNetwork:
    """Open an exported network, which takes pixels as they are: it normalises them itself."""
    module = open_exported(path)
    metadata = module.metadata
    return LoadedNetwork(
        crop_size=metadata.crop_size,
        normalization=Normalization(mean=(0.0,) * metadata.bands, std=(1.0,) * metadata.bands, scale=1.0),
        bands=metadata.stretch,
        origin=name,
        model=metadata.name,
        model_revision=metadata.revision,
        module=module,
        label_set=metadata.label_set,
    )


def _read_config(folder: Path, name: str) -> Any:
    """Return the config of a model in a folder, of an architecture that is supported."""
    from transformers import AutoConfig

    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not content.get("num_labels", 0) <= MOST_LABELS:
            raise ValueError(f"expected a mapping of at most {MOST_LABELS} labels")  # transformers would make them all
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks little, so any kind may come; each is about this file
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: config.json cannot be read ({reason})") from None
    if config.model_type not in ("segformer", "upernet"):
        raise UserError(f"{name} is a {config.model_type}, no segmentation model of this project")
    return config


def _read_processor(folder: Path) -> tuple[int, Normalization]:
    """Return the crop size and the normalisation that the image processor of a folder has."""
    try:
        processor = _processor_settings(folder)
        scale = 1 / processor["rescale_factor"] if processor["do_rescale"] else 1.0
        found = ([0.0] * 3, [1.0] * 3)
        if processor["do_normalize"]:
            found = processor["image_mean"], processor["image_std"]
        mean, std = (tuple(map(float, each)) for each in found)
        crop = int(processor["size"]["height"])
        if not (1 <= crop <= LARGEST_CROP and len(mean) == len(std) > 0 and 0 < scale < math.inf):
            raise ValueError(f"size {crop}, factor 1 / {scale}, {len(mean)} means and {len(std)} deviations")
        if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise ValueError(f"mean {shown(mean)}, std {shown(std)}")
        return crop, Normalization(mean, std, scale)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{folder}/preprocessor_config.json is not one that this project writes ({' '.join(str(error).split())})"
        ) from None


def _processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an image processor, as its file has them if that is complete.

    Only where a setting is absent, the class that knows its default is asked: its import takes seconds (torchvision).
    """
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    needed = {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "size"}
    if isinstance(settings, dict) and needed <= settings.keys() and isinstance(settings["size"], dict):
        return settings
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return {name: getattr(processor, name) for name in needed}


def _find_processor(model: Any) -> tuple[int, Normalization] | None:
    """Find the image processor saved with a stock model in memory; None if the model was built, not loaded."""
    if not model.name_or_path:
        return None
    try:
        revision = getattr(model.config, "_commit_hash", None)
        folder, _ = find_folder(model.name_or_path, ["preprocessor_config.json"], revision=revision)
        return _read_processor(folder)
    except UserError:
        return None


def _open_model(folder: Path, name: str) -> nn.Module:
    """Load every tensor of a model, as a `SegmentationNetwork`."""
    from transformers import SegformerForSemanticSegmentation, UperNetForSemanticSegmentation

    from hf_seg.models import SegmentationNetwork, load_weights, require_supported

    config = _read_config(folder, name)
    require_supported(name, config)
    stock = SegformerForSemanticSegmentation if config.model_type == "segformer" else UperNetForSemanticSegmentation
    _require_plausible(stock, config, folder, name)
    return SegmentationNetwork(load_weights(stock, str(folder), config, is_whole=True))


def _require_plausible(stock: Any, config: Any, folder: Path, name: str) -> None:
    """Build a model without memory for its weights, to see whether it may be that of the files.

    Raises:
        UserError: the config describes no network, or a far larger one than the weights are of.
    """
    sizes, blocks = _whole_numbers(config.to_dict()), _whole_numbers(getattr(config, "depths", 0))
    if max(sizes) > LARGEST_SIZE or sum(blocks) > MOST_BLOCKS:
        raise UserError(f"{name}: config.json describes a network that is too large: {shown(max(sizes + blocks))}")
    try:
        with torch.device("meta"):
            numbers = sum(tensor.numel() for tensor in stock(config).state_dict().values())
    except Exception as error:  # transformers checks little, so any kind may come; each is about this file
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: config.json describes no network ({reason})") from None
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))  # a number takes 2 or 4 bytes
    if numbers > size + NUMBERS_OF_HEADS:
        raise UserError(
            f"{name}: config.json describes a network of {numbers:,d} numbers, but its weights take {size:,d} bytes; "
            "one of them is of another model"
        )


def _whole_numbers(value: Any) -> list[int]:
    """Return all whole numbers in lists and mappings, and 0."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [number for each in value for number in _whole_numbers(each)] + [0]
    return [value if type(value) is int else 0]


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"revision must be text or null; it is {shown(value)}")
    return value


def _read_ensemble(folder: Path, name: str) -> list[LoadedNetwork]:
    """Read `ensemble.json` and find its networks complete."""
    path = folder / ENSEMBLE_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found_format = {key: config[key] for key in ENSEMBLE_FORMAT}
        members: list[dict[str, Any]] = [
            {
                "member": Path(entry["folder"]).name,
                "crop": int(entry["crop"]),
                "weight": float(entry["weight"]),
                "origin": str(entry["origin"]),
                "revision": _text_or_none(entry["revision"]),
            }
            for entry in config["members"]
        ]
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} does not list members as this version writes them ({shown(error)}); export it again"
        ) from None
    if found_format != ENSEMBLE_FORMAT:
        raise UserError(f"{path} has another format, {found_format}, than this version reads, {ENSEMBLE_FORMAT}")
    networks = []
    for entry in members:
        member, crop = entry.pop("member"), entry.pop("crop")
        loaded = _describe(folder / member, f"{name}/{member}", **entry)
        if loaded.crop_size != crop:
            raise UserError(
                f"{name}/{member} has crop size {loaded.crop_size}, but {ENSEMBLE_FILE} says {crop}; export it again"
            )
        networks.append(loaded)
    normalized_weights(networks)  # what is wrong with them shows before anything is loaded
    common_label_set(networks)
    return networks
