"""Several networks as one: their class probabilities are averaged, and the largest mean wins.

ensemble = EnsembleForSemanticSegmentation.from_members(["runs/b5", "org/convnext@v1"], weights=[2, 1])
ensemble.save_pretrained("runs/ensemble")                    # or ensemble.push_to_hub("org/name")
ensemble = EnsembleForSemanticSegmentation.from_pretrained("runs/ensemble")
(result,) = ensemble.predict("scene.png")                    # result.label_map: (H, W) class ids
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_seg.errors import UserError
from hf_seg.files import atomic_update
from hf_seg.hub.export import image_processor
from hf_seg.inference.image_input import ImageInput, read_image
from hf_seg.inference.load import (
    ENSEMBLE_FILE,
    ENSEMBLE_FORMAT,
    MODEL_FILES,
    LoadedNetwork,
    common_label_set,
    load_networks,
    normalized_weights,
    shared_bands,
)
from hf_seg.inference.predict import Predictor
from hf_seg.inference.vote import VoteAccumulator
from hf_seg.models import SegmentationNetwork
from hf_seg.settings import packaged_folder

IMAGES_PER_LOAD = 16  # with low_memory: running sums kept while a network is loaded, 33 MB each at 1024 pixels


class Prediction(NamedTuple):
    """The map of one image; the last two only where they were asked for."""

    label_map: np.ndarray  # (H, W) uint8 class ids from 1 up
    class_names: dict[int, str]  # of the ids that occur
    entropy: np.ndarray | None = None  # (H, W) float32, of the mean: 0 nats certain; uniform: ln 8 = 2.08 for 8 classes
    disagreement: np.ndarray | None = None  # (H, W) float32: weight, 0..1, of the members that choose another class


class EnsembleForSemanticSegmentation(
    nn.Module,
    ModelHubMixin,
    library_name="hf_seg",
    pipeline_tag="image-segmentation",
    tags=["remote-sensing", "land-cover", "sar"],
    model_card_template=(packaged_folder("model_cards") / "ensemble_alone.md").read_text(encoding="utf-8"),
):
    """Networks of the same classes whose probabilities are averaged in float32; class 0 never wins.

    Created by `from_members` and `from_pretrained`, in eval mode.

    Args:
        members: of `load_networks`; all in memory, or all on disk (`low_memory`).

    Attributes:
        networks: the networks, each with its stock model in `.model`; empty with `low_memory`.
        weights: the members' weights, scaled to a sum of 1.
        label_set, id2label, label2id: the classes.

    Raises:
        UserError: no member, a weight that is not above 0, or members of different classes.
    """

    def __init__(self, members: Sequence[LoadedNetwork]) -> None:
        super().__init__()
        self.members = tuple(members)
        self.weights = normalized_weights(self.members)
        shared_bands(self.members)
        self.networks = nn.ModuleList(member.module for member in members if member.module is not None)
        self.label_set = common_label_set(self.members)
        self.id2label, self.label2id = self.label_set.id2label, self.label_set.label2id
        # follows .to() and .half(), for members that are still on disk
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.eval()

    @property
    def low_memory(self) -> bool:
        """Whether members stay on disk and are loaded one at a time."""
        return not self.networks

    @property
    def device(self) -> torch.device:
        """Where the networks compute."""
        return self.get_buffer("_place").device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in."""
        return self.get_buffer("_place").dtype

    @classmethod
    def from_members(
        cls,
        paths_or_ids: Iterable[str | Path],
        weights: Sequence[float] | None = None,
        *,
        low_memory: bool = False,
    ) -> Self:
        """Put trained networks together.

        Args:
            paths_or_ids: folder or Hub id of each; `id@revision` pins a commit, branch or tag. An ensemble stands for
                its members, which share its weight.
            weights: one for each, above 0, in any unit; equal if None.
            low_memory: leave them on disk, as in `from_pretrained`.

        Raises:
            UserError: naming the member that was not found, is damaged, or is of other classes; or weights that do not
                fit.
        """
        names = [paths_or_ids] if isinstance(paths_or_ids, str | Path) else [*paths_or_ids]
        weights = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(names):
            raise UserError(f"{len(weights)} weight(s) for {len(names)} member(s): give one for each, or none")
        members: list[LoadedNetwork] = []
        for name, weight in zip(names, weights, strict=True):
            normalized_weights([LoadedNetwork(crop_size=0, origin=str(name), weight=weight)])  # fails at once
            found = load_networks(name, low_memory=low_memory)
            if low_memory:
                for each in found:
                    each.network()  # what is wrong with it shows now
            parts = normalized_weights(found)
            members += [replace(each, weight=weight * part) for each, part in zip(found, parts, strict=True)]
        return cls(members)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's asks for a config.json first, which there is not
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        low_memory: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Open what `save_pretrained` or `push_to_hub` wrote, or a single network as an ensemble of one.

        Args:
            pretrained_model_name_or_path: folder, Hub id or `id@revision`.
            revision, token, cache_dir, force_download, local_files_only: of the Hub's client.
            low_memory: leave the members on disk and load each when its turn comes, so that no more than one is in
                memory at a time; to the same bits, without gradients.
            dtype: of the networks' arithmetic. In float16, SwinV2 makes NaN of an input that it must pad to whole
                windows; one of its crop size needs no padding, and bfloat16 has no such trap.

        Raises:
            UserError: not found, or incomplete or damaged, naming the member.
        """
        members = load_networks(
            pretrained_model_name_or_path,
            low_memory=low_memory,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        return cls(members).to(dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the ensemble to a folder; keyword arguments are the mixin's.

        An ensemble that was in the folder is replaced, and other files stay. It is a `UserError` if the folder contains
        a single model, or cannot be written.
        """
        if Path(save_directory, "config.json").exists():  # the mixin would remove it
            raise UserError(f"{save_directory} contains a single model; save the ensemble to another folder")
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        # without ensemble.json no mixture of the old members and the new ones can be taken for an ensemble
        old = [path.name for path in save_directory.glob("member_*")]
        with atomic_update(save_directory, first=[ENSEMBLE_FILE, *old], last=ENSEMBLE_FILE) as folder:
            listed = []
            for index, member in enumerate(self.members):
                _write_member(member, folder / f"member_{index}")
                known = {"origin": member.name, "crop": member.crop_size, "weight": member.weight}
                listed.append({"folder": f"member_{index}", **known, "revision": member.revision})
            text = json.dumps({**ENSEMBLE_FORMAT, "members": listed}, indent=1)
            (folder / ENSEMBLE_FILE).write_text(text, encoding="utf-8")

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """Compute the logarithm of the mean class probability.

        Args:
            pixel_values: (B, 3, H, W), normalised as the first member's image processor does; what another member
                expects is computed from it. Every member sees all of it at once; scenes larger than the members' crops
                are for `predict`.

        Returns:
            `.logits` (B, K, H, W) float32; class 0 has -1e4, which a softmax turns into 0.
        """
        accumulator, first = VoteAccumulator(), self.members[0].normalization
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.low_memory):
            for member, weight in zip(self.members, self.weights, strict=True):
                network = member.module or member.network().to(self.device, self.dtype).train(self.training)
                values = pixel_values
                if member.normalization != first:
                    values = member.normalization.apply(first.invert(pixel_values))
                accumulator.add(network(values.to(self.dtype)).logits.float().softmax(dim=1), weight)
                del network
            return SemanticSegmenterOutput(logits=accumulator.logits())

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        tta: str = "none",
        stride: float = 0.5,
        batch_size: int = 4,
        return_uncertainty: bool = False,
    ) -> list[Prediction]:
        """Map images of any size, each member through its own sliding window.

        Args:
            images: one or several of: file, PIL image, (H, W) or (H, W, 3) uint8 array.
            tta: test-time augmentation, one of `hf_seg.inference.tta.TTA_PRESETS`.
            stride: step of the window as a share of it, in (0, 1].
            batch_size: windows per forward pass.
            return_uncertainty: fill in `entropy` and `disagreement`.

        Returns:
            One result per image, in their order.

        Raises:
            UserError: an image that cannot be read or is not 8-bit, naming it.
            ValueError: a setting out of its range.
        """
        queue: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        group_size = IMAGES_PER_LOAD if self.low_memory else 1
        was_training = self.training
        self.eval()
        settings: dict[str, Any] = {"tta": tta, "stride": stride, "batch_size": batch_size, "dtype": self.dtype}
        predictor = Predictor(self.members, device=self.device, **settings)
        results = []
        for first in range(0, len(queue), group_size):
            group = range(len(queue))[first : first + group_size]
            arrays = [read_image(queue[number], name=f"image {number}") for number in group]
            accumulators = predictor.predict_all(arrays)
            results += [self._describe(accumulator, return_uncertainty) for accumulator in accumulators]
        self.train(was_training)
        return results

    def _describe(self, accumulator: VoteAccumulator, with_uncertainty: bool) -> Prediction:
        label_map = accumulator.label_map().cpu().numpy()
        class_names = {int(index): self.id2label[int(index)] for index in np.unique(label_map)}
        if not with_uncertainty:
            return Prediction(label_map, class_names)
        entropy, disagreement = accumulator.entropy().cpu().numpy(), accumulator.disagreement().cpu().numpy()
        return Prediction(label_map, class_names, entropy, disagreement)


def _write_member(member: LoadedNetwork, folder: Path) -> None:
    """Write one member as a model that opens alone: from memory, or its files as they are."""
    if member.module is None:
        assert member.folder is not None
        folder.mkdir()
        for pattern in MODEL_FILES:
            for file in member.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    elif isinstance(member.module, SegmentationNetwork):
        member.module.model.save_pretrained(folder)
        image_processor(member.crop_size, member.normalization).save_pretrained(folder)
    else:
        raise UserError(f"{member.origin} is no SegFormer or UperNet, so it cannot be saved as part of an ensemble")
