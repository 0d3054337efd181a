"""Prediction of whole tiles: no views changes nothing, views are averaged, class 0 never wins."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_seg.data.dataloaders import LabelledImages
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.normalization import to_pixel_values
from hf_seg.training.evaluation import draw_results, evaluate_network, predict_image, predict_probs

WINDOW = {"window": 32, "stride": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    return SegmentationNetwork(build_model("toy-segformer", crop_size=32, from_scratch=True)).eval()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_without_views_a_map_is_the_argmax_of_its_windows(
    network: SegmentationNetwork, accelerator: Accelerator, image: np.ndarray
) -> None:
    with torch.inference_mode():
        probs = sliding_window_probs(lambda windows: network(windows).logits, to_pixel_values(image), **WINDOW)
    prediction = predict_image(network, image, accelerator, **WINDOW)
    assert prediction.dtype == np.uint8
    assert np.array_equal(prediction, probs[1:].argmax(0).numpy() + 1)
    found = predict_probs(network, image, accelerator, **WINDOW)
    assert torch.equal(found[1:], probs[1:])
    assert not found[0].any()


def test_views_are_averaged(network: SegmentationNetwork, accelerator: Accelerator, image: np.ndarray) -> None:
    shown = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    single = [predict_probs(network, each, accelerator, **WINDOW) for each in shown]
    mean = (single[0] + single[1].flip(2) + single[2].flip(1) + single[3].flip(1, 2)) / 4
    torch.testing.assert_close(predict_probs(network, image, accelerator, **WINDOW, views="flips"), mean)
    assert not torch.allclose(single[0], mean, atol=1e-4)


@pytest.mark.parametrize("views", ["none", "flips", "d4", "paper"])
def test_class_0_never_wins_even_where_nothing_is_left_for_the_others(
    views: str, accelerator: Accelerator, image: np.ndarray
) -> None:
    network = SegmentationNetwork(build_model("toy-segformer", crop_size=32, from_scratch=True)).eval()
    with torch.no_grad():
        network.model.decode_head.classifier.bias[0] = 1e4
    prediction = predict_image(network, image, accelerator, **WINDOW, views=views)
    assert set(np.unique(prediction)) <= set(range(1, 9))


@pytest.fixture(scope="module")
def tiles(oem_sar: Path) -> LabelledImages:
    return LabelledImages(load_open_earth_map_sar(oem_sar, "val"), "sar")


def test_scores_are_of_the_chosen_views(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages
) -> None:
    found = {}
    results = evaluate_network(
        network,
        tiles,
        accelerator,
        **WINDOW,
        views="flips",
        on_prediction=lambda image_id, prediction, label: found.update({image_id: prediction}),
    )
    assert results["n_images"] == len(found) == 3
    for image_id, image, _ in tiles:
        expected = predict_image(network, image, accelerator, **WINDOW, views="flips")
        assert np.array_equal(found[image_id], expected)
        assert not np.array_equal(found[image_id], predict_image(network, image, accelerator, **WINDOW))


def test_a_network_in_training_is_scored_in_eval_mode_and_given_back(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages
) -> None:
    expected = evaluate_network(network, tiles, accelerator, **WINDOW)
    network.train()
    again = evaluate_network(network, tiles, accelerator, **WINDOW)
    assert network.training and again == expected
    network.eval()


def test_figures_name_the_image_and_show_the_chosen_views(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages, tmp_path: Path
) -> None:
    results = evaluate_network(network, tiles, accelerator, **WINDOW)
    drawn = {}
    for name, settings in {
        "default": {},
        "title": {"image_title": "optical"},
        "views": {"views": "flips"},
    }.items():
        draw_results(network, tiles, results, tmp_path / name, accelerator, **WINDOW, rows=1, **settings)
        drawn[name] = (tmp_path / name / "panel.png").read_bytes()
    assert len(set(drawn.values())) == 3
