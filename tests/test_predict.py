"""Networks, loaded or at hand, as one function to class probabilities."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks, use_network
from hf_seg.inference.predict import Predictor, is_steady
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.inference.tta import average_views
from hf_seg.mapping.raster import find_networks
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.normalization import Normalization, to_pixel_values

CPU = torch.device("cpu")


def export_toy(folder: Path, seed: int, preset: str = "toy-segformer", crop_size: int = 32) -> Path:
    torch.manual_seed(seed)
    model = build_model(preset, crop_size=crop_size, from_scratch=True)
    export_model(model, folder, crop_size=crop_size, recipe="", results=None)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_toy(tmp_path_factory.mktemp("models") / "toy", 0)


def windows(count: int, bands: int = 1, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, bands, size, size), generator=generator, dtype=torch.uint8)


def stack(probs: Any) -> Tensor:
    return torch.stack(list(probs))


@pytest.mark.parametrize("preset", ["toy-segformer", "toy-convnextv2", "toy-swinv2"])
def test_a_loaded_network_says_what_the_trained_one_says(tmp_path: Path, preset: str) -> None:
    folder = export_toy(tmp_path, 3, preset, 64)
    member = load_networks(folder)[0]
    assert (member.crop_size, member.weight) == (64, 1.0)
    image = windows(1, 3, 64)
    network = SegmentationNetwork(AutoModelForSemanticSegmentation.from_pretrained(folder)).eval()
    with torch.no_grad():
        expected = network(to_pixel_values(image[0].permute(1, 2, 0).numpy())[None]).logits.softmax(1)
    assert torch.equal(stack(Predictor([member], device=CPU).window_probs(0, image)), expected)


def test_the_processor_saved_with_the_model_decides_the_normalisation(tmp_path: Path, toy: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(toy, folder)
    image = windows(1, 3)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    seen: list[Tensor] = []
    for change in ({}, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}, {"do_normalize": False}):
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | change))
        member = load_networks(folder)[0]
        member.module = nn.Sequential(Recorder(seen), nn.Conv2d(3, 9, 1))
        list(Predictor([member], device=CPU).window_probs(0, image))
        processor = AutoImageProcessor.from_pretrained(folder)
        expected = processor(image[0].permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(seen[-1], expected, rtol=1e-6, atol=1e-7)
        if not change:
            assert torch.equal(seen[-1], expected)
    assert len({float(values.mean()) for values in seen}) == 3


class Recorder(nn.Module):
    """Returns its input and records it."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return images


def test_one_band_is_replicated_to_three() -> None:
    seen: list[Tensor] = []
    network = nn.Sequential(Recorder(seen), nn.Conv2d(3, 9, 1))
    image = windows(1)
    list(Predictor([use_network(network, crop_size=32)], device=CPU).window_probs(0, image))
    assert torch.equal(seen[0][0], to_pixel_values(image[0, 0].numpy()))


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_windows_have_the_same_bits_in_any_batch(toy: Path, tta: str) -> None:
    predictor = Predictor(load_networks(toy), device=CPU, tta=tta)
    images = windows(5)
    alone = torch.cat([stack(predictor.window_probs(0, image[None])) for image in images])
    assert torch.equal(stack(predictor.window_probs(0, images)), alone)
    assert torch.equal(torch.cat([stack(predictor.window_probs(0, part)) for part in images.split(2)]), alone)


def test_batches_are_used_only_where_they_keep_the_bits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = windows(4)
    for network, steady in ((nn.Conv2d(3, 9, 1), True), (BatchMean(), False)):
        seen: list[Tensor] = []
        predictor = Predictor([use_network(nn.Sequential(Recorder(seen), network), crop_size=32)], device=CPU)
        alone = stack(predictor.window_probs(0, images))
        assert is_steady(lambda batch, one=predictor: one._window_probs(0, batch), images) is steady
        predictor.batches = True  # as on an accelerator
        assert torch.equal(stack(predictor.window_probs(0, images)), alone)
        assert len(seen[-1]) == (4 if steady else 1)
        assert ("windows go one by one" in caplog.text) is not steady


class BatchMean(nn.Module):
    """A network that no window sees alone."""

    def forward(self, images: Tensor) -> Tensor:
        return (images + images.mean(0)).repeat(1, 3, 1, 1)


def test_views_are_averaged_over_each_window(toy: Path) -> None:
    member = load_networks(toy)[0]
    image = windows(1, 3)
    values = to_pixel_values(image[0].permute(1, 2, 0).numpy())

    def predict(view: Tensor) -> Tensor:
        return sliding_window_probs(lambda x: member.network()(x).logits, view, window=32, stride=16)

    for tta in ("d4", "paper"):
        expected = average_views(predict, values, tta)
        found = stack(Predictor([member], device=CPU, tta=tta).window_probs(0, image))[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_of_any_size_and_in_any_wrapping_are_accepted(toy: Path) -> None:
    stock = AutoModelForSemanticSegmentation.from_pretrained(toy)
    image = windows(2)
    expected = stack(Predictor(load_networks(toy), device=CPU).window_probs(0, image))
    for network in (stock, Quarter(stock)):
        found = stack(Predictor([use_network(network, crop_size=32)], device=CPU).window_probs(0, image))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_stock_model_in_memory_brings_its_crop_and_its_normalisation(tmp_path: Path, toy: Path) -> None:
    shutil.copytree(toy, tmp_path / "other")
    file = tmp_path / "other" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "other")
    loaded = use_network(stock)
    assert (loaded.crop_size, loaded.normalization.mean) == (32, (0.1, 0.2, 0.3))
    assert use_network(stock, crop_size=48).crop_size == 48


class Quarter(nn.Module):
    """Bare logits at a quarter of the size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def test_an_ensemble_is_its_members_and_their_weights_on_disk_and_in_memory(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    for seed, place in enumerate(places):
        export_toy(place, seed, crop_size=32 + 32 * seed)
    ensemble = EnsembleForSemanticSegmentation.from_members(places, weights=[1, 3])
    ensemble.save_pretrained(tmp_path / "ensemble")
    predictor = Predictor(load_networks(tmp_path / "ensemble"), device=CPU)
    assert predictor.weights == [0.25, 0.75] and [each.crop_size for each in predictor.networks] == [32, 64]
    for index, place in enumerate(places):
        alone = Predictor(load_networks(place), device=CPU)
        assert torch.equal(stack(predictor.window_probs(index, windows(1))), stack(alone.window_probs(0, windows(1))))
    assert [each.crop_size for each in find_networks(tmp_path / "ensemble", window=96)] == [96, 96]


def test_a_damaged_ensemble_is_named(tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text("[1")
    with pytest.raises(UserError) as error:
        load_networks(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "ensemble.json")) and "export it again" in str(error.value)


def test_the_fingerprint_follows_weights_and_settings_and_nothing_else(toy: Path, tmp_path: Path) -> None:
    def fingerprint(model: Any, window: int | None = None, **settings: str) -> str:
        return Predictor(find_networks(model, window=window), device=CPU, **settings).fingerprint

    first = fingerprint(toy)
    shutil.copytree(toy, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first
    others = [fingerprint(toy, 64), fingerprint(toy, tta="flips"), fingerprint(export_toy(tmp_path / "b", 7))]
    assert len({first, *others, fingerprint(toy, mixed_precision="bf16")}) == 5
    member = load_networks(toy)[0]
    with torch.no_grad():
        member.network().get_parameter("model.decode_head.classifier.bias")[2] += 1e-3
    assert fingerprint([member]) != first
    assert fingerprint([replace(load_networks(toy)[0], normalization=Normalization(std=(1.0, 1.0, 1.0)))]) != first


def test_networks_and_settings_that_cannot_be_are_named() -> None:
    network = nn.Conv2d(3, 5, 1)
    for model in (network, build_model("toy-segformer", crop_size=32, from_scratch=True)):
        with pytest.raises(UserError, match=r"does not tell the crop that it was trained at: pass window=\.\.\."):
            use_network(model)
    members = [use_network(network, crop_size=32)]
    with pytest.raises(UserError, match=r"returns \(1, 5, 32, 32\) for \(1, 3, 32, 32\); expected logits of 9 classes"):
        list(Predictor(members, device=CPU).window_probs(0, windows(1)))
    with pytest.raises(UserError, match="unknown tta 'rotate'; choose one of none, flips, d4, paper"):
        Predictor(members, device=CPU, tta="rotate")
    with pytest.raises(UserError, match="mixed_precision is 'fp16'; it must be no or bf16, or fp16 on an accelerator"):
        Predictor(members, device=CPU, mixed_precision="fp16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "floqt32"}, "config.json cannot be read"),
        ({"hidden_act": "Gelu"}, r"config.json describes no network \('Gelu'\)"),
        ({"num_attention_heads": [0, 2, 2, 4]}, "config.json describes no network"),
    ],
)
def test_a_damaged_config_is_named(change: dict[str, Any], message: str, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_networks(tmp_path / "copy")[0].network()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_returns_no_numbers_maps_nothing(value: float) -> None:
    network = nn.Conv2d(3, 9, 1)
    with torch.no_grad():
        network.weight[4, 0] = value
    with pytest.raises(UserError, match="the network returns values that are not finite; its weights are damaged"):
        list(Predictor([use_network(network, crop_size=32)], device=CPU).window_probs(0, windows(1)))


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("tried to allocate 20 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["GPU", "CPU", "numpy"],
)
def test_a_batch_that_does_not_fit_is_named(failure: Exception) -> None:
    class Huge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise failure

    with pytest.raises(UserError) as raised:
        list(Predictor([use_network(Huge(), crop_size=32)], device=CPU).window_probs(0, windows(1)))
    assert str(raised.value) == "1 windows of 32 pixels do not fit into the memory of cpu; lower --batch_size"


def test_lower_precision_changes_little(toy: Path) -> None:
    image = windows(1)
    full, half = (
        stack(Predictor(load_networks(toy), device=CPU, mixed_precision=name).window_probs(0, image))
        for name in ("no", "bf16")
    )
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert np.allclose(full, half, atol=0.05)
