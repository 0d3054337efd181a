"""AdamW with a faster head, a schedule that is a pure function of the optimizer step, and the gradient's norm."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from timm.scheduler import PolyLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_seg.arguments import OptimisationSettings
from hf_seg.models import encoder_and_heads


def build_optimizer(model: PreTrainedModel, args: OptimisationSettings) -> torch.optim.AdamW:
    """Build AdamW: the heads learn `head_lr_multiplier` times faster; norms, biases and scales do not decay.

    Args:
        model: a stock SegFormer or UperNet.
        args: of them `learning_rate`, `head_lr_multiplier` and `weight_decay`.
    """
    encoder, heads = encoder_and_heads(model)
    head_rate = args.learning_rate * args.head_lr_multiplier
    groups = []
    for module, rate in [(encoder, args.learning_rate), *((head, head_rate) for head in heads)]:
        # timm leaves out what has one dimension; ConvNeXtV2's GRN and SwinV2's logit scales are vectors in disguise,
        # and SwinV2's small network of relative positions yields nothing but biases
        exempt = [name for name, value in module.named_parameters() if value.numel() == max(value.shape, default=1)]
        exempt.append("*continuous_position_bias_mlp*")
        for group in param_groups_weight_decay(module, args.weight_decay, no_weight_decay_list=exempt):
            groups.append({**group, "lr": rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, args: OptimisationSettings) -> PolyLRScheduler:
    """Build linear warm-up followed by polynomial decay to 0.

    `schedule.step_update(step)` sets the rate of optimizer step `step`, counted from 0: it holds no state, so it
    needs no checkpoint and must not be given to `accelerator.prepare`, which would step it once per process.

    Args:
        optimizer: the bare torch optimizer, each group with its own peak rate.
        args: of them `max_train_steps`, `warmup_steps` and `lr_power`.
    """
    lowest_peak = min(group["lr"] for group in optimizer.param_groups)
    return PolyLRScheduler(
        optimizer,
        t_initial=args.max_train_steps - args.warmup_steps,
        power=args.lr_power,
        warmup_t=args.warmup_steps,
        warmup_lr_init=1e-6 * lowest_peak if args.warmup_steps else 0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def clip_gradient(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradient's norm to `max_norm`, unless that is 0; return the norm that it had, a scalar."""
    parameters = list(parameters)
    if max_norm:
        norm: Tensor = accelerator.clip_grad_norm_(parameters, max_norm)
        return norm
    return nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
