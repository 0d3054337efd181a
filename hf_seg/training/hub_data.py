"""Datasets on the Hub in a run: one commit for all processes, and for a run that resumes."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_seg.data.hub_dataset import URI, find_hub_dataset, parse_hub_id
from hf_seg.errors import UserError
from hf_seg.settings import Settings, read_settings

_NAMES = ("source_dir", "data_dir", "pseudo_labels")


def pin_datasets(args: Any, accelerator: Accelerator, recipe: Path | None = None) -> None:
    """Write into the settings which commit of a dataset on the Hub is read: `org/name` becomes `org/name@commit`.

    To be called by every process; the first one asks the Hub.

    Args:
        args: settings, of which `data_dir`, `source_dir` and `pseudo_labels` count; folders stay.
        recipe: `recipe.yaml` of a run that resumes, whose commit is kept where no other revision is asked for.

    Raises:
        UserError: no such dataset, or another one than that of the run.
    """
    given = {name: value for name in _NAMES if (value := getattr(args, name, None)) is not None}
    if not any(parse_hub_id(value) for value in given.values()):
        return
    found: list[Any] = ["", {}]
    if accelerator.is_main_process:
        try:
            resumes = recipe is not None and recipe.exists() and isinstance(args, Settings)
            began = read_settings(recipe, type(args)) if resumes and recipe is not None else {}
            found[1] = {name: _pin(name, value, began.get(name), recipe) for name, value in given.items()}
        except UserError as error:
            found[0] = str(error)
    problem, pinned = broadcast_object_list(found)
    if problem:
        raise UserError(problem)
    for name, value in pinned.items():
        setattr(args, name, value)


def _pin(key: str, name: str, before: str | None, recipe: Path | None) -> str:
    """Return the name with its commit: that of the run that resumes, if it read the same dataset."""
    parsed = parse_hub_id(name)
    if parsed is None:
        return name
    repository, _, commit = (before or "").removeprefix(URI).partition("@")
    keeps = commit and parsed == (repository, None)
    hub = find_hub_dataset(f"{name}@{commit}" if keeps else name)
    if hub is None:
        return name
    if commit and (hub.repository, hub.revision) != (repository, commit):
        folder = recipe and recipe.parent
        raise UserError(
            f"{folder} began with {key} {before}; now it is {hub.repository}@{hub.revision}; "
            f"resume with --{key} {before}, or choose another --output_dir"
        )
    return f"{name.partition('@')[0]}@{hub.revision}"
