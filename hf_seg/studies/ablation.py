"""The file of an ablation study.

A study is a YAML file. `steps` and `rows` are commands of this project (`run`) with their flags; `like` takes over the
flags of another one. In a flag `{name}` is the output of another step, `{seed}` the seed, `{output}` the step's own.
A row may also be a folder that another one wrote (`folder`), or the row that is best on val (`best_of`). Every row is
scored by `score`, where `{row}` is the row's output. `worlds` repeats all rows with other flags of some steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_seg.errors import UserError, file_errors
from hf_seg.settings import StrictLoader, nearest

PROJECT = Path(__file__).parents[2]
_PARTS = {"question", "worlds", "pool", "steps", "rows", "score", "comparisons"}


@dataclass(frozen=True)
class Comparison:
    """Two rows of a study, and what was expected of them before the run."""

    row: str
    against: str
    hypothesis: str


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        worlds: {world: {step or row: flags that differ there}}.
        pool: the worlds are parts of one dataset (folds), whose tiles are scored together.
        steps, rows: {name: flags}, `like` already resolved; `run` is the script.
    """

    name: str
    question: str
    worlds: dict[str, dict[str, dict[str, Any]]]
    pool: bool
    steps: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, Any]]
    score: dict[str, Any]
    comparisons: list[Comparison]


def read_study(path: Path) -> Study:
    """Read and check the file of a study.

    Raises:
        UserError: it cannot be read, or a part of it is missing, unknown, or refers to something that does not exist.
    """
    with file_errors(path, "cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        found = yaml.load(text, StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UserError) as error:
        raise UserError(f"{path} cannot be read as a study ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not {"question", "rows", "score", "comparisons"} <= found.keys() <= _PARTS:
        keys = sorted(found) if isinstance(found, dict) else []
        raise UserError(
            f"{path} must have question, rows, score, comparisons, and may have steps, worlds, pool; it has {keys}"
        )
    commands = {**found.get("steps", {}), **found["rows"]}
    steps = {name: _inherit(name, commands, path) for name in found.get("steps", {})}
    rows = {name: _inherit(name, commands, path) for name in found["rows"]}
    worlds = found.get("worlds") or {"": {}}
    for changed in worlds.values():
        require_known(changed, commands, path)
    comparisons = []
    for each in found["comparisons"]:
        if not isinstance(each, dict) or each.keys() != {"row", "against", "hypothesis"}:
            raise UserError(f"{path}: a comparison has row, against and hypothesis; this one is {each}")
        require_known([each["row"], each["against"]], rows, path)
        comparisons.append(Comparison(**each))
    pool = found.get("pool", False)
    return Study(path.stem, found["question"], worlds, pool, steps, rows, found["score"], comparisons)


def require_known(names: Any, known: Mapping[str, Any], path: Path) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path} has no step or row {name!r}{nearest(str(name), known)}")


def _inherit(
    name: str, commands: Mapping[str, dict[str, Any]], path: Path, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the flags of a step, those that it inherits by `like` or `best_of` included."""
    own = dict(commands[name])
    if own.keys() in ({"best_of"}, {"folder"}):
        require_known(own.get("best_of", []), commands, path)
        return own
    base = own.pop("like", None)
    if base is not None:
        require_known([base], commands, path)
        if base in (*seen, name):
            raise UserError(f"{path}: {name!r} inherits from itself")
        own = {**_inherit(base, commands, path, (*seen, name)), **own}
    script = own.get("run", "")
    if not (PROJECT / str(script)).is_file() or not str(script).endswith(".py"):
        raise UserError(
            f"{path}: run of {name!r} must be a script of this project, e.g. recipes/stage2.py; it is {script!r}"
        )
    return own
