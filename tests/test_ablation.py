"""Ablation studies: what identifies a step, what is run again, and what a comparison says."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

from hf_seg.arguments import EnsembleArguments, PseudoLabelArguments, Stage1Arguments, Stage2Arguments
from hf_seg.errors import UserError
from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.settings import parse_arguments
from hf_seg.studies import ablation_plan
from hf_seg.studies.ablation import read_study
from hf_seg.studies.ablation_plan import Plan, Step
from hf_seg.studies.ablation_report import read_tiles, summarize, to_csv, write_results

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import ablation as script

PROJECT = Path(__file__).parents[1]
TRAIN = {
    "run": "recipes/stage2.py",
    "config": "recipes/configs/toy/stage2_segformer.yaml",
    "seed": "{seed}",
    "output_dir": "{output}",
}


def write_study(folder: Path, **changes: Any) -> Path:
    study = {
        "question": "Does it help?",
        "steps": {"data": {"run": "scripts/make_synthetic_dataset.py", "output": "{output}"}},
        "rows": {
            "plain": {**TRAIN, "data_dir": "{data}/dfc25_track1"},
            "clipped": {"like": "plain", "max_grad_norm": 2},
        },
        "score": {"run": "scripts/evaluate_model.py", "model": "{row}", "output": "{output}/scores.json"},
        "comparisons": [{"row": "clipped", "against": "plain", "hypothesis": "no difference"}],
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def folders(plan: Plan) -> set[str]:
    return {step.folder.name for step in plan.steps}


def test_a_step_that_does_not_depend_on_the_seed_runs_once(tmp_path: Path) -> None:
    plan = Plan(read_study(write_study(tmp_path)), [0, 1, 2], tmp_path)
    scripts = [step.script for step in plan.steps]
    assert scripts.count("scripts/make_synthetic_dataset.py") == 1
    assert scripts.count("recipes/stage2.py") == scripts.count("scripts/evaluate_model.py") == 6
    data, row = plan.steps[0], plan.trained["", "clipped", 1]
    assert row.parents == (data,) and row.flags["data_dir"] == f"{data.folder}/dfc25_track1"
    assert row.flags["seed"] == "1" and row.flags["max_grad_norm"] == 2 and "like" not in row.flags
    assert f"--output_dir {row.folder} --data_dir {data.folder}/dfc25_track1 --max_grad_norm 2" in " ".join(
        row.command()
    )


def test_parents_come_first(tmp_path: Path) -> None:
    plan = Plan(read_study(write_study(tmp_path)), [0], tmp_path)
    for index, step in enumerate(plan.steps):
        assert all(parent in plan.steps[:index] for parent in step.parents)


@pytest.mark.parametrize("changed", ["flag", "parent", "config", "code"])
def test_what_determines_a_result_identifies_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 1e-3\n", encoding="utf-8")
    row = {**TRAIN, "config": str(config), "data_dir": "{data}"}
    data = {"run": "scripts/make_synthetic_dataset.py", "output": "{output}"}

    def plan(data: dict[str, Any], row: dict[str, Any]) -> set[str]:
        path = write_study(tmp_path, steps={"data": data}, rows={"plain": row}, comparisons=[])
        return folders(Plan(read_study(path), [0], tmp_path))

    before = plan(data, row)
    config.write_text("# a comment changes nothing\nlearning_rate: 0.001\n", encoding="utf-8")
    assert plan(data, row) == before
    if changed == "flag":
        row = {**row, "ce_weight": 2}
    elif changed == "parent":
        data = {**data, "seed": 5}
    elif changed == "config":
        config.write_text("learning_rate: 2e-3\n", encoding="utf-8")
    else:
        code_of = ablation_plan.code_of
        monkeypatch.setattr(ablation_plan, "code_of", lambda script: "other" if "stage2" in script else code_of(script))
    after = plan(data, row)
    assert not {name for name in after & before if name.startswith(("stage2", "evaluate"))}
    assert {name for name in after & before if name.startswith("make")} or changed == "parent"


def test_comments_and_docstrings_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf_seg" / "report").mkdir(parents=True)
    (tmp_path / "run.py").write_text("from hf_seg.arithmetic import x\nfrom hf_seg.report import plots\n")
    (tmp_path / "hf_seg" / "report" / "plots.py").write_text("y = 1\n")
    module = tmp_path / "hf_seg" / "arithmetic.py"
    monkeypatch.setattr(ablation_plan, "PROJECT", tmp_path)

    def digest(source: str, plots: str = "y = 1\n") -> str:
        module.write_text(source)
        (tmp_path / "hf_seg" / "report" / "plots.py").write_text(plots)
        ablation_plan.code_of.cache_clear()
        return ablation_plan.code_of("run.py")

    before = digest('"""Text."""\nx = 1\n')
    assert digest('"""Other text."""\n\nx = (1)  # one\n') == before
    assert digest("x = 1\n", plots="y = 2\n") == before
    assert digest('"""Text."""\nx = 2\n') != before
    ablation_plan.code_of.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"plain": {"like": "plan"}}, "comparisons": []}, "no step or row 'plan'"),
        ({"rows": {"plain": {"run": "rm.py"}}, "comparisons": []}, "run of 'plain' must be a script of this project"),
        ({"rows": {"a": {"like": "b"}, "b": {"like": "a"}}, "comparisons": []}, "inherits from itself"),
        ({"comparisons": [{"row": "clipped", "against": "plian", "hypothesis": ""}]}, "did you mean 'plain'"),
        ({"comparisons": [{"row": "clipped", "against": "plain"}]}, "a comparison has row, against and hypothesis"),
        ({"worlds": {"hard": {"dta": {"seed": 1}}}}, "did you mean 'data'"),
        ({"extra": 1}, "must have question, rows, score, comparisons"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_study(write_study(tmp_path, **changes))


def test_a_row_that_ignores_the_seed_is_refused(tmp_path: Path) -> None:
    rows = {"plain": {**TRAIN, "seed": 0}}
    study = read_study(write_study(tmp_path, rows=rows, comparisons=[]))
    with pytest.raises(UserError, match=r"'plain' does not depend on"):
        Plan(study, [0, 1], tmp_path)


def finish(plan: Plan, tiles: dict[tuple[str, str, int], np.ndarray], own: dict[str, float] | None = None) -> None:
    """Write what the steps of a plan would have left: the tiles' confusion matrices, and rows' own scores."""
    for key, step in plan.scores.items():
        step.folder.mkdir(parents=True, exist_ok=True)
        np.savez(step.folder / "scores.npz", confusion_matrices=tiles[key])
        for each in (step, plan.trained[key]):
            each.folder.mkdir(parents=True, exist_ok=True)
            each.record.write_text(json.dumps({"seconds": 10.0}))
        score = {"mean_iou": (own or {}).get(key[1], 0.0)}
        (plan.trained[key].folder / "eval_results.json").write_text(json.dumps(score))


def random_tiles(seed: int, right: int) -> np.ndarray:
    """Return (20, 9, 9) counts: of 200 pixels a class about `right` percent are right, the others one class above."""
    rate = np.clip(
        right / 100 + 0.1 * np.random.default_rng(seed).standard_normal((20, OPEN_EARTH_MAP.num_labels - 1)), 0, 1
    )
    counts = np.zeros((20, OPEN_EARTH_MAP.num_labels, OPEN_EARTH_MAP.num_labels), np.int64)
    index = np.arange(1, OPEN_EARTH_MAP.num_labels)
    counts[:, index, index] = np.rint(200 * rate)
    counts[:, index, np.roll(index, -1)] = 200 - counts[:, index, index]
    return counts


def test_a_difference_that_the_data_shows_is_called_so(tmp_path: Path) -> None:
    plan = Plan(read_study(write_study(tmp_path)), [0, 1], tmp_path / "runs")
    tiles = {key: random_tiles(key[2], 60 if key[1] == "clipped" else 30) for key in plan.scores}
    finish(plan, tiles)
    summary = summarize(plan, [0, 1])
    (comparison,) = summary["comparisons"]
    scores = {row["row"]: row["mean"] for row in summary["rows"]}
    assert comparison["value"] == pytest.approx(100 * (scores["clipped"] - scores["plain"]))
    assert comparison["value"] == pytest.approx(np.mean(comparison["per_seed"]))
    assert 0 < comparison["low"] < comparison["value"] < comparison["high"] and comparison["detectable"] > 0
    assert comparison["result"] == "better"
    write_results(summary, tmp_path / "out")
    text, page = ((tmp_path / "out" / f"results.{kind}").read_text() for kind in ("md", "html"))
    (line,) = (line for line in text.splitlines() if line.startswith("| clipped - plain |"))
    assert f"| {comparison['value']:+.1f} |" in line and "| better |" in line and line.endswith("| no difference |")
    assert f"<td>{comparison['value']:+.1f}</td>" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("<!doctype html>", "")
    header, *lines = to_csv(summary).splitlines()
    assert header.startswith("world,row,seed,mean_iou") and len(lines) == 4
    assert lines[0].split(",")[:3] == ["", "plain", "0"]


def test_equal_rows_do_not_differ(tmp_path: Path) -> None:
    plan = Plan(read_study(write_study(tmp_path)), [0, 1], tmp_path / "runs")
    finish(plan, {key: random_tiles(key[2], 30) for key in plan.scores})
    (comparison,) = summarize(plan, [0, 1])["comparisons"]
    assert comparison["value"] == comparison["low"] == comparison["high"] == comparison["detectable"] == 0
    assert comparison["result"] == "not shown"


def test_the_best_row_on_val_is_compared_on_test(tmp_path: Path) -> None:
    rows = {"a": {**TRAIN, "data_dir": "x"}, "b": {"like": "a", "ce_weight": 2}, "best": {"best_of": ["a", "b"]}}
    comparisons = [{"row": "best", "against": "a", "hypothesis": "a gain"}]
    plan = Plan(read_study(write_study(tmp_path, rows=rows, comparisons=comparisons)), [0], tmp_path / "runs")
    tiles = {key: random_tiles(0, 60 if key[1] == "b" else 30) for key in plan.scores}
    finish(plan, tiles, {"a": 0.5, "b": 0.4})
    (comparison,) = summarize(plan, [0])["comparisons"]
    assert comparison["value"] == 0  # a is best on val, though not on test
    finish(plan, tiles, {"a": 0.4, "b": 0.5})
    assert summarize(plan, [0])["comparisons"][0]["value"] > 1


def test_a_row_may_be_a_folder_of_another_one(tmp_path: Path) -> None:
    rows = {"teacher": {**TRAIN, "data_dir": "x"}, "student": {"folder": "{teacher}/student"}}
    plan = Plan(read_study(write_study(tmp_path, rows=rows, comparisons=[])), [0], tmp_path)
    assert plan.trained["", "student", 0] is plan.trained["", "teacher", 0]
    model = plan.scores["", "student", 0].flags["model"]
    assert model == f"{plan.trained['', 'teacher', 0].folder}/student"


def test_some_rows_need_no_others(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    plan = Plan(study, [0], tmp_path / "runs", ["clipped"])
    assert {row for _, row, _ in plan.scores} == {"clipped"} and len(plan.steps) == 3
    finish(plan, {key: random_tiles(0, 50) for key in plan.scores})
    assert summarize(plan, [0])["comparisons"] == []
    with pytest.raises(UserError, match="did you mean 'clipped'"):
        Plan(study, [0], tmp_path, ["clippd"])


def test_a_world_changes_the_steps_it_names(tmp_path: Path) -> None:
    worlds = {"easy": {}, "hard": {"data": {"seed": 9}}}
    plan = Plan(read_study(write_study(tmp_path, worlds=worlds)), [0], tmp_path)
    data = [step.flags.get("seed") for step in plan.steps if step.script.startswith("scripts/make")]
    assert data == [None, 9] and {world for world, _, _ in plan.scores} == {"easy", "hard"}
    plan = Plan(plan.study, [0], tmp_path, worlds=["hard"])
    assert [step.flags["seed"] for step in plan.steps if step.script.startswith("scripts/make")] == [9]
    with pytest.raises(UserError, match="did you mean 'hard'"):
        Plan(plan.study, [0], tmp_path, worlds=["hrd"])


def test_folds_are_scored_as_one_dataset(tmp_path: Path) -> None:
    worlds = {"fold 0": {}, "fold 1": {"data": {"seed": 9}}}
    plan = Plan(read_study(write_study(tmp_path, worlds=worlds, pool=True)), [0, 1], tmp_path / "runs")
    right = {"plain": 30, "clipped": 60}
    tiles = {
        (world, row, seed): random_tiles(seed, right[row])[: 4 + 2 * (world == "fold 1")]
        for world, row, seed in plan.scores
    }
    finish(plan, tiles)
    records = [plan.scores["fold 1", row, seed].record for row in right for seed in (0, 1)]
    for record in records:
        record.rename(record.with_suffix(".kept"))
    assert summarize(plan, [0, 1])["rows"] == []  # a fold is missing
    for record in records:
        record.with_suffix(".kept").rename(record)
    summary = summarize(plan, [0, 1])
    assert summary["n_tiles"] == 10 and [row["world"] for row in summary["rows"]] == ["", ""]
    counts = ConfusionMatrix()
    counts.matrix += tiles["fold 0", "plain", 1].sum(axis=0) + tiles["fold 1", "plain", 1].sum(axis=0)
    assert summary["rows"][0]["runs"][1]["mean_iou"] == counts.compute()["mean_iou"]
    assert summary["rows"][0]["seconds"] == 20.0 and len(summary["comparisons"]) == 1


def run(study: Path, root: Path, *arguments: str) -> int:
    try:
        script.main([str(study), "--seeds", "0", "--output_dir", str(root), *arguments])
    except SystemExit as end:
        return int(str(end.code))
    return 0


def test_a_study_runs_and_does_nothing_twice(
    tmp_path: Path, oem_sar: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"max_train_steps": 1, "warmup_steps": 0, "crop_size": 64, "eval_steps": 0, "dataloader_num_workers": 0}
    study = write_study(
        tmp_path,
        steps={},
        rows={"plain": {**TRAIN, **short, "data_dir": str(oem_sar)}},
        score={
            "run": "scripts/evaluate_model.py",
            "model": "{row}",
            "data_dir": str(oem_sar),
            "stride": 1,
            "output": "{output}/scores.json",
        },
        comparisons=[],
    )
    root = tmp_path / "runs"
    assert run(study, root) == 0
    printed = capsys.readouterr().out
    assert str(root / "tiny" / "results.html") in printed
    results = json.loads((root / "tiny" / "results.json").read_text())
    (only,) = results["rows"][0]["runs"]
    assert results["n_tiles"] == 3 and 0 <= only["mean_iou"] <= 1 and only["seconds"] > 0
    assert {path.name for path in (root / "tiny").iterdir()} == {
        f"results.{kind}" for kind in ("json", "csv", "md", "html", "png")
    }
    (trained,) = root.glob("stage2-*/")
    assert not (trained / "checkpoints").exists()
    assert run(study, root, "--dry_run") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "done"]
    monkeypatch.setattr(script, "run_step", lambda *_: pytest.fail("a step that is done was run again"))
    assert run(study, root) == 0


def test_a_failing_command_is_one_line_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"plain": {**TRAIN, "data_dir": str(tmp_path / "nothing")}}
    assert run(write_study(tmp_path, steps={}, rows=rows, comparisons=[]), tmp_path / "runs") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: recipes/stage2.py failed: error: ") and "nothing" in error and ".log" in error
    assert not list((tmp_path / "runs").glob("stage2-*.json"))


def test_what_another_process_works_on_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(
        read_study(
            write_study(
                tmp_path,
                steps={},
                rows={"a": {**TRAIN, "data_dir": "x"}, "b": {"like": "a", "ce_weight": 2}},
                comparisons=[],
            )
        ),
        [0],
        tmp_path,
    )
    ran = []

    def done(step: Step, threads: int) -> None:
        ran.append(step)
        step.record.write_text("{}")

    other = plan.trained["", "a", 0]
    lock = FileLock(f"{other.folder}.lock")
    lock.acquire()

    def finish_elsewhere(_: float) -> None:
        other.record.write_text("{}")
        lock.release()

    monkeypatch.setattr(script, "run_step", done)
    monkeypatch.setattr(script.time, "sleep", finish_elsewhere)
    monkeypatch.setattr("hf_seg.studies.ablation_report.summarize", lambda *_: {"rows": []})
    monkeypatch.setattr("hf_seg.studies.ablation_report.write_results", lambda *_: None)
    script.run_plan(plan, 1, [0], tmp_path / "tiny")
    assert other not in ran and len(ran) == len(plan.steps) - 1


@pytest.mark.parametrize("path", sorted(PROJECT.glob("recipes/configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_the_studies_are_plans_of_valid_commands(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)  # their paths start here
    arguments = {
        "recipes/stage1.py": Stage1Arguments,
        "recipes/stage2.py": Stage2Arguments,
        "recipes/pseudo_label.py": PseudoLabelArguments,
        "recipes/ensemble.py": EnsembleArguments,
    }
    study = read_study(path)
    assert study.question.endswith("?") and all(comparison.hypothesis for comparison in study.comparisons)
    plan = Plan(study, [0, 1], tmp_path)
    for step in plan.steps:
        if step.script in arguments:
            args = parse_arguments(arguments[step.script], step.command()[1:])
            assert args.output_dir == str(step.folder)
        assert "{" not in " ".join(step.command())


@pytest.mark.parametrize("how", ["pickled", "no archive", "another array"])
def test_damaged_scores_are_named_and_nothing_is_unpickled(how: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    if how == "no archive":
        path.write_bytes(b"PK half")
    else:
        name = "confusion_matrices" if how == "pickled" else "others"
        np.savez(path, **{name: np.array([object()], dtype=object) if how == "pickled" else np.zeros(1)})
    with pytest.raises(UserError, match=r"scores\.npz is damaged \(.*\); delete it, and score again"):
        read_tiles(SimpleNamespace(folder=tmp_path))
