"""Score a network on whole tiles: sliding window, one confusion matrix over all processes, nothing stored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from hf_seg.data.dataloaders import LabelledImages
from hf_seg.errors import DatasetError
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.inference.tta import average_views
from hf_seg.labels import BACKGROUND
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import SegmentationNetwork
from hf_seg.normalization import to_pixel_values
from hf_seg.report.plots import plot_confusion_matrix, plot_panel


def predict_probs(
    network: SegmentationNetwork,
    image: np.ndarray,
    accelerator: Accelerator,
    *,
    window: int,
    stride: int,
    batch_size: int,
    views: str = "none",
) -> Tensor:
    """Compute the class probabilities of one image of any size.

    Class 0 gets 0, and the others are not scaled up in its place: where a network sees no land cover it counts for
    less in an average of several, and less confident alone.

    Args:
        network: in eval mode.
        image: (H, W) or (H, W, 3) uint8.
        window: side of the sliding window in pixels; the crop size that the network was trained at.
        stride: its step in pixels.
        batch_size: windows per forward pass.
        views: one of `VIEW_PRESETS`; the probabilities are averaged over them.

    Returns:
        (NUM_LABELS, H, W) float32 on the network's device.
    """

    def forward(windows: Tensor) -> Tensor:
        with accelerator.autocast():
            return network(windows).logits

    def predict(view: Tensor) -> Tensor:
        return sliding_window_probs(forward, view, window=window, stride=stride, batch_size=batch_size)

    probs = average_views(predict, to_pixel_values(image).to(accelerator.device), views)
    probs[BACKGROUND] = 0
    return probs


def predict_image(
    network: SegmentationNetwork,
    image: np.ndarray,
    accelerator: Accelerator,
    *,
    window: int,
    stride: int,
    batch_size: int,
    views: str = "none",
) -> np.ndarray:
    """Map one image of any size; arguments as of `predict_probs`.

    Returns:
        (H, W) uint8 class ids 1..8; class 0 never wins.
    """
    settings: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size, "views": views}
    probs = predict_probs(network, image, accelerator, **settings)
    probs[BACKGROUND] = -1  # below the 0 of a class that has underflowed
    return probs.argmax(0).to(torch.uint8).cpu().numpy()


def evaluate_network(
    network: SegmentationNetwork,
    images: LabelledImages,
    accelerator: Accelerator,
    *,
    window: int,
    stride: int,
    batch_size: int,
    views: str = "none",
    on_prediction: Callable[[str, np.ndarray, np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Score a network on whole images, shared among the processes, each image counted once.

    Args:
        network: the unwrapped network; put into eval mode and back.
        on_prediction: called with (image_id, prediction, label) of each image of this process.

    Returns:
        `mean_iou`, `overall_accuracy`, `iou`, `n_classes_present`, `confusion_matrix`, `n_images` over all processes.

    Raises:
        DatasetError: no pixel of any image is labelled.
    """
    settings: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size, "views": views}
    was_training = network.training
    network.eval()
    counts = ConfusionMatrix()
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    for index in tqdm(mine, desc="validation", unit="tile", leave=False, disable=not accelerator.is_main_process):
        image_id, image, label = images[index]
        prediction = predict_image(network, image, accelerator, **settings)
        counts.update(prediction, label)
        if on_prediction is not None:
            on_prediction(image_id, prediction, label)
    network.train(was_training)
    total = accelerator.reduce(torch.from_numpy(counts.matrix).to(accelerator.device), reduction="sum")
    counts.matrix[:] = total.cpu().numpy()
    results = {**counts.compute(), "n_images": len(images)}
    if results["mean_iou"] is None:
        raise DatasetError(f"the labels of all {len(images)} validation images are empty: no pixel is of class 1 to 8")
    return results


def draw_results(
    network: SegmentationNetwork,
    images: LabelledImages,
    results: dict[str, Any],
    folder: Path,
    accelerator: Accelerator,
    *,
    window: int,
    stride: int,
    batch_size: int,
    views: str = "none",
    rows: int = 4,
    image_title: str = "SAR",
) -> None:
    """Draw the confusion matrix, and a panel of image | label | prediction on a few evenly spread images.

    Args:
        results: of `evaluate_network`.
        folder: takes `confusion_matrix.png` and `panel.png`.
        image_title: what the images are.
    """
    settings: dict[str, Any] = {"window": window, "stride": stride, "batch_size": batch_size, "views": views}
    network.eval()
    plot_confusion_matrix(results, folder / "confusion_matrix.png")
    panel = []
    for index in np.unique(np.linspace(0, len(images) - 1, rows).round().astype(int)).tolist():
        image_id, image, label = images[index]
        prediction = predict_image(network, image, accelerator, **settings)
        panel.append((image_id, image, label, prediction))
    plot_panel(panel, folder / "panel.png", titles=(image_title, "label", "prediction"))
