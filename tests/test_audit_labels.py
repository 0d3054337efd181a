import base64
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pytest
from conftest import write_tiff
from PIL import Image

from hf_seg.bootstrap import draw_counts
from hf_seg.errors import DatasetError, FileError, UserError
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.page import FEW_TILES
from hf_seg.studies import label_audit, label_audit_report, label_maps
from hf_seg.studies.label_audit_report import judge
from hf_seg.synthetic import make_synthetic_dataset

SCRIPT = Path(__file__).parents[1] / "scripts/audit_labels.py"
_spec = importlib.util.spec_from_file_location("audit_labels", SCRIPT)
assert _spec is not None and _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

RANGELAND, ROAD, TREE, WATER, BUILDING = (
    OPEN_EARTH_MAP.label2id[name] for name in ("rangeland", "road", "tree", "water", "building")
)
IN_A = np.array([[5, 5, 6, 6], [5, 5, 6, 6], [8, 8, 4, 4], [8, 8, 0, 4]], dtype=np.uint8)
IN_B = np.array([[5, 5, 6, 6], [5, 2, 6, 6], [8, 8, 4, 4], [0, 4, 4, 4]], dtype=np.uint8)
TRUTH = np.array([[5, 5, 6, 6], [5, 2, 6, 0], [8, 8, 4, 4], [8, 8, 4, 4]], dtype=np.uint8)

# rasterio warns of GeoTIFFs without georeference
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

Maps = dict[str, np.ndarray]


def write_folder(folder: Path, maps: Mapping[str, np.ndarray], suffix: str = ".tif") -> Path:
    for image_id, label in maps.items():
        if suffix == ".tif":
            write_tiff(folder / f"{image_id}.tif", label)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(folder / f"{image_id}{suffix}")
    return folder


def write_dataset(folder: Path, maps: Mapping[str, np.ndarray], confidence: Mapping[str, np.ndarray] | None = None):
    rows: dict[str, list[Any]] = {
        "image_id": list(maps),
        "pseudo_label": [Image.fromarray(label) for label in maps.values()],
    }
    if confidence is not None:
        rows["confidence"] = [Image.fromarray(confidence[image_id]) for image_id in maps]
    columns = {name: datasets.Value("string") if name == "image_id" else datasets.Image() for name in rows}
    (folder / "data").mkdir(parents=True)
    path = folder / "data/train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(path)
    return folder


def random_maps(n_tiles: int, seed: int = 0, size: int = 24) -> Maps:
    """Maps of all eight classes; ids as in OpenEarthMap-SAR."""
    rng = np.random.default_rng(seed)
    return {
        f"TrainArea_{n:03d}": rng.integers(1, OPEN_EARTH_MAP.num_labels, (size, size), dtype=np.uint8)
        for n in range(n_tiles)
    }


def spoil(maps: Maps, share: float, seed: int) -> Maps:
    rng = np.random.default_rng(seed)
    return {
        image_id: np.where(
            rng.random(label.shape) < share, rng.integers(1, OPEN_EARTH_MAP.num_labels, label.shape), label
        ).astype(np.uint8)
        for image_id, label in maps.items()
    }


def count(a: Maps, b: Maps, truth: Maps | None = None) -> np.ndarray:
    truths = truth or dict.fromkeys(a)
    return np.stack([label_audit.count_pixels(a[key], b[key], truths.get(key)) for key in a])


def summarize(a: Maps, b: Maps, truth: Maps | None = None, **options: Any) -> dict[str, Any]:
    return label_audit.summarize(list(a), count(a, b, truth), None, **options)


def run(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    script.main([*map(str, arguments), "--output", str(folder)])
    return json.loads((folder / "audit.json").read_text())


def test_every_pixel_of_a_tile_is_counted_by_truth_a_and_b() -> None:
    counts = label_audit.count_pixels(IN_A, IN_B, TRUTH)
    expected = np.zeros((OPEN_EARTH_MAP.num_labels,) * 3, dtype=int)
    for truth, a, b in zip(TRUTH.flat, IN_A.flat, IN_B.flat, strict=True):
        expected[truth, a, b] += 1
    assert np.array_equal(counts, expected)
    assert counts[ROAD, 0, ROAD] == 1 and counts[BUILDING, BUILDING, 0] == 1
    assert np.array_equal(label_audit.count_pixels(IN_A, IN_B)[0], expected.sum(axis=0))


def test_agreement_of_two_small_maps_is_as_counted_by_hand() -> None:
    result = summarize({"x": IN_A}, {"x": IN_B})
    assert result["coverage"] == {"a": 15 / 16, "b": 15 / 16, "both": 14 / 16, "truth": 0}
    agreement = result["agreement"]
    assert agreement["overall"] == 12 / 14
    assert agreement["iou"] == {
        **dict.fromkeys(("bareland", "developed space", "agriculture land")),
        **{"rangeland": 0, "tree": 3 / 4, "water": 1, "building": 2 / 3, "road": 3 / 4},
    }
    assert agreement["mean_iou"] == pytest.approx((0 + 3 / 4 + 1 + 2 / 3 + 3 / 4) / 5)
    assert agreement["share_of_a"]["tree"] == 3 / 4 and agreement["share_of_b"]["tree"] == 1
    assert agreement["transition"][BUILDING] == [1, 0, 0, 0, 1, 0, 0, 0, 2]
    assert result["truth"] is None
    assert result["class_share"]["a"]["building"] == 4 / 15


def test_scores_against_the_truth_are_those_of_the_confusion_matrix() -> None:
    result = summarize({"x": IN_A}, {"x": IN_B}, {"x": TRUTH})
    truth = result["truth"]
    same = (IN_A > 0) & (IN_B > 0) & (TRUTH > 0)
    for name, label in (("a", IN_A), ("b", IN_B)):
        for pixels, mask in (("same_pixels", same), ("own_pixels", (label > 0) & (TRUTH > 0))):
            confusion = ConfusionMatrix()
            confusion.update(label, np.where(mask, TRUTH, IGNORE_INDEX))
            expected = confusion.compute()
            assert {key: truth[pixels][name][key] for key in expected} == expected
    assert truth["same_pixels"]["a"]["recall"]["rangeland"] == 0 and truth["same_pixels"]["b"]["recall"]["road"] == 1
    assert truth["compared"] == same.sum() / (TRUTH > 0).sum()


def test_which_set_is_correct_where_they_differ_is_counted_by_pair() -> None:
    found = summarize({"x": IN_A}, {"x": IN_B}, {"x": TRUTH})["disagreements"]
    assert found["all"] == {"share": 2 / 14, "a_right": 1 / 2, "b_right": 1 / 2}
    right = {"share": 1 / 14, "a_right": 0.0, "b_right": 1.0}
    wrong = {"share": 1 / 14, "a_right": 1.0, "b_right": 0.0}
    assert found["largest"] == [
        {"a": "tree", "b": "rangeland", **right},
        {"a": "building", "b": "road", **wrong},
    ]


def test_a_set_against_itself_agrees_fully_without_clear_difference() -> None:
    maps = random_maps(12)
    result = summarize(maps, maps, spoil(maps, 0.3, 1))
    assert result["agreement"]["overall"] == result["agreement"]["mean_iou"] == 1
    assert result["truth"]["difference"]["mean_iou"] == {"difference": 0, "low": 0, "high": 0}
    expected = "No clear difference: the mIoU of B (new) minus that of A (old) is +0.0 points [+0.0, +0.0]"
    assert judge(result, "old", "new").startswith(expected)
    assert result["disagreements"]["largest"] == []


def test_the_better_set_is_called_better_and_a_swap_reverses_the_sign() -> None:
    truth = random_maps(12)
    worse, better = spoil(truth, 0.3, 1), spoil(truth, 0.1, 2)
    result, swapped = summarize(worse, better, truth), summarize(better, worse, truth)
    gain, loss = result["truth"]["difference"]["mean_iou"], swapped["truth"]["difference"]["mean_iou"]
    assert 0.1 < gain["low"] < gain["difference"] < gain["high"]
    assert loss == pytest.approx({"difference": -gain["difference"], "low": -gain["high"], "high": -gain["low"]})
    sentence, swapped_sentence = judge(result, "old", "new"), judge(swapped, "old", "new")
    assert sentence.startswith("Labels B (new) are better than A (old) by ")
    assert swapped_sentence == sentence.replace("B (new) are better than A (old)", "A (old) are better than B (new)")
    assert {entry["difference"] > 0 for entry in result["truth"]["difference"]["iou"].values()} == {True}


def test_equally_spoilt_sets_do_not_differ_clearly() -> None:
    truth = random_maps(12)
    result = summarize(spoil(truth, 0.2, 1), spoil(truth, 0.2, 2), truth)
    gain = result["truth"]["difference"]["mean_iou"]
    assert gain["low"] < 0 < gain["high"]
    assert judge(result, "old", "new").startswith("No clear difference")


def test_one_tile_has_no_interval_and_few_tiles_a_warning() -> None:
    truth = random_maps(FEW_TILES)
    worse = spoil(truth, 0.5, 1)
    assert "too few" not in judge(summarize(worse, truth, truth), "old", "new")
    few = {key: truth[key] for key in list(truth)[:3]}
    assert "too few to rely on" in judge(summarize({key: worse[key] for key in few}, few, few), "old", "new")
    one = {"TrainArea_000": truth["TrainArea_000"]}
    result = summarize({"TrainArea_000": worse["TrainArea_000"]}, one, one)
    assert result["truth"]["difference"]["mean_iou"]["low"] is None
    expected = (
        r"Cannot tell .*: a single tile has no interval. On it the mIoU of B \(new\) .* A \(old\) is \+\d+\.\d points"
    )
    assert re.match(expected, judge(result, "old", "new"))


def test_without_a_truth_nothing_is_called_better() -> None:
    truth = random_maps(12)
    sentence = judge(summarize(spoil(truth, 0.5, 1), truth), "old", "new")
    expected = "Cannot tell which labels are better without a truth. Labels A (old) and B (new) agree on "
    assert sentence.startswith(expected)


def test_bootstrap_equals_scoring_each_redrawn_set_by_itself() -> None:
    truth = random_maps(5, size=8)
    a, b = spoil(truth, 0.4, 1), spoil(truth, 0.2, 2)
    for key in list(truth)[1:]:  # a class of one tile alone: in the draws without that tile it counts 0
        truth[key] = np.where(truth[key] == BUILDING, TREE, truth[key])
    found = summarize(a, b, truth, seed=3)["truth"]["difference"]
    draws = draw_counts(5, 1000, np.random.default_rng(3))
    keys, gains = list(truth), []
    for draw in draws:
        scores = []
        for maps in (a, b):
            confusion = ConfusionMatrix()
            for key in np.repeat(keys, draw):
                confusion.update(maps[key], truth[key])
            scores.append(sum(iou or 0.0 for iou in confusion.compute()["iou"].values()) / 8)
        gains.append(scores[1] - scores[0])
    low, high = np.quantile(gains, (0.025, 0.975))
    assert found["mean_iou"]["low"] == pytest.approx(low)
    assert found["mean_iou"]["high"] == pytest.approx(high)


def test_bootstrap_depends_on_its_seed_only() -> None:
    truth = random_maps(6)
    a, b = spoil(truth, 0.4, 1), spoil(truth, 0.2, 2)
    first, again, other = (summarize(a, b, truth, seed=seed)["truth"]["difference"] for seed in (0, 0, 1))
    assert first == again
    assert first["mean_iou"]["difference"] == other["mean_iou"]["difference"]
    assert first["mean_iou"]["low"] != other["mean_iou"]["low"]


def test_pixels_that_one_set_does_not_label_change_no_score_on_the_same_pixels() -> None:
    truth = random_maps(4)
    a, b = spoil(truth, 0.4, 1), spoil(truth, 0.2, 2)
    incomplete = {key: np.where(np.arange(24) < 6, 0, label).astype(np.uint8) for key, label in b.items()}
    cut = {key: label[:, 6:] for key, label in a.items()}
    result = summarize(a, incomplete, truth)["truth"]
    expected = summarize(cut, {k: v[:, 6:] for k, v in b.items()}, {k: v[:, 6:] for k, v in truth.items()})["truth"]
    assert result["same_pixels"] == expected["same_pixels"]
    assert result["difference"] == expected["difference"]
    assert result["own_pixels"]["b"] == expected["own_pixels"]["b"]
    assert result["own_pixels"]["a"] != expected["own_pixels"]["a"]
    assert result["compared"] == 0.75


def test_calibrated_confidence_has_no_calibration_error() -> None:
    levels = np.zeros((256, 2), dtype=int)
    levels[51:256:51] = [(100, 20), (100, 40), (100, 60), (100, 80), (100, 100)]  # 0.2, 0.4 ... 1.0
    result = label_audit.calibrate(levels)
    assert result is not None and result["calibration_error"] == pytest.approx(0)
    assert [row["agreement"] for row in result["deciles"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert [row["share"] for row in result["deciles"]] == [0.2] * 5
    levels = np.zeros((256, 2), dtype=int)
    levels[[100, 200], 0] = (90, 10)
    result = label_audit.calibrate(levels)
    assert result is not None and [row["share"] for row in result["deciles"]] == [0.9, 0.1]


def test_overconfidence_is_the_calibration_error_and_deciles_have_equal_pixels() -> None:
    levels = np.stack([np.full(256, 1000), np.arange(256) * 1000 // 510], axis=1)  # right half as often as it says
    result = label_audit.calibrate(levels)
    assert result is not None and result["calibration_error"] == pytest.approx(0.25, abs=0.001)
    assert len(result["deciles"]) == 10
    assert all(row["share"] == pytest.approx(0.1, abs=0.003) for row in result["deciles"])
    assert result["deciles"][0]["low"] == 0 and result["deciles"][-1]["high"] == 1
    assert label_audit.calibrate(np.zeros((256, 2), dtype=int)) is None


def test_confidence_counts_only_what_both_label() -> None:
    confidence = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4)
    levels = label_audit.count_confidence(confidence, IN_A, IN_B)
    assert levels.sum(axis=0).tolist() == [14, 12]
    assert levels[50].tolist() == [1, 0]  # tree against rangeland
    assert levels[120].tolist() == [0, 0]  # unlabelled in B
    assert levels[0].tolist() == [1, 1]


def test_comparison_shows_which_set_is_correct() -> None:
    both, only_a, only_b, neither = map(np.array, ([228] * 3, [224, 138, 46], [53, 114, 176], [107] * 3))
    unknown = np.array([0x30, 0x2A, 0x3C])
    picture = label_audit_report.paint_comparison(IN_A, IN_B, np.where(TRUTH == WATER, TREE, TRUTH))
    assert (picture[0, 0] == both).all() and (picture[1, 1] == only_b).all() and (picture[3, 1] == only_a).all()
    assert (picture[0, 2] == neither).all() and (picture[3, 0] == unknown).all() and (picture[1, 3] == unknown).all()
    without = label_audit_report.paint_comparison(IN_A, IN_B, None)
    assert (without[1, 1] == (0xC8, 0x55, 0x3D)).all() and (without[0, 0] == both).all()


def test_folder_png_and_parquet_of_the_same_labels_give_the_same_audit(tmp_path: Path) -> None:
    truth = random_maps(3)
    a, b = spoil(truth, 0.4, 1), spoil(truth, 0.2, 2)
    b["TrainArea_001"][:5] = IGNORE_INDEX
    t = write_folder(tmp_path / "t", truth)
    official = write_folder(tmp_path / "a", a)
    sources = [
        write_folder(tmp_path / "tif", b),
        write_folder(tmp_path / "png", b, ".png"),
        write_dataset(tmp_path / "parquet", dict(reversed(b.items()))),
        write_folder(tmp_path / "region/x/labels", b).parents[1],
    ]
    zeros = {key: np.where(label == IGNORE_INDEX, 0, label).astype(np.uint8) for key, label in b.items()}
    sources.append(write_folder(tmp_path / "zeros", zeros))
    results = []
    for source in sources:
        sets = {key: label_maps.LabelMaps(str(path)) for key, path in (("a", official), ("b", source), ("truth", t))}
        results.append(script.audit(sets, label_maps.match_ids(sets), None, seed=0))
        assert results[-1]["sets"]["b"].pop("source") == str(source)
        name = results[-1]["sets"]["b"].pop("name")
        assert str(source).endswith(name) and f"B ({name})" in results[-1].pop("verdict")
        assert results[-1] == results[0]
    assert results[0]["coverage"]["b"] == 1 - 5 / 72


def test_report_is_complete_self_contained_and_agrees_with_the_json(tmp_path: Path) -> None:
    truth = random_maps(4)
    confidence = {key: np.full((24, 24), 200, dtype=np.uint8) for key in truth}
    ours = write_dataset(tmp_path / "<b> & co", spoil(truth, 0.1, 2), confidence)
    theirs = write_folder(tmp_path / "a", spoil(truth, 0.4, 1))
    t = write_folder(tmp_path / "t", truth)
    images = write_folder(tmp_path / "rgb", {"TrainArea_002": np.full((3, 24, 24), 90, dtype=np.uint8)})
    result = run(tmp_path / "audit", theirs, ours, "--truth", t, "--images", images, "--gallery", "2")
    assert {path.name for path in (tmp_path / "audit").iterdir()} == script.FILES
    page = (tmp_path / "audit/index.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert "&lt;b&gt; &amp; co" in page and "<b>" not in page

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.pictures: list[bytes] = []
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                kind, content = str(dict(attrs)["src"]).split(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(base64.b64decode(content))
            elif tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.pictures == [(tmp_path / "audit" / name).read_bytes() for name in ("transition.png", "gallery.png")]
    markdown = (tmp_path / "audit/audit.md").read_text()
    assert f"**{result['verdict']}**" in markdown and result["verdict"].startswith(
        "Labels B (<b> & co) are better than A (a) by "
    )
    scores = result["truth"]["same_pixels"]
    assert f"| mIoU, same pixels | {100 * scores['a']['mean_iou']:.1f} % | {100 * scores['b']['mean_iou']:.1f} % |" in (
        markdown
    )
    assert result["confidence"]["b"]["reference"] == "truth"
    assert result["confidence"]["b"]["calibration_error"] == pytest.approx(
        abs(scores["b"]["overall_accuracy"] - 200 / 255)
    )
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert [len({line.count("|") for line in table.splitlines()}) for table in tables] == [1] * 7
    assert "No regions known" in markdown


def test_tiles_without_a_counterpart_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = random_maps(6)
    names = list(maps)
    a = write_folder(tmp_path / "a", {name: maps[name] for name in names[:5]})
    b = write_folder(tmp_path / "b", {name: maps[name] for name in names[4:]})
    result = run(tmp_path / "audit", a, b)
    assert result["n_tiles"] == 1 and list(result["tiles"]) == names[4:5]
    assert result["sets"]["a"]["n_unmatched"] == 4 and result["sets"]["a"]["unmatched"] == names[:3]
    assert result["sets"]["b"]["unmatched"] == [names[5]]
    printed = capsys.readouterr().out
    assert f"skipped 4 tiles of a without a counterpart, e.g. {', '.join(names[:3])}\n" in printed
    assert f"skipped 1 tiles of b without a counterpart, e.g. {names[5]}\n" in printed
    assert f"4 ({', '.join(names[:3])}, ...)" in (tmp_path / "audit/audit.md").read_text()


def test_a_truth_of_some_tiles_scores_those_and_all_are_compared(tmp_path: Path) -> None:
    truth = random_maps(4)
    a, b = write_folder(tmp_path / "a", spoil(truth, 0.4, 1)), write_folder(tmp_path / "b", truth)
    t = write_folder(tmp_path / "t", {key: truth[key] for key in ("TrainArea_001", "TrainArea_003")})
    result = run(tmp_path / "audit", a, b, "--truth", t)
    assert result["n_tiles"] == 4 and result["truth"]["n_tiles"] == 2
    assert result["truth"]["same_pixels"]["b"]["mean_iou"] == 1 and result["coverage"]["truth"] == 0.5
    assert result["tiles"]["TrainArea_000"]["mean_iou_a"] is None
    assert result["tiles"]["TrainArea_001"]["mean_iou_b"] == 1


def test_regions_come_from_names_or_a_file(tmp_path: Path) -> None:
    tiles = dict.fromkeys(("north_town_1", "north_town_12", "acre_3", "TrainArea_004"), IN_A)
    a = write_folder(tmp_path / "a", tiles)
    b = write_folder(tmp_path / "b", {**tiles, "acre_3": IN_B})
    regions = run(tmp_path / "audit", a, b)["regions"]
    assert {name: row["n_tiles"] for name, row in regions.items()} == {"(none)": 1, "acre": 1, "north_town": 2}
    assert regions["acre"]["agreement"] == 12 / 14 and regions["north_town"]["agreement"] == 1
    rows = [line for line in (tmp_path / "audit/audit.md").read_text().splitlines() if line.startswith("| acre ")]
    assert rows == ["| acre | 1 | 85.7 % |"]
    (tmp_path / "regions.csv").write_text("\ufeffregion,image_id\nwest,acre_3\nwest,TrainArea_004\n")
    regions = run(tmp_path / "audit", a, b, "--regions", tmp_path / "regions.csv")["regions"]
    assert {name: row["n_tiles"] for name, row in regions.items()} == {"(none)": 2, "west": 2}
    assert regions["west"]["agreement"] == 27 / 29


def test_gallery_shows_the_tiles_that_differ_most_with_their_image(tmp_path: Path) -> None:
    maps = random_maps(5)
    order = ["TrainArea_003", "TrainArea_000", "TrainArea_004", "TrainArea_001", "TrainArea_002"]
    changed = {key: label.copy() for key, label in maps.items()}
    for rank, key in enumerate(order):
        changed[key][: 12 - 2 * rank] = maps[key][: 12 - 2 * rank] % 8 + 1
    sets = {
        "a": label_maps.LabelMaps(str(write_folder(tmp_path / "a", maps))),
        "b": label_maps.LabelMaps(str(write_folder(tmp_path / "b", changed))),
    }
    sar = write_folder(tmp_path / "sar", {order[1]: np.arange(576, dtype=np.uint8).reshape(24, 24)})
    tiles = script.audit(sets, sorted(maps), None, 0)["tiles"]
    rows = script.read_gallery(sets, tiles, label_maps.images_by_id(sar, "*"), 3)
    assert [row.image_id for row in rows] == order[:3]
    assert [row.image is None for row in rows] == [True, False, True]
    assert tiles[order[0]]["disagreement"] == 0.5
    label_audit_report.plot_gallery(rows, tmp_path / "gallery.png")
    picture = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"))
    differ = (picture == (0xC8, 0x55, 0x3D)).all(axis=-1)
    third = picture.shape[0] // 3
    assert differ[:third].sum() > differ[third : 2 * third].sum() > differ[2 * third :].sum() > 1000
    assert not differ[:, : picture.shape[1] // 2].any()


def test_transitions_show_the_scores_of_both_where_there_is_a_truth(tmp_path: Path) -> None:
    truth = random_maps(2)
    a = spoil(truth, 0.4, 1)
    orange, blue = (224, 138, 46), (53, 114, 176)
    for name, result in (("with", summarize(a, truth, truth)), ("without", summarize(a, truth))):
        label_audit_report.plot_transitions(result, tmp_path / f"{name}.png")
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        bars = [(picture == color).all(axis=-1).sum() for color in (orange, blue)]
        assert bars[1] > bars[0] > 10_000 if name == "with" else bars == [0, 0]


BAD_INPUTS = {
    "no such set": ("a", "nowhere", r"nowhere: pseudo-labels cannot be loaded \(.+\)"),
    "file": ("a", "a/x_1.tif", r"x_1\.tif is a file: pass its folder"),
    "nothing in it": ("a", "empty", r"empty: contains neither label images \(\.tif, \.tiff, \.png\) nor Parquet files"),
    "no common id": ("a", "other", r"other and .*a share no image id, e\.g\. 'y_1' and 'x_1'"),
    "other size": ("a", "small", r"x_1: the label maps differ in size: .*a \(4, 4\), .*small \(3, 4\)"),
    "wrong id": ("a", "nine", r"nine, x_1: 9 is not a class id \(0\.\.8, or 255 for no label\); remap it"),
    "three bands": ("a", "rgb", r"rgb, x_1: expected one band of class ids, found \(4, 4, 3\) uint8"),
    "truncated file": ("a", "truncated", r"x_1\.tif: cannot be read as an image \(.+\); remove it or create it again"),
    "no label": ("a", "blank", r"a and .*blank share no labelled pixel; is one of them empty\?"),
    "two files of one id": ("a", "twice", r"x_1\.tif and .*x_1\.png have the same image_id, 'x_1': remove one"),
    "other columns": ("a", "columns", r"columns: no column pseudo_label among \['image_id', 'label'\]"),
    "confidence of another size": ("a", "unsure", r"x_1: expected confidence as \(4, 4\) uint8, found \(2, 2\) uint8"),
    "same id twice": ("a", "double", r"double: duplicate image_id 'x_1'"),
}


@pytest.fixture(scope="module")
def bad_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    maps = {"a": IN_A, "small": IN_A[:3], "nine": np.where(IN_A == 8, 9, IN_A).astype(np.uint8), "blank": 0 * IN_A}
    for name, label in maps.items():
        write_folder(root / name, {"x_1": label})
    write_folder(root / "rgb", {"x_1": np.stack([IN_A] * 3)})
    write_folder(root / "other", {"y_1": IN_A})
    write_folder(write_folder(root / "twice", {"x_1": IN_A}), {"x_1": IN_A}, ".png")
    (root / "truncated").mkdir()
    (root / "truncated/x_1.tif").write_bytes((root / "a/x_1.tif").read_bytes()[:60])
    (root / "empty").mkdir()
    (root / "columns").mkdir()
    datasets.Dataset.from_dict({"image_id": ["x_1"], "label": [1]}).to_parquet(root / "columns/train.parquet")
    write_dataset(root / "unsure", {"x_1": IN_A}, {"x_1": IN_A[:2, :2]})
    both = write_dataset(root / "double", {"x_1": IN_A}) / "data/train-00000-of-00001.parquet"
    both.with_name("train-00001-of-00001.parquet").write_bytes(both.read_bytes())
    return root


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_wrong_input_is_one_clear_line(
    case: str, bad_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_sets)
    a, b, message = BAD_INPUTS[case]
    with pytest.raises((UserError, DatasetError), match=message) as caught:
        script.main([a, b, "--output", str(tmp_path / "audit")])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_options_are_one_clear_line(bad_sets: Path, tmp_path: Path) -> None:
    a, output = str(bad_sets / "a"), tmp_path / "audit"
    (tmp_path / "regions.csv").write_text("tile,region\nx_1,here\n")
    (tmp_path / "elsewhere.csv").write_text("image_id,region\nz_9,here\n")
    (tmp_path / "binary.csv").write_bytes(b"image_id,region\nx_1,\xff\n")
    cases = {
        r"regions\.csv: expected CSV in UTF-8 with columns image_id and region \(.+'image_id'.+\)": (
            *("--regions", tmp_path / "regions.csv"),
        ),
        r"elsewhere\.csv: contains none of the 1 tiles, e\.g\. not 'x_1'": ("--regions", tmp_path / "elsewhere.csv"),
        r"binary\.csv: expected CSV in UTF-8 .+ \(.+utf-8.+\)": ("--regions", tmp_path / "binary.csv"),
        r"nowhere\.csv cannot be read \(No such file or directory\)": ("--regions", tmp_path / "nowhere.csv"),
        r".+ cannot be read \(Is a directory\)": ("--regions", tmp_path),
        r"--images .*other: contains no image of the tiles, e\.g\. not of 'x_1'": ("--images", bad_sets / "other"),
        r"x_1\.tif: expected 1 or 3 bands of \(4, 4\) uint8, found \(3, 4\) uint8": ("--images", bad_sets / "small"),
        r"blank: labels no pixel that A and B both label": ("--truth", bad_sets / "blank"),
        r"other and .*a share no image id": ("--truth", bad_sets / "other"),
        r"--gallery must be at least 1 and --seed at least 0; got 0, 0": ("--gallery", 0),
        r"unknown setting '--trth'; did you mean '--truth'\?": ("--trth", "x"),
    }
    for message, options in cases.items():
        with pytest.raises((UserError, DatasetError), match=message):
            script.main([a, a, "--output", str(output), *map(str, options)])
        assert not output.exists()
    with pytest.raises(FileError, match=r"regions\.csv/audit cannot be written \(Not a directory\)"):
        script.main([a, a, "--output", str(tmp_path / "regions.csv/audit")])


def test_sets_are_named_by_their_folders_or_by_flags(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, {"x_1": IN_A}) for name in ("dfc25_track1/train/labels", "$runs$")]
    result = run(tmp_path / "audit", *folders)
    assert [result["sets"][key]["name"] for key in "ab"] == ["dfc25_track1/train/labels", "$runs$"]
    assert "Labels A (dfc25_track1/train/labels) and B ($runs$) agree on 100.0 %" in result["verdict"]
    assert label_maps.default_name("org/not-a-folder") == "org/not-a-folder"
    result = run(tmp_path / "audit", *folders, "--name_a", "old", "--name-b", "a|b")
    assert "Labels A (old) and B (a|b) agree on 100.0 %" in result["verdict"]
    assert "| B | a\\|b | " in (tmp_path / "audit/audit.md").read_text()
    assert "<h2>A (old) compared with B (a|b)</h2>" in (tmp_path / "audit/index.html").read_text()


def test_help_needs_no_slow_import() -> None:
    code = (
        "import runpy, sys; sys.argv = [sys.argv[1], '--help']\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    code += "finally: print({'torch', 'datasets', 'matplotlib', 'rasterio'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True)
    assert found.returncode == 0 and "--name_a" in found.stdout and found.stdout.endswith("\nset()\n")


def test_another_folder_is_never_overwritten_and_a_failed_audit_keeps_the_older(tmp_path: Path) -> None:
    a = write_folder(tmp_path / "a", {"x_1": IN_A})
    with pytest.raises(UserError, match=r"--output .*a is not an earlier audit; choose another folder"):
        script.main([str(a), str(a), "--output", str(a)])
    assert [path.name for path in a.iterdir()] == ["x_1.tif"]
    older = run(tmp_path / "audit", a, a)
    rows = [label_audit_report.GalleryRow("x_1", None, IN_A, IN_A, None)]
    with pytest.raises(jinja2.UndefinedError):
        script.write_audit(tmp_path / "audit", {key: older[key] for key in ("sets", "truth", "agreement")}, rows)
    assert json.loads((tmp_path / "audit/audit.json").read_text()) == older
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "audit"]
    b = write_folder(tmp_path / "b", {"x_1": IN_B})
    assert run(tmp_path / "audit", a, b)["agreement"]["overall"] == 12 / 14


def test_command_line_ends_with_one_line_and_status_two(
    bad_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nine, output = bad_sets / "nine", tmp_path / "audit"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(bad_sets / "a"), str(nine), "--output", str(output)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {nine}, x_1: 9 is not a class id (0..8, or 255 for no label); remap it"
    assert list(tmp_path.iterdir()) == []


def test_clean_labels_of_a_synthetic_dataset_are_better_than_the_noisy_ones(tmp_path: Path) -> None:
    make_synthetic_dataset(tmp_path / "synthetic", seed=7, source=2, train=3, val=1, test=0, size=96, num_workers=1)
    noisy, clean = (
        tmp_path / "synthetic/dfc25_track1/train",
        tmp_path / "synthetic/dfc25_track1_extra/train_clean_labels",
    )
    result = run(tmp_path / "audit", noisy / "labels", clean, "--truth", clean, "--images", noisy / "sar_images")
    expected = "Labels B (train_clean_labels) are better than A (dfc25_track1/train/labels) by "
    assert result["verdict"].startswith(expected)
    assert result["truth"]["same_pixels"]["b"]["mean_iou"] == 1
    assert 0.3 < result["agreement"]["overall"] < 0.95
    assert result["regions"] is None


def test_official_labels_of_real_scenes_against_a_copy_with_known_errors(realdata: Path, tmp_path: Path) -> None:
    official = realdata / "dfc25_track1/train/labels"
    maps = {path.stem: np.asarray(Image.open(path)) for path in sorted(official.iterdir())}
    changed = {key: np.where(label == TREE, RANGELAND, label).astype(np.uint8) for key, label in maps.items()}
    ours = write_dataset(tmp_path / "ours", changed)
    result = run(tmp_path / "audit", official, ours, "--images", realdata / "dfc25_track1/train/sar_images")
    trees = sum(int((label == TREE).sum()) for label in maps.values())
    pixels = sum(label.size for label in maps.values())
    assert result["agreement"]["overall"] == pytest.approx(1 - trees / pixels)
    assert result["agreement"]["transition"][TREE][RANGELAND] == trees
    assert result["agreement"]["iou"]["tree"] == 0 and result["agreement"]["iou"]["building"] == 1
    assert result["disagreements"]["largest"] == [
        {"a": "tree", "b": "rangeland", "share": pytest.approx(trees / pixels), "a_right": None, "b_right": None}
    ]
