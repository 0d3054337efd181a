"""Write docs/reliability.md from the results of a campaign (`make test-campaign`).

    python tests/campaign/write_reliability.py

The text is tests/campaign/reliability.md; each line `{name}` in it becomes the table of runs/campaign/<name>.json.
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def main() -> None:
    """Replace the names in the text by tables."""
    text = (FOLDER / "reliability.md").read_text()
    written = re.sub(r"^\{(\w+)\}$", lambda match: table(match[1]), text, flags=re.MULTILINE)
    (ROOT / "docs" / "reliability.md").write_text(written)


def table(name: str) -> str:
    """Return the results of one file as a markdown table, with the time that they took."""
    path = ROOT / "runs" / "campaign" / f"{name}.json"
    if not path.exists():
        return "Not run."
    content = json.loads(path.read_text())
    columns = list(content["rows"][0])
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in content["rows"]]
    failed = f", **{content['failed']} tests failed**" if content["failed"] else ""
    command = content.get("command") or f"`pytest -m slow tests/campaign/test_{name}.py`"
    return "\n".join([*lines, "", f"{command}, seed {content['seed']}, {content['seconds']} s{failed}."])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
