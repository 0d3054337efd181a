"""What a reader of the repository finds: links that lead somewhere, and a workflow that runs what everybody runs."""

import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[1]
DOCUMENTS = sorted({*PROJECT.glob("*.md"), *PROJECT.glob("*/README.md"), *PROJECT.glob("hf_seg/*/README.md")})
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
