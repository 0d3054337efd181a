"""Measure what the code claims to be fast or small: ours against the plain way, side by side in one run, as ratios.

    python scripts/benchmark.py [--size 1024] [--repeats 5] [--threads 1] [lovasz] [confusion] [crop] [loader]

Lovász-softmax against the textbook form under autograd (time of forward and backward, bytes kept for the backward
pass), the confusion matrix against `torch.bincount` on selected pixels, the scaled crop against resizing the whole
image, and the loader with cached tiles against decoding each. Each figure is the median of the repeats, the two ways
taking turns.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_seg.errors import one_line_errors
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.settings import Parser

if TYPE_CHECKING:
    from torch import Tensor


def race(name: str, plain: Callable[[], object], ours: Callable[[], object], repeats: int) -> None:
    """Time two ways in turns and print the medians and their ratio."""
    import torch

    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats + 1):
        for way, function in (("plain", plain), ("ours", ours)):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
    before, after = (statistics.median(values[1:]) for values in times.values())  # the first round warms up
    print(f"{name:40s} plain {before * 1e3:9.1f} ms   ours {after * 1e3:9.1f} ms   {before / after:6.1f} x as fast")


def textbook_lovasz(logits: "Tensor", labels: "Tensor") -> "Tensor":
    """Compute Lovász-softmax class by class with autograd through sorting (Berman et al. 2018, algorithm 1)."""
    import torch

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


def kept_bytes(loss: Callable[["Tensor", "Tensor"], "Tensor"], logits: "Tensor", labels: "Tensor") -> float:
    """Return the MiB that autograd keeps between forward and backward, each storage counted once."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: "Tensor") -> "Tensor":
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss(logits, labels)
    del result
    return sum(storages.values()) / 2**20


def lovasz(size: int, repeats: int) -> None:
    """Compare the loss that sorts what matters and keeps one tensor with the textbook's.

    Logits without knowledge of the labels, blocks of 16 x 16 pixels, and ones that are mostly right.
    """
    import torch
    import torch.nn.functional as F

    from hf_seg.losses import lovasz_softmax

    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = textbook_lovasz, lovasz_softmax
    for batch, side in ((8, 96), (8, 128), (1, size)):
        generator = torch.Generator().manual_seed(0)
        blocks = torch.randint(
            1, OPEN_EARTH_MAP.num_labels, (batch, side // 16 + 1, side // 16 + 1), generator=generator
        )
        labels = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :side, :side].contiguous()
        noise = torch.randn(batch, OPEN_EARTH_MAP.num_labels, side, side, generator=generator)
        learned = 2 * noise + 4 * F.one_hot(labels, OPEN_EARTH_MAP.num_labels).movedim(-1, 1)
        labels = labels.to(device)
        for kind, values in (("random", noise), ("learned", learned)):
            logits = values.to(device).requires_grad_()
            ways = (lambda loss=loss, logits=logits, labels=labels: loss(logits, labels).backward() for loss in both)
            race(f"Lovász, {batch} x {side} x {side}, {kind}", *ways, repeats)
    plain, ours = (kept_bytes(loss, logits, labels) for loss in both)
    name = "Lovász, kept for backward"
    print(f"{name:40s} plain {plain:9.1f} MiB  ours {ours:9.1f} MiB  {plain / ours:6.1f} x as small")


def confusion(size: int, repeats: int) -> None:
    """Compare counting with numpy on bytes to torch's on selected pixels."""
    import torch

    from hf_seg.metrics import ConfusionMatrix

    rng = np.random.default_rng(0)
    predictions, labels = (rng.integers(0, OPEN_EARTH_MAP.num_labels, (size, size), dtype=np.uint8) for _ in range(2))
    labels[: size // 10] = IGNORE_INDEX
    tensors = torch.from_numpy(predictions), torch.from_numpy(labels)

    def plain() -> "Tensor":
        valid = tensors[1] != IGNORE_INDEX
        return torch.bincount(
            tensors[1][valid].long() * OPEN_EARTH_MAP.num_labels + tensors[0][valid],
            minlength=OPEN_EARTH_MAP.num_labels**2,
        )

    race("confusion matrix", plain, lambda: ConfusionMatrix().update(predictions, labels), repeats)


def crop(size: int, repeats: int) -> None:
    """Compare cutting before resizing to resizing before cutting; zoom 2, crop of half the image."""
    import albumentations as A
    import cv2

    from hf_seg.data.transforms import RandomScaledCrop

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (size, size), dtype=np.uint8)
    mask = rng.integers(0, OPEN_EARTH_MAP.num_labels, (size, size), dtype=np.uint8)
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


def loader(size: int, repeats: int) -> None:
    """Compare decoding each tile to keeping all in memory: SAR tiles of 256 x 256, crops of 96, no workers."""
    from hf_seg.data.dataloaders import AugmentedStream, train_dataloader
    from hf_seg.data.open_earth_map import load_open_earth_map_sar
    from hf_seg.data.samples import LabelledImages
    from hf_seg.data.transforms import sar_transform
    from hf_seg.synthetic import TARGET_FOLDER, make_synthetic_dataset

    with tempfile.TemporaryDirectory() as folder:
        dataset = make_synthetic_dataset(Path(folder) / "synthetic", source=2, train=24, val=1, size=256)
        rows = load_open_earth_map_sar(dataset / TARGET_FOLDER, "train")
        plain, cached = LabelledImages(rows, "sar"), LabelledImages(rows, "sar")
        cached.cache(1, progress=False)

        def load(images: LabelledImages) -> None:
            stream = AugmentedStream(images, sar_transform(96, jitter_prob=0.5, speckle_prob=0.5), seed=0)
            for _ in train_dataloader(stream, start=0, stop=192, batch_size=8):
                pass

        race("loader, 192 samples", lambda: load(plain), lambda: load(cached), repeats)


def main() -> None:
    """Run the named comparisons, or all."""
    everything = {"lovasz": lovasz, "confusion": confusion, "crop": crop, "loader": loader}
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(everything))
    parser.add_argument("--size", type=int, default=1024, help="side of the large image in pixels (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    with one_line_errors():
        args = parser.parse_args()
        if unknown := set(args.names) - everything.keys():
            parser.error(f"unknown comparison {', '.join(unknown)}; choose from {', '.join(everything)}")
        for name in ("size", "repeats", "threads"):
            if getattr(args, name) < 1:
                parser.error(f"{name} must be at least 1; it is {getattr(args, name)}")
    import torch

    torch.set_num_threads(args.threads)
    for name in args.names or everything:
        everything[name](args.size, args.repeats)


if __name__ == "__main__":
    main()
