"""Label sets as YAML or JSON, in a model's config, and how the classes of a dataset map onto those of a training.

    classes:
      - {id: 1, name: water, colour: "#0045ff", aliases: [lake, river], values: [6]}
      - {id: 2, name: land, colour: "#c0c0c0", values: [1, 2, 3, 4, 5, 7, 8]}
    background: [0]      # pixel values without a class; [0] unless a class has it
    ignore: [255]        # pixel values that are ignored; [255] unless another entry has it
    unmapped: ignore     # classes of a dataset without a counterpart here: error (the default) or ignore

Ids are 1, 2, ... without a gap; 0 is background. `values` are the pixel values of the class in label files, by default
its id. `dataset.json` has the same keys for its own label files. A class without a colour gets a distinct one.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from hf_seg.errors import UserError, file_errors, shown
from hf_seg.labels import BACKGROUND, BACKGROUND_NAME, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.settings import nearest, read_yaml

BUILT_IN = {"OpenEarthMap": OPEN_EARTH_MAP}
LABEL_SET_KEYS = ("classes", "background", "ignore", "unmapped")
_CLASS_KEYS = ("id", "name", "colour", "color", "aliases", "values")
_MOST_CLASSES = IGNORE_INDEX - 1
_HEX_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_BLACK = (0, 0, 0)  # of background


def read_label_set(name: str | Path) -> LabelSet:
    """Read a YAML file, or return the built-in set of this name ("OpenEarthMap").

    Raises:
        UserError: naming the file, the value and how to fix it.
    """
    if str(name) in BUILT_IN:
        return BUILT_IN[str(name)]
    with file_errors(name, f"cannot be read as a label set (built in: {', '.join(BUILT_IN)})"):
        content = read_yaml(Path(name), "YAML")
    if not isinstance(content, dict):
        raise UserError(f"{name}: a label set has the keys {', '.join(LABEL_SET_KEYS)}; found {shown(content)}")
    return parse_label_set(content, str(name))


def parse_label_set(content: Mapping[str, Any], source: str) -> LabelSet:
    """Build a label set from the content of a file.

    Args:
        content: with the keys of `LABEL_SET_KEYS`, of which `classes` is required.
        source: what errors call it.

    Raises:
        UserError: naming source, value and how to fix it.
    """
    _refuse_unknown(content, LABEL_SET_KEYS, source)
    rows = content.get("classes")
    if not isinstance(rows, list) or not 2 <= len(rows) <= _MOST_CLASSES:
        raise UserError(f"{source}: classes must be a list of 2 to {_MOST_CLASSES} classes; it is {_shown(rows)}")
    classes = _order([_check_class(row, number, source) for number, row in enumerate(rows, start=1)], source)
    unmapped = content.get("unmapped", "error")
    if unmapped not in ("error", "ignore"):
        raise UserError(f"{source}: unmapped must be error or ignore; it is {shown(unmapped)}")
    label_set = LabelSet(
        names=(BACKGROUND_NAME, *(row["name"] for row in classes)),
        colors=(_BLACK, *_choose_colors(classes, source)),
        values=_find_values(classes, content, source),
        aliases=((), *(tuple(row["aliases"]) for row in classes)),
        ignore_unmapped=unmapped == "ignore",
    )
    _index_names(label_set, source)  # finds duplicates
    return label_set


def _refuse_unknown(content: Mapping[str, Any], known: Iterable[str], source: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{source}: unknown key {shown(key)}{nearest(str(key), known)}; known: {', '.join(known)}")


def _check_class(row: Any, number: int, source: str) -> dict[str, Any]:
    """Check the types of one class and fill in its defaults."""
    where = f"{source}: class number {number}"
    if not isinstance(row, dict):
        raise UserError(f"{where} must have the keys id and name; it is {_shown(row)}")
    _refuse_unknown(row, _CLASS_KEYS, where)
    index, name = row.get("id"), row.get("name")
    if not _is_whole(index) or not 0 <= index <= _MOST_CLASSES:
        raise UserError(f"{where} must have an id, a whole number 1..{_MOST_CLASSES}; it is {shown(index)}")
    if index == BACKGROUND:
        raise UserError(f"{where} has id 0, which is background: list its pixel values under `background:`")
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UserError(f"{where} (id {index}) must have a name, text of one line; it is {shown(name)}")
    if {"colour", "color"} <= row.keys():
        raise UserError(f"{where} ({name}) has both colour and color; keep one")
    key = "color" if "color" in row else "colour"
    color = row.get(key)
    if key in row and not (isinstance(color, str) and _HEX_COLOR.fullmatch(color)):
        hint = "in quotes, since # starts a comment in YAML"
        raise UserError(f"{where} ({name}): {key} must be like '#0045ff', {hint}; it is {shown(color)}")
    aliases, values = row.get("aliases", []), row.get("values", [index])
    if not isinstance(aliases, list) or not all(isinstance(each, str) and each.strip() for each in aliases):
        raise UserError(f"{where} ({name}): aliases must be a list of names; it is {shown(aliases)}")
    _check_values(values, f"{where} ({name}): values")
    return {"id": index, "name": name, "color": color, "aliases": aliases, "values": values}


def _order(classes: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Sort classes by id; UserError for an id of two classes, or missing between others."""
    name_of: dict[int, str] = {}
    for row in classes:
        index = row["id"]
        if index in name_of:
            raise UserError(f"{source}: id {index} has two names, {name_of[index]!r} and {row['name']!r}; keep one")
        name_of[index] = row["name"]
    if missing := sorted(set(range(1, len(classes) + 1)) - name_of.keys()):
        hint = f"number the {len(classes)} classes 1..{len(classes)}, and give the pixel values as `values:`"
        raise UserError(f"{source}: no class has id {missing[0]}, but one has id {max(name_of)}; {hint}")
    return sorted(classes, key=lambda row: row["id"])


def _choose_colors(classes: list[dict[str, Any]], source: str) -> list[tuple[int, int, int]]:
    """Return the colour of each class; those without one get distinct ones of matplotlib's."""
    owner_of = {_BLACK: BACKGROUND_NAME}
    for row in classes:
        if row["color"] is not None:
            color = _parse_color(row["color"])
            if color in owner_of:
                raise UserError(f"{source}: {owner_of[color]} and {row['name']} have one colour, {row['color']}")
            owner_of[color] = row["name"]
    free = (color for color in dict.fromkeys(_distinct_colors()) if color not in owner_of)
    return [next(free) if row["color"] is None else _parse_color(row["color"]) for row in classes]


def _distinct_colors() -> Iterator[tuple[int, int, int]]:
    from matplotlib import colormaps  # slow to import

    for name, count in (("tab20", 20), ("tab20b", 20), ("tab20c", 20), ("turbo", 2 * _MOST_CLASSES)):
        for red, green, blue, _ in colormaps[name].resampled(count)(range(count), bytes=True).tolist():
            yield red, green, blue


def _parse_color(text: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def _find_values(classes: list[dict[str, Any]], content: Mapping[str, Any], source: str) -> dict[int, int]:
    """Return {pixel value: class id}; UserError for a value that two entries have."""
    values: dict[int, int] = {}
    owner_of: dict[int, str] = {}

    def add(found: list[int], index: int, owner: str) -> None:
        for value in found:
            if value in owner_of:
                twice = f"{owner_of[value]} and of {owner}" if owner_of[value] != owner else f"{owner}, twice"
                raise UserError(f"{source}: pixel value {value} is one of {twice}; give each value one meaning")
            values[value], owner_of[value] = index, owner

    for row in classes:
        add(row["values"], row["id"], row["name"])
    for key, index in (("background", BACKGROUND), ("ignore", IGNORE_INDEX)):
        default = [index] if index not in owner_of else []
        add(_check_values(content.get(key, default), f"{source}: {key}", may_be_empty=True), index, key)
    return dict(sorted(values.items()))


def _check_values(values: Any, what: str, *, may_be_empty: bool = False) -> list[int]:
    if not isinstance(values, list) or not (values or may_be_empty):
        raise UserError(f"{what} must be a list of pixel values, e.g. [6]; it is {shown(values)}")
    for value in values:
        if not _is_whole(value) or not 0 <= value <= 255:
            raise UserError(f"{what} must be whole numbers 0..255, as label files are 8-bit; found {shown(value)}")
    return values


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int  # True is no number


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else shown(value)


def _index_names(label_set: LabelSet, source: str) -> dict[str, int]:
    """Map names and aliases, without regard to case, to ids; UserError for one of two classes."""
    index_of: dict[str, int] = {}
    for index, (name, aliases) in enumerate(zip(label_set.names, label_set.aliases, strict=True)):
        for each in (name, *aliases):
            if (first := index_of.setdefault(each.casefold(), index)) != index:
                both = f"class {first} ({label_set.names[first]}) and class {index} ({name})"
                raise UserError(f"{source}: {each!r} is a name of {both}; a name or alias belongs to one class")
    return index_of


def map_classes(chosen: LabelSet, own: LabelSet, source: str) -> LabelSet:
    """Return the chosen classes with `values` as the label files of a dataset of other classes have them.

    A class of the dataset is mapped to the chosen one that has its name, or else one of its aliases, as name or alias.

    Args:
        chosen: classes of the training.
        own: classes of the dataset.
        source: what errors call the dataset.

    Raises:
        UserError: classes of the dataset that are no chosen class, unless one of both sets has `unmapped: ignore`.
    """
    index_of = _index_names(chosen, "label set")
    ids, lost = {BACKGROUND: BACKGROUND, IGNORE_INDEX: IGNORE_INDEX}, []
    for index, (name, aliases) in enumerate(zip(own.names[1:], own.aliases[1:], strict=True), start=1):
        candidates = [index_of[each.casefold()] for each in (name, *aliases) if each.casefold() in index_of]
        if not candidates:
            lost.append(name)
        elif name.casefold() not in index_of and len({*candidates}) > 1:
            both = " and ".join(chosen.names[each] for each in dict.fromkeys(candidates))
            raise UserError(f"{source}: the aliases of class {name!r} are of {both}; remove one")
        ids[index] = candidates[0] if candidates else IGNORE_INDEX
    if lost and not (chosen.ignore_unmapped or own.ignore_unmapped):
        raise UserError(
            f"{source}: its classes {', '.join(lost)} are none of {', '.join(chosen.names[1:])}; add aliases, or "
            "`unmapped: ignore`, to its dataset.json or to the label set"
        )
    return replace(chosen, values={value: ids[index] for value, index in own.values.items()})


def require_same_classes(a: Sequence[str], b: Sequence[str], name_a: str, name_b: str, hint: str = "") -> None:
    """Raise `UserError` saying at which class the names by id of two label sets disagree, if they do."""
    for index, (in_a, in_b) in enumerate(itertools.zip_longest(a, b)):
        if in_a != in_b:
            there_a, there_b = ("missing" if each is None else repr(each) for each in (in_a, in_b))
            raise UserError(f"class {index} is {there_a} in {name_a} and {there_b} in {name_b}{hint}")


def config_of(label_set: LabelSet) -> dict[str, Any]:
    """Return the keys of a model's config that describe the classes; OpenEarthMap's need no colours."""
    config: dict[str, Any] = {"id2label": label_set.id2label, "label2id": label_set.label2id}
    if (label_set.names, label_set.colors) != (OPEN_EARTH_MAP.names, OPEN_EARTH_MAP.colors):
        config["label_colors"] = hex_colors(label_set)
    return config


def hex_colors(label_set: LabelSet) -> list[str]:
    """Return the colours by id, e.g. "#0045ff"."""
    return [f"#{bytes(color).hex()}" for color in label_set.colors]


def label_set_of(config: Mapping[str, Any], name: str) -> LabelSet:
    """Return the classes of a model; label files are taken to contain its ids.

    Args:
        config: of the model, as its config.json has it.
        name: what errors call it.

    Raises:
        UserError: classes that are not of this project, where background is class 0; or damaged colours.
    """
    try:
        id2label = {int(index): str(label) for index, label in (config.get("id2label") or {}).items()}
    except (ValueError, AttributeError):
        id2label = {}
    names = tuple(id2label[index] for index in sorted(id2label))
    if len(names) < 3 or sorted(id2label) != [*range(len(names))] or names[BACKGROUND] != BACKGROUND_NAME:
        first = names[0] if names else None
        raise UserError(
            f"{name} is no segmentation model of this project: its class 0 must be {BACKGROUND_NAME!r}, with 2 classes "
            f"or more from 1 on; id2label has {len(names)}, the first is {shown(first)}"
        )
    if unprintable := [name for name in names if not name.isprintable()]:
        raise UserError(f"{name}: the name of a class must be printable text of one line; it is {unprintable[0]!r}")
    colors = config.get("label_colors")
    if colors is None and names == OPEN_EARTH_MAP.names:
        return OPEN_EARTH_MAP
    if colors is not None and not (
        isinstance(colors, list) and len(colors) == len(names) and all(_HEX_COLOR.fullmatch(str(c)) for c in colors)
    ):
        raise UserError(f"{name}: label_colors must be {len(names)} colours like '#0045ff'; it is {shown(colors)}")
    rows = [{"name": label, "color": colors and colors[index]} for index, label in enumerate(names)][1:]
    return LabelSet(
        names=names,
        colors=(_BLACK, *_choose_colors(rows, name)),
        values={index: index for index in range(len(names))},
        aliases=((),) * len(names),
    )
