"""Code in every format that is read: no command runs it, and the user gets one line or the rest of the file.

Each payload would create a file, the canary.
"""

import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from campaign_results import Results
from fork_server import run_command
from hub_folders import make_ensemble, make_pseudo_labels, make_stage2
from payload_setup import answer_yes
from safetensors.torch import load_file

READER = Path(__file__).with_name("read_from_hub.py")
SCRIPT = "<script>alert(1)</script>"


class Pickled:
    """Runs code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


class Case(NamedTuple):
    """A payload in a file of some format, and a command that reads the file."""

    format: str
    payload: str
    plant: Callable[[Path, str], None]  # folder with everything, and the code
    command: str
    message: str | None  # in the one line; None: the file is read


PREDICT = "hf-seg predict scene.tif map.tif --model model"
RESUME = (
    "hf-seg stage2 --data_dir dfc25_track1 --output_dir run --model_name_or_path toy-segformer --from_scratch true "
    "--crop_size 32 --max_train_steps {} --warmup_steps 0 --per_device_train_batch_size 2 --eval_steps 0 --report_to "
    "none --mixed_precision no --dataloader_num_workers 0 --checkpointing_steps 1 --resume_from_checkpoint latest"
)


def change_json(path: str, **changes: Any) -> Callable[[Path, str], None]:
    """Return what changes keys of a JSON file."""

    def plant(folder: Path, _: str) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | changes))

    return plant


def with_code(path: str, plant: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    """Return what writes the code as a module, besides."""

    def both(folder: Path, code: str) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(code)
        plant(folder, code)

    return both


def pickle_to(path: str, *, keep_size: bool = False, remove: str = "") -> Callable[[Path, str], None]:
    """Return what replaces a file by a pickle of torch."""

    def plant(folder: Path, code: str) -> None:
        parent = str(Path(path).parent)
        place = next(folder.glob(parent) if parent != "." else iter([folder])) / Path(path).name
        torch.save({"state": Pickled(code)}, place)
        if keep_size:  # as the checkpoint's manifest has it
            manifest = json.loads((place.parent / "manifest.json").read_text())
            manifest["files"][place.name] = place.stat().st_size
            del manifest["sha256"], manifest["checksum"]  # as in those of older versions
            (place.parent / "manifest.json").write_text(json.dumps(manifest))
        if remove:
            (folder / remove).unlink()

    return plant


def header(text: bytes, length: int | None = None) -> Callable[[Path, str], None]:
    """Return what replaces the header of safetensors, with a length that may lie."""

    def plant(folder: Path, _: str) -> None:
        written = struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)
        (folder / "model" / "model.safetensors").write_bytes(written)

    return plant


def tensor(**changes: Any) -> bytes:
    """Return a header of one tensor."""
    return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}).encode()


def write(path: str, content: str) -> Callable[[Path, str], None]:
    """Return what writes a file, in which CODE stands for the code."""

    def plant(folder: Path, code: str) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content.replace("CODE", code))

    return plant


def shard_index(target: str) -> Callable[[Path, str], None]:
    """Return what makes the weights shards of which one is a pickle elsewhere."""

    def plant(folder: Path, code: str) -> None:
        tensors = load_file(folder / "model" / "model.safetensors")
        (folder / "model" / "model.safetensors").unlink()
        torch.save({"state": Pickled(code)}, folder / "model" / target)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, target)}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def adapter(folder: Path, code: str) -> None:
    """Put an adapter of peft beside the weights."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "me/evil", "target_modules": ["query"]}
    (folder / "model" / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"state": Pickled(code)}, folder / "model" / "adapter_model.bin")


def shard_of_others(folder: Path) -> Path:
    """Return a shard of labels that have no checksums, as those that others made."""
    for name in ("manifest.json", "inputs.json"):
        (folder / "labels" / name).unlink()
    return next((folder / "labels" / "data").glob("*.parquet"))


def parquet_extension(folder: Path, code: str) -> None:
    """Give a column the extension type that older Arrow unpickled."""
    import pickle

    path = shard_of_others(folder)
    table = pq.read_table(path)
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata[b"ARROW:extension:metadata"] = pickle.dumps(Pickled(code))
    field = table.schema.field("image_id").with_metadata(metadata)
    pq.write_table(table.cast(table.schema.set(0, field)), path)


def path_rows(place: str) -> Callable[[Path, str], None]:
    """Return what replaces labels by paths."""

    def plant(folder: Path, _: str) -> None:
        path = shard_of_others(folder)
        table = pq.read_table(path)
        rows = [row | {"pseudo_label": {"bytes": None, "path": place}} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    return plant


def web_dataset(folder: Path, code: str) -> None:
    """Replace the labels by an archive with pickles."""
    shutil.rmtree(folder / "labels")
    (folder / "labels").mkdir()
    torch.save({"state": Pickled(code)}, folder / "a.pth")
    with tarfile.open(folder / "labels" / "train.tar", "w") as archive:
        archive.add(folder / "a.pth", "a.pth")


def damage_exported(folder: Path, location: str) -> None:
    """Write an ONNX model whose weights are in another file."""
    import onnx
    from onnx import TensorProto, helper

    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    values.ClearField("float_data")
    values.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", "4")):
        entry = values.external_data.add()
        entry.key, entry.value = key, value
    node = helper.make_node("Add", ["pixels", "w"], ["probabilities"])
    images = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 3, 64, 64]) for name in (*node.output, "pixels")
    ]
    graph = helper.make_graph([node], "g", [images[1]], [images[0]], [values])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), folder / "m.onnx")


VRT = """<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1" subClass="{kind}">
{function}<SimpleSource><SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>
</SimpleSource></VRTRasterBand></VRTDataset>"""
FUNCTION = """<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>
<PixelFunctionCode><![CDATA[
def f(in_ar, out_ar, *args, **kwargs):
    CODE
    out_ar[:] = 7
]]></PixelFunctionCode>"""
PYTHON_VRT = VRT.format(kind="VRTDerivedRasterBand", function=FUNCTION, relative=1, source="scene.tif")
REMOTE_VRT = VRT.format(kind="VRTRasterBand", function="", relative=0, source="/vsicurl/http://127.0.0.1:9/x.tif")
RAW_VRT = """<VRTDataset rasterXSize="8" rasterYSize="8">
<VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand">
<SourceFilename relativetoVRT="0">/etc/passwd</SourceFilename></VRTRasterBand></VRTDataset>"""
ENTITIES = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<PAMDataset><Metadata><MDI key="x">&x;</MDI></Metadata></PAMDataset>"""
YAML = '!!python/object/apply:builtins.exec ["CODE"]\n'
CLASSES = (
    "classes: [{id: 1, name: NAME, values: [1, 2, 3]}, {id: 2, name: other, values: [4, 5, 6, 7, 8]}]\nignore: [255]\n"
)
AUDIT = "hf-seg audit dfc25_track1/train/labels dfc25_track1/train/labels --label_set set.yaml --output audit"
REMOTE = {"AutoConfig": "code.Config", "AutoImageProcessor": "code.Processor", "AutoModel": "code.Model"}


def remote_model(**changes: Any) -> Callable[[Path, str], None]:
    return with_code("model/code.py", change_json("model/config.json", auto_map=REMOTE, **changes))


CASES = [
    Case("config.json", "auto_map, unknown architecture", remote_model(model_type="mine"), PREDICT, "cannot be read"),
    Case("config.json", "auto_map, known architecture", remote_model(), PREDICT, None),
    Case(
        "config.json",
        "auto_map, start of a training",
        remote_model(model_type="mine"),
        f"python {READER} encoder model out",
        "was not found",
    ),
    Case(
        "config.json",
        "custom_pipelines",
        remote_model(custom_pipelines={"image-segmentation": {"impl": "code.P"}}),
        PREDICT,
        None,
    ),
    Case(
        "preprocessor_config.json",
        "auto_map, settings missing",
        with_code(
            "model/code.py",
            write("model/preprocessor_config.json", json.dumps({"auto_map": REMOTE, "image_processor_type": "Mine"})),
        ),
        PREDICT,
        "preprocessor_config.json is not one that this project writes",
    ),
    Case(
        "config.json",
        "encoder of timm on the Hub",
        change_json(
            "model/config.json",
            model_type="upernet",
            backbone_config={
                "model_type": "timm_backbone",
                "backbone": "hf_hub:me/evil",
                "use_pretrained_backbone": True,
            },
        ),
        PREDICT,
        "no architecture 'hf_hub:me/evil'",
    ),
    Case(
        "pytorch_model.bin",
        "pickle in place of safetensors",
        pickle_to("model/pytorch_model.bin", remove="model/model.safetensors"),
        PREDICT,
        "it has no model*.safetensors*",
    ),
    Case(
        "pytorch_model.bin",
        "pickle, start of a training",
        pickle_to("model/pytorch_model.bin", remove="model/model.safetensors"),
        f"python {READER} encoder model out",
        "no complete weights in safetensors format",
    ),
    Case("pytorch_model.bin", "pickle beside safetensors", pickle_to("model/pytorch_model.bin"), PREDICT, None),
    Case(
        "model.safetensors",
        "a pickle",
        pickle_to("model/model.safetensors"),
        PREDICT,
        "no complete weights in safetensors format",
    ),
    Case("safetensors index", "a shard is a pickle", shard_index("pytorch_model.bin"), PREDICT, "no complete weights"),
    Case(
        "safetensors index",
        "a shard outside the folder",
        shard_index("../evil.safetensors"),
        PREDICT,
        "no complete weights",
    ),
    Case(
        "adapter_config.json",
        "adapter that is a pickle",
        adapter,
        PREDICT,
        "has an adapter beside its weights",
    ),
    *(
        Case("safetensors header", payload, plant, PREDICT, "no complete weights in safetensors format")
        for payload, plant in {
            "longer than the file": header(tensor(), 2**40),
            "length of 2^64 - 1": header(tensor(), 2**64 - 1),
            "no JSON": header(b"\xff" * 32),
            "deeply nested JSON": header(b'{"a":' * 100_000),
            "negative offset": header(tensor(data_offsets=[-16, 0])),
            "tensors overlap": header(
                json.dumps({key: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for key in "ab"}).encode()
            ),
            "shape overflows": header(tensor(shape=[2**32, 2**32, 4])),
            "shape larger than the data": header(tensor(shape=[2**40])),
        }.items()
    ),
    Case(
        "ensemble.json",
        "member outside the folder",
        change_json(
            "ensemble/ensemble.json",
            members=[{"folder": "../../etc", "crop": 64, "weight": 1, "origin": "x", "revision": None}],
        ),
        "hf-seg predict scene.tif map.tif --model ensemble",
        "is incomplete",
    ),
    Case(
        "YAML recipe",
        "!!python/object",
        write("recipe.yaml", YAML),
        "hf-seg stage2 --config recipe.yaml",
        "recipe.yaml",
    ),
    Case(
        "YAML label set",
        "!!python/object",
        write("set.yaml", YAML),
        "hf-seg data check dfc25_track1 --label_set set.yaml",
        "cannot be read as YAML",
    ),
    Case(
        "YAML in a card",
        "!!python/object",
        with_code("app/app.py", write("app/README.md", f"---\nsdk: {YAML}---\n# x\n")),
        "hf-seg push app me/x",
        "its header cannot be read",
    ),
    Case(
        "YAML study",
        "!!python/object",
        write("study.yaml", YAML),
        "python scripts/ablation.py study.yaml --dry_run",
        "study.yaml",
    ),
    Case("Parquet", "extension type that is a pickle", parquet_extension, f"python {READER} labels labels out", None),
    Case(
        "Parquet",
        "label is a file of this machine",
        path_rows("/etc/passwd"),
        f"python {READER} labels labels out",
        "has images without their bytes",
    ),
    Case(
        "Parquet",
        "label is on another host",
        path_rows("http://127.0.0.1:9/x.png"),
        f"python {READER} labels labels out",
        "has images without their bytes",
    ),
    Case(
        "dataset folder",
        "loading script",
        with_code("labels/labels.py", lambda *_: None),
        f"python {READER} labels labels out",
        None,
    ),
    Case(
        "WebDataset",
        "pickle of torch",
        web_dataset,
        f"python {READER} labels labels out",
        "pseudo-labels cannot be loaded",
    ),
    Case(
        "ONNX",
        "weights in ../../etc/passwd",
        lambda folder, _: damage_exported(folder, "../../../../../../etc/passwd"),
        "hf-seg predict scene.tif map.tif --model m.onnx",
        "cannot be opened as an ONNX model",
    ),
    Case(
        "ONNX",
        "a pickle",
        pickle_to("m.onnx"),
        "hf-seg predict scene.tif map.tif --model m.onnx",
        "cannot be opened as an ONNX model",
    ),
    Case("pt2", "a pickle", pickle_to("m.pt2"), "hf-seg predict scene.tif map.tif --model m.pt2", "which unpickles"),
    Case(
        "VRT",
        "pixel function in Python",
        write("scene.vrt", PYTHON_VRT),
        "hf-seg predict scene.vrt map.tif --model model",
        "scene.vrt",
    ),
    Case(
        "VRT called .tif",
        "source on another host",
        write("scene.tif", REMOTE_VRT),
        PREDICT,
        "cannot be opened as a raster",
    ),
    Case(
        "VRT called .tif",
        "raw bytes of /etc/passwd",
        write("scene.tif", RAW_VRT),
        PREDICT,
        "cannot be opened as a raster",
    ),
    Case(
        "VRT called .tif",
        "label of an audit",
        write("dfc25_track1/train/labels/TrainArea_001.tif", RAW_VRT),
        AUDIT.replace("--label_set set.yaml ", ""),
        "cannot be read as an image",
    ),
    Case(
        "VRT called .tif",
        "tile of a dataset",
        write("dfc25_track1/train/sar_images/TrainArea_001.tif", RAW_VRT),
        "hf-seg stage2 --data_dir dfc25_track1 --model_name_or_path toy-segformer --from_scratch true --crop_size 32",
        "expected a complete GeoTIFF",
    ),
    Case(".aux.xml", "external entity", write("scene.tif.aux.xml", ENTITIES), PREDICT, None),
    *(
        Case(
            "checkpoint",
            f"pickle as {name}",
            pickle_to(f"run/checkpoints/*/{name}", keep_size=True),
            RESUME.format(2),
            message,
        )
        for name, message in {
            "optimizer.bin": "contains code",
            "random_states_0.pkl": "contains code",
            "model.safetensors": "run/checkpoints",
            "custom_checkpoint_0.pkl": "run/checkpoints",
        }.items()
    ),
    *(
        Case("label name", payload, write("set.yaml", CLASSES.replace("NAME", json.dumps(name))), AUDIT, message)
        for payload, name, message in (
            ("HTML", SCRIPT, None),
            ("Jinja", "{{ cycler.__init__.__globals__.os.system('touch canary') }}", None),
            ("a second line", "a\n```python\nCODE", "text of one line"),
        )
    ),
    Case(
        "label name in config.json",
        "a second line",
        change_json(
            "model/config.json",
            id2label={"0": "background", "1": "a\n```python", "2": "b"},
            label2id={"background": 0, "a\n```python": 1, "b": 2},
        ),
        PREDICT,
        "printable text of one line",
    ),
    Case("GeoTIFF tags", "HTML", lambda folder, _: tag(folder / "scene.tif"), PREDICT, None),
]


def tag(path: Path) -> None:
    """Write HTML into every tag of a scene."""
    with rasterio.open(path, "r+") as file:
        file.update_tags(TIFFTAG_IMAGEDESCRIPTION=SCRIPT, TIFFTAG_SOFTWARE=SCRIPT, title=SCRIPT)
        file.descriptions = (SCRIPT,)


@pytest.fixture(scope="module")
def world(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an ensemble, pseudo-labels, tiles, a scene and a run that can be resumed."""
    root = tmp_path_factory.mktemp("payloads")
    model = make_stage2(root / "model", "toy-segformer", 1)
    make_ensemble(root / "ensemble", [model, make_stage2(root / "other", "toy-segformer", 2)])
    make_pseudo_labels(root / "labels", 2)
    shutil.copytree(oem_sar, root / "dfc25_track1")
    with rasterio.open(root / "scene.tif", "w", "GTiff", 64, 64, 1, dtype="uint8") as scene:
        scene.write(np.random.default_rng(3).integers(1, 256, (1, 64, 64), np.uint8))
    done = run_command(RESUME.format(1), cwd=root, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return root


def test_the_payload_would_run(tmp_path: Path) -> None:
    torch.save({"state": Pickled(f"open('{tmp_path / 'canary'}', 'w').close()")}, tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}: {case.payload}")
def test_no_code_runs(case: Case, world: Path, results: Results, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world, tmp_path / "world"))
    canary = folder / "canary"
    code = f"open('{canary}', 'w').close()"
    case.plant(folder, code)
    (folder / "scripts").symlink_to(Path(__file__).parents[2] / "scripts")
    environment = dict(os.environ) | {"GDAL_VRT_ENABLE_PYTHON": "YES", "HF_DATASETS_TRUST_REMOTE_CODE": "1"}
    done = run_command(case.command, cwd=folder, env=environment, timeout=60, before=partial(answer_yes))
    assert not canary.exists(), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr, done.stderr
    if case.message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and len(errors) == 1 and case.message in errors[0], (done.stdout, done.stderr)
    for path in [*folder.glob("audit/*"), *folder.glob("map*")]:
        if path.suffix in (".html", ".qml", ".xml", ".csv"):
            assert SCRIPT not in path.read_text(), path
    shown = "read, without the payload" if case.message is None else f"one line: {case.message}"
    command = " ".join(case.command.replace(str(READER), "read_from_hub.py").split()[:2])
    results.add(format=case.format, payload=case.payload, command=command, result=shown)
