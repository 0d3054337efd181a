"""Views: each is undone exactly, and their mean is the plain mean."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from hf_seg.inference.tta import _PRESETS, TTA_PRESETS, View, average_views

EVERY_VIEW = [(name, index) for name in TTA_PRESETS for index in range(len(_PRESETS[name]))]


def ramp(height: int, width: int) -> Tensor:
    """(3, height, width) in which every value stands once, all exact in float32."""
    return torch.arange(3.0 * height * width).reshape(3, height, width) / 1024


def split_pixels(image: Tensor) -> Tensor:
    """A prediction that turns with its image: two classes from each pixel's value alone."""
    share = image[0] % 1
    return torch.stack([share, 1 - share])


@pytest.mark.parametrize(("preset", "index"), EVERY_VIEW)
def test_inverting_a_view_gives_the_image_back(preset: str, index: int) -> None:
    view, image = _PRESETS[preset][index], ramp(10, 7)
    restored = view.invert(view.apply(image), 10, 7)
    if view.scale == 1:
        assert torch.equal(restored, image)
    else:  # what was resized comes back to its place, smoothed: a plane stays a plane, but at the border
        assert restored.shape == image.shape
        torch.testing.assert_close(restored[:, 2:-2, 2:-2], image[:, 2:-2, 2:-2], rtol=0, atol=0.002)


def test_the_eight_views_of_d4_are_all_different() -> None:
    image = ramp(6, 6)
    shown = {tuple(view.apply(image).flatten().tolist()) for view in _PRESETS["d4"]}
    assert len(shown) == 8


def test_flips_are_identity_both_mirrors_and_the_half_turn() -> None:
    image = ramp(3, 5)
    shown = [view.apply(image) for view in _PRESETS["flips"]]
    wanted = [image, torch.fliplr(image[0])[None], torch.flipud(image[0])[None], torch.rot90(image, 2, (1, 2))]
    for view, expected in zip(shown, wanted, strict=True):
        assert torch.equal(view[0], expected[0])


@pytest.mark.parametrize("preset", ["none", "flips", "d4"])
def test_a_prediction_that_turns_with_its_image_is_not_changed(preset: str) -> None:
    image = ramp(9, 14)
    assert torch.equal(average_views(split_pixels, image, preset), split_pixels(image))


def test_the_result_is_the_mean_over_the_views() -> None:
    """A prediction that follows the place in the picture, whatever is in it, is mirrored and averaged away."""

    def left_to_right(image: Tensor) -> Tensor:
        return torch.arange(image.shape[-1], dtype=torch.float32).expand(1, *image.shape[-2:])

    image = ramp(4, 5)
    assert torch.equal(average_views(left_to_right, image, "none"), left_to_right(image))
    assert torch.equal(average_views(left_to_right, image, "flips"), torch.full((1, 4, 5), 2.0))
    both = average_views(left_to_right, image, "d4")  # half of the views run along the other axis, to 3 instead of 4
    assert torch.equal(both, torch.full((1, 4, 5), (2.0 + 1.5) / 2))


def test_none_is_the_prediction_bit_for_bit_and_leaves_it_alone() -> None:
    image = torch.rand(3, 8, 6, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    result = average_views(lambda shown: shown, image, "none")
    assert torch.equal(result, before)
    result += 1
    assert torch.equal(image, before)


def test_paper_shows_six_sizes_four_times_each() -> None:
    sizes = []

    def predict(image: Tensor) -> Tensor:
        sizes.append(tuple(image.shape[-2:]))
        return torch.full((2, *image.shape[-2:]), 0.5)

    result = average_views(predict, torch.zeros(3, 64, 40), "paper")
    expected = [(32, 20), (48, 30), (64, 40), (80, 50), (96, 60), (112, 70)]
    assert sizes == [size for size in expected for _ in range(4)]
    assert torch.equal(result, torch.full((2, 64, 40), 0.5))


def test_probabilities_still_sum_to_one_after_all_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    result = average_views(
        lambda shown: torch.rand(5, *shown.shape[-2:], generator=generator).softmax(0), torch.zeros(3, 33, 47), "paper"
    )
    torch.testing.assert_close(result.sum(0), torch.ones(33, 47))


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.75])
def test_a_view_zooms_as_training_does(scale: float) -> None:
    image = np.random.default_rng(0).random((40, 24), dtype=np.float32)
    shown = View(scale).apply(torch.from_numpy(image)[None])[0].numpy()
    resized = cv2.resize(image, (round(24 * scale), round(40 * scale)), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(shown, resized, atol=1e-5)


def test_an_image_of_one_pixel_has_every_view() -> None:
    image = torch.full((3, 1, 1), 0.25)
    for preset in TTA_PRESETS:
        assert torch.equal(average_views(split_pixels, image, preset), split_pixels(image)), preset


def test_unknown_views_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown preset 'flip'; choose one of none, flips, d4, paper"):
        average_views(split_pixels, ramp(4, 4), "flip")


def test_maps_of_another_size_than_their_view_are_refused() -> None:
    with pytest.raises(ValueError, match=r"maps of \(4, 6\) pixels, got \(3, 1, 1\)"):
        average_views(lambda shown: shown[:, :1, :1], ramp(4, 6), "none")
