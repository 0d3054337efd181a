"""The quickstart's closing table: scores beside baselines, and a warning where something was not learned."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image

from hf_seg.labels import OPEN_EARTH_MAP
from hf_seg.metrics import ConfusionMatrix
from hf_seg.synthetic import make_synthetic_dataset

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import summarize_quickstart


def scores(matrix: np.ndarray) -> dict[str, Any]:
    counts = ConfusionMatrix()
    counts.matrix += matrix.astype(np.int64)
    return counts.compute()


def perfect(*, lost: int | None = None, pixels: int = 100) -> dict[str, Any]:
    """Score a network that is always right, but takes class `lost`, of that many pixels, for class 1."""
    matrix = np.diag([0] + [100] * (OPEN_EARTH_MAP.num_labels - 1))
    if lost is not None:
        matrix[lost] = 0
        matrix[lost, 1] = pixels
    return scores(matrix)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the quickstart leaves: a small dataset, the map of its scene is the truth, and records of stages."""
    root = tmp_path_factory.mktemp("quickstart")
    make_synthetic_dataset(root / "data", seed=0, source=2, train=10, val=1, test=10, size=96, scene=192)
    (root / "map.tif").write_bytes((root / "data" / "scene_label.tif").read_bytes())
    records = {
        "source_only": {"mean_iou": 0.65, "target": {"mean_iou": 0.35}},
        "stage1": {"mean_iou": 0.6, "target": {"mean_iou": 0.5}},
        "audit": {"truth": {"same_pixels": {"a": {"mean_iou": 0.4}, "b": {"mean_iou": 0.45}}}},
        "ensemble": {
            **perfect(),
            "members": [{**perfect(lost=4), "origin": "lite0"}, {**perfect(), "origin": "lite1"}],
        },
    }
    for name, record in records.items():
        (root / name).mkdir()
        (root / name / ("audit.json" if name == "audit" else "eval_results.json")).write_text(json.dumps(record))
    return root


def test_the_table_has_every_stage_and_the_baselines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["summarize_quickstart.py", str(folder)])
    summarize_quickstart.main()
    lines = capsys.readouterr().out.splitlines()
    table = dict(line.rsplit(maxsplit=1) for line in lines if line.rstrip()[-4:-3] == "." and "WARNING" not in line)
    assert table["optical network, adapted, target val"] == "0.500" and table["our pseudo-labels, train"] == "0.450"
    assert table["optical network, source only, target val"] == "0.350"
    assert table["ensemble of the three, test"] == "1.000" and table["map of the large scene"] == "1.000"
    assert (
        0 < float(table["majority class everywhere, SAR test"]) < float(table["histogram of 9 x 9 windows, SAR test"])
    )
    (warning,) = (line for line in lines if line.startswith("WARNING"))
    assert warning == "WARNING SAR network, lite0: road is 12 % of the truth and its IoU is 0"
    assert Image.open(folder / "quickstart.png").width > 1000


def test_the_score_of_the_map_leaves_out_what_is_not_mapped(folder: Path) -> None:
    with rasterio.open(folder / "map.tif", "r+") as file:
        label_map = file.read(1)
        half = label_map.copy()
        half[:, :96] = 0
        file.write(half, 1)
    found = summarize_quickstart.score_map(folder)
    assert found["mean_iou"] == 1 and sum(map(sum, found["confusion_matrix"])) == np.count_nonzero(label_map[:, 96:])


def test_a_rare_class_and_a_good_network_give_no_warning() -> None:
    assert not list(summarize_quickstart.warnings_of({"a": perfect(lost=4, pixels=20)}, histogram=0.1))
    (warning,) = summarize_quickstart.warnings_of({"a": perfect(lost=4)}, histogram=0.1)
    assert "road" in warning
    (warning,) = summarize_quickstart.warnings_of({"a": perfect()}, histogram=1.0)
    assert "not above the histogram" in warning


def test_a_folder_without_a_quickstart_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["summarize_quickstart.py", str(tmp_path)])
    with pytest.raises(summarize_quickstart.UserError, match="run `make quickstart` first"):
        summarize_quickstart.main()
