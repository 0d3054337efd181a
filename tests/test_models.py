"""Stock models: built, loaded with proof, saved for anyone, and logits where the labels are."""

import copy
import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    ConvNextV2ForImageClassification,
    ConvNextV2Model,
    DPTConfig,
    MobileNetV2Config,
    PreTrainedModel,
    SegformerForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    Swinv2Model,
    ViTConfig,
)

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.ensemble import EnsembleForSemanticSegmentation
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model, image_processor
from hf_seg.inference.load import load_networks, use_network
from hf_seg.inference.predict import Predictor
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.models import (
    PRESETS,
    SegmentationNetwork,
    build_model,
    encoder_and_heads,
    normalization_of,
    synchronize_batch_norm,
)
from hf_seg.normalization import IMAGENET, Normalization, to_pixel_values

TOYS = ("toy-segformer", "toy-convnextv2", "toy-swinv2")
TIMM_TOY = "toy-efficientnet-lite0"
ALL_TOYS = (*TOYS, TIMM_TOY)
CLASSIFIERS = dict(
    zip(
        TOYS,
        (SegformerForImageClassification, ConvNextV2ForImageClassification, Swinv2ForImageClassification),
        strict=True,
    )
)


def build_toy(name: str, crop_size: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(name, crop_size=crop_size, from_scratch=True)


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def encoder_config(name: str) -> Any:
    config = build_toy(name).config
    return copy.deepcopy(getattr(config, "backbone_config", None) or config)


def save_encoder(cls: Any, name: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Save an encoder with weights of its own seed, as it would come from the Hub, and return its tensors."""
    config = encoder_config(name)
    config.update({"id2label": {index: f"thing {index}" for index in range(20)}, **changes})
    torch.manual_seed(42)
    cls(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def edit_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_TOYS)
@pytest.mark.parametrize("size", [(64, 64), (96, 72), (65, 47)])
def test_logits_have_the_size_of_the_input(name: str, size: tuple[int, int]) -> None:
    network = SegmentationNetwork(build_toy(name)).train()
    has_auxiliary = name != "toy-segformer"
    logits, auxiliary = network(images(2, *size))
    assert logits.shape == (2, OPEN_EARTH_MAP.num_labels, *size)
    assert (auxiliary is not None) == has_auxiliary
    assert auxiliary is None or auxiliary.shape == logits.shape
    with torch.no_grad():
        outputs = network.eval()(images(1, *size))
    assert outputs.logits.shape == (1, OPEN_EARTH_MAP.num_labels, *size)
    assert outputs.auxiliary_logits is None


@pytest.mark.parametrize("name", ALL_TOYS)
def test_every_parameter_gets_a_gradient_in_training(name: str) -> None:
    network = SegmentationNetwork(build_toy(name)).train()
    for module in network.modules():  # stochastic depth would skip a branch
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # type: ignore[assignment]
    logits, auxiliary = network(images())
    (logits.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())).backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []


@pytest.mark.parametrize("name", ALL_TOYS)
def test_weights_from_scratch_follow_the_global_seed(name: str) -> None:
    first, again = build_toy(name).state_dict(), build_toy(name).state_dict()
    other = build_model(name, crop_size=64, from_scratch=True).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_the_config_says_what_the_classes_are(name: str) -> None:
    config = build_toy(name).config
    assert (config.id2label, config.label2id, config.num_labels) == (
        OPEN_EARTH_MAP.id2label,
        OPEN_EARTH_MAP.label2id,
        OPEN_EARTH_MAP.num_labels,
    )
    ignore = "semantic_loss_ignore_index" if config.model_type == "segformer" else "loss_ignore_index"
    assert getattr(config, ignore) == IGNORE_INDEX


def test_presets_have_the_published_numbers_of_parameters() -> None:
    encoders, wholes = {}, {}
    for name in PRESETS:
        with torch.device("meta"):
            model = build_model(name, crop_size=768, from_scratch=True)
        encoder, _ = encoder_and_heads(model)
        encoders[name], wholes[name] = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (encoder, model))
    published = [3.3, 13.2, 24.2, 44.1, 60.8, 81.4]  # SegFormer's encoders B0 to B5; with heads of transformers:
    assert [encoders[f"nvidia/mit-b{size}"] for size in range(6)] == pytest.approx(published, rel=0.02)
    assert [wholes[f"nvidia/mit-b{size}"] for size in (0, 3, 5)] == pytest.approx([3.7, 47.2, 84.6], rel=0.02)
    assert encoders["facebook/convnextv2-base-22k-384"] == pytest.approx(87.7, rel=0.01)  # 88.7 with the classifier
    assert encoders["microsoft/swinv2-base-patch4-window12to24-192to384-22kto1k-ft"] == pytest.approx(87, rel=0.01)
    assert encoders["facebook/dinov3-convnext-base-pretrain-lvd1689m"] == pytest.approx(87.6, rel=0.01)
    assert max(wholes[name] for name in TOYS) < 2


def test_upernets_heads_are_as_wide_as_the_method_says() -> None:
    with torch.device("meta"):
        model: Any = build_model("facebook/convnextv2-base-22k-384", crop_size=1024, from_scratch=True)
    assert model.decode_head.classifier.weight.shape == (OPEN_EARTH_MAP.num_labels, 512, 1, 1)
    assert model.auxiliary_head.classifier.weight.shape == (OPEN_EARTH_MAP.num_labels, 256, 1, 1)
    assert model.auxiliary_head.convs[0].conv.in_channels == 512  # stage 3
    assert model.config.backbone_config.drop_path_rate == 0


# --- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_TOYS)
def test_a_saved_model_opens_with_stock_transformers_and_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    model = build_toy(name).eval()
    network = SegmentationNetwork(model)
    model.save_pretrained(tmp_path)
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        plain = stock(pixel_values=images()).logits
    if name != "toy-segformer":
        stock = stock.to(memory_format=torch.channels_last)  # as ours
    assert type(stock) is type(model)
    assert stock.config.architectures == [type(model).__name__]
    assert type(model).__module__.startswith("transformers.models.")
    with torch.no_grad():
        ours = network(images()).logits
        theirs = stock(pixel_values=images()).logits
    torch.testing.assert_close(theirs, plain)
    theirs = nn.functional.interpolate(theirs, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_the_auxiliary_logits_are_those_behind_the_stock_models_loss(name: str) -> None:
    if name == "toy-segformer":
        assert SegmentationNetwork(build_toy(name)).train()(images()).auxiliary_logits is None
        return
    model: Any = build_toy(name).train()
    labels = torch.randint(1, OPEN_EARTH_MAP.num_labels, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    expected = model(pixel_values=images(), labels=labels).loss
    torch.manual_seed(3)
    logits, auxiliary = SegmentationNetwork(model)(images())
    ours = nn.functional.cross_entropy(logits, labels) + 0.4 * nn.functional.cross_entropy(auxiliary, labels)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_a_finished_model_loads_with_every_tensor_and_its_crop_size(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    model.save_pretrained(tmp_path)
    image_processor(64).save_pretrained(tmp_path)
    (network,) = load_networks(tmp_path)
    loaded = network.network().model
    assert network.crop_size == 64
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", ALL_TOYS)
def test_a_finished_model_continues_training_as_it_was(name: str, tmp_path: Path) -> None:
    model = build_toy(name)
    model.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), crop_size=64)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_finished_model_must_be_complete_and_of_this_project(tmp_path: Path) -> None:
    model = build_toy("toy-segformer")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}.*preprocessor_config.json"):
        load_networks(tmp_path)

    image_processor(64).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit_weights(tmp_path, {key: tensor for key, tensor in tensors.items() if key != "decode_head.classifier.bias"})
    with pytest.raises(UserError, match=f"{tmp_path}: 1 of .*decode_head.classifier.bias"):
        load_networks(tmp_path)

    model.config.update({"id2label": {0: "sea", 1: "land"}, "label2id": {"sea": 0, "land": 1}})
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=f"{tmp_path} is no segmentation model of this project: its class 0 must be 'background'.*is 'sea'",
    ):
        load_networks(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        load_networks("nowhere")


# --- pretrained weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cls"), [*CLASSIFIERS.items(), ("toy-convnextv2", ConvNextV2Model), ("toy-swinv2", Swinv2Model)]
)
def test_a_pretrained_encoder_arrives_bit_for_bit(name: str, cls: Any, tmp_path: Path) -> None:
    saved = save_encoder(cls, name, tmp_path)
    torch.manual_seed(0)
    model = build_model(str(tmp_path), crop_size=64)
    # what stock transformers reads from the same folder; the head's and the new norms' names do not occur there
    pretrained = cls.from_pretrained(tmp_path)
    encoder, heads = encoder_and_heads(model)
    ours = encoder.state_dict()
    theirs = getattr(pretrained, pretrained.base_model_prefix, pretrained).state_dict()
    shared = ours.keys() & theirs.keys()
    assert {key for key in ours.keys() - shared if "hidden_states_norms" not in key} == set()
    assert all(torch.equal(ours[key], theirs[key]) for key in shared)
    assert len(shared) >= len(saved) - 4  # all but a classifier and a last norm
    random = build_toy(name)
    assert any(not torch.equal(tensor, random.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert model.config.id2label == OPEN_EARTH_MAP.id2label
    assert "thing" not in model.config.to_json_string()
    assert len(heads) == (1 if name == "toy-segformer" else 2)


@pytest.mark.parametrize("name", TOYS)
def test_pretrained_weights_in_half_precision_train_in_single(name: str, tmp_path: Path) -> None:
    config = encoder_config(name)
    CLASSIFIERS[name](config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = build_model(str(tmp_path), crop_size=64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", TOYS)
def test_an_encoder_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    tensors = save_encoder(CLASSIFIERS[name], name, tmp_path)
    lost = next(key for key in reversed(tensors) if "encoder" in key)
    edit_weights(tmp_path, {key: tensor for key, tensor in tensors.items() if key != lost})
    with pytest.raises(UserError, match=f"^{tmp_path}: 1 of .* tensors are not among its weights") as error:
        build_model(str(tmp_path), crop_size=64)
    assert lost.rpartition(".")[2] in str(error.value)


def test_an_encoder_of_other_widths_than_its_config_is_refused(tmp_path: Path) -> None:
    save_encoder(CLASSIFIERS["toy-convnextv2"], "toy-convnextv2", tmp_path)
    config = encoder_config("toy-convnextv2")
    config.hidden_sizes = [16, 32, 64, 128]
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tensors are not among its weights"):
        build_model(str(tmp_path), crop_size=64)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("damage", ["pickle only", "truncated", "none"])
def test_a_folder_without_complete_safetensors_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    tensors = save_encoder(CLASSIFIERS[name], name, tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        weights.unlink()
    if damage == "pickle only":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"^{tmp_path}: no complete weights in safetensors format"):
        build_model(str(tmp_path), crop_size=64)


def test_a_head_of_other_classes_starts_anew_and_the_rest_is_kept(tmp_path: Path) -> None:
    model = build_toy("toy-segformer")
    config = copy.deepcopy(model.config)
    config.update({"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}})
    torch.manual_seed(42)
    saved = type(model)(config)
    saved.save_pretrained(tmp_path)
    loaded = build_model(str(tmp_path), crop_size=64)
    assert loaded.config.num_labels == OPEN_EARTH_MAP.num_labels
    changed = {key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, saved.state_dict()[key])}
    assert changed <= {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert loaded.state_dict()["decode_head.classifier.weight"].shape[0] == OPEN_EARTH_MAP.num_labels
    assert loaded.state_dict()["decode_head.classifier.weight"].std() > 0


# --- encoders of timm -----------------------------------------------------------------------------------------------


def save_timm_encoder(folder: Path, architecture: str = "tf_efficientnet_lite0") -> dict[str, Tensor]:
    """Save a classifier of timm with weights of its own seed, as it would come from the Hub, and return its tensors."""
    torch.manual_seed(42)
    model: Any = timm.create_model(architecture)
    for buffer in model.buffers():  # running statistics that no fresh model has
        buffer.copy_(torch.rand(buffer.shape) + 2)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return load_file(folder / "model.safetensors")


def timm_features(model: Any) -> nn.Module:
    return model.backbone._backbone


@pytest.mark.parametrize("architecture", ["tf_efficientnet_lite0", "test_convnext2", "test_resnet"])
def test_a_timm_encoder_arrives_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    save_timm_encoder(tmp_path, architecture)
    torch.manual_seed(0)
    model = build_model(str(tmp_path), crop_size=64, head_width=16)
    reference: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with torch.no_grad():
        expected = reference.eval().forward_intermediates(images(), intermediates_only=True)
        found = timm_features(model.eval())(images())
    assert [features.shape[-1] for features in found] == [16, 8, 4, 2]
    for features in found:
        assert any(torch.equal(features, each) for each in expected if each.shape == features.shape)


def test_all_tensors_of_a_timm_encoder_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_timm_encoder(tmp_path)
    with caplog.at_level(logging.INFO, "hf_seg.models"):
        model = build_model(str(tmp_path), crop_size=64, head_width=16)
    state = timm_features(model).state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in state.items())
    unused = len(saved) - len(state)
    assert caplog.messages == [f"{tmp_path}: {len(state)} tensors loaded, 0 new (none), {unused} unused"]
    assert {key.partition(".")[0] for key in saved.keys() - state.keys()} == {"conv_head", "bn2", "classifier"}


def test_a_timm_encoder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tensors = save_timm_encoder(tmp_path)
    lost = "blocks.6.0.bn3.running_var"
    edit_weights(tmp_path, {key: tensor for key, tensor in tensors.items() if key != lost})
    with pytest.raises(UserError, match=f"^{tmp_path}: 1 of .* tensors are not among its weights, e.g. {lost}"):
        build_model(str(tmp_path), crop_size=64)
    edit_weights(tmp_path, {**tensors, lost: torch.ones(3)})
    with pytest.raises(UserError, match=r"1 of .* tensors are not among its weights"):
        build_model(str(tmp_path), crop_size=64)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"^{tmp_path}: no complete weights in safetensors format"):
        build_model(str(tmp_path), crop_size=64)
    build_model(str(tmp_path), crop_size=64, from_scratch=True)


def test_weights_without_the_counters_of_batch_norm_are_complete(tmp_path: Path) -> None:
    tensors = save_timm_encoder(tmp_path)
    edit_weights(tmp_path, {key: tensor for key, tensor in tensors.items() if "num_batches_tracked" not in key})
    state = timm_features(build_model(str(tmp_path), crop_size=64)).state_dict()
    assert all(torch.equal(state[key], tensors[key]) for key in state if "num_batches_tracked" not in key)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    tensors = save_timm_encoder(tmp_path)
    name = next(key for key in tensors if key.endswith("running_var"))
    tensors[name][0] = float("nan")
    edit_weights(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"{tmp_path}: _backbone.{name} has values that are not finite; it is damaged"):
        build_model(str(tmp_path), crop_size=64)


def test_normalisation_is_that_of_the_encoder_and_survives_saving(tmp_path: Path) -> None:
    encoder, export = tmp_path / "encoder", tmp_path / "export"
    save_timm_encoder(encoder)
    config = json.loads((encoder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (encoder / "config.json").write_text(json.dumps(config))
    expected = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for from_scratch in (True, False):
        model = build_model(str(encoder), crop_size=64, from_scratch=from_scratch, head_width=16)
        assert SegmentationNetwork(model).normalization == expected
    assert use_network(model, crop_size=64).normalization == expected
    assert use_network(SegmentationNetwork(model), crop_size=64).normalization == expected

    export_model(model, export, crop_size=64, recipe="", results=None)
    assert json.loads((export / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert load_networks(export)[0].normalization == expected
    assert normalization_of(build_model(str(export), crop_size=64)) == expected
    assert normalization_of(AutoModelForSemanticSegmentation.from_pretrained(export)) == expected

    assert normalization_of(build_toy(TIMM_TOY)) == Normalization((0.5,) * 3, (0.5,) * 3)
    for name in TOYS:
        assert normalization_of(build_toy(name)) == IMAGENET


def test_a_network_on_a_timm_encoder_predicts_as_stock_transformers_and_in_an_ensemble(tmp_path: Path) -> None:
    model = build_toy(TIMM_TOY).eval()
    export_model(model, tmp_path / "timm", crop_size=64, recipe="", results=None)
    export_model(build_toy("toy-segformer"), tmp_path / "segformer", crop_size=64, recipe="", results=None)
    image = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "timm")
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "timm").eval()
    stock = stock.to(memory_format=torch.channels_last)  # as ours
    with torch.no_grad():
        expected = stock(**processor(image.numpy(), return_tensors="pt")).logits
        ours = SegmentationNetwork(model).eval()(to_pixel_values(image.numpy(), normalization_of(model))[None]).logits
    assert torch.equal(ours, expected)

    EnsembleForSemanticSegmentation.from_members([tmp_path / "timm", tmp_path / "segformer"]).save_pretrained(
        tmp_path / "ensemble"
    )
    networks = load_networks(tmp_path / "ensemble")
    assert [each.normalization for each in networks] == [normalization_of(model), IMAGENET]
    accumulator = Predictor(networks[:1], device=torch.device("cpu")).predict(image.numpy())
    expected[:, 0] = -torch.inf
    assert torch.equal(torch.as_tensor(accumulator.label_map()).long(), expected.argmax(1)[0])


def test_head_width_is_for_encoders(tmp_path: Path) -> None:
    model: Any = build_model("timm/test_resnet", crop_size=64, from_scratch=True, head_width=24)
    assert model.decode_head.classifier.in_channels == 24
    assert model.auxiliary_head.classifier.in_channels == 12
    assert model.auxiliary_head.convs[0].conv.in_channels == model.backbone.channels[2]
    toy: Any = build_toy(TIMM_TOY)
    assert (toy.decode_head.classifier.in_channels, toy.auxiliary_head.convs[0].conv.in_channels) == (64, 112)
    with torch.device("meta"):
        wide: Any = build_model("timm/tf_efficientnet_lite0", crop_size=64, from_scratch=True)
    assert wide.decode_head.classifier.in_channels == 512
    with pytest.raises(UserError, match="head_width is for UperNet on an encoder; toy-segformer is a whole segformer"):
        build_model("toy-segformer", crop_size=64, from_scratch=True, head_width=24)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/tf_efficientnet_lite9", "timm .* has no architecture 'tf_efficientnet_lite9'"),
        ("timm/tf_efficientnet_lite0.in99k", r"Invalid pretrained tag \(in99k\)"),
        (
            "timm/test_maxvit",
            r"test_maxvit does not fit crop_size 64 \(.*divisible by window.*; sizes that fit: 160, 320",
        ),
        ("timm/swin_tiny_patch4_window7_224", "has 4, 8, 16, 32 as NHWC"),
    ],
)
def test_an_unsuitable_timm_encoder_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: .*{message}"):
        build_model(name, crop_size=64, from_scratch=True)


def test_weights_on_the_hub_are_read_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    def snapshot_download(repository: str, **options: Any) -> str:
        requests.append((repository, options["allow_patterns"]))
        return str(tmp_path)

    saved = save_timm_encoder(tmp_path)
    monkeypatch.setattr("hf_seg.timm_encoder.snapshot_download", snapshot_download)
    model = build_model("timm/tf_efficientnet_lite0", crop_size=64, head_width=16)
    assert requests == [("timm/tf_efficientnet_lite0.in1k", ["config.json", "model.safetensors"])]
    assert torch.equal(timm_features(model).state_dict()["conv_stem.weight"], saved["conv_stem.weight"])


def test_weights_on_the_hub_that_cannot_be_fetched_say_how_to_fix_it() -> None:
    with pytest.raises(
        UserError,
        match=r"'timm/test_resnet' was not found .*hf download timm/test_resnet.r160_in1k.*--from_scratch true",
    ) as error:
        build_model("timm/test_resnet", crop_size=64)
    assert "\n" not in str(error.value)


def test_a_timm_folder_must_be_one_that_transformers_can_build_again(tmp_path: Path) -> None:
    save_timm_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architecture": "lite99"}, "has no architecture 'lite99'"),
        ({"model_args": {"act_layer": "gelu"}}, "model_args that transformers cannot keep: act_layer"),
        ({"pretrained_cfg": {}}, "does not give mean and std"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "takes images of 1 bands"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=f"{tmp_path}.*{message}"):
            build_model(str(tmp_path), crop_size=64)


def test_a_finished_model_on_an_unknown_timm_architecture_is_refused(tmp_path: Path) -> None:
    model: Any = build_toy(TIMM_TOY)
    export_model(model, tmp_path, crop_size=64, recipe="", results=None)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("tf_efficientnet_lite0", "tf_efficientnet_lite9"))
    with pytest.raises(UserError, match="has no architecture 'tf_efficientnet_lite9'"):
        load_networks(tmp_path)
    with pytest.raises(UserError, match="has no architecture 'tf_efficientnet_lite9'"):
        build_model(str(tmp_path), crop_size=64)


def test_synchronised_batch_norm_keeps_the_activations() -> None:
    """Torch's own conversion drops those that timm fuses into its BatchNorm."""
    network = SegmentationNetwork(build_toy(TIMM_TOY)).eval()
    with torch.no_grad():
        expected = network(images()).logits
        converted = synchronize_batch_norm(copy.deepcopy(network))
        assert torch.equal(converted(images()).logits, expected)
        dropped = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
        assert not torch.allclose(dropped(images()).logits, expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert converted.state_dict().keys() == network.state_dict().keys()


# --- names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_says_how_to_fix_it() -> None:
    with pytest.raises(
        UserError, match=r"'nvidia/mit-b9' was not found locally .*hf download.*--from_scratch true"
    ) as error:
        build_model("nvidia/mit-b9", crop_size=64)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"sizes known without a download: nvidia/mit-b0, .*toy-efficientnet-lite0"):
        build_model("nvidia/mit-b9", crop_size=64, from_scratch=True)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_a_toy_has_no_pretrained_weights(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is a size without pretrained weights; add --from_scratch true"):
        build_model(name, crop_size=64)


@pytest.mark.parametrize("from_scratch", [True, False])
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (ViTConfig(), "vit"),
        (MobileNetV2Config(), "mobilenet_v2"),
        (DPTConfig(backbone_config=Swinv2Config()), "dpt on swinv2"),
    ],
)
def test_another_architecture_is_refused_by_name(config: Any, kind: str, from_scratch: bool, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=f"{tmp_path} is a {kind}; supported are SegFormer, encoders of timm, those that transformers has",
    ):
        build_model(str(tmp_path), crop_size=64, from_scratch=from_scratch)


def test_a_folder_with_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=str(tmp_path)):
        build_model(str(tmp_path), crop_size=64)


@pytest.mark.parametrize("name", TOYS)
def test_a_folder_gives_its_size_alone_when_from_scratch(name: str, tmp_path: Path) -> None:
    encoder_config(name).save_pretrained(tmp_path)  # no weights there
    model = build_model(str(tmp_path), crop_size=64, from_scratch=True)
    sizes = [sum(p.numel() for p in encoder_and_heads(m)[0].parameters()) for m in (model, build_toy(name))]
    assert sizes[0] == sizes[1]


# --- SwinV2's windows -----------------------------------------------------------------------------------------------


def windows_and_shifts(model: Any) -> list[list[tuple[int, int]]]:
    return [[(b.window_size, b.shift_size) for b in stage.blocks] for stage in model.backbone.encoder.layers]


@pytest.mark.parametrize(
    ("crop_size", "expected"),
    [
        # 1/4 of the crop is 32, 16, 8, 4 wide in the four stages; a stage as wide as the window has nothing to shift
        (128, [[(4, 0), (4, 2)], [(4, 0), (4, 2)], [(4, 0), (4, 2)], [(4, 0), (4, 0)]]),
        (64, [[(4, 0), (4, 2)], [(4, 0), (4, 2)], [(4, 0), (4, 0)], [(2, 0), (2, 0)]]),
        (256, [[(4, 0), (4, 2)]] * 4),
    ],
)
def test_swins_windows_and_shifts_are_the_crops(crop_size: int, expected: list[list[tuple[int, int]]]) -> None:
    model = build_toy("toy-swinv2", crop_size)
    assert model.config.backbone_config.image_size == crop_size
    assert windows_and_shifts(model) == expected


def test_a_published_swin_is_refitted_to_the_crop_with_its_weights(tmp_path: Path) -> None:
    # the published 384 / window 24 / pretrained 12, 12, 12, 6 at a quarter of its size
    sizes = {"image_size": 96, "window_size": 6, "pretrained_window_sizes": [3, 3, 3, 2]}
    save_encoder(Swinv2ForImageClassification, "toy-swinv2", tmp_path, **sizes)
    model: Any = build_model(str(tmp_path), crop_size=192)
    assert windows_and_shifts(model) == [[(6, 0), (6, 3)]] * 3 + [[(6, 0), (6, 0)]]
    assert model.config.backbone_config.pretrained_window_sizes == [3, 3, 3, 2]
    stock: Any = Swinv2ForImageClassification.from_pretrained(tmp_path)
    narrow = [[(b.window_size, b.shift_size) for b in stage.blocks] for stage in stock.swinv2.encoder.layers]
    assert narrow[2] == [(6, 0), (6, 0)]  # as published: stage 3 would never look beyond a window
    ours, theirs = model.backbone.state_dict(), stock.swinv2.state_dict()
    keys = [key for key in theirs if key in ours]
    assert len(keys) > 100
    assert all(torch.equal(ours[key], theirs[key]) for key in keys)
    assert SegmentationNetwork(model).train()(images(2, 192, 192)).logits.shape == (
        2,
        OPEN_EARTH_MAP.num_labels,
        192,
        192,
    )


def test_a_saved_swin_keeps_its_crop_and_can_be_given_another(tmp_path: Path) -> None:
    build_toy("toy-swinv2", 128).save_pretrained(tmp_path)
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert windows_and_shifts(stock) == windows_and_shifts(build_toy("toy-swinv2", 128))
    assert windows_and_shifts(build_model(str(tmp_path), crop_size=64)) == windows_and_shifts(build_toy("toy-swinv2"))


# --- gradient checkpointing -----------------------------------------------------------------------------------------


def gradients_and_passes(network: SegmentationNetwork) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of a fixed loss, how often the first block ran, and the bytes kept for the backward pass."""
    in_block = [m for m in network.modules() if isinstance(m, nn.Linear) or getattr(m, "groups", 1) > 1]
    layer = in_block[0]  # a layer of the first block
    passes: list[str] = []
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    handle = layer.register_forward_pre_hook(lambda *_: passes.append("forward"))
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits, auxiliary = network(images())
        loss = logits.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())
    loss.backward()
    handle.remove()
    return {key: p.grad for key, p in network.named_parameters() if p.grad is not None}, len(passes), sum(kept)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(name: str) -> None:
    plain, frugal = (SegmentationNetwork(build_toy(name)).train() for _ in range(2))
    frugal.enable_gradient_checkpointing()
    expected, passes, kept = gradients_and_passes(plain)
    gradients, passes_again, kept_again = gradients_and_passes(frugal)
    assert (passes, passes_again) == (1, 2)
    assert kept_again < kept
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_gradient_checkpointing_leaves_saved_models_and_copies_alone(name: str, tmp_path: Path) -> None:
    network = SegmentationNetwork(build_toy(name))
    network.enable_gradient_checkpointing()
    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        assert not twin.eval()(images()).logits.any()
        ours = network.eval()(images()).logits
    assert ours.any()
    network.model.save_pretrained(tmp_path)
    stock = build_model(str(tmp_path), crop_size=64)
    with torch.no_grad():
        assert torch.equal(ours, SegmentationNetwork(stock).eval()(images()).logits)


@pytest.mark.parametrize("name", ALL_TOYS)
def test_encoder_and_heads_share_out_the_model(name: str) -> None:
    model = build_toy(name)
    encoder, heads = encoder_and_heads(model)
    parts = [id(parameter) for part in (encoder, *heads) for parameter in part.parameters()]
    assert sorted(parts) == sorted(id(parameter) for parameter in model.parameters())
    assert {id(p) for head in heads for p in head.parameters()} == {
        id(parameter) for key, parameter in model.named_parameters() if "_head." in key
    }


# --- a teacher's BatchNorm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_TOYS)
def test_a_teacher_of_a_real_network_labels_as_its_batch_norms_in_train_mode(name: str) -> None:
    student, pixel_values = SegmentationNetwork(build_toy(name)), images()
    for _ in range(3):  # running statistics that differ from those of the batch
        student.train()(pixel_values + 3)
    teacher, reference = MeanTeacher(student), copy.deepcopy(student).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    expected = reference(pixel_values)
    found = teacher(pixel_values)
    assert found.auxiliary_logits is None
    torch.testing.assert_close(found.logits, expected.logits.detach(), rtol=1e-3, atol=1e-4)
    assert torch.isfinite(teacher(pixel_values[:1]).logits).all()


@pytest.mark.parametrize("kind", ["shard", "adapter"])
def test_nothing_but_safetensors_is_loaded(kind: str, tmp_path: Path) -> None:
    model = build_model("toy-segformer", crop_size=64, from_scratch=True)
    model.save_pretrained(tmp_path)
    message = "has an adapter beside its weights"
    if kind == "shard":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), "pytorch_model.bin")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        torch.save({"a": tmp_path}, tmp_path / "pytorch_model.bin")  # a path is no tensor
        message = "no complete weights in safetensors format"
    else:
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=message) as raised:
        build_model(str(tmp_path), crop_size=64)
    assert "\n" not in str(raised.value) and "still be loaded" not in str(raised.value)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text(f"import os; os.mkdir({str(tmp_path / 'canary')!r})")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="was not found locally or on the Hub"):
        build_model(str(tmp_path), crop_size=64)
    assert not (tmp_path / "canary").exists()
