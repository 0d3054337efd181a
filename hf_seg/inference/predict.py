"""One network or several as functions from uint8 images to class probabilities.

predictor = Predictor(load_networks("runs/ensemble"), device=torch.device("cpu"), tta="flips")
accumulator = predictor.predict(image)              # (H, W) or (H, W, 3) uint8 of any size
accumulator.label_map()                             # (H, W) class ids
"""

import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from hf_seg.arguments import PredictionSettings
from hf_seg.errors import UserError, memory_errors
from hf_seg.inference.load import LoadedNetwork, common_label_set, normalized_weights, shared_bands
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.inference.tta import TTA_PRESETS, average_views
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.normalization import to_pixel_values

logger = logging.getLogger(__name__)

SMALL_WINDOW = 32  # pixels; every network of this project takes it
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """Networks in eval mode on one device, whose probabilities are averaged by their weights.

    Args:
        networks: of `load_networks` or `use_network`; moved to the device. Those left on disk are loaded one at a time.
        device: where they compute.
        tta: test-time augmentation, one of `TTA_PRESETS`.
        stride: step of the window through an image, as a share of the window.
        batch_size: windows of an image per forward pass.
        mixed_precision: "no", "bf16" or "fp16" (accelerators only).
        dtype: of the networks' weights.
        batch_setting: the setting that an error names where a batch does not fit into memory.

    Attributes:
        weights: of the networks, with a sum of 1.
        bands: of the images; None: 8-bit SAR or RGB.
        label_set: their classes.
        seconds: spent in the networks.

    Raises:
        UserError: a setting that does not exist here, or networks of different classes.
    """

    def __init__(
        self,
        networks: Sequence[LoadedNetwork],
        *,
        device: torch.device,
        tta: str = "none",
        stride: float = 0.5,
        batch_size: int = 4,
        mixed_precision: str = "no",
        dtype: torch.dtype = torch.float32,
        batch_setting: str = "--batch_size",
    ) -> None:
        if tta not in TTA_PRESETS:
            raise UserError(f"unknown tta {tta!r}; choose one of {', '.join(TTA_PRESETS)}")
        if mixed_precision not in PRECISIONS or (mixed_precision == "fp16" and device.type == "cpu"):
            raise UserError(f"mixed_precision is {mixed_precision!r}; it must be no or bf16, or fp16 on an accelerator")
        self.networks = list(networks)
        self.device, self.tta, self.mixed_precision, self.dtype = device, tta, mixed_precision, dtype
        self.stride, self.batch_size, self.batch_setting = stride, batch_size, batch_setting
        self.weights = normalized_weights(self.networks)
        self.bands = shared_bands(self.networks)
        self.label_set = common_label_set(self.networks)
        self.seconds = 0.0
        for loaded in self.networks:
            if loaded.module is not None:
                loaded.module.to(device).eval()
        self.batches = device.type != "cpu" and tta == "none"  # on a CPU a batch saves no time
        self._steady: dict[tuple[int, ...], bool] = {}

    @classmethod
    def with_settings(
        cls, networks: Sequence[LoadedNetwork], settings: PredictionSettings, *, device: torch.device
    ) -> Self:
        """Build a predictor from the settings of a command."""
        return cls(
            networks,
            device=device,
            tta=settings.tta,
            stride=settings.stride,
            batch_size=settings.batch_size,
            mixed_precision=settings.mixed_precision,
        )

    def predict(self, image: np.ndarray) -> VoteAccumulator:
        """Predict one image of any size; see `predict_all`."""
        (accumulator,) = self.predict_all([image])
        return accumulator

    def predict_all(
        self,
        images: Sequence[np.ndarray],
        *,
        keep_on: torch.device | None = None,
        on_image: Callable[[], object] = lambda: None,
    ) -> list[VoteAccumulator]:
        """Predict images of any size, each network through its own sliding window, network by network.

        Args:
            images: (H, W) or (H, W, 3) uint8 each; a sequence that reads them when they are asked for will do.
            keep_on: where the running sums of all images are kept; None: on the networks' device.
            on_image: called after each image of each network.

        Returns:
            The accumulated votes for each image.
        """
        accumulators = [VoteAccumulator(keep_on) for _ in range(len(images))]
        for loaded, weight in zip(self.networks, self.weights, strict=True):
            network = self._place(loaded)
            for index, accumulator in enumerate(accumulators):
                pixel_values = to_pixel_values(images[index], loaded.normalization).to(self.device)
                accumulator.add(self._image_probs(network, loaded, pixel_values, self.stride, self.batch_size), weight)
                on_image()
            del network  # its memory goes before the next one's comes
        return accumulators

    def window_probs(self, index: int, windows: Tensor) -> Iterable[Tensor]:
        """Return what one network says about some windows, to the same bits however they are batched.

        Args:
            index: of the network.
            windows: (B, 1 or 3, h, w) uint8; one band is replicated to three.

        Returns:
            B times (9, h, w) float32 on the device, sums to 1 over the classes.
        """
        if self._is_steady(index, windows.shape):
            return self._window_probs(index, windows)
        return (self._window_probs(index, window[None])[0] for window in windows)

    def _place(self, loaded: LoadedNetwork) -> nn.Module:
        return loaded.module or loaded.network().to(self.device, self.dtype)

    @torch.no_grad()
    def _image_probs(
        self, network: nn.Module, loaded: LoadedNetwork, pixel_values: Tensor, stride: float, batch_size: int
    ) -> Tensor:
        """Average over the views of an image, each through the sliding window; (3, H, W) -> (9, H, W) float32."""
        window = loaded.crop_size
        step = max(1, round(stride * window))

        def predict(view: Tensor) -> Tensor:
            return sliding_window_probs(
                lambda windows: self._logits(network, windows), view, window=window, stride=step, batch_size=batch_size
            )

        return average_views(predict, pixel_values, self.tta)

    @torch.no_grad()
    def _window_probs(self, index: int, windows: Tensor) -> Tensor:
        loaded = self.networks[index]
        network = self._place(loaded)
        pixel_values = loaded.normalization.apply(windows.to(self.device))
        if self.tta == "none":
            return self._logits(network, pixel_values).float().softmax(dim=1)
        # a view may be of another size than the window, the network sees it in windows
        return torch.stack([self._image_probs(network, loaded, image, 0.5, 1) for image in pixel_values])

    def _is_steady(self, index: int, shape: Sequence[int]) -> bool:
        """Tell whether a batch has the bits of its windows, tried once per shape on noise.

        Libraries choose their kernels, and with them the order of sums, by shape.
        """
        if shape[0] == 1 or not self.batches:
            return False
        key = (index, *shape)
        if key not in self._steady:
            noise = torch.randint(0, 256, tuple(shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
            self._steady[key] = is_steady(lambda windows: self._window_probs(index, windows), noise)
            if not self._steady[key]:
                logger.info("batches of %d windows would change the last bits: windows go one by one", shape[0])
        return self._steady[key]

    def _logits(self, network: nn.Module, pixel_values: Tensor) -> Tensor:
        start = time.perf_counter()
        dtype = PRECISIONS[self.mixed_precision]
        windows = f"{len(pixel_values)} windows of {pixel_values.shape[-1]} pixels"
        autocast = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        try:
            with (
                memory_errors(f"{windows} do not fit into the memory of {self.device}; lower {self.batch_setting}"),
                autocast,
            ):
                output: Any = network(pixel_values.to(self.dtype))
        except RuntimeError:
            height, width = pixel_values.shape[-2:]
            if min(height, width) >= SMALL_WINDOW:
                raise
            raise UserError(
                f"a window of {height} x {width} pixels is too small for the network; choose a larger --window"
            ) from None
        logits = output if isinstance(output, Tensor) else output.logits
        num_labels = self.label_set.num_labels
        if logits.ndim != 4 or logits.shape[:2] != (len(pixel_values), num_labels):
            raise UserError(
                f"the network returns {tuple(logits.shape)} for {tuple(pixel_values.shape)}; expected logits of "
                f"{num_labels} classes, ({len(pixel_values)}, {num_labels}, height, width)"
            )
        if not torch.isfinite(logits).all():
            raise UserError(
                "the network returns values that are not finite; its weights are damaged, or fp16 overflows"
            )
        if logits.shape[2:] != pixel_values.shape[2:]:
            size = pixel_values.shape[2:]
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - start
        return logits

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of all that the probabilities depend on: weights, normalisation, windows, arithmetic."""
        digest = hashlib.sha256(repr((self.device.type, self.tta, self.mixed_precision, self.weights)).encode())
        for loaded in self.networks:
            network = loaded.network()
            digest.update(repr((loaded.crop_size, loaded.normalization, loaded.bands or "", network)).encode())
            for name, tensor in network.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def is_steady(predict: Callable[[Tensor], Tensor], windows: Tensor) -> bool:
    """Tell whether a batch of windows gives exactly the bits that each of them gives alone."""
    return torch.equal(predict(windows), torch.cat([predict(window[None]) for window in windows]))
