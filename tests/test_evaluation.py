"""Scores of whole tiles: those of the predictor's maps, of every network and of their average."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_seg.arguments import Stage2Arguments
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.samples import LabelledImages
from hf_seg.inference.load import use_network
from hf_seg.inference.predict import Predictor
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.normalization import to_pixel_values
from hf_seg.training.evaluation import draw_results, evaluate, evaluate_network

ARGS = Stage2Arguments(crop_size=32, eval_batch_size=4)


def toy(seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return SegmentationNetwork(build_model("toy-segformer", crop_size=32, from_scratch=True)).eval()


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    return toy()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiles(oem_sar: Path) -> LabelledImages:
    return LabelledImages(load_open_earth_map_sar(oem_sar, "val"), "sar")


def predictor_of(*networks: SegmentationNetwork, **settings: Any) -> Predictor:
    loaded = [use_network(each, crop_size=32) for each in networks]
    return Predictor(loaded, device=torch.device("cpu"), **settings)


def test_without_tta_a_map_is_the_argmax_of_its_windows(network: SegmentationNetwork, image: np.ndarray) -> None:
    window = {"window": 32, "stride": 16, "batch_size": 4}
    with torch.no_grad():
        probs = sliding_window_probs(lambda windows: network(windows).logits, to_pixel_values(image), **window)
    accumulator = predictor_of(network).predict(image)
    assert torch.equal(accumulator.probs(), probs)
    assert torch.equal(accumulator.label_map(), probs[1:].argmax(0) + 1)


def test_views_are_averaged(network: SegmentationNetwork, image: np.ndarray) -> None:
    shown = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    single = [predictor_of(network).predict(each).probs() for each in shown]
    mean = (single[0] + single[1].flip(2) + single[2].flip(1) + single[3].flip(1, 2)) / 4
    torch.testing.assert_close(predictor_of(network, tta="flips").predict(image).probs(), mean)
    assert not torch.allclose(single[0], mean, atol=1e-4)


@pytest.mark.parametrize("tta", ["none", "flips", "d4", "paper"])
def test_class_0_never_wins_even_where_nothing_is_left_for_the_others(tta: str, image: np.ndarray) -> None:
    network = toy()
    with torch.no_grad():
        network.model.decode_head.classifier.bias[0] = 1e4
    label_map = predictor_of(network, tta=tta).predict(image).label_map()
    assert set(label_map.unique().tolist()) <= set(range(1, 9))


def test_scores_are_of_the_predictors_maps(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages
) -> None:
    predictor, found = predictor_of(network, tta="flips"), {}
    results, _ = evaluate(
        predictor,
        tiles,
        accelerator,
        on_prediction=lambda sample, label_map, accumulator: found.update({sample.image_id: label_map}),
    )
    assert results["n_images"] == len(found) == 3
    counts = ConfusionMatrix()
    for image_id, image, label, _ in tiles:
        assert np.array_equal(found[image_id], predictor.predict(image).label_map())
        assert not np.array_equal(found[image_id], predictor_of(network).predict(image).label_map())
        counts.update(found[image_id], label)
    assert results["confusion_matrix"] == counts.matrix.tolist()


def test_each_network_is_scored_as_if_alone(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages
) -> None:
    networks = [network, toy(seed=1)]
    together, each = evaluate(predictor_of(*networks), tiles, accelerator)
    for one, scores in zip(networks, each, strict=True):
        alone, _ = evaluate(predictor_of(one), tiles, accelerator)
        assert alone == {**scores, "n_images": 3} != together


def test_a_network_in_training_is_scored_in_eval_mode_and_given_back(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages
) -> None:
    expected = evaluate_network(network, tiles, accelerator, ARGS)
    network.train()
    again = evaluate_network(network, tiles, accelerator, ARGS)
    assert network.training and again == expected
    network.eval()


def test_figures_name_the_image_and_show_the_predictors_maps(
    network: SegmentationNetwork, accelerator: Accelerator, tiles: LabelledImages, tmp_path: Path
) -> None:
    results = evaluate_network(network, tiles, accelerator, ARGS)
    drawn = {}
    for name, tta, titles in (
        ("default", "none", {}),
        ("title", "none", {"titles": ("optical", "label", "prediction")}),
        ("tta", "flips", {}),
    ):
        draw_results(predictor_of(network, tta=tta), tiles, results, tmp_path / name, **titles)
        drawn[name] = (tmp_path / name / "panel.png").read_bytes()
    assert len(set(drawn.values())) == 3
    assert not (tmp_path / "default" / "uncertainty.png").exists()
    draw_results(predictor_of(network), tiles, results, tmp_path / "more", with_uncertainty=True)
    assert (tmp_path / "more" / "uncertainty.png").exists()
