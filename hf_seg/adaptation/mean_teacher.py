"""The teacher: an exponential moving average of the student (eq. 4; Tarvainen and Valpola 2017)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MeanTeacher(nn.Module):
    """The moving average of the student's weights; always in eval mode, without gradients.

    The number of updates is a buffer, so it is saved with the weights. (In a plain attribute it would be 0 after a
    resume, and the first update would overwrite the teacher with the student.) The host reads it once after a
    construction or a load and then counts along, so that no update waits for the device.

    Args:
        student: copied; not wrapped for distributed training.
        decay: weight of the past. During warm-up, update t = 0, 1, ... uses min(1 - 1 / (t + 1), decay).
        batch_norm: what BatchNorm normalises by in `forward`: "batch", the statistics of the images given, so that
            the teacher adapts to the target; "running", the student's running statistics, which are mostly of the
            source. `model`, which is scored and exported, always uses the running statistics.
    """

    step: Tensor  # int64 scalar: updates done

    def __init__(
        self, student: nn.Module, decay: float = 0.999, *, batch_norm: Literal["batch", "running"] = "batch"
    ) -> None:
        super().__init__()
        if batch_norm not in ("batch", "running"):
            raise ValueError(f"batch_norm must be 'batch' or 'running'; it is {batch_norm!r}")
        self.model = copy.deepcopy(student).requires_grad_(False).eval()
        self.decay = decay
        self.batch_norm = batch_norm
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._updates: int | None = None  # the host's copy of `step`; None: to be read

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._updates = None
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> "MeanTeacher":
        """Stay in eval mode: the teacher labels without dropout and drop path."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Any:
        """Return what the student's forward returns in eval mode, but for `batch_norm`.

        With "batch", every process must call this with as many images.
        """
        with batch_statistics(self.model) if self.batch_norm == "batch" else nullcontext():
            return self.model(pixel_values)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student's weights and copy its buffers; call after each optimizer step."""
        if self._updates is None:
            self._updates = int(self.step)
        decay = min(1 - 1 / (self._updates + 1), self.decay)
        move = get_ema_multi_avg_fn(decay)  # one fused kernel for all tensors
        move(list(self.model.parameters()), [value.detach() for value in student.parameters()], self.step)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)
        self.step += 1
        self._updates += 1


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let each BatchNorm of a model in eval mode normalise by its input's statistics; its buffers do not change.

    The mean and the biased variance are those of the batches of all processes together, on any device. An input with
    one value per channel (UperNet's 1 x 1 pooling of a single image) has no variance, so it is normalised by the
    running statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    running = [(norm.running_mean, norm.running_var) for norm in norms]

    def replace_statistics(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        statistics = _statistics(inputs[0])
        norm.running_mean, norm.running_var = statistics or running[norms.index(norm)]

    hooks = [norm.register_forward_pre_hook(replace_statistics) for norm in norms]
    try:
        yield
    finally:
        for hook, norm, (mean, variance) in zip(hooks, norms, running, strict=True):
            hook.remove()
            norm.running_mean, norm.running_var = mean, variance


def _statistics(features: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and biased variance of each channel over all processes; None for one value per channel."""
    n_processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if n_processes * features.numel() // features.shape[1] == 1:
        return None

    def mean_over_all(values: Tensor) -> Tensor:
        mean = values.mean([0, *range(2, values.ndim)], keepdim=True)
        if n_processes > 1:  # each has as many values
            distributed.all_reduce(mean)
            mean /= n_processes
        return mean

    features = features.float()
    mean = mean_over_all(features)
    variance = mean_over_all((features - mean).square_())  # torch.var takes four times as long on a CPU
    return mean.flatten(), variance.flatten()
