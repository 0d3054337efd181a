"""The settings of the four recipes. Each default is the headline recipe's; `hf_seg/settings.py` reads them."""

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_seg.errors import UserError
from hf_seg.files import write_atomic
from hf_seg.settings import LOCAL_PATHS_FILE, Settings, dump_yaml, read_settings, setting

_HUB_COMMIT = re.compile(r"(hf://datasets/)?[\w.-]+/[\w.-]+@[0-9a-f]{40}")  # as `pin_datasets` writes it
Tta = Literal["none", "flips", "d4", "paper"]
TRAINING_MEMORY_HINT = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps as much, or lower --cache_gib, "
    "--dataloader_num_workers or --crop_size; --resume_from_checkpoint latest resumes; hf-seg fit finds what fits"
)
PREDICTION_MEMORY_HINT = "lower --batch_size"


@dataclass(kw_only=True)
class HubSettings(Settings):
    """Upload to the Hub."""

    push_to_hub: bool = setting(False, "upload the finished output folder to hub_model_id", free=True)
    hub_model_id: str | None = setting(None, "repository on the Hub: user/name", free=True)
    hub_private_repo: bool = setting(False, "make the repository private", free=True)
    hub_revision: str | None = setting(None, "branch to push to, created if it is new; default: main", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_name = self.hub_model_id is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_model_id) is not None
        self.require("hub_model_id", is_name or not self.push_to_hub, "user/name to push to")


@dataclass(kw_only=True)
class ClassSettings(Settings):
    """Classes."""

    label_set: str | None = setting(
        None, "YAML file of the classes, or OpenEarthMap; default: the dataset.json's, else OpenEarthMap", path=True
    )


@dataclass(kw_only=True)
class DataSettings(Settings):
    """Data and output."""

    data_dir: str = setting(
        "data/dfc25_track1", "root of OpenEarthMap-SAR, or a dataset on the Hub", free=True, path=True
    )
    output_dir: str = setting("runs/stage2", "takes checkpoints, figures and the final model", free=True, path=True)
    keep_background: bool = setting(False, "learn class 0 (unknown) instead of ignoring it")


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """Model."""

    model_name_or_path: str = setting("nvidia/mit-b5", "encoder or whole model: Hub id, folder or preset", path=True)
    from_scratch: bool = setting(False, "random weights at the size of the named encoder or preset; no download")
    crop_size: int = setting(896, "training crop and inference window in pixels; a multiple of 32", low=32)
    head_width: int | None = setting(
        None, "channels of UperNet's decoder; default: 512, or 64 for a toy", low=8, high=2**14
    )
    lora_rank: int = setting(
        0, "rank of LoRA adapters on the encoder, which is frozen; 0: all is trained", low=0, high=2**14
    )
    lora_alpha: float = setting(16.0, "the adapters' output is scaled by this over lora_rank", above=0)
    lora_targets: list[str] = setting(
        ["all-linear"], "layers with adapters: all-linear, or ends of names of linear and convolutional ones"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("crop_size", self.crop_size % 32 == 0, "a multiple of 32")
        self.require("crop_size", self.crop_size <= 2**14, f"at most {2**14}")


@dataclass(kw_only=True)
class AugmentationSettings(Settings):
    """Augmentation of training images."""

    min_scale: float = setting(0.5, "smallest zoom of a crop", above=0, high=1e6)
    max_scale: float = setting(2.0, "largest zoom of a crop", above=0, high=1e6)
    max_class_share: float = setting(0.75, "redraw crops with a class above this share (10 tries)", above=0, high=1)
    jitter_prob: float = setting(0.5, "probability of radiometric jitter", low=0, high=1)
    rare_class_temperature: float = setting(
        0.0, "draw tiles by class, rare ones more often (DAFormer's T); 0: every tile equally often", low=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("max_scale", self.max_scale >= self.min_scale, f"at least min_scale, {self.min_scale}")


@dataclass(kw_only=True)
class OptimisationSettings(Settings):
    """Optimisation."""

    max_train_steps: int = setting(160_000, "optimizer steps", low=1, high=10**9, free=True)
    per_device_train_batch_size: int = setting(8, "images per process and micro-batch", low=1, high=2**14)
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimizer step", low=1, high=2**14)
    learning_rate: float = setting(6e-5, "peak rate of the encoder (AdamW)", above=0, high=1e6)
    head_lr_multiplier: float = setting(10.0, "rate of the heads over that of the encoder", above=0, high=1e6)
    weight_decay: float = setting(0.01, "none on norms and biases", low=0)
    warmup_steps: int = setting(1500, "optimizer steps of linear warm-up", low=0)
    lr_power: float = setting(1.0, "power of the polynomial decay to 0", low=0)
    max_grad_norm: float = setting(0.0, "clip the gradient's norm to this; 0: never", low=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("bf16", "arithmetic of the forward pass")
    # numpy's global generator takes 32 bits, and each process adds its index
    seed: int = setting(0, "fixes weights, sample order and augmentation", low=0, high=2**31)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_below = self.warmup_steps < self.max_train_steps
        self.require("warmup_steps", is_below, f"below max_train_steps, {self.max_train_steps}")


@dataclass(kw_only=True)
class RunSettings(Settings):
    """Validation, checkpoints and log."""

    eval_steps: int = setting(4000, "steps between validations; 0: never", low=0, free=True)
    eval_stride: float = setting(0.5, "step of the sliding window as a share of the crop", above=0, high=1)
    eval_batch_size: int = setting(4, "windows per forward pass at validation", low=1, free=True)
    checkpointing_steps: int = setting(4000, "steps between checkpoints; 0: only when stopped", low=0, free=True)
    save_total_limit: int = setting(2, "checkpoints kept, the newest ones", low=1, free=True)
    resume_from_checkpoint: str | None = setting(None, "'latest', or a checkpoint folder", free=True)
    logging_steps: int = setting(50, "steps between log lines", low=1, free=True)
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = setting(
        "tensorboard", "tracker; metrics.jsonl is written in any case", free=True
    )
    dataloader_num_workers: int = setting(
        4, "processes per training process that read and augment", low=0, high=256, free=True
    )
    cache_gib: float = setting(0.0, "memory for decoded training tiles, in GiB per process; 0: none", low=0, free=True)


@dataclass(kw_only=True)
class RecipeArguments(
    HubSettings, RunSettings, OptimisationSettings, AugmentationSettings, ModelSettings, ClassSettings, DataSettings
):
    """What every training recipe needs; each recipe adds its own fields."""


@dataclass(kw_only=True)
class Stage2Arguments(RecipeArguments):
    """Stage 2: a SAR network on noisy labels."""

    pseudo_labels: str | None = setting(None, "folder or Hub id of labels; default: the official ones", path=True)
    mask_nodata: bool = setting(True, "ignore pixels outside the SAR swath (zeros connected with the tile's border)")
    confidence_weights: bool = setting(False, "weigh each pixel's CE and RCE by its pseudo-label's confidence")
    native_stem: bool = setting(False, "one band: a stem that takes it alone, not the same band three times")
    jitter_gain: float = setting(0.2, "SAR jitter: the amplitude is multiplied by exp(U(-this, this))", low=0, high=2)
    speckle_prob: float = setting(0.0, "probability of extra multiplicative speckle", low=0, high=1)
    ce_weight: float = setting(1.0, "weight of cross entropy", low=0)
    gce_q: float = setting(0.0, "above 0: generalized cross entropy with this exponent in its place", low=0, high=1)
    rce_weight: float = setting(1.0, "weight of reverse cross entropy", low=0)
    lovasz_weight: float = setting(1.0, "weight of Lovász-softmax", low=0)
    lovasz_stride: int = setting(1, "Lovász-softmax of every n-th row and column; above 1 it is another loss", low=1)
    rce_epsilon: float = setting(1e-4, "probability of an absent class in reverse cross entropy", above=0, high=1)
    auxiliary_weight: float = setting(0.4, "weight of UperNet's auxiliary head in the loss", low=0)
    ema_decay: float = setting(
        0.0, "score and export a moving average of the weights with this decay; 0: the last weights", low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        has_confidence = self.pseudo_labels is not None or not self.confidence_weights
        self.require("confidence_weights", has_confidence, "false without --pseudo_labels")
        self.require("ce_weight", self.ce_weight + self.rce_weight + self.lovasz_weight > 0, "above 0 if no other is")


@dataclass(kw_only=True)
class Stage1Arguments(RecipeArguments):
    """Stage 1: an optical network, from labelled source to unlabelled target images."""

    source_dir: str = setting(
        "data/OpenEarthMap_wo_xBD", "root of OpenEarthMap, or a dataset on the Hub", free=True, path=True
    )
    output_dir: str = setting("runs/stage1", "takes checkpoints, figures, teacher and student", free=True, path=True)
    max_train_steps: int = setting(80_000, "optimizer steps", low=1, high=10**9, free=True)
    method: Literal["dacs", "source_only"] = setting("dacs", "self-training, or the source loss alone")
    select_best_by: Literal["source", "weight", "target"] = setting(
        "source",
        "what chooses best/: mIoU on the source, the mean weight (lambda) of the target's pseudo-labels, or mIoU on "
        "the target, whose labels make this no longer unsupervised",
    )
    raa_prob: float = setting(0.2, "probability of resolution alignment of a source image; 0: never", low=0, high=1)
    raa_min_scale: float = setting(0.1, "strongest downsampling, as a ratio of the side", above=0, high=1)
    raa_max_scale: float = setting(0.35, "weakest downsampling", above=0, high=1)
    raa_resampling: Literal["bilinear", "area"] = setting(
        "bilinear", "downsampling of the alignment: the paper's, or means over areas, as of a coarse sensor"
    )
    raa_max_upscale: float = setting(1.0, "largest zoom after it, cropped back to size; 1: none", low=1)
    ema_decay: float = setting(0.999, "weight of the teacher's past in each update, after its warm-up", low=0, high=1)
    teacher_batch_norm: Literal["batch", "running"] = setting(
        "batch",
        "the teacher's BatchNorm while it labels: statistics of the target batch, or the student's running ones",
    )
    confidence_threshold: float = setting(0.968, "a pixel above this counts towards its image's weight", low=0, high=1)
    strong_jitter_prob: float = setting(0.5, "probability of colour jitter of a mixed image", low=0, high=1)
    strong_blur_prob: float = setting(0.5, "probability of Gaussian blur of a mixed image", low=0, high=1)
    auxiliary_weight: float = setting(0.4, "weight of UperNet's auxiliary head in both losses", low=0)
    panel_steps: int = setting(1000, "steps between pictures of what is mixed and learned; 0: never", low=0, free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_range = self.raa_max_scale >= self.raa_min_scale
        self.require("raa_max_scale", is_range, f"at least raa_min_scale, {self.raa_min_scale}")
        by_weight = self.select_best_by == "weight" and self.method != "dacs"
        self.require("select_best_by", not by_weight, "source or target where method is not dacs")


@dataclass(kw_only=True)
class PredictionSettings(Settings):
    """Prediction."""

    tta: Tta = setting("none", "test-time augmentation: averages 1, 4, 8 views, or 4 at each of 6 scales")
    stride: float = setting(0.5, "step of the sliding window as a share of the crop", above=0, high=1)
    batch_size: int = setting(4, "windows per forward pass", low=1, free=True)
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "arithmetic of the forward pass")


@dataclass(kw_only=True)
class PseudoLabelArguments(HubSettings, PredictionSettings, ClassSettings):
    """Pseudo-labels: label tiles with one or more networks."""

    model: list[str] = setting(["runs/stage1"], "trained networks: folders or Hub ids", free=True, path=True)
    network: Literal["teacher", "student"] = setting("teacher", "which network of each stage-1 run labels")
    data_dir: str = setting(
        "data/dfc25_track1", "root of OpenEarthMap-SAR, or a dataset on the Hub", free=True, path=True
    )
    split: Literal["train", "val", "test"] = setting("train", "split to label")
    column: Literal["optical", "sar"] = setting(
        "optical", "which image of each tile the networks label; sar: a second round, by networks of stage 2"
    )
    output_dir: str = setting("runs/labels", "takes the dataset; if run again, it is completed", free=True, path=True)
    combine: Literal["average", "agreement"] = setting(
        "average", "several networks: the class of their mean; agreement also ignores pixels on which they disagree"
    )
    min_confidence: float = setting(0.0, "ignore pixels whose mean probability is below this", low=0, high=1)
    mask_nodata: bool = setting(False, "ignore pixels outside the SAR swath (zeros connected with the tile's border)")
    tiles_per_shard: int = setting(16, "tiles in a Parquet file, predicted and kept in memory together", low=1)


@dataclass(kw_only=True)
class EnsembleArguments(HubSettings, PredictionSettings, ClassSettings):
    """Ensemble: several SAR networks as one."""

    model: list[str] = setting(["runs/stage2"], "trained networks: folders or Hub ids (id@revision)", path=True)
    weights: list[float] | None = setting(None, "one for each network, above 0, in any unit; default: all equal")
    output_dir: str = setting("runs/ensemble", "takes the ensemble, its scores and figures", free=True, path=True)
    eval: bool = setting(True, "score the networks and the ensemble; false: export them unscored, without data")
    data_dir: str = setting(
        "data/dfc25_track1", "root of OpenEarthMap-SAR, or a dataset on the Hub", free=True, path=True
    )
    split: Literal["train", "val", "test"] = setting("val", "split to score on; it must have labels")
    column: Literal["sar", "optical"] = setting("sar", "which image of each tile the networks map")


def portable_settings(args: Settings) -> dict[str, Any]:
    """Return the settings that make the result, without what belongs to one launch or to this machine.

    Data folders are left out, but a commit of a dataset on the Hub stays; of other local paths (a model, pseudo-labels)
    the last part stays.
    """
    of_one_launch = {"resume_from_checkpoint", *(field.name for field in dataclasses.fields(HubSettings))}
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value, is_path = getattr(args, field.name), field.metadata["path"]
        is_folder = is_path and field.metadata["free"] and not isinstance(value, list)
        is_folder = is_folder and not (isinstance(value, str) and _HUB_COMMIT.fullmatch(value))
        if not is_folder and field.name not in of_one_launch:
            kept[field.name] = without_folders(value) if is_path else value
    return kept


def result_settings(args: Settings) -> dict[str, Any]:
    """Return those of `portable_settings` that change what is computed: a resumed run must have the same."""
    free = {field.name for field in dataclasses.fields(args) if field.metadata["free"]}
    return {key: value for key, value in portable_settings(args).items() if key not in free}


def without_folders(value: Any) -> Any:
    """Shorten a local path, or each of a list, to its last part; Hub ids and presets stay."""
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return Path(value).resolve().name if value is not None and Path(value).exists() else value


def dump_recipe(args: Settings) -> str:
    """Return `portable_settings` as YAML; as `--config`, with the data's place, they repeat the run."""
    return dump_yaml(portable_settings(args))


def write_recipe(args: Settings, folder: Path) -> None:
    """Write `recipe.yaml`, and `local_paths.yaml`: where the data lies on this machine, which is not shared."""
    fields = [field.name for field in dataclasses.fields(args) if field.metadata["path"] and field.name != "output_dir"]
    write_atomic(folder / "recipe.yaml", dump_recipe(args))
    write_atomic(folder / LOCAL_PATHS_FILE, dump_yaml({name: getattr(args, name) for name in fields}))


def check_same_recipe(args: Settings, recipe: Path, *, may_differ: Collection[str] = ()) -> None:
    """Raise `UserError` naming each setting that would make a resumed run another than the one of `recipe.yaml`.

    Args:
        may_differ: settings that are not compared.
    """
    if not recipe.exists():
        return
    before, now = read_settings(recipe, type(args)), result_settings(args)
    changed = [
        f"{key}: {before[key]!r} then, {value!r} now"
        for key, value in now.items()
        if key not in may_differ and before.get(key, value) != value
    ]
    if changed:
        raise UserError(
            f"{recipe.parent} began with other settings ({'; '.join(changed)}); "
            f"resume with --config {recipe}, or choose another --output_dir"
        )
