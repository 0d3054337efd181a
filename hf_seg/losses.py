"""The losses of both stages: cross entropy, reverse cross entropy, Lovász-softmax and their sum.

Every loss computes in float32, also inside autocast and for half-precision logits (float64 stays float64): nothing here
is on autocast's list of low-precision operations. Pixels labelled `ignore_index` carry neither loss nor gradient; with
no valid pixel at all a loss is exactly 0 and so is its gradient. Nothing here makes the host wait for a device: labels
are checked on a CPU alone (on CUDA the cross entropies' `nll_loss` has its own device-side assertion).

All means are over the pixels of this process: data-parallel training averages the means of the ranks, whatever their
numbers of valid pixels. Equation numbers without a name are those of Liu et al., "Learning from noisy pseudo-labels for
all-weather land cover mapping".
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_seg.labels import IGNORE_INDEX


def cross_entropy(
    logits: Tensor, labels: Tensor, *, weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Weigh the cross entropy of every valid pixel and divide by their number (eq. 3 and 6).

    The divisor is the number of valid pixels, not the sum of the weights: a doubtful pseudo-label lowers the loss.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids.
        weights: (B,) per image, or anything that broadcasts to (B, H, W) per pixel; None is 1 everywhere.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalar; 0 (with gradient) if no pixel is valid.

    Raises:
        ValueError: shapes that do not fit, or (on a CPU) a label that is neither a class nor `ignore_index`.
    """
    nll, valid = _negative_log_likelihood(logits, labels, ignore_index)
    return _mean_over_valid(nll, valid, weights)


def reverse_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    epsilon: float = 1e-4,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross entropy with prediction and label swapped (Wang et al. 2019; eq. 9).

    Bounded by -log(epsilon), so a confidently wrong label cannot dominate.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids.
        weights: see `cross_entropy`.
        epsilon: label probability of the absent classes; keeps the log finite.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalar: the weighted sum over the valid pixels divided by their number; 0 (with gradient) if there are none.

    Raises:
        ValueError: as `cross_entropy`, or `epsilon` not positive.
    """
    nll, valid = _negative_log_likelihood(logits, labels, ignore_index)
    return _mean_over_valid(_reverse_from_nll(nll, valid, epsilon), valid, weights)


def lovasz_softmax(logits: Tensor, labels: Tensor, *, stride: int = 1, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Extend 1 - IoU to probabilities: the Lovász-softmax loss (Berman et al. 2018, eq. 8 and 9).

    The mean over the classes present in the labels of the whole batch. For a prediction of zeros and ones it equals the
    mean over those classes of 1 - IoU. Under data-parallel training each rank sees its local batch only, so the result
    depends on how the images are spread over the ranks.

    Keeps one tensor of the logits' shape for the backward pass, which is not differentiable a second time.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids.
        stride: use every `stride`-th row and column of pixels only. With more than 1 it is another loss, of an image
            with fewer pixels, and faster in proportion; where the logits were upsampled by `stride`, neighbours tell
            little more.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalar; 0 (with gradient) if no pixel is valid.

    Raises:
        ValueError: as `cross_entropy`, or `stride` less than 1.
    """
    if stride < 1:
        raise ValueError(f"the stride of the Lovász-softmax must be >= 1, got {stride}")
    labels = _checked_labels(logits, labels, ignore_index)
    if stride > 1:
        logits, labels = logits[..., ::stride, ::stride], labels[:, ::stride, ::stride]
    return _LovaszSoftmax.apply(_at_least_float32(logits), labels, ignore_index)


def noise_robust_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ce_weight: float = 1.0,
    rce_weight: float = 1.0,
    lovasz_weight: float = 1.0,
    gce_q: float = 0.0,
    weights: Tensor | None = None,
    lovasz_stride: int = 1,
    epsilon: float = 1e-4,
    ignore_index: int = IGNORE_INDEX,
) -> dict[str, Tensor]:
    """Sum cross entropy, reverse cross entropy and Lovász-softmax: stage 2's loss (eq. 9 to 11).

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids, possibly wrong.
        ce_weight: factor of `cross_entropy`; a term of weight 0 is not computed.
        rce_weight: factor of `reverse_cross_entropy`.
        lovasz_weight: factor of `lovasz_softmax`.
        gce_q: above 0, generalized cross entropy, (1 - p_y^q) / q, takes the place of cross entropy, which is its limit
            at 0; at 1 it is the absolute error (Zhang and Sabuncu 2018).
        weights: weights of images or pixels in the two cross entropies, see `cross_entropy`; Lovász-softmax has none.
        lovasz_stride: `stride` of `lovasz_softmax`; another loss if it is not 1.
        epsilon: see `reverse_cross_entropy`.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalars: `loss`, to be differentiated, and the terms before weighting, detached, for the log: `ce`, `rce`,
        `lovasz` (0 where the weight is 0).

    Raises:
        ValueError: as `reverse_cross_entropy`, or a negative weight, or all weights 0, or `gce_q` outside 0..1.
    """
    factors = {"ce": ce_weight, "rce": rce_weight, "lovasz": lovasz_weight}
    if min(factors.values()) < 0 or not any(factors.values()):
        raise ValueError(f"loss weights must be >= 0 and not all 0, got {factors}")
    if not 0 <= gce_q <= 1:
        raise ValueError(f"gce_q must be from 0 to 1, got {gce_q}")
    # Cast once, so that the gradients of the terms add up before they are rounded to half precision.
    logits = _at_least_float32(logits)
    terms: dict[str, Tensor] = {}
    if ce_weight or rce_weight:
        nll, valid = _negative_log_likelihood(logits, labels, ignore_index)
        if ce_weight:
            forward = -torch.expm1(-gce_q * nll) / gce_q if gce_q else nll
            terms["ce"] = _mean_over_valid(forward, valid, weights)
        if rce_weight:
            terms["rce"] = _mean_over_valid(_reverse_from_nll(nll, valid, epsilon), valid, weights)
    if lovasz_weight:
        terms["lovasz"] = lovasz_softmax(logits, labels, stride=lovasz_stride, ignore_index=ignore_index)
    loss = torch.stack([factors[name] * term for name, term in terms.items()]).sum()
    return {"loss": loss} | {name: terms.get(name, torch.zeros_like(loss)).detach() for name in factors}


class _LovaszSoftmax(torch.autograd.Function):
    """Lovász-softmax with its gradient computed in the forward pass.

    The loss is linear in the errors while their order lasts, so the gradient is known as soon as they are sorted. Only
    the gradient with respect to the logits is kept, 36 MiB per 1024 x 1024 x 9 image; automatic differentiation would
    keep permutation, errors and steps of all classes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Sort each class's errors; (B, C, H, W) logits, (B, H, W) int64 labels -> scalar."""
        classes_first = logits.movedim(1, 0)
        probs = classes_first.flatten(1).softmax(dim=0)  # (C, N)
        # -1 is nobody's class, also when ignore_index is one of 0..C-1.
        labels = labels.flatten().masked_fill(labels.flatten() == ignore_index, -1)
        loss, grad = (_lovasz_on_cpu if probs.device.type == "cpu" else _lovasz_on_device)(probs, labels)
        if ctx.needs_input_grad[0]:
            # Through the softmax: d/dz_k = p_k (g_k - sum_c p_c g_c).
            grad = grad.sub_((probs * grad).sum(dim=0)).mul_(probs)
            ctx.save_for_backward(grad.view_as(classes_first).movedim(0, 1).contiguous())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient found in `forward`."""
        (grad_logits,) = ctx.saved_tensors
        return grad_logits * grad_output, None, None


def _lovasz_on_cpu(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss and its gradient from the pixels that have an influence.

    Absent classes are skipped. In a class, a background pixel has a step of 0 once all foreground pixels are wrong, so
    those with an error below the smallest foreground error need no sorting.

    Args:
        probs: (C, N) probabilities, float32 or float64.
        labels: (N,) class ids, -1 where ignored.

    Returns:
        Scalar loss, and its (C, N) gradient with respect to `probs`.
    """
    grad = torch.zeros_like(probs)
    loss = probs.new_zeros(())
    label_of = labels.to(torch.int32).numpy()
    valid = label_of >= 0
    present = np.flatnonzero(np.bincount(label_of[valid])).tolist()
    for index in present:
        foreground = label_of == index
        errors = np.abs(foreground - probs[index].numpy())
        smallest = errors[np.flatnonzero(foreground)].min()
        # Written so that NaN is kept, and the loss becomes NaN.
        kept = np.flatnonzero(~(errors < smallest) & valid)
        order = _by_descending_error(kept, errors[kept])
        is_foreground = torch.from_numpy(foreground[order])
        steps = _jaccard_steps(is_foreground, probs.dtype).div_(len(present))
        loss += (torch.from_numpy(errors[order]) * steps).sum()
        grad[index].scatter_(0, torch.from_numpy(order), torch.where(is_foreground, -steps, steps))
    return loss, grad


def _by_descending_error(pixels: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Sort ascending int64 pixel numbers by their float32 or float64 errors >= 0, the largest first; stable."""
    if errors.dtype != np.float32:
        return pixels[np.argsort(-errors, kind="stable")]
    # The bits of a float32 >= 0 are ordered as its value. With the pixel's number below them the keys are unique, so
    # that numpy's vectorised sort, which is not stable, has one result; it takes a tenth of the time of a stable one.
    keys = errors.view(np.uint32).astype(np.uint64)
    np.subtract(np.uint64(0x7FFFFFFF), keys, out=keys)
    keys <<= np.uint64(32)
    keys |= pixels.view(np.uint64)
    keys.sort()
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)


def _lovasz_on_device(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `_lovasz_on_cpu` by sorting all pixels of all classes, so that the host never waits."""
    grad = torch.empty_like(probs)
    loss, n_present = probs.new_zeros(()), labels.new_zeros(())
    ignored = labels < 0
    for index, class_probs in enumerate(probs):
        foreground = labels == index
        # Ignored pixels come last: no foreground remains there, so their steps are 0 without any mask.
        errors = (foreground.to(probs.dtype) - class_probs).abs_().masked_fill_(ignored, -1)
        errors, order = errors.sort(descending=True, stable=True)
        is_foreground = foreground[order]
        steps = _jaccard_steps(is_foreground, probs.dtype)
        loss += (errors * steps).sum()
        grad[index].scatter_(0, order, torch.where(is_foreground, -steps, steps))
        n_present += foreground.any()
    n_present.clamp_(min=1)
    return loss / n_present, grad.div_(n_present)


def _jaccard_steps(foreground: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the steps of a class's Jaccard loss as its pixels turn wrong one after the other.

    With `remaining` foreground pixels still right and `union`, both after the step, a step is 1 / union at a foreground
    pixel and remaining / (union (union - 1)) at a background pixel. This form has no cancellation; the difference of
    neighbouring Jaccard values loses float32 digits with every further pixel.

    Args:
        foreground: (M,) bool, the pixels of the class, in descending order of the errors.
        dtype: of the result.

    Returns:
        (M,), all 0 if the class is absent.
    """
    # Counted in integers, since float32 stops counting at 2^24.
    wrong = foreground.cumsum(0, dtype=torch.int32)
    remaining = wrong[-1:] - wrong
    union = remaining + torch.arange(1, len(wrong) + 1, dtype=torch.int32, device=wrong.device)
    # With union = 1 the step is 1 or, class absent, 0.
    background_step = remaining.to(dtype) / (union - 1).clamp_(min=1)
    return torch.where(foreground, 1, background_step) / union


def _negative_log_likelihood(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return -log p_y, (B, H, W), 0 at ignored pixels, and which pixels are valid, (B, H, W) bool."""
    labels = _checked_labels(logits, labels, ignore_index)
    log_probs = F.log_softmax(_at_least_float32(logits), dim=1)
    nll = F.nll_loss(log_probs, labels, ignore_index=ignore_index, reduction="none")
    return nll, labels != ignore_index


def _reverse_from_nll(nll: Tensor, valid: Tensor, epsilon: float) -> Tensor:
    """Return (1 - p_y)(-log eps) + p_y(-log(1 + eps)), given -log p_y, (B, H, W); 0 at ignored pixels."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, or the reverse cross entropy is infinite; got {epsilon}")
    # 1 - p_y without cancellation. It is 0 at ignored pixels, only the constant needs the mask.
    absent = -torch.expm1(-nll)
    return absent * (math.log1p(epsilon) - math.log(epsilon)) - math.log1p(epsilon) * valid


def _mean_over_valid(values: Tensor, valid: Tensor, weights: Tensor | None) -> Tensor:
    """Weigh (B, H, W) values, 0 at ignored pixels, and divide their sum by the number of valid pixels."""
    if weights is not None:
        shaped = weights[:, None, None] if weights.ndim == 1 else weights  # one dimension: one weight per image
        try:
            values = values * shaped.expand_as(values)
        except RuntimeError:
            raise ValueError(
                f"weights {tuple(weights.shape)} fit neither the images nor the pixels of labels {tuple(valid.shape)}"
            ) from None
    return values.sum() / valid.sum().clamp(min=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _checked_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the labels as int64 or raise a ValueError that names what is wrong."""
    batch, n_classes, *size = logits.shape
    if labels.shape != (batch, *size) or len(size) != 2:
        raise ValueError(
            f"logits {tuple(logits.shape)} need labels {(batch, *size)}, got {tuple(labels.shape)}: "
            "resize the logits to the labels first"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integer class ids, got {labels.dtype}")
    labels = labels.long()
    # Elsewhere the check would make the host wait for the device in every step.
    if labels.device.type == "cpu":
        wrong = ((labels < 0) | (labels >= n_classes)) & (labels != ignore_index)
        if wrong.any():
            raise ValueError(
                f"label {labels[wrong][0].item()} is neither a class 0..{n_classes - 1} nor ignore_index {ignore_index}"
            )
    return labels
