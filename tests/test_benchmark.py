"""Every benchmark runs at a tiny size and returns what the table needs; nothing here is timed."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize(
    ("module", "name", "rows", "settings"),
    [
        ("arithmetic", "metric", 1, {}),
        ("arithmetic", "lovasz", 3, {}),
        ("arithmetic", "losses", 3, {}),
        ("arithmetic", "ema", 2, {"model": "toy-segformer"}),
        ("training", "stage2", 1, {}),
        ("training", "stage1", 1, {}),
        ("loading", "loader", 2, {}),
        ("prediction", "scene", 2, {}),
        pytest.param("prediction", "members", 2, {"names": ("toy-segformer",) * 2}, marks=pytest.mark.slow),
        pytest.param("startup", "startup", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_every_benchmark_returns_its_figures(module: str, name: str, rows: int, settings: dict[str, object]) -> None:
    function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
    results = function(256 if module == "training" else 128, 1, **settings)
    assert len(results) == rows
    for result in results:
        row = json.loads(json.dumps(result.as_dict()))
        assert row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"]
        assert row["peers"].keys() == row["ratios"].keys()
        for peer, ratio in row["ratios"].items():
            figure = row["peers"][peer]
            assert ratio == (figure and pytest.approx(figure["median"] / row["ours"]["median"]))


@pytest.mark.usefixtures("scripts")
def test_the_script_lists_what_the_modules_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "benchmark", raising=False)
    script = importlib.import_module("benchmark")
    for name, module in script.BENCHMARKS.items():
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), name))
    script.main(["metric", "--size", "128", "--repeats", "1", "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in written["results"]] == ["metric, 128 x 128"]
    assert "metric, 128 x 128" in capsys.readouterr().out


@pytest.mark.usefixtures("scripts")
def test_an_unknown_benchmark_is_named_with_the_nearest() -> None:
    from hf_seg.errors import UserError

    with pytest.raises(UserError, match=r"unknown benchmark 'lovas'.*lovasz"):
        importlib.import_module("benchmark").main(["lovas"])
