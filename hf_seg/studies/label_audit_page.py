"""What a person reads of a label audit: the verdict, and one report as Markdown and as a page of its own.

The page embeds its pictures, runs no script and refers to nothing outside itself.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_seg.studies.label_audit import CLASSES

FEW_TILES = 10  # a bootstrap over fewer gives too narrow an interval
TRANSITIONS, GALLERY = "transition.png", "gallery.png"
NAMES = {"a": "A", "b": "B", "truth": "truth"}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;max-width:1280px;margin:2em auto;padding:0 1em}
h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2em;border-bottom:1px solid #ddd}
.verdict{font-size:1.2em;font-weight:600;background:#eef3f8;border-left:5px solid #3572b0;padding:.7em 1em}
table{border-collapse:collapse;margin:1em 0}th,td{padding:.25em .8em;border-bottom:1px solid #e3e3e3;text-align:right}
th{background:#f6f6f6}th:first-child,td:first-child{text-align:left}img{max-width:100%;border:1px solid #ddd}
figure{margin:1em 0}figcaption{color:#555}"""


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


def judge(result: dict[str, Any]) -> str:
    """Say in a sentence or two which set is better, as far as the result of `label_audit.summarize` can tell."""
    if result["truth"] is None:
        return (
            f"Cannot tell which is better without a truth. A and B agree on {_percent(result['agreement']['overall'])} "
            "of the pixels that both label; this audit shows how much and where they differ."
        )
    n_tiles, gain = result["truth"]["n_tiles"], result["truth"]["difference"]["mean_iou"]
    points = 100 * gain["difference"]
    if gain["low"] is None:
        return f"Cannot tell: a single tile has no interval (B - A = {points:+.1f} points of mIoU on it)."
    low, high = 100 * gain["low"], 100 * gain["high"]
    basis = f"95 % interval over {n_tiles} tiles" + ", too few to lean on" * (n_tiles < FEW_TILES)
    if low > 0:
        return f"B is better by {points:.1f} points of mIoU [{low:.1f}, {high:.1f}] ({basis})."
    if high < 0:
        return f"A is better by {-points:.1f} points of mIoU [{-high:.1f}, {-low:.1f}] ({basis})."
    return f"No clear difference: B - A = {points:+.1f} points of mIoU [{low:+.1f}, {high:+.1f}] ({basis})."


def build_sections(result: dict[str, Any]) -> list[Section]:
    """Put the content of `audit.json` into sections of text, tables and pictures."""
    sections = [("Label sets", _describe_sets(result))]
    if result["truth"] is not None:
        sections.append(("Against the truth", _describe_truth(result)))
    sections.append(("A against B", _describe_agreement(result)))
    for key, calibration in result["confidence"].items():
        sections.append((f"Confidence of {NAMES[key]}", _describe_confidence(calibration)))
    sections.append(("Regions and tiles", _describe_places(result)))
    caption = "The tiles with the largest share of pixels on which A and B differ."
    sections.append(("Worst disagreements", [Picture(GALLERY, caption)]))
    return sections


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write `audit.md` and `index.html` beside the pictures that they show.

    Args:
        result: the content of `audit.json`.
        folder: holds `TRANSITIONS` and `GALLERY`.
    """
    sections = build_sections(result)
    (folder / "audit.md").write_text(render_markdown(result["verdict"], sections), encoding="utf-8")
    (folder / "index.html").write_text(render_html(result["verdict"], sections, folder), encoding="utf-8")


def render_markdown(verdict: str, sections: Sequence[Section]) -> str:
    """Write the report as Markdown, with the pictures beside it."""
    lines = ["# Label audit", "", f"**{verdict}**"]
    for heading, blocks in sections:
        lines += ["", f"## {heading}"]
        for block in blocks:
            lines.append("")
            if isinstance(block, Table):
                rule = ["---", *["---:"] * (len(block.header) - 1)]
                rows = [[cell.replace("|", "\\|") for cell in row] for row in (block.header, rule, *block.rows)]
                lines += [f"| {' | '.join(row)} |" for row in rows]
            elif isinstance(block, Picture):
                lines.append(f"![{block.caption}]({block.file})")
            else:
                lines.append(block)
    return "\n".join(lines) + "\n"


def render_html(verdict: str, sections: Sequence[Section], folder: Path) -> str:
    """Write the report as one page; the pictures are read from `folder` and embedded."""
    parts = [f'<h1>Label audit</h1>\n<p class="verdict">{html.escape(verdict)}</p>']
    for heading, blocks in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if isinstance(block, Table):
                rows = [_row("th", block.header), *(_row("td", row) for row in block.rows)]
                parts.append("<table>\n" + "\n".join(rows) + "\n</table>")
            elif isinstance(block, Picture):
                content = base64.b64encode((folder / block.file).read_bytes()).decode()
                caption = html.escape(block.caption)
                image = f'<img alt="{caption}" src="data:image/png;base64,{content}">'
                parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
            else:
                parts.append(f"<p>{html.escape(block)}</p>")
    head = f'<meta charset="utf-8"><title>Label audit</title><style>\n{STYLE}\n</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _describe_sets(result: dict[str, Any]) -> list[Block]:
    rows = []
    for key, found in result["sets"].items():
        unmatched = f"{found['n_unmatched']:,}"
        if found["n_unmatched"]:
            more = ", ..." if found["n_unmatched"] > len(found["unmatched"]) else ""
            unmatched += f" ({', '.join(found['unmatched'])}{more})"
        coverage = _percent(result["coverage"][key])
        rows.append([NAMES[key], found["source"], f"{found['n_tiles']:,}", unmatched, coverage])
    header = ("set", "source", "tiles", "of them without partner, left out", "pixels with a label")
    both = _percent(result["coverage"]["both"])
    return [f"{result['n_tiles']:,} tiles compared; A and B label {both} of their pixels both.", Table(header, rows)]


def _describe_truth(result: dict[str, Any]) -> list[Block]:
    truth, differing = result["truth"], result["disagreements"]["all"]
    gain, scores, rows, per_class = truth["difference"], truth["same_pixels"], [], []
    for pixels, name in (("same_pixels", "same pixels"), ("own_pixels", "each one's own pixels")):
        for key, score in (("mean_iou", "mIoU"), ("overall_accuracy", "accuracy")):
            a, b = truth[pixels]["a"][key], truth[pixels]["b"][key]
            interval = _interval(gain[key]) if pixels == "same_pixels" else ""
            rows.append([f"{score}, {name}", _percent(a), _percent(b), f"{100 * (b - a):+.1f}", interval])
    for name in CLASSES:
        cells = [_percent(scores[key][score][name]) for score in ("recall", "iou") for key in ("a", "b")]
        difference = gain["iou"][name]
        points = f"{100 * difference['difference']:+.1f}" if difference else "-"
        share = _percent(result["class_share"]["truth"][name])
        per_class.append([name, share, *cells, points, _interval(difference)])
    header = ("class", "share", "agreement A", "agreement B", "IoU A", "IoU B", "IoU B - A", "95 % interval")
    text = (
        f"Same pixels: those with a label in A, B and the truth, {_percent(truth['compared'])} of the truth's, on "
        f"{truth['n_tiles']:,} tiles. Where A and B differ, A is right on {_percent(differing['a_right'])} and B on "
        f"{_percent(differing['b_right'])}. Differences are in points; their intervals come from "
        f"{truth['bootstrap']['replicates']:,} sets of tiles drawn with replacement as if tiles were independent: "
        "neighbours are not, which makes the intervals a little too narrow."
    )
    return [Table(("", "A", "B", "B - A", "95 % interval"), rows), text, Table(header, per_class)]


def _describe_agreement(result: dict[str, Any]) -> list[Block]:
    agreement, shares = result["agreement"], result["class_share"]
    columns = (shares["a"], shares["b"], agreement["share_of_a"], agreement["share_of_b"], agreement["iou"])
    header = ("class", "share in A", "share in B", "of A's, the same in B", "of B's, the same in A", "IoU")
    table = Table(header, [[name, *(_percent(column[name]) for column in columns)] for name in CLASSES])
    text = (
        f"A and B agree on {_percent(agreement['overall'])} of the pixels that both label; the mean IoU of one with "
        f"the other is {_percent(agreement['mean_iou'])}."
    )
    judged = {} if result["truth"] is None else {"a_right": "A right", "b_right": "B right"}
    largest = [
        [f"{row['a']} / {row['b']}", *(_percent(row[key]) for key in ("share", *judged))]
        for row in result["disagreements"]["largest"]
    ]
    flows = Table(("in A / in B", "share of pixels", *judged.values()), largest)
    return [text, table, Picture(TRANSITIONS, "Where each class goes."), "The commonest disagreements:", flows]


def _describe_confidence(calibration: dict[str, Any]) -> list[Block]:
    rows = [
        [f"{row['low']:.3f} to {row['high']:.3f}", *map(_percent, (row["share"], row["mean"], row["agreement"]))]
        for row in calibration["deciles"]
    ]
    header = ("confidence", "share of pixels", "mean confidence", f"agrees with {calibration['reference']}")
    error = f"{100 * calibration['calibration_error']:.1f} points"
    if calibration["reference"] == "truth":
        text = f"Expected calibration error: {error}, over deciles of the pixels."
    else:
        text = (
            f"Confidence and agreement are {error} apart; {calibration['reference']} is no truth, so this judges both."
        )
    return [text, Table(header, rows)]


def _describe_places(result: dict[str, Any]) -> list[Block]:
    columns = {"agreement": "A with B"}
    if result["truth"] is not None:
        columns |= {"mean_iou_a": "mIoU A", "mean_iou_b": "mIoU B", "mean_iou_difference": "B - A"}
    quantiles = result["tile_distribution"]
    rows = [[name, *map(_percent, quantiles[key].values())] for key, name in columns.items()]
    tiles = Table(("over tiles", *quantiles["agreement"]), rows)
    if (regions := result["regions"]) is None:
        return ["No regions known (--regions FILE names them). The spread over tiles:", tiles]
    incomparable_last = {name: 2 if row["agreement"] is None else row["agreement"] for name, row in regions.items()}
    ordered = [(name, regions[name]) for name in sorted(regions, key=incomparable_last.__getitem__)]
    cells = [[name, f"{row['n_tiles']:,}", *(_percent(row[key]) for key in columns)] for name, row in ordered]
    return [Table(("region", "tiles", *columns.values()), cells), "The spread over tiles:", tiles]


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _interval(difference: dict[str, float | None] | None) -> str:
    if difference is None or difference["low"] is None or difference["high"] is None:
        return "-"
    return f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"
