"""AdamW with a faster head, and a schedule that is a pure function of the optimizer step."""

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import PolyLRScheduler
from transformers import PreTrainedModel

from hf_seg.models import encoder_and_heads


def build_optimizer(
    model: PreTrainedModel, *, learning_rate: float, head_lr_multiplier: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW: the heads learn `head_lr_multiplier` times faster; norms, biases and scales do not decay.

    Args:
        model: a stock SegFormer or UperNet.
    """
    encoder, heads = encoder_and_heads(model)
    groups = []
    for module, rate in [(encoder, learning_rate), *((head, learning_rate * head_lr_multiplier) for head in heads)]:
        # timm leaves out what has one dimension; ConvNeXtV2's GRN and SwinV2's logit scales are vectors in disguise,
        # and SwinV2's small network of relative positions yields nothing but biases
        exempt = [name for name, value in module.named_parameters() if value.numel() == max(value.shape, default=1)]
        exempt.append("*continuous_position_bias_mlp*")
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=exempt):
            groups.append({**group, "lr": rate})
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=torch.cuda.is_available())


def build_schedule(
    optimizer: torch.optim.Optimizer, *, max_train_steps: int, warmup_steps: int, power: float
) -> PolyLRScheduler:
    """Build linear warm-up followed by polynomial decay to 0.

    `schedule.step_update(step)` sets the rate of optimizer step `step`, counted from 0: it holds no state, so it
    needs no checkpoint and must not be given to `accelerator.prepare`, which would step it once per process.

    Args:
        optimizer: the bare torch optimizer, each group with its own peak rate.
    """
    lowest_peak = min(group["lr"] for group in optimizer.param_groups)
    return PolyLRScheduler(
        optimizer,
        t_initial=max_train_steps - warmup_steps,
        power=power,
        warmup_t=warmup_steps,
        warmup_lr_init=1e-6 * lowest_peak if warmup_steps else 0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
