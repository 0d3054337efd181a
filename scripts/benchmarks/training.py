"""The steps of the recipes' own loops against plain loops: same model, batch and loss, the two taking turns.

A recipe runs as it is, but for its data loader, which yields one batch again and again. Between two of its steps the
loader runs and times a step of the plain loop.
"""

import contextlib
import copy
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.measure import Figure, Result
from torch import Tensor, nn
from torchvision.transforms import v2

from hf_seg.arguments import RecipeArguments, Stage1Arguments, Stage2Arguments
from hf_seg.labels import IGNORE_INDEX, OPEN_EARTH_MAP
from hf_seg.losses import noise_robust_loss
from hf_seg.models import SegmentationNetwork, build_model
from hf_seg.settings import packaged_folder, parse_arguments
from hf_seg.synthetic import SOURCE_FOLDER, TARGET_FOLDER, make_synthetic_dataset
from hf_seg.training.optimization import build_optimizer, build_schedule
from hf_seg.training.run_log import read_metrics

WARM_UP = 3  # steps that are not counted
Batch = dict[str, Any]


class Turns:
    """A loader of the same batch whose consumer's steps are timed, each followed by one of a plain loop."""

    def __init__(self, batch: Batch, plain: Callable[[Batch], object], steps: int) -> None:
        self.batch, self.plain, self.steps = batch, plain, steps
        self.ours: list[float] = []
        self.peer: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.steps):
            state, start = torch.get_rng_state(), time.process_time()
            self.plain(self.batch)
            self.peer.append(time.process_time() - start)
            torch.set_rng_state(state)
            start = time.process_time()
            yield self.batch
            self.ours.append(time.process_time() - start)  # the last one also exports the model

    def figures(self) -> tuple[Figure, Figure]:
        """Return ours and the peer's, without the first steps and the last."""
        kept = slice(min(WARM_UP, self.steps - 2), -1)
        return Figure.of(self.ours[kept]), Figure.of(self.peer[kept])


def _import_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarked_{name}", packaged_folder("recipes") / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_quietly(recipe: ModuleType, argv: list[str]) -> None:
    """Run a recipe without its progress bars and closing lines, which would stand in the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        recipe.main(argv)


def _arguments(stage: type[RecipeArguments], folder: Path, size: int, steps: int) -> tuple[list[str], Any]:
    """Return the command line of a toy's training, and its settings."""
    data, number = folder / "data", 1 if stage is Stage1Arguments else 2
    if not data.exists():
        make_synthetic_dataset(data, source=2, train=2, val=1, test=1, size=128, num_workers=1)
    settings = {
        "config": f"toy/stage{number}_segformer.yaml",
        "crop_size": size // 8,
        "max_train_steps": steps,
        "warmup_steps": 0,
        "eval_steps": 0,
        "checkpointing_steps": 0,
        "dataloader_num_workers": 0,
        "cache_gib": 0,
        "data_dir": data / TARGET_FOLDER,
        "output_dir": folder / f"stage{number}",
        "report_to": "none",
    }
    if stage is Stage1Arguments:
        settings |= {"source_dir": data / SOURCE_FOLDER}
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return argv, parse_arguments(stage, argv)


def _random_batch(args: Any, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    size, count = args.crop_size, args.per_device_train_batch_size
    blocks = torch.randint(1, OPEN_EARTH_MAP.num_labels, (count, size // 8 + 1, size // 8 + 1), generator=generator)
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :size, :size].contiguous()
    return {
        "image_id": [f"tile_{index}" for index in range(count)],
        "pixel_values": torch.randn(count, 3, size, size, generator=generator),
        "labels": labels,
        "valid_mask": torch.ones(count, size, size, dtype=torch.bool),
    }


def _build(args: Any) -> tuple[SegmentationNetwork, torch.optim.Optimizer]:
    """Build the recipe's network and optimizer from its seed."""
    torch.manual_seed(args.seed)
    model = build_model(args.model_name_or_path, crop_size=args.crop_size, from_scratch=args.from_scratch)
    optimizer = build_optimizer(model, args)
    return SegmentationNetwork(model).train(), optimizer


def stage2(size: int, repeats: int) -> list[Result]:
    """A step of stage 2 against the bare step: forward, loss, backward, clip, AdamW; both end with the same loss."""
    with tempfile.TemporaryDirectory() as folder:
        argv, args = _arguments(Stage2Arguments, Path(folder), size, 4 * repeats + WARM_UP)
        argv += ["--ema_decay", "0", "--logging_steps", str(4 * repeats)]
        network, optimizer = _build(args)
        schedule = build_schedule(optimizer, args)
        last: list[float] = []

        def bare(batch: Batch) -> None:
            schedule.step_update(len(last))
            losses = noise_robust_loss(
                network(batch["pixel_values"]).logits, batch["labels"], ce_weight=args.ce_weight,
                rce_weight=args.rce_weight, lovasz_weight=args.lovasz_weight, epsilon=args.rce_epsilon,
            )  # fmt: skip
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            last.append(losses["loss"].item())

        turns = Turns(_random_batch(args, 0), bare, args.max_train_steps)
        recipe = _import_recipe("stage2")
        recipe.load_stream = lambda *_: turns
        _run_quietly(recipe, argv)
        logged = read_metrics(Path(args.output_dir) / "metrics.jsonl")[0]["loss"]
    np.testing.assert_allclose(logged, np.mean(last[: 4 * repeats]), rtol=1e-4)
    ours, peer = turns.figures()
    return [Result(f"stage-2 step, toy, 8 x {args.crop_size} px", ours, {"bare step": peer}, ">= 0.97")]


def stage1(size: int, repeats: int) -> list[Result]:
    """A step of stage 1 against a straightforward one: images mixed and jittered one by one, the EMA a loop."""
    with tempfile.TemporaryDirectory() as folder:
        argv, args = _arguments(Stage1Arguments, Path(folder), size, 4 * repeats + WARM_UP)
        target = _random_batch(args, 1)
        turns = Turns(_random_batch(args, 0), PlainDacs(args, target), args.max_train_steps)
        recipe = _import_recipe("stage1")
        loaders = iter([turns, [target] * args.max_train_steps])
        recipe.load_domain = lambda *_: next(loaders)
        _run_quietly(recipe, argv)
    ours, peer = turns.figures()
    return [Result(f"stage-1 step, toy, 8 x {args.crop_size} px", ours, {"plain DACS": peer}, ">= 1.3")]


class PlainDacs:
    """A step of DACS as one would write it first: each image is mixed and augmented alone."""

    def __init__(self, args: Any, target: Batch) -> None:
        self.args, self.target = args, target
        self.student, self.optimizer = _build(args)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.augment = v2.Compose([
            v2.RandomApply([v2.ColorJitter(0.2, 0.2, 0.2, 0.2)], args.strong_jitter_prob),
            v2.RandomApply([v2.GaussianBlur(11, (0.15, 1.15))], args.strong_blur_prob),
        ])  # fmt: skip

    def __call__(self, source: Batch) -> None:
        loss = F.cross_entropy(self.student(source["pixel_values"]).logits, source["labels"], ignore_index=IGNORE_INDEX)
        loss.backward()
        with torch.no_grad():
            probs = self.teacher(self.target["pixel_values"]).logits.softmax(1)
        confidence, pseudo_labels = probs.max(1)
        mixed = [
            self._mix(*each)
            for each in zip(
                source["pixel_values"], source["labels"], self.target["pixel_values"], pseudo_labels, confidence,
                strict=True,
            )
        ]  # fmt: skip
        images, labels, weights = (torch.stack(values) for values in zip(*mixed, strict=True))
        nll = F.cross_entropy(self.student(images).logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        target_loss = (nll * weights).mean()
        target_loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item(), target_loss.item()  # for the log
        decay = self.args.ema_decay
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(decay).add_(theirs, alpha=1 - decay)
            for mine, theirs in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                mine.copy_(theirs)

    def _mix(
        self, source: Tensor, labels: Tensor, target: Tensor, pseudo_labels: Tensor, confidence: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Paste half of the source's classes onto the target and augment the image in 0..1."""
        classes = np.unique(labels.numpy())
        classes = classes[classes != IGNORE_INDEX]
        chosen = np.random.default_rng(0).choice(classes, (len(classes) + 1) // 2, replace=False)
        mask = torch.from_numpy(np.isin(labels.numpy(), chosen))
        share = (confidence >= self.args.confidence_threshold).float().mean()
        mean, std = (torch.tensor(each)[:, None, None] for each in self.student.normalization[:2])
        image = torch.where(mask, source, target) * std + mean
        image = (self.augment(image.clamp(0, 1)) - mean) / std
        return image, torch.where(mask, labels, pseudo_labels), torch.where(mask, 1.0, share)
