"""Losses, the metric and the moving average against other libraries' and the plain form."""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.measure import Figure, Result, Way, optional, race
from torch import Tensor

from hf_seg.adaptation.mean_teacher import MeanTeacher
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.losses import lovasz_softmax, noise_robust_loss
from hf_seg.metrics import ConfusionMatrix
from hf_seg.models import build_model

N_LABELS = OPEN_EARTH_MAP.num_labels
Loss = Callable[[Tensor, Tensor], Tensor]


def metric(size: int, repeats: int) -> list[Result]:
    """Count a map of size x size and compute the IoU of each class."""
    rng = np.random.default_rng(0)
    truth = rng.integers(1, N_LABELS, (size, size), dtype=np.uint8)
    predictions = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(1, N_LABELS, truth.shape, dtype=np.uint8))
    truth[: size // 10] = IGNORE_INDEX
    tensors = torch.from_numpy(predictions), torch.from_numpy(truth)

    def ours() -> list[float | None]:
        matrix = ConfusionMatrix()
        matrix.update(predictions, truth)
        return list(matrix.compute()["iou"].values())

    peers: dict[str, Way | None] = {"torchmetrics": None, "evaluate": None}
    if (torchmetrics := optional("torchmetrics.classification")) is not None:
        how = {"num_classes": N_LABELS, "ignore_index": IGNORE_INDEX, "average": None, "validate_args": False}

        def jaccard() -> Tensor:
            index = torchmetrics.MulticlassJaccardIndex(**how)
            index.update(*tensors)
            return index.compute()

        np.testing.assert_allclose(np.array(ours()[1:], float), jaccard()[1:].numpy(), rtol=1e-5)
        peers["torchmetrics"] = jaccard
    if (stock := _stock_mean_iou()) is not None:
        maps = {"predictions": [predictions], "references": [truth]}
        peers["evaluate"] = partial(stock.compute, **maps, num_labels=N_LABELS, ignore_index=IGNORE_INDEX)
    return [Result(f"metric, {size} x {size}", *race(ours, peers, repeats), "torchmetrics >= 2, evaluate >= 50")]


def _stock_mean_iou() -> object | None:
    """Return evaluate's own metric; None where its code is not on disk and the Hub cannot be reached."""
    import evaluate

    try:
        return evaluate.load("mean_iou")
    except (OSError, ImportError, ValueError):
        return None


def make_logits(size: int, *, learned: bool) -> tuple[Tensor, Tensor]:
    """Return (1, 9, size, size) logits and labels in blocks of 16 x 16 pixels, a tenth ignored."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(1, N_LABELS, (1, size // 16 + 1, size // 16 + 1), generator=generator)
    labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :size, :size].contiguous()
    logits = torch.randn(1, N_LABELS, size, size, generator=generator)
    if learned:
        logits = 2 * logits + 4 * F.one_hot(labels, N_LABELS).movedim(-1, 1)
    labels[:, : size // 10] = IGNORE_INDEX
    return logits.requires_grad_(), labels


def kept_mebibytes(loss: Loss, logits: Tensor, labels: Tensor) -> float:
    """Return the MiB that autograd keeps between forward and backward, each storage counted once."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(logits, labels)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / 2**20


def _peer_lovasz() -> Loss | None:
    """Return segmentation_models_pytorch's Lovász-softmax."""
    losses = optional("segmentation_models_pytorch.losses")
    return losses and losses.LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)


def _forward_backward(loss: Loss, logits: Tensor, labels: Tensor) -> None:
    logits.grad = None
    loss(logits, labels).backward()


def _compare_losses(name: str, ours: Loss, peer_name: str, peer: Loss | None, size: int, repeats: int) -> list[Result]:
    results, goal = [], ">= 3"
    for kind in ("random", "learned"):
        case = make_logits(size, learned=kind == "learned")
        if peer is not None:
            torch.testing.assert_close(ours(*case), peer(*case), rtol=1e-4, atol=1e-5)
        peers = {peer_name: peer and partial(_forward_backward, peer, *case)}
        figures = race(partial(_forward_backward, ours, *case), peers, repeats)
        results.append(Result(f"{name}, 1 x 9 x {size} x {size}, {kind} logits", *figures, goal))
    kept = {peer_name: peer and Figure.of([kept_mebibytes(peer, *case)])}
    ours_kept = Figure.of([kept_mebibytes(ours, *case)])
    return [*results, Result(f"{name}, kept for the backward pass", ours_kept, kept, goal, "MiB")]


def lovasz(size: int, repeats: int) -> list[Result]:
    """Lovász-softmax, forward and backward."""
    return _compare_losses("Lovász", lovasz_softmax, "segmentation_models_pytorch", _peer_lovasz(), size, repeats)


def losses(size: int, repeats: int) -> list[Result]:
    """CE, reverse CE and Lovász-softmax together against three losses that do not know of each other."""
    lovasz_loss = _peer_lovasz()

    def separate(logits: Tensor, labels: Tensor) -> Tensor:
        valid = labels != IGNORE_INDEX
        truth = F.one_hot(labels * valid, N_LABELS).movedim(-1, 1).float()
        reverse = -(logits.softmax(1) * torch.log(truth + 1e-4)).sum(1)
        reverse = (reverse * valid).sum() / valid.sum()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX) + reverse + lovasz_loss(logits, labels)

    def together(logits: Tensor, labels: Tensor) -> Tensor:
        return noise_robust_loss(logits, labels)["loss"]

    return _compare_losses("CE + RCE + Lovász", together, "three losses", lovasz_loss and separate, size, repeats)


def ema(size: int, repeats: int, model: str = "nvidia/mit-b5", batch_size: int = 1) -> list[Result]:
    """The teacher's update against a loop over parameters, and its share of a training step at size / 4."""
    student = build_model(model, crop_size=size // 4, from_scratch=True)
    teacher = MeanTeacher(student)
    teacher.update(student)
    plain = copy.deepcopy(teacher.model)

    def loop() -> None:
        with torch.no_grad():
            for mine, theirs in zip(plain.parameters(), student.parameters(), strict=True):
                mine.mul_(teacher.decay).add_(theirs, alpha=1 - teacher.decay)
            for mine, theirs in zip(plain.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)

    name = model.rpartition("/")[2]
    ours, peers = race(lambda: teacher.update(student), {"parameter loop": loop}, repeats)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    pixel_values = torch.randn(batch_size, 3, size // 4, size // 4)

    def step() -> None:
        student(pixel_values=pixel_values).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step_figure, _ = race(step, {}, min(repeats, 2))
    share = Result(
        f"EMA update of {name}, and a step of {batch_size} x {size // 4} x {size // 4}",
        ours, {"one step": step_figure}, ">= 50 (2 %)",
    )  # fmt: skip
    return [Result(f"EMA update of {name}", ours, peers, ">= 3"), share]
