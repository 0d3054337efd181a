"""Exported networks: the same probabilities and maps as PyTorch's, with what QGIS and STAC need, or one clear error."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_scene, write_tiff
from mapping_networks import read
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_seg.bands import Bands
from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.export.check import compare, generate_tile
from hf_seg.export.formats import open_graph
from hf_seg.export.graph import ProbabilityGraph, traceable
from hf_seg.export.records import input_bands, training_data_name
from hf_seg.export.stac import validate_item
from hf_seg.export.write import Exported, ExportOptions, export_networks
from hf_seg.hub.export import export_model, write_training_data
from hf_seg.inference.exported import METADATA_KEY, open_exported, unstretch
from hf_seg.inference.load import load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.label_sets import config_of
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet
from hf_seg.mapping import cli
from hf_seg.mapping.raster import predict_raster
from hf_seg.models import build_model
from hf_seg.normalization import Normalization
from hf_seg.stem import set_input_bands

PROJECT = Path(__file__).parents[1]
TWO = Bands(("VV", "VH"), (-30.0, -36.0), (0.0, -6.0))
CPU = torch.device("cpu")
WATER = LabelSet(("background", "water", "land"), ((0, 0, 0), (0, 0, 255), (9, 8, 7)), {0: 0, 1: 1, 2: 2}, ((),) * 3)
DIFFERENCE = 2e-6  # of a probability, of networks with large random weights


def save_tiny(folder: Path, *, seed: int, mean: float = 0.4, bands: Bands | None = None, bad: bool = False) -> Path:
    """Save a SegFormer of two levels with random weights, trained at 32 pixels."""
    torch.manual_seed(seed)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        initializer_range=0.3,
        **config_of(OPEN_EARTH_MAP if bands is None else WATER),
        semantic_loss_ignore_index=IGNORE_INDEX,
    )
    model = SegformerForSemanticSegmentation(config)
    count = 3 if bands is None else len(bands.names)
    normalization = Normalization((mean,) * count, (0.25,) * count)
    names = bands.names if bands else ("red", "green", "blue")
    set_input_bands(model, names, normalization, bands=bands)
    if bad:
        nn.init.constant_(model.decode_head.classifier.weight, 3e38)  # finite, but not what it returns
    export_model(model, folder, crop_size=32, recipe="ce_weight: 1", results=None)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of different normalisations, their ensemble, and one of two bands in decibels and two classes."""
    root = tmp_path_factory.mktemp("models")
    members = [save_tiny(root / "a", seed=0), save_tiny(root / "b", seed=1, mean=0.2)]
    EnsembleForSemanticSegmentation.from_members(members, weights=[3, 1]).save_pretrained(root / "ensemble")
    save_tiny(root / "dual", seed=2, bands=TWO)
    return root


def export(model: Path, folder: Path, **options: Any) -> Exported:
    options = {"format": "onnx", **options}
    return export_networks(load_networks(model), folder, ExportOptions(**options))


@pytest.fixture(scope="module")
def exported(root: Path) -> Exported:
    """The ensemble as ONNX of one band and any size."""
    return export(root / "ensemble", root / "exported", bands=1, resolution_cm=50, trained_on="tiles")


@pytest.fixture(scope="module")
def dual(root: Path) -> Exported:
    """The network of two bands as ONNX of a fixed size."""
    return export(root / "dual", root / "exported_dual", fixed_size=True)


def label_maps_agree(model: Path, exported: Path, image: np.ndarray) -> None:
    """Compare label maps of an image, except where the two most probable classes differ by less than 1e-5."""
    expected = Predictor(load_networks(model), device=CPU).predict(image)
    found = Predictor(load_networks(exported), device=CPU).predict(image)
    assert torch.allclose(expected.probs(), found.probs(), atol=2e-6)
    first, second = expected.probs()[1:].topk(2, dim=0).values
    is_clear = first - second >= 1e-5
    assert is_clear.float().mean() > 0.99
    assert torch.equal(expected.label_map()[is_clear], found.label_map()[is_clear])


def test_an_ensemble_is_one_graph_of_any_size(exported: Exported, root: Path) -> None:
    """Members of different normalisations and weights; the law of the output against the ensemble's own classes."""
    assert max(exported.differences.values()) < DIFFERENCE
    assert [*exported.differences] == ["1x1x32x32", "2x1x32x32", "1x1x40x56"]
    pixels = torch.from_numpy(make_scene(np.random.default_rng(0), 64)[0][None, None, :45, :64].astype(np.float32))
    probs = open_graph(exported.file, "onnx")(pixels)
    members = load_networks(root / "ensemble")
    expected = torch.zeros(1, OPEN_EARTH_MAP.num_labels, 45, 64)
    with torch.no_grad():
        for member, weight in zip(members, (0.75, 0.25), strict=True):
            values = (pixels / 255 - member.normalization.mean[0]) / member.normalization.std[0]
            expected += weight * member.network()(values.expand(-1, 3, -1, -1)).logits.softmax(1)
    assert torch.equal(probs[:, 0], torch.zeros(1, 45, 64))
    assert torch.allclose(probs[:, 1:], expected[:, 1:], atol=1e-5)
    assert members[0].normalization != members[1].normalization


def test_a_map_through_onnxruntime_is_that_of_pytorch_without_its_model_code(
    exported: Exported, root: Path, tmp_path: Path
) -> None:
    image, _ = make_scene(np.random.default_rng(3), 96)
    write_tiff(tmp_path / "scene.tif", image[:70])
    layers = ["--confidence", "--probabilities"]
    cli.main([str(tmp_path / "scene.tif"), str(tmp_path / "torch.tif"), "--model", str(root / "ensemble"), *layers])
    arguments = [str(tmp_path / "scene.tif"), str(tmp_path / "onnx.tif"), "--model", str(exported.file), *layers]
    code = (
        f"import sys\nfrom hf_seg.mapping import cli\ncli.main({arguments!r})\n"
        "print(sorted(m for m in sys.modules if m.startswith('timm') or m.startswith('transformers.models')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    torch_map, onnx_map = (read(tmp_path / f"{name}.tif") for name in ("torch", "onnx"))
    probabilities = [read(tmp_path / f"{name}_probabilities.tif").astype(int) for name in ("torch", "onnx")]
    assert abs(probabilities[0] - probabilities[1]).max() <= 1  # background too, which the file does not contain
    assert abs(read(tmp_path / "torch_confidence.tif").astype(int) - read(tmp_path / "onnx_confidence.tif")).max() <= 1
    assert np.array_equal(torch_map, onnx_map) and len(np.unique(torch_map)) > 2
    label_maps_agree(root / "ensemble", exported.file, image)


def test_bands_with_a_stretch_are_given_in_their_own_units(dual: Exported, root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    raw = np.stack([rng.uniform(-33, 3, (40, 48)), rng.uniform(-39, -3, (40, 48))]).astype(np.float32)
    raw[:, :9, :9] = np.nan
    assert dual.metadata.stretch == TWO and dual.metadata.size_multiple is None and dual.metadata.bands == 2
    assert max(dual.differences.values()) < DIFFERENCE and [*dual.differences] == ["1x2x32x32", "2x2x32x32"]
    with torch.no_grad():
        probs = open_graph(dual.file, "onnx")(torch.from_numpy(raw[None, :, :32, :32]))
        (member,) = load_networks(root / "dual")
        levels = TWO.to_uint8(raw, np.isfinite(raw).all(axis=0))[None, :, :32, :32]
        expected = member.network()(member.normalization.apply(torch.from_numpy(levels))).logits.softmax(1)
    assert torch.allclose(probs[:, 1:], expected[:, 1:], atol=1e-6)
    write_tiff(tmp_path / "scene.tif", raw)
    for name, model in (("torch", root / "dual"), ("onnx", dual.file)):
        predict_raster(model, tmp_path / "scene.tif", tmp_path / f"{name}.tif", show_progress=False)
    assert np.array_equal(read(tmp_path / "torch.tif"), read(tmp_path / "onnx.tif"))
    assert (read(tmp_path / "onnx.tif")[:9, :9] == 0).all()


def test_levels_survive_the_way_through_raw_values() -> None:
    levels = torch.arange(1, 256).expand(2, 1, 255).float()
    raw = unstretch(levels[None], TWO)[0].numpy()
    assert raw[0, 0, 0] == -30 and raw[1, 0, 254] == -6
    assert np.array_equal(TWO.to_uint8(raw, np.ones((1, 255), bool)), levels.numpy())
    assert torch.isnan(unstretch(torch.zeros(1, 2, 1, 1), TWO)).all()


def test_a_program_of_torch_export_agrees_too(root: Path) -> None:
    written = export(root / "a", root / "pt2", format="pt2", bands=3)
    assert max(written.differences.values()) < DIFFERENCE and written.file.name == "model.pt2"
    assert written.metadata.opset is None and written.metadata.size_multiple == 1
    assert str(PROJECT).encode() not in written.file.read_bytes()
    item = json.loads((root / "pt2" / "stac.json").read_text())
    assert item["assets"]["model"]["mlm:artifact_type"] == "torch.export.save"
    assert item["properties"]["mlm:framework"] == "PyTorch"
    with pytest.raises(UserError, match=r"pt2 is for torch\.export\.load, which unpickles; export the model with"):
        load_networks(root / "pt2")


def test_the_qgis_plug_in_feeds_what_the_graph_expects(exported: Exported) -> None:
    """Deepness: uint8 pixels / 255, then its standardisation; JSON in the file's metadata."""
    found = read_onnx_metadata(exported.file)
    values = {key: json.loads(value) for key, value in found.items()}
    assert values["model_type"] == "Segmentor" and values["resolution"] == 50
    assert values["tile_size"] == values["tiles_size"] == 32 and values["tiles_overlap"] == 50
    assert [values["class_names"][str(i)] for i in range(OPEN_EARTH_MAP.num_labels)] == list(OPEN_EARTH_MAP.names)
    pixels = np.arange(256)
    mean, std = (np.array(values[f"standardization_{key}"], np.float32) for key in ("mean", "std"))
    assert mean.shape == std.shape == (1,)
    fed = (np.float32(pixels * 1.0 / 255.0) - mean) / std
    assert np.abs(fed - pixels).max() < 1e-4
    assert values["seg_thresh"] == values["seg_small_segment"] == 0


def read_onnx_metadata(path: Path) -> dict[str, str]:
    import onnx

    return {each.key: each.value for each in onnx.load(path).metadata_props}


def test_the_file_says_what_it_is(exported: Exported, dual: Exported) -> None:
    metadata = json.loads(read_onnx_metadata(exported.file)[METADATA_KEY])
    assert [each["weight"] for each in metadata["members"]] == [0.75, 0.25]
    assert [each["normalization"]["mean"][0] for each in metadata["members"]] == [0.4, 0.2]
    assert metadata["classes"][6] == {"id": 6, "name": "water", "color": "#0045ff"}
    assert metadata["opset"] >= 18 and {"torch", "onnx", "transformers", "hf_seg"} <= metadata["versions"].keys()
    assert open_exported(exported.file).metadata == exported.metadata
    import onnx

    graph = onnx.load(exported.file).graph
    shapes = [[dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in graph.input]
    assert shapes == [["batch", 1, "height", "width"]]
    assert str(PROJECT).encode() not in exported.file.read_bytes()  # no path of this machine
    assert "class_names" not in read_onnx_metadata(dual.file)  # the plug-in takes 8-bit images only


def test_the_stac_item_is_valid_and_describes_the_file(exported: Exported, dual: Exported) -> None:
    item = json.loads((exported.file.parent / "stac.json").read_text())
    validate_item(item)
    properties, asset = item["properties"], item["assets"]["model"]
    assert any("/mlm/v1." in uri for uri in item["stac_extensions"])
    assert asset["href"] == "./model.onnx" and asset["file:size"] == exported.file.stat().st_size == exported.size
    assert properties["mlm:input"][0]["input"]["shape"] == [-1, 1, -1, -1]
    classes = properties["mlm:output"][0]["classification:classes"]
    assert [each["description"] for each in classes] == list(OPEN_EARTH_MAP.names)
    assert properties["hf_seg:max_difference"] == exported.differences and properties["hf_seg:resolution_cm"] == 50
    assert "An ensemble of 2 networks" in properties["description"] and "trained on tiles" in properties["description"]
    of_dual = json.loads((dual.file.parent / "stac.json").read_text())["properties"]["mlm:input"][0]
    assert load_networks(dual.file)[0].label_set.colors == WATER.colors
    assert of_dual["bands"] == ["VV", "VH"] and of_dual["input"]["shape"] == [-1, 2, 32, 32]
    for key, wrong in (("mlm:tasks", ["guessing"]), ("mlm:name", "")):
        with pytest.raises(UserError, match=r"stac.json would not be valid"):
            validate_item({**item, "properties": {**properties, key: wrong}})
    with pytest.raises(UserError, match=r"stac.json would not be valid"):
        validate_item({key: value for key, value in item.items() if key != "assets"})


def test_a_difference_is_an_error_and_leaves_nothing(exported: Exported, root: Path, tmp_path: Path) -> None:
    graph = ProbabilityGraph(load_networks(root / "ensemble"))
    tile = generate_tile(graph, 1, 32)
    with pytest.raises(UserError, match=r"differs from PyTorch by 0.001 at 1x1x32x32; nothing was written"):
        compare(lambda pixels: graph(pixels) + 1e-3, graph, tile, exported.metadata)
    with pytest.raises(UserError, match=r"does not run at 1x1x32x32: The size"):
        compare(lambda pixels: pixels + torch.zeros(5, 7), graph, tile, exported.metadata)
    save_tiny(tmp_path / "bad", seed=0, bad=True)
    with pytest.raises(UserError, match=r"the exported bad differs from PyTorch by nan"):
        export(tmp_path / "bad", tmp_path / "out", format="pt2", fixed_size=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_an_opset_that_is_not_known_and_an_image_of_16_bits_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"opset must be at most \d+, the newest that onnx [\d.]+ knows; it is 999"):
        export(root / "a", tmp_path / "out", format="onnx", opset=999)
    write_tiff(tmp_path / "wide.tif", np.full((32, 32), 999, np.uint16))
    with pytest.raises(UserError, match=r"wide\.tif has pixels of uint16; the networks take images of 8 bits"):
        export(root / "a", tmp_path / "out", format="onnx", image=tmp_path / "wide.tif")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("length", "bins"), [(2, 6), (7, 3), (5, 1), (12, 6), (3, 2)])
def test_pooling_as_matrices_is_adaptive_pooling(length: int, bins: int) -> None:
    features = torch.rand(2, 3, length, length + 1)
    holder = nn.Sequential(nn.AdaptiveAvgPool2d(bins))
    expected = holder(features)
    with traceable(holder):
        assert torch.allclose(holder(features), expected, atol=1e-6)
        assert "forward" in vars(holder[0])
    assert "forward" not in vars(holder[0])


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1), (4, 4, 1)])
def test_padding_for_multiples_of_the_stride_is_that_of_timm(kernel: int, stride: int, dilation: int) -> None:
    from timm.layers import Conv2dSame

    holder = nn.Sequential(Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation))
    features = torch.rand(1, 2, 32, 64)
    with torch.no_grad(), traceable(holder):
        found = holder(features)
    assert torch.equal(found, holder(features))


def test_what_a_run_recorded_decides_bands_and_data(root: Path, tmp_path: Path) -> None:
    for text, bands in (("method: dacs", None), ("ce_weight: 1", 1), ("column: sar", 1), ("column: optical", None)):
        (tmp_path / "recipe.yaml").write_text(text)
        assert input_bands(tmp_path) == bands
    (tmp_path / "config.json").write_text((root / "dual" / "config.json").read_text())
    (tmp_path / "recipe.yaml").write_text("ce_weight: 1")
    assert input_bands(tmp_path) is None and input_bands(root / "nowhere") is None
    keys = ("name", "layout", "description", "license", "synthetic", "released", "labels")
    write_training_data(tmp_path, {"target": dict.fromkeys(keys, "x")})
    assert training_data_name(tmp_path) == "x" and training_data_name(root) is None


def run_script(*arguments: object) -> int:
    """Run scripts/export_model.py in this process and return its exit code."""
    before, sys.argv = sys.argv, ["export_model.py", *map(str, arguments)]
    try:
        runpy.run_path(str(PROJECT / "scripts" / "export_model.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def other_folder(path: Path) -> None:
    path.mkdir()
    (path / "config.json").touch()


def nothing(path: Path) -> None:
    pass


# what makes {out}, arguments after --format onnx, the error; {root} has the models
MISTAKES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "format": (
        nothing,
        "--model {root}/a --output {out} --format tflite",
        "argument --format: invalid choice: 'tflite' (choose from 'onnx', 'pt2'); --help lists the settings",
    ),
    "no model": (
        nothing,
        "--model {root} --output {out}",
        "{root} is neither a model nor an ensemble: it has no config.json and no ensemble.json",
    ),
    "exported already": (
        nothing,
        "--model {root}/exported/model.onnx --output {out}",
        "{root}/exported/model.onnx cannot be exported: it is no SegFormer or UperNet",
    ),
    "file": (Path.touch, "--model {root}/a --output {out}", "{out} is a file; name a folder"),
    "in a file": (
        Path.touch,
        "--model {root}/a --output {out}/x",
        "{out}/x cannot be written (Not a directory); free disk space or choose another place",
    ),
    "run": (
        other_folder,
        "--model {root}/a --output {out} --overwrite",
        "{out} contains config.json, which is no part of an export; name another folder",
    ),
    "existing": (
        nothing,
        "--model {root}/a --output {root}/exported",
        "{root}/exported contains an export; add --overwrite, or name another folder",
    ),
    "opset of pt2": (
        nothing,
        "--model {root}/a --output {out} --format pt2 --opset 18",
        "opset is for onnx; pt2 has none",
    ),
    "crop": (
        nothing,
        "--model {root}/a --output {out} --crop_size 0",
        "crop_size must be more than 0 and finite; it is 0",
    ),
    "bands": (
        nothing,
        "--model {root}/a --output {out} --bands 2",
        "the input has 2 bands; these networks take 1 or 3",
    ),
    "bands with a stretch": (
        nothing,
        "--model {root}/dual --output {out} --bands 1",
        "the input has 1 bands; these networks take 2",
    ),
    "bands of the image": (
        nothing,
        "--model {root}/a --output {out} --bands 3 --image {root}/grey.tif",
        "{root}/grey.tif has 1 bands, not 3",
    ),
    "no image": (
        nothing,
        "--model {root}/a --output {out} --image {out}",
        "{out} cannot be read as an image ({out}: No such file or directory)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    name: str, exported: Exported, root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, arguments, message = MISTAKES[name]
    if "grey" in arguments:
        write_tiff(root / "grey.tif", make_scene(np.random.default_rng(0), 32)[0])
    names = {"root": root, "out": tmp_path / "out"}
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*")), exported.file.stat().st_mtime_ns
    assert run_script("--format", "onnx", *arguments.format(**names).split()) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: " + message.format(**names)
    assert (sorted(tmp_path.rglob("*")), exported.file.stat().st_mtime_ns) == before


def test_networks_that_do_not_fit_into_one_graph_are_told(root: Path) -> None:
    networks = load_networks(root / "ensemble")
    networks[1].crop_size = 64
    graph = ProbabilityGraph(networks)
    with pytest.raises(UserError, match=r"different crops \(a 32, b 64\); choose one for all with --crop"):
        graph.crop_size()
    assert graph.crop_size(48) == 48 and graph.size_multiple(48) == 1
    torch.manual_seed(0)
    swin = load_networks(root / "a")[0]
    swin.module.model = build_model("toy-swinv2", crop_size=32, from_scratch=True)  # type: ignore[union-attr]
    graph = ProbabilityGraph([swin])
    assert graph.size_multiple(32) is None
    with pytest.raises(UserError, match="a computes windows of 32 pixels only, not of 64"):
        graph.crop_size(64)
    networks[1].label_set = WATER
    with pytest.raises(UserError, match="class 1 is 'bareland' in a and 'water' in b"):
        ProbabilityGraph(networks)


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime", "stac_model"])
def test_a_missing_package_is_told_before_the_work(
    package: str, root: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"an export as onnx needs {package}: pip install 'hf_seg\[export\]'"):
        export(root / "a", tmp_path / "out")
    if package == "onnxruntime":
        with pytest.raises(UserError, match=r"model.onnx needs onnxruntime: pip install 'hf_seg\[onnx\]'"):
            load_networks(exported.file)


def test_a_file_that_is_no_export_is_named(exported: Exported, tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    content = exported.file.read_bytes()
    path = tmp_path / "x.onnx"
    with pytest.raises(UserError, match=r"x.onnx cannot be read \(No such file or directory\)"):
        load_networks(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"x.onnx cannot be opened as an ONNX model; export it again \("):
        load_networks(path)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", values[:1], values[1:])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(other, path)
    with pytest.raises(UserError, match=r"x.onnx was not exported by hf_seg: it does not say what it takes"):
        load_networks(path)
    known = json.loads(exported.metadata.to_json())
    classes = [{"id": 0, "name": "a", "color": "000000"}]
    for wrong, message in (
        ("no json", "has damaged metadata"),
        (json.dumps({**known, "format": 0}), "was exported by another version of hf_seg"),
        (json.dumps({**known, "input_bands": {"names": ["VV"]}}), "has damaged metadata"),
        (json.dumps({**known, "classes": classes}), "is no segmentation model of this project: its class 0"),
    ):
        other.metadata_props.clear()
        other.metadata_props.add(key=METADATA_KEY, value=wrong)
        onnx.save(other, path)
        with pytest.raises(UserError, match=message):
            load_networks(path)


def test_weights_in_a_file_of_their_own_are_found_and_part_of_the_digest(exported: Exported, tmp_path: Path) -> None:
    """As the exporter writes a model over 2 GB."""
    import onnx

    (tmp_path / "large").mkdir()
    model, path = onnx.load(exported.file), tmp_path / "large" / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data")
    (tmp_path / "large").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "model.onnx"
    image, _ = make_scene(np.random.default_rng(2), 40)
    found, expected = (Predictor(load_networks(each), device=CPU).predict(image) for each in (path, exported.file))
    assert torch.allclose(found.probs(), expected.probs(), atol=1e-6)
    before, weights = open_exported(path).sha256, path.with_name("model.onnx.data")
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    assert open_exported(path).sha256 != before
    weights.unlink()
    with pytest.raises(UserError, match=r"model.onnx cannot be opened as an ONNX model; export it again \("):
        load_networks(path)


def test_an_exported_network_is_one_of_the_networks(exported: Exported, dual: Exported, root: Path) -> None:
    """In an ensemble beside others; a window that it cannot compute is told."""
    ensemble = EnsembleForSemanticSegmentation.from_members([exported.file.parent, root / "a"])
    image, _ = make_scene(np.random.default_rng(0), 40)
    (result,) = ensemble.predict(image)
    assert result.label_map.shape == image.shape
    with pytest.raises(UserError, match="so it cannot be saved as part of an ensemble"):
        ensemble.save_pretrained(root / "mixed")
    (loaded,) = load_networks(exported.file.parent)
    assert loaded.name == "exported" and loaded.sha256 == load_networks(exported.file)[0].sha256
    assert loaded.sha256 != load_networks(dual.file)[0].sha256
    fingerprints = [Predictor(load_networks(each.file), device=CPU).fingerprint for each in (exported, exported, dual)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with pytest.raises(UserError, match="takes windows of 32 x 32 pixels only, not 40 x 40; choose another --window"):
        load_networks(dual.file)[0].network()(torch.ones(1, 2, 40, 40))
    with pytest.raises(UserError, match="the image has 3 bands, the network takes 1"):
        Predictor([loaded], device=CPU).predict(np.ones((32, 32, 3), np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("toy", ["toy-segformer", "toy-convnextv2", "toy-swinv2", "toy-efficientnet-lite0"])
def test_every_architecture_agrees(toy: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(toy, crop_size=64, from_scratch=True)
    export_model(model, tmp_path / toy, crop_size=64, recipe="", results=None)
    written = export(tmp_path / toy, tmp_path / "out", format=format, bands=1)
    assert max(written.differences.values()) < 1e-6
    assert written.metadata.size_multiple == {"toy-swinv2": None, "toy-efficientnet-lite0": 32}.get(toy, 1)
    run: Callable[[Tensor], Tensor] = open_graph(written.file, format)
    graph = ProbabilityGraph(load_networks(tmp_path / toy))
    if written.metadata.size_multiple:
        for height, width in ((160, 96), (224, 128)):
            pixels = 255 * torch.rand(1, 1, height, width)
            with torch.no_grad():
                assert torch.allclose(run(pixels), graph(pixels), atol=1e-6)
    if format == "onnx":
        label_maps_agree(tmp_path / toy, written.file, make_scene(np.random.default_rng(1), 150)[0])


@pytest.mark.slow
def test_an_ensemble_of_architectures_has_the_size_that_all_allow(tmp_path: Path) -> None:
    for seed, toy in enumerate(("toy-segformer", "toy-swinv2")):
        torch.manual_seed(seed)
        model = build_model(toy, crop_size=64, from_scratch=True)
        export_model(model, tmp_path / toy, crop_size=64, recipe="", results=None)
    members = [tmp_path / "toy-segformer", tmp_path / "toy-swinv2"]
    EnsembleForSemanticSegmentation.from_members(members, weights=[1, 2]).save_pretrained(tmp_path / "both")
    written = export(tmp_path / "both", tmp_path / "out", bands=1)
    assert written.metadata.size_multiple is None and max(written.differences.values()) < 1e-6
    label_maps_agree(tmp_path / "both", written.file, make_scene(np.random.default_rng(1), 150)[0])
