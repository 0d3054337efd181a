"""Laws of the losses, checked against formulas written anew."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.losses import (
    _lovasz_on_cpu,
    _lovasz_on_device,
    cross_entropy,
    lovasz_softmax,
    noise_robust_loss,
    reverse_cross_entropy,
)


def sum_of_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return noise_robust_loss(logits, labels)["loss"]


LOSSES = [cross_entropy, reverse_cross_entropy, lovasz_softmax, sum_of_losses]
Loss = Callable[[Tensor, Tensor], Tensor]


def random_batch(
    seed: int = 0, *, batch: int = 2, size: int = 13, ignored: float = 0.2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits that require a gradient and labels of the classes 1..8 with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, OPEN_EARTH_MAP.num_labels, size, size, generator=generator, dtype=dtype)
    labels = torch.randint(1, OPEN_EARTH_MAP.num_labels, (batch, size, size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE_INDEX
    return logits.requires_grad_(), labels


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def textbook_lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovász-softmax from its definition: one class at a time, valid pixels only, Jaccard loss of every prefix."""
    valid = labels != IGNORE_INDEX
    probs = logits.softmax(1).movedim(1, -1)[valid]
    losses = []
    for index in labels[valid].unique():
        truth = (labels[valid] == index).to(probs.dtype)
        errors = (truth - probs[:, index]).abs()
        order = errors.detach().argsort(descending=True, stable=True)
        truth = truth[order]
        wrong_foreground, wrong_background = truth.cumsum(0), (1 - truth).cumsum(0)
        jaccard_loss = 1 - (truth.sum() - wrong_foreground) / (truth.sum() + wrong_background)
        losses.append((errors[order] * jaccard_loss.diff(prepend=jaccard_loss.new_zeros(1))).sum())
    return torch.stack(losses).mean()


def test_cross_entropy_without_weights_is_torchs() -> None:
    logits, labels = random_batch()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    torch.testing.assert_close(gradient(cross_entropy(logits, labels), logits), gradient(expected, logits))


def test_weighted_cross_entropy_divides_by_the_number_of_valid_pixels() -> None:
    logits, labels = random_batch()
    pixel_weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))
    log_probs, total = logits.detach().log_softmax(1).numpy(), 0.0
    for b, y, x in np.argwhere(labels.numpy() != IGNORE_INDEX):
        total -= pixel_weights[b, y, x].item() * log_probs[b, labels[b, y, x], y, x]
    expected = total / int((labels != IGNORE_INDEX).sum())
    assert cross_entropy(logits, labels, weights=pixel_weights).item() == pytest.approx(expected, rel=1e-5)


def test_one_dimensional_weights_are_one_per_image_even_where_batch_and_width_agree() -> None:
    logits, labels = random_batch(batch=13, size=13)
    weights = torch.linspace(0, 1, 13)
    expected = cross_entropy(logits, labels, weights=weights[:, None, None].expand(13, 13, 13))
    assert torch.equal(cross_entropy(logits, labels, weights=weights), expected)
    assert not torch.isclose(cross_entropy(logits, labels, weights=weights[None, None, :]), expected)


def test_weights_of_another_batch_are_refused_with_their_shape() -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match=r"weights \(3,\) .* labels \(2, 13, 13\)"):
        cross_entropy(logits, labels, weights=torch.ones(3))


@pytest.mark.parametrize("epsilon", [1e-4, 1e-2])
def test_reverse_cross_entropy_is_cross_entropy_with_prediction_and_label_swapped(epsilon: float) -> None:
    logits, labels = random_batch(dtype=torch.float64)
    valid = labels != IGNORE_INDEX
    probs = logits.softmax(1).movedim(1, -1)[valid]
    one_hot = F.one_hot(labels[valid], OPEN_EARTH_MAP.num_labels).double()
    expected = -(probs * (one_hot + epsilon).log()).sum(1).mean()
    loss = reverse_cross_entropy(logits, labels, epsilon=epsilon)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_reverse_cross_entropy_is_bounded_by_minus_log_epsilon() -> None:
    labels = torch.ones(1, 4, 4, dtype=torch.long)
    confidently_wrong = 1e4 * F.one_hot(2 * labels, OPEN_EARTH_MAP.num_labels).movedim(-1, 1).float()
    assert reverse_cross_entropy(confidently_wrong, labels).item() == pytest.approx(-math.log(1e-4))
    assert cross_entropy(confidently_wrong, labels).item() == pytest.approx(1e4)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_an_epsilon_that_is_not_positive_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"epsilon must be > 0.*{epsilon}"):
        reverse_cross_entropy(*random_batch(), epsilon=epsilon)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_lovasz_and_its_gradient_are_the_textbooks(seed: int, ignored: float) -> None:
    logits, labels = random_batch(seed, ignored=ignored, dtype=torch.float64)
    loss, expected = lovasz_softmax(logits, labels), textbook_lovasz(logits, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def lovasz_of_all_pixels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Lovász-softmax and its gradient with a stable sort of all pixels of all classes, ignored ones last."""
    probs = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    grad = torch.zeros_like(probs)
    ignored = (labels == IGNORE_INDEX).flatten()
    loss, present = probs.new_zeros(()), labels[labels != IGNORE_INDEX].unique().tolist()
    for index in present:
        foreground = (labels == index).flatten()
        errors = (foreground.to(probs.dtype) - probs[:, index].flatten()).abs().masked_fill(ignored, -1)
        errors, order = errors.sort(descending=True, stable=True)
        foreground = foreground[order]
        remaining = foreground.sum() - foreground.cumsum(0)
        union = remaining + torch.arange(1, len(remaining) + 1)
        steps = torch.where(foreground, 1, remaining.to(probs.dtype) / (union - 1).clamp(min=1)) / union
        loss += (errors * steps).sum()
        class_grad = torch.empty_like(errors).scatter_(0, order, torch.where(foreground, -steps, steps))
        grad[:, index] = class_grad.view_as(labels)
    n_present = max(len(present), 1)
    grad = probs * (grad - (probs * grad).sum(1, keepdim=True)) / n_present
    return loss / n_present, grad.to(logits.dtype)


def lovasz_cases() -> dict[str, tuple[Tensor, Tensor]]:
    logits, labels = random_batch(size=64)
    logits = logits.detach()
    right = F.one_hot(labels.masked_fill(labels == IGNORE_INDEX, 0), OPEN_EARTH_MAP.num_labels).movedim(-1, 1).float()
    values = {
        "random": logits,
        "nearly uniform": 0.01 * logits,
        "all equal": 0 * logits,
        "few distinct values": logits.round(),
        "two distinct values": logits.sign(),
        "learned": logits + 8 * right,
        "saturated": 1e3 * logits,
        "saturated and right": 1e3 * right,
        "saturated and wrong": 1e3 * right.roll(1, 1),
        "float64": logits.double(),
        "float64 with few values": logits.double().round(),
        "float16": logits.half(),
        "bfloat16": logits.bfloat16(),
    }
    ignored = torch.full_like(labels, IGNORE_INDEX)
    corner = torch.zeros_like(labels, dtype=torch.bool)
    corner[0, 0, 0] = True
    others = {
        "all ignored": ignored,
        "none ignored": labels.masked_fill(labels == IGNORE_INDEX, 0),
        "one class": torch.full_like(labels, 3),
        "one class and ignored": labels.masked_fill(labels != IGNORE_INDEX, 3),
        "one valid pixel": ignored.masked_fill(corner, 3),
        "a class of one pixel": labels.masked_fill(labels == 1, 2).masked_fill(corner, 1),
    }
    return {name: (each, labels) for name, each in values.items()} | {
        name: (logits, each) for name, each in others.items()
    }


@pytest.mark.parametrize("case", lovasz_cases())
def test_lovasz_without_the_pixels_of_no_influence_is_that_of_all_pixels(case: str) -> None:
    values, labels = lovasz_cases()[case]
    logits = values.requires_grad_()
    loss, (expected, slope) = lovasz_softmax(logits, labels), lovasz_of_all_pixels(logits, labels)
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    actual = gradient(loss, logits)
    tolerance = 1e-6 if logits.dtype in (torch.float32, torch.float64) else torch.finfo(logits.dtype).eps
    assert (actual - slope).abs().max() <= tolerance * slope.abs().max()


def test_lovasz_on_another_device_is_that_on_a_cpu() -> None:
    for logits, labels in lovasz_cases().values():
        probs = logits.float().movedim(1, 0).flatten(1).softmax(0)
        ids = labels.flatten().masked_fill(labels.flatten() == IGNORE_INDEX, -1)
        loss, slope = _lovasz_on_device(probs, ids)
        expected, expected_slope = _lovasz_on_cpu(probs, ids)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("where", ["foreground", "background"])
def test_lovasz_of_not_a_number_is_not_a_number(where: str) -> None:
    logits, labels = random_batch()
    logits = logits.detach()
    y, x = (labels[0] != IGNORE_INDEX).nonzero()[0]
    logits[0, labels[0, y, x] if where == "foreground" else 0, y, x] = math.nan
    assert lovasz_softmax(logits, labels).isnan()


def test_lovasz_gradient_is_the_slope_of_the_loss() -> None:
    logits, labels = random_batch(batch=1, size=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: lovasz_softmax(z, labels), (logits,))


def test_lovasz_keeps_its_digits_in_float32_over_many_pixels() -> None:
    logits, labels = random_batch(batch=1, size=512)
    exact = logits.detach().double().requires_grad_()
    expected = gradient(lovasz_softmax(exact, labels), exact)
    actual = gradient(lovasz_softmax(logits, labels), logits)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_lovasz_of_a_hard_prediction_is_one_minus_iou() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(1, 6, (2, 16, 16), generator=generator)
    labels[:, :3] = IGNORE_INDEX
    predictions = torch.randint(0, OPEN_EARTH_MAP.num_labels, labels.shape, generator=generator)
    losses, valid = [], labels != IGNORE_INDEX
    for index in range(1, 6):
        truth, predicted = (labels == index) & valid, (predictions == index) & valid
        losses.append(1 - ((truth & predicted).sum() / (truth | predicted).sum()).item())
    logits = 1e4 * F.one_hot(predictions, OPEN_EARTH_MAP.num_labels).movedim(-1, 1).float()
    assert lovasz_softmax(logits, labels).item() == pytest.approx(np.mean(losses))


def test_lovasz_ranks_the_pixels_of_the_whole_batch_together() -> None:
    logits, labels = random_batch(size=16)
    side_by_side = torch.cat([*logits], dim=-1)[None], torch.cat([*labels], dim=-1)[None]
    whole = lovasz_softmax(logits, labels)
    apart = torch.stack([lovasz_softmax(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]).mean()
    torch.testing.assert_close(whole, lovasz_softmax(*side_by_side))
    assert abs(whole - apart) > 1e-4


def test_lovasz_saves_at_most_60_mib_per_megapixel_of_nine_classes() -> None:
    # A quarter of the megapixel: what is saved is proportional to the pixels.
    logits, labels = random_batch(batch=1, size=512)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = lovasz_softmax(logits, labels)
    assert 0 < 4 * sum(saved.values()) <= 60 * 2**20
    assert gradient(loss, logits).abs().sum() > 0


def test_lovasz_backward_scales_by_the_incoming_gradient_and_repeats() -> None:
    logits, labels = random_batch()
    once = gradient(lovasz_softmax(logits, labels), logits)
    scaled = -3 * lovasz_softmax(logits, labels)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(scaled, logits, retain_graph=True)[0], -3 * once)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_pixels_ignored_is_exactly_zero_with_a_zero_gradient(loss: Loss) -> None:
    logits, labels = random_batch(ignored=2)
    assert loss(logits, labels).item() == 0
    assert torch.equal(gradient(loss(logits, labels), logits), torch.zeros_like(logits))


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_have_neither_influence_nor_gradient(loss: Loss) -> None:
    logits, labels = random_batch()
    ignored = (labels == IGNORE_INDEX)[:, None].expand_as(logits)
    value, slope = loss(logits, labels), gradient(loss(logits, labels), logits)
    assert loss(torch.where(ignored, 100 * logits, logits), labels).item() == pytest.approx(value.item(), rel=1e-6)
    assert slope[ignored].abs().sum() == 0 < slope[~ignored].abs().sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_ignore_index_may_be_one_of_the_classes(loss: Loss) -> None:
    logits, labels = random_batch(ignored=0.3)
    as_background = labels.masked_fill(labels == IGNORE_INDEX, 0)
    assert torch.equal(lovasz_softmax(logits, as_background, ignore_index=0), lovasz_softmax(logits, labels))
    assert torch.equal(cross_entropy(logits, as_background, ignore_index=0), cross_entropy(logits, labels))
    assert not torch.isclose(loss(logits, as_background), loss(logits, labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("magnitude", [0.0, 1e4, -1e4])
def test_extreme_logits_give_finite_losses_and_gradients(loss: Loss, magnitude: float) -> None:
    logits, labels = random_batch()
    logits = (magnitude * logits.detach().sign()).requires_grad_()
    value = loss(logits, labels)
    assert value.isfinite() and gradient(value, logits).isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("size", "only_class"), [(1, 1), (1, 8), (5, 4)])
def test_a_single_class_or_pixel_is_learned(loss: Loss, size: int, only_class: int) -> None:
    logits = torch.zeros(1, OPEN_EARTH_MAP.num_labels, size, size, requires_grad=True)
    labels = torch.full((1, size, size), only_class)
    value = loss(logits, labels)
    slope = gradient(value, logits)
    assert value > 0 and slope.isfinite().all()
    assert (slope[:, only_class] < 0).all() and (slope.sum(1).abs() < 1e-6).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_under_autocast_are_scored_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    logits, labels = random_batch()
    half = logits.detach().to(dtype).requires_grad_()
    exact = half.detach().float().requires_grad_()
    expected = loss(exact, labels)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(half, labels)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.equal(gradient(value, half), gradient(expected, exact).to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_gpu_computes_the_losses_of_the_cpu_without_making_the_host_wait(loss: Loss) -> None:
    logits, labels = random_batch(size=64)
    expected = loss(logits, labels)
    on_gpu, labels_on_gpu = logits.detach().cuda().requires_grad_(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(on_gpu, labels_on_gpu)
        slope = gradient(value, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(slope.cpu(), gradient(expected, logits), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_equal(loss: Loss, dtype: torch.dtype) -> None:
    logits, labels = random_batch()
    assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("label", [OPEN_EARTH_MAP.num_labels, -1, 254])
def test_a_label_that_is_no_class_is_named(loss: Loss, label: int) -> None:
    logits, labels = random_batch()
    labels[1, 2, 3] = label
    with pytest.raises(ValueError, match=rf"label {label} is neither a class 0\.\.8 nor ignore_index 255"):
        loss(logits, labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_another_size_or_type_are_refused(loss: Loss) -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match=r"need labels \(2, 13, 13\), got \(2, 13, 12\): resize the logits"):
        loss(logits, labels[:, :, 1:])
    with pytest.raises(ValueError, match=r"integer class ids, got torch\.float32"):
        loss(logits, labels.float())


def test_noise_robust_loss_is_the_weighted_sum_of_its_terms() -> None:
    logits, labels = random_batch()
    alone = {
        "ce": cross_entropy(logits, labels),
        "rce": reverse_cross_entropy(logits, labels, epsilon=1e-3),
        "lovasz": lovasz_softmax(logits, labels),
    }
    losses = noise_robust_loss(logits, labels, ce_weight=3, rce_weight=0.5, lovasz_weight=2, epsilon=1e-3)
    expected = 3 * alone["ce"] + 0.5 * alone["rce"] + 2 * alone["lovasz"]
    torch.testing.assert_close({name: losses[name] for name in alone}, {k: v.detach() for k, v in alone.items()})
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(gradient(losses["loss"], logits), gradient(expected, logits))


def test_pixel_weights_multiply_the_cross_entropies_and_not_lovasz() -> None:
    logits, labels = random_batch(dtype=torch.float64)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[0] = 0
    losses = noise_robust_loss(logits, labels, rce_weight=0.5, weights=weights, epsilon=1e-2)
    valid = labels != IGNORE_INDEX
    log_probs = logits.log_softmax(1).movedim(1, -1)[valid]
    one_hot = F.one_hot(labels[valid], OPEN_EARTH_MAP.num_labels).double()
    ce = -(weights[valid] * (one_hot * log_probs).sum(1)).sum() / valid.sum()
    rce = -(weights[valid] * (log_probs.exp() * (one_hot + 1e-2).log()).sum(1)).sum() / valid.sum()
    lovasz = lovasz_softmax(logits, labels)
    expected = {"ce": ce.detach(), "rce": rce.detach(), "lovasz": lovasz.detach()}
    torch.testing.assert_close({name: losses[name] for name in expected}, expected)
    torch.testing.assert_close(gradient(losses["loss"], logits), gradient(ce + 0.5 * rce + lovasz, logits))
    torch.testing.assert_close(reverse_cross_entropy(logits, labels, weights=weights, epsilon=1e-2), rce)


def test_weights_of_one_change_nothing() -> None:
    logits, labels = random_batch()
    plain = noise_robust_loss(logits, labels)
    for weights in (torch.ones(2), torch.ones(labels.shape)):
        weighted = noise_robust_loss(logits, labels, weights=weights)
        assert all(torch.equal(weighted[name], plain[name]) for name in plain)


def test_lovasz_stride_is_the_loss_of_every_so_many_pixels() -> None:
    logits, labels = random_batch(size=13)
    fewer = logits[:, :, ::4, ::4], labels[:, ::4, ::4]
    loss, expected = lovasz_softmax(logits, labels, stride=4), lovasz_softmax(*fewer)
    assert torch.equal(loss, expected) and not torch.isclose(loss, lovasz_softmax(logits, labels))
    assert torch.equal(gradient(loss, logits), gradient(expected, logits))
    losses = noise_robust_loss(logits, labels, lovasz_stride=4)
    assert torch.equal(losses["lovasz"], expected)
    assert torch.equal(losses["ce"], noise_robust_loss(logits, labels)["ce"])
    with pytest.raises(ValueError, match=r"stride .* must be >= 1, got 0"):
        lovasz_softmax(logits, labels, stride=0)


@pytest.mark.parametrize("term", ["ce", "rce", "lovasz"])
def test_a_term_of_weight_zero_is_reported_as_zero_and_not_summed(term: str) -> None:
    logits, labels = random_batch()
    both = noise_robust_loss(logits, labels)
    weight_of = {"ce": 1.0, "rce": 1.0, "lovasz": 1.0} | {term: 0.0}
    without = noise_robust_loss(
        logits, labels, ce_weight=weight_of["ce"], rce_weight=weight_of["rce"], lovasz_weight=weight_of["lovasz"]
    )
    assert set(without) == {"loss", "ce", "rce", "lovasz"} and without[term].item() == 0
    torch.testing.assert_close(without["loss"], both["loss"] - both[term])


def test_only_the_loss_itself_holds_a_graph() -> None:
    losses = noise_robust_loss(*random_batch())
    assert {name for name, value in losses.items() if value.requires_grad} == {"loss"}


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, -1, 1)])
def test_weights_that_leave_nothing_to_learn_are_refused(weights: tuple[float, float, float]) -> None:
    ce, rce, lovasz = weights
    with pytest.raises(ValueError, match=f"'rce': {rce}"):
        noise_robust_loss(*random_batch(), ce_weight=ce, rce_weight=rce, lovasz_weight=lovasz)


def test_generalized_cross_entropy_lies_between_cross_entropy_and_the_absolute_error() -> None:
    logits, labels = random_batch()
    only = {"rce_weight": 0, "lovasz_weight": 0}
    p_label = logits.softmax(1).gather(1, labels.clamp(max=OPEN_EARTH_MAP.num_labels - 1)[:, None])[:, 0][
        labels != IGNORE_INDEX
    ]
    for q in (0.3, 0.7, 1.0):
        loss = noise_robust_loss(logits, labels, gce_q=q, **only)["loss"]
        assert loss.item() == pytest.approx(((1 - p_label**q) / q).mean().item(), rel=1e-5)
    near_zero = noise_robust_loss(logits, labels, gce_q=1e-3, **only)["loss"]
    assert near_zero.item() == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-2)


def test_a_wrong_exponent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gce_q must be from 0 to 1, got 1\.5"):
        noise_robust_loss(*random_batch(), gce_q=1.5)
