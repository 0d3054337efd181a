"""Download the datasets, check one before training on it, and push a folder to the Hub, where every recipe reads it.

    python scripts/prepare_data.py download oem oem-sar oem-sar-val-labels data
    python scripts/prepare_data.py check data/dfc25_track1 --output check.json
    python scripts/prepare_data.py push data/dfc25_track1 org/name

Names: oem (OpenEarthMap), oem-sar (train and val), oem-sar-val-labels, oem-sar-test, oem-sar-test-labels, and
oem-sar-all for those four. An interrupted download resumes when the same command is run again; the environment
variable HF_SEG_ZENODO_URL names a mirror of https://zenodo.org.
`check` exits with 0 if the dataset has no problems, 1 if it has some, 2 if the folder contains no dataset. It also
checks a dataset on the Hub.
`push` checks every tile and sends Parquet shards, `dataset.json` and a card in one commit. The repository is private
unless --public is given: whether the data may be published is for their licence, and so for you, to say. Run again
after a failure, it does not send again what is there. Log in with `hf auth login`, or set HF_TOKEN.
"""

import argparse
import json
import sys
from pathlib import Path

from hf_seg.data.archives import ARCHIVES
from hf_seg.errors import UserError, one_line_errors, print_error
from hf_seg.files import write_atomic
from hf_seg.settings import Parser
from hf_seg.terminal import print_summary


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = parse(argv)
    try:
        return {"check": run_check, "download": run_download, "push": run_push}[options.command](options)
    except KeyboardInterrupt:
        hint = "; run the same command again to resume" if options.command != "check" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a dataset")
    check.add_argument(
        "data_dir", metavar="DIR", help="root of OpenEarthMap or OpenEarthMap-SAR, or a dataset on the Hub"
    )
    check.add_argument("--label_set", metavar="FILE", help="YAML file of the classes (the dataset's own)")
    check.add_argument("--output", metavar="FILE", type=Path, help="also write the report to FILE")
    download = commands.add_parser("download", help="download datasets from Zenodo and unpack them")
    download.add_argument("names", metavar="NAME", nargs="+", help=f"what to download: {', '.join(ARCHIVES)}")
    download.add_argument("destination", metavar="DIR", type=Path, help="folder for the datasets")
    download.add_argument("--keep_archives", action="store_true", help="keep the zip files after unpacking")
    download.add_argument("--no_extract", action="store_true", help="stop after the verified zip files")
    push = commands.add_parser("push", help="push a dataset folder to the Hub")
    push.add_argument("data_dir", metavar="DIR", type=Path, help="root of OpenEarthMap or OpenEarthMap-SAR")
    push.add_argument("repository", metavar="ORG/NAME", help="dataset on the Hub; created if it is new")
    push.add_argument("--public", action="store_true", help="make the repository public; it is private without this")
    push.add_argument("--revision", help="branch, created if it is new; default: main")
    options: argparse.Namespace = parser.parse_args(argv)
    if options.command == "download":
        usage = f"usage: download NAME... DIR, names: {', '.join(ARCHIVES)}"
        unknown = [name for name in options.names if name not in ARCHIVES]
        if unknown:
            raise UserError(f"unknown dataset {unknown[0]!r}; {usage}")
        if str(options.destination) in ARCHIVES:  # DIR was forgotten
            raise UserError(f"no DIR after {str(options.destination)!r}; {usage}")
    return options


def run_check(options: argparse.Namespace) -> int:
    """Print the doctor's report on a dataset folder; 0: no problems, 1: problems."""
    from hf_seg.data.doctor import examine  # slow to import

    report = examine(options.data_dir, label_set=options.label_set)
    if options.output:
        write_atomic(options.output, json.dumps(report.as_dict(), indent=2) + "\n")
    print_summary(str(report), report.as_dict())
    return 1 if report.problems else 0


def run_push(options: argparse.Namespace) -> int:
    """Push a folder; 0: it is on the Hub."""
    from hf_seg.data.doctor import detect
    from hf_seg.hub.push import check_login
    from hf_seg.hub.push_tiles import Tiles, push_tiles

    tiles = Tiles.of_folder(*detect(options.data_dir))
    check_login(options.repository)
    how = {"private": not options.public, "revision": options.revision}
    url = push_tiles(options.data_dir, tiles, options.repository, **how)
    print(f"on the Hub, {'public' if options.public else 'private'}: {url}")
    return 0


def run_download(options: argparse.Namespace) -> int:
    """Download and unpack the named datasets one after the other; 0: all complete, 1: one failed."""
    from hf_seg.data.download import download

    unpack = not options.no_extract
    try:
        for name in options.names:
            root = download(name, options.destination, unpack=unpack, keep_archives=options.keep_archives)
            print(f"{name}: ready in {root}" if unpack else f"{name}: verified in {options.destination}")
    except UserError as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
