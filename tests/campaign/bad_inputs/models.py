"""Model folders, ensembles and exported models."""

import json
import struct
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from bad_inputs.case import (
    ENSEMBLE,
    EVALUATE,
    EXPORT,
    PREDICT,
    REPORT,
    Case,
    Make,
    both,
    cut,
    edit_json,
    folder,
    nothing,
    own,
    remove,
    write,
    write_json,
)

CONFIG, PROCESSOR, WEIGHTS = "model/config.json", "model/preprocessor_config.json", "model/model.safetensors"
TOGETHER = PREDICT.replace("--model model", "--model ensemble")
LIST = "ensemble/ensemble.json"


def _model(wrong: str, make: Make, says: str = "model", command: str = PREDICT) -> Case:
    return Case("model", wrong, make, command, says)


def _config(wrong: str, **changes: Any) -> Case:
    return _model(f"config: {wrong}", edit_json(CONFIG, **changes))


def _processor(wrong: str, **changes: Any) -> Case:
    return _model(f"processor: {wrong}", edit_json(PROCESSOR, **changes), "preprocessor_config.json")


def _weights(change: Any) -> Make:
    """Change the tensors of the weights."""

    def make(work: Path) -> None:
        path = own(work, WEIGHTS)
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    return make


def _safetensors(header: object, size: int | None = None) -> Make:
    text = json.dumps(header).encode()
    return write(WEIGHTS, struct.pack("<Q", len(text) if size is None else size) + text + bytes(64))


def _members(change: Any) -> Make:
    def make(work: Path) -> None:
        path = own(work, LIST)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def _drop_half(tensors: dict[str, Any]) -> None:
    for name in [*tensors][::2]:
        del tensors[name]


def _narrow(tensors: dict[str, Any]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].flatten()[:1].clone()


def _entry(key: str, value: Any) -> Make:
    return _members(lambda content: content["members"][0].update({key: value}))


MODELS = (
    _model("does not exist", remove("model")),
    _model("empty folder", folder("model")),
    _model("is a file", both(remove("model"), write("model", b"x"))),
    _model("a name of 5000 letters", nothing, "mmm", PREDICT.replace("--model model", "--model " + "m" * 5000)),
    _model("a name with ..", nothing, "../none", PREDICT.replace("--model model", "--model ../none")),
    _model("no config.json", remove(CONFIG)),
    _model("no preprocessor_config.json", remove(PROCESSOR)),
    _model("no weights", remove(WEIGHTS)),
    _model("config: empty", write(CONFIG, b"")),
    _model("config: cut", cut(CONFIG, 0.5)),
    _model("config: a list", write_json(CONFIG, [1])),
    _model("config: a number", write_json(CONFIG, 1)),
    _model("config: not UTF-8", write(CONFIG, b'{"a": "\xff"}')),
    _model("config: 100,000 open brackets", write(CONFIG, "[" * 100_000)),
    _model("config: a folder", folder(CONFIG)),
    _config("no model_type", model_type=None),
    _config("of an unknown kind", model_type="nonsense"),
    _config("of a kind that maps nothing", model_type="bert"),
    _config("of another architecture", model_type="upernet"),
    _config("another class", architectures=["BertModel"], model_type="bert"),
    _config("id2label of one class", id2label={"0": "background"}, label2id={"background": 0}),
    _config("id2label is a list", id2label=["background", "water", "land"]),
    _config("id2label of other classes than the weights", id2label={"0": "background", "1": "a", "2": "b"}),
    _config("ids that are words", id2label={"a": "background", "b": "x", "c": "y"}),
    _config("class 0 is no background", id2label={str(n): f"c{n}" for n in range(9)}),
    _config("num_labels of 10^9", num_labels=10**9, id2label=None, label2id=None),
    _config("label_colors too few", label_colors=["#000000"]),
    _config("label_colors are numbers", label_colors=[1] * 9),
    _config("hidden sizes of 10^7", hidden_sizes=[10**7] * 4),
    _config("hidden sizes of another length", hidden_sizes=[16]),
    _config("hidden sizes are words", hidden_sizes=["a", "b", "c", "d"]),
    _config("negative depths", depths=[-1, -1, -1, -1]),
    _config("10^6 blocks", depths=[10**6, 1, 1, 1]),
    _config("unknown activation", hidden_act="nonsense"),
    _config("dtype that is none", dtype="float99"),
    _config("input_bands without a stretch", input_bands={"names": ["VV"]}),
    _config("input_bands is a list", input_bands=["VV"]),
    _config("input_bands NaN", input_bands={"names": ["VV"], "low": [float("nan")], "high": [1]}),
    _model("processor: empty", write(PROCESSOR, b""), "preprocessor_config.json"),
    _model("processor: cut", cut(PROCESSOR, 0.5), "preprocessor_config.json"),
    _model("processor: a list", write_json(PROCESSOR, []), "preprocessor_config.json"),
    _processor("size without numbers", size={}),
    _processor("size is a word", size={"height": "big", "width": 1}),
    _processor("size 0", size={"height": 0, "width": 0}),
    _processor("size -64", size={"height": -64, "width": -64}),
    _processor("size 10^9", size={"height": 10**9, "width": 10**9}),
    _processor("size infinite", size={"height": float("inf"), "width": 1}),
    _processor("factor 0", rescale_factor=0),
    _processor("factor NaN", rescale_factor=float("nan")),
    _processor("std 0", image_std=[0, 0, 0]),
    _processor("two means", image_mean=[0.5, 0.5]),
    _processor("means are words", image_mean=["a", "b", "c"]),
    _processor("means NaN", image_mean=[float("nan")] * 3),
    _model("weights: empty", write(WEIGHTS, b"")),
    _model("weights: cut", cut(WEIGHTS, 0.7)),
    _model("weights: cut in the header", cut(WEIGHTS, 0.002)),
    _model("weights: random bytes", write(WEIGHTS, bytes(range(256)) * 8)),
    _model("weights: header of 10^18 bytes", _safetensors({}, 10**18)),
    _model(
        "weights: tensor beyond the end",
        _safetensors({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
    ),
    _model("weights: no tensor", _safetensors({})),
    _model("weights: half of the tensors", _weights(_drop_half)),
    _model("weights: other shapes", _weights(_narrow)),
    _model(
        "weights: an index of missing parts",
        both(
            remove(WEIGHTS),
            write_json("model/model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}}),
        ),
    ),
    _model("weights: an index that is cut", both(remove(WEIGHTS), write("model/model.safetensors.index.json", "{"))),
    _model("weights: a pickle", both(remove(WEIGHTS), write("model/pytorch_model.bin", b"\x80\x04."))),
    _model("config: cut, in evaluate", cut(CONFIG, 0.5), "model", EVALUATE),
    _model("weights: cut, in export", cut(WEIGHTS, 0.5), "model", EXPORT),
    _model("weights: cut, in report", cut(WEIGHTS, 0.5), "model", REPORT),
    _model("metrics.jsonl is cut, in report", write("model/metrics.jsonl", '{"step": 1, "lo'), "metrics.jsonl", REPORT),
    _model("recipe.yaml is broken, in report", write("model/recipe.yaml", "a: ["), "recipe.yaml", REPORT),
    _model(
        "training_data.json is broken, in report", write("model/training_data.json", "{"), "training_data.json", REPORT
    ),
    Case(
        "ensemble",
        "list of members empty",
        write_json(LIST, {"version": 1, "masked_classes": [0], "members": []}),
        TOGETHER,
        "ensemble",
    ),
    Case("ensemble", "list is cut", cut(LIST, 0.5), TOGETHER, "ensemble.json"),
    Case("ensemble", "list is a list", write_json(LIST, []), TOGETHER, "ensemble.json"),
    Case("ensemble", "100,000 open brackets", write(LIST, "[" * 100_000), TOGETHER, "ensemble.json"),
    Case("ensemble", "version 2", edit_json(LIST, version=2), TOGETHER, "ensemble.json"),
    Case("ensemble", "a member is missing", remove("ensemble/member_1"), TOGETHER, "member_1"),
    Case(
        "ensemble", "a member's weights are cut", cut("ensemble/member_1/model.safetensors", 0.5), TOGETHER, "member_1"
    ),
    Case("ensemble", "a member outside the folder", _entry("folder", "../../model"), TOGETHER, "ensemble"),
    Case("ensemble", "a member's name has 5000 letters", _entry("folder", "a" * 5000), TOGETHER, "ensemble"),
    Case("ensemble", "crop of the list differs", _entry("crop", 128), TOGETHER, "member_0"),
    Case("ensemble", "crop infinite", _entry("crop", float("inf")), TOGETHER, "ensemble.json"),
    Case("ensemble", "weight 0", _entry("weight", 0), TOGETHER, "weight"),
    Case("ensemble", "weight NaN", _entry("weight", float("nan")), TOGETHER, "weight"),
    Case("ensemble", "weight is a word", _entry("weight", "much"), TOGETHER, "ensemble.json"),
    Case("ensemble", "revision is a list", _entry("revision", [1]), TOGETHER, "ensemble.json"),
    Case(
        "ensemble",
        "members of other classes",
        edit_json(
            "ensemble/member_1/config.json", id2label={str(n): "background" if n == 0 else f"c{n}" for n in range(9)}
        ),
        TOGETHER,
        "class 1",
    ),
    Case(
        "ensemble",
        "networks of other classes",
        edit_json("model2/config.json", id2label={str(n): "background" if n == 0 else f"c{n}" for n in range(9)}),
        ENSEMBLE,
        "class 1",
    ),
    Case("ensemble", "a network is missing", remove("model2"), ENSEMBLE, "model2"),
    Case(
        "exported model", "does not exist", nothing, PREDICT.replace("--model model", "--model none.onnx"), "none.onnx"
    ),
    Case(
        "exported model",
        "empty file",
        write("net.onnx", b""),
        PREDICT.replace("--model model", "--model net.onnx"),
        "net.onnx",
    ),
    Case(
        "exported model",
        "random bytes",
        write("net.onnx", bytes(range(256)) * 9),
        PREDICT.replace("--model model", "--model net.onnx"),
        "net.onnx",
    ),
    Case(
        "exported model",
        "a program of PyTorch",
        write("net.pt2", b"PK"),
        PREDICT.replace("--model model", "--model net.pt2"),
        "net.pt2",
    ),
    Case("exported model", "target is a file", write("run", b"x"), EXPORT, "run"),
    Case("exported model", "target has an export", write("run/model.onnx", b"x"), EXPORT, "run"),
)
