"""One scene on its way to a map, in steps that can be interrupted, resumed and shared among processes."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_seg.errors import UserError
from hf_seg.inference.predict import Predictor
from hf_seg.inference.sliding_window import RowBlender, window_starts
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.labels import BACKGROUND, CLASS_NAMES, NUM_LABELS
from hf_seg.mapping.band_store import BandStore
from hf_seg.mapping.figure import plot_map
from hf_seg.mapping.options import RasterOptions, check_targets
from hf_seg.mapping.output import BLOCK, SCORE_MAX, SCORE_NODATA, choose_layers, clear_errors, write_layers
from hf_seg.mapping.polygons import write_polygons
from hf_seg.mapping.scene import READ_ROWS, Scene
from hf_seg.mapping.statistics import MapStatistics

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 32  # rows that are turned from probabilities into bytes together
FORMAT = 1  # of the kept bands; to be raised with every change of what they hold


@dataclass(frozen=True)
class MapSummary:
    """What was made.

    `pixels` and `areas_km2` by class name, the latter None without a place on earth; the seconds are this process's, in
    all and in the networks.
    """

    files: list[Path]
    pixels: dict[str, int]
    areas_km2: dict[str, float] | None
    nodata_pixels: int
    seam_score: float | None
    seconds: float
    network_seconds: float

    def __str__(self) -> str:
        total = max(sum(self.pixels.values()), 1)
        lines = []
        for name, count in self.pixels.items():
            area = f"{self.areas_km2[name]:14.4f} km2" if self.areas_km2 else ""
            lines.append(f"{name:18s}{count:14,d} pixels {100 * count / total:6.2f} %{area}")
        lines.append(f"{'no class':18s}{self.nodata_pixels:14,d} pixels")
        seams = "no figure" if self.seam_score is None else f"{self.seam_score:.3f}"
        lines.append(f"seam score {seams} (class changes on borders of windows over those elsewhere; 1: no seams)")
        share = 100 * self.network_seconds / max(self.seconds, 1e-9)
        lines.append(f"{self.seconds:.1f} s, {share:.0f} % of it in the networks")
        return "\n".join([*lines, *(f"written: {file}" for file in self.files)])


class MapJob:
    """One scene on its way to a map, in steps that several processes can share.

    Every process calls `compute` with its part of `missing()`; one of them calls `prepare` before and `finish` after.

    Args:
        predictor: the networks.
        source: the scene.
        destination: the GeoTIFF to write.
        options: everything else.

    Raises:
        UserError: a scene, a target or options that cannot be.
    """

    def __init__(
        self, predictor: Predictor, source: str | Path, destination: str | Path, options: RasterOptions
    ) -> None:
        self._start, self._networks_start = time.perf_counter(), predictor.seconds
        self.predictor, self.destination, self.options = predictor, Path(destination), options
        if options.disagreement and len(predictor.networks) < 2:
            raise UserError("one network cannot disagree with itself: disagreement needs an ensemble")
        self.layers = choose_layers(
            confidence=options.confidence, disagreement=options.disagreement, probabilities=options.probabilities
        )
        self._extras: dict[Callable[[Path, Path], None], Path] = {}
        if options.preview:
            self._extras[self._draw] = self.destination.with_name(f"{self.destination.stem}_preview.png")
        if options.polygons is not None:
            self._extras[write_polygons] = options.polygon_path(self.destination)
        folder = self.destination.with_name(f".{self.destination.name}.partial")
        self._check_targets(Path(source), is_resumed=folder.exists())
        windows = [network.crop_size for network in predictor.networks]
        self.geometry = [(window, max(1, round(options.stride * window))) for window in windows]
        self.scene = Scene(
            source,
            bands=options.bands,
            units=options.units,
            stretch=options.stretch,
            zero_collar=options.zero_collar,
            rows_held=max(windows) + ROWS_AT_ONCE + READ_ROWS,
        )
        self.store = BandStore(folder, -(-self.scene.height // BLOCK))

    def close(self) -> None:
        """Close the scene."""
        self.scene.close()

    def prepare(self) -> None:
        """Make the folder of finished bands, or find the bands of an earlier run."""
        source = Path(self.scene.name)
        status = source.stat() if source.is_file() else None
        with self._clear_errors():
            dropped = self.store.open(
                {
                    "format": FORMAT,
                    "source": [source.name, status and status.st_size, status and status.st_mtime_ns],
                    "scene": [self.scene.height, self.scene.width, self.scene.bands, self.scene.units],
                    "stretch": self.scene.stretch,
                    "zero_collar": self.options.zero_collar,
                    "networks": self.predictor.fingerprint,
                    "windows": self.geometry,
                    "layers": [layer.name for layer in self.layers],
                    "abstain": self.options.abstain,
                }
            )
        if dropped:
            logger.info("%s: finished rows of another scene, model or setting are dropped", self.store.folder)
        kept = self.store.count - len(self.missing())
        crs = self.scene.dataset.crs
        logger.info(
            "%s: %d x %d pixels, %s; windows of %s, every %s pixels; %s",
            *(self.scene.name, self.scene.width, self.scene.height, crs.to_string() if crs else "no CRS"),
            *(" and ".join(str(pair[i]) for pair in self.geometry) for i in (0, 1)),
            f"{kept} of {self.store.count} bands are already there" if kept else f"{self.store.count} bands",
        )

    def missing(self) -> list[int]:
        """Return the numbers of the bands that are still to be computed."""
        return self.store.missing()

    def compute(self, bands: Sequence[int], *, show_progress: bool = True) -> None:
        """Compute bands, ascending, and keep them.

        Raises:
            UserError: a network that does not fit, or a disk that is full.
        """
        runs: list[list[int]] = []
        for number in bands:
            if runs and runs[-1][-1] == number - 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        total = sum(self._count_windows(run) for run in runs)
        with tqdm(
            total=total, unit="tile", desc=self.destination.name, disable=not show_progress, smoothing=0.05
        ) as bar:
            for run in runs:
                self._compute_run(run, bar.update)

    def finish(self) -> MapSummary:
        """Put the bands together, move the map into its place and delete the bands.

        Raises:
            UserError: the scene has no pixel with data, or something cannot be written.
        """
        statistics = self._statistics()
        for top, band in self._read_bands():
            statistics.update(top, band[0])
        if not self.options.abstain and not statistics.pixels[1:].any():
            self.store.remove()
            raise UserError(f"{self.scene.name}: none of its pixels holds data")
        with self._clear_errors():
            paths = write_layers(
                self.store.folder,
                self.layers,
                self._read_bands,
                scene=self.scene.dataset,
                describe=lambda: self._tags(statistics),
                cog=self.options.cog,
            )
            extras = self._write_extras(paths[self.layers[0]])
            targets = {path: layer.path(self.destination) for layer, path in paths.items()} | extras
            for path, target in reversed(targets.items()):  # the map last: where it is, everything is
                os.replace(path, target)
            self.store.remove()
        pixels, areas = statistics.pixels.tolist(), statistics.areas
        land_cover = [index for index in range(NUM_LABELS) if index != BACKGROUND]
        return MapSummary(
            files=list(targets.values()),
            pixels={CLASS_NAMES[i]: pixels[i] for i in land_cover},
            areas_km2=None if areas is None else {CLASS_NAMES[i]: float(areas[i]) / 1e6 for i in land_cover},
            nodata_pixels=pixels[BACKGROUND],
            seam_score=statistics.seam_score,
            seconds=time.perf_counter() - self._start,
            network_seconds=self.predictor.seconds - self._networks_start,
        )

    def _check_targets(self, source: Path, *, is_resumed: bool) -> None:
        if self.destination.suffix.lower() not in (".tif", ".tiff"):
            raise UserError(f"the map is a GeoTIFF: end its name in .tif, not {self.destination.name!r}")
        overwrite = self.options.overwrite
        check_targets(source, [self.destination], overwrite=overwrite)
        besides = [layer.path(self.destination) for layer in self.layers[1:]] + list(self._extras.values())
        # a run that was killed while it moved its files into place has left some there
        check_targets(source, besides, overwrite=overwrite or is_resumed)

    def _compute_run(self, run: list[int], on_windows: Callable[[int], object]) -> None:
        """Compute consecutive bands."""
        blenders = [self._blender(index, run[0] * BLOCK, on_windows) for index in range(len(self.geometry))]
        for number in run:
            band = np.concatenate([self._map_rows(blenders, *span) for span in self._spans(number)], axis=1)
            with self._clear_errors():
                self.store.save(number, band)

    def _count_windows(self, run: list[int]) -> int:
        """Count the windows that touch consecutive bands."""
        top, bottom = run[0] * BLOCK, min((run[-1] + 1) * BLOCK, self.scene.height)
        count = 0
        for window, stride in self.geometry:
            tops = window_starts(self.scene.height, window, stride)
            lefts = window_starts(self.scene.width, window, stride)
            count += len(lefts) * sum(top - window < start < bottom for start in tops)
        return count

    def _blender(self, index: int, first_row: int, on_windows: Callable[[int], object]) -> RowBlender:
        def read_rows(top: int, bottom: int) -> tuple[Tensor, Tensor]:
            pixels, valid = self.scene.rows(top, bottom)
            return torch.from_numpy(pixels), torch.from_numpy(valid)

        window, stride = self.geometry[index]
        return RowBlender(
            lambda windows: self.predictor.window_probs(index, windows),
            read_rows,
            height=self.scene.height,
            width=self.scene.width,
            num_labels=NUM_LABELS,
            window=window,
            stride=stride,
            batch_size=self.options.batch_size,
            first_row=first_row,
            max_rows=ROWS_AT_ONCE,
            device=self.predictor.device,
            on_windows=on_windows,
        )

    def _spans(self, band: int) -> Iterator[tuple[int, int]]:
        end = min((band + 1) * BLOCK, self.scene.height)
        for top in range(band * BLOCK, end, ROWS_AT_ONCE):
            yield top, min(top + ROWS_AT_ONCE, end)

    @torch.inference_mode()
    def _map_rows(self, blenders: list[RowBlender], top: int, bottom: int) -> np.ndarray:
        """Turn probabilities into bytes: (bands of all layers, bottom - top, width) uint8."""
        accumulator = VoteAccumulator()
        for blender, weight in zip(blenders, self.predictor.weights, strict=True):
            accumulator.add(blender.rows(bottom), weight)
        confidence, classes = accumulator.confidence(), accumulator.label_map()
        valid = torch.from_numpy(self.scene.rows(top, bottom)[1]).to(confidence.device)
        keep = valid & (confidence >= self.options.abstain)
        rows = [torch.where(keep, classes, BACKGROUND).to(torch.uint8)[None]]
        scores = []
        if self.options.confidence:
            scores.append(confidence[None])
        if self.options.disagreement:
            scores.append(accumulator.disagreement()[None])
        if self.options.probabilities:
            scores.append(accumulator.probs())
        for score in scores:
            levels = (score * SCORE_MAX).round().clamp(0, SCORE_MAX)
            rows.append(torch.where(valid, levels, SCORE_NODATA).to(torch.uint8))
        return torch.cat(rows).cpu().numpy()

    def _read_bands(self) -> Iterator[tuple[int, np.ndarray]]:
        count = sum(len(layer.bands) for layer in self.layers)
        for number in range(self.store.count):
            top = number * BLOCK
            rows = min(BLOCK, self.scene.height - top)
            yield top, self.store.load(number, (count, rows, self.scene.width))

    def _statistics(self) -> MapStatistics:
        def borders(length: int) -> set[int]:
            starts = [(window_starts(length, window, stride), window) for window, stride in self.geometry]
            return {start + end for firsts, window in starts for start in firsts for end in (0, window)}

        return MapStatistics(
            self.scene.width,
            row_borders=borders(self.scene.height),
            column_borders=borders(self.scene.width),
            crs=self.scene.dataset.crs,
            transform=self.scene.dataset.transform,
        )

    def _tags(self, statistics: MapStatistics) -> dict[str, str]:
        tags = {
            "scene": Path(self.scene.name).name,
            "bands": " ".join(map(str, self.scene.bands)),
            "units": self.scene.units,
            "windows": " ".join(str(window) for window, _ in self.geometry),
            "strides": " ".join(str(stride) for _, stride in self.geometry),
            "tta": self.predictor.tta,
            "networks_sha256": self.predictor.fingerprint,
        }
        if self.scene.stretch is not None:
            tags["stretch"] = "{!r} {!r}".format(*self.scene.stretch)
        if self.options.abstain:
            tags["abstain"] = repr(self.options.abstain)
        if statistics.seam_score is not None:
            tags["seam_score"] = f"{statistics.seam_score:.4f}"
        return tags

    def _write_extras(self, class_map: Path) -> dict[Path, Path]:
        """Draw the preview and write the polygons beside their targets; returns what goes where."""
        moves: dict[Path, Path] = {}
        for write, target in self._extras.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".partial.{target.name}")
            write(class_map, aside)
            moves[aside] = target
        return moves

    def _draw(self, class_map: Path, output: Path) -> None:
        plot_map(class_map, self.scene, output, title=Path(self.scene.name).name)

    def _clear_errors(self) -> Any:
        way_out = f"what is finished stays in {self.store.folder}: make room or choose another target, and run it again"
        return clear_errors(self.destination, way_out)
