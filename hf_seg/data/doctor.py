"""Check a dataset on disk: every file is read and every problem is listed."""

import os
import textwrap
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from tqdm.auto import tqdm

from hf_seg.data.open_earth_map import check_sizes, read_tile
from hf_seg.data.scan import (
    FROM_XBD,
    NO_LIST,
    XBD_HINT,
    Row,
    Scan,
    scan_open_earth_map,
    scan_open_earth_map_sar,
)
from hf_seg.errors import DatasetError
from hf_seg.labels import CLASS_NAMES, NUM_LABELS

SHOWN = 20  # problems in the text; all of them are in `problems`


@dataclass
class SplitReport:
    """Counts over the files of one row, or the sum of them over a split.

    `shapes` ("H x W") and `dtypes` ("column bands x dtype") count files with a readable header; `class_pixels` and the
    SAR counts cover valid files only.
    """

    rows: int = 0
    labelled: int = 0
    files: int = 0
    with_crs: int = 0
    regions: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    class_pixels: list[int] = field(default_factory=lambda: [0] * NUM_LABELS)
    sar_pixels: int = 0
    sar_zeros: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: "SplitReport") -> None:
        for name in ("rows", "labelled", "files", "with_crs", "sar_pixels", "sar_zeros"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("regions", "shapes", "dtypes"):
            getattr(self, name).update(getattr(other, name))
        self.class_pixels = [mine + its for mine, its in zip(self.class_pixels, other.class_pixels, strict=True)]
        self.problems += other.problems

    @property
    def class_percent(self) -> list[float]:
        """Share of each class in the split's labels, in percent."""
        total = max(sum(self.class_pixels), 1)
        return [100 * pixels / total for pixels in self.class_pixels]

    @property
    def sar_zero_percent(self) -> float:
        return 100 * self.sar_zeros / max(self.sar_pixels, 1)


@dataclass
class DatasetReport:
    """The state of one dataset: `problems` prevent training on it; `notes` list missing tiles that do not."""

    kind: str
    root: str
    splits: dict[str, SplitReport]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """All problems, split by split; empty if it can be trained on."""
        found = [problem for split in self.splits.values() for problem in split.problems]
        if not any(split.rows for split in self.splits.values()):
            found.insert(0, f"{self.root}: no usable tile")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain, JSON-able values."""
        splits = {
            name: {
                **vars(split),
                "class_percent": dict(zip(CLASS_NAMES, split.class_percent, strict=True)),
                "sar_zero_percent": split.sar_zero_percent,
            }
            for name, split in self.splits.items()
        }
        return {**vars(self), "splits": splits, "problems": self.problems}

    def __str__(self) -> str:
        counts = [["split", "rows", "labelled", "files", "with CRS", "problems", "regions", "SAR zeros"]]
        shares = [["class share, %", *CLASS_NAMES]]
        contents = []
        for name, split in self.splits.items():
            numbers = (split.rows, split.labelled, split.files, split.with_crs, len(split.problems), len(split.regions))
            zeros = f"{split.sar_zero_percent:.2f} %" if split.sar_pixels else "-"
            counts.append([name, *map(str, numbers), zeros])
            if any(split.class_pixels):
                shares.append([name, *(f"{share:.1f}" for share in split.class_percent)])
            for what, counter in (("sizes", split.shapes), ("types", split.dtypes), ("regions", split.regions)):
                contents += [f"{name} {what}: {_list_counts(counter)}"] if counter else []
        problems = self.problems
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        sections = [
            f"{self.kind} in {self.root}",
            _table(counts),
            _table(shares) if len(shares) > 1 else "",
            "\n".join(textwrap.fill(line, 120, subsequent_indent="    ") for line in contents),
            _list_lines("notes", self.notes) if self.notes else "",
            _list_lines(f"problems ({len(problems)})", problems[:SHOWN] + more) if problems else "no problems",
        ]
        return "\n\n".join(filter(None, sections))


def examine(data_dir: str | Path, *, num_workers: int | None = None) -> DatasetReport:
    """Read every file of an OpenEarthMap or OpenEarthMap-SAR folder (recognised by its layout) and report.

    Args:
        data_dir: as for `load_open_earth_map` and `load_open_earth_map_sar`.
        num_workers: threads that read; one per core, at most 8, if None.

    Raises:
        DatasetError: `data_dir` contains neither dataset, or both.
    """
    kind, scan = _detect(data_dir)
    splits = {name: SplitReport() for name in scan.rows}
    jobs = [(name, row) for name, rows in scan.rows.items() for row in rows]
    # Warning filters belong to the process, so they are set around the threads, not in them.
    with warnings.catch_warnings(), ThreadPoolExecutor(num_workers or min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        findings = pool.map(_examine_row, (row for _, row in jobs))
        for (name, _), finding in zip(jobs, tqdm(findings, total=len(jobs), desc="Examining", unit="row"), strict=True):
            splits[name].add(finding)
    for name, split in splits.items():
        # A split without a list is not part of this copy; one with tiles of which none can be used is a problem.
        reasons = [str(each) for each in scan.missing if each.split == name and each.reason != NO_LIST]
        if reasons and not split.rows:
            split.problems.append(f"split {name!r} has no usable tile: {'; '.join(reasons)}")
    notes = [f"{each.split or 'all splits'}: {each}" for each in scan.missing]
    if any(each.reason == FROM_XBD for each in scan.missing):
        notes.append(XBD_HINT)
    return DatasetReport(kind, str(scan.root), splits, notes)


def _detect(data_dir: str | Path) -> tuple[str, Scan]:
    scans: dict[str, Scan] = {}
    failures = []
    for kind, scan in (("OpenEarthMap", scan_open_earth_map), ("OpenEarthMap-SAR", scan_open_earth_map_sar)):
        try:
            scans[kind] = scan(data_dir)
        except DatasetError as error:
            failures.append(str(error))
    if len(scans) > 1:
        roots = " and ".join(f"{kind} in {scan.root}" for kind, scan in scans.items())
        raise DatasetError(f"{data_dir} contains {roots}: check one at a time.")
    if not scans:
        raise DatasetError(" ".join(failures))
    return scans.popitem()


def _examine_row(row: Row) -> SplitReport:
    """Read all files of one row, and collect what is wrong in `problems`."""
    report = SplitReport(rows=1, labelled=int(row.files["label"] is not None))
    if "sar" not in row.files:  # only OpenEarthMap names its regions
        report.regions[row.image_id.rpartition("_")[0]] = 1
    pixels: dict[str, np.ndarray] = {}
    for column, path in row.files.items():
        if path is None:
            continue
        report.files += 1
        with suppress(RasterioError), rasterio.open(path, driver="GTiff") as source:  # read_tile says what is wrong
            report.shapes[f"{source.height} x {source.width}"] += 1
            report.dtypes[f"{column} {source.count} x {source.dtypes[0]}"] += 1
            report.with_crs += source.crs is not None
        try:
            pixels[column] = read_tile(path, column)
        except DatasetError as error:
            report.problems.append(str(error))
    try:
        check_sizes(row, pixels)
    except DatasetError as error:
        report.problems.append(str(error))
    if "label" in pixels:
        report.class_pixels = np.bincount(pixels["label"].ravel(), minlength=NUM_LABELS).tolist()
    if "sar" in pixels:
        report.sar_pixels = pixels["sar"].size
        report.sar_zeros = report.sar_pixels - int(np.count_nonzero(pixels["sar"]))
    return report


def _list_counts(counter: Counter[str]) -> str:
    return ", ".join(f"{key} ({count})" for key, count in sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _list_lines(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:", *(f"- {line}" for line in lines)])


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)
