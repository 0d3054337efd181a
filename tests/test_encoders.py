"""Encoders of transformers and timm under stock UperNet: levels, crops, pretrained weights, saved models."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PretrainedConfig

from hf_seg.encoders import fit_encoder, tensors_of_backbone_alone
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import load_networks
from hf_seg.models import SegmentationNetwork, build_model, normalization_of
from hf_seg.normalization import IMAGENET, Normalization
from hf_seg.stem import set_input_bands

VIT = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
STAGES = {"depths": [1, 1, 1, 1]}
SWIN = {**STAGES, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 32}
WIDTHS = {**STAGES, "hidden_sizes": [8, 16, 24, 32]}
RESNET = {**WIDTHS, "embedding_size": 8, "layer_type": "basic"}
SIZES: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "maskformer-swin": SWIN,
    "swinv2": SWIN,
    "convnext": WIDTHS,
    "dinov3_convnext": WIDTHS,
    "resnet": RESNET,
    "bit": {**STAGES, "embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "num_groups": 4},
    "focalnet": {**STAGES, "embed_dim": 8, "hidden_sizes": [16, 32, 64, 64], "image_size": 64},
    "hiera": {**STAGES, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "image_size": [64, 64]},
    "pvt_v2": {**WIDTHS, "num_attention_heads": [1, 1, 2, 2], "hidden_sizes": [8, 8, 16, 16], "mlp_ratios": [2] * 4},
    "beit": {**VIT, "intermediate_size": 32},
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "dinov3_vit": {**VIT, "intermediate_size": 32},
    "vitdet": VIT,
}
PLAIN = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vitdet")


def config_of(kind: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(kind, **{**SIZES[kind], **changes})


def images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def save_pretrained_encoder(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Save a model without a head, as it would come from the Hub, and return its tensors."""
    torch.manual_seed(42)
    model = AutoModel.from_config(config_of(kind, **changes))
    model.save_pretrained(folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", SIZES)
def test_an_encoder_trains_under_upernet_and_opens_with_stock_transformers(kind: str, tmp_path: Path) -> None:
    config_of(kind).save_pretrained(tmp_path / "config")
    torch.manual_seed(0)
    model: Any = build_model(str(tmp_path / "config"), crop_size=64, from_scratch=True, head_width=16)
    network = SegmentationNetwork(model).train()
    logits, auxiliary = network(images())
    assert auxiliary is not None
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
    model.backbone.eval()
    with torch.no_grad():
        sides = [features.shape[-1] for features in model.backbone.forward_with_filtered_kwargs(images()).feature_maps]
    assert sides == ([4] * 4 if kind in PLAIN else [16, 8, 4, 2])

    model.save_pretrained(tmp_path / "model")
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
    assert type(stock).__name__ == "UperNetForSemanticSegmentation"
    stock = stock.to(memory_format=torch.channels_last)  # as ours
    with torch.no_grad():
        assert torch.equal(network.eval()(images()).logits, stock(pixel_values=images()).logits)
    again = build_model(str(tmp_path / "model"), crop_size=64)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


@pytest.mark.parametrize("kind", ["swin", "dinov3_convnext", "hiera", "beit", "dinov2", "dinov3_vit"])
def test_pretrained_weights_arrive_bit_for_bit_and_only_new_tensors_are_random(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_pretrained_encoder(kind, tmp_path)
    with caplog.at_level(logging.INFO, "hf_seg.models"):
        model: Any = build_model(str(tmp_path), crop_size=64, head_width=16)
    prefix = f"{model.backbone.base_model_prefix}."
    ours, theirs = (
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        for tensors in (model.backbone.state_dict(), saved)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    new = {key.removeprefix(prefix) for key in tensors_of_backbone_alone(model.backbone)}
    assert ours.keys() - theirs.keys() == new
    assert all(key.startswith(("hidden_states_norms", "fpn")) for key in new)
    if new:
        assert f"{len(ours) - len(new)} tensors loaded, {len(new)} new" in caplog.messages[-1]

    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in tensors if ".0." in key)  # of the first layer
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"^{tmp_path}: 1 of .* tensors are not among its weights"):
        build_model(str(tmp_path), crop_size=64, head_width=16)


def test_a_plain_transformer_gives_four_layers_evenly_spread() -> None:
    for layers, expected in ((12, [3, 6, 9, 12]), (6, [3, 4, 5, 6])):
        config: Any = config_of("dinov2", num_hidden_layers=layers)
        assert fit_encoder("vit", config, 64) == ["embeddings.mask_token"]
        assert config.out_features == [f"stage{number}" for number in expected]
    with pytest.raises(
        UserError, match=r"dinov2 gives UperNet no levels .*it has 3 levels of one stride, 4 are needed"
    ):
        fit_encoder("vit", config_of("dinov2", num_hidden_layers=2), 64)


def test_beits_own_pyramid_is_turned_on_and_kept() -> None:
    config: Any = config_of("beit")
    assert fit_encoder("beit", config, 64) == []
    assert config.add_fpn is True and config.out_features == ["stage2", "stage4", "stage6", "stage8"]
    before = config.to_dict()
    fit_encoder("beit", config, 96, keep_levels=True)
    assert {**config.to_dict(), "image_size": 64} == before


def test_the_crop_becomes_the_image_size_where_no_tensor_has_its_shape() -> None:
    for kind, from_scratch, expected in (
        ("swin", False, 96),
        ("dinov3_vit", False, 96),
        ("dinov2", False, 32),  # its position embeddings are interpolated
        ("dinov2", True, 96),
    ):
        config: Any = config_of(kind)
        fit_encoder(kind, config, 96, from_scratch=from_scratch)
        assert config.image_size == expected, kind


@pytest.mark.parametrize(
    ("kind", "changes", "crop", "message"),
    [
        (
            "dinov2",
            {"patch_size": 14},
            64,
            r"\(its patches of 14 pixels do not divide the crop\); sizes that fit: 224, 448",
        ),
        ("hiera", {}, 96, r"does not fit crop_size 96 .*; sizes that fit: 64$"),
    ],
)
def test_a_crop_that_does_not_fit_is_one_line_with_those_that_do(
    kind: str, changes: dict[str, Any], crop: int, message: str, tmp_path: Path
) -> None:
    save_pretrained_encoder(kind, tmp_path, **changes)
    with pytest.raises(UserError, match=f"^{tmp_path}: {kind} .*{message}") as error:
        build_model(str(tmp_path), crop_size=crop, head_width=16)
    assert "\n" not in str(error.value)


def test_what_gives_no_levels_is_refused(tmp_path: Path) -> None:
    sizes = {**VIT, "image_size": [64, 64], "patch_size": [16, 16]}
    AutoConfig.for_model("vitpose_backbone", **sizes).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"vitpose_backbone gives UperNet no levels .*16 x 16, not 16 channels x height"
    ):
        build_model(str(tmp_path), crop_size=64, from_scratch=True)


def test_an_encoder_whose_config_has_no_number_of_bands_keeps_three(tmp_path: Path) -> None:
    AutoConfig.for_model("pp_lcnet", scale=0.25).save_pretrained(tmp_path)
    model = build_model(str(tmp_path), crop_size=64, from_scratch=True, head_width=16)
    with pytest.raises(UserError, match="a pp_lcnet has no number of bands: it takes 3 alone"):
        set_input_bands(model, ["vv", "vh"], Normalization((0.5,) * 2, (0.5,) * 2))


def test_asking_an_encoder_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    fit_encoder("swin", config_of("swin", embed_dim=16), 64)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_normalisation_is_that_of_the_encoders_processor(tmp_path: Path) -> None:
    save_pretrained_encoder("resnet", tmp_path / "encoder")
    assert normalization_of(build_model(str(tmp_path / "encoder"), crop_size=64, head_width=16)) == IMAGENET
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "BeitImageProcessor"}
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(half))
    model = build_model(str(tmp_path / "encoder"), crop_size=64, head_width=16)
    expected = Normalization((0.5,) * 3, (0.5,) * 3)
    assert SegmentationNetwork(model).normalization == expected
    export_model(model, tmp_path / "model", crop_size=64, recipe="", results=None)
    assert load_networks(tmp_path / "model")[0].normalization == expected
    assert normalization_of(build_model(str(tmp_path / "model"), crop_size=64)) == expected


@pytest.mark.parametrize("kind", ["resnet", "dinov3_convnext", "dinov2", "swin"])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(kind: str, tmp_path: Path) -> None:
    config_of(kind).save_pretrained(tmp_path)
    gradients, kept = [], []
    for is_frugal in (False, True):
        torch.manual_seed(0)
        network = SegmentationNetwork(build_model(str(tmp_path), crop_size=64, from_scratch=True, head_width=16))
        if is_frugal:
            network.enable_gradient_checkpointing()
        sizes: list[int] = []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            torch.manual_seed(1)
            outputs = network.train()(images())
        outputs.logits.square().mean().backward()
        gradients.append({key: value.grad for key, value in network.named_parameters() if value.grad is not None})
        kept.append(sum(sizes))
    assert kept[1] < kept[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[1][key], gradient) for key, gradient in gradients[0].items())


@pytest.mark.parametrize(
    ("architecture", "crop", "stages", "sides"),
    [
        ("test_vit", 64, [2, 3, 4, 5], [4] * 4),  # all of stride 16
        ("test_resnet", 64, [1, 2, 3, 4], [16, 8, 4, 2]),
        ("test_mambaout", 64, None, None),
    ],
)
def test_encoders_of_timm_with_other_levels(
    architecture: str, crop: int, stages: list[int] | None, sides: list[int] | None, tmp_path: Path
) -> None:
    torch.manual_seed(42)
    timm.models.save_for_hf(timm.create_model(architecture), str(tmp_path / "encoder"), safe_serialization=True)
    if stages is None:
        with pytest.raises(UserError, match=f"UperNet needs levels as NCHW; {architecture} has .* as NHWC"):
            build_model(str(tmp_path / "encoder"), crop_size=crop)
        return
    model: Any = build_model(str(tmp_path / "encoder"), crop_size=crop, head_width=16).eval()
    assert list(model.config.backbone_config.out_indices) == stages
    reference = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        expected = reference.forward_intermediates(images(crop), indices=stages, intermediates_only=True)  # type: ignore[operator]
        found = model.backbone(images(crop)).feature_maps
    assert [features.shape[-1] for features in found] == sides
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    model.save_pretrained(tmp_path / "model")
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(images(crop)).logits, model(images(crop)).logits, rtol=0, atol=0)
