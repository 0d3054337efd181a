"""Compare two sets of labels before training on them: where do they differ, and which is better?

    python scripts/audit_labels.py data/dfc25_track1/train/labels runs/labels --output runs/audit
    python scripts/audit_labels.py A B --truth T --images data/dfc25_track1/train/rgb_images

A set is a folder of label images named by image id (GeoTIFF or PNG; ids 0..8, 0 and 255 = no label; others with
--label_set), a folder with such folders in it (<region>/labels, train/labels), or pseudo-labels: a folder of Parquet
files or a Hub id, with the columns image_id, pseudo_label and, if known, confidence; or the Hub id of tiles, whose
train labels count. Sets are matched by image id; a truth may have some of the tiles only.
The output folder gets index.html (self-contained), audit.md, audit.json, transition.png and gallery.png;
hf_seg/studies/README.md explains them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_seg.errors import DatasetError, UserError, file_errors, one_line_errors
from hf_seg.files import atomic_folder, write_atomic
from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.settings import Parser
from hf_seg.terminal import print_summary

if TYPE_CHECKING:
    from hf_seg.studies.label_audit_report import GalleryRow
    from hf_seg.studies.label_maps import LabelMaps

FILES = {"audit.json", "audit.md", "index.html", "transition.png", "gallery.png"}
NUM_EXAMPLES = 3  # names of tiles that are not in the other set


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; UserError for an output folder with other files in it."""
    parser = Parser(description=__doc__)
    parser.add_argument("a", metavar="A", help="the present labels")
    parser.add_argument("b", metavar="B", help="the labels that may replace them")
    parser.add_argument("--truth", metavar="T", help="checked labels of some or all tiles")
    for key in "ab":
        parser.add_argument(f"--name_{key}", metavar="NAME", help=f"name of {key.upper()} in the report (its folder)")
    parser.add_argument("--images", metavar="DIR", type=Path, help="optical or SAR tiles to show in the gallery")
    parser.add_argument("--regions", metavar="CSV", type=Path, help="columns image_id, region (the tiles' names)")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("audit"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--label_set", metavar="FILE", default="OpenEarthMap", help="YAML file of the classes (%(default)s)"
    )
    parser.add_argument("--gallery", metavar="N", type=int, default=6, help="tiles in the gallery (%(default)s)")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the bootstrap (%(default)s)")
    args = parser.parse_args(argv)
    if args.gallery < 1 or args.seed < 0:
        raise UserError(f"--gallery must be at least 1 and --seed at least 0; got {args.gallery}, {args.seed}")
    args.output = args.output.resolve()
    with file_errors(args.output, "cannot be read"):
        if args.output.exists() and (not args.output.is_dir() or {path.name for path in args.output.iterdir()} - FILES):
            raise UserError(f"--output {args.output} is not an earlier audit; choose another folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Read, count, judge, write, print."""
    args = parse(argv)
    from hf_seg.label_sets import read_label_set
    from hf_seg.studies import label_maps

    label_set = read_label_set(args.label_set)
    sources = {"a": (args.a, args.name_a), "b": (args.b, args.name_b), "truth": (args.truth, None)}
    sets = {
        key: label_maps.LabelMaps(source, name, label_set)
        for key, (source, name) in sources.items()
        if source is not None
    }
    image_ids = label_maps.match_ids(sets)
    images = label_maps.images_by_id(args.images, "*") if args.images else {}
    if args.images and not images.keys() & set(image_ids):
        raise UserError(f"--images {args.images}: contains no image of the tiles, e.g. not of {image_ids[0]!r}")
    result = audit(sets, image_ids, args.regions, args.seed)
    write_audit(args.output, result, read_gallery(sets, result["tiles"], images, args.gallery), label_set)
    for found in result["sets"].values():
        if found["n_unmatched"]:
            examples = ", ".join(found["unmatched"])
            print(f"skipped {found['n_unmatched']} tiles of {found['name']} without a counterpart, e.g. {examples}")
    facts = {"n_tiles": result["n_tiles"], "verdict": result["verdict"]}
    print_summary("{n_tiles} tiles compared. {verdict}".format(**facts), facts, [args.output / "index.html"])


def audit(sets: "dict[str, LabelMaps]", image_ids: list[str], regions: Path | None, seed: int) -> dict[str, Any]:
    """Read every tile once and return the content of audit.json.

    Args:
        sets: by key: `a`, `b` and, if there is one, `truth`.
        image_ids: tiles of A and B.
        regions: CSV file with columns image_id and region, if any.
        seed: of the bootstrap.

    Raises:
        UserError: A and B share no labelled pixel, or share none with the truth; a file that cannot be read.
    """
    from hf_seg.studies.label_audit import calibrate, summarize
    from hf_seg.studies.label_audit_report import judge
    from hf_seg.studies.label_maps import count_tiles, read_regions

    region_names = read_regions(regions, image_ids)
    counts, levels = count_tiles(sets, image_ids)
    if not counts[:, :, 1:, 1:].any():
        raise UserError(f"{sets['a'].source} and {sets['b'].source} share no labelled pixel; is one of them empty?")
    result = summarize(image_ids, counts, region_names, seed=seed, label_set=sets["a"].label_set)
    if "truth" in sets and result["truth"] is None:
        raise UserError(f"{sets['truth'].source}: labels no pixel that A and B both label")
    described, others = {}, {"a": set(sets["b"].entries), "b": set(sets["a"].entries), "truth": set(image_ids)}
    for key, maps in sets.items():
        unmatched = sorted(maps.entries.keys() - others[key])
        described[key] = {"name": maps.name, "source": maps.source, "n_tiles": len(maps.entries)}
        described[key] |= {"n_unmatched": len(unmatched), "unmatched": unmatched[:NUM_EXAMPLES]}
    references = dict.fromkeys("ab", "truth") if "truth" in sets else {"a": "B", "b": "A"}
    calibrations = {key: calibrate(found) for key, found in levels.items()}
    confidence = {key: {"reference": references[key], **found} for key, found in calibrations.items() if found}
    verdict = judge(result, sets["a"].name, sets["b"].name)
    return {"verdict": verdict, "sets": described, "confidence": confidence, **result}


def read_gallery(
    sets: "dict[str, LabelMaps]", tiles: dict[str, dict[str, float]], images: dict[str, Path], n_rows: int
) -> "list[GalleryRow]":
    """Read the tiles with the most differing pixels once more, with their images where there are any."""
    from hf_seg.studies.images import read_image
    from hf_seg.studies.label_audit_report import GalleryRow
    from hf_seg.studies.label_maps import read_tiles

    rows = []
    for image_id in sorted(tiles, key=lambda image_id: (-tiles[image_id]["disagreement"], image_id))[:n_rows]:
        labels = {key: label for key, (label, _) in read_tiles(sets, image_id).items()}
        image = read_image(images[image_id]) if image_id in images else None
        size = labels["a"].shape
        if image is not None and (image.dtype != "uint8" or image.shape not in (size, (*size, 3))):
            found = f"{image.shape} {image.dtype}"
            raise DatasetError(f"{images[image_id]}: expected 1 or 3 bands of {size} uint8, found {found}")
        rows.append(GalleryRow(image_id, image, labels["a"], labels["b"], labels.get("truth")))
    return rows


def write_audit(
    output: Path, result: dict[str, Any], rows: "Sequence[GalleryRow]", label_set: LabelSet = OPEN_EARTH_MAP
) -> None:
    """Write the five files into a folder that replaces an earlier audit."""
    from hf_seg.studies import label_audit_report as report

    titles = [report.title(key, result["sets"][key]["name"]) for key in "ab"]
    with atomic_folder(output) as temporary:
        report.plot_transitions(result, temporary / report.TRANSITIONS, *titles)
        report.plot_gallery(rows, temporary / report.GALLERY, *titles, label_set)
        report.write_report(result, temporary)
        write_atomic(temporary / "audit.json", json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
