"""Who may import whom: folders are ranks, read from the source without running it."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MODULES = sorted(PROJECT.glob("hf_seg/**/*.py"))
LEAVES = sorted([*PROJECT.glob("recipes/*.py"), *PROJECT.glob("scripts/*.py")])

# A folder (or a module at the top) imports itself and what stands above it in this list, nothing beside or below it.
RANKS = (
    "bands errors labels processes terminal",
    "locks",
    "files settings normalization",
    "hub_client",
    "arguments bootstrap calibration label_sets losses metrics adaptation timm_encoder encoders",
    "data models land_cover_iou report",
    "stem",
    "inference lora",
    "hub synthetic",
    "ensemble export",
    "training mapping studies planning",
    "cli demo",
)
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
PURE = ("bands", "labels", "normalization", "bootstrap", "calibration", "losses", "metrics", "adaptation")


def name_of(path: Path) -> str:
    """Return the folder below hf_seg that a module lies in, or its own name at the top."""
    return path.relative_to(PROJECT / "hf_seg").with_suffix("").parts[0]


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_nothing_imports_upwards(path: Path) -> None:
    name = name_of(path)
    if name == "__init__":  # what it offers is imported when it is first asked for
        return
    assert name in RANK_OF, f"{name} has no rank"
    used = {imported.split(".")[1] for imported in imports_of(path) if imported.startswith("hf_seg.")} & RANK_OF.keys()
    assert all(RANK_OF[each] < RANK_OF[name] for each in used - {name})


def test_the_ranks_hold_what_exists_and_nothing_else() -> None:
    assert {name_of(path) for path in MODULES} - {"__init__"} == RANK_OF.keys()


@pytest.mark.parametrize("name", PURE)
def test_pure_arithmetic_knows_no_framework(name: str) -> None:
    for path in MODULES:
        if name_of(path) == name:
            roots = {imported.split(".")[0] for imported in imports_of(path)}
            assert not roots & {"transformers", "datasets", "accelerate", "evaluate", "timm", "huggingface_hub"}


def test_accelerate_appears_where_processes_work_together_only() -> None:
    users = {path for path in MODULES if any(name.startswith("accelerate") for name in imports_of(path))}
    assert all(name_of(path) == "training" for path in users - {PROJECT / "hf_seg" / "mapping" / "cli.py"})


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.name)
def test_recipes_and_scripts_are_leaves(path: Path) -> None:
    leaves = {leaf.stem for leaf in LEAVES} | {"recipes", "scripts"}
    assert not {name.split(".")[0] for name in imports_of(path)} & (leaves - {"evaluate"})


def test_no_script_shadows_a_package() -> None:
    packages = {"evaluate", "datasets", "accelerate", "transformers", "torch", "timm", "albumentations"}
    assert not packages & {path.stem for path in LEAVES}


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    for path in [*MODULES, *LEAVES]:
        source = path.read_text(encoding="utf-8")
        if path.name == "convert_pretrained.py":  # tensors only, of files whose checksum is recorded
            assert source.count("torch.load") == source.count("weights_only=True") == 1
            source = source.replace("torch.load", "")
        assert "pickle" not in imports_of(path) and "torch.load" not in source, path
        # without the argument transformers would ask, and a `y` on standard input would run the code
        loaded = re.findall(r"Auto\w+\.from_pretrained\((?:\w+), (trust_remote_code=False)\)", source)
        calls = re.findall(r"Auto\w+\.from_pretrained\(", source)
        assert source.count("trust_remote_code") == len(loaded) == len(calls), path
