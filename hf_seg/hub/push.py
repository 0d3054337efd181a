"""Upload to the Hub: check that a folder is complete, then send it in one commit, or say how to try again.

Nothing that is sent changes on disk, and only the Hub's client reads the token.
"""

import fnmatch
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import validate_repo_id

from hf_seg.arguments import HubSettings
from hf_seg.errors import UserError, file_errors
from hf_seg.files import finish_update, sha256_of
from hf_seg.hub.cards import EVAL_RESULTS_FILE, read_header, write_model_card
from hf_seg.hub.commit import Destination, UnconfirmedError
from hf_seg.hub.export import TRAINING_DATA_FILE, read_record, without_paths
from hf_seg.hub_client import limit_waiting, one_line
from hf_seg.inference.load import load_networks

_WEIGHTS = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # of LoRA
_RECORD = (
    *("README.md", "recipe.yaml", TRAINING_DATA_FILE, "eval_results.json", "metrics.jsonl", "figures/*.png"),
    EVAL_RESULTS_FILE,
)
# What is sent of each kind of folder. Not local_paths.yaml, checkpoints/, tracker/, temporary files, the many pictures
# of figures/mixes/, nor best/, which is a model of its own: push_to_hub.py sends it if asked.
_SENT = {
    "model": (
        *_WEIGHTS,
        *_ADAPTER,
        *_RECORD,
        *(f"student/{name}" for name in (*_WEIGHTS, *_ADAPTER, "recipe.yaml", "eval_results.json")),
    ),
    "ensemble": ("ensemble.json", *(f"member_*/{name}" for name in _WEIGHTS), *_RECORD),
    "dataset": ("manifest.json", "inputs.json", "data/*.parquet", *_RECORD),
}


def publish(folder: Path, args: HubSettings) -> None:
    """Finish a recipe's output folder: write its card if it is a model's, and push it if that was asked for.

    To be called by one process, after all others have finished. If the push fails, which is a `UserError`, the folder
    is as complete as without it.
    """
    if not (folder / "manifest.json").exists():
        write_model_card(folder)
    if args.push_to_hub and args.hub_model_id is not None:
        print(f"on the Hub: {push(folder, args.hub_model_id, args.hub_private_repo, args.hub_revision)}")


def check_login(repository: str) -> None:
    """Raise `UserError` unless the Hub can be reached and its client has a token that may write to a repository."""
    if constants.HF_HUB_OFFLINE:
        raise UserError("a push needs the Hub, but HF_HUB_OFFLINE is set")
    if get_token() is None:
        raise UserError(f"a push to {repository} needs a token: `hf auth login`, or the environment variable HF_TOKEN")
    limit_waiting()
    try:
        validate_repo_id(repository)
        account = HfApi().whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        names = [account["name"], *(each["name"] for each in account.get("orgs", []))]
    except Exception as error:  # network, login, name: of many kinds
        raise UserError(
            f"the Hub cannot be reached, or does not accept the token or the name {repository} ({one_line(error)})"
        ) from None
    if role == "read":
        raise UserError(f"the token of {names[0]} may only read; a push needs one that may write")
    if (owner := repository.partition("/")[0]) not in names:
        raise UserError(f"{names[0]} cannot push to {repository}: {owner} is none of {', '.join(names)}")


def find_kind(folder: Path) -> str:
    """Return "model", "ensemble" or "dataset"; `UserError` if a folder contains none, or an unfinished dataset."""
    finish_update(folder)
    if (folder / "inputs.json").exists() and not (folder / "manifest.json").exists():
        raise UserError(f"{folder} has no manifest.json yet: launch its recipe again to finish it")
    for kind, file in (("ensemble", "ensemble.json"), ("dataset", "manifest.json"), ("model", "config.json")):
        if (folder / file).is_file():
            return kind
    raise UserError(f"{folder} contains no model, no ensemble and no pseudo-labels")


def check_complete(folder: Path) -> dict[str, Path]:
    """Make sure that a folder contains everything that belongs to it, and that its networks open.

    Returns:
        What is to be sent: name in the repository -> file.

    Raises:
        UserError: naming what is missing or damaged.
    """
    kind = find_kind(folder)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in found.items() if _is_sent(name, kind)}
    for name in ("README.md", "recipe.yaml"):
        if name not in files:
            raise UserError(f"{folder} is incomplete: it has no {name}")
    card = _read_card(files["README.md"])
    if not read_header(card, files["README.md"]):
        raise UserError(f"{files['README.md']} has no header, by which the Hub would know what it is")
    if missing := [link for link in re.findall(r"\]\((figures/[^)]+)\)", card) if link not in files]:
        raise UserError(f"{folder} is incomplete: its card shows {missing[0]}, which does not exist")
    if kind != "dataset":
        load_networks(folder)  # classes, crop, and every tensor
        if (folder / "student").is_dir():
            load_networks(folder, subfolder="student")
        return files

    listed = read_record(folder / "manifest.json").get("files")
    if not isinstance(listed, dict):
        raise UserError(f"{folder / 'manifest.json'} is damaged: it lists no files")
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {name}, which its manifest.json lists, does not exist")
        if sha256_of(folder / name) != digest:
            raise UserError(f"{folder / name} differs from its checksum in manifest.json: it is damaged or was edited")
    return {name: path for name, path in files.items() if name in listed or name == "manifest.json"}


def push(folder: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Check a folder and send it to the Hub in one commit, which also removes our own files of an earlier push.

    Args:
        repository: user/name; created if it is new.
        private: create it as private; an existing public one is refused.
        revision: branch, created if it is new; main if None.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder is incomplete, or the push failed; how to try again.
    """
    files, kind = check_complete(folder), find_kind(folder)
    try:
        destination = Destination(repository, "dataset" if kind == "dataset" else "model", revision)
        destination.open(private=private, hint="omit --private")
        contents: dict[str, Any] = {**files, **_rewrite(files, repository, revision)}
        url = destination.commit(
            contents, _commit_message(folder, kind), lambda name: any(_is_sent(name, each) for each in _SENT)
        )
    except Exception as error:  # network, login, name: of many kinds
        command = ["python", "scripts/push_to_hub.py", str(folder), repository]
        if private:
            command.append("--private")
        if revision is not None:
            command += ["--revision", revision]
        reason, again = one_line(error), shlex.join(command)
        if isinstance(error, UnconfirmedError):
            raise UserError(f"{error}: {again}") from None
        raise UserError(
            f"{folder} is complete and unchanged, but is not on the Hub ({reason}); try again: {again}"
        ) from None
    return url


def _is_sent(name: str, kind: str) -> bool:
    wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in _SENT[kind])
    return wanted and "/." not in name and not name.startswith("figures/mixes/")


def _rewrite(files: Mapping[str, Path], repository: str, revision: str | None) -> dict[str, bytes]:
    """Return the files that are sent with another content: local paths give way to the repository or a last part."""
    rewritten = {"README.md": _rename(_read_card(files["README.md"]), repository, revision).encode()}
    for name in ("ensemble.json", "eval_results.json", "inputs.json", "manifest.json"):  # the checksums last
        if name in files:
            found = without_paths(read_record(files[name]))
            if name == "manifest.json":
                sent = {each: hashlib.sha256(content).hexdigest() for each, content in rewritten.items()}
                listed = found["files"].items()
                found["files"] = {each: sent.get(each, digest) for each, digest in listed if each in files}
            rewritten[name] = json.dumps(found, indent=1).encode()
    return rewritten


def _rename(card: str, repository: str, revision: str | None) -> str:
    """Write the repository into a card's code, where it names the folder."""
    calls = r"(model=|from_pretrained\(|load_dataset\()"
    if (call := re.search(calls + r'("[^"\n]+")', card)) is None:
        return card  # written by the user
    argument, pinned = (f', revision="{revision}"', f"@{revision}") if revision else ("", "")
    card = re.sub(calls + re.escape(call[2]), rf'\1"{repository}"{argument}', card)
    return card.replace(call[2], f'"{repository}{pinned}"').replace("FOLDER_OR_HUB_ID", repository + pinned)


def _commit_message(folder: Path, kind: str) -> str:
    """Return a commit message that says what this is: step and mIoU, as far as they are known."""
    if kind == "dataset":
        manifest = read_record(folder / "manifest.json")
        return f"Pseudo-labels of {manifest['n_tiles']} tiles, {manifest['labels_sha256'][:12]}"
    results = read_record(folder / "eval_results.json")
    if not results:
        return f"{kind.capitalize()}, not scored"
    step = f" of step {results['step']}" if "step" in results else ""
    return f"{kind.capitalize()}{step}, mIoU {results['mean_iou']:.4f}"


def _read_card(path: Path) -> str:
    with file_errors(path, "cannot be read"):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None
