"""Settings: flat dataclasses, filled from a YAML file and then from the command line, or one clear error.

    args = parse_arguments(Stage2Arguments)      # sys.argv: --config recipe.yaml --learning_rate 1e-4 ...

Each default is the headline recipe's. A YAML file sets new defaults, the command line overrides them, and an unknown
key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_seg.errors import UserError
from hf_seg.strict_yaml import StrictDumper, StrictLoader, has_type


def setting(default: Any, help: str) -> Any:
    """One documented field of a settings dataclass."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class Settings:
    """What `parse_arguments` fills: fields with a default, some of them within `BOUNDS`."""

    config: str | None = setting(None, "YAML file with settings; the command line overrides it")

    def __post_init__(self) -> None:
        for key in dataclasses.asdict(self).keys() & BOUNDS.keys():
            low, high = BOUNDS[key]
            lower = "more than 0" if low == TINY else f"at least {low:g}"
            upper = "" if high == INFINITY else f" and at most {high:g}"
            self.require(key, low <= getattr(self, key) <= high, lower + upper)

    def require(self, key: str, holds: bool, what: str) -> None:
        """Raise `UserError` naming `key`, its value and what it must be, unless `holds`."""
        if not holds:
            raise UserError(f"{key} must be {what}; it is {getattr(self, key)!r}")


@dataclass(kw_only=True)
class HubSettings(Settings):
    """Where on the Hub the finished output folder of a recipe goes, if anywhere."""

    push_to_hub: bool = setting(False, "upload the finished output folder to hub_model_id")
    hub_model_id: str | None = setting(None, "repository on the Hub: user/name")
    hub_private_repo: bool = setting(False, "make the repository private")
    hub_revision: str | None = setting(None, "branch to push to, made if it is new; without it, main")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_name = self.hub_model_id is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_model_id) is not None
        self.require("hub_model_id", is_name or not self.push_to_hub, "user/name to push to")


@dataclass(kw_only=True)
class RecipeArguments(HubSettings):
    """What every training recipe needs; each recipe adds its own fields."""

    # data
    data_dir: str = setting("data/dfc25_track1", "root of OpenEarthMap-SAR, as released")
    output_dir: str = setting("runs/stage2", "where checkpoints, figures and the final model go")
    keep_background: bool = setting(False, "learn class 0 (unknown) instead of ignoring it")
    # model
    model_name_or_path: str = setting("nvidia/mit-b5", "encoder or whole model: Hub id, folder or preset")
    from_scratch: bool = setting(False, "random weights at the size of the named encoder or preset; no download")
    crop_size: int = setting(896, "training crop and inference window in pixels; a multiple of 32")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    # augmentation
    min_scale: float = setting(0.5, "smallest zoom of a crop")
    max_scale: float = setting(2.0, "largest zoom of a crop")
    max_class_share: float = setting(0.75, "redraw a crop in which one class covers more than this (10 tries)")
    jitter_prob: float = setting(0.5, "probability of radiometric jitter")
    # optimisation
    max_train_steps: int = setting(160_000, "optimizer steps")
    per_device_train_batch_size: int = setting(8, "images per process and micro-batch")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step")
    learning_rate: float = setting(6e-5, "peak rate of the encoder (AdamW)")
    head_lr_multiplier: float = setting(10.0, "rate of the heads over that of the encoder")
    weight_decay: float = setting(0.01, "none on norms and biases")
    warmup_steps: int = setting(1500, "optimizer steps of linear warm-up")
    lr_power: float = setting(1.0, "power of the polynomial decay to 0")
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this; 0: never")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("bf16", "arithmetic of the forward pass")
    seed: int = setting(0, "fixes weights, sample order and augmentation")
    # evaluation, checkpoints, log
    eval_steps: int = setting(4000, "steps between validations; 0: never")
    eval_stride: float = setting(0.5, "step of the sliding window as a share of the crop")
    eval_batch_size: int = setting(4, "windows per forward pass at validation")
    checkpointing_steps: int = setting(4000, "steps between checkpoints; 0: only when the run is stopped")
    save_total_limit: int = setting(2, "checkpoints kept, the newest ones")
    resume_from_checkpoint: str | None = setting(None, "'latest', or a checkpoint folder")
    logging_steps: int = setting(50, "steps between log lines")
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = setting(
        "tensorboard", "tracker; metrics.jsonl is written in any case"
    )
    dataloader_num_workers: int = setting(4, "processes per training process that read and augment")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("crop_size", self.crop_size % 32 == 0, "a multiple of 32")
        self.require("max_scale", self.max_scale >= self.min_scale, f"at least min_scale, {self.min_scale}")
        self.require(
            "warmup_steps", self.warmup_steps < self.max_train_steps, f"below max_train_steps, {self.max_train_steps}"
        )


INFINITY = float("inf")
TINY = sys.float_info.min
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_train_steps", "per_device_train_batch_size", "gradient_accumulation_steps"), (1, INFINITY)),
    **dict.fromkeys(("eval_batch_size", "save_total_limit", "logging_steps"), (1, INFINITY)),
    **dict.fromkeys(("warmup_steps", "eval_steps", "checkpointing_steps", "dataloader_num_workers"), (0, INFINITY)),
    **dict.fromkeys(("weight_decay", "lr_power", "max_grad_norm"), (0, INFINITY)),
    **dict.fromkeys(("ce_weight", "rce_weight", "lovasz_weight", "auxiliary_weight"), (0, INFINITY)),
    **dict.fromkeys(("learning_rate", "head_lr_multiplier", "min_scale", "max_scale"), (TINY, 1e6)),
    **dict.fromkeys(("eval_stride", "max_class_share", "rce_epsilon"), (TINY, 1)),
    **dict.fromkeys(("jitter_prob", "speckle_prob"), (0, 1)),
    **dict.fromkeys(("raa_prob", "strong_jitter_prob", "strong_blur_prob", "confidence_threshold"), (0, 1)),
    **dict.fromkeys(("raa_min_scale", "raa_max_scale"), (TINY, 1)),
    "raa_max_upscale": (1, INFINITY),
    "ema_decay": (0, 1),
    "panel_steps": (0, INFINITY),
    **dict.fromkeys(("batch_size", "tiles_per_shard"), (1, INFINITY)),
    "stride": (TINY, 1),
    "min_confidence": (0, 1),
    "crop_size": (32, INFINITY),
    "seed": (0, 2**31),  # numpy's global generator takes 32 bits, and each process adds its index
}


@dataclass(kw_only=True)
class Stage2Arguments(RecipeArguments):
    """Settings of `recipes/stage2.py`: a SAR network on noisy labels."""

    pseudo_labels: str | None = setting(None, "folder or Hub id of our pseudo-labels; without it the official ones")
    speckle_prob: float = setting(0.0, "probability of extra multiplicative speckle")
    ce_weight: float = setting(1.0, "weight of cross entropy")
    rce_weight: float = setting(1.0, "weight of reverse cross entropy")
    lovasz_weight: float = setting(1.0, "weight of Lovász-softmax")
    rce_epsilon: float = setting(1e-4, "probability of an absent class in reverse cross entropy")
    auxiliary_weight: float = setting(0.4, "weight of UperNet's auxiliary head in the loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("ce_weight", self.ce_weight + self.rce_weight + self.lovasz_weight > 0, "above 0 if no other is")


@dataclass(kw_only=True)
class Stage1Arguments(RecipeArguments):
    """Settings of `recipes/stage1.py`: an optical network, from labelled source to unlabelled target images."""

    source_dir: str = setting("data/OpenEarthMap_wo_xBD", "root of OpenEarthMap, as released")
    output_dir: str = setting("runs/stage1", "where checkpoints, figures and both networks go")
    max_train_steps: int = setting(80_000, "optimizer steps")
    method: Literal["dacs", "source_only"] = setting("dacs", "self-training, or the source loss alone")
    # resolution alignment augmentation of source images
    raa_prob: float = setting(0.2, "probability of resolution alignment; 0: never")
    raa_min_scale: float = setting(0.1, "strongest downsampling, as a ratio of the side")
    raa_max_scale: float = setting(0.35, "weakest downsampling")
    raa_max_upscale: float = setting(1.0, "largest zoom after it, cropped back to size; 1: none")
    # self-training
    ema_decay: float = setting(0.999, "weight of the teacher's past in each update, after its warm-up")
    confidence_threshold: float = setting(0.968, "a pixel above this counts towards its image's weight")
    strong_jitter_prob: float = setting(0.5, "probability of colour jitter of a mixed image")
    strong_blur_prob: float = setting(0.5, "probability of Gaussian blur of a mixed image")
    auxiliary_weight: float = setting(0.4, "weight of UperNet's auxiliary head in both losses")
    panel_steps: int = setting(1000, "steps between pictures of what is mixed and learned; 0: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "raa_max_scale", self.raa_max_scale >= self.raa_min_scale, f"at least raa_min_scale, {self.raa_min_scale}"
        )


@dataclass(kw_only=True)
class PseudoLabelArguments(HubSettings):
    """Settings of `recipes/pseudo_label.py`: label optical tiles with one or more stage-1 networks."""

    model: list[str] = dataclasses.field(
        default_factory=lambda: ["runs/stage1"], metadata={"help": "stage-1 folders or Hub ids (id@revision)"}
    )
    network: Literal["teacher", "student"] = setting("teacher", "which network of each stage-1 run labels")
    data_dir: str = setting("data/dfc25_track1", "root of OpenEarthMap-SAR, as released")
    split: Literal["train", "val", "test"] = setting("train", "split to label; it must have optical images")
    output_dir: str = setting("runs/labels", "where the dataset goes; launched again, it goes on with what is missing")
    # prediction
    tta: Literal["none", "flips", "d4", "paper"] = setting("none", "views averaged: 1, 4, 8, or 4 at each of 6 scales")
    stride: float = setting(0.5, "step of the sliding window as a share of the crop")
    batch_size: int = setting(4, "windows per forward pass")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "arithmetic of the forward pass")
    # labels
    combine: Literal["average", "agreement"] = setting(
        "average", "several networks: argmax of their mean, without or with ignoring pixels on which they disagree"
    )
    min_confidence: float = setting(0.0, "ignore pixels whose mean probability is below this; 0: none")
    ignore_sar_nodata: bool = setting(False, "ignore pixels beyond the SAR swath: exact zeros joined to the border")
    # dataset
    tiles_per_shard: int = setting(16, "tiles a Parquet file, and tiles whose probabilities are in memory at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("model", len(self.model) > 0, "one folder or Hub id, or more")
        self.require("combine", self.combine == "average" or len(self.model) > 1, "average for a single model")


@dataclass(kw_only=True)
class EnsembleArguments(HubSettings):
    """Settings of `recipes/ensemble.py`: several SAR networks as one."""

    members: list[str] = dataclasses.field(
        default_factory=lambda: ["runs/stage2"], metadata={"help": "trained networks: folders or Hub ids (id@revision)"}
    )
    weights: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "one for each member, above 0, in any unit; without them all are equal"}
    )
    output_dir: str = setting("runs/ensemble", "where the ensemble, its scores and figures go")
    # scores
    eval: bool = setting(True, "score the members and the ensemble; false: export them unscored, without data")
    data_dir: str = setting("data/dfc25_track1", "root of OpenEarthMap-SAR, as released")
    split: Literal["train", "val", "test"] = setting("val", "split to score on; it must have labels")
    column: Literal["sar", "optical"] = setting("sar", "which image of each tile the members map")
    tta: Literal["none", "flips", "d4", "paper"] = setting("none", "views averaged: 1, 4, 8, or 4 at each of 6 scales")
    stride: float = setting(0.5, "step of the sliding windows as a share of each member's crop")
    batch_size: int = setting(4, "windows per forward pass")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "arithmetic of the forward pass")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("members", len(self.members) > 0, "one folder or Hub id, or more")


# What belongs to one launch and not to the recipe.
HUB_SETTINGS = frozenset(field.name for field in dataclasses.fields(HubSettings)) - {"config"}
_LAUNCH_ONLY = {"config", "resume_from_checkpoint", *HUB_SETTINGS}

Arguments = TypeVar("Arguments", bound=Settings)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print forty flags and exit
        raise UserError(f"{message}; --help lists the settings")


def parse_arguments(settings: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Read settings from `--config FILE` and the command line.

    Args:
        settings: the recipe's dataclass.
        argv: the command line without the program's name; `sys.argv[1:]` if None.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type or value out of range, no such file.
    """
    parser = _Parser(cast(Any, settings), allow_abbrev=False, prog=Path(sys.argv[0]).name, description=settings.__doc__)
    known = [field.name for field in dataclasses.fields(settings)]
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}{nearest(unknown[0].split('=')[0].lstrip('-'), known, '--')}")
    if namespace.config is not None:
        parser.set_defaults(**_read_yaml(Path(namespace.config), settings))
        namespace = parser.parse_args(argv)
    return settings(**{name: getattr(namespace, name) for name in known})


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `"; did you mean 'x'?"` for the known key most like `key`, or an empty string."""
    matches = difflib.get_close_matches(key.replace("-", "_"), list(known), n=1)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


def _read_yaml(path: Path, settings: type[Settings]) -> dict[str, Any]:
    """Return the settings in a flat YAML file, each of the type that its field declares."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 (a SafeLoader)
        values = {} if values is None else values  # an empty file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as settings: {error}") from None
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: settings are lines of `key: value`; found a {type(values).__name__}")
    hints = typing.get_type_hints(settings)
    for key, value in values.items():
        if key not in hints or key == "config":
            raise UserError(f"{path}: unknown setting {key!r}{nearest(str(key), hints.keys() - {'config'})}")
        if not has_type(value, hints[key]):
            choices = typing.get_origin(hints[key]) is Literal and f"one of {typing.get_args(hints[key])}"
            wanted = choices or f"of type {getattr(hints[key], '__name__', hints[key])}"
            raise UserError(f"{path}: {key} must be {wanted}; it is {value!r} ({type(value).__name__})")
        if float in (hints[key], *typing.get_args(hints[key])) and value is not None:
            values[key] = float(value)
    return values


# What may differ when a run is resumed: where things lie, what is logged and kept, how long it goes on.
FREE_ON_RESUME = frozenset(
    (
        *("data_dir", "source_dir", "output_dir", "max_train_steps", "eval_steps", "eval_batch_size", "report_to"),
        *("checkpointing_steps", "save_total_limit", "logging_steps", "panel_steps", "dataloader_num_workers"),
        # pseudo-labels: models are told apart by what they are, not by where they lie
        *("gradient_checkpointing", "model", "batch_size", *HUB_SETTINGS),
    )
)


def dump_recipe(args: Settings) -> str:
    """Return the resolved settings as YAML; as `--config` they repeat the run."""
    values = {key: value for key, value in dataclasses.asdict(args).items() if key not in _LAUNCH_ONLY}
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def check_same_recipe(args: Settings, recipe: Path) -> None:
    """Refuse to resume a run under settings that would make it another run.

    Args:
        args: the settings of this launch.
        recipe: the `recipe.yaml` that the run began with.

    Raises:
        UserError: naming each setting that differs, its old and its new value.
    """
    if not recipe.exists():
        return
    began_with = _read_yaml(recipe, type(args))
    now = dataclasses.asdict(args)
    changed = [
        f"{key}: {began_with[key]!r} then, {now[key]!r} now"
        for key in began_with
        if key not in FREE_ON_RESUME and now[key] != began_with[key]
    ]
    if changed:
        raise UserError(
            f"{recipe.parent} began with other settings ({'; '.join(changed)}); "
            f"resume with --config {recipe}, or choose another --output_dir"
        )
