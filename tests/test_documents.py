"""Every command and snippet of the documents and of generated cards runs, at toy size."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import can_run, run_command
from PIL import Image

from hf_seg.files import remove
from hf_seg.synthetic import make_synthetic_dataset

PROJECT = Path(__file__).parents[1]
FOLDERS = ("recipes", "hf_seg/demo", "hf_seg/mapping", "hf_seg/studies")
MANUALS = ("README.md", "CONTRIBUTING.md", *(f"{folder}/README.md" for folder in FOLDERS))
DOCUMENTS = (*MANUALS, *sorted(path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("docs/**/*.md")))
PROGRAMS = ("accelerate", "hf-seg", "make", "pip", "python", "torchrun")
LAUNCH = "accelerate launch -q --config_file recipes/accelerate_configs/one_process.yaml"
TRAINING = (
    " --max_train_steps 2 --warmup_steps 0 --eval_steps 2 --checkpointing_steps 0 --crop_size 32 --report_to none"
    " --per_device_train_batch_size 2 --dataloader_num_workers 0"
)
# What makes a command small, and nothing else of it.
TOY_SIZE = (
    (r"recipes/configs/stage([12])/\S+", r"recipes/configs/toy/stage\1_segformer.yaml"),
    (r"(.*(?:recipes/stage[12]\.py|hf-seg stage[12])(?!.*--help).*)", rf"\1{TRAINING}"),
    (r"(.*(?:recipes/pseudo_label\.py|hf-seg pseudo-label).*)", r"\1 --tta none --batch_size 16"),
    (r"(.*scripts/ablation\.py.*)", r"\1 --dry_run"),
    (r"(.*(?:scripts/export_model\.py|hf-seg export).*)", r"\1 --fixed_size"),
    (r"several_gpus\.yaml", "one_process.yaml"),
    (r"--nproc_per_node \d", "--nproc_per_node 2"),
    (r"--(source|train|size) \d+", lambda found: f"--{found[1]} {128 if found[1] == 'size' else 3}"),
    (r"--(width|height) \d+", r"--\1 600"),
    (r"hf-seg fit table .*", "hf-seg fit --help"),  # minutes; a slow test of tests/test_planning.py
    (r"(hf-seg predict 'scenes/\*\.tif' maps/ .*)", r"\1 --overwrite"),
    (r"(hf-seg demo .*)", r"\1 --help"),  # it runs until it is stopped; tests/test_demo_browser.py starts it
    (r"^make ([\w-]+).*", r"make -n \1"),  # the targets themselves are what CI runs
)
# Commands that need the network end in one line that says so.
OFFLINE = {
    "prepare_data.py download": (1, "answered 404"),
    "hf-seg data download": (1, "answered 404"),
    "push_to_hub.py": (2, "HF_HUB_OFFLINE is set"),
    "hf-seg push": (2, "HF_HUB_OFFLINE is set"),
    "hf-seg data push": (2, "HF_HUB_OFFLINE is set"),
    "prepare_data.py push": (2, "HF_HUB_OFFLINE is set"),
    "--data_dir org/": (2, "HF_HUB_OFFLINE is set"),
}
TOP_LEVEL = ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt", "hashes.txt")
# An output that one document makes and another one uses.
SIMILAR = {"runs/stage1_b3": "runs/stage1_b5", "runs/stage2_convnextv2": "runs/stage2_b5"}


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Return the command lines of a document: those of its shell blocks, and those set as code within the text."""
    found = []
    indented = re.findall(rf"^    (?:{'|'.join(PROGRAMS)}) (?:.*\\\n)*.*", text, re.MULTILINE)
    for block in [*fenced(text, "bash"), *indented]:
        lines = block.replace("\\\n", " ").splitlines()
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines if line.strip()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]
    whole = [code for code in inline if code.startswith(tuple(f"{name} " for name in PROGRAMS)) and "..." not in code]
    whole = [code for code in whole if not re.fullmatch(r"hf-seg [\w-]+( [a-z]+)?", code)]  # only names it
    return list(dict.fromkeys([*found, *(code for code in whole if not code.startswith(("pip ", "accelerate ")))]))


TEXTS = {name: (PROJECT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def in_documents(find: Callable[[str], list[str]]) -> list[tuple[str, str]]:
    """Return (document, what was found in it); what several documents contain stands for the first of them."""
    first: dict[str, str] = {}
    for name, text in TEXTS.items():
        for found in find(text):
            first.setdefault(found, name)
    return [(name, found) for found, name in first.items()]


COMMANDS = in_documents(commands_of)
SNIPPETS = in_documents(lambda text: fenced(text, "python"))
OUTPUT = r"(?:--output_dir|(?:export_model\.py|hf-seg export) .*--output) (\S+)"
MAKERS = {found[1]: command for _, command in COMMANDS if (found := re.search(OUTPUT, command))}


@pytest.fixture(scope="module")
def zenodo() -> Iterator[str]:
    """An address at which there is no dataset."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.RequestHandlerClass.do_GET = lambda handler: handler.send_error(404)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Checkout:
    """A folder as a reader has it: the project, data, a few scenes; what commands make stays in it."""

    def __init__(self, folder: Path, zenodo: str) -> None:
        self.folder = folder
        self.done: dict[str, subprocess.CompletedProcess[str]] = {}
        for name in ("hf_seg", "model_cards", "recipes", "scripts", "space", *TOP_LEVEL):
            (folder / name).symlink_to(PROJECT / name)
        make_synthetic_dataset(folder / "data", source=3, train=4, val=2, test=2, size=128, scene=128)
        for name in ("scene.tif", "large.tif", "scenes/a.tif", "more_scenes/b.tif"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(folder / "data" / "scene.tif", folder / name)
        (folder / "my_area").symlink_to(folder / "data" / "dfc25_track1")
        with Image.open(folder / "scene.tif") as scene:
            scene.save(folder / "scene.png")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT), "HF_SEG_ZENODO_URL": zenodo}

    def run(self, command: str, *, launcher: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command at toy size, and first what makes its input; commands that are equal at this size run once."""
        self.make_input(command)
        output = re.search(rf"{OUTPUT}|(?:scene|large).tif (map.tif)", command)
        for pattern, replacement in TOY_SIZE:
            command = re.sub(pattern, replacement, command)
        if not launcher:  # it takes seconds to start
            command = command.replace(LAUNCH, "python")
        if command not in self.done:
            if output is not None:
                remove(self.folder / (output[1] or output[2]))
            self.done[command] = self.run_as_it_is(command)
        return self.done[command]

    def run_as_it_is(self, command: str) -> subprocess.CompletedProcess[str]:
        if can_run(command):
            return run_command(command, cwd=self.folder, env=self.environment)
        options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True, "timeout": 240}
        return subprocess.run(["bash", "-c", command], **options)

    def make_input(self, text: str) -> None:
        output = re.search(OUTPUT, text)
        for path in set(re.findall(r"\bruns/\w+", text)) - {output and output[1]}:
            if (self.folder / path).exists():
                continue
            if path in SIMILAR:
                self.make_input(SIMILAR[path])
                shutil.copytree(self.folder / SIMILAR[path], self.folder / path)
            elif path in MAKERS:
                made = self.run(MAKERS[path])
                assert made.returncode == 0, made.stderr
        if "make_submission.py maps/" in text and not (self.folder / "maps").exists():
            assert (
                self.run("hf-seg predict data/dfc25_track1/val/sar_images maps/ --model runs/ensemble").returncode == 0
            )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, zenodo: str) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"), zenodo)


def check(checkout: Checkout, command: str) -> None:
    for part, (code, words) in OFFLINE.items():
        if part in command:
            result = checkout.run(command)
            assert result.returncode == code and words in result.stderr, result.stderr
            assert "Traceback" not in result.stderr and result.stderr.count("error: ") == 1
            return
    partial = " --partial" if "make_submission.py" in command else ""  # the contest's tiles are many
    result = checkout.run(command + partial)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 25 and len(SNIPPETS) > 5
    for stage in ("stage1", "pseudo_label", "stage2", "ensemble"):
        assert any(f"{LAUNCH} recipes/{stage}.py" in command for _, command in COMMANDS)
    launched = [command.replace("several_gpus", "one_process") for _, command in COMMANDS if "accelerate" in command]
    assert all(command.startswith(LAUNCH) for command in launched)
    assert {"docs/adapt.md", "docs/gpu.md"} < dict(COMMANDS).keys()


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d}: {c[:60]}" for d, c in COMMANDS])
def test_a_command_of_a_document_runs(document: str, command: str, checkout: Checkout) -> None:
    check(checkout, command)


@pytest.mark.parametrize(("document", "code"), SNIPPETS, ids=[f"{d} {i}" for i, (d, _) in enumerate(SNIPPETS)])
def test_a_snippet_of_a_document_runs(
    document: str, code: str, checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.make_input(code)
    remove(checkout.folder / "map.tif")
    monkeypatch.chdir(checkout.folder)
    exec(compile(code, document, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("folder", ["runs/stage1_b5", "runs/labels", "runs/stage2_b5", "runs/ensemble"])
def test_what_a_card_says_runs(folder: str, checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.make_input(folder)
    card = (checkout.folder / folder / "README.md").read_text(encoding="utf-8").replace("FOLDER_OR_HUB_ID", folder)
    card = card.replace("--config recipe.yaml", f"--config {folder}/recipe.yaml")  # it lies beside the card
    card = re.sub(r"(?<=\s)(stage\d_\w+)(?=\s)", r"runs/\1", card)  # a card names no folder of this machine
    card = card.replace("--pseudo_labels labels", "--pseudo_labels runs/labels")
    for command in commands_of(card):
        if "recipes/stage2.py" in command and "--config " not in command:
            command += " --config recipes/configs/stage2/segformer_b5.yaml"  # no network: the toy model
        if folder in command and "--config" in command:  # it repeats the run that made the folder
            command = re.sub(r"--output_dir \S+", "", command) + f" --output_dir runs/again_{Path(folder).name}"
        check(checkout, f"{command} --overwrite" if command.startswith("hf-seg predict") else command)
    monkeypatch.chdir(checkout.folder)
    snippets = fenced(card, "python")
    assert snippets
    for code in snippets:
        exec(compile(code, folder, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("recipe", ["stage1", "pseudo_label", "stage2", "ensemble"])
def test_the_launcher_adds_nothing_to_a_mistake(recipe: str, checkout: Checkout) -> None:
    launcher = recipe == "stage2"  # it takes seconds to start, and is the same for all
    result = checkout.run(f"{LAUNCH} recipes/{recipe}.py --data_dir nowhere --eval_steeps 1", launcher=launcher)
    assert result.returncode == (1 if launcher else 2)
    assert (result.stdout, result.stderr.count("\n")) == ("", 1) and result.stderr.startswith("error: unknown setting")


def test_the_launcher_runs_the_documented_command(checkout: Checkout) -> None:
    (command,) = (each for _, each in COMMANDS if "--output_dir runs/toy" in each)
    result = checkout.run(command.replace("runs/toy", "runs/launched"), launcher=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "had defaults used instead" not in result.stderr
