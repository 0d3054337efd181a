"""Tiles on the Hub, over real HTTP: pushed from a folder, read as the folder is, to the same bits."""

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from accelerate import Accelerator
from conftest import make_scene, write_tiff
from hub_folders import make_pseudo_labels
from hub_server import Fault, Hub, Repository, Stored, go_online, serve_hub
from huggingface_hub import parse_eval_result_entries
from recipe_process import run_recipe

from hf_seg.data import hub_dataset
from hf_seg.data.doctor import detect, examine
from hf_seg.data.hub_dataset import find_hub_dataset, parse_hub_id
from hf_seg.data.open_earth_map import load_open_earth_map, load_open_earth_map_sar
from hf_seg.data.provenance import find_label_set, read_provenance
from hf_seg.data.pseudo_label_dataset import load_pseudo_labels
from hf_seg.errors import DatasetError, UserError
from hf_seg.hub.push import push as push_model
from hf_seg.hub.push_space import push_space
from hf_seg.hub.push_tiles import Tiles, push_tiles
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.studies.label_maps import LabelMaps
from hf_seg.training.hub_data import pin_datasets

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import prepare_data

PROJECT = Path(__file__).parents[1]
TOKEN = "hf_markerMARKERmarker"
TRAINING = (  # noqa: SIM905
    "--model_name_or_path toy-segformer --from_scratch true --crop_size 32 --max_train_steps 4 --warmup_steps 1 "
    "--per_device_train_batch_size 2 --learning_rate 1e-3 --eval_steps 4 --checkpointing_steps 2 --logging_steps 1 "
    "--report_to none --mixed_precision no --dataloader_num_workers 0 "
).split()
SHARD = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub that this process is logged in to."""
    with pytest.MonkeyPatch.context() as patch, serve_hub({TOKEN}) as hub:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
            patch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr("time.sleep", lambda _: None)  # between the attempts of the client
        go_online(hub.url, TOKEN)
        yield hub


@pytest.fixture(autouse=True)
def _ask_the_hub_again() -> None:
    hub_dataset._find.cache_clear()


def push(folder: Path, repository: str, **how: Any) -> str:
    return push_tiles(folder, Tiles.of_folder(*detect(folder)), repository, **how)


@pytest.fixture(scope="module")
def target(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny OpenEarthMap-SAR with optical images in val too, and a description."""
    root = Path(shutil.copytree(oem_sar, tmp_path_factory.mktemp("target") / "dfc25_track1"))
    rng = np.random.default_rng(5)
    for path in sorted((root / "val" / "labels").iterdir()):
        grey, _ = make_scene(rng, 112 if int(path.stem[-1]) % 2 else 96)
        write_tiff(root / "val" / "rgb_images" / path.name, np.stack([grey] * 3))
    described = {"name": "tiny tiles", "layout": "OpenEarthMap-SAR", "license": "CC-BY-4.0"}
    (root / "dataset.json").write_text(json.dumps(described | {"labels": {"train": "simulated", "val": "exact"}}))
    return root


@pytest.fixture(scope="module")
def pushed(hub: Hub, oem: Path, target: Path) -> Hub:
    """Both datasets on the Hub, in several shards."""
    push(oem, "me/oem", shard_bytes=150_000)
    push(target, "me/tiles", shard_bytes=100_000)
    return hub


def store(hub: Hub, name: str, files: dict[str, bytes], **how: Any) -> None:
    """Put files into a new dataset repository."""
    repository = hub.repositories[f"datasets/{name}"] = Repository(private=False, **how)
    repository.commits["a" * 40] = {path: Stored(content, is_lfs=False) for path, content in files.items()}
    repository.refs["main"] = "a" * 40


def shard_of(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


def embedded(pixels: np.ndarray, tmp_path: Path) -> dict[str, Any]:
    write_tiff(tmp_path / "tile.tif", pixels)
    return {"bytes": (tmp_path / "tile.tif").read_bytes(), "path": None}


# Reading


@pytest.mark.parametrize(("layout", "name"), [("oem", "me/oem"), ("target", "me/tiles")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_those_of_the_folder(layout: str, name: str, split: str, pushed: Hub, oem: Path, target: Path) -> None:
    load = load_open_earth_map if layout == "oem" else load_open_earth_map_sar
    here, there = load({"oem": oem, "target": target}[layout], split, embed=True), load(name, split)
    assert len(find_hub_dataset(name).shards("train")) > 1
    assert there.features == here.features and there["image_id"][:] == here["image_id"][:]
    images = [column for column in here.column_names if column not in ("image_id", "region")]
    undecoded = [
        rows.cast(datasets.Features({**rows.features, **dict.fromkeys(images, datasets.Image(decode=False))}))
        for rows in (here, there)
    ]
    assert list(undecoded[0]) == list(undecoded[1])
    streamed = load(name, split, streaming=True)
    assert [row["image_id"] for row in streamed] == here["image_id"][:]


def test_only_the_split_that_is_read_is_downloaded(hub: Hub, target: Path) -> None:
    push(target, "me/lazy")
    hub.requests.clear()
    assert len(load_open_earth_map_sar("me/lazy", "val")) == 3
    found = [each for each in hub.requests if "/data/" in each]
    assert found and all("/data/val-" in each for each in found)
    hub.requests.clear()
    hub_dataset._find.cache_clear()
    assert len(load_open_earth_map_sar("me/lazy", "val")) == 3  # checked and indexed already
    assert not [each for each in hub.requests if "/data/" in each]


def test_what_was_read_is_read_again_without_a_network(hub: Hub, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(target, "me/offline")
    load_open_earth_map_sar("me/offline", "val")
    commit = hub.head("me/offline", "datasets")
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("me/offline", f"me/offline@{commit}", "hf://datasets/me/offline"):
        assert len(load_open_earth_map_sar(name, "val")) == 3
        assert read_provenance(name, "OpenEarthMap-SAR")["revision"] == commit
    with pytest.raises(
        DatasetError, match=r"me/offline@.* has no split 'train' in the cache, and HF_HUB_OFFLINE is set"
    ):
        load_open_earth_map_sar("me/offline", "train")
    with pytest.raises(UserError, match="me/other: no such folder, and HF_HUB_OFFLINE is set but no such dataset"):
        load_open_earth_map_sar("me/other", "train")
    assert hub.requests == []


def test_what_datasets_pushes_is_read(hub: Hub, oem_sar: Path, tmp_path: Path) -> None:
    rows = load_open_earth_map_sar(oem_sar, "train", embed=True)
    rows.to_parquet(tmp_path / "shard")
    store(hub, "me/plain", {"data/train-00000-of-00001-0123456789abcdef.parquet": (tmp_path / "shard").read_bytes()})
    found = load_open_earth_map_sar("me/plain", "train")
    assert found["image_id"][:] == rows["image_id"][:]
    np.testing.assert_array_equal(np.array(found[5]["sar"]), np.array(rows[5]["sar"]))
    assert read_provenance("me/plain", "OpenEarthMap-SAR")["name"] == "me/plain"
    assert find_label_set("me/plain", "OpenEarthMap-SAR") is OPEN_EARTH_MAP


def test_a_commit_says_what_the_data_are(pushed: Hub) -> None:
    commit = pushed.head("me/tiles", "datasets")
    found = read_provenance(f"me/tiles@{commit}", "OpenEarthMap-SAR")
    assert (found["name"], found["released"]) == ("tiny tiles", False)
    assert (found["hub_id"], found["revision"]) == ("me/tiles", commit)
    with pytest.raises(DatasetError, match=r"me/tiles@\w{12}/dataset\.json: layout is 'OpenEarthMap-SAR', but"):
        read_provenance("me/tiles", "OpenEarthMap")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("hf://datasets/org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("hf://datasets/here/name", ("here/name", None)),
        ("here/name", None),  # a misspelt path is not asked for on the Hub
        ("data/dfc25_track1", None),
        ("runs/tiles", None),
        ("/data/tiles", None),
        ("../tiles", None),
        ("tiles", None),
        ("a/b/c", None),
    ],
)
def test_a_name_is_a_folder_or_a_dataset(
    name: str, expected: tuple[str, str | None] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_hub_id(name) == expected


def test_a_uri_of_something_else_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="hf://datasets/name: expected hf://datasets/org/name or"):
        parse_hub_id("hf://datasets/name")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("tasks: [{id: a, config: default, split: val}, {id: b, split: test}]", {"val": "a", "test": "b"}),
        ("tasks: [{id: a, split: validation}, {id: [1], split: val}]", {}),
        ("tasks: [{id: a}]", {}),
        ("tasks: all", {}),
        ("just text", {}),
        ("{", {}),
    ],
)
def test_the_tasks_of_a_benchmark_are_those_of_its_own_description(
    content: str, expected: dict[str, str], hub: Hub
) -> None:
    name = f"me/benchmark{len(content)}"
    store(hub, name, {"README.md": b"", "eval.yaml": content.encode()})
    assert read_provenance(name, "OpenEarthMap-SAR")["benchmark_tasks"] == expected


def test_pseudo_labels_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    push_model(make_pseudo_labels(tmp_path / "two", 2), "me/labels-pinned")
    first = hub.head("me/labels-pinned", "datasets")
    push_model(make_pseudo_labels(tmp_path / "three", 3), "me/labels-pinned")
    hub.requests.clear()
    assert len(load_pseudo_labels(f"me/labels-pinned@{first}")) == 2
    assert not [each for each in hub.requests if "/resolve/" in each and first not in each]
    assert len(load_pseudo_labels("me/labels-pinned")) == 3


def test_a_run_keeps_to_one_commit_of_its_pseudo_labels(hub: Hub, tmp_path: Path) -> None:
    push_model(make_pseudo_labels(tmp_path / "labels", 1), "me/labels-kept")
    args = SimpleNamespace(data_dir="data/tiles", pseudo_labels="me/labels-kept")
    pin_datasets(args, Accelerator(cpu=True))
    assert args.pseudo_labels == f"me/labels-kept@{hub.head('me/labels-kept', 'datasets')}"
    assert args.data_dir == "data/tiles"


def test_a_manifest_that_cannot_be_fetched_is_an_error(hub: Hub, tmp_path: Path) -> None:
    push_model(make_pseudo_labels(tmp_path / "labels", 2), "me/labels-cut")
    hub.faults.append(Fault("", "manifest.json", 99, status=500))
    with pytest.raises(UserError, match=r"me/labels-cut@\w+, manifest\.json cannot be downloaded"):
        load_pseudo_labels("me/labels-cut")
    hub.faults.clear()
    assert len(load_pseudo_labels("me/labels-cut")) == 2


def test_a_shard_with_another_content_is_not_read(hub: Hub, target: Path) -> None:
    push(target, "me/flipped")
    hub.faults.append(Fault("GET", "/data/val-", kind="flipped bit"))
    with pytest.raises(UserError, match=r"me/flipped@\w+: val-.*parquet differs from its checksum on the Hub"):
        load_open_earth_map_sar("me/flipped", "val")
    assert len(load_open_earth_map_sar("me/flipped", "val")) == 3


def test_an_audit_reads_the_labels_of_tiles(pushed: Hub, target: Path) -> None:
    here, there = LabelMaps(str(target / "train" / "labels")), LabelMaps("me/tiles")
    assert {*there.entries} == {*here.entries} and there.name == "me/tiles"
    for image_id in here.entries:
        label, confidence = there.read(image_id)
        np.testing.assert_array_equal(label, here.read(image_id)[0])
        assert confidence is None


# Mistakes


def test_what_is_not_there_is_one_clear_error(hub: Hub, pushed: Hub) -> None:
    store(hub, "me/gated", {}, gated=True)
    store(hub, "me/empty", {"README.md": b""})
    hub.faults.append(Fault("GET", "/api/datasets/me/broken", status=500, times=99))
    for name, message in {
        "me/missing": "me/missing: no such folder, and no such dataset on the Hub, or a private one: correct the name,",
        "me/gated": "me/gated: no access; ask for it on the page of the dataset",
        "me/tiles@nowhere": "me/tiles@nowhere: the dataset me/tiles has no such branch, tag or commit",
        "me/empty": "me/empty@aaaaaaaaaaaa has no split 'test'; found no test-00000-of-00001.parquet or the like",
        "me/tiles": "has no split 'test'; found train, val",
        "me/broken": "me/broken cannot be downloaded (",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            load_open_earth_map_sar(name, "test")
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_private_dataset_without_a_token_is_one_clear_error(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="me/tiles: no such folder, and no such dataset on the Hub, or a private one"):
        load_open_earth_map_sar("me/tiles", "val")


def test_a_missing_shard_is_named_before_anything_is_downloaded(hub: Hub) -> None:
    store(hub, "me/gap", {"data/train-00001-of-00003.parquet": b"", "data/train-00002-of-00003.parquet": b""})
    with pytest.raises(DatasetError, match=r"me/gap@a+ is incomplete: 2 of 3 shards of split 'train'"):
        load_open_earth_map_sar("me/gap", "train")


GREY, IDS = np.full((20, 30), 7, np.uint8), np.full((20, 30), 3, np.uint8)


def _set(column: str, value: Callable[[Path], Any]) -> Callable[[list[dict[str, Any]], Path], None]:
    return lambda rows, folder: rows[1].update({column: value(folder)})


SPOILT: dict[str, tuple[Callable[[list[dict[str, Any]], Path], None], str]] = {
    "not a TIFF": (
        _set("sar", lambda _: {"bytes": b"<html>", "path": None}),
        "row 1 (b, sar): expected a complete GeoTIFF, found b'<html>'",
    ),
    "truncated": (
        lambda rows, _: rows[1]["sar"].update(bytes=rows[1]["sar"]["bytes"][:-200]),
        "row 1 (b, sar): expected a complete GeoTIFF",
    ),
    "no class": (
        _set("label", lambda folder: embedded(np.full((20, 30), 77, np.uint8), folder)),
        "row 1 (b, label): expected ids 0..8, found 77",
    ),
    "other size": (
        _set("label", lambda folder: embedded(IDS[:5], folder)),
        "row 1 (b, sar) 20 x 30",
    ),
    "only a path": (
        _set("sar", lambda _: {"bytes": None, "path": "/etc/hostname"}),
        "row 1 (b): sar has no bytes, only a path",
    ),
    "a name with folders": (
        _set("image_id", lambda _: "../../b"),
        "row 1: image_id must be a file name without its extension; it is '../../b'",
    ),
    "a hidden name": (_set("image_id", lambda _: ".b"), "row 1: image_id must be a file name"),
    "a name twice": (_set("image_id", lambda _: "a"), "row 1: image_id 'a' occurs twice"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_bad_row_is_one_error_that_names_file_and_row(kind: str, hub: Hub, tmp_path: Path) -> None:
    spoil, message = SPOILT[kind]
    rows = [
        {"image_id": name, "optical": None, "sar": embedded(GREY, tmp_path), "label": embedded(IDS, tmp_path)}
        for name in ("a", "b")
    ]
    spoil(rows, tmp_path)
    name = f"me/bad-{kind.replace(' ', '-')}"
    store(hub, name, {SHARD: shard_of(rows)})
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        load_open_earth_map_sar(name, "train")
    assert f"{name}@aaaaaaaaaaaa, {SHARD}, row 1" in str(caught.value) and "\n" not in str(caught.value)
    problems = examine(name).problems
    assert len(problems) == 1 and message in problems[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 and no more", "is damaged ("),
        (shard_of([{"image_id": "a", "sar": b""}]), "no column label, optical of OpenEarthMap-SAR among image_id, sar"),
        (
            shard_of([{"image_id": "a", "sar": "a.tif", "optical": None, "label": None}]),
            "column sar must be images with their bytes; it is string",
        ),
        (shard_of([{"image_id": 1, "sar": None, "optical": None, "label": None}]), "column image_id must be text"),
    ],
)
def test_a_shard_of_something_else_is_named(content: bytes, message: str, hub: Hub) -> None:
    name = f"me/other{len(content)}"
    store(hub, name, {SHARD: content})
    with pytest.raises(DatasetError, match=re.escape(message)) as caught:
        load_open_earth_map_sar(name, "train")
    assert f"{name}@aaaaaaaaaaaa, {SHARD}" in str(caught.value)


# Checking


def test_the_check_of_the_hub_is_that_of_the_folder(pushed: Hub, target: Path) -> None:
    here, there = examine(target).as_dict(), examine("me/tiles").as_dict()
    assert there["root"] == f"me/tiles@{pushed.head('me/tiles', 'datasets')[:12]}"
    assert there["splits"] == {split: here["splits"][split] for split in ("train", "val")}
    assert (there["kind"], there["problems"], there["notes"]) == ("OpenEarthMap-SAR", [], [])


# Pushing


def test_a_push_is_private_complete_and_replaces_an_earlier_one(hub: Hub, target: Path) -> None:
    push(target, "me/again", shard_bytes=100_000)
    repository = hub.repositories["datasets/me/again"]
    before = repository.files()
    assert repository.private and sum(name.startswith("data/train-") for name in before) > 1
    push(target, "me/again")
    after = repository.files()
    assert {*after} == {"README.md", "dataset.json", SHARD, "data/val-00000-of-00001.parquet"}
    assert repository.messages == ["9 tiles in the layout of OpenEarthMap-SAR"] * 2
    described = json.loads(after["dataset.json"])
    assert described == {**read_provenance(target, "OpenEarthMap-SAR"), "bands": None}
    assert not [name for name in after if str(target).encode() in after[name]]


def test_equal_folders_give_equal_shards_and_what_arrived_is_not_sent_again(
    hub: Hub, target: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "elsewhere"))
    hub.objects.clear()  # as if nothing had been pushed
    hub.requests.clear()
    hub.faults.append(Fault("POST", "/api/datasets/me/resumed/commit", status=503, times=99))
    with pytest.raises(
        UserError, match=r"is not on the Hub \(.*the repository is unchanged; try again.*prepare_data"
    ) as caught:
        push(target, "me/resumed", revision="dev")
    assert str(caught.value).endswith(f"prepare_data.py push {target} me/resumed --revision dev")
    assert TOKEN not in str(caught.value)
    assert hub.repositories["datasets/me/resumed"].files("dev") == {}
    sent = [each for each in hub.requests if each.startswith("PUT /lfs/")]
    hub.faults.clear()
    push(copy, "me/resumed", revision="dev")
    assert [each for each in hub.requests if each.startswith("PUT /lfs/")] == sent != []
    assert SHARD in hub.repositories["datasets/me/resumed"].files("dev")


def test_a_tile_that_cannot_be_trained_on_is_not_pushed(hub: Hub, target: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(target, tmp_path / "copy"))
    bad = copy / "val" / "labels" / "ValArea_002.tif"
    bad.write_bytes(b"<html>")
    with pytest.raises(DatasetError, match=re.escape(f"{bad}: expected a complete GeoTIFF")):
        push(copy, "me/unpushed")
    assert hub.repositories["datasets/me/unpushed"].files() == {}


def test_an_existing_public_repository_needs_the_flag(hub: Hub, target: Path) -> None:
    store(hub, "me/public", {"data/train-00000-of-00009.parquet": b"", "notes.txt": b"kept"})
    with pytest.raises(UserError, match="exists already and is public: choose another name, or give --public"):
        push(target, "me/public")
    push(target, "me/public", private=False)
    assert {*hub.repositories["datasets/me/public"].files()} == {
        "README.md",
        "dataset.json",
        "notes.txt",
        SHARD,
        "data/val-00000-of-00001.parquet",
    }


def test_the_card_says_what_is_in_it(pushed: Hub) -> None:
    _, header, text = pushed.repositories["datasets/me/tiles"].files()["README.md"].decode().split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["license"] == "cc-by-4.0" and found["pretty_name"] == "Tiny tiles"
    (config,) = found["configs"]
    assert config["data_files"] == [{"split": each, "path": f"data/{each}-*.parquet"} for each in ("train", "val")]
    for line in (
        "| train | 6 | 6 | simulated |",
        "| val | 3 | 3 | exact |",
        "| water | 6 | `#0045ff` |",
        "`--data_dir me/tiles`, or",
        "Licence: CC-BY-4.0.",
    ):
        assert line in text, line
    assert not re.search(r"\{\{|\}\}|\{%|None|Undefined|\n\n\n", text)


def test_classes_and_bands_of_a_folder_arrive(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "own"
    for number in (1, 2):
        write_tiff(root / f"train/sar_images/T_{number}.tif", np.full((2, 40, 40), 0.5 * number, np.float32))
        write_tiff(root / f"train/labels/T_{number}.tif", np.full((40, 40), 3 * number, np.uint8))
    classes = [{"id": 1, "name": "water", "values": [6]}, {"id": 2, "name": "land", "values": [3]}]
    described = {"name": "own", "layout": "OpenEarthMap-SAR", "bands": {"sar": ["VV", "VH"]}, "classes": classes}
    (root / "dataset.json").write_text(json.dumps(described))
    push(root, "me/own")
    assert find_label_set("me/own", "OpenEarthMap-SAR") == find_label_set(root, "OpenEarthMap-SAR")
    assert read_provenance("me/own", "OpenEarthMap-SAR")["bands"] == {"sar": ["VV", "VH"]}
    here, there = (
        load_open_earth_map_sar(each, "train", **how) for each, how in ((root, {"embed": True}), ("me/own", {}))
    )
    assert there[1]["sar"] == here[1]["sar"] and there[1]["sar"]["bytes"] is not None
    card = hub.repositories["datasets/me/own"].files()["README.md"].decode()
    assert "| `sar` | GeoTIFF with the bands VV, VH |" in card and "| land | 3 |" in card
    assert "license_name: terms-of-the-data" in card


def test_the_command_pushes_and_checks(
    hub: Hub, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare_data.main(["push", str(target), "me/command"]) == 0
    assert "on the Hub, private: http://127.0.0.1" in capsys.readouterr().out
    assert prepare_data.main(["check", "me/command"]) == 0
    assert "OpenEarthMap-SAR in me/command@" in capsys.readouterr().out
    with pytest.raises(UserError, match="me cannot push to you/tiles"):
        prepare_data.main(["push", str(target), "you/tiles"])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="a push needs the Hub, but HF_HUB_OFFLINE is set"):
        prepare_data.main(["push", str(target), "me/command"])


# Training


def train(recipe: str, hub: Hub, output_dir: Path, *arguments: object, **how: Any) -> str:
    """Run a recipe to its end, and return what it printed."""
    words = [*TRAINING, *map(str, arguments), "--output_dir", str(output_dir)]
    log = output_dir.parent / f"log_{output_dir.name}"
    result = run_recipe(recipe, *words, log=log, hub=(hub.url, TOKEN), **how)
    assert how or result.exit_codes == [0], result.output
    return result.output


def test_stage_2_from_the_hub_ends_with_the_bits_of_the_folder_and_resumes_on_its_commit(
    pushed: Hub, target: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    train("stage2", pushed, here, "--data_dir", target)
    push(target, "me/moving", shard_bytes=100_000)
    commit = pushed.head("me/moving", "datasets")
    benchmark = {"name": "tiny", "tasks": [{"id": "tiny_val", "config": "default", "split": "val"}]}
    pushed.repositories["datasets/me/moving"].commits[commit]["eval.yaml"] = Stored(
        yaml.safe_dump(benchmark).encode(), False
    )
    train("stage2", pushed, there, "--data_dir", "me/moving", disturb="kill_before_step:4")
    repository = pushed.repositories["datasets/me/moving"]
    repository.commits["b" * 40] = {"README.md": Stored(b"nothing is left", is_lfs=False)}
    repository.refs["main"] = "b" * 40  # a run that resumes stays where it was
    resume = ("--resume_from_checkpoint", "latest")
    output = train("stage2", pushed, there, "--data_dir", f"me/moving@{'b' * 40}", *resume, disturbed=range(0))
    assert f"error: {there} began with data_dir me/moving@{commit}; now it is me/moving@{'b' * 40}; resume" in output
    assert "resumed from step" in train("stage2", pushed, there, "--data_dir", "me/moving", *resume)

    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    assert json.loads((there / "eval_results.json").read_text()) == json.loads((here / "eval_results.json").read_text())
    assert yaml.safe_load((there / "recipe.yaml").read_text())["data_dir"] == f"me/moving@{commit}"
    assert "data_dir" not in yaml.safe_load((here / "recipe.yaml").read_text())
    recorded = json.loads((there / "training_data.json").read_text())["target"]
    assert (recorded["hub_id"], recorded["revision"], recorded["name"]) == ("me/moving", commit, "tiny tiles")
    card = (there / "README.md").read_text()
    assert f"[me/moving](https://huggingface.co/datasets/me/moving) at revision `{commit}`" in card
    assert f"--data_dir me/moving@{commit}" in card
    header = huggingface_hub.ModelCard(card).data
    assert header.datasets == ["me/moving"]
    assert {(each.dataset_type, each.dataset_revision) for each in header.eval_results} == {("me/moving", commit)}
    for place, expected in ((there, [("me/moving", commit)]), (here, [])):  # as the Hub itself reads them
        files = place.glob(".eval_results/*.yaml")
        entries = [each for file in files for each in parse_eval_result_entries(yaml.safe_load(file.read_text()))]
        assert [(each.dataset_id, each.dataset_revision) for each in entries] == expected
        assert [each.task_id for each in entries] == ["tiny_val"] * len(entries)
        assert [each.value for each in entries] == [header.eval_results[0].metric_value] * len(entries)
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    push_model(there, "me/scored")
    assert ".eval_results/land_cover.yaml" in pushed.repositories["models/me/scored"].files()


@pytest.mark.slow  # stage 2, which reads the same way, is in the default suite
def test_stage_1_from_the_hub_ends_with_the_bits_of_the_folders(
    pushed: Hub, oem: Path, target: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    train("stage1", pushed, here, "--source_dir", oem, "--data_dir", target)
    train("stage1", pushed, there, "--source_dir", "me/oem", "--data_dir", "hf://datasets/me/tiles")
    for name in ("model.safetensors", "student/model.safetensors", "eval_results.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert "target" in json.loads((there / "eval_results.json").read_text())
    assert not (there / ".eval_results").exists()  # these datasets are no benchmarks
    recorded = json.loads((there / "training_data.json").read_text())
    assert {domain: each["hub_id"] for domain, each in recorded.items()} == {"source": "me/oem", "target": "me/tiles"}
    recipe = yaml.safe_load((there / "recipe.yaml").read_text())
    assert recipe["data_dir"] == f"hf://datasets/me/tiles@{pushed.head('me/tiles', 'datasets')}"


# The page as a Space


def test_the_page_becomes_a_space_with_the_package_and_its_models(hub: Hub) -> None:
    for name, private in (("net", False), ("secret", True)):
        hub.repositories[f"models/me/{name}"] = Repository(private)
    url, needs_token = push_space(PROJECT / "space", "me/page", ["me/net"])
    space = hub.repositories["spaces/me/page"]
    assert url.startswith(f"{hub.url}/spaces/me/page/commit/") and not needs_token
    assert space.variables == {"MODELS": "me/net"}
    sent = space.files()
    assert {"app.py", "README.md", "requirements.txt", "hf_seg/demo/page.py", "hf_seg/demo/static/viewer.js"} <= {*sent}
    assert sent["app.py"] == (PROJECT / "space" / "app.py").read_bytes()
    assert not [name for name in sent if "__pycache__" in name or name.startswith(".")]
    assert push_space(PROJECT / "space", "me/page", ["me/net", "me/secret@main"])[1]
    assert space.variables == {"MODELS": "me/net me/secret@main"}


def test_what_is_no_space_or_no_model_of_the_hub_is_one_clear_error(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntitle: x\n---\n")
    (tmp_path / "app.py").write_text("")
    with pytest.raises(UserError, match=r"contains no app for a Space: app\.py, and README\.md with sdk: gradio"):
        push_space(tmp_path, "me/none")
    with pytest.raises(UserError, match="--model me/nowhere was not found on the Hub"):
        push_space(PROJECT / "space", "me/none", ["me/nowhere"])
    with pytest.raises(UserError, match="a Space shows models of the Hub, org/name or org/name@revision"):
        push_space(PROJECT / "space", "me/none", [str(tmp_path)])
    assert "spaces/me/none" not in hub.repositories
