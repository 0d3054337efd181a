"""Send the folder of a Gradio app to the Hub as a Space, and tell it which models to show."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import SPACES_SDK_TYPES

from hf_seg.errors import UserError, file_errors
from hf_seg.hub.cards import read_header
from hf_seg.hub.commit import Destination, UnconfirmedError
from hf_seg.hub_client import one_line

MODELS_VARIABLE = "MODELS"  # space/app.py reads it: Hub ids with spaces between them
_PACKAGE = Path(__file__).parents[1]
_APP_FILE = "app.py"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_space(folder: Path) -> bool:
    """Tell whether a folder contains an app for a Space: app.py, and a README.md whose header names its SDK."""
    return (folder / _APP_FILE).is_file() and (folder / "README.md").is_file() and _sdk_of(folder) is not None


def push_space(folder: Path, repository: str, models: Sequence[str] = (), *, private: bool = False) -> tuple[str, bool]:
    """Send an app in one commit, which deletes what the Space has besides; before it, set the variable of the models.

    Hidden files and folders are not sent. This package goes with an app that imports it, since a Space installs its
    requirements before it has the files.

    Args:
        folder: with app.py, README.md (its header names the SDK) and requirements.txt.
        repository: user/name; created if it is new.
        models: Hub ids, id or id@revision, that the app shows; none: the variable stays as it is.
        private: create it as private; an existing public one is refused.

    Returns:
        The address of the commit, and whether one of the models is private.

    Raises:
        UserError: the folder is no app, a model was not found, or the push failed.
    """
    sdk = _sdk_of(folder)
    if not is_space(folder) or sdk not in SPACES_SDK_TYPES:
        raise UserError(f"{folder} contains no app for a Space: app.py, and README.md with sdk: gradio in its header")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if "from hf_seg" in (folder / _APP_FILE).read_text(encoding="utf-8"):
        package = {path.relative_to(_PACKAGE.parent).as_posix(): path for path in sorted(_PACKAGE.rglob("*"))}
        found |= {name: path for name, path in package.items() if path.is_file()}
    contents: dict[str, Any] = {name: path for name, path in found.items() if _is_sent(name)}
    destination = Destination(repository, "space")
    needs_token = sum(_is_private(destination, model) for model in models) > 0  # all are looked for
    try:
        destination.open(private=private, hint="omit --private", space_sdk=sdk)
        if models:  # first, so that the app never starts without it
            destination.api.add_space_variable(repository, MODELS_VARIABLE, " ".join(models))
        return destination.commit(contents, "App of land-cover maps", _is_sent), needs_token
    except UnconfirmedError:
        raise
    except Exception as error:  # network, login, name: of many kinds
        command = ["python", "scripts/push_to_hub.py", str(folder), repository]
        command += ["--model", *models] if models else []
        command += ["--private"] if private else []
        raise UserError(f"{folder} is not on the Hub ({one_line(error)}); try again: {shlex.join(command)}") from None


def _sdk_of(folder: Path) -> str | None:
    with file_errors(folder / "README.md", "cannot be read"):
        card = (folder / "README.md").read_text(encoding="utf-8")
    return read_header(card, folder / "README.md").get("sdk")


def _is_private(destination: Destination, model: str) -> bool:
    """Tell whether a model on the Hub is private."""
    parsed = _HUB_ID.fullmatch(model)
    if parsed is None or Path(model).exists():
        raise UserError(
            f"--model {model}: a Space shows models of the Hub, org/name or org/name@revision; push it first"
        )
    try:
        return bool(destination.api.model_info(parsed[1], revision=parsed[2]).private)
    except Exception as error:  # network, login, name: of many kinds
        raise UserError(f"--model {model} was not found on the Hub ({one_line(error)}); push it first") from None


def _is_sent(name: str) -> bool:
    """Tell whether a file is part of the app; what the Hub or Python keeps for itself is not."""
    return not any(part.startswith(".") or part == "__pycache__" for part in name.split("/"))
