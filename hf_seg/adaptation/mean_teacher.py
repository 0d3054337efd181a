"""The teacher: an exponential moving average of the student (eq. 4; Tarvainen and Valpola 2017)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MeanTeacher(nn.Module):
    """The moving average of the student's weights; always in eval mode, without gradients.

    The number of updates is a buffer, so it is saved with the weights. (In a plain attribute it would be 0 after a
    resume, and the first update would overwrite the teacher with the student.)

    Args:
        student: copied; not wrapped for distributed training.
        decay: weight of the past. During warm-up, update t = 0, 1, ... uses min(1 - 1 / (t + 1), decay).
    """

    step: Tensor  # int64 scalar: updates done

    def __init__(self, student: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Stay in eval mode: the teacher labels without dropout and with its running statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Any:
        """Return what the student's forward returns in eval mode."""
        return self.model(pixel_values)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student's weights and copy its buffers; call after each optimizer step."""
        decay = min(1 - 1 / (int(self.step) + 1), self.decay)
        move = get_ema_multi_avg_fn(decay)  # one fused kernel for all tensors
        move(list(self.model.parameters()), [value.detach() for value in student.parameters()], self.step)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
        self.step += 1
