"""What the campaign shares: the seed of each file, and the figures for docs/reliability.md."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

RESULTS = Path(__file__).parents[1] / "runs" / "campaign"
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))


@dataclass
class Results:
    """Rows of one file's table: name of the column to value."""

    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, **row: object) -> None:
        """Add a row; every row of a file has the same columns."""
        self.rows.append(row)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Collect this file's rows, and write them to runs/campaign/<file>/<worker>.json at the end."""
    started, collected = time.monotonic(), Results()
    failed_before = request.session.testsfailed
    yield collected
    name, worker = request.path.stem.removeprefix("test_"), os.environ.get("PYTEST_XDIST_WORKER", "all")
    content = {
        "seed": SEED,
        "seconds": round(time.monotonic() - started),
        "failed": request.session.testsfailed - failed_before,
        "rows": collected.rows,
    }
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    (RESULTS / name / f"{worker}.json").write_text(json.dumps(content, indent=1))


@pytest.fixture(scope="module")
def random(request: pytest.FixtureRequest) -> Random:
    """The random stream of this file, which follows from the campaign's seed."""
    return Random(f"{SEED} {request.path.stem}")
