"""Check a dataset on disk or on the Hub: every file is read and every problem is listed."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from tqdm.auto import tqdm

from hf_seg.data.hub_dataset import HubDataset, find_hub_dataset
from hf_seg.data.provenance import declared_bands, find_label_set
from hf_seg.data.scan import FROM_XBD, NO_LIST, SCANS, XBD_HINT, MissingTiles, Row, Scan
from hf_seg.data.tile_files import EmbeddedRow, File, open_tile, read_row
from hf_seg.data.tile_shards import layout_of, read_tile_shard
from hf_seg.errors import DatasetError
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet

AT_ONCE = 16  # rows read together: their bytes, if they come from the Hub, are in memory
SHOWN = 20  # problems in the text; all of them are in `problems`


@dataclass
class SplitReport:
    """Counts over the files of one row, or the sum of them over a split.

    `shapes` ("H x W") and `dtypes` ("column bands x dtype") count files with a readable header; `class_pixels` and the
    SAR counts cover valid files only, `class_pixels` by id of the label set.
    """

    label_set: LabelSet = OPEN_EARTH_MAP
    rows: int = 0
    labelled: int = 0
    files: int = 0
    with_crs: int = 0
    regions: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    class_pixels: np.ndarray = field(init=False)
    sar_pixels: int = 0
    sar_zeros: int = 0
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.class_pixels = np.zeros(self.label_set.num_labels, np.int64)

    def add(self, other: "SplitReport") -> None:
        for name, value in _counts(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def class_percent(self) -> dict[str, float]:
        """Share of each class in the split's labels, in percent."""
        percent = 100 * self.class_pixels / max(self.class_pixels.sum(), 1)
        return dict(zip(self.label_set.names, percent.tolist(), strict=True))

    @property
    def sar_zero_percent(self) -> float:
        return 100 * self.sar_zeros / max(self.sar_pixels, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain, JSON-able values."""
        percent = {"class_percent": self.class_percent, "sar_zero_percent": self.sar_zero_percent}
        return {**_counts(self), "class_pixels": self.class_pixels.tolist(), **percent}


def _counts(report: SplitReport) -> dict[str, Any]:
    return {name: value for name, value in vars(report).items() if name != "label_set"}


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
        splits = {name: split.as_dict() for name, split in self.splits.items()}
        return {**vars(self), "splits": splits, "problems": self.problems}

    def __str__(self) -> str:
        environment = jinja2.Environment(  # noqa: S701 (no HTML)
            loader=jinja2.PackageLoader("hf_seg.data"), undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        return environment.get_template("check.txt.j2").render(report=self, shown=SHOWN).rstrip()


def examine(
    data_dir: str | Path, *, label_set: str | LabelSet | None = None, num_workers: int | None = None
) -> DatasetReport:
    """Read every file of OpenEarthMap or OpenEarthMap-SAR (recognised by its layout or columns) and report.

    Args:
        data_dir: folder, or dataset on the Hub, as for `load_open_earth_map` and `load_open_earth_map_sar`.
        label_set: as `chosen` of `find_label_set`.
        num_workers: threads that read; one per core, at most 8, if None.

    Raises:
        DatasetError: `data_dir` contains neither dataset, or both.
        UserError: it was not found on the Hub, or its classes cannot be used.
    """
    hub = find_hub_dataset(data_dir)
    jobs: Iterable[tuple[str, Row | EmbeddedRow | DatasetError]]
    missing: list[MissingTiles] = []
    if hub is not None:
        kind, root, names, total = _detect_on_hub(hub), str(data_dir), hub.splits, None
        jobs = _hub_jobs(hub, kind)
    else:
        kind, scan = detect(data_dir)
        root, names, missing = str(scan.root), [*scan.rows], scan.missing
        jobs = [(name, row) for name, rows in scan.rows.items() for row in rows]
        total = len(jobs)
    classes = find_label_set(root, kind, label_set)
    splits = {name: SplitReport(classes) for name in names}
    # Warning filters belong to the process, so they are set around the threads, not in them.
    with warnings.catch_warnings(), ThreadPoolExecutor(num_workers or min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        bands = declared_bands(root, kind)
        remaining = iter(jobs)
        with tqdm(total=total, desc="Examining", unit="row") as bar:
            while block := [*islice(remaining, AT_ONCE)]:
                findings = pool.map(lambda job: _examine_row(job[1], classes, bands), block)
                for (name, _), finding in zip(block, findings, strict=True):
                    splits[name].add(finding)
                    bar.update()
    for name, split in splits.items():
        # A split without a list is not part of this copy; one with tiles of which none can be used is a problem.
        reasons = [str(each) for each in missing if each.split == name and each.reason != NO_LIST]
        if reasons and not split.rows:
            split.problems.append(f"split {name!r} has no usable tile: {'; '.join(reasons)}")
    notes = [f"{each.split or 'all splits'}: {each}" for each in missing]
    if any(each.reason == FROM_XBD for each in missing):
        notes.append(XBD_HINT)
    return DatasetReport(kind, root if hub is None else str(hub), splits, notes)


def _detect_on_hub(hub: HubDataset) -> str:
    """Return the layout of a dataset on the Hub, by the columns of its first shard."""
    first = hub.shards(hub.splits[0] if hub.splits else "train")[0]
    return layout_of(hub.fetch(first), f"{hub}, {first}")


def _hub_jobs(hub: HubDataset, kind: str) -> Iterator[tuple[str, EmbeddedRow | DatasetError]]:
    """Yield split and row of every shard; what is wrong with a shard takes the place of its other rows."""
    for split in hub.splits:
        for name in hub.shards(split):
            try:
                for row in read_tile_shard(hub.fetch(name), f"{hub}, {name}", kind):
                    yield split, row
            except DatasetError as error:
                yield split, error


def detect(data_dir: str | Path) -> tuple[str, Scan]:
    """Return the layout of a folder, and its tiles; DatasetError if it has neither layout, or both."""
    scans: dict[str, Scan] = {}
    failures = []
    for kind, scan in SCANS.items():
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


def _examine_row(
    row: Row | EmbeddedRow | DatasetError, label_set: LabelSet, bands: Mapping[str, Sequence[str]]
) -> SplitReport:
    if isinstance(row, DatasetError):
        return SplitReport(label_set, problems=[str(row)])
    pixels, problems = read_row(row, label_set, bands)
    files: Mapping[str, File | None] = row.files
    paths = {column: path for column, path in files.items() if path is not None}
    report = SplitReport(label_set, rows=1, labelled=int("label" in paths), files=len(paths), problems=problems)
    if "sar" not in row.files:  # only OpenEarthMap names its regions
        report.regions[row.image_id.rpartition("_")[0]] = 1
    for column, path in paths.items():
        with suppress(RasterioError), open_tile(path) as source:  # `problems` says what is wrong
            report.shapes[f"{source.height} x {source.width}"] += 1
            report.dtypes[f"{column} {source.count} x {source.dtypes[0]}"] += 1
            report.with_crs += source.crs is not None
    if "label" in pixels:
        ids = label_set.table[pixels["label"]]
        report.class_pixels = np.bincount(ids[ids != IGNORE_INDEX], minlength=label_set.num_labels)
    if "sar" in pixels:
        report.sar_pixels = pixels["sar"][0].size
        report.sar_zeros = report.sar_pixels - int(np.count_nonzero((pixels["sar"] != 0).any(axis=0)))
    return report
