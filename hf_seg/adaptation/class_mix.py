"""ClassMix for two domains: paste half of the source classes onto the target (DACS, Tranheden et al. 2021)."""

import math

import torch
from torch import Tensor

from hf_seg.labels import IGNORE_INDEX


def sample_class_mask(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Choose half of the classes present in one label map, rounded up.

    Args:
        labels: (H, W) class ids; `IGNORE_INDEX` is never chosen.
        generator: the only source of randomness, on the device of `labels`.

    Returns:
        (H, W) bool, True where the source pixel is pasted; nowhere if no pixel is labelled.
    """
    present = labels.unique()
    present = present[present != IGNORE_INDEX]
    order = torch.randperm(len(present), generator=generator, device=labels.device)
    return torch.isin(labels, present[order[: math.ceil(len(present) / 2)]])


def mix_domains(
    source: dict[str, Tensor], target: dict[str, Tensor], class_masks: Tensor, pseudo_labels: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Paste the chosen source pixels, with their labels, onto the target images at the same positions of the batch.

    Args:
        source: `pixel_values` (B, 3, H, W) and `labels` (B, H, W).
        target: `pixel_values` (B, 3, H, W).
        class_masks: (B, H, W) bool, True where the source is pasted.
        pseudo_labels: (B, H, W) of the target, `IGNORE_INDEX` where there is none.
        weights: (B,) lambda of each target image (eq. 7).

    Returns:
        `pixel_values` (B, 3, H, W), `labels` (B, H, W), and `weights` (B, H, W): 1 on pasted pixels, lambda elsewhere.
    """
    lambdas = weights[:, None, None].expand(class_masks.shape)
    return {
        "pixel_values": torch.where(class_masks[:, None], source["pixel_values"], target["pixel_values"]),
        "labels": torch.where(class_masks, source["labels"], pseudo_labels),
        "weights": torch.where(class_masks, 1.0, lambdas),
    }
