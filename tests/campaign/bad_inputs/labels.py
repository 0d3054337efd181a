"""Label sets and pseudo-labels."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bad_inputs.case import (
    AUDIT,
    CHECK,
    STAGE2,
    TRAIN,
    Case,
    Make,
    both,
    cut,
    edit_json,
    folder,
    own,
    remove,
    write,
)

SET = f"{CHECK} --label_set classes.yaml"
SHARD = "labels/data/train-00000-of-00002.parquet"
LEARN = STAGE2 + TRAIN + " --pseudo_labels labels"
TWO = "classes:\n  - {id: 1, name: water}\n  - {id: 2, name: land}\n"
NESTED = [f"&x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 10)]
BOMB = f"[&x0 [lol], {', '.join(NESTED)}]"  # 9^9 words, if it is written out


def _set(wrong: str, content: bytes | str, says: str = "classes.yaml") -> Case:
    return Case("label set", wrong, write("classes.yaml", content), SET, says)


def _rows(**columns: Any) -> Make:
    """Replace the pseudo-labels by one shard with these columns."""

    def make(work: Path) -> None:
        path = own(work, SHARD)
        for each in path.parent.iterdir():
            each.unlink()
        own(work, "labels/manifest.json").unlink()
        pq.write_table(pa.table(columns), path)

    return make


def _with_image(**changes: Any) -> Make:
    """Change the first row of the first shard; `metadata` of datasets stays."""

    def make(work: Path) -> None:
        path = own(work, SHARD)
        table = pq.read_table(path)
        rows = table.to_pylist()
        rows[0] |= changes
        own(work, "labels/manifest.json").unlink()  # as labels that others made, which have no checksums
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    return make


PNG_BOMB = bytes.fromhex("89504e470d0a1a0a0000000d49484452000ffff0000ffff00800000000") + b"\x00" * 64
LABELS = (
    Case("label set", "does not exist", remove("scene.tif"), SET, "classes.yaml"),
    Case("label set", "a folder", folder("classes.yaml"), SET, "classes.yaml"),
    _set("empty", ""),
    _set("a list", "- 1\n"),
    _set("not UTF-8", b"classes: \xff\n"),
    _set("a tab", "classes:\n\t- x\n"),
    _set("unknown key", TWO + "ignored: [3]\n"),
    _set("no classes", "background: [0]\n"),
    _set("one class", "classes: [{id: 1, name: a}]\n"),
    _set("300 classes", "classes:\n" + "".join(f"  - {{id: {n}, name: c{n}}}\n" for n in range(1, 301))),
    _set("an id twice", "classes: [{id: 1, name: a}, {id: 1, name: b}]\n"),
    _set("an id left out", "classes: [{id: 1, name: a}, {id: 3, name: b}]\n"),
    _set("id 0", "classes: [{id: 0, name: a}, {id: 1, name: b}]\n"),
    _set("id 255", "classes: [{id: 255, name: a}, {id: 1, name: b}]\n"),
    _set("id -1", "classes: [{id: -1, name: a}, {id: 1, name: b}]\n"),
    _set("id of 4000 digits", f"classes: [{{id: {'9' * 4000}, name: a}}, {{id: 1, name: b}}]\n"),
    _set("id of 6000 digits", f"classes: [{{id: {'9' * 6000}, name: a}}, {{id: 1, name: b}}]\n"),
    _set("a name twice", "classes: [{id: 1, name: a}, {id: 2, name: A}]\n"),
    _set("no name", "classes: [{id: 1}, {id: 2, name: b}]\n"),
    _set("a name of two lines", 'classes: [{id: 1, name: "a\\nb"}, {id: 2, name: b}]\n'),
    _set("a colour that is none", "classes: [{id: 1, name: a, colour: red}, {id: 2, name: b}]\n"),
    _set("one colour twice", "classes: [{id: 1, name: a, colour: '#00ff00'}, {id: 2, name: b, colour: '#00FF00'}]\n"),
    _set("a value of two classes", "classes: [{id: 1, name: a, values: [2]}, {id: 2, name: b}]\n"),
    _set("value 256", "classes: [{id: 1, name: a, values: [256]}, {id: 2, name: b}]\n"),
    _set("a key twice", TWO + TWO),
    _set("unmapped: maybe", TWO + "unmapped: maybe\n"),
    _set("a Python tag", "classes: !!python/object/apply:os.system ['true']\n"),
    _set("bomb of aliases as classes", f"classes: {BOMB}\n"),
    _set("bomb of aliases as a list", f"{BOMB}\n"),
    _set("bomb of aliases as a name", f"classes: [{{id: 1, name: {BOMB}}}, {{id: 2, name: b}}]\n"),
    _set("bomb of aliases as values", f"classes: [{{id: 1, name: a, values: {BOMB}}}, {{id: 2, name: b}}]\n"),
    _set("bomb of aliases as unmapped", TWO + f"unmapped: {BOMB}\n"),
    _set("a list that contains itself", "&a [*a]\n"),
    _set("10,000 open brackets", "[" * 10_000),
    _set("an open string", "classes: 'a\n"),
    _set("two documents", TWO + "---\n" + TWO),
    _set("20,000 keys", "".join(f"k{n}: 1\n" for n in range(20_000))),
    _set("a date as name", "classes: [{id: 1, name: 2020-01-01}, {id: 2, name: b}]\n"),
    _set("a date that is none", "classes: 2020-99-99\n"),
    _set("a mapping as key", "{a: 1}: 2\n"),
    Case("pseudo-labels", "do not exist", remove("labels"), LEARN, "labels"),
    Case("pseudo-labels", "empty folder", folder("labels"), LEARN, "labels"),
    Case(
        "pseudo-labels",
        "not finished: no manifest",
        both(remove("labels/manifest.json"), write("labels/inputs.json", "{}")),
        LEARN,
        "not finished",
    ),
    Case("pseudo-labels", "Parquet cut in the middle", cut(SHARD, 0.5), LEARN, "labels"),
    Case("pseudo-labels", "Parquet empty", write(SHARD, b""), LEARN, "labels"),
    Case(
        "pseudo-labels", "Parquet of random bytes", write(SHARD, b"PAR1" + bytes(range(256)) + b"PAR1"), LEARN, "labels"
    ),
    Case("pseudo-labels", "a shard is missing", remove(SHARD), LEARN, "TrainArea_001"),
    Case("pseudo-labels", "manifest is no JSON", write("labels/manifest.json", b"{"), LEARN, "manifest.json"),
    Case("pseudo-labels", "manifest is a list", write("labels/manifest.json", b"[1]"), LEARN, "manifest.json"),
    Case(
        "pseudo-labels",
        "manifest without names",
        edit_json("labels/manifest.json", label_set={"a": 1}),
        LEARN,
        "manifest.json",
    ),
    Case(
        "pseudo-labels",
        "manifest of other classes",
        edit_json("labels/manifest.json", label_set={"names": ["background", "sea", "land"]}),
        LEARN,
        "sea",
    ),
    Case("pseudo-labels", "rows of other tiles", _rows(image_id=["x"], pseudo_label=[b"x"]), LEARN, "labels"),
    Case("pseudo-labels", "no image_id", _rows(tile=["x"], pseudo_label=[b"x"]), LEARN, "image_id"),
    Case(
        "pseudo-labels",
        "labels are numbers",
        _rows(image_id=[f"TrainArea_00{n}" for n in range(1, 7)], pseudo_label=[1] * 6),
        LEARN,
        "labels",
    ),
    Case(
        "pseudo-labels",
        "labels are text",
        _rows(image_id=[f"TrainArea_00{n}" for n in range(1, 7)], pseudo_label=["a"] * 6),
        LEARN,
        "labels",
    ),
    Case(
        "pseudo-labels",
        "labels are lists",
        _rows(image_id=[f"TrainArea_00{n}" for n in range(1, 7)], pseudo_label=[[[1, 2]]] * 6),
        LEARN,
        "labels",
    ),
    Case("pseudo-labels", "image_id are numbers", _rows(image_id=[1, 2], pseudo_label=[b"", b""]), LEARN, "labels"),
    Case(
        "pseudo-labels",
        "a PNG that is cut",
        _with_image(pseudo_label={"bytes": b"\x89PNG\r\n\x1a\n1234", "path": None}),
        LEARN,
        "TrainArea_001",
    ),
    Case(
        "pseudo-labels",
        "a PNG that claims 10^6 x 10^6 px",
        _with_image(pseudo_label={"bytes": PNG_BOMB, "path": None}),
        LEARN,
        "TrainArea_001",
    ),
    Case("pseudo-labels", "a label that is null", _with_image(pseudo_label=None), LEARN, "labels"),
    Case(
        "pseudo-labels",
        "no confidence, but --confidence_weights",
        _rows(image_id=[f"TrainArea_00{n}" for n in range(1, 7)], pseudo_label=[{"bytes": b"x", "path": None}] * 6),
        LEARN + " --confidence_weights true",
        "labels",
    ),
    Case(
        "pseudo-labels", "a folder of text", both(folder("labels"), write("labels/a.txt", "hello\n")), LEARN, "labels"
    ),
    Case(
        "pseudo-labels", "an image_id twice, in an audit", _with_image(image_id="TrainArea_002"), AUDIT, "TrainArea_002"
    ),
    Case(
        "pseudo-labels",
        "a PNG that is cut, in an audit",
        _with_image(pseudo_label={"bytes": b"\x89PNG\r\n\x1a\n1234", "path": None}),
        AUDIT,
        "TrainArea_001",
    ),
    Case(
        "pseudo-labels",
        "a PNG of 10^6 x 10^6 px, in an audit",
        _with_image(pseudo_label={"bytes": PNG_BOMB, "path": None}),
        AUDIT,
        "TrainArea_001",
    ),
)
