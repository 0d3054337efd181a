"""Write docs/reliability.md from the results of a campaign (`make test-campaign`).

    python tests/campaign/write_reliability.py

The text is tests/campaign/reliability.md; each line `{name}` in it becomes the table of runs/campaign/<name>/*.json.
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
    parts = [json.loads(path.read_text()) for path in sorted((ROOT / "runs" / "campaign" / name).glob("*.json"))]
    rows = [row for part in parts for row in part["rows"]]
    if not rows:
        return "Not run."
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    lines += sorted(f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows)
    failures = sum(part["failed"] for part in parts)
    failed = f", **{failures} tests failed**" if failures else ""
    command = parts[0].get("command") or f"`pytest -m slow tests/campaign/test_{name}.py`"
    seconds = max(part["seconds"] for part in parts)
    return "\n".join([*lines, "", f"{command}, seed {parts[0]['seed']}, {seconds} s{failed}."])


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
