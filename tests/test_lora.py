"""LoRA: what is trained, what is saved, and that the merged model is the one that was trained."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipe_process import run_recipe
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSemanticSegmentation, PreTrainedModel

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.arguments import Stage2Arguments
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.lora import add_adapters, count_parameters, has_adapters, merge_adapters, save_adapter
from hf_seg.models import SegmentationNetwork, build_model, encoder_and_heads
from hf_seg.normalization import Normalization
from hf_seg.stem import set_input_bands
from hf_seg.training.optimization import build_optimizer

CASES = {
    "toy-segformer": ["all-linear"],
    "toy-swinv2": ["query", "value"],
    "toy-efficientnet-lite0": ["conv_pw", "conv_pwl"],
    "beit": ["all-linear"],
    "resnet": ["convolution"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "beit": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32},
    "resnet": {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "embedding_size": 8, "layer_type": "basic"},
}


def build(kind: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind not in CONFIGS:
        return build_model(kind, crop_size=64, from_scratch=True)
    AutoConfig.for_model(kind, **CONFIGS[kind]).save_pretrained(folder / "config")
    return build_model(str(folder / "config"), crop_size=64, from_scratch=True, head_width=16)


def with_adapters(kind: str, folder: Path, rank: int = 2) -> PreTrainedModel:
    model = build(kind, folder)
    torch.manual_seed(1)
    add_adapters(model, rank=rank, alpha=4, targets=CASES[kind], base=kind)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def train(network: SegmentationNetwork, steps: int = 2) -> None:
    optimizer = build_optimizer(network.model, Stage2Arguments(learning_rate=1e-2, head_lr_multiplier=1))
    network.train()
    for _ in range(steps):
        logits, auxiliary = network(images())
        (logits.square().mean() + (0 if auxiliary is None else auxiliary.square().mean())).backward()
        optimizer.step()
        optimizer.zero_grad()


def is_learned(key: str) -> bool:
    return ".lora_" in key or key.partition(".")[0].endswith("_head") or key.startswith("backbone.fpn")


@pytest.mark.parametrize("kind", CASES)
def test_only_adapters_and_heads_change(kind: str, tmp_path: Path) -> None:
    plain, model = build(kind, tmp_path), with_adapters(kind, tmp_path)
    network = SegmentationNetwork(model)
    with torch.no_grad():  # at first the adapters change nothing
        expected = SegmentationNetwork(plain).eval()(images()).logits
        torch.testing.assert_close(network.eval()(images()).logits, expected, rtol=0, atol=1e-5)
    before = copy.deepcopy(model.state_dict())
    train(network)
    after = model.state_dict()
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert all(map(is_learned, changed))
    assert {key for key in after if ".lora_" in key} <= changed
    assert any(key.startswith("decode_head") for key in changed)
    assert any(key.startswith("backbone.fpn") for key in changed) == (kind == "beit")
    trained, total = count_parameters(model)
    assert trained == sum(tensor.numel() for key, tensor in model.named_parameters() if is_learned(key)) < total


@pytest.mark.parametrize("kind", CASES)
def test_the_merged_model_is_a_stock_one_with_the_same_logits(kind: str, tmp_path: Path) -> None:
    network = SegmentationNetwork(with_adapters(kind, tmp_path))
    train(network)
    with torch.no_grad():
        expected = network.eval()(images()).logits
    before = {key: tensor.clone() for key, tensor in network.model.state_dict().items()}
    merged = merge_adapters(network.model)
    assert not has_adapters(merged) and has_adapters(network.model)
    assert merged.state_dict().keys() == build(kind, tmp_path).state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(SegmentationNetwork(merged)(images()).logits, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.model.state_dict().items())

    export_model(network.model, tmp_path / "export", crop_size=64, recipe="", results=None)
    stock = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "export").eval()
    assert type(stock).__module__.startswith("transformers.models.") and not has_adapters(stock)
    with torch.no_grad():
        torch.testing.assert_close(SegmentationNetwork(stock)(images()).logits, expected, rtol=1e-5, atol=1e-5)

    adapter = tmp_path / "export" / "adapter"
    assert sorted(file.name for file in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.manual_seed(5)
    base = build(kind, tmp_path)
    for head in encoder_and_heads(base)[1]:  # those of the adapter count
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
    opened = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        logits = opened(pixel_values=images()).logits
    logits = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 4, kind)


def test_a_teacher_averages_adapters_and_keeps_the_encoder(tmp_path: Path) -> None:
    student = SegmentationNetwork(with_adapters("toy-efficientnet-lite0", tmp_path))
    teacher = MeanTeacher(student, 0.5)
    for _ in range(3):
        train(student, steps=1)
        teacher.update(student)
    ours, theirs = student.model.state_dict(), teacher.model.model.state_dict()
    assert {key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])} == {
        key for key, _ in student.model.named_parameters() if is_learned(key)
    }
    with torch.no_grad():
        expected = teacher.model(images()).logits
        merged = SegmentationNetwork(merge_adapters(teacher.model.model))(images()).logits
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    # the encoder's BatchNorm is frozen in both, so the teacher does not normalise by the batch there
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in student.model.backbone.modules())


def test_a_stem_of_other_bands_is_trained_and_saved(tmp_path: Path) -> None:
    def build_for_bands() -> PreTrainedModel:
        model = build("toy-swinv2", tmp_path)
        set_input_bands(model, ["vv", "vh"], Normalization((0.5,) * 2, (0.5,) * 2))
        return model

    model = build_for_bands()
    add_adapters(model, rank=2, alpha=4, targets=["query"], base="toy-swinv2")
    stem = "backbone.embeddings.patch_embeddings.projection"
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key in trained if not is_learned(key)} == {f"{stem}.weight", f"{stem}.bias"}
    with torch.no_grad():
        model.get_parameter(f"{stem}.weight").mul_(2)
    save_adapter(model, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(build_for_bands(), str(tmp_path / "adapter")).eval()
    pixel_values = images()[:, :2]
    with torch.no_grad():
        expected = SegmentationNetwork(model).eval()(pixel_values).logits
        torch.testing.assert_close(opened(pixel_values=pixel_values).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_without_a_target_are_named(tmp_path: Path) -> None:
    for kind, target, message in (
        ("resnet", "all-linear", "lora_targets: all-linear is no layer of the encoder; it has convolution"),
        ("toy-segformer", "qkv", "lora_targets: qkv is no layer of the encoder; it has .*q_proj, .*v_proj"),
    ):
        with pytest.raises(UserError, match=message):
            add_adapters(build(kind, tmp_path), rank=2, alpha=4, targets=[target], base=kind)


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^lora_rank needs a package: pip install 'hf_seg\[lora\]'; or set it to 0$"):
        with_adapters("toy-segformer", tmp_path)


def test_a_killed_run_resumes_to_the_same_bits_and_exports_adapters(oem_sar: Path, tmp_path: Path) -> None:
    settings = {
        "model_name_or_path": "toy-segformer",
        "from_scratch": "true",
        "crop_size": 32,
        "lora_rank": 2,
        "ema_decay": 0.5,
        "max_train_steps": 3,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
        "learning_rate": "1e-2",
        "eval_steps": 0,
        "checkpointing_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "data_dir": oem_sar,
    }
    argv = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    outputs = {}
    for name, disturb in (("whole", None), ("killed", "kill_after_step:2")):
        folder = tmp_path / name
        run = [*argv, "--output_dir", str(folder)]
        if disturb:
            run_recipe("stage2", *run, log=tmp_path / f"{name}.killed", disturb=disturb)
            run += ["--resume_from_checkpoint", "latest"]
        result = run_recipe("stage2", *run, log=tmp_path / f"{name}.log")
        assert result.exit_codes == [0], result.output
        assert "LoRA of rank 2: " in result.output and " parameters are trained" in result.output
        outputs[name] = {
            file: load_file(folder / file)
            for file in ("model.safetensors", "student/model.safetensors", "adapter/adapter_model.safetensors")
        }
    for file, tensors in outputs["whole"].items():
        resumed = outputs["killed"][file]
        assert tensors.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in tensors.items()), file
    adapter = outputs["whole"]["adapter/adapter_model.safetensors"]
    assert any(".lora_B." in key and tensor.any() for key, tensor in adapter.items())
    assert any(key.startswith("base_model.model.decode_head.") for key in adapter)
