"""Samples in a stateless order: the sample at a position of the training stream depends on (seed, position) alone.

Neither the number of workers or processes nor a resume changes which image comes at a position, or how it is augmented
there. So a checkpoint saves only how many samples were seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import albumentations as A
import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_seg.data.nodata import outside_swath
from hf_seg.errors import DatasetError, UserError
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, NUM_LABELS
from hf_seg.normalization import to_pixel_values


class Sample(NamedTuple):
    """One image with its label, before any transform."""

    image_id: str
    image: np.ndarray  # (H, W) or (H, W, 3) uint8
    label: np.ndarray  # (H, W) uint8 class ids, IGNORE_INDEX where there is none


class UnlabelledSample(NamedTuple):
    """One image without a label, before any transform."""

    image_id: str
    image: np.ndarray  # (H, W) or (H, W, 3) uint8
    valid_mask: np.ndarray  # (H, W) bool, False on nodata: zero in every band


@contextmanager
def _read_errors(image_id: str) -> Iterator[None]:
    """Name the image when PIL cannot read a file that has changed since it was checked."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{image_id}: cannot be read any more ({error}); was it moved or replaced?") from error


def _has_image(rows: datasets.Dataset, column: str) -> list[bool]:
    """Tell which rows have an image in a column, without decoding it."""
    undecoded = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False)).with_format("arrow")
    return list(undecoded[:][column].is_valid().to_pylist())


class LabelledImages:
    """Random access to one image column and its labels; class 0 becomes `IGNORE_INDEX` here, once.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "sar", "optical" or "image".
        pseudo_labels: rows `{image_id, pseudo_label}` that replace the label column, joined by `image_id`.
        keep_background: keep class 0 as a class.
        mask_nodata: ignore pixels outside the SAR swath (`outside_swath`); for column "sar" only.

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
        mask_nodata: bool = False,
    ) -> None:
        self.column = column
        self.pseudo_labels = pseudo_labels
        self.keep_background = keep_background
        self.mask_nodata = mask_nodata
        self.image_ids: list[str] = rows["image_id"][:]
        if pseudo_labels is None:
            kind = "label"
            self.rows = rows.select_columns([column, "label"])
            labelled = _has_image(rows, "label")
        else:
            kind = "pseudo-label"
            self.rows = rows.select_columns([column])
            self._row_of = {image_id: row for row, image_id in enumerate(pseudo_labels["image_id"][:])}
            labelled = [image_id in self._row_of for image_id in self.image_ids]
        if not all(labelled):
            first = self.image_ids[labelled.index(False)]
            raise DatasetError(
                f"{labelled.count(False)} of {len(labelled)} images have no {kind}, first {first}; labels of val and "
                "test are separate archives (python scripts/prepare_data.py download), and --eval_steps 0 trains "
                "without validation"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        with _read_errors(image_id):
            row = self.rows[index]
            if self.pseudo_labels is None:
                label = np.array(row["label"])  # a copy: PIL's memory is read-only
            else:
                label = np.array(self.pseudo_labels[self._row_of[image_id]]["pseudo_label"])
            image = np.array(row[self.column])
        if image.shape[:2] != label.shape:
            raise DatasetError(f"{image_id}: the image is {image.shape[:2]} and the label {label.shape} pixels")
        if (wrong := label[(label >= NUM_LABELS) & (label != IGNORE_INDEX)]).size:
            last = NUM_LABELS - 1
            raise DatasetError(f"{image_id}: label {wrong[0]} is no class 0..{last}, nor {IGNORE_INDEX} for none")
        if not self.keep_background:
            label[label == BACKGROUND] = IGNORE_INDEX
        if self.mask_nodata:
            label[outside_swath(image)] = IGNORE_INDEX
        return Sample(image_id, image, label)


class UnlabelledImages:
    """Random access to one image column without labels.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "optical", "sar" or "image".

    Raises:
        DatasetError: an image is missing, naming it; on access, an image that cannot be read.
    """

    def __init__(self, rows: datasets.Dataset, column: str) -> None:
        self.rows = rows.select_columns([column])
        self.column = column
        self.image_ids: list[str] = rows["image_id"][:]
        present = _has_image(rows, column)
        if not all(present):
            first = self.image_ids[present.index(False)]
            raise DatasetError(f"{present.count(False)} of {len(present)} tiles have no {column} image, first {first}")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> UnlabelledSample:
        with _read_errors(self.image_ids[index]):
            image = np.array(self.rows[index][self.column])
        valid_mask = np.atleast_3d(image).max(axis=2) > 0
        return UnlabelledSample(self.image_ids[index], image, valid_mask)


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
    """

    def __init__(self, samples: LabelledImages | UnlabelledImages, transform: A.Compose, seed: int) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return `{image_id, pixel_values (3, H, W) float32}` and `labels (H, W) int64` or `valid_mask (H, W) bool`.

        Padding is `IGNORE_INDEX` in `labels` and False in `valid_mask`.
        """
        sample = self.samples[index_at(self.seed, position, len(self.samples))]
        self.transform.set_random_seed(seed_at(self.seed, position))
        if isinstance(sample, Sample):
            augmented = self.transform(image=sample.image, mask=sample.label)
            target = {"labels": torch.from_numpy(augmented["mask"].astype(np.int64))}
        else:  # not under "mask", by whose classes a crop is redrawn; padding comes back nonzero
            augmented = self.transform(image=sample.image, masks=[(~sample.valid_mask).astype(np.uint8)])
            target = {"valid_mask": torch.from_numpy(augmented["masks"][0] == 0)}
        return {"image_id": sample.image_id, "pixel_values": to_pixel_values(augmented["image"]), **target}

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]] | UserError:
        """Return a batch of samples for a DataLoader, or the first `UserError`.

        Raised in a worker process, the error would reach the main process with a traceback in its message.
        """
        try:
            return [self[position] for position in positions]
        except UserError as error:
            return error


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


def collate(samples: list[dict[str, Any]] | UserError) -> dict[str, Any] | UserError:
    """Stack the tensors of samples and list their ids; an error of `AugmentedStream.__getitems__` is passed on."""
    if isinstance(samples, UserError):
        return samples
    columns = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {key: values if key == "image_id" else torch.stack(values) for key, values in columns.items()}


class StreamLoader(DataLoader[dict[str, Any]]):
    """A DataLoader that raises a worker's `UserError` in the main process, with its own type and message."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


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
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else every new iterator draws from the global generator that dropout uses
        persistent_workers=False,
        prefetch_factor=4 if num_workers else None,
    )
