"""The training loader against datasets that decode a tile each time: 1024-px GeoTIFF, one process, no workers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import rasterio
import torch
from benchmarks.measure import Result, Way, optional, race
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hf_seg.data.dataloaders import AugmentedStream, train_dataloader
from hf_seg.data.open_earth_map import load_open_earth_map_sar
from hf_seg.data.samples import LabelledImages
from hf_seg.data.transforms import sar_transform
from hf_seg.labels import IGNORE_INDEX
from hf_seg.normalization import IMAGENET, to_pixel_values
from hf_seg.synthetic import TARGET_FOLDER, make_synthetic_dataset

TILES, SAMPLES, BATCH = 8, 32, 4


class PairsOfFiles(Dataset[dict[str, Tensor]]):
    """A dataset as tutorials write it: read both files, then transform."""

    def __init__(self, pairs: list[tuple[Path, Path]], read: Callable[[Path], np.ndarray], transform: Any) -> None:
        self.pairs, self.read, self.transform = pairs, read, transform

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = (self.read(path) for path in self.pairs[index % len(self.pairs)])
        return self.transform(image, label)


def _read_rasterio(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read(1)


def _albumentations_transform(crop: int) -> Callable[[np.ndarray, np.ndarray], dict[str, Tensor]]:
    pipeline = A.Compose([
        A.RandomScale((-0.5, 1.0)),
        A.PadIfNeeded(crop, crop, fill_mask=IGNORE_INDEX),
        A.RandomCrop(crop, crop),
        A.D4(),
        A.RandomBrightnessContrast(p=0.5),
    ])  # fmt: skip

    def transform(image: np.ndarray, label: np.ndarray) -> dict[str, Tensor]:
        augmented = pipeline(image=image, mask=label)
        return {
            "pixel_values": to_pixel_values(augmented["image"], IMAGENET),
            "labels": torch.from_numpy(augmented["mask"].astype(np.int64)),
        }

    return transform


def _torchgeo_transform(kornia: Any, crop: int) -> Callable[[np.ndarray, np.ndarray], dict[str, Tensor]]:
    """Return the tile as torchgeo's datasets do (float32 tensors), augmented by kornia as its trainers do."""
    pipeline = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((crop, crop), scale=(0.25, 1.0), ratio=(1.0, 1.0)),
        kornia.RandomHorizontalFlip(),
        kornia.RandomVerticalFlip(),
        kornia.RandomBrightness((0.8, 1.2), p=0.5),
        kornia.Normalize(torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)),
        data_keys=["input", "mask"],
    )

    def transform(image: np.ndarray, label: np.ndarray) -> dict[str, Tensor]:
        pixels = torch.from_numpy(image).float()[None].expand(3, -1, -1) / 255
        augmented, mask = pipeline(pixels[None], torch.from_numpy(label).float()[None, None])
        return {"pixel_values": augmented[0], "labels": mask[0, 0].long()}

    return transform


def loader(size: int, repeats: int) -> list[Result]:
    """Crops of half the tile's side; cold decodes each tile, warm has them in memory."""
    crop = size // 2
    with tempfile.TemporaryDirectory() as folder:
        data = make_synthetic_dataset(
            Path(folder) / "data", source=2, train=TILES, val=1, test=1, size=size
        ) / TARGET_FOLDER  # fmt: skip
        rows = load_open_earth_map_sar(data, "train")
        cold, warm = LabelledImages(rows, "sar"), LabelledImages(rows, "sar")
        warm.cache(8, progress=False)
        pairs = [
            (path, path.parents[1] / "labels" / path.name)
            for path in sorted((data / "train" / "sar_images").glob("*.tif"))
        ]

        def ours(images: LabelledImages) -> None:
            stream = AugmentedStream(images, sar_transform(crop), seed=0)
            for _ in train_dataloader(stream, start=0, stop=SAMPLES, batch_size=BATCH):
                pass

        def plain(dataset: PairsOfFiles) -> None:
            for _ in DataLoader(dataset, batch_size=BATCH, shuffle=True):
                pass

        pillow = PairsOfFiles(pairs, lambda path: np.array(Image.open(path)), _albumentations_transform(crop))
        peers: dict[str, Way | None] = {"PIL + albumentations": lambda: plain(pillow), "torchgeo style": None}
        if (kornia := optional("kornia.augmentation")) is not None:
            geo = PairsOfFiles(pairs, _read_rasterio, _torchgeo_transform(kornia, crop))
            peers["torchgeo style"] = lambda: plain(geo)
        name = f"loader, {SAMPLES} crops of {crop} from {size} px"
        return [
            Result(f"{name}, cold", *race(lambda: ours(cold), peers, repeats), ">= 1.5"),
            Result(f"{name}, warm", *race(lambda: ours(warm), peers, repeats), ">= 5"),
        ]
