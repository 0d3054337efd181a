"""Flat YAML without surprises: numbers are numbers, words are words, and no key stands twice."""

import re
import types
import typing
from typing import Any, Literal, Union

import yaml

from hf_seg.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """Safe YAML in which `6e-5` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"setting {key!r} stands twice")
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


def has_type(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type as a field declares it; whole numbers are floats too, booleans are not."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(has_type(item, *typing.get_args(hint)) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
