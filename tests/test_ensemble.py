"""An ensemble is the weighted mean of its members, atomic on disk, and its members open alone."""

import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel

import hf_seg
from hf_seg import models
from hf_seg.ensemble import EnsembleForSemanticSegmentation as Ensemble
from hf_seg.ensemble import Prediction
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import find_folder, load_networks
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.labels import BACKGROUND, OPEN_EARTH_MAP
from hf_seg.models import build_model
from hf_seg.normalization import to_pixel_values

CROPS = {"toy-segformer": 32, "toy-convnextv2": 64, "toy-swinv2": 32}
LAND_COVER = slice(BACKGROUND + 1, None)


def save_toy(name: str, folder: Path, *, bias: dict[int, float] | None = None) -> Path:
    """Save a toy whose answers vary over the image, or one that gives the same logits, `bias`, everywhere."""
    torch.manual_seed(len(name))
    model = build_model(name, crop_size=CROPS[name], from_scratch=True)
    head: Any = model
    torch.nn.init.normal_(head.decode_head.classifier.weight)
    if bias is not None:
        head.decode_head.classifier.weight.data.zero_()
        head.decode_head.classifier.bias.data = torch.tensor(
            [bias.get(index, 0.0) for index in range(OPEN_EARTH_MAP.num_labels)]
        )
    export_model(model, folder, crop_size=CROPS[name], recipe="", results=None)
    return folder


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One trained network of each architecture."""
    root = tmp_path_factory.mktemp("members")
    return [save_toy(name, root / name) for name in CROPS]


@pytest.fixture(scope="module")
def saved(members: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their ensemble on disk, with weights 5, 2 and 1."""
    folder = tmp_path_factory.mktemp("ensemble") / "saved"
    Ensemble.from_members(members, [5, 2, 1]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(saved: Path) -> Ensemble:
    """The ensemble from disk; tests leave it as it is."""
    return Ensemble.from_pretrained(saved)


def pixels(batch: int = 1, height: int = 48, width: int = 32) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw (H, W) uint8 with some structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1))
    return np.kron(coarse, np.ones((8, 8)))[:height, :width].astype(np.uint8)


def stock_logits(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits
    size = pixel_values.shape[-2:]
    return torch.nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def stock_probs(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    return stock_logits(model, pixel_values).double().softmax(1)


def described(ensemble: Ensemble) -> list[tuple[Any, ...]]:
    """What is known of each member, wherever it lies."""
    return [(each.name, each.crop_size, each.weight, each.revision, each.normalization) for each in ensemble.members]


def same(left: list[Prediction], right: list[Prediction]) -> bool:
    return all(
        np.array_equal(a, b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip((one[0], *one[2:]), (other[0], *other[2:]), strict=True)
    )


# --- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, [5, 2, 1]])
def test_logits_are_the_log_of_the_weighted_mean_probability(members: list[Path], weights: list[float] | None) -> None:
    pixel_values = pixels(2, 48, 40)
    stock = [AutoModelForSemanticSegmentation.from_pretrained(folder) for folder in members]
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    mean = sum(share * stock_probs(model, pixel_values) for model, share in zip(stock, shares, strict=True))
    with torch.no_grad():
        logits = Ensemble.from_members(members, weights)(pixel_values).logits
    assert logits.shape == (2, OPEN_EARTH_MAP.num_labels, 48, 40) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, LAND_COVER].double(), mean[:, LAND_COVER].log(), rtol=0, atol=2e-5)
    assert len(logits.argmax(1).unique()) > 2


def test_order_does_not_matter_where_weights_are_equal(members: list[Path]) -> None:
    forwards = Ensemble.from_members(members)
    backwards = Ensemble.from_members(members[::-1])
    with torch.no_grad():
        torch.testing.assert_close(forwards(pixels()).logits, backwards(pixels()).logits, rtol=0, atol=1e-5)
    image = picture(64, 64)
    assert same(forwards.predict(image), backwards.predict(image))


def test_class_0_never_wins_even_when_all_members_say_so(tmp_path: Path) -> None:
    sure = {BACKGROUND: 300.0, 3: 1.0}  # the probabilities of the others underflow
    folders = [save_toy(name, tmp_path / name, bias=sure) for name in ("toy-segformer", "toy-convnextv2")]
    ensemble = Ensemble.from_members(folders)
    with torch.no_grad():
        outputs = ensemble(pixels(1))
    assert outputs.logits.isfinite().all()
    assert (outputs.logits.argmax(1) != BACKGROUND).all()
    assert (outputs.logits.softmax(1)[:, BACKGROUND] == 0).all()
    processor = AutoImageProcessor.from_pretrained(folders[0])
    for size in ((64, 64), (31, 80)):
        (label_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        assert label_map.shape == size and (label_map != BACKGROUND).all()
    assert (ensemble.predict(picture(40, 40))[0].label_map != BACKGROUND).all()


def test_a_member_that_sees_background_leaves_the_choice_to_the_others(tmp_path: Path) -> None:
    unsure = save_toy("toy-segformer", tmp_path / "unsure", bias={BACKGROUND: 5.0, 2: 1.0})
    sure = save_toy("toy-convnextv2", tmp_path / "sure", bias={7: 1.0})
    (result,) = Ensemble.from_members([unsure, sure], [3, 1]).predict(picture(32, 32))
    assert result.class_names == {7: OPEN_EARTH_MAP.names[7]}


def test_transformers_post_processing_gives_the_same_map(saved: Path, opened: Ensemble) -> None:
    image = picture(64, 64)
    processor = AutoImageProcessor.from_pretrained(saved, subfolder="member_0")
    with torch.no_grad():
        outputs = opened(**processor(Image.fromarray(image).convert("RGB"), return_tensors="pt"))
    (label_map,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 64)])
    direct = opened(to_pixel_values(image)[None]).logits.argmax(1)[0]
    assert torch.equal(label_map, direct) and len(direct.unique()) > 2


def test_averages_in_float32_what_members_compute_in_half(members: list[Path], saved: Path) -> None:
    half = pixels(1, 64, 64).half()  # SwinV2 makes NaN of padding in half precision, and this needs none
    halves = [load_networks(folder)[0].network().model.half() for folder in members]
    probs = [stock_logits(model, half).float().softmax(1) for model in halves]
    expected = (5 * probs[0] + 2 * probs[1] + probs[2]) / 8
    ensemble = Ensemble.from_pretrained(saved, dtype=torch.float16)
    assert ensemble.dtype == torch.float16 and {weight.dtype for weight in ensemble.parameters()} == {torch.float16}
    with torch.no_grad():
        logits = ensemble(half.float()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, LAND_COVER].exp(), expected[:, LAND_COVER], rtol=0, atol=1e-6)
    assert torch.equal(Ensemble.from_pretrained(saved).half()(half.float()).logits, logits)


def test_gradients_reach_every_member(saved: Path) -> None:
    ensemble = Ensemble.from_pretrained(saved).train()
    ensemble(pixels(2)).logits[:, 3].mean().backward()
    for network in ensemble.networks:
        assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in network.parameters())


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(70, 50), (20, 100)])
def test_each_member_slides_its_own_window(members: list[Path], opened: Ensemble, size: tuple[int, int]) -> None:
    image = picture(*size)
    mean = torch.zeros(OPEN_EARTH_MAP.num_labels, *size)
    for folder, share in zip(members, (0.625, 0.25, 0.125), strict=True):
        (loaded,) = load_networks(folder)
        crop, model = loaded.crop_size, loaded.network().model
        window = {"window": crop, "stride": crop // 4, "batch_size": 3}
        mean += share * sliding_window_probs(lambda x, m=model: stock_logits(m, x), to_pixel_values(image), **window)
    expected = mean[LAND_COVER].argmax(0) + 1
    settings: dict[str, Any] = {"stride": 0.25, "batch_size": 3}
    (result,) = opened.predict(image, **settings)
    assert result.label_map.dtype == np.uint8
    np.testing.assert_array_equal(result.label_map, expected.numpy())
    assert result.class_names == {index: OPEN_EARTH_MAP.id2label[index] for index in np.unique(expected).tolist()}
    assert len(result.class_names) > 2 and result.entropy is result.disagreement is None


def test_files_pictures_and_arrays_give_one_answer(opened: Ensemble, tmp_path: Path) -> None:
    grey = picture(40, 56)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    palette = Image.fromarray(grey).convert("P")
    inputs = [grey, np.stack([grey] * 3, -1), Image.fromarray(grey), palette, tmp_path / "grey.png"]
    inputs += [str(tmp_path / "grey.tif"), Image.fromarray(grey).convert("RGBA")]
    results = opened.predict(inputs)
    assert len(results) == len(inputs)
    assert same(results, [results[0]] * len(inputs))
    assert same(opened.predict(grey), results[:1])


def test_colour_is_not_grey_and_results_keep_their_order(opened: Ensemble) -> None:
    images = [np.stack([picture(48, 40, seed) for seed in (1, 2, 3)], -1), picture(48, 40, 1), picture(32, 64, 2)]
    results = opened.predict(images)
    assert [result.label_map.shape for result in results] == [(48, 40), (48, 40), (32, 64)]
    assert not same(results[:1], results[1:2])
    for image, result in zip(images, results, strict=True):
        assert same(opened.predict(image), [result])


def test_views_change_the_mean_as_they_do_for_one_network(members: list[Path]) -> None:
    ensemble = Ensemble.from_members(members[:1])
    image = picture(32, 32)
    turned = ensemble.predict(np.ascontiguousarray(image[:, ::-1]), tta="flips")[0].label_map[:, ::-1]
    flips = ensemble.predict(image, tta="flips")[0].label_map
    assert (flips == turned).mean() > 0.99  # a mean over mirror images has no side, up to rounding
    assert (flips != ensemble.predict(image)[0].label_map).any()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint16), "image 1: expected (H, W) or (H, W, 3) uint8, got (8, 8) uint16"),
        (np.zeros((8, 8), np.float32), "got (8, 8) float32"),
        (np.zeros((3, 8, 8), np.uint8), "got (3, 8, 8) uint8"),
        (np.zeros((8, 8, 4), np.uint8), "got (8, 8, 4) uint8"),
        (np.zeros((0, 8), np.uint8), "got (0, 8) uint8"),
        (Image.new("I;16", (8, 8)), "image 1: expected (H, W) or (H, W, 3) uint8, got (8, 8) uint16"),
        (Image.new("F", (8, 8)), "got (8, 8) float32"),
        ("nowhere.png", "nowhere.png cannot be read as a picture"),
        (Path(__file__), "test_ensemble.py cannot be read as a picture"),
    ],
)
def test_an_image_that_would_be_misread_is_refused_by_name(opened: Ensemble, image: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        opened.predict([picture(8, 8), image])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_prediction_leaves_the_mode_as_it_was(saved: Path) -> None:
    ensemble = Ensemble.from_pretrained(saved)
    assert not any(module.training for module in ensemble.modules())
    expected = ensemble.predict(picture(40, 40))
    assert same(ensemble.train().predict(picture(40, 40)), expected)
    assert ensemble.training and all(network.training for network in ensemble.networks)


# --- uncertainty ----------------------------------------------------------------------------------------------------


def uncertainty(folders: list[Path], weights: list[float] | None = None) -> tuple[float, float]:
    """Return entropy and disagreement of members that say one thing everywhere."""
    ensemble = Ensemble.from_members(folders, weights)
    (result,) = ensemble.predict(picture(40, 40), return_uncertainty=True)
    assert result.entropy is not None and result.disagreement is not None
    for values in (result.entropy, result.disagreement):
        assert values.shape == (40, 40) and values.dtype == np.float32
        np.testing.assert_allclose(values, values[0, 0], atol=1e-6)
    return float(result.entropy[0, 0]), float(result.disagreement[0, 0])


@pytest.mark.parametrize(
    ("biases", "weights", "entropy", "disagreement"),
    [
        ([{5: 200.0}, {5: 200.0}], None, 0, 0),  # all agree and are certain
        ([{}, {}], None, math.log(OPEN_EARTH_MAP.num_labels - 1), 0),  # all are uniform
        ([{5: 200.0}, {6: 200.0}], None, math.log(2), 0.5),  # each is certain of another class
        ([{5: 200.0}, {6: 200.0}], [3, 1], -0.75 * math.log(0.75) - 0.25 * math.log(0.25), 0.25),
        ([{0: 200.0}, {0: 200.0}], None, math.log(OPEN_EARTH_MAP.num_labels - 1), 0),  # nobody sees land cover at all
    ],
)
def test_uncertainty_of_known_opinions(
    biases: list[dict[int, float]], weights: Any, entropy: float, disagreement: float, tmp_path: Path
) -> None:
    names = ("toy-segformer", "toy-convnextv2")
    folders = [save_toy(name, tmp_path / name, bias=bias) for name, bias in zip(names, biases, strict=True)]
    assert uncertainty(folders, weights) == pytest.approx((entropy, disagreement), abs=1e-5)


# --- on disk --------------------------------------------------------------------------------------------------------


def test_a_round_trip_keeps_every_bit(members: list[Path], opened: Ensemble) -> None:
    before = Ensemble.from_members(members, [5, 2, 1])
    assert described(opened) == described(before) and [each.crop_size for each in opened.members] == [32, 64, 32]
    assert opened.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, opened.state_dict()[key]) for key, tensor in before.state_dict().items())
    with torch.no_grad():
        assert torch.equal(opened(pixels()).logits, before(pixels()).logits)
    assert (opened.id2label, opened.label2id["water"]) == (OPEN_EARTH_MAP.id2label, 6)


def test_the_folder_holds_plain_members_and_says_what_they_are(members: list[Path], saved: Path) -> None:
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    expected = {"ensemble.json", "README.md", *(f"member_{index}/{name}" for index in range(3) for name in model)}
    assert {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()} == expected
    config = json.loads((saved / "ensemble.json").read_text())
    assert config["masked_classes"] == [BACKGROUND]
    assert config["members"][1] == {
        "folder": "member_1",
        "origin": members[1].name,
        "crop": 64,
        "weight": 2.0,
        "revision": None,
    }


def test_each_member_opens_alone_with_stock_classes(members: list[Path], saved: Path) -> None:
    for index, origin in enumerate(members):
        alone = AutoModelForSemanticSegmentation.from_pretrained(saved, subfolder=f"member_{index}")
        assert torch.equal(
            stock_logits(alone, pixels()),
            stock_logits(AutoModelForSemanticSegmentation.from_pretrained(origin), pixels()),
        )
        processor = AutoImageProcessor.from_pretrained(saved, subfolder=f"member_{index}")
        assert processor.to_dict() == AutoImageProcessor.from_pretrained(origin).to_dict()


def test_low_memory_gives_the_same_bits_with_one_member_at_a_time(
    saved: Path, opened: Ensemble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = [picture(40, 40), picture(64, 48, 1)]
    expected = opened.predict(images, return_uncertainty=True)
    with torch.no_grad():
        logits = opened(pixels()).logits

    born: list[weakref.ref[PreTrainedModel]] = []
    alive_at_load: list[int] = []

    def load_and_count(*args: Any, **settings: Any) -> Any:
        alive_at_load.append(sum(model() is not None for model in born))
        model = load_weights(*args, **settings)
        born.append(weakref.ref(model))
        return model

    load_weights = models.load_weights
    monkeypatch.setattr(models, "load_weights", load_and_count)
    gc.disable()  # memory that only the collector frees is not free
    try:
        streamed = Ensemble.from_pretrained(saved, low_memory=True)
        assert streamed.low_memory and not list(streamed.parameters()) and not born
        assert same(streamed.predict(images, return_uncertainty=True), expected)
        assert len(born) == 3  # once for both images
        assert torch.equal(streamed(pixels()).logits, logits)
        streamed.save_pretrained(tmp_path / "copy")
        Ensemble.from_members([saved / f"member_{i}" for i in range(3)], low_memory=True)
    finally:
        gc.enable()
    assert alive_at_load == [0] * 9 and all(model() is None for model in born)
    again = Ensemble.from_pretrained(tmp_path / "copy")
    assert torch.equal(again(pixels()).logits, logits) and described(again) == described(opened)


def test_low_memory_follows_dtype_and_mode(saved: Path) -> None:
    normal = Ensemble.from_pretrained(saved, dtype=torch.bfloat16)
    streamed = Ensemble.from_pretrained(saved, low_memory=True).to(torch.bfloat16)
    assert streamed.dtype == torch.bfloat16 and streamed.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(streamed(pixels()).logits, normal(pixels()).logits)
    assert not streamed(pixels()).logits.requires_grad


@pytest.mark.gpu
def test_a_gpu_gives_the_answer_of_a_cpu(saved: Path, opened: Ensemble) -> None:
    expected = opened(pixels()).logits
    for low_memory in (False, True):
        ensemble = Ensemble.from_pretrained(saved, low_memory=low_memory).to("cuda")
        logits = ensemble(pixels().to("cuda")).logits
        assert logits.device.type == "cuda"
        torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-2)


def test_a_new_ensemble_replaces_the_old_one_and_nothing_else(members: list[Path], tmp_path: Path) -> None:
    Ensemble.from_members(members).save_pretrained(tmp_path)
    (tmp_path / "eval_results.json").write_text("{}")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/leftover").write_text("of an export that was killed")
    Ensemble.from_members(members[2:]).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"ensemble.json", "member_0", "README.md", "eval_results.json"}
    (member,) = Ensemble.from_pretrained(tmp_path).members
    assert member.origin == members[2].name


def test_an_ensemble_can_be_saved_to_where_it_streams_from(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    streamed = Ensemble.from_pretrained(tmp_path, low_memory=True)
    expected = streamed(pixels()).logits
    streamed.save_pretrained(tmp_path)
    assert torch.equal(streamed(pixels()).logits, expected)


def test_an_export_that_fails_leaves_the_older_ensemble(
    members: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ensemble.from_members(members[:2]).save_pretrained(tmp_path)
    before = Ensemble.from_members(members)

    def full_disk(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(before.members[2].network().model), "save_pretrained", full_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        before.save_pretrained(tmp_path)
    left = Ensemble.from_pretrained(tmp_path)
    assert [member.origin for member in left.members] == [folder.name for folder in members[:2]]
    assert not (tmp_path / ".partial").exists()


def test_a_single_model_is_not_overwritten(members: list[Path]) -> None:
    ensemble = Ensemble.from_members(members[1:])
    with pytest.raises(UserError, match="contains a single model; save the ensemble to another folder"):
        ensemble.save_pretrained(members[0])
    assert load_networks(members[0])[0].crop_size == 32


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 2], "2 weight(s) for 3 member(s): give one for each, or none"),
        ([1, 2, 0], "toy-swinv2 must be above 0 and finite; it is 0.0"),
        ([-1, 2, 1], "toy-segformer must be above 0 and finite; it is -1.0"),
        ([1, math.nan, 1], "toy-convnextv2 must be above 0 and finite; it is nan"),
        ([1, 1, math.inf], "toy-swinv2 must be above 0 and finite; it is inf"),
    ],
)
def test_weights_that_make_no_mean_are_refused(members: list[Path], weights: list[float], words: str) -> None:
    with pytest.raises(UserError) as error:
        Ensemble.from_members(members, weights)
    assert words in str(error.value)


def test_no_member_is_refused() -> None:
    with pytest.raises(UserError, match="one network or more"):
        Ensemble.from_members([])


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "config.json",
            {"id2label": {str(index): f"thing {index}" for index in range(OPEN_EARTH_MAP.num_labels)}},
            "is no segmentation model of this project: its class 0 must be 'background'",
        ),
        ("preprocessor_config.json", {"size": None}, "preprocessor_config.json is not one that this project writes"),
        (
            "preprocessor_config.json",
            {"size": {"height": 10**9}},
            "is not one that this project writes (size 1000000000",
        ),
        ("preprocessor_config.json", {"size": {"height": float("inf")}}, "is not one that this project writes (cannot"),
        ("preprocessor_config.json", {"rescale_factor": 0}, "is not one that this project writes (division by zero)"),
        ("preprocessor_config.json", {"image_std": [0, 0, 0]}, "is not one that this project writes (mean "),
        ("preprocessor_config.json", {"image_mean": [1, 1]}, "is not one that this project writes (size 32"),
        (
            "config.json",
            {"num_labels": 10**9, "id2label": None},
            "config.json cannot be read (expected a mapping of at",
        ),
        ("config.json", {"id2label": ["background", "a", "b"]}, "config.json cannot be read"),
        ("config.json", {"hidden_sizes": [10**7] * 4}, "config.json describes a network that is too large: 10000000"),
        ("config.json", {"hidden_sizes": [30_000] * 4}, "numbers, but its weights take"),
        ("config.json", {"hidden_sizes": ["a", "b", "c", "d"]}, "config.json"),
        ("config.json", {"depths": [-1] * 4}, "tensors of its weights are of no layer of its config.json"),
    ],
)
def test_a_member_of_another_kind_is_refused_by_name(
    members: list[Path], file: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    other = save_toy("toy-segformer", tmp_path / "other")
    edit_json(other / file, **changes)
    with pytest.raises(UserError) as error:
        Ensemble.from_members([members[1], other])
    assert str(error.value).startswith(str(other)) and words in str(error.value)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_damaged_member_is_named(saved: Path, low_memory: bool, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "member_1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"member_1: no complete weights"):
        Ensemble.from_pretrained(tmp_path, low_memory=low_memory).predict(picture(32, 32))
    weights.unlink()
    with pytest.raises(UserError, match=r"member_1 is incomplete: it has no model\*\.safetensors"):
        Ensemble.from_pretrained(tmp_path, low_memory=low_memory)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_window_that_is_not_the_trained_one_is_refused(saved: Path, low_memory: bool, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "member_2/preprocessor_config.json", size={"height": 96, "width": 96})
    with pytest.raises(UserError, match=r"member_2 has crop size 96, but ensemble\.json says 32"):
        Ensemble.from_pretrained(tmp_path, low_memory=low_memory)(pixels())


def test_a_folder_without_ensemble_json_opens_as_an_ensemble_of_one(members: list[Path]) -> None:
    ensemble, image = Ensemble.from_pretrained(members[0]), picture(40, 40)
    assert (len(ensemble.members), ensemble.weights) == (1, [1.0])
    assert same(ensemble.predict(image), Ensemble.from_members(members[:1]).predict(image))


def test_a_folder_with_neither_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Ensemble.from_pretrained(tmp_path)
    assert (
        str(error.value) == f"{tmp_path} is neither a model nor an ensemble: it has no config.json and no ensemble.json"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "has another format"),
        ({"masked_classes": []}, "has another format"),
        ({"members": [{"folder": "member_0"}]}, "does not list members"),
        ({"members": None}, "does not list members"),
        ({"members": []}, "one network or more"),
        (
            {"members": [{"folder": "member_0", "origin": "a", "crop": 32, "weight": 0, "revision": None}]},
            "the weight of a must be above 0",
        ),
        (
            {"members": [{"folder": "../b", "origin": "a", "crop": 32, "weight": 1, "revision": None}]},
            "b is incomplete: it has no config.json",
        ),
        (
            {"members": [{"folder": "a", "origin": "a", "crop": float("inf"), "weight": 1, "revision": None}]},
            "does not list members",
        ),
        (
            {"members": [{"folder": "a", "origin": "a", "crop": 32, "weight": 1, "revision": [1]}]},
            "does not list members",
        ),
    ],
)
def test_an_ensemble_json_that_cannot_be_trusted_is_refused(
    saved: Path, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "a")
    edit_json(tmp_path / "a/ensemble.json", **changes)
    with pytest.raises(UserError) as error:
        Ensemble.from_pretrained(tmp_path / "a", low_memory=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_ensemble_json_cut_off_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text((saved / "ensemble.json").read_text()[:40])
    with pytest.raises(UserError, match=r"ensemble\.json does not list members"):
        Ensemble.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such-repository", "no/such-repository@v1", "/no/such/folder"])
def test_what_is_neither_here_nor_on_the_hub_is_one_clear_error(name: str) -> None:
    for open_ensemble in (
        Ensemble.from_pretrained,
        Ensemble.from_members,
    ):
        with pytest.raises(UserError) as error:
            open_ensemble(name)
        assert str(error.value).startswith(f"{name} was not found locally or on the Hub (")
        assert "hf auth login" in str(error.value) and "\n" not in str(error.value)


def test_an_ensemble_on_the_hub_opens_by_name_and_revision(saved: Path, opened: Ensemble, tmp_path: Path) -> None:
    commit, repository = 40 * "a", tmp_path / "models--org--name"
    shutil.copytree(saved, repository / "snapshots" / commit)  # as the Hub's client leaves what it has fetched
    (repository / "refs").mkdir()
    (repository / "refs/v1").write_text(commit)
    for name, settings in (("org/name@v1", {}), ("org/name", {"revision": "v1"}), (f"org/name@{commit}", {})):
        fetched = Ensemble.from_pretrained(name, cache_dir=tmp_path, low_memory=True, **settings)
        assert described(fetched) == described(opened)
        folder, found = find_folder(name, ["ensemble.json"], cache_dir=tmp_path, **settings)
        assert (folder, found) == (repository / "snapshots" / commit, commit)
    with pytest.raises(UserError, match="org/name@v2 was not found locally or on the Hub"):
        Ensemble.from_pretrained("org/name@v2", cache_dir=tmp_path)


def test_an_ensemble_stands_for_its_members_which_share_its_weight(saved: Path, members: list[Path]) -> None:
    nested = Ensemble.from_members([saved, members[1]], [1, 3])
    assert [each.crop_size for each in nested.members] == [32, 64, 32, 64]
    assert nested.weights == pytest.approx([5 / 32, 2 / 32, 1 / 32, 24 / 32])
    assert Ensemble.from_members([saved / "member_0"]).members[0].crop_size == 32


def test_members_may_have_normalisations_of_their_own(members: list[Path], tmp_path: Path) -> None:
    """`predict` gives each what it was trained on, and `forward` converts from the first member's."""
    other = shutil.copytree(members[1], tmp_path / "other")
    edit_json(other / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    image = picture(64, 64)
    ensemble = Ensemble.from_members([members[0], other])
    ensemble.save_pretrained(tmp_path / "saved")
    first, second = (AutoModelForSemanticSegmentation.from_pretrained(folder) for folder in (members[0], other))
    seen = torch.from_numpy(image / 127.5 - 1).float().expand(1, 3, 64, 64)
    mean = (stock_probs(first, to_pixel_values(image)[None]) + stock_probs(second, seen)) / 2
    for each in (ensemble, Ensemble.from_pretrained(tmp_path / "saved")):
        with torch.no_grad():
            logits = each(to_pixel_values(image)[None]).logits
        torch.testing.assert_close(logits[:, LAND_COVER].double(), mean[:, LAND_COVER].log(), rtol=0, atol=1e-4)
    single, unchanged = Ensemble.from_members([other]), Ensemble.from_members([members[1]])
    one, another = (each.predict(image, return_uncertainty=True)[0].entropy for each in (single, unchanged))
    assert one is not None and not np.array_equal(one, another)


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_package_exports_the_class_and_stays_light() -> None:
    assert hf_seg.EnsembleForSemanticSegmentation is Ensemble
    with pytest.raises(AttributeError, match="no attribute 'Ensemble'"):
        hf_seg.Ensemble  # noqa: B018
    heavy = "import sys, hf_seg; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
