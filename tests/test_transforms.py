"""Properties of the training transforms, on images whose pixel values encode their position."""

from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_seg.data.transforms import (
    RandomScaledCrop,
    ResolutionAlignment,
    SARJitter,
    SARSpeckle,
    align_resolution,
    optical_transform,
    sar_transform,
)
from hf_seg.errors import UserError
from hf_seg.hub.export import image_processor
from hf_seg.labels import IGNORE_INDEX
from hf_seg.normalization import to_image, to_pixel_values


def position_image(height: int = 200, width: int = 200) -> np.ndarray:
    """(H, W, 3) uint8 whose channels are row, column and 1."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.ones_like(rows)], 2).astype(np.uint8)


def crop(
    image: np.ndarray, mask: np.ndarray, size: int, scale: tuple[float, float], seed: int = 0, share: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    transform = A.Compose([RandomScaledCrop(size, scale, share)])
    transform.set_random_seed(seed)
    result = transform(image=image, mask=mask)
    return result["image"], result["mask"]


def random_tile(seed: int = 0, size: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size), np.uint8)
    return image, rng.integers(0, 9, (size, size), np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_a_crop_of_zoom_1_is_a_plain_cut(seed: int) -> None:
    image = position_image()
    cut, mask = crop(image, image[..., 0], 64, (1, 1), seed)
    top, left = cut[0, 0, :2]
    np.testing.assert_array_equal(cut, image[top : top + 64, left : left + 64])
    np.testing.assert_array_equal(mask, cut[..., 0])


def test_crops_reach_every_corner_of_the_image() -> None:
    image = position_image(80, 72)
    corners = {tuple(crop(image, image[..., 0], 64, (1, 1), seed)[0][0, 0, :2].tolist()) for seed in range(2000)}
    assert corners == {(top, left) for top in range(17) for left in range(9)}


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.9, 1.3, 1.77, 2.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_label_stay_aligned_at_any_zoom(scale: float, axis: int) -> None:
    position = position_image()[..., axis]
    inner = slice(4, -4)  # at the rim bilinear sampling repeats the last pixel
    offsets = []
    for seed in range(6):
        cut, mask = crop(position.astype(np.float32), position, 64, (scale, scale), seed)
        offsets.append(scale * (mask - cut)[inner, inner])  # in pixels of the crop
    assert np.abs(offsets).max() <= scale / 2 + 0.1  # the nearest pixel is half a pixel away
    # where every second pixel is taken, two are equally near: a quarter of the crop's pixel off
    assert abs(np.mean(offsets)) <= (0.25 if scale == 0.5 else 0.02)


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
def test_a_crop_shows_one_over_zoom_of_the_pixels(scale: float) -> None:
    cut, _ = crop(position_image(), position_image()[..., 0], 64, (scale, scale))
    rows = cut[4:-4, 32, 0].astype(float)
    assert np.polyfit(np.arange(len(rows)), rows, 1)[0] == pytest.approx(1 / scale, rel=0.02)


def test_the_zoom_is_uniform_in_its_range() -> None:
    transform = RandomScaledCrop(64, (0.5, 2.0))
    transform.set_random_seed(0)
    sides = np.array([transform.get_params_dependent_on_data({"shape": (200, 200)}, {})["side"] for _ in range(3000)])
    zooms = 64 / sides
    assert (sides.min(), sides.max()) == (32, 128)
    assert zooms.mean() == pytest.approx(1.25, abs=0.03)
    assert np.quantile(zooms, [0.25, 0.75]) == pytest.approx([0.875, 1.625], abs=0.05)


@pytest.mark.parametrize("shape", [(40, 50), (100, 20), (20, 100), (1, 30)])
def test_pixels_outside_the_image_are_black_and_ignored(shape: tuple[int, int]) -> None:
    image, label = position_image(*shape), np.full(shape, 3, np.uint8)
    for seed in range(8):
        cut, mask = crop(image, label, 64, (1, 1), seed)
        inside = cut[..., 2] == 1
        np.testing.assert_array_equal(mask == 3, inside)
        np.testing.assert_array_equal(mask == IGNORE_INDEX, ~inside)
        assert not cut[~inside].any()
        assert inside.sum() == min(shape[0], 64) * min(shape[1], 64)


def test_a_small_image_lies_anywhere_in_the_crop() -> None:
    image = position_image(40, 40)
    tops = {int(crop(image, image[..., 0], 64, (1, 1), seed)[0][..., 2].any(1).argmax()) for seed in range(300)}
    assert tops == {*range(25)}


@pytest.mark.parametrize("side", [30, 200])
def test_a_crop_has_its_size_and_type_whatever_the_image(side: int) -> None:
    label = np.zeros((side, side), np.uint8)
    for image in (position_image(side, side), position_image(side, side)[..., 0], position_image(side, side)[..., :1]):
        for seed in range(5):
            cut, mask = crop(image, label, 96, (0.5, 2.0), seed)
            assert (cut.shape, mask.shape) == ((96, 96, *image.shape[2:]), (96, 96))
            assert cut.dtype == mask.dtype == np.uint8


def largest_share(mask: np.ndarray) -> float:
    counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=9)
    return float(counts.max() / max(counts.sum(), 1))


def test_a_crop_of_one_class_is_redrawn() -> None:
    label = np.ones((200, 200), np.uint8)
    label[:, 150:] = 2  # a plain draw of 32 pixels is mixed in about one of five
    image = position_image()
    free = [largest_share(crop(image, label, 32, (1, 1), seed)[1]) for seed in range(100)]
    limited = [largest_share(crop(image, label, 32, (1, 1), seed, 0.75)[1]) for seed in range(100)]
    assert np.mean(np.array(free) > 0.75) > 0.8
    assert np.mean(np.array(limited) > 0.75) < 0.6
    assert limited != free


def test_an_image_without_a_suitable_crop_still_gives_one() -> None:
    label = np.ones((100, 100), np.uint8)
    assert (crop(position_image(100, 100), label, 32, (1, 1), 0, 0.5)[1] == 1).all()
    label[:] = IGNORE_INDEX
    assert (crop(position_image(100, 100), label, 32, (1, 1), 0, 0.5)[1] == IGNORE_INDEX).all()


@pytest.mark.parametrize("share", [0.75, 1.0])
def test_a_crop_without_a_labelled_pixel_is_redrawn(share: float) -> None:
    label = np.full((200, 200), IGNORE_INDEX, np.uint8)
    label[:120, :60:2], label[:120, 1:60:2] = 1, 2  # a plain draw of 32 pixels has labels in about one of four
    transform = A.Compose([RandomScaledCrop(32, (1, 1), share)])
    labelled = {"mask": 0, "masks": 0}
    for key in labelled:
        for seed in range(100):
            transform.set_random_seed(seed)
            result = transform(image=position_image(), **{key: label if key == "mask" else [label]})
            mask = result["mask"] if key == "mask" else result["masks"][0]
            labelled[key] += bool((mask != IGNORE_INDEX).any())
    assert labelled["mask"] > 85
    assert labelled["masks"] < 40  # these are no labels to redraw by


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    label = np.full((64, 64), IGNORE_INDEX, np.uint8)
    label[:4, :4], label[4:8, :4] = 1, 2
    plain = [crop(position_image(64, 64), label, 60, (1, 1), seed)[0] for seed in range(30)]
    limited = [crop(position_image(64, 64), label, 60, (1, 1), seed, 0.9)[0] for seed in range(30)]
    shares = [largest_share(crop(position_image(64, 64), label, 60, (1, 1), seed, 0.9)[1]) for seed in range(30)]
    np.testing.assert_array_equal(plain[0], limited[0])
    assert max(shares) <= 0.9


@pytest.mark.parametrize("make", [sar_transform, optical_transform])
def test_the_seed_alone_makes_a_sample(make: type) -> None:
    image, label = random_tile()
    image = np.stack([image] * 3, 2) if make is optical_transform else image
    first, second = make(32), make(32)

    def sample(transform: A.Compose, seed: int) -> bytes:
        transform.set_random_seed(seed)
        result = transform(image=image, mask=label)
        return bytes(result["image"].tobytes() + result["mask"].tobytes())

    forward = [sample(first, seed) for seed in range(20)]
    backward = [sample(second, seed) for seed in reversed(range(20))]
    assert forward == backward[::-1]
    assert len(set(forward)) == 20


def test_the_eight_orientations_are_all_drawn_and_the_label_turns_along() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(3, 3).repeat(32, 0).repeat(32, 1)
    transform = sar_transform(96, scale_range=(1, 1), jitter_prob=0)
    seen = set()
    for seed in range(100):
        transform.set_random_seed(seed)
        result = transform(image=image, mask=image)
        np.testing.assert_array_equal(result["image"], result["mask"])
        seen.add(result["image"].tobytes())
    expected = {np.rot90(flipped, k).tobytes() for flipped in (image, image.T) for k in range(4)}
    assert seen == expected
    assert len(seen) == 8


@pytest.mark.parametrize("radiometry", [SARJitter(p=1), SARJitter(gain=3, gamma=1, p=1), SARSpeckle((1, 2), p=1)])
def test_sar_radiometry_keeps_zeros_and_adds_none(radiometry: A.ImageOnlyTransform) -> None:
    image = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    transform = A.Compose([radiometry])
    for seed in range(20):
        transform.set_random_seed(seed)
        changed = transform(image=image, mask=image)
        np.testing.assert_array_equal(changed["image"] == 0, image == 0)
        np.testing.assert_array_equal(changed["mask"], image)
        assert (changed["image"] != image).any()


def test_jitter_is_gain_times_gamma_about_mid_grey() -> None:
    image = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    jitter = SARJitter()
    np.testing.assert_array_equal(jitter.apply(image, 1.0, 1.0), image)
    doubled = jitter.apply(image, 2.0, 1.0)[0]
    np.testing.assert_array_equal(doubled, np.minimum(2 * np.arange(256), 255))
    curved = jitter.apply(image, 1.0, 0.5)[0]
    assert (curved[0], curved[32], curved[128]) == (0, 64, 128)
    assert (np.diff(jitter.apply(image, 0.8, 1.2)[0].astype(int)) >= 0).all()


def test_jitter_draws_gain_and_gamma_symmetrically_in_their_logarithm() -> None:
    jitter = SARJitter(gain=0.2, gamma=0.3)
    jitter.set_random_seed(0)
    logs = np.log([[*jitter.get_params().values()] for _ in range(2000)])
    assert np.abs(logs).max(0) == pytest.approx([0.2, 0.3], rel=0.01)
    assert np.abs(logs).max(0)[0] <= 0.2
    assert logs.mean(0) == pytest.approx([0, 0], abs=0.02)


@pytest.mark.parametrize("looks", [1.0, 4.0, 8.0, 32.0])
def test_speckle_is_multiplicative_with_unit_mean(looks: float) -> None:
    image = np.full((400, 400), 60, np.uint8)
    speckle = SARSpeckle((looks, looks), p=1)
    speckle.set_random_seed(0)
    noisy = speckle.apply(image, looks).astype(float) / 60
    assert noisy.mean() == pytest.approx(1, abs=0.015)
    assert noisy.std() == pytest.approx(0.5 / np.sqrt(looks), rel=0.1)  # of the root of Gamma(L, 1 / L)
    neighbours = np.corrcoef(noisy[:, 1:].ravel(), noisy[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.02


def test_speckle_is_one_field_for_all_bands() -> None:
    image = np.full((16, 16, 3), 60, np.uint8)
    transform = A.Compose([SARSpeckle(p=1)])
    noisy = transform(image=image)["image"]
    assert noisy.shape == image.shape
    assert (noisy == noisy[..., :1]).all()
    assert noisy.std() > 0


def test_each_probability_switches_its_transform() -> None:
    image, label = random_tile(size=64)
    changed = {}
    for name, settings in {"none": {}, "jitter": {"jitter_prob": 1.0}, "speckle": {"speckle_prob": 1.0}}.items():
        transform = sar_transform(64, scale_range=(1, 1), **{"jitter_prob": 0.0, "speckle_prob": 0.0} | settings)
        transform.set_random_seed(0)
        result = transform(image=image, mask=label)["image"]
        changed[name] = not np.array_equal(np.bincount(result.ravel(), minlength=256), np.bincount(image.ravel()))
    assert changed == {"none": False, "jitter": True, "speckle": True}


def test_optical_jitter_changes_colours_and_never_labels() -> None:
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (64, 64, 3), np.uint8), rng.integers(0, 9, (64, 64), np.uint8)
    plain, jittered = (optical_transform(64, scale_range=(0.5, 2), jitter_prob=p) for p in (0.0, 1.0))
    for seed in range(10):
        for transform in (plain, jittered):
            transform.set_random_seed(seed)
        before, after = plain(image=image, mask=label), jittered(image=image, mask=label)
        np.testing.assert_array_equal(before["mask"], after["mask"])
        assert (before["image"] != after["image"]).any()


def test_optical_jitter_has_the_released_ranges() -> None:
    jitter = optical_transform(32, jitter_prob=1.0).transforms[-1]
    jitter.set_random_seed(0)
    draws = [jitter.get_params() for _ in range(2000)]
    for name, (low, high) in {
        "hue": (-0.1, 0.1),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "brightness": (0.8, 1.2),
    }.items():
        values = [draw[name] for draw in draws]
        assert (min(values), max(values)) == pytest.approx((low, high), abs=0.005), name


def test_the_hue_is_counted_as_a_share_of_the_circle() -> None:
    """OpenCV counts 180 steps, so a tenth of the circle turns pure red by the released 18."""
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    keep = (1, 1)
    turned = A.Compose([A.ColorJitter(keep, keep, keep, hue=(0.1, 0.1), p=1)])(image=red)["image"]
    assert cv2.cvtColor(turned, cv2.COLOR_RGB2HSV)[0, 0].tolist() == [18, 255, 255]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def aligned(image: np.ndarray, mask: np.ndarray, seed: int = 0, **settings: object) -> tuple[np.ndarray, np.ndarray]:
    transform = A.Compose([ResolutionAlignment(**{"p": 1, **settings})])
    transform.set_random_seed(seed)
    result = transform(image=image, mask=mask)
    return result["image"], result["mask"]


def test_resolution_alignment_is_bilinear_down_and_up() -> None:
    image, mask = random_tile()
    small = cv2.resize(image, (20, 20), interpolation=cv2.INTER_LINEAR)
    expected = cv2.resize(small, (80, 80), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(align_resolution(image, 0.25), expected)
    assert np.array_equal(aligned(image, mask, scale_range=(0.25, 0.25))[0], expected)
    assert np.array_equal(align_resolution(image, 1.0), image)


@pytest.mark.parametrize("resampling", ["bilinear", "area"])
def test_area_resampling_averages_blocks_and_bilinear_does_not(resampling: str) -> None:
    """By a third and back, the centre of each block of 3 x 3 keeps the value of the small image."""
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    means = image.reshape(20, 3, 30, 3, 3).mean((1, 3))
    transform = ResolutionAlignment((1 / 3, 1 / 3), resampling=resampling, p=1)
    centres = A.Compose([transform])(image=image)["image"][1::3, 1::3].astype(float)
    difference = np.abs(centres - means)
    assert difference.max() <= 0.51 if resampling == "area" else difference.mean() > 30  # the middle pixel alone


def test_an_unknown_resampling_is_an_error_that_names_the_choice() -> None:
    with pytest.raises(UserError, match=r"^unknown resampling 'nearest'; choose one of bilinear, area$"):
        align_resolution(random_tile()[0], 0.5, "nearest")


@pytest.mark.parametrize("shape", [(80, 80), (61, 97)])
def test_resolution_alignment_keeps_size_and_labels(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image, mask = rng.integers(0, 256, (*shape, 3), dtype=np.uint8), rng.integers(0, 9, shape, dtype=np.uint8)
    for seed in range(10):
        blurred, labels = aligned(image, mask, seed)
        assert blurred.shape == image.shape and blurred.dtype == np.uint8
        assert np.array_equal(labels, mask)
        assert blurred.std() < 0.8 * image.std()


def test_resolution_alignment_draws_its_ratio_uniformly() -> None:
    transform = ResolutionAlignment((0.1, 0.5))
    transform.set_random_seed(0)
    ratios = np.array([transform.get_params()["ratio"] for _ in range(2000)])
    assert (ratios.min(), ratios.max()) == pytest.approx((0.1, 0.5), abs=0.005)
    assert np.histogram(ratios, 4)[0] == pytest.approx(500, abs=80)


def test_resolution_alignment_has_its_probability() -> None:
    image, mask = random_tile()
    for p in (0.0, 0.2):
        transform = A.Compose([ResolutionAlignment((0.2, 0.3), p=p)])
        transform.set_random_seed(3)
        changed = [not np.array_equal(transform(image=image, mask=mask)["image"], image) for _ in range(500)]
        assert np.mean(changed) == pytest.approx(p, abs=0.05)


def test_released_form_zooms_image_and_label_alike() -> None:
    """With a ratio of 1 nothing is blurred, so position and label must still agree after the zoom."""
    image = position_image()
    mask = (image[..., 0] // 25).astype(np.uint8)
    sides = []
    for seed in range(20):
        zoomed, labels = aligned(image, mask, seed, scale_range=(1.0, 1.0), max_upscale=3.0)
        assert zoomed.shape == image.shape and labels.shape == mask.shape
        assert np.mean(labels == (zoomed[..., 0] + 0.5).astype(int) // 25) > 0.93  # but for rounding at the borders
        sides.append(np.ptp(zoomed[..., 1].astype(int)) + 1)
    assert 200 / 3 - 2 <= min(sides) < 100 and 150 < max(sides) <= 200


def test_resolution_alignment_is_part_of_a_transform_only_if_given() -> None:
    """Of the source, not of the target."""
    names = [type(t).__name__ for t in optical_transform(32, resolution_alignment=ResolutionAlignment()).transforms]
    assert names == ["RandomScaledCrop", "D4", "ResolutionAlignment", "ColorJitter"]
    assert "ResolutionAlignment" not in [type(t).__name__ for t in optical_transform(32).transforms]


def test_an_image_comes_back_from_its_pixel_values() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    assert np.array_equal(to_image(to_pixel_values(image)), image)


def test_a_crop_of_a_real_scene_is_a_turned_window_of_it(realdata: Path) -> None:
    name = min((realdata / "dfc25_track1/train/sar_images").glob("*.tif")).name
    sar, label = (
        rasterio.open(realdata / "dfc25_track1/train" / folder / name).read(1) for folder in ("sar_images", "labels")
    )
    transform = sar_transform(256, scale_range=(1, 1), jitter_prob=0)
    transform.set_random_seed(0)
    result = transform(image=sar, mask=label)
    scene, cut = (image.astype(int) * 256 + mask for image, mask in ((sar, label), (result["image"], result["mask"])))
    first_rows = np.lib.stride_tricks.sliding_window_view(scene, (1, 256))[: scene.shape[0] - 255, :, 0]
    places = [
        (turned, place)
        for turned in (np.rot90(flipped, k) for flipped in (cut, cut.T) for k in range(4))
        for place in np.argwhere((first_rows == turned[0]).all(-1)).tolist()
    ]
    assert len(places) == 1
    turned, (top, left) = places[0]
    np.testing.assert_array_equal(turned, scene[top : top + 256, left : left + 256])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixel_values_are_those_of_the_saved_image_processor(tmp_path: Path, mode: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 53) if mode == "L" else (37, 53, 3), np.uint8)
    image.flat[:2] = 0, 255
    image_processor(64).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(Image.fromarray(image).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    ours = to_pixel_values(image)
    assert (ours.shape, ours.dtype) == ((3, 37, 53), torch.float32)
    assert ours.is_contiguous()
    assert torch.equal(ours, theirs)


def test_pixel_values_are_normalised_by_imagenet() -> None:
    values = to_pixel_values(np.array([[0, 255]], np.uint8))[:, 0]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(values, torch.stack([-mean / std, (1 - mean) / std], 1))
