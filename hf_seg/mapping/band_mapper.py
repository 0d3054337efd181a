"""Predict a scene in bands of rows: blend the windows of each network and store the layers of the map as uint8."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_seg.inference.predict import Predictor
from hf_seg.inference.sliding_window import RowBlender, window_starts
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.labels import BACKGROUND
from hf_seg.mapping.options import RasterOptions
from hf_seg.mapping.output import BLOCK, SCORE_MAX, SCORE_NODATA, choose_layers
from hf_seg.mapping.scene import Scene

ROWS_AT_ONCE = 32  # rows whose probabilities are in memory at the same time


class BandMapper:
    """Computes bands of `BLOCK` rows; `geometry` is (window, stride) in pixels of each network."""

    def __init__(
        self, predictor: Predictor, scene: Scene, geometry: Sequence[tuple[int, int]], options: RasterOptions
    ) -> None:
        self.predictor, self.scene, self.geometry, self.options = predictor, scene, geometry, options
        self.count = -(-scene.height // BLOCK)

    def span(self, band: int) -> tuple[int, int]:
        """Return the first row of a band, and the first after it."""
        return band * BLOCK, min((band + 1) * BLOCK, self.scene.height)

    def borders(self, length: int) -> set[int]:
        """Return where windows begin, and the first pixel after each, along an axis of `length` pixels."""
        borders: set[int] = set()
        for window, stride in self.geometry:
            starts = window_starts(length, window, stride)
            borders.update(starts, (start + window for start in starts))
        return borders

    def count_windows(self, bands: Sequence[int]) -> int:
        """Return the number of windows that `compute` predicts for these bands."""
        count = 0
        for previous, band in pairwise([-2, *bands]):
            top, bottom = self.span(band)
            for window, stride in self.geometry:
                first = top if previous == band - 1 else top - window + 1
                starts = window_starts(self.scene.height, window, stride)
                per_row = len(window_starts(self.scene.width, window, stride))
                count += per_row * sum(first <= start < bottom for start in starts)
        return count

    def compute(self, bands: Sequence[int], *, on_windows: Callable[[int], object]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each band's number and its layers, (bands of all layers, rows, width) uint8.

        Args:
            bands: ascending; consecutive bands share the windows that overlap both.
            on_windows: called with the number of windows just finished.
        """
        blenders: list[RowBlender] = []
        for previous, band in pairwise([-2, *bands]):
            top, bottom = self.span(band)
            if previous != band - 1:
                blenders.clear()  # frees their memory first
                blenders += [self._blender(network, top, on_windows) for network in range(len(self.geometry))]
            ends = [*range(top + ROWS_AT_ONCE, bottom, ROWS_AT_ONCE), bottom]
            rows = [self._map_rows(blenders, *span) for span in pairwise([top, *ends])]
            yield band, np.concatenate(rows, axis=1)

    def _blender(self, network: int, first_row: int, on_windows: Callable[[int], object]) -> RowBlender:
        def read_rows(top: int, bottom: int) -> tuple[Tensor, Tensor]:
            pixels, valid = self.scene.rows(top, bottom)
            return torch.from_numpy(pixels), torch.from_numpy(valid)

        window, stride = self.geometry[network]
        return RowBlender(
            lambda windows: self.predictor.window_probs(network, windows),
            read_rows,
            height=self.scene.height,
            width=self.scene.width,
            num_labels=self.predictor.label_set.num_labels,
            window=window,
            stride=stride,
            batch_size=self.options.batch_size,
            first_row=first_row,
            max_rows=ROWS_AT_ONCE,
            device=self.predictor.device,
            on_windows=on_windows,
        )

    @torch.no_grad()
    def _map_rows(self, blenders: list[RowBlender], top: int, bottom: int) -> np.ndarray:
        """Return the layers of a few rows; (bands of all layers, bottom - top, width) uint8."""
        accumulator = VoteAccumulator()
        for blender, weight in zip(blenders, self.predictor.weights, strict=True):
            accumulator.add(blender.rows(bottom), weight)
        confidence = accumulator.confidence()
        valid = torch.from_numpy(self.scene.rows(top, bottom)[1]).to(confidence.device)
        keep = valid & (confidence >= self.options.abstain)
        layers = [torch.where(keep, accumulator.label_map(), BACKGROUND).to(torch.uint8)[None]]
        scores = {
            "confidence": accumulator.confidence,
            "disagreement": accumulator.disagreement,
            "probabilities": accumulator.probs,
        }
        for layer in choose_layers(self.options, self.predictor.label_set)[1:]:
            levels = (scores[layer.name]() * SCORE_MAX).round().clamp(0, SCORE_MAX)
            layers.append(torch.where(valid, levels, SCORE_NODATA).to(torch.uint8).reshape(-1, *valid.shape))
        return torch.cat(layers).cpu().numpy()
