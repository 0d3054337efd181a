"""The report of a label audit: its verdict, and a page with all numbers as Markdown and as self-contained HTML."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hf_seg.report.style import percent
from hf_seg.studies.label_audit import CLASSES

FEW_TILES = 10  # a bootstrap over fewer gives too narrow an interval
TRANSITIONS, GALLERY = "transition.png", "gallery.png"


def title(key: str, name: str) -> str:
    """Return how the report calls a set, e.g. "A (runs/labels)"; the truth is called the truth."""
    return "truth" if key == "truth" else f"{key.upper()} ({name})"


def judge(result: Mapping[str, Any], name_a: str, name_b: str) -> str:
    """Say which labels are better, if the result of `label_audit.summarize` can tell."""
    a, b = title("a", name_a), title("b", name_b)
    if result["truth"] is None:
        agreement = percent(result["agreement"]["overall"])
        return (
            f"Cannot tell which labels are better without a truth. Labels {a} and {b} agree on {agreement} of the "
            "pixels that both label; this audit shows how much and where they differ."
        )
    n_tiles, gain = result["truth"]["n_tiles"], result["truth"]["difference"]["mean_iou"]
    points = 100 * gain["difference"]
    if gain["low"] is None:
        return (
            f"Cannot tell which labels are better: a single tile has no interval. On it the mIoU of {b} minus that of "
            f"{a} is {points:+.1f} points."
        )
    low, high = 100 * gain["low"], 100 * gain["high"]
    basis = f"95 % interval over {n_tiles} tiles"
    if n_tiles < FEW_TILES:
        basis += ", too few to rely on"
    if low > 0:
        return f"Labels {b} are better than {a} by {points:.1f} points of mIoU [{low:.1f}, {high:.1f}] ({basis})."
    if high < 0:
        return f"Labels {a} are better than {b} by {-points:.1f} points of mIoU [{-high:.1f}, {-low:.1f}] ({basis})."
    return (
        f"No clear difference: the mIoU of {b} minus that of {a} is {points:+.1f} points [{low:+.1f}, {high:+.1f}] "
        f"({basis})."
    )


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write `audit.md` and `index.html` beside the pictures that they show.

    Args:
        result: the content of `audit.json`.
        folder: contains `TRANSITIONS` and `GALLERY`.
    """
    content = {
        **result,
        "titles": {key: title(key, found["name"]) for key, found in result["sets"].items()},
        "classes": CLASSES,
        "transitions": TRANSITIONS,
        "gallery": GALLERY,
        "embed": lambda file: base64.b64encode((folder / file).read_bytes()).decode(),
    }
    for file, layout in (("audit.md", "markdown.j2"), ("index.html", "html.j2")):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("hf_seg.studies"),
            autoescape=file.endswith(".html"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            extensions=["jinja2.ext.do"],
        )
        environment.filters |= {
            "percent": percent,
            "points": _points,
            "interval": _interval,
            "thousands": "{:,}".format,
        }
        text = environment.get_template("audit.j2").render(content, layout=layout)
        (folder / file).write_text(text, encoding="utf-8")


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _interval(difference: Mapping[str, float | None] | None) -> str:
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "-"
    return f"{_points(difference['low'])} to {_points(difference['high'])}"
