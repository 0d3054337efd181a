"""Which parameter learns at which rate, decays or not, and what the rate is at each step."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_seg.arguments import OptimisationSettings
from hf_seg.models import build_model
from hf_seg.training.optimization import build_optimizer, build_schedule

TOYS = ("toy-segformer", "toy-convnextv2", "toy-swinv2")
NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def build(name: str, **settings: Any) -> tuple[PreTrainedModel, torch.optim.AdamW]:
    model = build_model(name, crop_size=64, from_scratch=True)
    settings = {"learning_rate": 1e-3, "head_lr_multiplier": 10.0, "weight_decay": 0.01} | settings
    return model, build_optimizer(model, OptimisationSettings(**settings))


def setting_of_each(model: PreTrainedModel, optimizer: torch.optim.Optimizer, setting: str) -> dict[str, float]:
    """Return {parameter's name: its group's setting}."""
    by_id = {id(parameter): group[setting] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TOYS)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    model, optimizer = build(name)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", TOYS)
def test_norms_biases_and_scales_do_not_decay_and_all_else_does(name: str) -> None:
    model, optimizer = build(name)
    decay = setting_of_each(model, optimizer, "weight_decay")
    norms = {f"{key}." for key, module in model.named_modules() if isinstance(module, NORMS) or "norm" in key}
    spared = {
        key
        for key in decay
        if key.endswith(("bias", "logit_scale"))
        or ".grn." in key
        or "continuous_position_bias_mlp" in key
        or key.startswith(tuple(norms))
    }
    assert {key for key, value in decay.items() if value == 0} == spared
    assert {value for key, value in decay.items() if key not in spared} == {0.01}
    assert len(spared) < len(decay)
    if name != "toy-segformer":  # the parameters that have several dimensions and yet are scales
        assert any(".grn." in key or "logit_scale" in key for key in spared)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("multiplier", [10.0, 1.0, 0.5])
def test_heads_learn_at_the_multiplied_rate(name: str, multiplier: float) -> None:
    model, optimizer = build(name, learning_rate=6e-5, head_lr_multiplier=multiplier)
    for key, rate in setting_of_each(model, optimizer, "lr").items():
        is_head = key.startswith(("decode_head.", "auxiliary_head."))
        assert rate == pytest.approx(6e-5 * multiplier if is_head else 6e-5), key


def test_without_decay_nothing_decays() -> None:
    model, optimizer = build("toy-swinv2", weight_decay=0.0)
    assert {*setting_of_each(model, optimizer, "weight_decay").values()} == {0.0}


@pytest.mark.parametrize("name", TOYS)
def test_a_step_without_gradient_shrinks_what_decays_and_nothing_else(name: str) -> None:
    model, optimizer = build(name, learning_rate=0.5, head_lr_multiplier=0.5, weight_decay=0.1)
    rates, decays = (setting_of_each(model, optimizer, setting) for setting in ("lr", "weight_decay"))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[key] * (1 - rates[key] * decays[key]))
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def two_groups() -> torch.optim.AdamW:
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (6e-5, 6e-4)]
    return torch.optim.AdamW(groups)


def steps(total: int = 100, warmup: int = 20, power: float = 1.0) -> OptimisationSettings:
    return OptimisationSettings(max_train_steps=total, warmup_steps=warmup, lr_power=power)


def rates_at(step: int, *, total: int = 100, warmup: int = 20, power: float = 1.0) -> list[float]:
    optimizer = two_groups()
    build_schedule(optimizer, steps(total, warmup, power)).step_update(step)
    return [group["lr"] for group in optimizer.param_groups]


def test_warm_up_is_linear_from_a_millionth_of_the_rate() -> None:
    assert rates_at(0) == pytest.approx([6e-11, 6e-11], rel=1e-9)
    assert rates_at(10) == pytest.approx([3e-5, 3e-4], rel=1e-5)
    assert rates_at(19) == pytest.approx([6e-5 * 0.95, 6e-4 * 0.95], rel=1e-5)
    assert rates_at(20) == [6e-5, 6e-4]


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_the_rate_decays_as_a_polynomial_to_0(power: float, warmup: int) -> None:
    for step in (warmup, warmup + 1, 50, (100 + warmup) // 2, 99):
        expected = ((100 - step) / (100 - warmup)) ** power
        assert rates_at(step, warmup=warmup, power=power) == pytest.approx([6e-5 * expected, 6e-4 * expected])
    assert rates_at(99, warmup=warmup, power=power)[0] > 0
    assert rates_at(100, warmup=warmup, power=power) == [0, 0]
    assert rates_at(10_000, warmup=warmup, power=power) == [0, 0]


def test_the_rate_never_rises_after_warm_up_nor_falls_before() -> None:
    rates = [rates_at(step)[0] for step in range(101)]
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert max(rates) == rates[20]


def test_the_schedule_is_a_pure_function_of_the_step() -> None:
    optimizer = two_groups()
    schedule = build_schedule(optimizer, steps(power=0.9))
    for step in (99, 3, 50, 50, 0, 20, 3):
        schedule.step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == rates_at(step, power=0.9)


def test_a_schedule_for_a_restored_optimizer_goes_on_from_the_step_alone() -> None:
    saved = two_groups()
    build_schedule(saved, steps()).step_update(70)
    restored = two_groups()
    schedule = build_schedule(restored, steps())
    restored.load_state_dict(saved.state_dict())
    schedule.step_update(71)
    assert [group["lr"] for group in restored.param_groups] == rates_at(71)


def test_a_run_of_one_step_learns_at_its_peak() -> None:
    assert rates_at(0, total=1, warmup=0) == [6e-5, 6e-4]
