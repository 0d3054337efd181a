"""Generated inputs: whatever a file contains, its reader returns a valid result or raises one line that names it."""

import io
import json
import math
import os
import resource
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import yaml
from bad_inputs.case import raw_tiff
from hub_folders import build_toy, make_ensemble
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from PIL import Image
from rasterio.transform import Affine

from hf_seg.arguments import Stage1Arguments, Stage2Arguments
from hf_seg.data.archives import place_open_earth_map, place_open_earth_map_sar
from hf_seg.data.band_images import read_bands
from hf_seg.data.download import extract
from hf_seg.data.provenance import declared_bands, find_label_set
from hf_seg.data.pseudo_label_dataset import check_inputs, load_pseudo_labels
from hf_seg.data.samples import LabelledImages
from hf_seg.data.scan import scan_open_earth_map
from hf_seg.data.tile_files import read_tile
from hf_seg.data.tile_shards import layout_of, read_tile_shard, tile_features
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model, read_record
from hf_seg.inference.exported import ExportMetadata
from hf_seg.inference.image_input import read_image
from hf_seg.inference.load import load_networks
from hf_seg.label_sets import read_label_set
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.mapping.cli import parse
from hf_seg.mapping.gdal import gdal_session
from hf_seg.mapping.provenance import parse_times
from hf_seg.mapping.scene import Scene
from hf_seg.settings import dump_yaml, parse_arguments
from hf_seg.studies import images as study_images
from hf_seg.studies.label_maps import read_regions
from hf_seg.training.checkpoints import find_checkpoint

SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
SECONDS = 10  # of CPU time for one input
ADDRESSES = 3 * 2**30  # bytes more than before that one input may take


class TooLongError(BaseException):
    """An input took more than `SECONDS`; no reader may catch it."""


@dataclass
class Tally:
    """How the examples of one kind ended."""

    examples: int = 0
    accepted: int = 0
    refused: int = 0
    messages: set[str] = field(default_factory=set)


@contextmanager
def limits() -> Iterator[None]:
    """Limit time and memory of the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    previous = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, previous)


def explore(
    results: Any, kind: str, strategy: st.SearchStrategy[Any], read: Callable[[Any], object], name: str, examples: int
) -> Tally:
    """Read generated inputs and record how they ended.

    Args:
        read: writes one input, reads it and checks what was read.
        name: what each message must contain.
    """
    tally = Tally()

    @seed(SEED)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def example(value: Any) -> None:
        tally.examples += 1
        try:
            with limits():
                read(value)
            tally.accepted += 1
        except UserError as error:
            text = str(error)
            assert len(text.splitlines()) == 1 and name in text and len(text) < 3000, text
            tally.refused += 1
        except UnsatisfiedAssumption:
            tally.examples -= 1
            raise

    example()
    others = tally.examples - tally.accepted - tally.refused
    results.add(
        **{
            "input": kind,
            "examples": tally.examples,
            "accepted": tally.accepted,
            "refused in one line": tally.refused,
            "anything else": others,
        }
    )
    assert others == 0 and tally.refused > 0
    return tally


# ----------------------------------------------------------------- rasters

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64", "complex64", "complex_int16")
COMPRESSIONS = (None, "deflate", "lzw", "zstd", "packbits", "lzma", "jpeg", "webp", "lerc")
CRSES = (None, "EPSG:4326", "EPSG:32654", "EPSG:3857", "EPSG:3413", 'LOCAL_CS["site",UNIT["metre",1]]')
SIDES = st.sampled_from([1, 2, 7, 16, 33, 64, 100])
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 255.0, 1e300, math.nan, math.inf, -0.5])


@st.composite
def rasters(draw: st.DrawFn, *, like_tiles: bool) -> bytes:
    """Draw a valid raster, near what a tile is or of any kind."""
    width, height = draw(SIDES), draw(SIDES)
    count = draw(st.sampled_from([1, 3]) if like_tiles else st.integers(1, 6))
    dtype = (
        draw(st.sampled_from(("uint8", "uint8", "uint8", "uint16"))) if like_tiles else draw(st.sampled_from(DTYPES))
    )
    options: dict[str, Any] = {"interleave": draw(st.sampled_from(["pixel", "band"]))}
    if (compress := draw(st.sampled_from(COMPRESSIONS))) is not None:
        options["compress"] = compress
    if draw(st.booleans()):
        side = draw(st.sampled_from([16, 48, 256]))
        options |= {"tiled": True, "blockxsize": side, "blockysize": draw(st.sampled_from([16, side]))}
    elif draw(st.booleans()):
        options["blockysize"] = draw(st.sampled_from([1, 3, height]))
    if draw(st.booleans()):
        options["bigtiff"] = "yes"
    if dtype == "uint8" and draw(st.booleans()):
        options["nbits"] = draw(st.sampled_from([1, 3, 4, 7]))
    if draw(st.booleans()):
        options["photometric"] = draw(st.sampled_from(["minisblack", "miniswhite", "rgb", "palette", "cmyk", "cielab"]))
    if draw(st.booleans()):
        options["nodata"] = draw(NUMBERS)
    if draw(st.booleans()):
        options["transform"] = Affine(*(draw(NUMBERS) for _ in range(6)))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(
        0, draw(st.sampled_from([1, 2, 9, 255])), (count, height, width)
    )
    content = values.astype("complex64" if dtype.startswith("complex") else dtype)
    if content.dtype.kind == "f" and draw(st.booleans()):
        content[:, :: draw(st.integers(1, 3))] = draw(NUMBERS)
    path = Path("drawn.tif")
    path.unlink(missing_ok=True)
    try:
        how = {"width": width, "height": height, "count": count, "dtype": dtype, "crs": draw(st.sampled_from(CRSES))}
        with gdal_session(), rasterio.open(path, "w", "GTiff", **how, **options) as file:
            file.write(content)
            if draw(st.booleans()):
                file.write_mask(draw(st.booleans()))
            if draw(st.booleans()):
                file.scales, file.offsets = [draw(NUMBERS)] * count, [draw(NUMBERS)] * count
    except Exception:  # a combination that GDAL does not write
        path.write_bytes(raw_tiff({256: width, 257: height}))
    return path.read_bytes()


@st.composite
def corrupted(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Draw a file and change some of its bytes, or cut it off."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        # headers are short, so half of the changes are there
        at = draw(
            st.integers(0, min(len(content), 300) - 1) if draw(st.booleans()) else st.integers(0, len(content) - 1)
        )
        change = draw(st.binary(min_size=1, max_size=4))
        content[at : at + len(change)] = change
    if draw(st.integers(0, 3)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


SIZES = st.sampled_from([0, 1, 2, 3, 8, 64, 255, 256, 1000, 65535, 65536, 10**6, 10**9, 2**31 - 1, 2**31, 2**32 - 1])
TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339)
HEADERS = st.builds(
    lambda tags, data, big: raw_tiff(
        {256: 64, 257: 64, 258: 8, 277: 1, 262: 1, 273: 8, 279: 4096, **tags}, data, big=big
    ),
    st.dictionaries(st.sampled_from(TAGS), st.one_of(SIZES, st.tuples(SIZES, SIZES, SIZES)), max_size=6),
    st.sampled_from([b"", bytes(64), bytes(4096)]),
    st.booleans(),
)


def use_tile(column: str) -> Callable[[bytes], None]:
    """Return what reads a tile of a column."""

    def read(content: bytes) -> None:
        path = Path("tile.tif")
        path.write_bytes(content)
        pixels = read_tile(str(path), column)
        assert pixels.dtype == np.uint8 and pixels.shape[0] == (3 if column == "optical" else 1)
        if column == "label":
            assert pixels.max(initial=0) <= 8

    return read


def use_scene(content: bytes) -> None:
    path = Path("scene.tif")
    path.write_bytes(content)
    with gdal_session(), Scene(path) as scene:
        height = min(scene.height, 64)
        pixels, valid = scene.rows(0, height)
        assert pixels.shape == (len(scene.bands), height, scene.width) and pixels.dtype == np.uint8
        assert valid.shape == pixels.shape[1:] and valid.dtype == bool and not pixels[:, ~valid].any()


def use_bands(content: bytes) -> None:
    path = Path("bands.tif")
    path.write_bytes(content)
    pixels = read_tile(str(path), "sar", names=("VV",))
    raw, valid = read_bands({"bytes": content, "path": None})
    assert raw.shape == pixels.shape and valid.shape == raw.shape[1:]


def use_picture(content: bytes) -> None:
    path = Path("picture.png")
    path.write_bytes(content)
    assert read_image(path).dtype == np.uint8


def use_study_image(content: bytes) -> None:
    path = Path("label.png")
    path.write_bytes(content)
    assert study_images.read_image(path).ndim in (2, 3)


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """Draw a PNG or a JPEG."""
    mode = draw(st.sampled_from(["L", "RGB", "RGBA", "P", "1", "I;16", "LA"]))
    buffer = io.BytesIO()
    try:
        Image.new(mode, (draw(SIDES), draw(SIDES))).save(
            buffer, draw(st.sampled_from(["png", "png", "jpeg", "gif", "bmp"]))
        )
    except OSError:
        return b""
    return buffer.getvalue()


@st.composite
def png_headers(draw: st.DrawFn) -> bytes:
    """Draw a PNG whose header claims any size."""
    import zlib

    header = struct.pack(
        ">IIBBBBB", draw(SIZES), draw(SIZES), draw(st.sampled_from([1, 8, 16])), draw(st.integers(0, 6)), 0, 0, 0
    )
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(bytes(draw(st.sampled_from([1, 1000]))))),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "strategy", "read", "name", "examples"),
    [
        ("SAR tile", rasters(like_tiles=True), use_tile("sar"), "tile.tif", 300),
        ("optical tile", rasters(like_tiles=True), use_tile("optical"), "tile.tif", 200),
        ("label", rasters(like_tiles=True), use_tile("label"), "tile.tif", 300),
        ("tile, any raster", rasters(like_tiles=False), use_tile("sar"), "tile.tif", 300),
        ("tile, bytes changed", corrupted(rasters(like_tiles=True)), use_tile("sar"), "tile.tif", 600),
        ("tile, any header", HEADERS, use_tile("sar"), "tile.tif", 800),
        ("tile with named bands", corrupted(rasters(like_tiles=False)), use_bands, "bands.tif", 300),
        ("scene, any raster", rasters(like_tiles=False), use_scene, "scene.tif", 500),
        ("scene, bytes changed", corrupted(rasters(like_tiles=True)), use_scene, "scene.tif", 600),
        ("scene, any header", HEADERS, use_scene, "scene.tif", 800),
        ("picture, bytes changed", corrupted(pictures()), use_picture, "picture.png", 400),
        ("PNG, any header", png_headers(), use_picture, "picture.png", 300),
        ("PNG label, any header", png_headers(), use_study_image, "label.png", 300),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rasters(
    kind: str, strategy: st.SearchStrategy[bytes], read: Callable[[bytes], None], name: str, examples: int, results: Any
) -> None:
    explore(results, kind, strategy, read, name, examples)


# ----------------------------------------------------------------- documents: YAML and JSON

HUGE = "a number of thousands of digits"
WORDS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "background", "water", "a\nb", "\0", "0", "-1", "..", "/", "é"])
)
NUMBERS_OF_ANY_SIZE = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**9, -(10**9), 10**30, 2**63]),
    st.floats(),
    st.just(math.inf),
    st.just(HUGE),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS_OF_ANY_SIZE, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a document."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """Draw a document with some values replaced, removed or added."""
    holder = [json.loads(json.dumps(document))]
    for _ in range(draw(st.integers(0, 3))):
        *path, key = (0, *draw(st.sampled_from([*places(holder[0])])))
        parent: Any = holder
        for step in path:
            parent = parent[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove" and path:
            del parent[key]
        elif action == "add" and isinstance(parent[key], dict):
            parent[key][draw(WORDS)] = draw(VALUES)
        elif action == "add" and isinstance(parent[key], list):
            parent[key].append(draw(VALUES))
        else:
            parent[key] = draw(VALUES)
    return holder[0]


def as_json(value: Any) -> bytes:
    """Return JSON."""
    return json.dumps(value).replace(f'"{HUGE}"', "9" * 6000).encode()


def as_yaml(value: Any) -> bytes:
    """Return YAML; numbers of any size are hexadecimal there."""
    return yaml.safe_dump(value, allow_unicode=True).replace(HUGE, "0x" + "f" * 6000).encode()


def texts(document: Any, write: Callable[[Any], bytes]) -> st.SearchStrategy[bytes]:
    """Draw a changed document as a file, or one with changed bytes, or other text."""
    whole = changed(document).map(write)
    return st.one_of(whole, whole, corrupted(whole), st.text().map(str.encode))


CLASSES = {
    "classes": [
        {"id": 1, "name": "water", "colour": "#0045ff", "aliases": ["lake"], "values": [6]},
        {"id": 2, "name": "land"},
    ],
    "background": [0],
    "ignore": [255],
    "unmapped": "ignore",
}
DATASET = {
    "name": "mine",
    "layout": "OpenEarthMap-SAR",
    "license": None,
    "synthetic": False,
    "labels": {"val": "exact"},
    "bands": {"sar": ["VV"]},
    **CLASSES,
}
METADATA = {
    "format": 1,
    "name": "net",
    "revision": None,
    "classes": [
        {"id": index, "name": name, "color": f"#{index:02x}0000"} for index, name in enumerate(["background", "a", "b"])
    ],
    "background": 0,
    "bands": 3,
    "input_bands": {"names": ["VV"], "low": [0.0], "high": [1.0]},
    "crop_size": 64,
    "size_multiple": 32,
    "members": [],
    "versions": {},
    "opset": 18,
}


def check_label_set(found: LabelSet) -> None:
    assert 3 <= found.num_labels <= 255 and len({*found.colors}) == len(found.colors) == len(found.names)
    assert all(0 <= value <= 255 for value in found.values)
    assert {*found.values.values()} <= {*range(found.num_labels), 255}


def use_label_set(content: bytes) -> None:
    Path("classes.yaml").write_bytes(content)
    check_label_set(read_label_set("classes.yaml"))


def use_recipe(content: bytes) -> None:
    Path("recipe.yaml").write_bytes(content)
    for kind in (Stage1Arguments, Stage2Arguments):
        found = parse_arguments(kind, ["--config", "recipe.yaml"])
        assert 1 <= found.max_train_steps <= 10**9 and found.crop_size % 32 == 0 and 0 < found.learning_rate <= 1e6


def use_dataset(content: bytes) -> None:
    Path("sar/train/sar_images").mkdir(parents=True, exist_ok=True)
    Path("sar/dataset.json").write_bytes(content)
    assert all(names for names in declared_bands("sar", "OpenEarthMap-SAR").values())
    check_label_set(find_label_set("sar", "OpenEarthMap-SAR"))


def use_metadata(content: bytes) -> None:
    found = ExportMetadata.from_json(content.decode(errors="replace"), "net.onnx")
    check_label_set(found.label_set)
    assert found.crop_size > 0


def use_inputs(content: bytes) -> None:
    Path("run").mkdir(exist_ok=True)
    Path("run/inputs.json").write_bytes(content)
    check_inputs(Path("run"), {"models": [{"name": "a", "revision": None, "sha256": "0"}], "image_ids": ["x"]})


def use_checkpoint(content: bytes) -> None:
    place = Path("run/checkpoints/step_00000001")
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_bytes(content)
    assert find_checkpoint(Path("run"), str(place)) == place


def use_record(content: bytes) -> None:
    Path("eval_results.json").write_bytes(content)
    assert isinstance(read_record(Path("eval_results.json")), dict)


INPUTS = {"models": [{"name": "a", "revision": None, "sha256": "0"}], "image_ids": ["x"]}
CHECKPOINT = {"step": 1, "samples_seen": 2, "num_processes": 1, "best_score": None, "files": {}}


@pytest.mark.parametrize(
    ("kind", "strategy", "read", "name", "examples"),
    [
        ("label set, YAML", texts(CLASSES, as_yaml), use_label_set, "classes.yaml", 800),
        (
            "recipe, YAML",
            texts({"seed": 1, "learning_rate": 1e-3, "crop_size": 64, "from_scratch": True, "label_set": "x"}, as_yaml),
            use_recipe,
            "",
            800,
        ),
        ("dataset.json", texts(DATASET, as_json), use_dataset, "dataset.json", 800),
        ("metadata of an exported model", texts(METADATA, as_json), use_metadata, "net", 600),
        ("inputs.json of pseudo-labels", texts(INPUTS, as_json), use_inputs, "run", 400),
        ("manifest of a checkpoint", texts(CHECKPOINT, as_json), use_checkpoint, "run", 400),
        ("record of a run, JSON", texts({"mean_iou": 0.5}, as_json), use_record, "eval_results.json", 300),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_documents(
    kind: str, strategy: st.SearchStrategy[bytes], read: Callable[[bytes], None], name: str, examples: int, results: Any
) -> None:
    explore(results, kind, strategy, read, name, examples)


# ----------------------------------------------------------------- models


def test_configs_of_models(results: Any, folder: Path) -> None:
    export_model(build_toy("toy-segformer", 0), folder / "model", crop_size=64, recipe="", results=None)

    def use(file: str) -> Callable[[bytes], None]:
        path = folder / "model" / file
        good = path.read_bytes()

        def read(content: bytes) -> None:
            path.write_bytes(content)
            try:
                (network,) = load_networks("model")
                assert network.module is not None and 1 <= network.crop_size <= 2**14
                check_label_set(network.label_set)
            finally:
                path.write_bytes(good)

        return read

    for file in ("config.json", "preprocessor_config.json"):
        document = json.loads((folder / "model" / file).read_text())
        explore(results, f"{file} of a network", texts(document, as_json), use(file), "model", 150)
    make_ensemble(folder / "ensemble", [folder / "model", folder / "model"])
    listed = json.loads((folder / "ensemble" / "ensemble.json").read_text())

    def use_ensemble(content: bytes) -> None:
        (folder / "ensemble" / "ensemble.json").write_bytes(content)
        found = load_networks("ensemble", low_memory=True)
        assert found and all(0 < each.weight < math.inf for each in found)

    explore(results, "ensemble.json", texts(listed, as_json), use_ensemble, "ensemble", 300)


# ----------------------------------------------------------------- tables


def encode(label: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(label).save(buffer, "png")
    return buffer.getvalue()


CELLS = st.one_of(
    st.builds(lambda content: {"bytes": content, "path": None}, corrupted(pictures())),
    st.builds(lambda value: {"bytes": encode(np.full((16, 16), value, np.uint8)), "path": None}, st.integers(0, 255)),
    st.just({"bytes": None, "path": None}),
    st.just({"bytes": None, "path": "/etc/hostname"}),
    st.none(),
)
NAMES = st.one_of(st.sampled_from(["a", "b", "", "..", "a/b", "x\ny", "\0"]), st.text(max_size=5))
COLUMN = st.one_of(
    st.lists(CELLS, min_size=2, max_size=2),
    st.lists(st.integers(0, 9), min_size=2, max_size=2),
    st.lists(st.binary(max_size=9), min_size=2, max_size=2),
    st.lists(st.text(max_size=5), min_size=2, max_size=2),
)


@st.composite
def tables(draw: st.DrawFn, columns: tuple[str, ...]) -> bytes:
    """Draw a Parquet file of two rows."""
    found: dict[str, Any] = {"image_id": draw(st.lists(NAMES, min_size=2, max_size=2))}
    if draw(st.integers(0, 3)) == 0:
        found["image_id"] = draw(COLUMN)
    likely = st.lists(CELLS, min_size=2, max_size=2)
    for name in columns:
        if draw(st.integers(0, 9)):
            found[name] = draw(likely if draw(st.integers(0, 3)) else COLUMN)
    buffer = pa.BufferOutputStream()
    try:
        pq.write_table(pa.table(found), buffer, compression=draw(st.sampled_from(["none", "zstd", "snappy"])))
    except (pa.ArrowException, UnicodeEncodeError):
        return b"PAR1"
    return bytes(buffer.getvalue())


def use_shard(content: bytes) -> None:
    path = Path("shard.parquet")
    path.write_bytes(content)
    layout = layout_of(path, "shard.parquet")
    for row in read_tile_shard(path, "shard.parquet", layout):
        assert row.image_id and "/" not in row.image_id


def use_pseudo_labels(content: bytes) -> None:
    import datasets

    Path("labels").mkdir(exist_ok=True)
    Path("labels/data.parquet").write_bytes(content)
    found = load_pseudo_labels("labels")
    tile = {"bytes": encode(np.ones((16, 16), np.uint8)), "path": None}
    features = tile_features("OpenEarthMap-SAR", {})
    rows = datasets.Dataset.from_list(
        [{"image_id": "a", "optical": None, "sar": tile, "label": None}], features=features
    )
    try:
        sample = LabelledImages(rows, "sar", pseudo_labels=found)[0]
    except UserError as error:
        raise UserError(f"labels: {error}") from None  # these name the tile
    assert sample.label.shape == (16, 16) and {*np.unique(sample.label)} <= {*range(1, 9), 255}


def test_tables(results: Any) -> None:
    shards = tables(("optical", "sar", "label"))
    explore(results, "Parquet of tiles", shards, use_shard, "shard.parquet", 300)
    explore(results, "Parquet of tiles, bytes changed", corrupted(shards), use_shard, "shard.parquet", 400)
    labels = tables(("pseudo_label",))
    explore(results, "Parquet of pseudo-labels", labels, use_pseudo_labels, "labels", 60)
    explore(results, "Parquet of pseudo-labels, bytes changed", corrupted(labels), use_pseudo_labels, "labels", 40)


# ----------------------------------------------------------------- archives, lists, words

MEMBERS = st.lists(
    st.sampled_from(
        ["..", ".", "train", "labels", "TrainArea_001.tif", "a", "A", "C:", "__MACOSX", "x\ny", "é", "", "OpenEarthMap"]
    ),
    min_size=1,
    max_size=4,
).map("/".join)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Draw a zip file."""
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # duplicate names
        for name in draw(st.lists(MEMBERS, max_size=4)):
            entry = zipfile.ZipInfo(draw(st.sampled_from([name, name, "/" + name])))
            entry.compress_type = draw(
                st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
            )
            entry.external_attr = draw(st.sampled_from([0, 0, 0, 0o120777 << 16, 0o020666 << 16, 0o100000 << 16]))
            archive.writestr(entry, draw(st.binary(max_size=50)))
    return buffer.getvalue()


def use_archive(content: bytes) -> None:
    import shutil

    place = place_open_earth_map if len(content) % 2 else place_open_earth_map_sar
    shutil.rmtree("data", ignore_errors=True)
    Path("archive.zip").write_bytes(content)
    outside = set(Path().rglob("*"))
    try:
        sizes = extract(Path("archive.zip"), Path("data"), place)
        assert all((Path("data") / name).stat().st_size == size for name, size in sizes.items())
    finally:
        assert all(path.parts[0] == "data" for path in {*Path().rglob("*")} - outside)
        assert not any(path.is_symlink() for path in Path("data").rglob("*"))


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            ["acre_1.tif", "acre_2", "../acre_1.tif", "/acre_1.tif", '"', "9" * 5000, "a" * 200_000, "\0", ","]
        ),
        st.text(max_size=20),
    ),
    max_size=8,
)
LISTS = st.builds(
    lambda lines, end, encoding: end.join(lines).encode(encoding, "replace"),
    LINES,
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-8-sig"]),
)


def use_split_list(content: bytes) -> None:
    for kind in ("images", "labels"):
        Path("oem/acre", kind).mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            Path("oem/acre", kind, f"acre_{number}.tif").touch()
    Path("oem/train.txt").write_bytes(content)
    scan = scan_open_earth_map("oem")
    assert {row.image_id for row in scan.rows["train"]} <= {"acre_1", "acre_2"}
    assert len(scan.describe_missing("train").splitlines()) <= 1


TABLE = st.lists(st.lists(st.sampled_from(["image_id", "region", "a", "b", '"', ""]), max_size=3), max_size=4).map(
    lambda rows: "\n".join(map(",".join, rows)).encode()
)


def use_regions(content: bytes) -> None:
    Path("regions.csv").write_bytes(content)
    found = read_regions(Path("regions.csv"), ["a", "b"])
    assert found is not None and len(found) == 2 and all(found)


def test_archives_and_lists(results: Any) -> None:
    explore(results, "zip archive", archives(), use_archive, "archive.zip", 400)
    explore(results, "zip archive, bytes changed", corrupted(archives()), use_archive, "archive.zip", 600)
    explore(results, "split list", LISTS, use_split_list, "train.txt", 300)
    regions = st.one_of(TABLE, st.binary(max_size=60), corrupted(st.just(b"image_id,region\na,x\nb,y\n")))
    explore(results, "CSV of regions", regions, use_regions, "regions.csv", 400)


FLAG_WORDS = st.one_of(
    st.sampled_from(
        [
            "--stretch",
            "--bands",
            "--window",
            "--stride",
            "--abstain",
            "--units",
            "db",
            "--tta",
            "none",
            "--json",
            "--cog",
            "true",
            "false",
            "--overwrite",
            "1",
            "0",
            "nan",
            "inf",
            "-1",
            "9" * 5000,
            "1e400",
            "--",
            "-",
            "=",
            "--bands=1,2",
            "null",
            "--polygons",
            ".gpkg",
            "--datetime",
        ]
    ),
    st.text(max_size=6),
)
TIMES = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(
            [
                "2025-04-01",
                "T",
                "10:30:00",
                "Z",
                "/",
                "+23:59",
                "-12:00",
                "0001-01-01",
                "9999-12-31",
                "2025:04:01 10:00:00",
                " ",
            ]
        ),
        max_size=6,
    ).map("".join),
)


def use_words(words: list[str]) -> None:
    _, options = parse(["scene.tif", "map.tif", "--model", "m", *words])
    assert 0 < options.stride <= 1 and 0 <= options.abstain <= 1 and (options.window is None or options.window >= 1)


def use_settings(words: list[str]) -> None:
    dump_yaml(vars(parse_arguments(Stage2Arguments, words)))


def use_time(text: str) -> None:
    begin, end = parse_times(text)
    assert begin <= end


def test_command_lines(results: Any) -> None:
    explore(results, "command line of predict", st.lists(FLAG_WORDS, max_size=5), use_words, "", 1000)
    names = st.sampled_from(
        ["--seed", "--learning_rate", "--crop_size", "--from_scratch", "--lora_targets", "--head_width", "--cache_gib"]
    )
    explore(
        results, "command line of stage2", st.lists(st.one_of(names, FLAG_WORDS), max_size=5), use_settings, "", 1000
    )
    explore(results, "time of a scene", TIMES, use_time, "datetime", 600)


def test_classes_of_the_releases_are_accepted() -> None:
    check_label_set(OPEN_EARTH_MAP)
