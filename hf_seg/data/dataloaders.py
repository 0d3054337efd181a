"""Samples in a stateless order: the sample at a position of the training stream depends on (seed, position) alone.

Neither the number of workers or processes nor a resume changes which image comes at a position, or how it is augmented
there. So a checkpoint saves only how many samples were seen.
"""

import random
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_seg.data.rare_classes import RareClassSampling
from hf_seg.data.samples import LabelledImages, Sample, UnlabelledImages
from hf_seg.errors import UserError, memory_errors
from hf_seg.normalization import IMAGENET, Normalization


def stream_seed(seed: int, stream: int) -> int:
    """Return the seed of one of several independent random streams; stream 0 has `seed` itself."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0] >> 1) if stream else seed


def seed_at(seed: int, position: int) -> int:
    """Return the seed of the random numbers at one position of the stream: 32 well-mixed bits."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


@lru_cache(maxsize=4)
def _order_of_epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def index_at(seed: int, position: int, length: int) -> int:
    """Return which of `length` samples is at a position of the endless stream: every epoch a fresh permutation."""
    return int(_order_of_epoch(seed, position // length, length)[position % length])


class AugmentedStream(Dataset[dict[str, Any]]):
    """The endless training stream; indexed by position.

    Args:
        samples: what to draw from.
        transform: an albumentations pipeline of image and mask.
        seed: with the position, fixes image and augmentation.
        sampling: draws the images by class; None draws a fresh permutation of all images in every epoch.
        normalization: of the network's input.
    """

    def __init__(
        self,
        samples: LabelledImages | UnlabelledImages,
        transform: A.Compose,
        seed: int,
        *,
        sampling: RareClassSampling | None = None,
        normalization: Normalization = IMAGENET,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.sampling = sampling
        self.normalization = normalization

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return `{image_id, pixel_values (bands, H, W)}` and `labels (H, W) int64` or `valid_mask (H, W) bool`.

        Padding is `IGNORE_INDEX` in `labels` and False in `valid_mask`. Labels that have a confidence come with
        `weights` (H, W) float32, 0..1.
        """
        return {key: values[0] for key, values in self._batch([position]).items()}

    def __getitems__(self, positions: list[int]) -> dict[str, Any] | UserError:
        """Return a batch of samples for a DataLoader, or the first `UserError`.

        Raised in a worker process, the error would reach the main process with a traceback in its message.
        """
        hint = "lower --dataloader_num_workers, --cache_gib or --crop_size"
        try:
            with memory_errors(f"images do not fit into memory while they are augmented; {hint}"):
                return self._batch(positions)
        except UserError as error:
            return error

    def _batch(self, positions: list[int]) -> dict[str, Any]:
        """Stack the samples as bytes and convert all at once: the batch is the only array of its size in float32."""
        samples = [self._augment(position) for position in positions]
        columns = {key: [sample[key] for sample in samples] for key in samples[0]}
        images = torch.from_numpy(np.stack(columns["image"]))
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        batch = {"image_id": columns["image_id"], "pixel_values": self.normalization.apply(images)}
        if "label" in columns:
            batch["labels"] = torch.from_numpy(np.stack(columns["label"])).long()
        if "confidence" in columns:
            batch["weights"] = torch.from_numpy(np.stack(columns["confidence"])).float() / 255
        if "padding" in columns:
            batch["valid_mask"] = torch.from_numpy(np.stack(columns["padding"]) == 0)
        return batch

    def _augment(self, position: int) -> dict[str, Any]:
        """Return the uint8 arrays of a sample by name, and its `image_id`."""
        if self.sampling is None:
            index = index_at(self.seed, position, len(self.samples))
        else:
            index = self.sampling.index_at(self.seed, position)
        sample = self.samples[index]
        seed = seed_at(self.seed, position)
        # One generator for all transforms; `set_random_seed` would give each one its own, with the same numbers.
        self.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))  # noqa: S311 (not for secrets)
        if isinstance(sample, Sample):
            more = {} if sample.confidence is None else {"masks": [sample.confidence]}
            augmented = self.transform(image=sample.image, mask=sample.label, **more)
            target = {"label": augmented["mask"]} | ({"confidence": augmented["masks"][0]} if more else {})
        else:  # not under "mask", by whose classes a crop is redrawn; padding comes back nonzero
            augmented = self.transform(image=sample.image, masks=[(~sample.valid_mask).astype(np.uint8)])
            target = {"padding": augmented["masks"][0]}
        return {"image_id": sample.image_id, "image": augmented["image"], **target}


class PositionSampler(Sampler[list[int]]):
    """Positions of one process's micro-batches, from `start` on.

    A global batch is a run of `batch_size * num_processes` positions, of which each process takes its slice.
    """

    def __init__(self, start: int, stop: int, batch_size: int, process_index: int = 0, num_processes: int = 1) -> None:
        self.starts = range(start + process_index * batch_size, stop, batch_size * num_processes)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(first, first + self.batch_size)) for first in self.starts)


class StreamLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that raises a worker's `UserError` in the main process, with its own type and message."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def train_dataloader(
    stream: AugmentedStream,
    *,
    start: int,
    stop: int,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
) -> StreamLoader:
    """Load one process's part of positions `start` to `stop` of a stream.

    Its batches are `{image_id: list, pixel_values (B, 3, H, W)}` and `labels` or `valid_mask` (B, H, W). The loader is
    not for `accelerator.prepare`: it is split among processes already.
    """
    return StreamLoader(
        stream,
        batch_sampler=PositionSampler(start, stop, batch_size, process_index, num_processes),
        collate_fn=_as_it_is,  # `__getitems__` returns batches
        num_workers=num_workers,
        # Forked workers share the cached images; others, the default from Python 3.14 on, would each get a copy.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator draws from the global generator that dropout uses
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )
