"""Atomic checkpoints, and the orderly stop of a run.

A checkpoint is `<output_dir>/checkpoints/step_00001000/`: accelerate's state (weights, optimizer, scaler, every RNG)
and `manifest.json` (progress, size and sha256 of each file, and a checksum of all that).
"""

import contextlib
import hashlib
import json
import logging
import signal
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load, set_seed
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel

from hf_seg.arguments import RecipeArguments
from hf_seg.data.dataloaders import seed_at
from hf_seg.errors import DISK_HINT, UserError, file_errors
from hf_seg.files import atomic_folder, remove, remove_folder, sha256_of, temporary_path
from hf_seg.training.run_log import RunLog

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; everything else of the stream follows from it."""

    step: int = 0  # optimizer steps done
    samples_seen: int = 0  # position in the stream, over all processes
    best_score: float | None = None  # of the model in best/
    mean_weight: float | None = None  # of the target's pseudo-labels (lambda), as last logged


def save_checkpoint(accelerator: Accelerator, output_dir: Path, progress: Progress, keep: int) -> Path:
    """Write a checkpoint on an optimizer-step boundary, then delete all but the newest `keep` and any of a later step.

    To be called by every process. If it cannot be written, which is a `FileError`, earlier checkpoints stay.
    """
    place = output_dir / "checkpoints" / f"step_{progress.step:08d}"
    is_main = accelerator.is_main_process
    with file_errors(place, "cannot be written", DISK_HINT):
        with atomic_folder(place) if is_main else contextlib.nullcontext(temporary_path(place)) as temporary:
            accelerator.wait_for_everyone()
            accelerator.step = 0  # micro-batches so far, which are saved: a resumed run would have counted others
            hook = accelerator.register_save_state_pre_hook(_unwrap_weights)
            accelerator.save_state(str(temporary))
            hook.remove()
            accelerator.wait_for_everyone()
            if is_main:
                _write_manifest(temporary, {**asdict(progress), "num_processes": accelerator.num_processes})
        if is_main:
            delete_old_checkpoints(output_dir, place, keep)
    accelerator.wait_for_everyone()
    return place


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    content["files"] = {name: file.stat().st_size for name, file in files.items()}
    content["sha256"] = {name: sha256_of(file) for name, file in files.items()}
    content["checksum"] = _checksum(content)
    (folder / "manifest.json").write_text(json.dumps(content, indent=1))


def _checksum(content: dict[str, Any]) -> str:
    """Return a digest of a manifest without its own checksum."""
    known = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def delete_old_checkpoints(output_dir: Path, newest: Path, keep: int) -> None:
    """Delete all checkpoints but `keep`, and what kills have left of others.

    Args:
        newest: the last that is kept; later ones are of a run that was resumed further back.
    """
    complete = _complete_checkpoints(output_dir)
    end = complete.index(newest) + 1
    with file_errors(output_dir / "checkpoints", "cannot be deleted"):
        for old in (*complete[: max(end - keep, 0)], *complete[end:]):
            remove_folder(old)
        for left in output_dir.glob("checkpoints/.*.step_*"):
            remove(left)


def _is_complete(folder: Path) -> bool:
    """Tell whether every file of a checkpoint's manifest exists in full."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        has_numbers = all(isinstance(manifest[key], int) for key in ("step", "samples_seen", "num_processes"))
        is_there = ((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return has_numbers and all(is_there)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _damaged_file(folder: Path) -> str | None:
    """Return the first file of a complete checkpoint whose bytes have changed; None if all are as they were written.

    Checkpoints of older versions have no checksums.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    if "checksum" not in manifest and "sha256" not in manifest:
        return None
    if manifest.get("checksum") != _checksum(manifest):
        return "manifest.json"
    return next((name for name, digest in manifest["sha256"].items() if sha256_of(folder / name) != digest), None)


def _complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first, and warn of the others."""
    complete = []
    for folder in sorted(output_dir.glob("checkpoints/step_*[0-9]")):
        if _is_complete(folder):
            complete.append(folder)
        else:
            logger.warning("%s is incomplete and is skipped", folder)
    return complete


def find_checkpoint(output_dir: Path, choice: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None to begin at the beginning.

    Args:
        choice: None, "latest" (the newest complete one without damage, if any) or a checkpoint folder.

    Raises:
        UserError: the output folder contains a run that would be lost, or the folder named is no complete checkpoint
            or a file of it is damaged.
    """
    existing = _complete_checkpoints(output_dir)
    if choice is None:
        if existing or (output_dir / "metrics.jsonl").exists():
            raise UserError(
                f"{output_dir} already contains a run; add --resume_from_checkpoint latest to resume it, "
                "choose another --output_dir, or delete it"
            )
        return None
    if choice == "latest":
        for folder in reversed(existing):
            if (damaged := _damaged_file(folder)) is None:
                return folder
            logger.warning("%s is damaged (%s has other bytes than were written) and is skipped", folder, damaged)
        return None
    others = ", ".join(str(folder) for folder in existing if folder != Path(choice)) or "none"
    if not _is_complete(Path(choice)):
        raise UserError(f"--resume_from_checkpoint {choice} is no complete checkpoint; complete ones: {others}")
    if damaged := _damaged_file(Path(choice)):
        raise UserError(
            f"--resume_from_checkpoint {choice} is damaged: {damaged} has other bytes than were written; "
            f"other checkpoints: {others}"
        )
    return Path(choice)


def load_checkpoint(accelerator: Accelerator, folder: Path, *, seed: int = 0) -> Progress:
    """Restore weights, optimizer, scaler and RNGs in place; `UserError` if they are damaged or do not fit the model.

    Nothing but tensors and plain values is unpickled.
    Of another number of processes, the RNGs (dropout) are seeded anew by `seed` and the position in the stream.
    """
    unwrap = accelerator.register_load_state_pre_hook(_unwrap_models)
    try:
        for file in folder.glob(f"random_states_{accelerator.process_index}.pkl"):
            load(file)  # accelerate would go on without a damaged one
        accelerator.load_state(str(folder))
    except Exception as error:  # a size mismatch, a damaged file: torch, safetensors and accelerate raise many kinds
        if "Weights only" in str(error):
            raise UserError(
                f"{folder} has a file that is damaged, or contains code beside a state; none of it was run; resume "
                "from another checkpoint, or begin again in another --output_dir"
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} contains another model or optimizer than these settings build: {reason}") from None
    finally:
        unwrap.remove()
    accelerator.step = 0  # micro-batches of the current step; they may be more or fewer than those of the checkpoint
    manifest, now = json.loads((folder / "manifest.json").read_text()), accelerator.num_processes
    if manifest["num_processes"] != now:
        logger.warning("the checkpoint is of %d processes, now there are %d", manifest["num_processes"], now)
        set_seed(seed_at(seed, manifest["samples_seen"]) >> 1, device_specific=True)
    return Progress(**{field.name: manifest[field.name] for field in fields(Progress)})


def require_same_global_batch(args: RecipeArguments, checkpoint: Path, num_processes: int) -> None:
    """Raise `UserError` unless a step has as many images as those of a checkpoint, however they are spread."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    micro_batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    before, now = manifest["samples_seen"] // max(manifest["step"], 1), micro_batch * accumulation * num_processes
    if manifest["step"] == 0 or before == now:
        return
    hint = "choose a number of processes that divides it"
    if before % num_processes == 0:
        hint = f"choose them so that their product is {before // num_processes}"
    raise UserError(
        f"{checkpoint} is of a run with {before} images a step; per_device_train_batch_size {micro_batch}, "
        f"gradient_accumulation_steps {accumulation} and {num_processes} process(es) make {now}; {hint}"
    )


def _unwrap_models(models: list[Any], _: str) -> None:
    """Let weights be loaded into the networks themselves, as they are saved."""
    models[:] = [each.module if isinstance(each, DistributedDataParallel) else each for each in models]


def _unwrap_weights(models: list[Any], weights: list[dict[str, Any]], _: str) -> None:
    """Save weights under the names that they have in one process."""
    for model, state in zip(models, weights, strict=True):
        if isinstance(model, DistributedDataParallel):
            consume_prefix_in_state_dict_if_present(state, "module.")


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks between two steps; a second one acts at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self.restore()

    def restore(self) -> None:
        """Give both signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def received(self) -> signal.Signals | None:
        """Return the signal that any process received, or None; all processes get the same answer."""
        if self._accelerator.num_processes == 1:
            return self._received
        # a signal reaches the processes at different moments, and all must stop after the same step
        mine = torch.tensor([int(self._received or 0)], device=self._accelerator.device)
        number = int(self._accelerator.gather(mine).max())
        return signal.Signals(number) if number else None


def save_or_stop(
    accelerator: Accelerator, progress: Progress, stop: StopSignal, log: RunLog, args: RecipeArguments
) -> None:
    """After a step, write a checkpoint if one is due; after a signal write one and exit with 128 + its number.

    To be called by every process.
    """
    received, is_last = stop.received(), progress.step == args.max_train_steps
    is_due = args.checkpointing_steps > 0 and progress.step % args.checkpointing_steps == 0
    if not (received or is_last or is_due):
        return
    log.check_losses()
    saved = save_checkpoint(accelerator, Path(args.output_dir), progress, args.save_total_limit)
    if received and not is_last:
        log.close()
        accelerator.end_training()
        accelerator.print(f"{received.name}: saved {saved}; resume with --resume_from_checkpoint latest")
        sys.exit(128 + received)
