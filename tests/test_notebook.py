"""The notebook runs from its first cell to its last, as a reader runs it."""

from pathlib import Path
from typing import Any

import nbformat
from hub_folders import build_toy
from nbclient import NotebookClient

from hf_seg import EnsembleForSemanticSegmentation
from hf_seg.hub.export import export_model

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "map_a_scene.ipynb"


def outputs_of(notebook: Any) -> list[str]:
    """Return what each cell of code shows as text."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(each.get("text") or each["data"]["text/plain"] for each in cell.outputs) for cell in cells]


def test_it_runs_and_writes_map_picture_table_and_polygons(tmp_path: Path) -> None:
    folders = [tmp_path / "member0", tmp_path / "member1"]
    for seed, folder in enumerate(folders):
        export_model(build_toy("toy-segformer", seed), folder, crop_size=128, recipe="", results=None)
    EnsembleForSemanticSegmentation.from_members(folders).save_pretrained(tmp_path / "runs" / "quickstart" / "ensemble")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, files, picture, areas, polygons, score = outputs_of(notebook)
    assert "map.tif" in files and "map.gpkg" in files and (tmp_path / "map_confidence.tif").exists()
    assert "Figure" in picture
    assert "percent" in areas and "agriculture land" in areas
    assert "median" in polygons
    assert score.startswith("mIoU 0.")


def test_what_is_committed_was_computed_by_the_cells_in_their_order() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    numbers = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    errors = [each for cell in notebook.cells for each in cell.get("outputs", ()) if each.output_type == "error"]
    assert not errors and "mIoU" in outputs_of(notebook)[-1]
    assert NOTEBOOK.stat().st_size < 400_000
    assert "/tmp" not in NOTEBOOK.read_text() and "/work" not in NOTEBOOK.read_text()
