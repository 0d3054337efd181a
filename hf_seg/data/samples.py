"""Decoded images with their labels, before any transform: labels are joined and masked here, once."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import datasets
import numpy as np
from PIL.Image import DecompressionBombError
from rasterio.errors import RasterioError
from tqdm import tqdm

from hf_seg.bands import Bands
from hf_seg.data.band_images import read_bands
from hf_seg.data.nodata import outside_swath
from hf_seg.data.tile_files import decode_tile
from hf_seg.errors import DatasetError, is_out_of_memory
from hf_seg.labels import BACKGROUND, IGNORE_INDEX, OPEN_EARTH_MAP, LabelSet


class Sample(NamedTuple):
    """One image with its label, before any transform."""

    image_id: str
    image: np.ndarray  # (H, W) or (H, W, bands) uint8
    label: np.ndarray  # (H, W) uint8 class ids, IGNORE_INDEX where there is none
    confidence: np.ndarray | None = None  # (H, W) uint8 of the label, 255 = 1.0


class UnlabelledSample(NamedTuple):
    """One image without a label, before any transform."""

    image_id: str
    image: np.ndarray  # (H, W) or (H, W, bands) uint8
    valid_mask: np.ndarray  # (H, W) bool, False on nodata: zero in every band


AnySample = TypeVar("AnySample", Sample, UnlabelledSample)


class CachedImages(ABC, Generic[AnySample]):
    """Random access to samples, of which the first ones can be kept in memory.

    Args:
        image_ids: names of the images.
    """

    def __init__(self, image_ids: list[str]) -> None:
        self.image_ids = image_ids
        self._cached: list[AnySample] = []

    @abstractmethod
    def _read(self, index: int) -> AnySample:
        """Decode one sample."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> AnySample:
        if 0 <= index < len(self._cached):
            sample = self._cached[index]  # copied, since a transform may write to it
            copies: list[Any] = [value.copy() if isinstance(value, np.ndarray) else value for value in sample]
            return type(sample)(*copies)
        return self._read(index)

    def cache(self, budget_gib: float, *, progress: bool = True) -> float:
        """Decode the first images into memory; those beyond the budget are decoded at each access, as without it.

        To be called before the workers of a loader start: forked workers (Linux) share the memory of this process.
        Every process of a data-parallel training has its own.

        Args:
            budget_gib: memory of the decoded images and labels in GiB.
            progress: show a progress bar.

        Returns:
            GiB used, at most `budget_gib`.

        Raises:
            DatasetError: an image cannot be read.
        """
        self._cached, used = [], 0
        if budget_gib > 0:
            for index in tqdm(range(len(self)), desc="cache", unit="tile", leave=False, disable=not progress):
                sample = self._read(index)
                needed = sum(value.nbytes for value in sample if isinstance(value, np.ndarray))
                if used + needed > budget_gib * 2**30:
                    break
                self._cached.append(sample)
                used += needed
        return used / 2**30


@contextmanager
def _read_errors(image_id: str) -> Iterator[None]:
    """Name the image when a file that has changed since it was checked cannot be read."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, RasterioError, DecompressionBombError) as error:
        if isinstance(error, DatasetError) or is_out_of_memory(error):
            raise
        raise DatasetError(f"{image_id}: cannot be read any more ({error}); was it moved or replaced?") from error


def has_image(rows: datasets.Dataset, column: str) -> list[bool]:
    """Tell which rows have an image in a column, without decoding it."""
    undecoded = _undecoded(rows, [column]).with_format("arrow")
    return list(undecoded[:][column].is_valid().to_pylist())


def _undecoded(rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """Keep image columns only, as {path, bytes}."""
    selected = rows.select_columns(columns)
    for column in columns:
        selected = selected.cast_column(column, datasets.Image(decode=False))
    return selected


def _require_images(rows: datasets.Dataset, column: str, bands: Bands | None) -> None:
    has_bands = not rows.features[column].decode
    if has_bands != (bands is not None):
        found = "bands that dataset.json names" if has_bands else "8-bit SAR or RGB"
        takes = "8-bit SAR or RGB" if bands is None else f"bands {', '.join(bands.names)}"
        raise DatasetError(f"the {column} tiles are of {found}, but the network takes {takes}")
    present = has_image(rows, column)
    if not all(present):
        first = rows["image_id"][present.index(False)]
        raise DatasetError(f"{present.count(False)} of {len(present)} tiles have no {column} image, first {first}")


def _decode(value: Any, bands: Bands | None) -> np.ndarray:
    """Return (H, W) or (H, W, bands) uint8."""
    if bands is None:
        return decode_tile(value)
    raw, valid = read_bands(value)
    if len(raw) != len(bands.names):
        raise DatasetError(
            f"{value['path']} has {len(raw)} bands; the network takes {len(bands.names)}: {', '.join(bands.names)}"
        )
    return np.ascontiguousarray(np.moveaxis(bands.to_uint8(raw, valid), 0, -1))


class LabelledImages(CachedImages[Sample]):
    """Random access to one image column and its labels, as class ids; class 0 becomes `IGNORE_INDEX` here, once.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "sar", "optical" or "image".
        pseudo_labels: rows `{image_id, pseudo_label}` that replace the label column, joined by `image_id`; their
            `confidence` comes with each sample, if there is one.
        bands: of the images, if they are neither 8-bit SAR nor RGB.
        label_set: classes, and the pixel values by which the label column codes them; pseudo-labels are ids already.
        keep_background: keep class 0 as a class.
        mask_nodata: ignore pixels outside the SAR swath (`outside_swath`); for column "sar" only.

    Raises:
        DatasetError: an image is missing or has no label, naming it; on access, an image that cannot be read or whose
            label does not fit it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        *,
        pseudo_labels: datasets.Dataset | None = None,
        bands: Bands | None = None,
        label_set: LabelSet = OPEN_EARTH_MAP,
        keep_background: bool = False,
        mask_nodata: bool = False,
    ) -> None:
        super().__init__(rows["image_id"][:])
        _require_images(rows, column, bands)
        self.column = column
        self.bands = bands
        self.pseudo_labels = pseudo_labels
        self.label_set = label_set
        self.keep_background = keep_background
        self.mask_nodata = mask_nodata
        if pseudo_labels is None:
            kind = "label"
            self.rows = _undecoded(rows, [column, "label"])
            labelled = has_image(rows, "label")
        else:
            kind = "pseudo-label"
            self.rows = _undecoded(rows, [column])
            self._row_of = {image_id: row for row, image_id in enumerate(pseudo_labels["image_id"][:])}
            labelled = [image_id in self._row_of for image_id in self.image_ids]
        if not all(labelled):
            first = self.image_ids[labelled.index(False)]
            raise DatasetError(
                f"{labelled.count(False)} of {len(labelled)} images have no {kind}, first {first}; labels of val and "
                "test are separate archives (python scripts/prepare_data.py download), and --eval_steps 0 trains "
                "without validation"
            )

    def _read(self, index: int) -> Sample:
        image_id = self.image_ids[index]
        confidence = None
        with _read_errors(image_id):
            row = self.rows[index]
            if self.pseudo_labels is None:
                label = decode_tile(row["label"])
            else:
                labelled = self.pseudo_labels[self._row_of[image_id]]
                label = np.asarray(labelled["pseudo_label"])
                confidence = np.array(labelled["confidence"]) if "confidence" in labelled else None
            image = _decode(row[self.column], self.bands)
        if confidence is not None and confidence.shape != label.shape:
            raise DatasetError(f"{image_id}: the confidence is {confidence.shape} and the label {label.shape} pixels")
        if image.shape[:2] != label.shape:
            raise DatasetError(f"{image_id}: the image is {image.shape[:2]} and the label {label.shape} pixels")
        label = self._to_ids(image_id, label)
        if not self.keep_background:
            label[label == BACKGROUND] = IGNORE_INDEX
        if self.mask_nodata:
            label[outside_swath(image)] = IGNORE_INDEX
        return Sample(image_id, image, label, confidence)

    def _to_ids(self, image_id: str, label: np.ndarray) -> np.ndarray:
        """Translate pixel values to class ids, (H, W) uint8."""
        ids = self.label_set.to_ids(label, are_ids=self.pseudo_labels is not None)
        if (wrong := label[ids < 0]).size:
            last = self.label_set.num_labels - 1
            if self.pseudo_labels is not None or self.label_set == OPEN_EARTH_MAP:
                raise DatasetError(f"{image_id}: label {wrong[0]} is no class 0..{last}, nor {IGNORE_INDEX} for none")
            raise DatasetError(f"{image_id}: label {wrong[0]} is no pixel value of the label set; add it to `ignore`")
        return ids.astype(np.uint8)


class UnlabelledImages(CachedImages[UnlabelledSample]):
    """Random access to one image column without labels.

    Args:
        rows: a dataset of `hf_seg.data.open_earth_map`.
        column: its image column: "optical", "sar" or "image".
        bands: of the images, if they are neither 8-bit SAR nor RGB.

    Raises:
        DatasetError: an image is missing, naming it; on access, an image that cannot be read.
    """

    def __init__(self, rows: datasets.Dataset, column: str, *, bands: Bands | None = None) -> None:
        super().__init__(rows["image_id"][:])
        _require_images(rows, column, bands)
        self.rows = _undecoded(rows, [column])
        self.column = column
        self.bands = bands

    def _read(self, index: int) -> UnlabelledSample:
        with _read_errors(self.image_ids[index]):
            image = _decode(self.rows[index][self.column], self.bands)
        valid_mask = np.atleast_3d(image).max(axis=2) > 0
        return UnlabelledSample(self.image_ids[index], image, valid_mask)
