"""Requests of every operation with the Hub fail in every way, once or for ever, over real HTTP.

The requests of an unbroken operation are recorded; then some of them, drawn by the seed, are answered wrongly. The
operation ends with the same bits, or with one line and exit code 2, and then a second call ends with them.
CAMPAIGN_HUB_REQUESTS=99 lets every request fail.
"""

import base64
import copy
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import quote

import huggingface_hub
import numpy as np
import pytest
import rasterio
from campaign_results import SEED, Results
from fork_server import run_command
from hub_client_setup import talk_to
from hub_folders import make_ensemble, make_pseudo_labels, make_stage2
from hub_server import Fault, Hub, Repository, go_online, serve_hub

from hf_seg.data.doctor import detect
from hf_seg.hub.push import push
from hf_seg.hub.push_tiles import Tiles, push_tiles

TOKEN = "hf_campaignMARKERcampaignMARKER"
REQUESTS = int(os.environ.get("CAMPAIGN_HUB_REQUESTS", "5"))  # of an operation that fail in each way, drawn by the seed
SEVERAL = 10**6  # for ever
READER = Path(__file__).with_name("read_from_hub.py")
WAITS = 6 * (300 + 1) + 60  # seconds: six attempts, each after the longest wait that a server may ask for


class Operation(NamedTuple):
    """A command with the Hub, run in a folder that contains copies of the files that it needs."""

    command: str
    writes: str  # repository that it changes, or file in the folder
    needs: tuple[str, ...] = ()


OPERATIONS = {
    "push a model": Operation("hf-seg push model me/new --private --revision first", "models/me/new", ("model",)),
    "push pseudo-labels": Operation("hf-seg push labels me/new", "datasets/me/new", ("labels",)),
    "push pseudo-labels over others": Operation("hf-seg push labels me/old", "datasets/me/old", ("labels",)),
    "push tiles": Operation("hf-seg data push dfc25_track1 me/new", "datasets/me/new", ("dfc25_track1",)),
    "push a Space": Operation("hf-seg push app me/new --model me/net", "spaces/me/new", ("app",)),
    "map with a model": Operation("hf-seg predict scene.tif map.tif --model me/net@v1", "map.tif", ("scene.tif",)),
    "load an ensemble": Operation(f"python {READER} ensemble me/ensemble digest", "digest"),
    "build on a model": Operation(f"python {READER} encoder me/net digest", "digest"),
    "read pseudo-labels": Operation(f"python {READER} labels me/labels@v1 digest", "digest"),
    "check tiles": Operation("hf-seg data check me/tiles --output report.json", "report.json"),
}
KINDS: dict[str, dict[str, Any]] = {
    "401, token expired": {"status": 401},
    "403, may not write": {"status": 403},
    "409, conflict": {"status": 409},
    "429": {"status": 429},
    "429, retry in 2 s": {"status": 429, "headers": {"Retry-After": "2"}},
    "429, retry in a day": {"status": 429, "headers": {"Retry-After": "86400"}},
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503},
    **{kind: {"kind": kind} for kind in ("cut first", "cut answer", "silent", "slow")},
    **{kind: {"kind": kind} for kind in ("other JSON", "web page", "too short", "flipped bit", "elsewhere")},
}


@dataclass
class World:
    """The Hub before every case, and what each operation makes of it."""

    hub: Hub
    files: Path
    repositories: dict[str, Repository]
    objects: dict[str, bytes]
    token_variants: list[bytes] = field(default_factory=list)
    expected: dict[str, tuple[Any, list[tuple[str, str, int]]]] = field(default_factory=dict)

    def reset(self, *faults: Fault) -> None:
        """Put the Hub back to its state before every case."""
        self.hub.repositories, self.hub.objects = copy.deepcopy(self.repositories), dict(self.objects)
        self.hub.faults = [*faults]
        self.hub.requests.clear()
        self.hub.elsewhere_headers.clear()

    def result(self, operation: Operation, folder: Path) -> Any:
        """Return what an operation has made; None if nothing."""
        if "/me/" in operation.writes:
            repository = self.hub.repositories.get(operation.writes)
            refs = repository and {ref: repository.files(ref) for ref in repository.refs}
            return refs and (refs if any(refs.values()) else None)
        path = folder / operation.writes
        if not path.exists():
            return None
        if path.suffix != ".tif":
            return path.read_bytes()
        with rasterio.open(path) as file:
            return file.read().tobytes(), file.crs, file.transform

    def run(self, operation: Operation, folder: Path, token: str | None = TOKEN) -> Any:
        """Run an operation in a folder with its own home."""
        (folder / "home").mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        before = partial(talk_to, self.hub.url, str(folder / "home"), token)
        return run_command(operation.command, cwd=folder, env=environment, timeout=120, before=before)

    def prepare(self, operation: Operation, folder: Path) -> Path:
        """Copy what an operation needs."""
        folder.mkdir()
        for name in operation.needs:
            source = self.files / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        return folder


@pytest.fixture(scope="module")
def world(oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a model of two versions, an ensemble, pseudo-labels and tiles, and folders to push."""
    files = tmp_path_factory.mktemp("files")
    networks = [make_stage2(files / "model", "toy-segformer", 1), make_stage2(files / "other", "toy-segformer", 2)]
    ensemble = make_ensemble(files / "ensemble", networks)
    labels, longer = make_pseudo_labels(files / "labels", 2), make_pseudo_labels(files / "longer", 3)
    tiles = Path(shutil.copytree(oem_sar, files / "dfc25_track1"))
    with rasterio.open(files / "scene.tif", "w", "GTiff", 64, 64, 1, dtype="uint8") as scene:
        scene.write(np.random.default_rng(3).integers(1, 256, (1, 64, 64), np.uint8))
    (files / "app").mkdir()
    (files / "app" / "app.py").write_text("print('maps')\n")
    (files / "app" / "README.md").write_text("---\ntitle: maps\nsdk: gradio\n---\n")
    names = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")
    with pytest.MonkeyPatch.context() as patch, serve_hub({TOKEN}) as hub:
        for name in names:
            patch.setattr(huggingface_hub.constants, name, getattr(huggingface_hub.constants, name))
        patch.setenv("HF_TOKEN", TOKEN)
        go_online(hub.url, TOKEN)
        for folder, name in ((networks[0], "net"), (ensemble, "ensemble"), (labels, "labels"), (longer, "old")):
            push(folder, f"me/{name}", private=True)
        push_tiles(tiles, Tiles.of_folder(*detect(tiles)), "me/tiles", shard_bytes=100_000)
        for name in ("models/me/net", "datasets/me/labels"):
            hub.repositories[name].refs["v1"] = hub.repositories[name].refs["main"]
        push(networks[1], "me/net")
        push(longer, "me/labels")
        found = World(hub, files, hub.repositories, hub.objects, variants(TOKEN))
        yield found


def variants(token: str) -> list[bytes]:
    """Return a text as it is, as part of a URL, and as base64 at every alignment."""
    raw = token.encode()
    found = [raw, quote(token).encode()]
    for skipped in range(3):
        encoded = base64.b64encode(b" " * skipped + raw)
        found.append(encoded[4 if skipped else 0 : len(encoded) // 4 * 4 - 4])
    return found


def has_token(world: World, folder: Path, *texts: str, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return the places where the token is: printed text, any file of the folder, any file on the Hub, another host."""
    places = {f"text {number}": text.encode() for number, text in enumerate(texts)}
    places |= {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in ignored
    }
    places |= {f"other host {number}": text.encode() for number, text in enumerate(world.hub.elsewhere_headers)}
    for name, repository in world.hub.repositories.items():
        for files in repository.commits.values():
            places |= {f"{name}/{file}": stored.content for file, stored in files.items()}
    return [place for place, content in places.items() if any(each in content for each in world.token_variants)]


def expect(world: World, operation: str, tmp_path: Path) -> tuple[Any, list[tuple[str, str, int]]]:
    """Return what an operation makes without a fault, and its requests: method, path, number among equal ones."""
    if operation not in world.expected:
        folder = world.prepare(OPERATIONS[operation], tmp_path / "unbroken")
        world.reset()
        done = world.run(OPERATIONS[operation], folder)
        assert done.returncode == 0, done.stderr
        seen: Counter[str] = Counter()
        requests = []
        for request in world.hub.requests:
            method, _, path = request.partition(" ")
            requests.append((method, path, seen[request]))
            seen[request] += 1
        made = world.result(OPERATIONS[operation], folder)
        assert made is not None and not has_token(world, folder, done.stdout, done.stderr)
        world.expected[operation] = made, requests
    return world.expected[operation]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_request_fails(operation: str, kind: str, world: World, results: Results, tmp_path: Path) -> None:
    expected, requests = expect(world, operation, tmp_path)
    counts: Counter[str] = Counter()
    longest = 0.0
    random = Random(f"{SEED} {operation} {kind}")  # a row is the same alone
    wanted = min(2 if kind == "silent" else REQUESTS, len(requests))  # silence costs a second for each attempt
    for number in sorted(random.sample(range(len(requests)), wanted)):
        method, path, skip = requests[number]
        times = random.choice((1, SEVERAL))
        fault = Fault(method, path, times, exact=True, skip=skip, **KINDS[kind])
        if kind.startswith("401"):
            fault = Fault("", "", SEVERAL, skip=number, **KINDS[kind])
        folder = world.prepare(OPERATIONS[operation], tmp_path / f"case{number}")
        world.reset(fault)
        before = world.result(OPERATIONS[operation], folder)
        place = f"{operation}, {kind}, {'once' if times == 1 else 'for ever'}: {method} {path} ({skip})"
        started = time.monotonic()
        done = world.run(OPERATIONS[operation], folder)
        longest = max(longest, time.monotonic() - started)
        made = world.result(OPERATIONS[operation], folder)
        printed = [done.stdout, done.stderr]
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        counts["failed"] += 1
        if done.returncode == 0:
            assert made == expected, place
            counts["exact"] += 1
        else:
            assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, (place, done.stderr)
            assert len(errors[0]) < 1000, (place, errors)
            counts["stops"] += 1
            old = before or {}
            assert made in (None, before, expected) or all(
                files in (old.get(ref), expected.get(ref), {}) for ref, files in made.items()
            ), place
            world.hub.faults = []
            again = world.run(OPERATIONS[operation], folder)
            assert again.returncode == 0, (place, errors, again.stderr)
            assert world.result(OPERATIONS[operation], folder) == expected, place
            printed += [again.stdout, again.stderr]
            counts["second"] += 1
        found = has_token(world, folder, *printed)
        counts["token"] += len(found)
        assert not found, (place, found, done.stderr)
        waited = folder / "home" / "waited"
        assert not waited.exists() or sum(map(float, waited.read_text().split())) < 2 * WAITS, place
        shutil.rmtree(folder)
    add_row(results, operation, kind, counts, longest)


def add_row(results: Results, operation: str, kind: str, counts: Counter[str], longest: float) -> None:
    """Add what happened to the table."""
    results.add(
        operation=operation,
        **{
            "kind of fault": kind,
            "requests failed": counts["failed"],
            "bit-exact at once": counts["exact"],
            "clear stops": counts["stops"],
            "completed by the second call": counts["second"],
            "token found": counts["token"],
            "longest, s": round(longest, 1),
        },
    )


@pytest.mark.parametrize("change", ["the branch moves", "the branch is deleted"])
@pytest.mark.parametrize("kind", ["model", "pseudo-labels"])
def test_what_is_read_is_of_one_commit(kind: str, change: str, world: World, results: Results, tmp_path: Path) -> None:
    """Before each request of a load, its branch changes: all files are of the commit before, or of the one after."""
    name, repository = {"model": ("net", "models/me/net"), "pseudo-labels": ("labels", "datasets/me/labels")}[kind]
    command = (
        "hf-seg predict scene.tif map.tif --model me/net" if kind == "model" else OPERATIONS["read pseudo-labels"][0]
    )
    command = command.replace("@v1", "")
    operation = Operation(command, "map.tif" if kind == "model" else "digest", ("scene.tif",))
    old, new = (world.repositories[repository].refs[ref] for ref in ("v1", "main"))
    allowed = []
    for commit in (old, new):
        folder = world.prepare(operation, tmp_path / commit)
        world.reset()
        pinned = operation._replace(command=command.replace(f"me/{name}", f"me/{name}@{commit}"))
        assert world.run(pinned, folder).returncode == 0
        allowed.append(world.result(operation, folder))
    assert allowed[0] != allowed[1]
    n_requests = len(world.hub.requests) + 1  # the branch is looked up, too
    counts: Counter[str] = Counter()
    longest = 0.0
    for number in range(1, n_requests + 1):
        folder = world.prepare(operation, tmp_path / f"case{number}")
        world.reset()
        refs = world.hub.repositories[repository].refs
        refs["main"] = old

        def move(current: int, number: int = number, refs: dict[str, str] = refs) -> None:
            if current == number:
                refs.pop("main") if "deleted" in change else refs.update(main=new)

        world.hub.before_answer = move
        started = time.monotonic()
        done = world.run(operation, folder)
        longest = max(longest, time.monotonic() - started)
        world.hub.before_answer = None
        counts["failed"] += 1
        if done.returncode == 0:
            assert world.result(operation, folder) in allowed, number
            counts["exact"] += 1
            continue
        assert done.returncode == 2 and done.stderr.count("error: ") == 1, (number, done.stderr)
        counts["stops"] += 1
        refs["main"] = new
        assert world.run(operation, folder).returncode == 0
        assert world.result(operation, folder) == allowed[1]
        counts["second"] += 1
    add_row(results, f"read a {kind.removesuffix('s')}", change, counts, longest)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name.startswith("push") and "Space" not in name])
def test_what_arrived_is_not_sent_again(operation: str, world: World, results: Results, tmp_path: Path) -> None:
    """The commit fails after the large files were uploaded: the second call uploads none."""
    expected, _ = expect(world, operation, tmp_path)
    folder = world.prepare(OPERATIONS[operation], tmp_path / "case")
    world.reset(Fault("POST", "/commit/", SEVERAL, status=403))
    started = time.monotonic()
    done = world.run(OPERATIONS[operation], folder)
    assert done.returncode == 2
    world.hub.faults.clear()
    world.hub.requests.clear()
    again = world.run(OPERATIONS[operation], folder)
    assert again.returncode == 0 and world.result(OPERATIONS[operation], folder) == expected
    assert not [request for request in world.hub.requests if request.startswith("PUT")]
    counts = Counter({"failed": 1, "stops": 1, "second": 1})
    counts["token"] = len(has_token(world, folder, done.stderr, again.stderr))
    add_row(results, operation, "commit refused, uploads not repeated", counts, time.monotonic() - started)
    assert not counts["token"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_token_of_a_login_is_nowhere(operation: str, world: World, results: Results, tmp_path: Path) -> None:
    """`hf auth login` left a token in a file: no other file has it, nor a word that is printed, whatever fails."""
    expected, requests = expect(world, operation, tmp_path)
    counts: Counter[str] = Counter()
    longest = 0.0
    for number, status in enumerate((None, 403, 500)):
        folder = world.prepare(OPERATIONS[operation], tmp_path / f"case{number}")
        (folder / "home").mkdir()
        (folder / "home" / "token").write_text(TOKEN)
        method, path, _ = requests[-1]
        world.reset(*([] if status is None else [Fault(method, path, SEVERAL, status=status, exact=True)]))
        started = time.monotonic()
        done = world.run(OPERATIONS[operation], folder, token=None)
        longest = max(longest, time.monotonic() - started)
        assert done.returncode in ((0,) if status is None else (0, 2)), done.stderr
        assert done.returncode or world.result(OPERATIONS[operation], folder) == expected
        counts["failed"] += status is not None
        counts["exact" if done.returncode == 0 else "stops"] += 1
        found = has_token(world, folder, done.stdout, done.stderr, ignored=("token",))
        counts["token"] += len(found)
        assert not found, found
    add_row(results, operation, "token of a login; 403 and 500 that repeat it", counts, longest)


TRAIN = (
    "hf-seg stage2 --data_dir me/tiles --output_dir run --model_name_or_path "
    "toy-segformer --from_scratch true --crop_size 32 --max_train_steps 1 --warmup_steps 0 --eval_steps 1 "
    "--per_device_train_batch_size 2 --mixed_precision no --dataloader_num_workers 0 --checkpointing_steps 1 "
    "--resume_from_checkpoint latest --report_to tensorboard --push_to_hub --hub_model_id me/run"
)


@pytest.mark.parametrize("kind", ["403, may not write", "503", "cut answer", "other JSON"])
def test_a_training_from_the_hub_to_the_hub(kind: str, world: World, results: Results, tmp_path: Path) -> None:
    """Tiles and labels are read, a network is trained and pushed; the last requests of the push fail."""
    operation = Operation(TRAIN, "models/me/run")
    counts: Counter[str] = Counter()
    longest = 0.0
    folder = world.prepare(operation, tmp_path / "run")
    world.reset(Fault("POST", "/api/models/me/run/commit/", SEVERAL, **KINDS[kind]))
    started = time.monotonic()
    done = world.run(operation, folder)
    longest = time.monotonic() - started
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    world.hub.faults.clear()
    again = world.run(Operation("hf-seg push run me/run", "models/me/run"), folder)
    assert again.returncode == 0, again.stderr
    sent = world.hub.repositories["models/me/run"].files()
    assert sent["model.safetensors"] == (folder / "run" / "model.safetensors").read_bytes()
    assert len(world.hub.repositories["models/me/run"].messages) == 1
    counts |= Counter({"failed": 1, "stops": 1, "second": 1})
    counts["token"] = len(has_token(world, folder, done.stdout, done.stderr, again.stdout, again.stderr))
    add_row(results, "train on tiles and push", kind, counts, longest)
    assert not counts["token"]
