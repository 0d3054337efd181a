"""Samples in a stateless order: what stands at a position of the training stream depends on (seed, position) alone.

Neither the number of workers, nor of processes, nor a resume in the middle changes which image comes at a position,
nor how it is augmented there. So nothing about the order needs to be saved but how many samples were seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import albumentations as A
import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_seg.errors import DatasetError
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, NUM_LABELS
from hf_seg.normalization import to_pixel_values


class Sample(NamedTuple):
    """One image with its label, before any transform."""

    image_id: str
    image: np.ndarray  # (H, W) or (H, W, 3) uint8
    label: np.ndarray  # (H, W) uint8 class ids, IGNORE_INDEX where there is none


@contextmanager
def _naming(image_id: str) -> Iterator[None]:
    """Name the image in what PIL raises on a file that changed since it was checked."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{image_id}: cannot be read any more ({error}); was it moved or replaced?") from error


class LabelledImages:
    """Random access to one image column and its labels; here, once, class 0 becomes `IGNORE_INDEX`.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "sar", "optical" or "image".
        pseudo_labels: rows `{image_id, pseudo_label}` that replace the label column, joined by `image_id`.
        keep_background: leave class 0 as a class.

    Raises:
        DatasetError: an image has no label, naming it; on access, an image that cannot be read or whose label does
            not fit it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        *,
        pseudo_labels: datasets.Dataset | None = None,
        keep_background: bool = False,
    ) -> None:
        self.rows = rows.select_columns(["image_id", column] + ["label"] * (pseudo_labels is None))
        self.column = column
        self.pseudo_labels = pseudo_labels
        self.keep_background = keep_background
        self.image_ids: list[str] = rows["image_id"][:]
        if pseudo_labels is not None:
            self._row_of = {image_id: row for row, image_id in enumerate(pseudo_labels["image_id"][:])}
            labelled = [image_id in self._row_of for image_id in self.image_ids]
        else:
            undecoded = self.rows.cast_column("label", datasets.Image(decode=False)).with_format("arrow")
            labelled = undecoded[:]["label"].is_valid().to_pylist()
        if not all(labelled):
            first = self.image_ids[labelled.index(False)]
            raise DatasetError(
                f"{labelled.count(False)} of {len(labelled)} images have no {'pseudo-' * (pseudo_labels is not None)}"
                f"label, first {first}; labels of val and test are archives of their own "
                "(python scripts/prepare_data.py download), and --eval_steps 0 trains without validation"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        with _naming(image_id):
            row = self.rows[index]
            label = row["label"] if self.pseudo_labels is None else self._pseudo_label(image_id)
            image, label = np.array(row[self.column]), np.array(label)  # copies: PIL's memory is read-only
        if image.shape[:2] != label.shape:
            raise DatasetError(f"{image_id}: the image is {image.shape[:2]} and the label {label.shape} pixels")
        if (wrong := label[(label >= NUM_LABELS) & (label != IGNORE_INDEX)]).size:
            last = NUM_LABELS - 1
            raise DatasetError(f"{image_id}: label {wrong[0]} is no class 0..{last}, nor {IGNORE_INDEX} for none")
        if not self.keep_background:
            label = np.where(label == BACKGROUND, np.uint8(IGNORE_INDEX), label)
        return Sample(image_id, image, label)

    def _pseudo_label(self, image_id: str) -> Any:
        assert self.pseudo_labels is not None
        return self.pseudo_labels[self._row_of[image_id]]["pseudo_label"]


class UnlabelledImages:
    """Random access to one image column without labels; a sample's label is 0 where there is ground to label.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "optical" or "image".

    Raises:
        DatasetError: an image is missing, naming it; on access, an image that cannot be read.
    """

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        self.rows = rows.select_columns([column])
        self.column = column
        self.image_ids: list[str] = rows["image_id"][:]
        undecoded = self.rows.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        present = undecoded[:][column].is_valid().to_pylist()
        if not all(present):
            first = self.image_ids[present.index(False)]
            raise DatasetError(f"{present.count(False)} of {len(present)} tiles have no {column} image, first {first}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        with _naming(self.image_ids[index]):
            image = np.array(self.rows[index][self.column])
        has_data = image.any(axis=-1) if image.ndim == 3 else image > 0
        return Sample(self.image_ids[index], image, np.where(has_data, 0, IGNORE_INDEX).astype(np.uint8))


def stream_seed(seed: int, stream: int) -> int:
    """Return the seed of one of several streams that must not follow each other; stream 0 has `seed` itself."""
    return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0] >> 1) if stream else seed


def seed_at(seed: int, position: int) -> int:
    """Return the seed of what is random at one position of the stream: 32 well-mixed bits."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1)[0])


@lru_cache(maxsize=4)
def _order_of_epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def index_at(seed: int, position: int, length: int) -> int:
    """Return which of `length` samples stands at a position of the endless stream: every epoch a fresh permutation."""
    return int(_order_of_epoch(seed, position // length, length)[position % length])


class AugmentedStream(Dataset[dict[str, Any]]):
    """The endless training stream; indexed by position.

    Args:
        samples: what to draw from.
        transform: an albumentations pipeline of image and mask.
        seed: with the position, fixes image and augmentation.
    """

    def __init__(self, samples: LabelledImages | UnlabelledImages, transform: A.Compose, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return `{image_id, pixel_values (3, H, W) float32, labels (H, W) int64}`."""
        sample = self.samples[index_at(self.seed, position, len(self.samples))]
        self.transform.set_random_seed(seed_at(self.seed, position))
        augmented = self.transform(image=sample.image, mask=sample.label)
        labels = torch.from_numpy(augmented["mask"].astype(np.int64))
        return {"image_id": sample.image_id, "pixel_values": to_pixel_values(augmented["image"]), "labels": labels}


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


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `{image_id: list, pixel_values (B, 3, H, W), labels (B, H, W)}`."""
    batch: dict[str, Any] = {"image_id": [sample["image_id"] for sample in samples]}
    for key in ("pixel_values", "labels"):
        batch[key] = torch.stack([sample[key] for sample in samples])
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
) -> DataLoader[dict[str, Tensor]]:
    """Load one process's share of positions `start` to `stop` of a stream.

    The loader is not for `accelerator.prepare`: it is split among processes already.
    """
    return DataLoader(
        stream,
        batch_sampler=PositionSampler(start, stop, batch_size, process_index, num_processes),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator draws from the global generator that dropout uses
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )
