"""The plan of an ablation study: which commands it needs, in which order, and which of them are done.

A step is identified by what determines its result: its flags and those of the steps it uses, the settings and files
that they name, and the code.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hf_seg.errors import UserError
from hf_seg.files import sha256_of
from hf_seg.settings import StrictLoader
from hf_seg.studies.ablation import PROJECT, Study, require_known

NO_EFFECT = ("hub", "mapping", "report", "studies")  # folders of the package that change no weights and no scores
LIBRARIES = ("torch", "transformers", "timm", "albumentations", "numpy", "opencv-python-headless")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        folder: of its output, named by what determines the result.
        flags: with the folders of other steps in place.
        parents: steps that must be done before.
    """

    script: str
    folder: Path
    flags: dict[str, Any]
    parents: tuple["Step", ...]

    @property
    def record(self) -> Path:
        """The file that says that the step is done."""
        return self.folder.with_suffix(".json")

    def command(self) -> list[str]:
        """Return the script and its flags as words of a command line."""
        words = [self.script]
        for flag, value in self.flags.items():
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(each if isinstance(each, str) else json.dumps(each) for each in values)]
        return words


class Plan:
    """All commands of a study for some seeds.

    Attributes:
        steps: each once, parents first.
        worlds: those that are planned.
        scores: {(world, row, seed): the step whose output has the row's score}.
        trained: {(world, row, seed): the step of the row itself}.
        choices: {(world, row, seed): the rows of which the one with the best own validation score counts}.
    """

    def __init__(
        self,
        study: Study,
        seeds: Sequence[int],
        root: Path,
        rows: Sequence[str] | None = None,
        worlds: Sequence[str] | None = None,
    ) -> None:
        require_known(rows or [], study.rows, Path(study.name))
        require_known(worlds or [], study.worlds, Path(study.name))
        self.worlds = [*(worlds or study.worlds)]
        self.study = study
        self._chosen = set(rows or study.rows)
        self.root = root
        self.steps: list[Step] = []
        self._known: dict[str, Step] = {}
        self.scores: dict[tuple[str, str, int], Step] = {}
        self.trained: dict[tuple[str, str, int], Step] = {}
        self.choices: dict[tuple[str, str, int], list[str]] = {}
        for world in self.worlds:
            for seed in seeds:
                self._add_world(world, seed)
        self._require_seeds(seeds)

    def _add_world(self, world: str, seed: int) -> None:
        for name, flags in self.study.rows.items():
            if name not in self._chosen:
                continue
            if "best_of" in flags:
                self.choices[world, name, seed] = list(flags["best_of"])
                continue
            row, inner = self._row(flags, name, world, seed)
            score_flags = {
                flag: _fill(value, seed, {"row": f"{{row}}{inner}"}) for flag, value in self.study.score.items()
            }
            self.trained[world, name, seed] = row
            self.scores[world, name, seed] = self._add(score_flags, world, seed, {"row": row})

    def _row(self, flags: Mapping[str, Any], name: str, world: str, seed: int) -> tuple[Step, str]:
        """Return the step of a row, and the path of its model inside the step's folder."""
        if "folder" not in flags:
            return self._resolve(name, world, seed), ""
        match = re.fullmatch(r"\{(\w+)\}(/.*)?", flags["folder"])
        if match is None:
            raise UserError(f"study {self.study.name}: folder of {name!r} must be like {{step}}/student")
        return self._resolve(match[1], world, seed), match[2] or ""

    def _resolve(self, name: str, world: str, seed: int) -> Step:
        flags = {**self.study.steps, **self.study.rows}.get(name)
        if flags is None:
            raise UserError(f"study {self.study.name}: {{{name}}} is no step, no row and neither seed nor output")
        return self._add({**flags, **self.study.worlds[world].get(name, {})}, world, seed, {})

    def _add(self, flags: Mapping[str, Any], world: str, seed: int, known: dict[str, Step]) -> Step:
        """Add a step and those it uses; return it, or the equal one that the plan has."""
        parents = dict(known)
        for name in sorted({match for value in flags.values() for match in _PLACEHOLDER.findall(str(value))}):
            if name not in ("seed", "output", *parents):
                parents[name] = self._resolve(name, world, seed)
        script = str(flags["run"])
        own = {flag: value for flag, value in flags.items() if flag != "run"}
        named = {
            flag: _fill(value, seed, {name: step.folder.name for name, step in parents.items()})
            for flag, value in own.items()
        }
        key = hashlib.sha256(json.dumps([script, _inputs(named), code_of(script)], sort_keys=True).encode()).hexdigest()
        folder = self.root / f"{Path(script).stem}-{key[:12]}"
        if folder.name not in self._known:
            places = {**{name: str(step.folder) for name, step in parents.items()}, "output": str(folder)}
            filled = {flag: _fill(value, seed, places) for flag, value in own.items()}
            self._known[folder.name] = Step(script, folder, filled, tuple(parents.values()))
            self.steps.append(self._known[folder.name])
        return self._known[folder.name]

    def _require_seeds(self, seeds: Sequence[int]) -> None:
        for world, name, _ in self.scores:
            if len({self.scores[world, name, seed].folder for seed in seeds}) < len(seeds):
                raise UserError(f"study {self.study.name}: row {name!r} does not depend on {{seed}}")


def _fill(value: Any, seed: int, places: Mapping[str, str]) -> Any:
    """Replace the placeholders of a flag's value."""
    if isinstance(value, list):
        return [_fill(each, seed, places) for each in value]
    if not isinstance(value, str):
        return value
    return _PLACEHOLDER.sub(lambda match: str({"seed": seed, **places}.get(match[1], match[0])), value)


def _inputs(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the flags of a command stand for: the settings in `config`, and the content of files they name."""
    settings: dict[str, Any] = {}
    if "config" in flags:
        settings = yaml.load((PROJECT / flags["config"]).read_text(encoding="utf-8"), StrictLoader)  # noqa: S506
    settings |= {flag: value for flag, value in flags.items() if flag != "config"}
    return {flag: [value, list(_content(value))] for flag, value in settings.items()}


def _content(value: Any) -> Iterator[Any]:
    """Yield what identifies the files that a value names: checksums, for a folder names and sizes."""
    for each in value if isinstance(value, list) else [value]:
        path = PROJECT / each if isinstance(each, str) and each else None
        if path is not None and path.is_file():
            yield sha256_of(path)
        elif path is not None and path.is_dir():
            yield sorted(
                (str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file()
            )


@cache
def code_of(script: str) -> str:
    """Return a digest of what a script executes: itself, what it imports of the package, the libraries' versions.

    Comments, docstrings and formatting do not count, nor do the folders of the package in `NO_EFFECT`.
    """
    digest = hashlib.sha256()
    for path in sorted(_imported(PROJECT / script)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    digest.update(json.dumps([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    return digest.hexdigest()


def _imported(script: Path) -> set[Path]:
    """Return a script and the files of the package that it imports, directly or not."""
    found, left = set(), {script}
    while left:
        path = left.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                place = PROJECT.joinpath(*name.split("."))
                files = {place.with_suffix(".py"), place / "__init__.py"}
                left |= {file for file in files - found if name.startswith("hf_seg.") and file.is_file()}
        left = {file for file in left if not set(file.relative_to(PROJECT).parts[:-1]) & set(NO_EFFECT)}
    return found
