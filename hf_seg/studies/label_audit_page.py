"""The report of a label audit: its verdict, and its text and tables as Markdown and as a self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from hf_seg.report.style import percent
from hf_seg.studies.label_audit import CLASSES

FEW_TILES = 10  # a bootstrap over fewer gives too narrow an interval
TRANSITIONS, GALLERY = "transition.png", "gallery.png"


class Table(NamedTuple):
    """A header, and rows of as many cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """An image file beside the report."""

    file: str
    caption: str


Block = str | Table | Picture
Section = tuple[str, list[Block]]


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_seg.studies"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    content = {"verdict": result["verdict"], "sections": build_sections(result)}
    content["embed"] = lambda file: base64.b64encode((folder / file).read_bytes()).decode()
    for file, template in (("audit.md", "audit.md.j2"), ("index.html", "audit.html.j2")):
        text = environment.get_template(template).render(content)
        (folder / file).write_text(text, encoding="utf-8")


def build_sections(result: Mapping[str, Any]) -> list[Section]:
    """Arrange the content of `audit.json` in sections of text, tables and pictures."""
    titles = {key: title(key, found["name"]) for key, found in result["sets"].items()}
    sections = [("Label sets", _describe_sets(result))]
    if result["truth"] is not None:
        sections.append(("Compared with the truth", _describe_truth(result, titles)))
    sections.append((f"{titles['a']} compared with {titles['b']}", _describe_agreement(result)))
    for key, calibration in result["confidence"].items():
        sections.append((f"Confidence of {titles[key]}", _describe_confidence(calibration)))
    sections.append(("Regions and tiles", _describe_places(result)))
    caption = "The tiles with the most pixels on which A and B differ."
    sections.append(("Largest disagreements", [Picture(GALLERY, caption)]))
    return sections


def _describe_sets(result: Mapping[str, Any]) -> list[Block]:
    rows = []
    for key, found in result["sets"].items():
        skipped = f"{found['n_unmatched']:,}"
        if found["n_unmatched"]:
            more = ", ..." if found["n_unmatched"] > len(found["unmatched"]) else ""
            skipped += f" ({', '.join(found['unmatched'])}{more})"
        letter = "truth" if key == "truth" else key.upper()
        coverage = percent(result["coverage"][key])
        rows.append([letter, found["name"], found["source"], f"{found['n_tiles']:,}", skipped, coverage])
    header = ("set", "name", "source", "tiles", "tiles skipped, not in the other set", "pixels with a label")
    both = percent(result["coverage"]["both"])
    return [
        f"{result['n_tiles']:,} tiles compared; {both} of their pixels have a label in A and B.",
        Table(header, rows),
    ]


def _describe_truth(result: Mapping[str, Any], titles: Mapping[str, str]) -> list[Block]:
    truth, differing = result["truth"], result["disagreements"]["all"]
    gain, scores, rows, per_class = truth["difference"], truth["same_pixels"], [], []
    for pixels, name in (("same_pixels", "same pixels"), ("own_pixels", "all pixels of each set")):
        for key, score in (("mean_iou", "mIoU"), ("overall_accuracy", "accuracy")):
            a, b = truth[pixels]["a"][key], truth[pixels]["b"][key]
            interval = _interval(gain[key]) if pixels == "same_pixels" else ""
            rows.append([f"{score}, {name}", percent(a), percent(b), f"{100 * (b - a):+.1f}", interval])
    for name in CLASSES:
        cells = [percent(scores[key][score][name]) for score in ("recall", "iou") for key in ("a", "b")]
        difference = gain["iou"][name]
        points = f"{100 * difference['difference']:+.1f}" if difference else "-"
        part = percent(result["class_share"]["truth"][name])
        per_class.append([name, part, *cells, points, _interval(difference)])
    header = ("class", "of the truth", "recall A", "recall B", "IoU A", "IoU B", "IoU B - A", "95 % interval")
    text = (
        f"Same pixels: those with a label in A, B and the truth, {percent(truth['compared'])} of the truth's, on "
        f"{truth['n_tiles']:,} tiles. Where A and B differ, A is correct on {percent(differing['a_right'])} and B on "
        f"{percent(differing['b_right'])}. Differences are in points. Their intervals come from "
        f"{truth['bootstrap']['replicates']:,} sets of tiles drawn with replacement, as if tiles were independent; "
        "neighbouring tiles are not, so the intervals are a little too narrow."
    )
    return [Table(("", titles["a"], titles["b"], "B - A", "95 % interval"), rows), text, Table(header, per_class)]


def _describe_agreement(result: Mapping[str, Any]) -> list[Block]:
    agreement, parts = result["agreement"], result["class_share"]
    columns = (parts["a"], parts["b"], agreement["share_of_a"], agreement["share_of_b"], agreement["iou"])
    header = ("class", "of A", "of B", "of A's pixels, same in B", "of B's pixels, same in A", "IoU")
    table = Table(header, [[name, *(percent(column[name]) for column in columns)] for name in CLASSES])
    text = (
        f"A and B agree on {percent(agreement['overall'])} of the pixels that both label; the mean IoU of one with "
        f"the other is {percent(agreement['mean_iou'])}."
    )
    correct = {} if result["truth"] is None else {"a_right": "A correct", "b_right": "B correct"}
    largest = [
        [f"{row['a']} / {row['b']}", *(percent(row[key]) for key in ("share", *correct))]
        for row in result["disagreements"]["largest"]
    ]
    pairs = Table(("in A / in B", "of the pixels", *correct.values()), largest)
    return [text, table, Picture(TRANSITIONS, "Where each class goes."), "The most frequent disagreements:", pairs]


def _describe_confidence(calibration: Mapping[str, Any]) -> list[Block]:
    rows = [
        [f"{row['low']:.3f} to {row['high']:.3f}", *map(percent, (row["share"], row["mean"], row["agreement"]))]
        for row in calibration["deciles"]
    ]
    reference = calibration["reference"]
    header = ("confidence", "of the pixels", "mean confidence", f"agrees with {reference}")
    error = f"{100 * calibration['calibration_error']:.1f} points"
    if reference == "truth":
        text = f"Expected calibration error: {error}, over deciles of the pixels."
    else:
        text = f"Confidence and agreement with {reference} differ by {error}; {reference} may be wrong as well."
    return [text, Table(header, rows)]


def _describe_places(result: Mapping[str, Any]) -> list[Block]:
    columns = {"agreement": "agreement of A and B"}
    if result["truth"] is not None:
        columns |= {"mean_iou_a": "mIoU A", "mean_iou_b": "mIoU B", "mean_iou_difference": "B - A"}
    quantiles = result["tile_distribution"]
    rows = [[name, *map(percent, quantiles[key].values())] for key, name in columns.items()]
    tiles = Table(("over tiles", *quantiles["agreement"]), rows)
    if (regions := result["regions"]) is None:
        return ["No regions known; --regions FILE names them. Distribution over tiles:", tiles]
    incomparable_last = {name: 2 if row["agreement"] is None else row["agreement"] for name, row in regions.items()}
    ordered = [(name, regions[name]) for name in sorted(regions, key=incomparable_last.__getitem__)]
    cells = [[name, f"{row['n_tiles']:,}", *(percent(row[key]) for key in columns)] for name, row in ordered]
    return [Table(("region", "tiles", *columns.values()), cells), "Distribution over tiles:", tiles]


def _interval(difference: Mapping[str, float | None] | None) -> str:
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "-"
    return f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"
