"""The land-cover scores as a metric of the evaluate library.

`evaluate.load("path/to/land_cover_iou.py")` loads it offline. evaluate reads the import lines of this file one by one:
each stays on a line of its own, without a comment behind it.
"""

from typing import Any

import datasets
import evaluate

from hf_seg.labels import OPEN_EARTH_MAP, LabelSet
from hf_seg.metrics import ConfusionMatrix

_DESCRIPTION = """\
Mean intersection over union (mIoU) of land-cover maps: per class, intersection and union are summed over the whole set,
and the mean is taken over the classes 1 to 8 that occur in the truth. Class 0 (background) is not scored.
"""

_CITATION = """\
@inproceedings{xia2023openearthmap,
  title     = {OpenEarthMap: A Benchmark Dataset for Global High-Resolution Land Cover Mapping},
  author    = {Xia, Junshi and Yokoya, Naoto and Adriano, Bruno and Broni-Bediako, Clifford},
  booktitle = {Proceedings of the IEEE/CVF Winter Conference on Applications of Computer Vision (WACV)},
  pages     = {6254--6264},
  year      = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: maps of class ids 0..8: one (H, W) map, a (B, H, W) batch, or a list of maps, whose sizes may differ.
    references: the true maps in the same form; 255 marks pixels that are not scored.

Returns:
    mean_iou: mean over the classes 1..8 that occur in the references, or None.
    overall_accuracy: share of the scored pixels that are right, or None.
    iou: {class name: IoU, or None if the class does not occur in the references}.
    n_classes_present: number of classes in the mean.
    confusion_matrix: pixel counts, rows = truth.

Examples:
    >>> metric = LandCoverIoU()
    >>> metric.add_batch(predictions=[[5, 5], [6, 8]], references=[[5, 5], [6, 6]])
    >>> metric.compute()["mean_iou"]
    0.75
"""


class LandCoverIoU(evaluate.Metric):
    """Count maps as they come; memory is that of one confusion matrix, whatever the size of the set.

    `label_set` gives other classes than OpenEarthMap's: `evaluate.load(FILE, label_set=read_label_set("FILE"))`.

    The base class would write every map to an Arrow file and score them all at the end. Here `add` and `add_batch`
    count at once, `compute` scores the counts and starts anew.
    """

    def __init__(self, *args: Any, label_set: LabelSet = OPEN_EARTH_MAP, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"LandCoverIoU counts in its own process, got num_process={self.num_process}: gather the maps first, "
                "or sum `hf_seg.metrics.ConfusionMatrix.matrix` over the processes"
            )
        self._label_set = label_set
        self._confusion = ConfusionMatrix(label_set)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
            reference_urls=["https://open-earth-map.org"],
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one map; the plural names of `add_batch` are understood too, as in the base class."""
        batch = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**batch)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Count one map, a batch or a list of maps; nothing is counted if an error is raised."""
        _refuse(kwargs)
        if predictions is None or references is None:
            raise ValueError("LandCoverIoU needs predictions and references, got None")
        counts = ConfusionMatrix(self._label_set)
        if isinstance(predictions, list | tuple) or isinstance(references, list | tuple):
            if len(predictions) != len(references):
                raise ValueError(f"{len(predictions)} predictions do not match {len(references)} references")
            for one_prediction, one_reference in zip(predictions, references, strict=True):
                counts.update(one_prediction, one_reference)
        else:
            counts.update(predictions, references)
        self._confusion.merge(counts)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Score all maps since the last call, those given here included, and start anew."""
        _refuse(kwargs)
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        scores = self._confusion.compute()
        self._confusion = ConfusionMatrix(self._label_set)
        return scores


def _refuse(kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError(f"LandCoverIoU knows predictions and references only, got {sorted(kwargs)}")
