"""Download the datasets, and check a dataset folder before hours of training find its defects.

    python scripts/prepare_data.py download oem oem-sar oem-sar-val-labels data
    python scripts/prepare_data.py check data/dfc25_track1 --json check.json

Names: oem (OpenEarthMap), oem-sar (train and val), oem-sar-val-labels, oem-sar-test, oem-sar-test-labels, and
oem-sar-all for those four. An interrupted download goes on where it stopped when the same command is run again; the
environment variable HF_SEG_ZENODO_URL names a mirror of https://zenodo.org.
`check` exits with 0 if the folder is healthy, 1 if it has problems, 2 if it is no dataset at all.
"""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    options = build_parser().parse_args(arguments)
    try:
        return run_check(options) if options.command == "check" else run_download(options)
    except KeyboardInterrupt:
        hint = "; run the same command again to resume" if options.command == "download" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="examine a dataset folder")
    check.add_argument("data_dir", metavar="DIR", type=Path, help="root of OpenEarthMap or OpenEarthMap-SAR")
    check.add_argument("--json", metavar="FILE", type=Path, help="also write the findings to FILE")
    download = commands.add_parser("download", help="fetch datasets from Zenodo and unpack them")
    download.add_argument("names", metavar="NAME", nargs="+", help="what to fetch (see the names above)")
    download.add_argument("destination", metavar="DIR", type=Path, help="folder that receives the datasets")
    download.add_argument("--keep_archives", action="store_true", help="keep the zip files after unpacking")
    download.add_argument("--no_extract", action="store_true", help="stop after the verified zip files")
    return parser


def run_check(options: argparse.Namespace) -> int:
    """Print what the doctor finds in a dataset folder; 0 healthy, 1 problems, 2 no dataset."""
    # Imported here, so that --help does not wait for datasets and rasterio.
    from hf_seg.data.doctor import examine
    from hf_seg.errors import DatasetError

    try:
        report = examine(options.data_dir)
        if options.json:
            options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    except (DatasetError, OSError) as error:
        print("error:", "; ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    print(report)
    return 1 if report.problems else 0


def run_download(options: argparse.Namespace) -> int:
    """Fetch and unpack the named datasets one after the other; 0 all there, 1 at the first failure, 2 wrong usage."""
    from hf_seg.data.download import ARCHIVES, DownloadError, download

    # Before the first gigabyte, not after it: a mistyped name, or a forgotten DIR that swallowed the last name.
    unknown = [name for name in options.names if name not in ARCHIVES]
    if unknown or str(options.destination) in ARCHIVES:
        problem = f"unknown dataset {unknown[0]!r}" if unknown else f"no DIR after {str(options.destination)!r}"
        print(f"error: {problem}; usage: download NAME... DIR, names: {', '.join(ARCHIVES)}", file=sys.stderr)
        return 2
    try:
        for name in options.names:
            root = download(
                name, options.destination, unpack=not options.no_extract, keep_archives=options.keep_archives
            )
            print(f"{name}: verified in {options.destination}" if options.no_extract else f"{name}: ready in {root}")
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
