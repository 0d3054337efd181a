"""Push and pull over real HTTP: what is pushed opens anywhere with stock classes; a failure loses nothing."""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_folders import SYNTHETIC, make_ensemble, make_pseudo_labels, make_stage1, make_stage2
from hub_server import Fault, Hub, go_online, serve_hub
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_seg import EnsembleForSemanticSegmentation, hub_client
from hf_seg.errors import UserError, one_line_errors
from hf_seg.hub.push import check_complete, check_login, push
from hf_seg.inference.load import load_networks
from hf_seg.labels import OPEN_EARTH_MAP

PROJECT = Path(__file__).parents[1]
TOKEN = "hf_markerMARKERmarker"
NETWORKS = ("segformer", "convnextv2", "swinv2")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hf_seg.training.evaluation", "hf_seg.training.optimization", "hf_seg.hub.export"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished output folder of every kind."""
    root = tmp_path_factory.mktemp("runs")
    found = {name: make_stage2(root / name, f"toy-{name}", seed) for seed, name in enumerate(NETWORKS)}
    found |= {"stage1": make_stage1(root / "stage1"), "ensemble": make_ensemble(root / "ensemble", [*found.values()])}
    return found | {"labels": make_pseudo_labels(root / "labels")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process is logged in to; its client does not wait between attempts."""
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))  # restored
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with serve_hub({TOKEN}) as hub:
        go_online(hub.url, TOKEN)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Push and pull

PULL = '''
import json, os, re, sys, time
import numpy as np, torch
from PIL import Image
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.inference.load import load_networks

def weights(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}

def use_card(name, kind="model", revision=None):
    """Run the card's own lines, and return what they define."""
    card = open(hf_hub_download(name, "README.md", repo_type=kind, revision=revision), encoding="utf-8").read()
    found = {}
    exec(re.search("```python\\n(.*?)```", card, re.DOTALL)[1], found)
    return found

def draw(segments):
    label_map = np.zeros((64, 64), np.uint8)
    for segment in segments:
        label_map[np.asarray(segment["mask"]) > 0] = label2id[segment["label"]]
    return label_map

time.sleep = lambda _: None  # between the attempts of the client
label2id, refusals, arrays = json.loads(sys.argv[1]), {}, {}
image = Image.open("scene.png")
token = os.environ.pop("HF_TOKEN")
try:
    load_networks("me/convnextv2")
except UserError as error:
    refusals["private"] = str(error)
os.environ["HF_TOKEN"] = token
for reason, name in (("revision", "me/segformer@nowhere"), ("cut", "me/halves")):
    try:
        load_networks(name)
    except UserError as error:
        refusals[reason] = str(error)
for name in ("me/segformer", "me/convnextv2", "org/swinv2@dev", "me/stage1"):
    repository, _, revision = name.partition("@")
    place = {"revision": revision} if revision else {}
    for subfolder in ("", "student") if name == "me/stage1" else ("",):
        model = AutoModelForSemanticSegmentation.from_pretrained(repository, subfolder=subfolder, **place).eval()
        processor = AutoImageProcessor.from_pretrained(repository, subfolder=subfolder, **place)
        (loaded,) = load_networks(name, subfolder=subfolder)
        ours = loaded.network().model
        assert loaded.crop_size == 64
        assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            logits = model(**processor(image.convert("RGB"), return_tensors="pt")).logits
        arrays[f"{repository}/{subfolder}"] = logits.numpy()
    stock = pipeline("image-segmentation", model=repository, **place)(image, subtask="semantic")
    arrays[f"{repository}/map"] = draw(stock)
    assert (draw(use_card(repository, **place)["segments"]) == draw(stock)).all()
ensemble = EnsembleForSemanticSegmentation.from_pretrained("me/ensemble")
arrays["me/ensemble/map"] = ensemble.predict("scene.png")[0].label_map
assert (use_card("me/ensemble")["result"].label_map == arrays["me/ensemble/map"]).all()
member = AutoModelForSemanticSegmentation.from_pretrained("me/ensemble", subfolder="member_1")
arrays |= {f"member/{key}": value for key, value in weights(member).items()}
rows = load_dataset("me/labels", split="train")
assert use_card("me/labels", "dataset")["rows"]["image_id"] == rows["image_id"]
arrays |= {f"label/{row['image_id']}": np.array(row["pseudo_label"]) for row in rows}
np.savez("pulled.npz", **arrays)
print(json.dumps(refusals))
'''


class Pulled(NamedTuple):
    """What a fresh process with an empty cache got from the Hub."""

    hub: Hub
    arrays: dict[str, np.ndarray]
    refusals: dict[str, str]


@pytest.fixture(scope="module")
def pulled(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pulled]:
    """Push a folder of every kind, then pull all of them, one download cut short on the way."""
    root = tmp_path_factory.mktemp("elsewhere")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(pixels).save(root / "scene.png")
    with pytest.MonkeyPatch.context() as patch, serve_hub({TOKEN}) as hub:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
            patch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
        patch.setenv("HF_TOKEN", TOKEN)
        go_online(hub.url, TOKEN)
        push(folders["segformer"], "me/segformer")
        push(folders["convnextv2"], "me/convnextv2", private=True)
        push(folders["swinv2"], "org/swinv2", revision="dev")
        for name in ("stage1", "ensemble", "labels"):
            push(folders[name], f"me/{name}")
        push(folders["segformer"], "me/halves")
        hub.faults = [Fault("GET", f"me/segformer/resolve/{hub.head('me/segformer')}/model.safetensors")]
        hub.faults += [Fault("GET", f"me/halves/resolve/{hub.head('me/halves')}/model.safetensors", times=99)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(root / "empty")}
        environment |= {"HF_TOKEN": TOKEN, "PYTHONPATH": str(PROJECT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", PULL, json.dumps(OPEN_EARTH_MAP.label2id)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        with np.load(root / "pulled.npz") as arrays:
            yield Pulled(hub, dict(arrays), json.loads(done.stdout.splitlines()[-1]))


PLACES = {"segformer": "me/segformer", "convnextv2": "me/convnextv2", "swinv2": "org/swinv2", "stage1": "me/stage1"}


@pytest.mark.parametrize("name", PLACES)
def test_a_network_predicts_the_same_elsewhere(name: str, folders: dict[str, Path], pulled: Pulled) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).convert("RGB")
    for subfolder in ("", "student") if name == "stage1" else ("",):
        model = AutoModelForSemanticSegmentation.from_pretrained(folders[name] / subfolder).eval()
        processor = AutoImageProcessor.from_pretrained(folders[name] / subfolder)
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits
        np.testing.assert_array_equal(pulled.arrays[f"{PLACES[name]}/{subfolder}"], logits.numpy())
    assert len(np.unique(pulled.arrays[f"{PLACES[name]}/map"])) > 1


def test_weights_arrive_bit_for_bit(folders: dict[str, Path], pulled: Pulled) -> None:
    for name, place in PLACES.items():
        files = pulled.hub.repositories[f"models/{place}"].files("dev" if name == "swinv2" else "main")
        assert files["model.safetensors"] == (folders[name] / "model.safetensors").read_bytes()
    member = load_file(folders["ensemble"] / "member_1" / "model.safetensors")
    assert {key for key in pulled.arrays if key.startswith("member/")} == {f"member/{key}" for key in member}
    for key, value in member.items():
        np.testing.assert_array_equal(pulled.arrays[f"member/{key}"], value.numpy())


def test_the_ensemble_predicts_the_same_elsewhere(folders: dict[str, Path], pulled: Pulled) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    (here,) = EnsembleForSemanticSegmentation.from_pretrained(folders["ensemble"]).predict(pixels)
    np.testing.assert_array_equal(pulled.arrays["me/ensemble/map"], here.label_map)


def test_pseudo_labels_arrive_bit_for_bit(folders: dict[str, Path], pulled: Pulled) -> None:
    rng = np.random.default_rng(0)  # as the folder was made
    for number in range(3):
        label = rng.integers(1, len(OPEN_EARTH_MAP.label2id), (32, 32)).astype(np.uint8)
        np.testing.assert_array_equal(pulled.arrays[f"label/TrainArea_{number:03d}"], label)
    files = pulled.hub.repositories["datasets/me/labels"].files()
    assert json.loads(files["manifest.json"])["files"]["README.md"] == sha256(files["README.md"])
    here = contents(folders["labels"])
    assert {*here} - {*files} == {"local_paths.yaml"}
    assert {name for name in files if files[name] != here[name]} == {"README.md", "manifest.json", "inputs.json"}
    manifest = json.loads(files["manifest.json"])
    assert manifest["files"] == {name: sha256(files[name]) for name in files if name != "manifest.json"}
    assert manifest["models"] == [{"name": "stage1", "revision": None, "sha256": "0" * 64}]


def test_a_download_that_was_cut_resumes(pulled: Pulled) -> None:
    path = f"GET /me/segformer/resolve/{pulled.hub.head('me/segformer')}/model.safetensors"
    assert (pulled.hub.requests.count(path), pulled.hub.faults[0].times) == (2, 0)


def test_a_download_that_is_always_cut_is_one_clear_error(pulled: Pulled) -> None:
    assert "me/halves was not found locally or on the Hub (peer closed connection" in pulled.refusals["cut"]
    assert "\n" not in pulled.refusals["cut"]
    assert pulled.hub.faults[1].times < 98


def test_a_private_network_without_a_token_is_one_clear_error(pulled: Pulled) -> None:
    assert "me/convnextv2" in pulled.refusals["private"] and "\n" not in pulled.refusals["private"]
    assert "was not found locally or on the Hub" in pulled.refusals["private"]


def test_a_missing_revision_is_one_clear_error(pulled: Pulled) -> None:
    assert "me/segformer@nowhere was not found locally or on the Hub" in pulled.refusals["revision"]
    assert "Revision Not Found" in pulled.refusals["revision"] and "\n" not in pulled.refusals["revision"]


def test_a_push_to_a_branch_leaves_main_unchanged(pulled: Pulled) -> None:
    repository = pulled.hub.repositories["models/org/swinv2"]
    assert repository.files("main") == {}
    card = repository.files("dev")["README.md"].decode()
    assert 'model="org/swinv2", revision="dev")' in card and '--model "org/swinv2@dev"' in card
    assert pulled.hub.repositories["models/me/convnextv2"].private


def test_only_the_files_of_the_model_are_sent(folders: dict[str, Path], pulled: Pulled) -> None:
    model = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "eval_results.json"}
    figures = {"figures/curves.png", "figures/confusion_matrix.png", "figures/panel.png"}
    sent = {*pulled.hub.repositories["models/me/segformer"].files()}
    assert sent == model | figures | {"README.md", "metrics.jsonl"}
    sent = {*pulled.hub.repositories["models/me/stage1"].files()}
    figures = {"figures/curves.png", "figures/source/panel.png", "figures/target/panel.png"}
    assert sent == model | {f"student/{name}" for name in model} | figures | {"README.md"}


def test_nothing_that_is_sent_names_a_local_folder(folders: dict[str, Path], pulled: Pulled) -> None:
    local = str(folders["segformer"].parent)
    assert local in (folders["segformer"] / "local_paths.yaml").read_text()
    assert local in (folders["stage1"] / "local_paths.yaml").read_text()
    assert local in (folders["ensemble"] / "eval_results.json").read_text()
    assert local in (folders["labels"] / "inputs.json").read_text()
    n_files = 0
    for repository in pulled.hub.repositories.values():
        for files in (repository.files(commit) for commit in repository.commits):
            for name, content in files.items():
                assert local.encode() not in content and b"/home/me" not in content, name
                assert "local_paths" not in name
                n_files += 1
    assert n_files > 60


def test_the_commit_says_step_and_score(folders: dict[str, Path], pulled: Pulled) -> None:
    results = json.loads((folders["segformer"] / "eval_results.json").read_text())
    messages = {name: repository.messages for name, repository in pulled.hub.repositories.items()}
    assert messages["models/me/segformer"] == [f"Model of step 500, mIoU {results['mean_iou']:.4f}"]
    assert re.fullmatch(r"Ensemble, mIoU 0\.\d{4}", messages["models/me/ensemble"][0])
    assert re.fullmatch(r"Pseudo-labels of 3 tiles, [0-9a-f]{12}", messages["datasets/me/labels"][0])


# Failures


def test_a_second_push_removes_files_of_the_first_and_no_others(hub: Hub, tmp_path: Path) -> None:
    push(make_pseudo_labels(tmp_path / "three", 3), "me/labels")
    repository = hub.repositories["datasets/me/labels"]
    push(make_pseudo_labels(tmp_path / "two", 2), "me/labels")
    shards = {name for name in repository.files() if name.endswith(".parquet")}
    assert shards == {f"data/train-0000{number}-of-00002.parquet" for number in range(2)}
    commit = repository.commits[repository.refs["main"]]
    commit["notes.txt"] = commit["recipe.yaml"]
    push(make_pseudo_labels(tmp_path / "one", 1), "me/labels")
    assert "notes.txt" in repository.files()


def test_many_files_are_sent_in_one_commit(hub: Hub, tmp_path: Path) -> None:
    push(make_pseudo_labels(tmp_path / "labels", 300), "me/labels")
    repository = hub.repositories["datasets/me/labels"]
    assert len(repository.messages) == 1
    assert sum(name.endswith(".parquet") for name in repository.files()) == 300


def test_the_record_of_the_data_is_sent(hub: Hub, tmp_path: Path) -> None:
    push(make_pseudo_labels(tmp_path / "labels", training_data=SYNTHETIC), "me/labels")
    sent = hub.repositories["datasets/me/labels"].files()
    assert json.loads(sent["training_data.json"]) == SYNTHETIC
    assert b"license: apache-2.0" in sent["README.md"]


def test_a_large_file_that_is_on_the_hub_is_not_sent_again(hub: Hub, folders: dict[str, Path]) -> None:
    push(folders["segformer"], "me/x")
    hub.requests.clear()
    push(folders["segformer"], "me/x")
    assert not [request for request in hub.requests if request.startswith("PUT")]


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        (Fault("PUT", "/lfs/"), 2),
        (Fault("PUT", "/lfs/", times=2, status=503), 3),
        (Fault("PUT", "/lfs/", status=500), 2),
    ],
    ids=["cut", "503 twice", "500"],
)
def test_an_upload_that_fails_is_tried_again(fault: Fault, attempts: int, hub: Hub, folders: dict[str, Path]) -> None:
    hub.faults = [fault]
    push(folders["segformer"], "me/x")
    assert sum(request.startswith("PUT") for request in hub.requests) == attempts
    sent = hub.repositories["models/me/x"].files()["model.safetensors"]
    assert sent == (folders["segformer"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/repos/create", times=99),
        Fault("POST", "/preupload/", times=99, status=503),
        Fault("PUT", "/lfs/", times=99),
        Fault("PUT", "/lfs/", times=99, status=500),
        Fault("POST", "/commit/", times=99),
        Fault("POST", "/commit/", times=99, status=502),
        Fault("POST", "/commit/", times=99, status=403),
    ],
    ids=lambda fault: f"{fault.part.strip('/')} {fault.status or 'cut'}",
)
def test_a_failed_push_loses_nothing_and_the_command_in_its_message_works(
    fault: Fault, hub: Hub, folders: dict[str, Path]
) -> None:
    folder = folders["segformer"]
    before = contents(folder)
    hub.faults = [fault]
    with pytest.raises(UserError, match="is complete and unchanged, but is not on the Hub") as raised:
        push(folder, "me/x", private=True, revision="new")
    command = f"try again: python scripts/push_to_hub.py {folder} me/x --private --revision new"
    assert str(raised.value).endswith(command) and "\n" not in str(raised.value)
    assert TOKEN not in str(raised.value)
    assert contents(folder) == before
    assert hub.repositories.get("models/me/x") is None or hub.repositories["models/me/x"].messages == []
    hub.faults = []
    push(folder, "me/x", private=True, revision="new")
    assert "model.safetensors" in hub.repositories["models/me/x"].files("new")


def test_the_token_is_not_printed_even_if_a_server_repeats_it(hub: Hub, folders: dict[str, Path]) -> None:
    hub.faults = [Fault("GET", "whoami", status=403), Fault("POST", "/repos/create", status=403)]
    for ask in (lambda: check_login("me/x"), lambda: push(folders["segformer"], "me/x")):
        with pytest.raises(UserError, match=r"refused Bearer \.\.\.") as raised:
            ask()
        assert TOKEN not in str(raised.value)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client of this process as `limit_waiting` makes it, but a server is silent after half a second."""
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
    hub_client.limit_waiting()
    huggingface_hub.close_session()  # the next one has this limit
    yield
    huggingface_hub.close_session()


def test_a_silent_hub_is_an_error_and_not_waited_for(hub: Hub, patient: None, folders: dict[str, Path]) -> None:
    hub.faults = [Fault("GET", "whoami", 99, kind="silent"), Fault("POST", "/commit/", 99, kind="silent")]
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        check_login("me/x")
    with pytest.raises(UserError, match="is complete and unchanged, but is not on the Hub"):
        push(folders["segformer"], "me/x")


def test_a_hub_that_asks_to_wait_for_a_day_is_not_obeyed(hub: Hub, patient: None, folders: dict[str, Path]) -> None:
    hub.faults = [Fault("POST", "/preupload/", 99, status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(UserError, match="answers 429, and asks to wait 86400 seconds; run it again then"):
        push(folders["segformer"], "me/x")
    assert sum("/preupload/" in request for request in hub.requests) == 1
    hub.faults = [Fault("POST", "/preupload/", 1, status=429, headers={"Retry-After": "3"})]
    push(folders["segformer"], "me/x")


def test_a_commit_that_came_in_between_is_not_overwritten(
    hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folders["segformer"], "me/x")
    repository, create = hub.repositories["models/me/x"], huggingface_hub.HfApi.create_commit

    def create_late(api: Any, *args: Any, **options: Any) -> Any:
        repository.commits["b" * 40] = {**repository.commits[repository.refs["main"]]}
        repository.refs["main"] = "b" * 40
        return create(api, *args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_late)
    with pytest.raises(UserError, match=r"is not on the Hub \(.*412"):
        push(folders["stage1"], "me/x")
    assert repository.refs["main"] == "b" * 40
    monkeypatch.undo()
    go_online(hub.url, TOKEN)
    push(folders["stage1"], "me/x")
    assert "student/model.safetensors" in repository.files()


@pytest.mark.parametrize("fault", [Fault("POST", "/commit/", kind="cut answer"), Fault("POST", "/commit/", status=500)])
def test_only_a_lost_answer_leaves_open_whether_a_commit_arrived(
    fault: Fault, hub: Hub, folders: dict[str, Path]
) -> None:
    hub.faults = [replace(fault)]
    arrived = fault.kind == "cut answer"
    message = "is complete and unchanged, but is not on the Hub"
    if arrived:
        message = r"the answer to the commit was lost .* sends nothing twice: python scripts/push_to_hub\.py .* me/x"
    with pytest.raises(UserError, match=message):
        push(folders["segformer"], "me/x")
    repository = hub.repositories["models/me/x"]
    assert len(repository.messages) == arrived
    push(folders["segformer"], "me/x")
    assert len(repository.messages) == 1 and "model.safetensors" in repository.files()


@pytest.mark.parametrize("kind", ["other JSON", "web page"])
def test_an_answer_of_something_else_is_one_line(kind: str, hub: Hub) -> None:
    hub.faults = [Fault("GET", "whoami", kind=kind)]
    with pytest.raises(UserError, match="the Hub cannot be reached, or does not accept the token") as raised:
        check_login("me/x")
    assert "\n" not in str(raised.value) and TOKEN not in str(raised.value)


def test_a_model_with_another_content_is_not_loaded_and_is_downloaded_again(
    hub: Hub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push(folders["segformer"], "me/x")
    for name, file in (("model.safetensors", "model.safetensors"), ("config.json", "config.json")):
        cache = tmp_path / name
        hub.faults = [Fault("GET", f"/{file}", kind="flipped bit")]
        with pytest.raises(UserError, match=f"me/x: {file} differs from its checksum on the Hub"):
            load_networks("me/x", cache_dir=cache)
        (loaded,) = load_networks("me/x", cache_dir=cache)
        assert loaded.folder is not None
        assert (loaded.folder / file).read_bytes() == (folders["segformer"] / file).read_bytes()


def test_the_token_is_not_in_errors_and_logs_of_a_download(
    hub: Hub, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub.faults = [Fault("GET", "", 99, status=403)]
    with pytest.raises(UserError, match="was not found locally or on the Hub") as raised:
        load_networks("me/x", cache_dir=tmp_path)
    logger = logging.getLogger("huggingface_hub.test")
    record = logger.makeRecord(logger.name, logging.WARNING, "", 0, "refused %s", (f"Bearer {TOKEN}",), None)
    assert record.getMessage() == "refused Bearer ..."
    printed = capfd.readouterr()
    assert TOKEN not in f"{raised.value}{printed.out}{printed.err}"


def test_the_token_stays_with_the_hub(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    push(folders["segformer"], "me/x", private=True)
    hub.faults = [Fault("", "/resolve/", 99, kind="elsewhere")]
    (loaded,) = load_networks("me/x", cache_dir=tmp_path)
    assert loaded.folder is not None and hub.elsewhere_headers
    assert (loaded.folder / "model.safetensors").read_bytes() == (
        folders["segformer"] / "model.safetensors"
    ).read_bytes()
    assert not [headers for headers in hub.elsewhere_headers if TOKEN in headers or "authorization" in headers.lower()]


def test_a_public_repository_is_not_used_as_a_private_one(hub: Hub, folders: dict[str, Path]) -> None:
    push(folders["segformer"], "me/x")
    with pytest.raises(UserError, match="the repository exists already and is public"):
        push(folders["stage1"], "me/x", private=True)
    assert len(hub.repositories["models/me/x"].messages) == 1


def test_login_is_checked_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_login("me/x")
    check_login("org/x")
    with pytest.raises(UserError, match="me cannot push to you/x: you is none of me, org"):
        check_login("you/x")
    hub.role = "read"
    with pytest.raises(UserError, match="the token of me may only read"):
        check_login("me/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="the Hub cannot be reached, or does not accept the token") as raised:
        check_login("me/x")
    assert "hf_wrong" not in str(raised.value)
    asked = len(hub.requests)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"a push to me/x needs a token: `hf auth login`, or .* HF_TOKEN"):
        check_login("me/x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_login("me/x")
    assert len(hub.requests) == asked


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rename_class(path: Path) -> None:
    path.write_text(path.read_text().replace("background", "sky"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: list[tuple[str, str, Any, str]] = [
    ("segformer", "model.safetensors", cut, "no complete weights in safetensors format"),
    ("segformer", "model.safetensors", Path.unlink, "is incomplete: it has no model*.safetensors*"),
    (
        "segformer",
        "config.json",
        rename_class,
        "is no segmentation model of this project: its class 0 must be 'background'",
    ),
    ("segformer", "config.json", Path.unlink, "contains no model, no ensemble and no pseudo-labels"),
    ("segformer", "preprocessor_config.json", Path.unlink, "has no preprocessor_config.json"),
    ("segformer", "recipe.yaml", Path.unlink, "is incomplete: it has no recipe.yaml"),
    ("segformer", "README.md", Path.unlink, "is incomplete: it has no README.md"),
    ("segformer", "README.md", lambda path: path.write_text("# Mine"), "README.md has no header"),
    ("segformer", "figures/panel.png", Path.unlink, "its card shows figures/panel.png, which does not exist"),
    ("stage1", "student/model.safetensors", cut, "no complete weights in safetensors format"),
    ("ensemble", "member_2/model.safetensors", cut, "no complete weights in safetensors format"),
    ("ensemble", "member_0/config.json", Path.unlink, "member_0 is incomplete: it has no config.json"),
    ("labels", "data/train-00001-of-00003.parquet", flip_bit, "differs from its checksum in manifest.json"),
    ("labels", "data/train-00001-of-00003.parquet", Path.unlink, "which its manifest.json lists, does not exist"),
    ("labels", "manifest.json", Path.unlink, "has no manifest.json yet: launch its recipe again"),
]


@pytest.mark.parametrize(("kind", "file", "damage", "message"), DAMAGES, ids=[f"{d[0]} {d[1]} {d[3]}" for d in DAMAGES])
def test_what_is_missing_or_damaged_is_named_and_not_sent(
    kind: str, file: str, damage: Any, message: str, folders: dict[str, Path], hub: Hub, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / kind))
    check_complete(folder)
    damage(folder / file)
    with pytest.raises(UserError, match=re.escape(message)):
        push(folder, "me/x")
    assert hub.requests == []


# Recipes and the script, as a user runs them


def launch(argv: list[str], log: Path, url: str, token: str | None, processes: int = 1) -> tuple[list[int | None], str]:
    """Run stage 2 with a command line, on processes that talk over gloo; return exit codes and what was printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (argv, log, url, token, processes, port)
    started = [_context.Process(target=_run, args=(rank, *arguments)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started], log.read_text()


def _run(rank: int, argv: list[str], log: Path, url: str, token: str | None, processes: int, port: int) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(PROJECT / "recipes"))
    import stage2

    go_online(url, token)
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with one_line_errors():
        stage2.main(argv)


def command_line(oem_sar: Path, output_dir: Path) -> list[str]:
    """Return the command line of one step of the toy with a push."""
    text = f"""--data_dir {oem_sar} --output_dir {output_dir} --model_name_or_path toy-segformer --from_scratch true
        --crop_size 32 --max_train_steps 1 --warmup_steps 0 --per_device_train_batch_size 2 --eval_steps 1
        --report_to none --mixed_precision no --dataloader_num_workers 0 --checkpointing_steps 0
        --push_to_hub --hub_model_id me/run --hub_private_repo --hub_revision first"""
    return text.split()


def test_a_recipe_pushes_once_and_never_prints_the_token(oem_sar: Path, tmp_path: Path) -> None:
    with serve_hub({TOKEN}) as hub:
        codes, output = launch(command_line(oem_sar, tmp_path / "run"), tmp_path / "log", hub.url, TOKEN, processes=2)
    assert codes == [0, 0], output
    repository = hub.repositories["models/me/run"]
    (message,) = repository.messages
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert message == f"Model of step 1, mIoU {results['mean_iou']:.4f}"
    assert f"on the Hub: {hub.url}/me/run/commit/" in output
    assert hub.requests.count("GET /api/whoami-v2") == 1 and repository.private
    sent = repository.files("first")
    assert sent["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert {"README.md", "recipe.yaml", "eval_results.json", "figures/panel.png", "figures/curves.png"} <= {*sent}
    for content in (*contents(tmp_path).values(), *sent.values()):
        assert TOKEN.encode() not in content
    assert b"hub" not in sent["recipe.yaml"]  # whoever repeats the run does not push


def test_a_recipe_whose_push_fails_has_saved_everything_and_does_not_hang(oem_sar: Path, tmp_path: Path) -> None:
    with serve_hub({TOKEN}) as hub:
        hub.faults = [Fault("POST", "/commit/", times=99, status=403)]
        codes, output = launch(command_line(oem_sar, tmp_path / "run"), tmp_path / "log", hub.url, TOKEN, processes=2)
    assert codes == [2, 0], output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert error.endswith(f"python scripts/push_to_hub.py {tmp_path / 'run'} me/run --private --revision first")
    assert "Traceback" not in output and TOKEN not in output and "HTTP Request" not in output
    check_complete(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()


@pytest.mark.parametrize(("token", "message"), [(None, "needs a token"), ("hf_wrong", "does not accept the token")])
def test_without_a_token_the_recipe_does_not_start(
    token: str | None, message: str, oem_sar: Path, tmp_path: Path
) -> None:
    with serve_hub({TOKEN}) as hub:
        codes, output = launch(command_line(oem_sar, tmp_path / "run"), tmp_path / "log", hub.url, token, processes=2)
    assert codes == [2, 2], output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(message in error for error in errors)
    assert not (tmp_path / "run").exists()


def test_the_script_sends_a_folder_and_writes_the_missing_card(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["swinv2"], tmp_path / "run"))
    (folder / "README.md").unlink()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, PROJECT / "scripts" / "push_to_hub.py", folder, "me/x", "--private"]
    with serve_hub({TOKEN}) as hub:
        environment |= {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(PROJECT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    card, sent = done.stdout.splitlines()
    assert card == f"card: {folder / 'README.md'}"
    assert sent.startswith(f"on the Hub: {hub.url}/me/x/commit/")
    assert hub.repositories["models/me/x"].private
    for content in (done.stdout.encode(), done.stderr.encode(), *contents(tmp_path).values()):
        assert TOKEN.encode() not in content
