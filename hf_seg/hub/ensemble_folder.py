"""An ensemble on disk: `ensemble.json`, and each member in a folder of its own that stock transformers opens alone.

ensemble.json    {"version", "masked_classes", "members": [{"folder", "origin", "crop", "weight", "revision"}, ...]}
member_0/        config.json, model.safetensors, preprocessor_config.json
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from transformers import AutoImageProcessor

from hf_seg.errors import UserError
from hf_seg.hub.export import image_processor
from hf_seg.labels import BACKGROUND
from hf_seg.models import SegmentationNetwork, load_trained

CONFIG_FILE = "ensemble.json"
MODEL_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors*")
_FORMAT = {"version": 1, "masked_classes": [BACKGROUND]}
_INPUT_SETTINGS = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


@dataclass(frozen=True)
class Member:
    """Where one network of an ensemble came from, and its part in it."""

    origin: str  # folder or Hub id
    crop: int  # side of its sliding window in pixels: the crop that it was trained at
    weight: float = 1.0  # relative to the other members
    revision: str | None = None  # commit on the Hub; None for a folder


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
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(patterns), **hub))
    except Exception as error:  # network, login, name: the Hub's client raises many kinds; each is about this name
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is neither a folder nor to be had from the Hub now ({reason}); a private repository needs "
            "`hf auth login` or token=..."
        ) from None
    return folder, folder.name  # a snapshot is named by its commit


def load_member(folder: Path, name: str, crop: int | None = None) -> tuple[SegmentationNetwork, int]:
    """Load one network of an ensemble and the crop size that it was trained at.

    Args:
        name: what the user knows it as.
        crop: what the crop size must be; any if None.

    Raises:
        UserError: naming a member that is absent, damaged, of other classes, crop or normalisation.
    """
    if (folder / CONFIG_FILE).exists():
        raise UserError(f"member {name} is itself an ensemble; name its members, {name}/member_0 for one")
    try:
        model, found = load_trained(str(folder))
    except UserError as error:
        raise UserError(f"member {name}: {error}") from None
    if crop is not None and crop != found:
        raise UserError(
            f"member {name} has crop size {found}, but {CONFIG_FILE} says {crop}; export the ensemble again"
        )
    theirs, ours = AutoImageProcessor.from_pretrained(folder), image_processor(found)
    for setting in _INPUT_SETTINGS:
        value, expected = (np.array(getattr(each, setting)).tolist() for each in (theirs, ours))
        if value != expected:
            raise UserError(f"member {name} was trained on another input: {setting} is {value}, ours is {expected}")
    return SegmentationNetwork(model).eval(), found


def read_ensemble(folder: Path, name: str) -> tuple[list[Member], list[Path]]:
    """Read `ensemble.json`, and find the members' folders whole.

    Raises:
        UserError: no ensemble, one of another format, or a member without all its files.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{name} is no ensemble: it has no {CONFIG_FILE} (a single network opens with "
            "AutoModelForSemanticSegmentation, and an export that was cut short has to be made again)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        form = {key: config[key] for key in _FORMAT}
        members = [
            Member(str(entry["origin"]), int(entry["crop"]), float(entry["weight"]), entry["revision"])
            for entry in config["members"]
        ]
        folders = [folder / Path(entry["folder"]).name for entry in config["members"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not list members as this version writes them ({error!r}); export it again"
        ) from None
    if form != _FORMAT:
        raise UserError(f"{path} is of another format, {form}, than this version reads, {_FORMAT}")
    for member_folder in folders:
        if absent := [pattern for pattern in MODEL_FILES if not any(member_folder.glob(pattern))]:
            raise UserError(f"{name} is not whole: {member_folder.name} has no {absent[0]}; fetch or export it again")
    return members, folders


def write_ensemble(folder: Path, members: Sequence[Member], writers: Sequence[Callable[[Path], None]]) -> None:
    """Write an ensemble, aside at first, and put it in the place of one that was there.

    Whatever interrupts this, the folder never opens as a mixture of both: `ensemble.json` goes first and comes last.

    Args:
        folder: other files in it stay.
        writers: of each member, called with the folder, not yet there, that is to be its own.
    """
    aside = folder / ".partial"
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    names = [f"member_{index}" for index in range(len(members))]
    for name, write in zip(names, writers, strict=True):
        write(aside / name)
    listed = [{"folder": name, **asdict(member)} for name, member in zip(names, members, strict=True)]
    (aside / CONFIG_FILE).write_text(json.dumps({**_FORMAT, "members": listed}, indent=1), encoding="utf-8")

    (folder / CONFIG_FILE).unlink(missing_ok=True)
    for old in folder.glob("member_*"):
        shutil.rmtree(old)
    for name in (*names, CONFIG_FILE):
        os.replace(aside / name, folder / name)
    aside.rmdir()


def write_network(network: SegmentationNetwork, crop: int, folder: Path) -> None:
    """Write a member from memory."""
    network.model.save_pretrained(folder)
    image_processor(crop).save_pretrained(folder)


def copy_network(source: Path, folder: Path) -> None:
    """Write a member from the folder that it lies in."""
    folder.mkdir()
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def scale_weights(weights: Sequence[float], names: Sequence[str]) -> list[float]:
    """Scale the members' weights to a sum of 1.

    Raises:
        UserError: no member, not one weight for each, or a weight that is not above 0.
    """
    if not names:
        raise UserError("an ensemble needs one member or more")
    if len(weights) != len(names):
        raise UserError(f"{len(weights)} weight(s) for {len(names)} member(s): give one for each, or none")
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < math.inf:
            raise UserError(f"the weight of {name} must be above 0 and finite; it is {weight}")
    return [weight / sum(weights) for weight in weights]
