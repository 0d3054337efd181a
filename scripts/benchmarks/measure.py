"""Times ways of doing the same in turns; a way that this environment lacks has a blank cell."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

Way = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """The median of some measurements, and their range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """Summarize one value or more."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}..{self.high:.4g})"


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Args:
        name: what was measured, with its size.
        ours: our figure.
        peers: the figure of each other way; None where its package is missing or there is nothing to compare with.
        goal: of the ratio peer / ours, in words.
        unit: of the figures; "s" or "MiB".
    """

    name: str
    ours: Figure
    peers: Mapping[str, Figure | None] = field(default_factory=dict)
    goal: str = ""
    unit: str = "s"

    def ratios(self) -> dict[str, float | None]:
        """Return peer / ours of each peer: above 1 ours is faster or smaller."""
        return {name: peer and peer.median / self.ours.median for name, peer in self.peers.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self) | {"ratios": self.ratios()}


def optional(name: str) -> ModuleType | None:
    """Import a peer's module; None if its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def race(ours: Way, peers: Mapping[str, Way | None], repeats: int) -> tuple[Figure, dict[str, Figure | None]]:
    """Time all ways in turns, `repeats` rounds after one that warms up; return ours and the peers' figures.

    Seconds are those that this process computes: neither other jobs on the machine nor waiting count.
    """
    ways = {"": ours} | {name: peer for name, peer in peers.items() if peer is not None}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    figures = {name: Figure.of(values[1:]) for name, values in seconds.items()}
    return figures[""], {name: figures.get(name) for name in peers}
