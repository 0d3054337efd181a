"""Pseudo-labels of the teacher, the weights of their images, and signs that self-training fails."""

import torch
from torch import Tensor

from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet


@torch.no_grad()
def weigh_pseudo_labels(
    logits: Tensor,
    confidence_threshold: float = 0.968,
    *,
    valid: Tensor | None = None,
    keep_background: bool = False,
) -> tuple[Tensor, Tensor]:
    """Label every pixel by the teacher's argmax and weight each image by its share of confident pixels (eq. 5, 7).

    No pixel is dropped for low confidence; an image with few confident pixels has a low weight instead.

    Args:
        logits: (B, C, H, W) of the teacher.
        confidence_threshold: a pixel whose largest probability reaches it is confident.
        valid: (B, H, W) bool, False on padding and nodata; None: True everywhere.
        keep_background: class 0 may be predicted; else it is left out of the softmax, since no label teaches it.

    Returns:
        labels (B, H, W) int64, `IGNORE_INDEX` where not valid; weights (B,) float32 in 0..1, the share of the valid
        pixels that are confident, 0 for an image without any.
    """
    logits = logits.float()
    if not keep_background:
        logits = logits.clone()  # .float() of float32 is the caller's own
        logits[:, BACKGROUND] = float("-inf")
    confidence, labels = logits.softmax(dim=1).max(dim=1)
    if valid is None:
        valid = torch.ones_like(labels, dtype=torch.bool)
    confident = (confidence >= confidence_threshold) & valid
    weights = confident.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)
    return torch.where(valid, labels, IGNORE_INDEX), weights


def describe_pseudo_labels(labels: Tensor, weights: Tensor, label_set: LabelSet = OPEN_EARTH_MAP) -> dict[str, Tensor]:
    """Return scalars that show the progress of self-training.

    Args:
        labels: (B, H, W) and weights (B,) of `weigh_pseudo_labels`.
        label_set: names the classes.

    Returns:
        `mean_weight` (mean lambda), `confident_pixels` (their share of the valid ones), and each class's share of the
        valid pixels as `pseudo_share_<class>`.
    """
    n_valid = (labels != IGNORE_INDEX).sum(dim=(1, 2))
    total = n_valid.sum().clamp(min=1)
    shares = {f"pseudo_share_{name}": (labels == index).sum() / total for index, name in enumerate(label_set.names)}
    return {"mean_weight": weights.mean(), "confident_pixels": (weights * n_valid).sum() / total, **shares}


class CollapseWatch:
    """Warns when self-training collapses: one class covers nearly every pixel, or the weights stay at 0.

    Args:
        patience: reports in a row that must show it before a warning, and before each further one.
        largest_share: a class above this share of the pseudo-labelled pixels dominates.
        smallest_weight: a mean weight (lambda) at or below this counts as 0.
        label_set: names the classes.
    """

    def __init__(
        self,
        patience: int = 10,
        largest_share: float = 0.95,
        smallest_weight: float = 1e-4,
        label_set: LabelSet = OPEN_EARTH_MAP,
    ) -> None:
        self.names = label_set.names
        self.patience = patience
        self.largest_share = largest_share
        self.smallest_weight = smallest_weight
        self._dominated = self._stuck = 0

    def update(self, class_shares: list[float], mean_weight: float) -> str | None:
        """Add a report (each class's share of the pseudo-labels, mean lambda); return a warning, or None."""
        largest = max(class_shares)
        self._dominated = self._dominated + 1 if largest > self.largest_share else 0
        self._stuck = self._stuck + 1 if mean_weight <= self.smallest_weight else 0
        if self._dominated == self.patience:
            self._dominated = 0
            name = self.names[class_shares.index(largest)]
            return (
                f"COLLAPSE: {100 * largest:.1f} % of the pseudo-labels are {name}, {self.patience} reports in a row; "
                "lower learning_rate, raise ema_decay, or look at the panels and the target's images"
            )
        if self._stuck == self.patience:
            self._stuck = 0
            return (
                f"SELF-TRAINING STALLS: mean weight {mean_weight:.5f}, {self.patience} reports in a row, so target "
                "images have no effect; train longer on the source, or lower confidence_threshold"
            )
        return None
