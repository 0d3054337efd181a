"""Pages that need no network to be read: templates, their filters, pictures inside the text, and what they say."""

import base64
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2

from hf_seg.bootstrap import Interval
from hf_seg.report.style import percent

FEW_TILES = 10  # a bootstrap over fewer gives too narrow an interval


def environment(package: str, *, html: bool = True) -> jinja2.Environment:
    """Return what renders the templates of a package; the layout `html.j2` stands here."""
    loaders = [jinja2.PackageLoader(each) for each in dict.fromkeys((package, "hf_seg.report"))]
    found = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=html,  # noqa: S701 (Markdown has no tags)
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    found.filters |= {
        "range": _range,
        "percent": percent,
        "points": _points,
        "interval": _interval,
        "thousands": "{:,}".format,
    }
    return found


def without_tags(value: object) -> object:
    """Return a value that a Markdown template shows, so that no text in it starts an HTML tag."""
    return value.replace("<", "&lt;") if isinstance(value, str) else value


def embed_from(folder: Path) -> Callable[[str], str]:
    """Return the function by which a template embeds a picture of a folder, as base64."""
    return lambda file: base64.b64encode((folder / file).read_bytes()).decode()


def say_difference(gain: Interval, a: str, b: str, n_tiles: int, *, noun: str, verb: str) -> str:
    """Say which of two is better, if the interval of the mIoU of `b` minus that of `a` excludes 0.

    Args:
        gain: as a fraction; without bounds for a single tile.
        noun, verb: what is compared, e.g. "Labels" and "are".
    """
    points = 100 * gain.value
    if math.isnan(gain.low):
        return (
            f"Cannot tell which {noun.lower()} {verb} better: a single tile has no interval. On it the mIoU of {b} "
            f"minus that of {a} is {points:+.1f} points."
        )
    low, high = 100 * gain.low, 100 * gain.high
    basis = f"95 % interval over {n_tiles} tiles" + (", too few to rely on" if n_tiles < FEW_TILES else "")
    if gain.excludes_zero and low > 0:
        return f"{noun} {b} {verb} better than {a} by {points:.1f} points of mIoU [{low:.1f}, {high:.1f}] ({basis})."
    if gain.excludes_zero:
        return f"{noun} {a} {verb} better than {b} by {-points:.1f} points of mIoU [{-high:.1f}, {-low:.1f}] ({basis})."
    return (
        f"No clear difference: the mIoU of {b} minus that of {a} is {points:+.1f} points [{low:+.1f}, {high:+.1f}] "
        f"({basis})."
    )


def _points(difference: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.1f}"


def _interval(difference: Mapping[str, float | None] | None) -> str:
    """Write the bounds of a difference, in points with their sign."""
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "-"
    return f"{_points(difference['low'])} to {_points(difference['high'])}"


def _range(score: Mapping[str, float | None] | None) -> str:
    """Write the bounds of a score, in percent."""
    if score is None or score["low"] is None or score["high"] is None:
        return "-"
    return f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
