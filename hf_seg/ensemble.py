"""Several networks as one: their class probabilities are averaged, and the largest mean wins.

ensemble = EnsembleForSemanticSegmentation.from_members(["runs/b5", "org/convnext@v1"], weights=[2, 1])
ensemble.save_pretrained("runs/ensemble")                    # or ensemble.push_to_hub("org/name")
ensemble = EnsembleForSemanticSegmentation.from_pretrained("runs/ensemble")
(result,) = ensemble.predict("scene.png")                    # result.label_map: (H, W) class ids
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_seg.errors import UserError
from hf_seg.hub.ensemble_folder import (
    CONFIG_FILE,
    MODEL_FILES,
    Member,
    copy_network,
    find_folder,
    load_member,
    read_ensemble,
    scale_weights,
    write_ensemble,
    write_network,
)
from hf_seg.inference.image_input import ImageInput, read_image
from hf_seg.inference.sliding_window import sliding_window_probs
from hf_seg.inference.tta import average_views
from hf_seg.inference.vote import WeightedVotes
from hf_seg.labels import ID2LABEL, LABEL2ID
from hf_seg.models import SegmentationNetwork
from hf_seg.normalization import to_pixel_values

IMAGES_PER_LOAD = 16  # with low_memory: so many running sums are held while a member is, 33 MB each at 1024 pixels

_CARD = """---
{{ card_data }}
---

Land-cover networks whose class probabilities are averaged; `ensemble.json` names them and their weights.

    from hf_seg import EnsembleForSemanticSegmentation
    ensemble = EnsembleForSemanticSegmentation.from_pretrained(THIS_REPOSITORY)
    (result,) = ensemble.predict("scene.png")

A member alone: `AutoModelForSemanticSegmentation.from_pretrained(THIS_REPOSITORY, subfolder="member_0")`.
"""


class Prediction(NamedTuple):
    """The map of one image; the last two only where they were asked for."""

    label_map: np.ndarray  # (H, W) uint8 class ids 1..8
    class_names: dict[int, str]  # of the ids that occur
    entropy: np.ndarray | None = None  # (H, W) float32, of the mean: 0 nats certain, ln 8 = 2.08 no idea
    disagreement: np.ndarray | None = None  # (H, W) float32: weight, 0..1, of the members that choose another class


class EnsembleForSemanticSegmentation(
    nn.Module,
    ModelHubMixin,
    library_name="hf_seg",
    pipeline_tag="image-segmentation",
    tags=["remote-sensing", "land-cover", "sar"],
    model_card_template=_CARD,
):
    """Networks of the nine land-cover classes whose probabilities are averaged in float32; class 0 never wins.

    Made by `from_members` and `from_pretrained`, in eval mode.

    Args:
        members: what is known of each network.
        sources: each network, or instead the folder that it is loaded from whenever it is needed (`low_memory`).

    Attributes:
        members: as given.
        networks: the networks, each with its stock model in `.model`; empty with `low_memory`.
        shares: the members' weights, scaled to a sum of 1.
        id2label, label2id: the nine classes.

    Raises:
        UserError: no member, or a weight that is not above 0.
    """

    def __init__(self, members: Sequence[Member], sources: Sequence[SegmentationNetwork | Path]) -> None:
        super().__init__()
        self.members = tuple(members)
        self.shares = scale_weights([member.weight for member in members], [member.origin for member in members])
        self.networks = nn.ModuleList(source for source in sources if isinstance(source, nn.Module))
        self.id2label, self.label2id = dict(ID2LABEL), dict(LABEL2ID)
        self._folders = [source.absolute() for source in sources if isinstance(source, Path)]
        # goes along with .to() and .half(), for members that are not there yet
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.eval()

    @property
    def low_memory(self) -> bool:
        """Whether members stay on disk and are loaded one at a time."""
        return bool(self._folders)

    @property
    def crops(self) -> list[int]:
        """The side of each member's sliding window, in pixels."""
        return [member.crop for member in self.members]

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
            paths_or_ids: folder or Hub id of each; `id@revision` pins a commit, branch or tag.
            weights: one for each, above 0, in any unit; equal if None.
            low_memory: leave them on disk, as in `from_pretrained`.

        Raises:
            UserError: naming the member that is absent, damaged, or made for other classes or another input than the
                project's; or as many weights as there are not members.
        """
        names = [str(paths_or_ids)] if isinstance(paths_or_ids, str | Path) else [str(name) for name in paths_or_ids]
        weights = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
        scale_weights(weights, names)  # what is wrong with them shows before anything is loaded
        members: list[Member] = []
        sources: list[SegmentationNetwork | Path] = []
        for name, weight in zip(names, weights, strict=True):
            folder, revision = find_folder(name, (*MODEL_FILES, CONFIG_FILE))
            network, crop = load_member(folder, name)
            origin = name if revision is None else name.partition("@")[0]
            members.append(Member(origin, crop, weight, revision))
            sources.append(folder if low_memory else network)
            del network  # with low_memory, before the next one comes
        return cls(members, sources)

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
        """Open what `save_pretrained` or `push_to_hub` wrote.

        Args:
            pretrained_model_name_or_path: folder, Hub id or `id@revision`.
            revision, token, cache_dir, force_download, local_files_only: of the Hub's client.
            low_memory: leave the members on disk and load each when its turn comes, so that no more than one is in
                memory at a time; to the same bits, without gradients.
            dtype: of the networks' arithmetic. In float16, SwinV2 makes NaN of an input that it must pad to whole
                windows; one of its crop size needs no padding, and bfloat16 has no such trap.

        Raises:
            UserError: no such ensemble, or one that is not whole, naming the member.
        """
        name = str(pretrained_model_name_or_path)
        folder, _ = find_folder(
            name,
            (CONFIG_FILE, *(f"member_*/{file}" for file in MODEL_FILES)),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        members, folders = read_ensemble(folder, name)
        if low_memory:
            return cls(members, folders).to(dtype)
        pairs = zip(members, folders, strict=True)
        return cls(members, [load_member(path, str(path), member.crop)[0] for member, path in pairs]).to(dtype)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the ensemble to a folder, whole or not at all; keyword arguments are the mixin's.

        An ensemble that was in the folder is replaced, and other files stay.

        Raises:
            UserError: the folder holds a single model.
        """
        if Path(save_directory, "config.json").exists():  # the mixin would remove it
            raise UserError(f"{save_directory} holds a single model; save the ensemble to another folder")
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.low_memory:
            writers = [partial(copy_network, folder) for folder in self._folders]
        else:
            networks: Iterable[Any] = self.networks
            writers = [partial(write_network, *each) for each in zip(networks, self.crops, strict=True)]
        write_ensemble(save_directory, self.members, writers)

    def forward(self, pixel_values: Tensor) -> SemanticSegmenterOutput:
        """Compute the logarithm of the mean class probability.

        Args:
            pixel_values: (B, 3, H, W), normalised as the members' image processors do. Every member sees all of it at
                once; scenes larger than `crops` are for `predict`.

        Returns:
            `.logits` (B, K, H, W) float32; class 0 has -1e4, which a softmax turns into 0.
        """
        votes = WeightedVotes()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.low_memory):
            for index, share in enumerate(self.shares):
                votes.add(self._probs(index, pixel_values), share)
            return SemanticSegmenterOutput(logits=votes.logits())

    @torch.inference_mode()
    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        views: str = "none",
        stride: float = 0.5,
        batch_size: int = 4,
        return_uncertainty: bool = False,
    ) -> list[Prediction]:
        """Map images of any size, each member through its own sliding window.

        Args:
            images: one or several of: file, PIL image, (H, W) or (H, W, 3) uint8 array.
            views: one of `hf_seg.inference.tta.VIEW_PRESETS`, over which probabilities are averaged.
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
        settings: dict[str, Any] = {"views": views, "stride": stride, "batch_size": batch_size}
        group_size = IMAGES_PER_LOAD if self.low_memory else 1
        was_training = self.training
        self.eval()
        results = []
        for first in range(0, len(queue), group_size):
            group = range(len(queue))[first : first + group_size]
            arrays = [read_image(queue[number], name=f"image {number}") for number in group]
            ballots = [WeightedVotes() for _ in group]
            for index in range(len(self.members)):
                self._vote(index, arrays, ballots, **settings)
            results += [self._describe(votes, return_uncertainty) for votes in ballots]
        self.train(was_training)
        return results

    def _vote(
        self,
        index: int,
        images: list[np.ndarray],
        ballots: list[WeightedVotes],
        *,
        views: str,
        stride: float,
        batch_size: int,
    ) -> None:
        """Let one member vote on some images; its memory is free again when this returns."""
        network, window = self.network(index), self.members[index].crop

        def forward(windows: Tensor) -> Tensor:
            return network(windows.to(self.dtype)).logits

        def predict(view: Tensor) -> Tensor:
            step = max(1, round(stride * window))
            return sliding_window_probs(forward, view, window=window, stride=step, batch_size=batch_size)

        for image, votes in zip(images, ballots, strict=True):
            votes.add(average_views(predict, to_pixel_values(image).to(self.device), views), self.shares[index])

    def _probs(self, index: int, pixel_values: Tensor) -> Tensor:
        return self.network(index)(pixel_values.to(self.dtype)).logits.float().softmax(dim=1)

    def network(self, index: int) -> nn.Module:
        """Return a member; with `low_memory` it lives for as long as the caller holds it."""
        if not self.low_memory:
            return self.networks[index]
        folder = self._folders[index]
        network, _ = load_member(folder, str(folder), self.members[index].crop)
        return network.to(self.device, self.dtype).train(self.training)

    def _describe(self, votes: WeightedVotes, with_uncertainty: bool) -> Prediction:
        label_map = votes.choice().cpu().numpy()
        class_names = {int(index): self.id2label[int(index)] for index in np.unique(label_map)}
        if not with_uncertainty:
            return Prediction(label_map, class_names)
        return Prediction(label_map, class_names, votes.entropy().cpu().numpy(), votes.disagreement().cpu().numpy())
