"""Scores of a set of label maps, from one confusion matrix: IoU per class, their mean, overall accuracy.

`hf_seg.land_cover_iou.LandCoverIoU` offers the same as an `evaluate.Metric`.
"""

from typing import Any, Self

import numpy as np
from torch import Tensor

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet


class ConfusionMatrix:
    """Count (truth, prediction) pairs over a set of images and score the counts.

    The IoU of a class is its intersection over its union, both summed over the whole set. Background (class 0) has no
    part in `mean_iou`, and label maps normally hold `ignore_index` in its place. Where they do hold 0, those pixels are
    counted like any other truth: a land-cover class predicted there is a false positive of that class and an error of
    `overall_accuracy`. To predict 0 is allowed; it misses the true class.

    Args:
        classes: label set, or number of ids, background included, whose names are the ids then.
        ignore_index: label of pixels that are not counted.

    Attributes:
        matrix: (num_labels, num_labels) int64 pixel counts, rows = truth, columns = prediction. Several processes
            reduce their sets by summing it.
    """

    def __init__(self, classes: LabelSet | int = OPEN_EARTH_MAP, ignore_index: int = IGNORE_INDEX) -> None:
        self.names = classes.names if isinstance(classes, LabelSet) else tuple(map(str, range(classes)))
        num_labels = self.num_labels = len(self.names)
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_labels, num_labels), dtype=np.int64)

    def update(self, predictions: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Count the pixels of one map or batch; nothing is counted if an error is raised.

        Args:
            predictions: integer class ids 0..num_labels - 1, any shape.
            labels: integer class ids or `ignore_index`, the same shape.

        Raises:
            ValueError: shapes that differ, a dtype that is no integer, or a value that is no class.
        """
        predicted, truth = _as_integers(predictions, "predictions"), _as_integers(labels, "labels")
        if predicted.shape != truth.shape:
            raise ValueError(
                f"predictions {predicted.shape} and labels {truth.shape} differ in shape: resize the logits first"
            )
        if truth.size == 0:
            return
        # Multiplying by masks beats selecting with them: byte arithmetic runs in vector registers.
        ignored = truth == self.ignore_index
        truth = truth * ~ignored
        self._check_range(predicted, "prediction", "every pixel needs a class")
        self._check_range(truth, "label", f"pixels without a class must be {self.ignore_index}")
        n_codes = self.num_labels**2
        dtype = np.min_scalar_type(n_codes)  # uint8 for 9 ids
        codes = truth.astype(dtype) * dtype.type(self.num_labels) + predicted.astype(dtype)
        codes = np.maximum(codes, ignored * dtype.type(n_codes))  # one more code collects the ignored pixels
        counts = np.bincount(codes.ravel(), minlength=n_codes)[:n_codes]
        self.matrix += counts.reshape(self.num_labels, self.num_labels)

    def merge(self, other: "ConfusionMatrix") -> Self:
        """Add the counts of another set and return self.

        Raises:
            ValueError: the other matrix has another number of classes.
        """
        if other.num_labels != self.num_labels:
            raise ValueError(f"cannot merge counts of {other.num_labels} classes into {self.num_labels}")
        self.matrix += other.matrix
        return self

    def compute(self) -> dict[str, Any]:
        """Score the counts so far; every value can be written as JSON.

        Returns:
            `mean_iou`: mean over the classes from 1 up that occur in the truth; None if none does.
            `overall_accuracy`: share of the counted pixels that are right; None if there are none.
            `iou`: {class name: IoU, or None if the class does not occur in the truth}; background is listed, though no
            part of the mean.
            `n_classes_present`: number of classes in the mean.
            `confusion_matrix`: the counts as nested lists, rows = truth.
        """
        correct, truth = np.diagonal(self.matrix), self.matrix.sum(axis=1)
        union = truth + self.matrix.sum(axis=0) - correct
        iou = [float(c / u) if t else None for c, u, t in zip(correct, union, truth, strict=True)]
        scored = [value for index, value in enumerate(iou) if index != BACKGROUND and value is not None]
        n_pixels = int(truth.sum())
        return {
            "mean_iou": sum(scored) / len(scored) if scored else None,
            "overall_accuracy": int(correct.sum()) / n_pixels if n_pixels else None,
            "iou": dict(zip(self.names, iou, strict=True)),
            "n_classes_present": len(scored),
            "confusion_matrix": self.matrix.tolist(),
        }

    def _check_range(self, values: np.ndarray, name: str, hint: str) -> None:
        for value in (values.min(), values.max()):
            if not 0 <= value < self.num_labels:
                raise ValueError(f"{name} {value} is no class id 0..{self.num_labels - 1}: {hint}")


def _as_integers(values: Tensor | np.ndarray, name: str) -> np.ndarray:
    if not isinstance(values, Tensor):
        values = np.asarray(values)
    elif not values.is_floating_point():  # numpy has no bfloat16
        values = values.detach().cpu().numpy()
    if isinstance(values, Tensor) or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be integer class ids, got {values.dtype}; take the argmax of probabilities first"
        )
    return values
