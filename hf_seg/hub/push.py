"""To the Hub: first make sure that a folder is whole, then send it in one commit, or say how to try again.

Nothing that is sent changes on disk, and the token stays with the Hub's client.
"""

import fnmatch
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_seg.arguments import HubSettings
from hf_seg.data.pseudo_label_dataset import sha256_of
from hf_seg.errors import UserError
from hf_seg.hub.cards import write_model_card
from hf_seg.inference.load import load_networks

_WEIGHTS = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
_RECORD = ("README.md", "recipe.yaml", "eval_results.json", "metrics.jsonl", "figures/*.png")
# What is sent of each kind of folder. Not checkpoints/, tracker/, half-written files, the many pictures of
# figures/mixes/, and best/, which is a model of its own: push_to_hub.py sends it if asked.
_SENT = {
    "model": (*_WEIGHTS, *_RECORD, *(f"student/{name}" for name in (*_WEIGHTS, "recipe.yaml", "eval_results.json"))),
    "ensemble": ("ensemble.json", *(f"member_*/{name}" for name in _WEIGHTS), *_RECORD),
    "dataset": ("manifest.json", "inputs.json", "data/*.parquet", *_RECORD),
}


def publish(folder: Path, args: HubSettings) -> None:
    """Finish a recipe's output folder: write its card if it is a model's, and push it if that was asked for.

    To be called by one process, last of all, when nobody waits for it any more.

    Raises:
        UserError: the push failed; the folder is as complete as without it.
    """
    if not (folder / "manifest.json").exists():
        write_model_card(folder)
    if args.push_to_hub and args.hub_model_id is not None:
        print(f"on the Hub: {push(folder, args.hub_model_id, args.hub_private_repo, args.hub_revision)}")


def check_login(repository: str) -> None:
    """Make sure that the Hub can be reached and that its client has a token that may write to a repository.

    Raises:
        UserError: what is missing, before hours of training show it.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("a push needs the Hub, but HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError(f"a push to {repository} needs a token: `hf auth login`, or the environment variable HF_TOKEN")
    try:
        validate_repo_id(repository)
        account = HfApi().whoami()
    except HFValidationError as error:
        raise UserError(f"{repository} is no name for a repository: {_one_line(error)}") from None
    except Exception as error:  # network, login: of many kinds
        raise UserError(f"the Hub does not accept the token, or is not to be reached ({_one_line(error)})") from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"the token of {account['name']} may only read; a push needs one that may write")
    names = [account["name"], *(each["name"] for each in account.get("orgs", []))]
    if (owner := repository.partition("/")[0]) not in names:
        raise UserError(f"{account['name']} cannot push to {repository}: {owner} is none of {', '.join(names)}")


def find_kind(folder: Path) -> str:
    """Tell what a folder holds: "model", "ensemble" or "dataset".

    Raises:
        UserError: none of them, or a dataset that is not finished.
    """
    if (folder / "inputs.json").exists() and not (folder / "manifest.json").exists():
        raise UserError(f"{folder} has no manifest.json yet: launch its recipe again to finish it")
    for kind, file in (("ensemble", "ensemble.json"), ("dataset", "manifest.json"), ("model", "config.json")):
        if (folder / file).is_file():
            return kind
    raise UserError(f"{folder} holds neither a model, nor an ensemble, nor pseudo-labels")


def check_whole(folder: Path) -> dict[str, Path]:
    """Make sure that everything that belongs to a folder is there, opens, and is ours.

    Returns:
        What is to be sent: name in the repository -> file.

    Raises:
        UserError: naming what is missing or damaged.
    """
    kind = find_kind(folder)
    files = _listed_files(folder) if kind == "dataset" else _own_files(folder, kind)
    for name in ("README.md", "recipe.yaml"):
        if name not in files:
            raise UserError(f"{folder} is not whole: it has no {name}")
    card = files["README.md"].read_text(encoding="utf-8")
    if not ModelCard(card).data.to_dict():
        raise UserError(f"{files['README.md']} has no header, by which the Hub would know what it is")
    if absent := [link for link in re.findall(r"\]\((figures/[^)]+)\)", card) if link not in files]:
        raise UserError(f"{folder} is not whole: its card shows {absent[0]}, which is not there")
    if kind == "ensemble":
        load_networks(folder)
    elif kind == "model":
        load_networks(folder)  # classes, crop, and every tensor
        if (folder / "student").is_dir():
            load_networks(folder, subfolder="student")
    return files


def _own_files(folder: Path, kind: str) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if _is_sent(name, kind)}


def _listed_files(folder: Path) -> dict[str, Path]:
    """Return the files of a dataset's manifest and itself, each proved to be what it was."""
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not whole: {name} of its manifest.json is not there")
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name} is not what manifest.json says: it is damaged, or was changed since")
    return {name: folder / name for name in (*listed, "manifest.json")}


def push(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Check a folder and send it to the Hub in one commit, which also removes our own files of an earlier push.

    Args:
        repository: user/name; made if it is new.
        private: make it private; a public one that is there already is refused.
        revision: branch, made if it is new; main if None.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder is not whole, or the push failed; how to try again.
    """
    files = check_whole(folder)
    place: dict[str, Any] = {
        "repo_id": repository,
        "repo_type": "dataset" if find_kind(folder) == "dataset" else "model",
    }
    api = HfApi()
    try:
        api.create_repo(**place, private=private or None, exist_ok=True)
        if private and not api.repo_info(**place).private:
            raise UserError("the repository is there already, and public: choose another name, or leave --private out")
        if revision is not None:
            api.create_branch(**place, branch=revision, exist_ok=True)
        there = api.list_repo_files(**place, revision=revision)
        stale = [name for name in there if name not in files and any(_is_sent(name, kind) for kind in _SENT)]
        contents: dict[str, Any] = {**files, **_rename(files, repository, revision)}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            **place,
            operations=[*operations, *map(CommitOperationDelete, stale)],
            commit_message=_describe(folder),
            revision=revision,
        )
    except Exception as error:  # network, login, name: of many kinds
        command = ["python", "scripts/push_to_hub.py", str(folder), repository]
        command += ["--private"] * private + (["--revision", revision] if revision else [])
        raise UserError(
            f"{folder} is whole and stays as it is, but is not on the Hub ({_one_line(error)}); try again: "
            f"{shlex.join(command)}"
        ) from None
    return commit.commit_url


def _is_sent(name: str, kind: str) -> bool:
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in _SENT[kind])
    return wanted and "/." not in name and not name.startswith("figures/mixes/")


def _rename(files: dict[str, Path], repository: str, revision: str | None) -> dict[str, bytes]:
    """Return the card, and the manifest that has its digest, with the repository in its code instead of the folder."""
    card = files["README.md"].read_text(encoding="utf-8")
    if (call := re.search(r'(model=|from_pretrained\(|load_dataset\()("[^"\n]+")', card)) is None:
        return {}  # a card that somebody wrote anew
    argument, pinned = (f', revision="{revision}"', f"@{revision}") if revision else ("", "")
    card = re.sub(
        rf"(model=|from_pretrained\(|load_dataset\(){re.escape(call[2])}", rf'\1"{repository}"{argument}', card
    )
    card = card.replace(call[2], f'"{repository}{pinned}"').replace("FOLDER_OR_HUB_ID", repository + pinned)
    renamed = {"README.md": card.encode()}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"].read_text(encoding="utf-8"))
        manifest["files"]["README.md"] = hashlib.sha256(renamed["README.md"]).hexdigest()
        renamed["manifest.json"] = json.dumps(manifest, indent=1).encode()
    return renamed


def _describe(folder: Path) -> str:
    """Return a commit message that says what this is: step and mIoU, as far as they are known."""
    if (folder / "manifest.json").exists():
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return f"Pseudo-labels of {manifest['n_tiles']} tiles, {manifest['labels_sha256'][:12]}"
    kind = "Ensemble" if (folder / "ensemble.json").exists() else "Model"
    if not (folder / "eval_results.json").exists():
        return f"{kind}, not scored"
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    step = f" of step {results['step']}" if "step" in results else ""
    return f"{kind}{step}, mIoU {results['mean_iou']:.4f}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(get_token() or "\0", "...")[:300]  # a server may repeat what it was sent
