"""One network or several, loaded or at hand, as one function from uint8 windows to class probabilities.

predictor = Predictor(load_members("runs/ensemble"), device=torch.device("cpu"))
probs = predictor.probs(0, windows)        # of the first network; (B, 1 or 3, h, w) uint8 -> (B, 9, h, w)
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    PreTrainedModel,
    SegformerForSemanticSegmentation,
    UperNetForSemanticSegmentation,
)

from hf_seg.errors import UserError
from hf_seg.hub.ensemble_folder import CONFIG_FILE, find_folder, read_ensemble
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.inference.tta import VIEW_PRESETS, average_views
from hf_seg.labels import NUM_LABELS
from hf_seg.models import SegmentationNetwork, load_trained
from hf_seg.normalization import IMAGE_MEAN, IMAGE_STD

logger = logging.getLogger(__name__)

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class Member:
    """One network, the window it sees, and its share of the average.

    Args:
        network: (B, 3, window, window) float32 -> logits (B, 9, h, w), bare or as the `.logits` of its output; of any
            height and width, which are brought to the window's.
        window: the crop that it was trained at, in pixels.
        weight: relative to the other members.
        mean, std: the input's normalisation, three values each, in units of 0..255.
    """

    network: nn.Module
    window: int
    weight: float = 1.0
    mean: Tensor = field(default_factory=lambda: 255 * torch.tensor(IMAGE_MEAN))
    std: Tensor = field(default_factory=lambda: 255 * torch.tensor(IMAGE_STD))


def load_members(model: str | Path | nn.Module | Sequence[Member], *, window: int | None = None) -> list[Member]:
    """Return the networks that a model consists of.

    Args:
        model: folder or Hub id (`id@revision` pins it) of a trained network, or of an ensemble as in
            hf_seg/hub/ensemble_folder.py; or a network in memory; or members.
        window: replaces the crop that the networks were trained at. A network in memory needs it, and gets our
            normalisation, unless it came from a folder or the Hub with its image processor.

    Raises:
        UserError: no such model, other classes, damaged weights or ensemble, or a window that is missing.
    """
    if window is not None and window < 1:
        raise UserError(f"window must be at least 1 pixel; it is {window}")
    if isinstance(model, nn.Module):
        members = [_wrap(model, window)]
    elif isinstance(model, str | Path):
        members = _load_ensemble(str(model)) or [_with_processor(load_trained(str(model))[0], str(model))]
    else:
        members = list(model)
    return members if window is None else [dataclasses.replace(member, window=window) for member in members]


def _wrap(network: nn.Module, window: int | None) -> Member:
    """Make a member of a network in memory."""
    if isinstance(network, SegformerForSemanticSegmentation | UperNetForSemanticSegmentation):
        if network.name_or_path:  # loaded, not built
            with contextlib.suppress(OSError):
                return _with_processor(network, network.name_or_path)
        network = SegmentationNetwork(network)  # stock UperNet would also compute its auxiliary head
    if window is None:
        raise UserError("this network does not tell the crop that it was trained at: pass window=..., in pixels")
    return Member(network, window)


def _with_processor(model: PreTrainedModel, name: str) -> Member:
    """Join a model and the image processor that was saved with it."""
    processor = AutoImageProcessor.from_pretrained(name)
    scale = 1 / processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return Member(
        SegmentationNetwork(model),
        int(processor.size["height"]),
        mean=scale * torch.tensor(mean),
        std=scale * torch.tensor(std),
    )


def _load_ensemble(name: str) -> list[Member]:
    """Load the networks of an ensemble; none if the name is of a single network, or of nothing."""
    try:
        folder, _ = find_folder(name, (CONFIG_FILE, "member_*/*"))
    except UserError:  # the loader of a single network says better what is wrong
        return []
    if not (folder / CONFIG_FILE).exists():
        return []
    members, folders = read_ensemble(folder, name)
    networks = [_with_processor(load_trained(str(place))[0], str(place)) for place in folders]
    return [dataclasses.replace(n, weight=m.weight) for n, m in zip(networks, members, strict=True)]


class Predictor:
    """Networks in eval mode on one device, whose probabilities are to be averaged by their weights.

    Args:
        members: the networks; moved to the device.
        views: test-time augmentation of each window, one of `VIEW_PRESETS`.
        mixed_precision: "no", "bf16" or "fp16" (accelerators only).

    Raises:
        UserError: a setting that does not exist here.
    """

    def __init__(
        self, members: Sequence[Member], *, device: torch.device, views: str = "none", mixed_precision: str = "no"
    ) -> None:
        if views not in VIEW_PRESETS:
            raise UserError(f"unknown views {views!r}; choose one of {', '.join(VIEW_PRESETS)}")
        if mixed_precision not in PRECISIONS or (mixed_precision == "fp16" and device.type == "cpu"):
            raise UserError(f"mixed_precision is {mixed_precision!r}; it must be no or bf16, or fp16 on an accelerator")
        self.members = list(members)
        self.device, self.views, self.mixed_precision = device, views, mixed_precision
        self.seconds = 0.0  # spent in the networks
        total = sum(member.weight for member in self.members)
        self.weights = [member.weight / total for member in self.members]
        for member in self.members:
            member.network.to(device).eval()
            member.mean, member.std = (values.view(3, 1, 1).to(device) for values in (member.mean, member.std))
        self.batches = device.type != "cpu" and views == "none"  # on a CPU a batch saves no time
        self._steady: dict[tuple[int, ...], bool] = {}

    def probs(self, index: int, windows: Tensor) -> Iterable[Tensor]:
        """Return what one member says about some windows, to the same bits however they are batched.

        Args:
            index: of the member.
            windows: (B, 1 or 3, h, w) uint8; one band is replicated to three.

        Returns:
            B times (9, h, w) float32 on the device, sums to 1 over the classes.
        """
        if self._is_steady(index, windows.shape):
            return self._probs(index, windows)
        return (self._probs(index, window[None])[0] for window in windows)

    def _is_steady(self, index: int, shape: Sequence[int]) -> bool:
        """Tell whether a batch has the bits of its windows, tried once per shape on noise.

        Libraries choose their kernels, and with them the order of sums, by shape.
        """
        if shape[0] == 1 or not self.batches:
            return False
        key = (index, *shape)
        if key not in self._steady:
            noise = torch.randint(0, 256, tuple(shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
            self._steady[key] = is_steady(lambda windows: self._probs(index, windows), noise)
            if not self._steady[key]:
                logger.info("batches of %d windows would change the last bits: windows go one by one", shape[0])
        return self._steady[key]

    @torch.inference_mode()
    def _probs(self, index: int, windows: Tensor) -> Tensor:
        member = self.members[index]
        images = windows.to(self.device).expand(-1, 3, -1, -1).float().sub_(member.mean).div_(member.std)
        if self.views == "none":
            return self._logits(member, images).float().softmax(dim=1)

        def predict(image: Tensor) -> Tensor:  # a view may be of another size than the window, the network sees it so
            stride = max(1, member.window // 2)
            return sliding_window_probs(lambda x: self._logits(member, x), image, window=member.window, stride=stride)

        return torch.stack([average_views(predict, image, self.views) for image in images])

    def _logits(self, member: Member, images: Tensor) -> Tensor:
        start = time.perf_counter()
        dtype = PRECISIONS[self.mixed_precision]
        try:
            with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
                output: Any = member.network(images)
        except torch.OutOfMemoryError:
            size = f"{len(images)} windows of {member.window} pixels"
            raise UserError(f"{size} do not fit into the memory of {self.device}; lower --batch_size") from None
        logits = output if isinstance(output, Tensor) else output.logits
        if logits.ndim != 4 or logits.shape[:2] != (len(images), NUM_LABELS):
            raise UserError(
                f"the network returns {tuple(logits.shape)} for {tuple(images.shape)}; expected logits of "
                f"{NUM_LABELS} classes, ({len(images)}, {NUM_LABELS}, height, width)"
            )
        if logits.shape[2:] != images.shape[2:]:
            logits = nn.functional.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - start
        return logits

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all that the probabilities depend on: weights, normalisation, windows, arithmetic."""
        digest = hashlib.sha256(repr((self.device.type, self.views, self.mixed_precision, self.weights)).encode())
        for member in self.members:
            digest.update(repr((member.window, member.network)).encode())
            state = member.network.state_dict() | {"mean": member.mean, "std": member.std}
            for name, tensor in state.items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def is_steady(predict: Callable[[Tensor], Tensor], windows: Tensor) -> bool:
    """Tell whether a batch of windows gives exactly the bits that each of them gives alone."""
    return torch.equal(predict(windows), torch.cat([predict(window[None]) for window in windows]))
