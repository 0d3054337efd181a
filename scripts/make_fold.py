"""Divide the labelled tiles of OpenEarthMap-SAR anew: one part to validate on, the others to train on.

    python scripts/make_fold.py --data_dir data/dfc25_track1 --folds 6 --fold 0 --output data/fold_0

Takes the tiles of train and val that have labels, each with its optical image if all have one. Tile number i is in part
i modulo `--folds`; as many parts as tiles leave one out. In train the labels are the official pseudo-labels, so scores
on such tiles are scores against those. Files are copied.
"""

import argparse
import json
import shutil
from pathlib import Path

from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser


def make_fold(data_dir: Path, output: Path, folds: int, fold: int) -> dict[str, int]:
    """Write the fold atomically and return how many tiles its splits have.

    Raises:
        UserError: fewer labelled tiles than folds, no such fold, or `output` exists or cannot be written.
    """
    from hf_seg.data.provenance import DATASET_FILE, read_provenance
    from hf_seg.data.scan import SAR_FOLDERS, scan_open_earth_map_sar
    from hf_seg.files import atomic_folder
    from hf_seg.label_sets import LABEL_SET_KEYS

    rows = [row for split in ("train", "val") for row in scan_open_earth_map_sar(data_dir).rows[split]]
    rows = [row for row in rows if row.files["label"]]
    if not 2 <= folds <= len(rows):
        raise UserError(f"--folds must be from 2 to {len(rows)}, the labelled tiles of {data_dir}; it is {folds}")
    if not 0 <= fold < folds:
        raise UserError(f"--fold must be from 0 to {folds - 1}; it is {fold}")
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose a new folder")
    columns = [column for column in SAR_FOLDERS if all(row.files[column] for row in rows)]
    counts = {"train": 0, "val": 0}
    with atomic_folder(output) as folder:
        for index, row in enumerate(rows):
            split = "val" if index % folds == fold else "train"
            counts[split] += 1
            for column in columns:
                path = Path(str(row.files[column]))
                target = folder / split / SAR_FOLDERS[column] / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        found = read_provenance(data_dir, "OpenEarthMap-SAR")
        kept = ("name", "description", "license", "synthetic", *LABEL_SET_KEYS)
        description = {key: found[key] for key in kept if key in found}
        text = {**description, "layout": "OpenEarthMap-SAR", "settings": {"folds": folds, "fold": fold}}
        (folder / DATASET_FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return counts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data_dir", metavar="DIR", type=Path, required=True, help="root of OpenEarthMap-SAR")
    parser.add_argument("--folds", metavar="N", type=int, required=True, help="parts")
    parser.add_argument("--fold", metavar="K", type=int, required=True, help="the part to validate on, from 0")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder to create")
    options: argparse.Namespace = parser.parse_args(arguments)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Divide; a user's mistake is one line on stderr."""
    with one_line_errors():
        options = parse(arguments)
        counts = make_fold(options.data_dir, options.output, options.folds, options.fold)
    print(f"{options.output}: {counts['train']} tiles to train on, {counts['val']} to validate on")


if __name__ == "__main__":
    main()
