"""Flat settings: a dataclass, filled from a YAML file and then from the command line, or one clear error.

    @dataclass(kw_only=True)
    class Arguments(Settings):
        "Title of the group in --help."
        seed: int = setting(0, "fixes sample order and augmentation", low=0)

    args = parse_arguments(Arguments)      # sys.argv: --config recipe.yaml --seed 1

Import-light, so that a command can answer `--help` before its slow imports. On the command line `-` and `_` in a name
are the same, and `null` unsets what may be unset.
"""

import argparse
import dataclasses
import difflib
import math
import operator
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import yaml

from hf_seg.errors import UserError, file_errors, shown

LOCAL_PATHS_FILE = "local_paths.yaml"
_REASON = 300  # characters of a library's error in a message
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (operator.gt, "more than"),
    "low": (operator.ge, "at least"),
    "high": (operator.le, "at most"),
}

Filled = TypeVar("Filled")


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    free: bool = False,
    path: bool = False,
) -> Any:
    """Declare one documented field of a settings dataclass.

    Args:
        low, high: smallest and largest value allowed.
        above: the value must be larger than this.
        free: it does not change what a run computes, so a resumed run may change it.
        path: it may be a folder of this machine, which is not part of what is shared.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "free": free, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: [*default], metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Settings."""

    config: str | None = setting(None, "YAML file with settings; the command line overrides it", free=True)

    def __post_init__(self) -> None:
        check_bounds(self)

    def require(self, key: str, holds: bool, what: str) -> None:
        """Raise `UserError` naming `key`, its value and what it must be, unless `holds`."""
        if not holds:
            raise UserError(f"{key} must be {what}; it is {shown(getattr(self, key))}")


def check_bounds(settings: Any) -> None:
    """Raise `UserError` naming the first field of a settings dataclass outside the bounds declared beside it."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == []:
            raise UserError(f"{field.name} must be one value or more; it is empty")
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and not math.isfinite(each):
                raise UserError(f"{field.name} must be a finite number; it is {each!r}")
            if isinstance(each, str) and "\0" in each:
                raise UserError(f"{field.name} must be text without NUL; it is {shown(each)}")
        bounds = {key: field.metadata[key] for key in _BOUNDS if field.metadata.get(key) is not None}
        if value is not None and not all(_BOUNDS[key][0](value, bound) for key, bound in bounds.items()):
            wanted = " and ".join(f"{_BOUNDS[key][1]} {bound:g}" for key, bound in bounds.items())
            raise UserError(f"{field.name} must be {wanted}; it is {shown(value)}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UserError` in one line, with the nearest known flag."""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse with `-` and `_` taken for the same in the names of flags."""
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        switches = {flag for action in self._actions if action.type is _boolean for flag in action.option_strings}
        has_positionals = any(not action.option_strings for action in self._actions)
        for index, word in enumerate(words):  # a switch without a value must not swallow a positional argument
            following = "".join(words[index + 1 : index + 2]).lower()
            is_value = following in ("true", "false") or not (has_positionals or following.startswith("-"))
            if word in switches and not (following and is_value):
                words[index] = f"{word}=true"
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a whole command line; raise `UserError` for an unknown flag, a missing or a wrong value."""
        if is_completing():
            import argcomplete

            argcomplete.autocomplete(self)  # ends the process
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            groups = [each for each in self._actions if isinstance(each, argparse._SubParsersAction)]
            parsers = [self, *(parser for group in groups for parser in group.choices.values())]
            flags = [flag for parser in parsers for action in parser._actions for flag in action.option_strings]
            key, known = unknown[0].partition("=")[0].lstrip("-"), [flag.lstrip("-") for flag in flags]
            raise UserError(f"unknown setting {shown(unknown[0])}{nearest(key, known, prefix='--')}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing all flags."""
        text = message if len(message) <= _REASON else f"{message[:_REASON]}..."  # a value may be of any length
        raise UserError(f"{text}; --help lists the settings")

    def add_settings(self, settings: type, *, skip: Sequence[str] = ()) -> None:
        """Add a flag for each field of a settings dataclass but `skip`, grouped by the class that declares it."""
        hints = typing.get_type_hints(settings)
        groups: dict[type, Any] = {}
        for field in dataclasses.fields(settings):
            if field.name in skip:
                continue
            owner = [each for each in settings.__mro__ if field.name in vars(each).get("__annotations__", {})][-1]
            if owner not in groups:
                groups[owner] = self.add_argument_group(str(owner.__doc__).partition("\n")[0].rstrip("."))
            default = field.default_factory() if callable(field.default_factory) else field.default
            text = field.metadata["help"] + ("" if default is None else f" ({_shown(default)})")
            how = _how_to_parse(hints[field.name])
            groups[owner].add_argument(
                f"--{field.name}", help=text.replace("%", "%%"), default=argparse.SUPPRESS, **how
            )
            if default is True:
                negative = {"dest": field.name, "action": "store_false", "default": argparse.SUPPRESS}
                groups[owner].add_argument(f"--no_{field.name}", help=argparse.SUPPRESS, **negative)


def filled(settings: type[Filled], namespace: argparse.Namespace) -> Filled:
    """Return a settings dataclass with what was given on a command line that has its flags (`add_settings`)."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, settings))}
    return settings(**{name: value for name, value in vars(namespace).items() if name in names})


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def _how_to_parse(hint: Any) -> dict[str, Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
        how = _how_to_parse(hint)
        return {**how, "type": _or_null(how["type"])} if "nargs" not in how else how
    if hint is bool:
        return {"type": _boolean, "metavar": "true|false"}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is list:
        return {"type": typing.get_args(hint)[0], "nargs": "+"}
    return {"type": hint}


def _or_null(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_null(text: str) -> Any:
        return None if text == "null" else parse(text)

    parse_or_null.__name__ = parse.__name__  # in argparse's errors
    return parse_or_null


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


Arguments = TypeVar("Arguments", bound=Settings)


def parse_arguments(settings: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Read settings from `--config FILE` and the command line, without the program's name (`sys.argv[1:]` if None).

    `--config toy/stage2_segformer.yaml` names one of the package's own files, if there is no such file here.
    Beside a `recipe.yaml` that a recipe has written, `local_paths.yaml` tells where its data lies on this machine, and
    is read with it.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type or value out of range, no such file.
    """
    program = Path(sys.argv[0]).name
    parser = Parser(description=settings.__doc__, prog=program, usage=f"{program} [--SETTING VALUE ...]")
    parser.add_settings(settings)
    values = vars(parser.parse_args(argv))
    if values.get("config") is not None:
        file = Path(values["config"])
        own = packaged_folder("recipes") / "configs" / file
        if own.is_file() and not file.exists():
            file = own
        local = file.with_name(LOCAL_PATHS_FILE)
        beside = read_settings(local, settings) if file.name == "recipe.yaml" and local.exists() else {}
        values = {**read_settings(file, settings), **beside, **values}
    return settings(**values)


def packaged_folder(name: str) -> Path:
    """Return `recipes` or `model_cards`: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def answer_help(settings: type[Settings], argv: Sequence[str] | None = None) -> None:
    """Print the help, or the shell's completions, and exit where asked for; to be called before slow imports."""
    if is_completing() or {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        parse_arguments(settings, argv)


def is_completing() -> bool:
    """Tell whether a shell asks this program how a command line may go on."""
    return "_ARGCOMPLETE" in os.environ


def nearest(key: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return `"; did you mean 'x'?"` for the known key most like `key`, or an empty string."""
    matches = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else ""


class StrictLoader(yaml.SafeLoader):
    """Safe YAML in which `6e-5` is a number, `no` is text, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = (self.construct_object(key, deep=True) for key, _ in node.value)
        for key, count in Counter(key for key in keys if isinstance(key, Hashable)).items():
            if count > 1:
                raise UserError(f"duplicate key {shown(key)}")
        return super().construct_mapping(node, deep)


# In YAML 1.1 `no` and `off` are booleans and `6e-5` is text; here a boolean is `true` or `false`, a float a float.
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$", re.IGNORECASE), list("tTfF"))
_EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
StrictLoader.add_implicit_resolver(*_EXPONENT)


class StrictDumper(yaml.SafeDumper):
    """Safe YAML that also quotes text like `1e-4`, which the loader would take for a number."""


StrictDumper.add_implicit_resolver(*_EXPONENT)


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file.

    Args:
        what: how an error calls the content.

    Raises:
        UserError: naming the file, and the line, key or value that is wrong.
        OSError: the file cannot be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), StrictLoader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        reason = "too many lists or mappings in each other"
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{path}: cannot be read as {what}: {reason[:_REASON]}")


def read_settings(path: Path, settings: type[Settings]) -> dict[str, Any]:
    """Return the settings in a flat YAML file, each of the type that its field declares.

    Raises:
        UserError: naming the file and the line, key or value that is wrong.
    """
    with file_errors(f"{path}:", "cannot be read as settings"):
        values = read_yaml(path, "settings")
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise UserError(f"{path}: settings are lines of `key: value`; found a {type(values).__name__}")
    hints = typing.get_type_hints(settings)
    for key, value in values.items():
        if key not in hints or key == "config":
            raise UserError(f"{path}: unknown setting {shown(key)}{nearest(str(key), hints.keys() - {'config'})}")
        if not _has_type(value, hints[key]):
            choices = typing.get_origin(hints[key]) is Literal and f"one of {typing.get_args(hints[key])}"
            wanted = choices or f"of type {getattr(hints[key], '__name__', hints[key])}"
            raise UserError(f"{path}: {key} must be {wanted}; it is {shown(value)} ({type(value).__name__})")
        if float in (hints[key], *typing.get_args(hints[key])) and value is not None:
            try:
                values[key] = float(value)
            except OverflowError:
                raise UserError(f"{path}: {key} must be a finite number; it is {shown(value)}") from None
    return values


def _has_type(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a field's type; whole numbers are floats too, booleans are not."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_has_type(value, option) for option in options)
    if kind is Literal:
        return value in options
    if kind is list:
        return isinstance(value, list) and all(_has_type(item, options[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def dump_yaml(values: dict[str, Any]) -> str:
    """Return flat settings as YAML that `read_settings` reads back."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)
