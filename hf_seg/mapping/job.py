"""The map of one scene, in steps that can be interrupted, resumed and shared among processes.

`.map.tif.partial/` contains `map.json`, which identifies the map, and one compressed file per finished band of rows.
Every file is written atomically.
"""

import contextlib
import functools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_seg.errors import DISK_HINT, FileError, UserError, file_errors
from hf_seg.files import atomic_file, flush, remove, write_atomic
from hf_seg.inference.predict import Predictor
from hf_seg.labels import BACKGROUND
from hf_seg.mapping.band_mapper import ROWS_AT_ONCE, BandMapper
from hf_seg.mapping.claims import FINISHED
from hf_seg.mapping.gdal import GDAL_ERRORS, gdal_reason, gdal_session
from hf_seg.mapping.legend import side_car
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.output import Layer, choose_layers, write_layer
from hf_seg.mapping.provenance import FILE_TIME, Acquisition, find_acquisition, model_tags
from hf_seg.mapping.scene import READ_ROWS, Scene
from hf_seg.mapping.side_files import FinishedMap, check_targets, choose_side_files
from hf_seg.mapping.stac import MapFile
from hf_seg.mapping.statistics import MapStatistics, MapSummary

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], object]  # finished windows, all windows
FORMAT = 1  # version of the stored bands; increase it whenever their content changes


def map_scene(
    predictor: Predictor,
    source: str | Path,
    destination: str | Path,
    options: RasterOptions,
    *,
    part: int = 0,
    parts: int = 1,
    wait: Callable[[], object] = lambda: None,
    show_progress: bool = True,
    on_progress: OnProgress = lambda done, total: None,
) -> MapSummary | None:
    """Map one scene, in one process or in several that each compute a part of its bands.

    Args:
        part, parts: index of this process, and number of processes.
        wait: returns when all processes have called it.
        on_progress: see `MapJob.compute`.

    Returns:
        The summary; None except in process 0.

    Raises:
        UserError: see `MapJob`.
    """
    with gdal_session(), contextlib.closing(MapJob(predictor, source, destination, options)) as job:
        if part == 0:
            job.prepare()
        wait()
        bands = np.array_split(np.array(job.missing(), dtype=int), parts)[part].tolist()
        wait()  # no process saves a band before all have listed the missing ones
        job.compute(bands, show_progress=show_progress, on_progress=on_progress)
        wait()
        summary = job.finish() if part == 0 else None
        wait()
        return summary


def bands_folder(destination: Path) -> Path:
    """Return the folder of a map's finished bands."""
    return destination.with_name(f".{destination.name}.partial")


class MapJob:
    """The map of one scene, a GeoTIFF at `destination`.

    Every process calls `compute` with its part of `missing()`; one of them calls `prepare` before and `finish` after.

    Raises:
        UserError: a scene, a target or options that cannot be used.
    """

    def __init__(
        self, predictor: Predictor, source: str | Path, destination: str | Path, options: RasterOptions
    ) -> None:
        self._start, self._networks_start = time.perf_counter(), predictor.seconds
        self.predictor, self.destination, self.options = predictor, Path(destination), options
        if options.disagreement and len(predictor.networks) < 2:
            raise UserError("disagreement needs an ensemble; this model is a single network")
        self.layers = choose_layers(options, predictor.label_set)
        self._model_tags = model_tags(predictor.networks)
        self.side_files = choose_side_files(self.destination, options)
        self.folder = bands_folder(self.destination)
        targets = [*(layer.path(self.destination) for layer in self.layers), *(each.path for each in self.side_files)]
        check_targets(targets, Path(source), predictor.label_set, overwrite=options.overwrite, bands=self.folder)
        windows = [network.crop_size for network in predictor.networks]
        self.geometry = [(window, max(1, round(options.stride * window))) for window in windows]
        self.scene = Scene(
            source,
            bands=options.bands,
            units=options.units,
            stretch=options.stretch,
            zero_collar=options.zero_collar,
            input_bands=predictor.bands,
            cached_rows=max(windows) + ROWS_AT_ONCE + READ_ROWS,
        )
        self._mapper = BandMapper(predictor, self.scene, self.geometry, options)
        self._acquisition: Acquisition | None = None
        if options.stac:
            self._acquisition = find_acquisition(self.scene.dataset, self.scene.name, options.datetime)

    def close(self) -> None:
        """Close the scene."""
        self.scene.close()

    def prepare(self) -> None:
        """Create the folder of finished bands, or keep that of an earlier run; bands of another map are deleted."""
        source, crs = Path(self.scene.name), self.scene.dataset.crs
        with file_errors(self.destination, "cannot be written", DISK_HINT):
            status = source.stat() if source.is_file() else None
            identity = {
                "format": FORMAT,
                "source": [source.name, status and status.st_size, status and status.st_mtime_ns],
                "size": [self.scene.height, self.scene.width],
                "zero_collar": self.options.zero_collar,
                "layers": [layer.name for layer in self.layers],
                **self._tags(),
            }
            content, file = json.dumps(identity, indent=1).encode(), self.folder / "map.json"
            if self.folder.exists() and not (file.is_file() and file.read_bytes() == content):
                logger.info("%s: finished rows of another scene, model or setting are deleted", self.folder)
                remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)
        if self._acquisition and self._acquisition.source == FILE_TIME:
            logger.warning(
                "%s does not tell when it was acquired; the STAC item has the modification time of the file, %s; pass "
                "--datetime (datetime=...) to correct it",
                *(self.scene.name, self._acquisition.begin.isoformat()),
            )
        finished = self._mapper.count - len(self.missing())
        logger.info(
            "%s: %d x %d pixels, %s; windows of %s, every %s pixels; %s",
            *(self.scene.name, self.scene.width, self.scene.height, crs.to_string() if crs else "no CRS"),
            *(" and ".join(str(pair[i]) for pair in self.geometry) for i in (0, 1)),
            f"resumes after {finished} of {self._mapper.count} bands" if finished else f"{self._mapper.count} bands",
        )

    def missing(self) -> list[int]:
        """Return the numbers of the bands that are not computed yet, ascending."""
        return [number for number in range(self._mapper.count) if not self._band_file(number).exists()]

    def compute(
        self,
        bands: Sequence[int],
        *,
        show_progress: bool = True,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        """Compute bands, ascending, and save them.

        Args:
            on_progress: called with the numbers of finished windows and of all; what it raises stops the computation.

        Raises:
            UserError: a network that does not fit, a damaged scene, or a full disk.
        """
        total, name, done = self._mapper.count_windows(bands), self.destination.name, 0
        with tqdm(total=total, unit="tile", desc=name, disable=not show_progress, smoothing=0.05) as bar:

            def count(windows: int) -> None:
                nonlocal done
                done += windows  # a disabled bar does not count
                bar.update(windows)
                on_progress(done, total)

            for number, band in self._mapper.compute(bands, on_windows=count):
                with self._writing_errors():
                    write_atomic(self._band_file(number), zlib.compress(band.tobytes(), level=1))

    def finish(self) -> MapSummary:
        """Write the files from the bands, move them to their places and delete the bands.

        Raises:
            UserError: no pixel of the scene has data, a band is damaged, or a file cannot be written.
        """
        dataset, tags = self.scene.dataset, self._tags() | self._model_tags
        statistics = MapStatistics(
            self.scene.width,
            row_borders=self._mapper.borders(self.scene.height),
            column_borders=self._mapper.borders(self.scene.width),
            crs=dataset.crs,
            transform=dataset.transform,
            label_set=self.predictor.label_set,
        )
        with self._writing_errors():
            for top, (class_map,) in self._read_bands(self.layers[0]):
                statistics.update(top, class_map)
            if not self.options.abstain and not statistics.pixels[BACKGROUND + 1 :].any():
                remove(self.folder)
                raise UserError(f"{self.scene.name}: no pixel has data")
            if statistics.seam_score is not None:
                tags["seam_score"] = f"{statistics.seam_score:.4f}"
            files = self._write_files(statistics.pixels.tolist(), tags)
            remove(self.folder)
        return statistics.summary(
            files,
            seconds=time.perf_counter() - self._start,
            network_seconds=self.predictor.seconds - self._networks_start,
        )

    def _write_files(self, pixels: Sequence[int], tags: dict[str, str]) -> list[Path]:
        """Write all files of the map and return their places, the map first; it is the last to appear."""
        files: dict[str, MapFile] = {}
        for layer in self.layers:
            path, read_bands = layer.path(self.folder / "layer.tif"), functools.partial(self._read_bands, layer)
            how: dict[str, Any] = {"tags": tags, "label_set": self.predictor.label_set, "cog": self.options.cog}
            path = write_layer(path, layer, read_bands, scene=self.scene.dataset, **how)
            files[layer.name or "land_cover"] = MapFile(layer.path(self.destination), path)
        layers = [*files.values()]
        finished = FinishedMap(self.scene, files, self.predictor.label_set, pixels, tags, self._acquisition)
        for each in self.side_files:
            with atomic_file(each.path) as temporary:
                each.write(finished, temporary)
            files[each.key] = MapFile(each.path, each.path)
        write_atomic(self.folder / FINISHED, "")
        for target, path in reversed(layers):
            if target != self.destination:
                side_car(target).unlink(missing_ok=True)  # what a GIS may have stored about a file that is replaced
            flush(path)
            os.replace(path, target)
        return [file.path for file in files.values()]

    @contextlib.contextmanager
    def _writing_errors(self) -> Iterator[None]:
        """Turn errors of the file system and of GDAL into a `FileError` that says how to resume."""
        hint = f"the same command resumes from the bands in {self.folder}"
        try:
            yield
        except FileError as error:
            raise FileError(f"{error}; {hint}") from None
        except (OSError, *GDAL_ERRORS) as error:
            reason = getattr(error, "strerror", None) or gdal_reason(error)
            raise FileError(f"{self.destination} cannot be written ({reason}); {DISK_HINT}; {hint}") from error

    def _band_file(self, number: int) -> Path:
        return self.folder / f"rows_{number:05d}.z"

    def _read_bands(self, layer: Layer) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the first row of each band, and the layer there, (bands of the layer, rows, width) uint8."""
        counts = [len(each.bands) for each in self.layers]
        first = sum(counts[: self.layers.index(layer)])
        for number in range(self._mapper.count):
            top, bottom = self._mapper.span(number)
            file = self._band_file(number)
            try:
                content = zlib.decompress(file.read_bytes())
                band = np.frombuffer(content, np.uint8).reshape(sum(counts), bottom - top, self.scene.width)
            except (zlib.error, ValueError):
                file.unlink()
                raise UserError(f"{file} was damaged and is deleted; run the same command again") from None
            yield top, band[first : first + len(layer.bands)]

    def _tags(self) -> dict[str, str]:
        """Describe how the map is computed; part of what identifies the stored bands."""
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
        return tags
