"""The report of a run: its numbers against independent ones, its files, and the page in a browser."""

import html
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_folders import build_toy

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.arguments import Stage2Arguments, dump_recipe
from hf_seg.bootstrap import bootstrap_difference, bootstrap_miou
from hf_seg.calibration import BINS
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.samples import LabelledImages, Sample
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks
from hf_seg.inference.predict import Predictor
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.page import say_difference
from hf_seg.training.tile_scores import TileScores

CROP = 32
SCRIPTS = Path(__file__).parents[1] / "scripts"
main: Callable[[list[str]], None] = runpy.run_path(str(SCRIPTS / "report.py"))["main"]

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


class Page(HTMLParser):
    """Title, tables (lists of rows of cells), sources of pictures and every address of a page; tags must close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.pictures: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.addresses += [str(found[key]) for key in ("src", "href", "srcset", "action") if key in found]
        if tag == "img":
            self.pictures.append(str(found["src"]))
        elif tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> dict[str, list[str]]:
        """Rows of the table whose header begins with a cell, by their first cell."""
        (found,) = [table for table in self.tables if first in table[0]]
        return {row[0]: row[1:] for row in found}


def make_run(folder: Path, seed: int) -> Path:
    args = Stage2Arguments(model_name_or_path="toy-segformer", from_scratch=True, crop_size=CROP)
    model = build_toy("toy-segformer", seed)
    export_model(model, folder, crop_size=CROP, recipe=dump_recipe(args), results=None)
    entries = [{"step": step, "loss": 1 / step, "mean_iou": step / 100, "learning_rate": 1e-4} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    data = {"target": {"name": "<small> tiles", "description": "Blocks.", "license": "CC0", "labels": {"val": "exact"}}}
    (folder / "training_data.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    found = {name: make_run(root / name, seed) for seed, name in enumerate(("one", "two"))}
    EnsembleForSemanticSegmentation.from_members([*found.values()], weights=[1, 3]).save_pretrained(root / "both")
    return {**found, "both": root / "both"}


@pytest.fixture(scope="module")
def images(oem_sar: Path) -> LabelledImages:
    return LabelledImages(load_open_earth_map_sar(oem_sar, "val"), "sar")


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], oem_sar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one network, compared with another one."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    main([str(runs["one"]), "--data_dir", str(oem_sar), "--output", str(output), "--against", str(runs["two"])])
    return output


def predict(run: Path, images: LabelledImages) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """(T, C, C) counts, and (confidence, prediction, label) of each tile."""
    predictor, matrices, maps = Predictor(load_networks(run), device=torch.device("cpu")), [], []
    for sample in images:
        accumulator, counts = predictor.predict(sample.image), ConfusionMatrix()
        counts.update(accumulator.label_map(), sample.label)
        matrices.append(counts.matrix)
        maps.append((accumulator.confidence().numpy(), accumulator.label_map().numpy(), sample.label))
    return np.stack(matrices), maps


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def test_scores_and_intervals_are_those_of_the_predictions(
    page: Path, runs: dict[str, Path], images: LabelledImages
) -> None:
    matrices, _ = predict(runs["one"], images)
    counts = ConfusionMatrix()
    counts.matrix[:] = matrices.sum(axis=0)
    expected, rows = counts.compute(), Page(page).table("of the truth")
    interval = bootstrap_miou(matrices)
    assert rows["mIoU"][1:] == [percent(interval.value), f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"]
    for index, name in enumerate(OPEN_EARTH_MAP.names[1:], start=1):
        share = counts.matrix[index].sum() / counts.matrix.sum()
        assert rows[name][:2] == [percent(share), percent(expected["iou"][name])]
    confusion = Page(page).table("truth")
    assert confusion["tree"][4] == f"{100 * counts.matrix[5, 5] / counts.matrix[5].sum():.1f}"
    results = json.loads(page.with_suffix(".json").read_text())
    assert {key: results[key] for key in expected} == expected
    assert results["intervals"]["tiles"]["mean_iou"] == interval._asdict()
    assert results["n_images"] == 3 and f"one: mIoU {percent(interval.value)} on val" in Page(page).text


def test_calibration_is_that_of_all_pixels(page: Path, runs: dict[str, Path], images: LabelledImages) -> None:
    _, maps = predict(runs["one"], images)
    labelled = [label != IGNORE_INDEX for _, _, label in maps]
    confidence = np.concatenate([each[0][mask] for each, mask in zip(maps, labelled, strict=True)]).astype(float)
    right = np.concatenate([(each[1] == each[2])[mask] for each, mask in zip(maps, labelled, strict=True)])
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = sum(abs(right[bins == each].sum() - confidence[bins == each].sum()) for each in range(BINS)) / len(right)
    found = json.loads(page.with_suffix(".json").read_text())["calibration"]
    assert found["expected_error"] == pytest.approx(error)
    rows = Page(page).table("--abstain")
    kept = confidence >= 0.5
    assert 0 < kept.mean() < 1
    assert rows["0.0"] == ["100.0 %", percent(right.mean())]
    assert rows["0.5"] == [percent(kept.mean()), percent(right[kept].mean())]
    assert f"calibration error is {percent(error)}" in " ".join(Page(page).text.split())


def test_comparison_is_paired_by_tile(page: Path, runs: dict[str, Path], images: LabelledImages) -> None:
    ours, theirs = predict(runs["one"], images)[0], predict(runs["two"], images)[0]
    expected = bootstrap_difference(theirs, ours)
    rows = Page(page).table("one - two, points")
    gain = expected.mean_iou
    assert rows["mIoU"] == [f"{100 * gain.value:+.1f}", f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"]
    assert rows["water"][0] == f"{100 * expected.iou[6].value:+.1f}"
    verdict = say_difference(gain, "two", "one", 3, noun="Network", verb="is")
    assert "too few to rely on" in verdict and verdict in Page(page).text


def test_a_network_does_not_differ_from_itself(runs: dict[str, Path], oem_sar: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(runs["one"], tmp_path / "copy")
    main([str(runs["one"]), "--data_dir", str(oem_sar), "--output", f"{tmp_path}/r.html", "--against", str(copy)])
    rows = Page(tmp_path / "r.html").table("one - copy, points")
    assert all(row == ["+0.0", "+0.0 to +0.0"] for name, row in rows.items() if name)
    assert "No clear difference" in Page(tmp_path / "r.html").text


def test_page_is_self_contained_and_says_what_was_trained(page: Path) -> None:
    found = Page(page)
    assert found.addresses == found.pictures and len(found.pictures) >= 4 + 4 * 3 + 1
    assert all(each.startswith("data:image/png;base64,") for each in found.pictures)
    assert not re.search(r"https?:|<script|<link|@import|url\(", found.text)
    assert "&lt;small&gt; tiles. Blocks. Labels: val exact. Licence: CC0." in " ".join(found.text.split())
    assert found.table("setting")["crop_size"] == [str(CROP)]
    assert found.table("step")["20"] == ["20.0 %"]
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_an_ensemble_has_members_regions_an_audit_and_no_curves(
    runs: dict[str, Path], oem_sar: Path, images: LabelledImages, tmp_path: Path
) -> None:
    (tmp_path / "regions.csv").write_text("image_id,region\nValArea_001,east\nValArea_002,west\nValArea_003,east\n")
    labels = oem_sar / "val" / "labels"
    audit = [sys.executable, SCRIPTS / "audit_labels.py", labels, labels, "--truth", labels]
    subprocess.run([*audit, "--output", tmp_path / "audit"], check=True, capture_output=True)
    more = ["--regions", f"{tmp_path}/regions.csv", "--label_audit", f"{tmp_path}/audit"]
    main([str(runs["both"]), "--data_dir", str(oem_sar), "--output", f"{tmp_path}/r.html", "--tiles", "1", *more])
    found = Page(tmp_path / "r.html")
    matrices, _ = predict(runs["both"], images)
    members = found.table("weight")
    alone = bootstrap_miou(predict(runs["two"], images)[0]).value
    assert members["two"] == ["3", str(CROP), percent(alone), members["two"][3]]
    assert members["ensemble"][2] == percent(bootstrap_miou(matrices).value)
    interval = bootstrap_miou(matrices, groups=["east", "west", "east"])
    bounds = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"
    assert found.table("95 %, regions")["mIoU"][3] == bounds and "or of the 2 regions" in found.text
    assert json.loads((tmp_path / "audit/audit.json").read_text())["verdict"] in html.unescape(found.text)
    assert "<h2>Settings</h2>" in found.text and "<h2>Training</h2>" not in found.text


def test_the_best_and_the_worst_tiles_are_kept(runs: dict[str, Path]) -> None:
    rng, predictor = np.random.default_rng(0), Predictor(load_networks(runs["one"]), device=torch.device("cpu"))
    tiles, scores = TileScores(shown=2), {}
    for number in range(9):
        image = rng.integers(1, 256, (CROP, CROP), dtype=np.uint8)
        label = np.full((CROP, CROP), IGNORE_INDEX, dtype=np.uint8)
        if number != 4:  # that one has no label
            label[: rng.integers(1, CROP)] = rng.integers(1, 9, (CROP,), dtype=np.uint8)
        accumulator, counts = predictor.predict(image), ConfusionMatrix()
        label_map = accumulator.label_map().numpy()
        tiles.add(Sample(f"tile_{number}", image, label), label_map, accumulator)
        counts.update(label_map, label)
        scores[f"tile_{number}"] = counts.compute()["mean_iou"]
    assert tiles.mean_ious == list(scores.values()) and scores.pop("tile_4") is None
    order = sorted(scores, key=lambda image_id: (scores[image_id], image_id))
    assert [tile.image_id for tile in tiles.worst()] == order[:2]
    assert [tile.image_id for tile in tiles.best()] == order[:-3:-1]
    assert tiles.matrices().shape == (9, 9, 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none", "--data_dir", "{data}"], "none was not found locally"),
        (["{run}", "--data_dir", "{tmp}"], "{tmp}"),
        (["{run}", "--data_dir", "{data}", "--split", "test"], "split 'test' has no usable tile"),
        (["{run}", "--data_dir", "{data}", "--column", "optical"], "3 of 3 tiles have no optical image"),
        (["{run}", "--data_dir", "{data}", "--against", "{tmp}"], "is neither a model nor an ensemble"),
        (["{run}", "--data_dir", "{data}", "--label_audit", "{tmp}"], "no audit.json; make it with"),
        (["{run}", "--data_dir", "{data}", "--output", "{tmp}/page.txt"], "--output must end in .html"),
        (["{run}", "--data_dir", "{data}", "--tiles", "-1"], "must be at least 0"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    runs: dict[str, Path],
    oem_sar: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"tmp": tmp_path, "run": runs["one"], "data": oem_sar}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / "report.py"), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.format(**places) in error
    assert error.startswith("error: ") and "\n" not in error and not list(tmp_path.glob("*.html"))


def test_evaluation_scores_optical_networks_too(
    runs: dict[str, Path], oem_sar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(runs["one"]), "--data_dir", str(oem_sar), "--split", "train", "--column", "optical"]
    monkeypatch.setattr("sys.argv", ["evaluate_model.py", *words, "--output", f"{tmp_path}/scores.json"])
    runpy.run_path(str(SCRIPTS / "evaluate_model.py"), run_name="__main__")
    optical = LabelledImages(load_open_earth_map_sar(oem_sar, "train"), "optical")
    matrices, _ = predict(runs["one"], optical)
    with np.load(tmp_path / "scores.npz") as counts:
        assert np.array_equal(counts["confusion_matrices"], matrices)
        assert counts["image_ids"].tolist() == optical.image_ids
    assert json.loads((tmp_path / "scores.json").read_text())["image"] == "optical"


def browse(page: Path, folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """Open a page in a frame of some width, since a window cannot be that narrow; what was found, and the console."""
    probe = """
        const inner = document.querySelector("iframe").contentDocument, root = inner.documentElement;
        const images = [...inner.images];
        document.body.insertAdjacentHTML("beforeend", "<pre>" + JSON.stringify({
            title: inner.title, images: images.length, loaded: images.filter(each => each.naturalWidth > 0).length,
            width: root.clientWidth, content: root.scrollWidth}) + "</pre>");"""
    frame = f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page.read_text())}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html>{frame}<script>onload = () => {{{probe}}}</script>")
    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", f"user-data-dir={folder}/profile", "enable-logging=stderr"]
    command = ["chromium", "--headless", *(f"--{flag}" for flag in flags), "--dump-dom", f"{folder}/frame.html"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    found = re.findall("<pre>(.*?)</pre>", done.stdout)
    return json.loads(html.unescape(found[-1])), "\n".join(re.findall(".*CONSOLE.*", done.stderr))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH to open the page with")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_overflow(page: Path, tmp_path: Path, width: int) -> None:
    found, console = browse(page, tmp_path, width)
    assert found["title"] == "Report of one" and console == ""
    assert found["images"] == found["loaded"] == len(Page(page).pictures)
    assert found["width"] <= width and found["content"] <= found["width"]
