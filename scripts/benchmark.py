"""Measure what the code claims to be fast or small: ours against the plain way, side by side in one run, as ratios.

    python scripts/benchmark.py [--size 1024] [--repeats 5] [lovasz] [confusion] [crop]

Lovász-softmax against the textbook form under autograd (time of forward and backward, bytes kept for the backward
pass), the confusion matrix against `torch.bincount` on selected pixels, and the scaled crop against resizing the whole
image. Each figure is the median of the repeats, the two ways taking turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from hf_seg.data.transforms import RandomScaledCrop
from hf_seg.labels import IGNORE_INDEX, NUM_LABELS
from hf_seg.losses import lovasz_softmax
from hf_seg.metrics import ConfusionMatrix


def race(name: str, plain: Callable[[], object], ours: Callable[[], object], repeats: int) -> None:
    """Time two ways in turns and print the medians and their ratio."""
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats + 1):
        for way, function in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
    before, after = (statistics.median(values[1:]) for values in times.values())  # the first round warms up
    print(f"{name:28s} plain {before * 1e3:9.1f} ms   ours {after * 1e3:9.1f} ms   {before / after:6.1f} x as fast")


def textbook_lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute Lovász-softmax class by class with autograd through sorting (Berman et al. 2018, algorithm 1)."""
    valid = labels != IGNORE_INDEX
    probs, labels = logits.float().softmax(1).movedim(1, -1)[valid], labels[valid]
    losses = []
    for index in labels.unique().tolist():
        foreground = (labels == index).float()
        errors, order = (foreground - probs[:, index]).abs().sort(descending=True)
        foreground = foreground[order]
        intersection = foreground.sum() - foreground.cumsum(0)
        jaccard = 1 - intersection / (foreground.sum() + (1 - foreground).cumsum(0))
        losses.append(errors @ torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]]))
    return torch.stack(losses).mean()


def kept_bytes(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> float:
    """Return the MiB that autograd keeps between forward and backward, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(logits, labels)
    del result
    return sum(storages.values()) / 2**20


def lovasz(size: int, repeats: int) -> None:
    """Compare the loss that keeps one tensor with the textbook's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, NUM_LABELS, size, size, generator=generator).to(device).requires_grad_()
    labels = torch.randint(1, NUM_LABELS, (1, size, size), generator=generator).to(device)
    both = textbook_lovasz, lovasz_softmax
    race("Lovász, forward + backward", *(lambda loss=loss: loss(logits, labels).backward() for loss in both), repeats)
    plain, ours = (kept_bytes(loss, logits, labels) for loss in both)
    name = "Lovász, kept for backward"
    print(f"{name:28s} plain {plain:9.1f} MiB  ours {ours:9.1f} MiB  {plain / ours:6.1f} x as small")


def confusion(size: int, repeats: int) -> None:
    """Compare counting with numpy on bytes to torch's on selected pixels."""
    rng = np.random.default_rng(0)
    predictions, labels = (rng.integers(0, NUM_LABELS, (size, size), dtype=np.uint8) for _ in range(2))
    labels[: size // 10] = IGNORE_INDEX
    tensors = torch.from_numpy(predictions), torch.from_numpy(labels)

    def plain() -> Tensor:
        valid = tensors[1] != IGNORE_INDEX
        return torch.bincount(tensors[1][valid].long() * NUM_LABELS + tensors[0][valid], minlength=NUM_LABELS**2)

    race("confusion matrix", plain, lambda: ConfusionMatrix().update(predictions, labels), repeats)


def crop(size: int, repeats: int) -> None:
    """Compare cutting before resizing to resizing before cutting; zoom 2, crop of half the image."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size), dtype=np.uint8)
    mask = rng.integers(0, NUM_LABELS, (size, size), dtype=np.uint8)
    side = size // 2
    plain = A.Compose(
        [
            A.RandomScale((1.0, 1.0), interpolation=cv2.INTER_LINEAR, p=1),
            A.PadIfNeeded(side, side, fill_mask=IGNORE_INDEX),
            A.RandomCrop(side, side),
        ]
    )
    ours = A.Compose([RandomScaledCrop(side, (2.0, 2.0))])
    both = (lambda pipeline=pipeline: pipeline(image=image, mask=mask) for pipeline in (plain, ours))
    race("scaled crop", *both, repeats)


def main() -> None:
    """Run the named comparisons, or all."""
    everything = {"lovasz": lovasz, "confusion": confusion, "crop": crop}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(everything))
    parser.add_argument("--size", type=int, default=1024, help="side of the image in pixels (1024)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (5)")
    args = parser.parse_args()
    if unknown := set(args.names) - everything.keys():
        parser.error(f"unknown comparison {', '.join(unknown)}; choose from {', '.join(everything)}")
    torch.set_num_threads(1)
    for name in args.names or everything:
        everything[name](args.size, args.repeats)


if __name__ == "__main__":
    main()
