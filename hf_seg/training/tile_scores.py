"""What one pass over labelled tiles leaves: counts of each tile, calibration, the best and the worst tiles.

tiles = TileScores(shown=3)
results, _ = evaluate(predictor, images, accelerator, on_prediction=tiles.add)
bootstrap_miou(tiles.matrices()), tiles.calibration.expected_error(), tiles.worst()
"""

import bisect

import numpy as np

from hf_seg.calibration import Calibration
from hf_seg.data.samples import Sample
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.metrics import ConfusionMatrix
from hf_seg.report.run_report import ShownTile
from hf_seg.training.evaluation import entropy_levels


class TileScores:
    """Takes each tile's prediction from `evaluate`; keeps its counts, and the pixels of a few tiles.

    Args:
        shown: number of best and of worst tiles to keep.

    Attributes:
        image_ids, mean_ious: of all tiles, in order; the mIoU is None without a labelled pixel.
        calibration: of all labelled pixels.
    """

    def __init__(self, shown: int = 3) -> None:
        self.image_ids: list[str] = []
        self.mean_ious: list[float | None] = []
        self.calibration = Calibration()
        self._matrices: list[np.ndarray] = []
        self._n_shown = shown
        self._shown: list[ShownTile] = []

    def add(self, sample: Sample, label_map: np.ndarray, accumulator: VoteAccumulator) -> None:
        """Count one tile; one without a labelled pixel is never shown."""
        counts = ConfusionMatrix(accumulator.probs().shape[-3])
        counts.update(label_map, sample.label)
        self.image_ids.append(sample.image_id)
        self._matrices.append(counts.matrix)
        self.calibration.update(accumulator.confidence().cpu().numpy(), label_map, sample.label)
        mean_iou = counts.compute()["mean_iou"]
        self.mean_ious.append(mean_iou)
        if mean_iou is not None and self._n_shown:
            pixels = (sample.image, sample.label, label_map, entropy_levels(accumulator))
            bisect.insort(self._shown, ShownTile(mean_iou, sample.image_id, *pixels), key=lambda tile: tile[:2])
            if len(self._shown) > 2 * self._n_shown:
                del self._shown[self._n_shown]  # neither among the worst nor among the best

    def matrices(self) -> np.ndarray:
        """Return the (T, C, C) int64 counts of all tiles, rows = truth; an empty array without tiles."""
        return np.array(self._matrices, dtype=np.int64)

    def worst(self) -> list[ShownTile]:
        """Return the tiles with the lowest mIoU, lowest first."""
        return self._shown[: self._n_shown]

    def best(self) -> list[ShownTile]:
        """Return the tiles with the highest mIoU, highest first; none that is among the worst."""
        return self._shown[self._n_shown :][::-1]
