"""Laws of the blended sliding window."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_seg.inference.sliding_window import RowBlender, blend_weights, sliding_window_probs, window_starts

# (height, width, window, stride): tiling, overlapping, shifted back, one axis or both too small, single pixels.
GEOMETRIES = [
    (16, 16, 16, 8),
    (32, 48, 16, 16),
    (33, 47, 16, 8),
    (20, 29, 16, 5),
    (17, 40, 16, 16),
    (5, 40, 16, 12),
    (40, 3, 16, 7),
    (6, 7, 32, 16),
    (1, 1, 8, 4),
    (1, 9, 4, 1),
    (2, 2, 7, 7),
    (7, 5, 1, 1),
]


def random_image(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


def random_conv(kernel_size: int) -> torch.nn.Conv2d:
    generator = torch.Generator().manual_seed(1)
    conv = torch.nn.Conv2d(3, 5, kernel_size, padding=kernel_size // 2)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return conv


def recorded(forward: Callable[[Tensor], Tensor], seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def record(crops: Tensor) -> Tensor:
        seen.append(crops)
        return forward(crops)

    return record


@pytest.mark.parametrize(("height", "width", "window", "stride"), GEOMETRIES)
def test_a_constant_network_gives_a_constant_map(height: int, width: int, window: int, stride: int) -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 5.0])[:, None, None]
    probs = sliding_window_probs(
        lambda crops: logits.expand(len(crops), 4, window, window),
        random_image(height, width),
        window=window,
        stride=stride,
    )
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, logits.softmax(0).expand(4, height, width), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("height", "width", "window", "stride"), GEOMETRIES)
def test_a_pointwise_network_gives_the_map_of_one_full_pass(height: int, width: int, window: int, stride: int) -> None:
    image, forward = random_image(height, width), random_conv(1)
    probs = sliding_window_probs(forward, image, window=window, stride=stride, batch_size=3)
    torch.testing.assert_close(probs, forward(image[None])[0].softmax(0).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "window", "stride"), GEOMETRIES)
def test_windows_cover_every_pixel_and_leave_the_scene_nowhere(
    height: int, width: int, window: int, stride: int
) -> None:
    for length in (height, width):
        starts = window_starts(length, window, stride)
        covered = {pixel for start in starts for pixel in range(start, start + window)}
        assert covered == set(range(max(length, window)))
        assert all(0 < after - before <= stride for before, after in pairwise(starts))


def test_the_last_window_is_shifted_back_to_the_border() -> None:
    assert window_starts(20, 8, 8) == [0, 8, 12]
    assert window_starts(24, 8, 8) == [0, 8, 16]
    assert window_starts(16, 8, 4) == [0, 4, 8]
    assert window_starts(8, 8, 3) == window_starts(5, 8, 3) == [0]


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_the_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    image, forward = random_image(33, 47), random_conv(3)
    seen: list[Tensor] = []
    one_by_one = sliding_window_probs(forward, image, window=16, stride=8)
    batched = sliding_window_probs(recorded(forward, seen), image, window=16, stride=8, batch_size=batch_size)
    sizes = [len(crops) for crops in seen]
    assert sum(sizes) == 4 * 5 and max(sizes) == min(batch_size, 20)
    torch.testing.assert_close(batched, one_by_one, rtol=1e-5, atol=1e-6)
    again = sliding_window_probs(forward, image, window=16, stride=8, batch_size=batch_size)
    assert torch.equal(again, batched)


def test_an_image_of_the_windows_size_is_one_forward_pass() -> None:
    image, forward = random_image(16, 16), random_conv(3)
    probs = sliding_window_probs(forward, image, window=16, stride=4)
    torch.testing.assert_close(probs, forward(image[None])[0].softmax(0).detach(), rtol=1e-6, atol=1e-7)


def test_probabilities_are_averaged_with_the_blend_weights() -> None:
    crops_seen: list[float] = []

    def forward(crops: Tensor) -> Tensor:
        crops_seen.extend(crops[:, 0, 0, 0].tolist())
        certain = torch.tensor([1e3, 0.0] if len(crops_seen) == 1 else [0.0, 1e3])
        return certain[None, :, None, None].expand(1, 2, 8, 8)

    image = torch.arange(12.0).expand(1, 8, 12)
    first = sliding_window_probs(forward, image, window=8, stride=4)[0]
    left, right = blend_weights(8)[4:], blend_weights(8)[:4]
    expected = torch.cat([torch.ones(4), left / (left + right), torch.zeros(4)])
    assert crops_seen == [0, 4]
    torch.testing.assert_close(first, expected.expand(8, 12))
    assert (first.diff(dim=1) < 1e-6).all()


@pytest.mark.parametrize("window", [1, 2, 7, 8, 512, 4096])
def test_blend_weights_are_positive_symmetric_and_largest_in_the_middle(window: int) -> None:
    weights = blend_weights(window)
    assert weights.shape == (window,) and weights.dtype == torch.float32
    assert (weights > 0).all() and weights.max() <= 1 and weights.argmax() in ((window - 1) // 2, window // 2)
    torch.testing.assert_close(weights, weights.flip(0))
    assert (weights[: (window + 1) // 2].diff() > 0).all()


@pytest.mark.parametrize(("height", "width"), [(9, 12), (10, 16), (16, 11)])
def test_a_small_scene_is_extended_as_torch_reflects(height: int, width: int) -> None:
    image = random_image(height, width)
    seen: list[Tensor] = []
    sliding_window_probs(recorded(torch.nn.Identity(), seen), image, window=16, stride=16)
    assert torch.equal(seen[0], F.pad(image[None], (0, 16 - width, 0, 16 - height), mode="reflect"))


def test_a_reflection_longer_than_the_scene_goes_back_and_forth() -> None:
    seen: list[Tensor] = []
    image = torch.tensor([[[0.0, 1.0, 2.0]]])
    probs = sliding_window_probs(recorded(torch.nn.Identity(), seen), image, window=8, stride=8)
    assert seen[0][0, 0].tolist() == [[0, 1, 2, 1, 0, 1, 2, 1]] * 8
    assert probs.shape == (1, 1, 3)


def test_half_precision_logits_are_blended_in_float32() -> None:
    image, forward = random_image(20, 20), random_conv(1)
    probs = sliding_window_probs(lambda crops: forward(crops).bfloat16(), image, window=8, stride=5)
    expected = forward(image[None]).bfloat16()[0].float().softmax(0)
    torch.testing.assert_close(probs, expected, rtol=1e-5, atol=1e-6)


def test_no_graph_is_kept_and_the_image_is_left_alone() -> None:
    image, forward = random_image(20, 20), random_conv(3)
    before = image.clone()
    assert not sliding_window_probs(forward, image, window=8, stride=5).requires_grad
    assert torch.equal(image, before) and torch.is_grad_enabled()


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_leaves_gaps_or_stands_still_is_named(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride must be in 1\.\.window \(8\).*got {stride}"):
        sliding_window_probs(lambda crops: crops, random_image(20, 20), window=8, stride=stride)


def test_impossible_settings_and_wrong_logits_are_named() -> None:
    image = random_image(20, 20)
    with pytest.raises(ValueError, match="window 0"):
        sliding_window_probs(lambda crops: crops, image, window=0, stride=1)
    with pytest.raises(ValueError, match="length 0"):
        sliding_window_probs(lambda crops: crops, image[:, :0], window=8, stride=1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sliding_window_probs(lambda crops: crops, image, window=8, stride=8, batch_size=0)
    with pytest.raises(ValueError, match=r"\(C, H, W\) float, got \(1, 3, 20, 20\)"):
        sliding_window_probs(lambda crops: crops, image[None], window=8, stride=8)
    with pytest.raises(ValueError, match=r"logits \(1, K, 8, 8\), got \(1, 3, 2, 2\): resize them in forward"):
        sliding_window_probs(lambda crops: crops[:, :, ::4, ::4], image, window=8, stride=8)


def blender(image: Tensor, window: int, stride: int, *, valid: Tensor | None = None, **settings: Any) -> RowBlender:
    forward = random_conv(3)
    has_data = torch.ones(image.shape[1:], dtype=torch.bool) if valid is None else valid
    return RowBlender(
        lambda crops: forward(crops).softmax(1),
        lambda top, bottom: (image[:, top:bottom], has_data[top:bottom]),
        height=image.shape[1],
        width=image.shape[2],
        num_labels=5,
        window=window,
        stride=stride,
        **settings,
    )


@pytest.mark.parametrize("step", [1, 3, 32])
@pytest.mark.parametrize(("height", "width", "window", "stride"), GEOMETRIES)
def test_rows_from_the_top_have_the_bits_of_the_scene_in_memory(
    height: int, width: int, window: int, stride: int, step: int
) -> None:
    image = random_image(height, width)
    whole = sliding_window_probs(random_conv(3), image, window=window, stride=stride)
    by_row = blender(image, window, stride, max_rows=step)
    rows = [by_row.rows(min(top + step, height)) for top in range(0, height, step)]
    assert torch.equal(torch.cat(rows, dim=1), whole)


@pytest.mark.parametrize("first_row", [1, 8, 16, 17, 40, 46])
def test_rows_have_the_same_bits_wherever_the_work_begins(first_row: int) -> None:
    image = random_image(47, 21)
    whole = sliding_window_probs(random_conv(3), image, window=16, stride=5)
    part = blender(image, 16, 5, first_row=first_row, max_rows=47)
    assert torch.equal(part.rows(47), whole[:, first_row:])


def test_windows_without_data_are_not_predicted_and_change_no_pixel_that_has_data() -> None:
    image = random_image(48, 40)
    valid = torch.zeros(48, 40, dtype=torch.bool)
    valid[:20, 25:] = True
    done: list[int] = []
    forward = random_conv(3)
    seen: list[Tensor] = []
    by_row = RowBlender(
        recorded(lambda crops: forward(crops).softmax(1), seen),
        lambda top, bottom: (image[:, top:bottom], valid[top:bottom]),
        height=48,
        width=40,
        num_labels=5,
        window=16,
        stride=8,
        batch_size=3,
        max_rows=48,
        on_windows=done.append,
    )
    probs = by_row.rows(48)
    whole = sliding_window_probs(forward, image, window=16, stride=8)
    torch.testing.assert_close(probs[:, valid], whole[:, valid], rtol=1e-5, atol=1e-6)
    # of 5 x 4 windows those that begin above row 20 and end right of column 25
    assert sum(len(crops) for crops in seen) == 3 * 2 and sum(done) == 5 * 4


def test_rows_are_asked_for_in_order_and_a_few_at_a_time() -> None:
    by_row = blender(random_image(40, 20), 16, 8, max_rows=10)
    by_row.rows(10)
    with pytest.raises(ValueError, match="the next rows are 10 to 20 at most; asked for those up to 21"):
        by_row.rows(21)
    with pytest.raises(ValueError, match="asked for those up to 10"):
        by_row.rows(10)
