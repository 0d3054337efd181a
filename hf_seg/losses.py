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
    nll, n_valid = _negative_log_likelihood(logits, labels, ignore_index)
    if weights is not None:
        nll = nll * _per_pixel(weights, labels)
    return nll.sum() / n_valid.clamp(min=1)


def reverse_cross_entropy(
    logits: Tensor, labels: Tensor, *, epsilon: float = 1e-4, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross entropy with prediction and label swapped (Wang et al. 2019; eq. 9).

    Bounded by -log(epsilon), so a confidently wrong label cannot dominate.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids.
        epsilon: label probability of the absent classes; keeps the log finite.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalar mean over valid pixels; 0 (with gradient) if there are none.

    Raises:
        ValueError: as `cross_entropy`, or `epsilon` not positive.
    """
    nll, n_valid = _negative_log_likelihood(logits, labels, ignore_index)
    return _reverse_from_nll(nll, n_valid, epsilon)


def lovasz_softmax(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Extend 1 - IoU to probabilities: the Lovász-softmax loss (Berman et al. 2018, eq. 8 and 9).

    The mean over the classes present in the labels of the whole batch. For a prediction of zeros and ones it equals the
    mean over those classes of 1 - IoU. Under data-parallel training each rank sees its local batch only, so the result
    depends on how the images are spread over the ranks.

    Keeps one tensor of the logits' shape for the backward pass, which is not differentiable a second time.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) integer class ids.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalar; 0 (with gradient) if no pixel is valid.

    Raises:
        ValueError: as `cross_entropy`.
    """
    labels = _checked_labels(logits, labels, ignore_index)
    return _LovaszSoftmax.apply(_at_least_float32(logits), labels, ignore_index)


def noise_robust_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ce_weight: float = 1.0,
    rce_weight: float = 1.0,
    lovasz_weight: float = 1.0,
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
        epsilon: see `reverse_cross_entropy`.
        ignore_index: label of the pixels without a class.

    Returns:
        Scalars: `loss`, to be differentiated, and the terms before weighting, detached, for the log: `ce`, `rce`,
        `lovasz` (0 where the weight is 0).

    Raises:
        ValueError: as `reverse_cross_entropy`, or a negative weight, or all weights 0.
    """
    factors = {"ce": ce_weight, "rce": rce_weight, "lovasz": lovasz_weight}
    if min(factors.values()) < 0 or not any(factors.values()):
        raise ValueError(f"loss weights must be >= 0 and not all 0, got {factors}")
    # Cast once, so that the gradients of the terms add up before they are rounded to half precision.
    logits = _at_least_float32(logits)
    terms: dict[str, Tensor] = {}
    if ce_weight or rce_weight:
        nll, n_valid = _negative_log_likelihood(logits, labels, ignore_index)
        if ce_weight:
            terms["ce"] = nll.sum() / n_valid.clamp(min=1)
        if rce_weight:
            terms["rce"] = _reverse_from_nll(nll, n_valid, epsilon)
    if lovasz_weight:
        terms["lovasz"] = lovasz_softmax(logits, labels, ignore_index=ignore_index)
    loss = torch.stack([factors[name] * term for name, term in terms.items()]).sum()
    return {"loss": loss} | {name: terms.get(name, torch.zeros_like(loss)).detach() for name in factors}


class _LovaszSoftmax(torch.autograd.Function):
    """Lovász-softmax with its gradient computed in the forward pass.

    The loss is linear in the errors while their order lasts, so the gradient is known as soon as they are sorted. Going
    class by class, only the gradient with respect to the logits is kept, 36 MiB per 1024 x 1024 x 9 image; automatic
    differentiation would keep permutation, errors and steps of all classes.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """Sort each class's errors; (B, C, H, W) logits, (B, H, W) int64 labels -> scalar."""
        ignored = (labels == ignore_index).flatten()
        # -1 is nobody's class, also when ignore_index is one of 0..C-1.
        labels = labels.flatten().masked_fill(ignored, -1)
        probs = logits.softmax(dim=1)
        grad_probs = torch.empty_like(probs)
        loss, n_present = probs.new_zeros(()), labels.new_zeros(())
        for index in range(logits.shape[1]):
            foreground = labels == index
            class_loss, class_grad = _lovasz_class(probs[:, index].flatten(), foreground, ignored)
            grad_probs[:, index] = class_grad.view_as(grad_probs[:, index])
            loss += class_loss
            n_present += foreground.any()
        n_present.clamp_(min=1)
        if ctx.needs_input_grad[0]:
            # Through the softmax: d/dz_k = p_k (g_k - sum_c p_c g_c).
            inner = (probs * grad_probs).sum(dim=1, keepdim=True)
            ctx.save_for_backward(grad_probs.sub_(inner).mul_(probs).div_(n_present))
        return loss / n_present

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient found in `forward`."""
        (grad_logits,) = ctx.saved_tensors
        return grad_logits * grad_output, None, None


def _lovasz_class(probs: Tensor, foreground: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Compute one class's Lovász extension of 1 - IoU and its gradient; both 0 where the class is absent.

    With the errors in descending order, their coefficients are the steps of the Jaccard loss as the pixels turn wrong
    one after the other. With `remaining` foreground pixels still right and `union`, both after the step, a step is
    1 / union at a foreground pixel and remaining / (union (union - 1)) elsewhere. This form has no cancellation; the
    difference of neighbouring Jaccard values loses float32 digits with every further pixel.

    Args:
        probs: (N,) probabilities of the class.
        foreground: (N,) bool, the pixels of the class.
        ignored: (N,) bool.

    Returns:
        Scalar loss, and its (N,) gradient with respect to `probs`.
    """
    # Ignored pixels come last: no foreground remains there, so their steps are 0 without any mask.
    errors = (foreground.to(probs.dtype) - probs).abs_().masked_fill_(ignored, -1)
    errors, order = errors.sort(descending=True, stable=True)
    foreground = foreground[order]
    remaining = foreground.sum() - foreground.cumsum(0)
    union = remaining + torch.arange(1, len(remaining) + 1, device=remaining.device)
    # Counted in integers, since float32 stops counting at 2^24. With union = 1 the step is 1 or, class absent, 0.
    background_step = remaining.to(probs.dtype) / (union - 1).clamp_(min=1)
    steps = torch.where(foreground, 1, background_step) / union
    loss = (errors * steps).sum()
    return loss, torch.empty_like(probs).scatter_(0, order, torch.where(foreground, -steps, steps))


def _negative_log_likelihood(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return -log p_y, (B, H, W), 0 at ignored pixels, and the number of valid pixels, a scalar tensor."""
    labels = _checked_labels(logits, labels, ignore_index)
    log_probs = F.log_softmax(_at_least_float32(logits), dim=1)
    nll = F.nll_loss(log_probs, labels, ignore_index=ignore_index, reduction="none")
    return nll, (labels != ignore_index).sum()


def _reverse_from_nll(nll: Tensor, n_valid: Tensor, epsilon: float) -> Tensor:
    """Average (1 - p_y)(-log eps) + p_y(-log(1 + eps)), given -log p_y, over the valid pixels."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, or the reverse cross entropy is infinite; got {epsilon}")
    # 1 - p_y without cancellation. It is 0 at ignored pixels, so the sum needs no mask.
    absent = -torch.expm1(-nll).sum() / n_valid.clamp(min=1)
    # The same sum, ordered by 1 - p_y; the constant goes with the last valid pixel.
    return absent * (math.log1p(epsilon) - math.log(epsilon)) - math.log1p(epsilon) * n_valid.clamp(max=1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _per_pixel(weights: Tensor, labels: Tensor) -> Tensor:
    """Shape weights so that they broadcast to (B, H, W); one dimension means one weight per image."""
    shaped = weights[:, None, None] if weights.ndim == 1 else weights
    try:
        return shaped.expand_as(labels)
    except RuntimeError:
        raise ValueError(
            f"weights {tuple(weights.shape)} fit neither the images nor the pixels of labels {tuple(labels.shape)}"
        ) from None


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
