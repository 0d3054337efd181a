"""Who may import whom: the layers of the house, read from the source without running it."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MODULES = {
    path.relative_to(PROJECT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(PROJECT.glob("hf_seg/**/*.py"))
}
LEAVES = sorted([*PROJECT.glob("recipes/*.py"), *PROJECT.glob("scripts/*.py")])

# A module may import its own layer and those above it in this list.
LAYERS = [
    [f"hf_seg.{name}" for name in layer.split()]
    for layer in (
        "labels errors strict_yaml arguments data.open_earth_map",
        """losses metrics land_cover_iou data.transforms data.doctor data.download
        adaptation.class_mix adaptation.pseudo_labels adaptation.mean_teacher adaptation.strong_augmentation
        inference.sliding_window inference.views inference.weighted_votes inference.image_input inference.band_store
        inference.map_statistics inference.polygons inference.zero_collar
        report.plots report.mix_panel report.member_scores report.power_spectra
        report.label_audit report.label_audit_figures report.label_audit_page""",
        """models data.dataloaders data.label_shards data.toy_world.fields data.toy_world.parcels
        inference.raster_input inference.raster_options""",
        """hub.cards hub.export hub.ensemble_folder training.optimization training.checkpoints training.run_log
        data.toy_world.ground data.toy_world.noise data.toy_world.statistics
        inference.predictor inference.raster_output inference.map_figure""",
        """training.evaluation training.setup training.teacher_student hub.push
        data.toy_world.optical data.toy_world.sar inference.map_job""",
        "data.toy_world ensemble",
        "inference.raster",
        "inference.predict",
    )
]
PURE = [
    *("hf_seg.labels", "hf_seg.losses", "hf_seg.metrics", "hf_seg.data.transforms", "hf_seg.inference.sliding_window"),
    *("hf_seg.inference.views", "hf_seg.inference.weighted_votes", "hf_seg.inference.zero_collar"),
    *(module for module in MODULES if module.startswith("hf_seg.adaptation.")),
]
PACKAGES = ["hf_seg", *(f"hf_seg.{name}" for name in ("adaptation", "data", "hub", "inference", "report", "training"))]


def imports_of(path: Path) -> set[str]:
    """Return the full names of what a file imports anywhere, `from a import b` as both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_a_layer() -> None:
    assert sorted(MODULES) == sorted([*PACKAGES, *(module for layer in LAYERS for module in layer)])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module: str) -> None:
    level_of = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    level_of |= dict.fromkeys(PACKAGES, -1)
    above = {name for name in imports_of(MODULES[module]) if level_of.get(name, -1) > level_of[module]}
    lazy = {
        "hf_seg.metrics": {"hf_seg.land_cover_iou"},
        "hf_seg": {"hf_seg.ensemble", "hf_seg.inference.raster"},
    }
    assert not above - lazy.get(module, set())


@pytest.mark.parametrize("module", PURE)
def test_pure_arithmetic_knows_no_framework(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert not roots & {"transformers", "datasets", "accelerate", "evaluate", "timm", "huggingface_hub"}


def test_the_datasheet_stands_alone() -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES["hf_seg.data.open_earth_map"])}
    assert "hf_seg" not in roots


def test_accelerate_appears_where_processes_work_together_only() -> None:
    users = {module for module, path in MODULES.items() if any(i.startswith("accelerate") for i in imports_of(path))}
    assert "hf_seg.inference.predict" in users
    assert all(module.startswith("hf_seg.training.") for module in users - {"hf_seg.inference.predict"})


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.name)
def test_recipes_and_scripts_are_leaves(path: Path) -> None:
    leaves = {leaf.stem for leaf in LEAVES} | {"recipes", "scripts"}
    assert not {name.split(".")[0] for name in imports_of(path)} & leaves


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    for path in [*MODULES.values(), *LEAVES]:
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in imports_of(path) and "torch.load" not in source, path
        assert "trust_remote_code" not in source, path
