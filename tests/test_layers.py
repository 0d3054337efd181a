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
    ["hf_seg.labels", "hf_seg.arguments", "hf_seg.data.open_earth_map"],
    [
        *("hf_seg.losses", "hf_seg.metrics", "hf_seg.land_cover_iou", "hf_seg.data.transforms", "hf_seg.data.doctor"),
        *(
            "hf_seg.data.download",
            "hf_seg.inference.sliding_window",
            "hf_seg.report.plots",
            "hf_seg.report.mix_panel",
        ),
        *("hf_seg.adaptation.class_mix", "hf_seg.adaptation.pseudo_labels", "hf_seg.adaptation.mean_teacher"),
        *("hf_seg.adaptation.strong_augmentation", "hf_seg.report.label_audit", "hf_seg.report.label_audit_figures"),
        *("hf_seg.report.label_audit_page", "hf_seg.report.power_spectra"),
        *("hf_seg.inference.views", "hf_seg.inference.weighted_votes"),
        *("hf_seg.inference.image_input", "hf_seg.report.member_scores"),
    ],
    [
        "hf_seg.models",
        "hf_seg.data.dataloaders",
        "hf_seg.data.label_shards",
        "hf_seg.data.toy_world.fields",
        "hf_seg.data.toy_world.parcels",
    ],
    [
        *("hf_seg.hub.cards", "hf_seg.hub.export", "hf_seg.training.optimization", "hf_seg.training.checkpoints"),
        *("hf_seg.training.run_log", "hf_seg.data.toy_world.ground", "hf_seg.data.toy_world.noise"),
        "hf_seg.data.toy_world.statistics",
    ],
    [
        *("hf_seg.training.evaluation", "hf_seg.training.setup", "hf_seg.training.teacher_student"),
        *("hf_seg.data.toy_world.optical", "hf_seg.data.toy_world.sar", "hf_seg.hub.ensemble_folder"),
    ],
    ["hf_seg.data.toy_world", "hf_seg.ensemble"],
]
PURE = [
    *("hf_seg.labels", "hf_seg.losses", "hf_seg.metrics", "hf_seg.data.transforms", "hf_seg.inference.sliding_window"),
    *("hf_seg.inference.views", "hf_seg.inference.weighted_votes"),
    *sorted(module for module in MODULES if module.startswith("hf_seg.adaptation.")),
]
PACKAGES = [
    "hf_seg",
    "hf_seg.adaptation",
    "hf_seg.data",
    "hf_seg.hub",
    "hf_seg.inference",
    "hf_seg.report",
    "hf_seg.training",
]


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
    lazy = {"hf_seg": {"hf_seg.ensemble"}, "hf_seg.metrics": {"hf_seg.land_cover_iou"}}.get(module, set())
    assert not above - lazy


@pytest.mark.parametrize("module", PURE)
def test_pure_arithmetic_knows_no_framework(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES[module])}
    assert not roots & {"transformers", "datasets", "accelerate", "evaluate", "timm", "huggingface_hub"}


def test_the_datasheet_stands_alone() -> None:
    roots = {name.split(".")[0] for name in imports_of(MODULES["hf_seg.data.open_earth_map"])}
    assert "hf_seg" not in roots


def test_accelerate_appears_in_training_recipes_and_scripts_only() -> None:
    users = {module for module, path in MODULES.items() if any(i.startswith("accelerate") for i in imports_of(path))}
    assert users and all(module.startswith("hf_seg.training.") for module in users)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.name)
def test_recipes_and_scripts_are_leaves(path: Path) -> None:
    leaves = {leaf.stem for leaf in LEAVES} | {"recipes", "scripts"}
    assert not {name.split(".")[0] for name in imports_of(path)} & leaves


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    for path in [*MODULES.values(), *LEAVES]:
        source = path.read_text(encoding="utf-8")
        assert "pickle" not in imports_of(path) and "torch.load" not in source, path
        assert "trust_remote_code" not in source, path
