"""What a run says while it runs: progress bar, metrics.jsonl, tracker."""

import json
import math
import time
from collections import deque
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from hf_seg.arguments import RecipeArguments
from hf_seg.errors import UserError
from hf_seg.files import write_atomic


def check_tracker(report_to: str) -> None:
    """Raise `UserError` if the tracker's package is not installed; accelerate would silently do without."""
    if report_to != "none" and find_spec(report_to) is None:
        raise UserError(f"--report_to {report_to} needs a package: pip install 'hf_seg[{report_to}]'; or choose none")


class RunLog:
    """Averages the losses of `logging_steps` steps over all processes and writes them in three places.

    Args:
        accelerator: built with `log_with=args.report_to`.
        step: optimizer steps done; what metrics.jsonl contains beyond it, from a run that was killed, is cut off.
    """

    def __init__(self, accelerator: Accelerator, args: RecipeArguments, step: int) -> None:
        run = Path(args.output_dir)
        self.accelerator, self.args, self.path = accelerator, args, run / "metrics.jsonl"
        self._score: dict[str, str] = {}
        self._unchecked: deque[tuple[torch.Event, Tensor, str, str]] = deque()  # values on their way to the host
        self.restart_clock()
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        settings = {key: value for key, value in asdict(args).items() if isinstance(value, int | float | str)}
        names = {"wandb": {"name": run.name, "dir": str(run)}, "trackio": {"name": run.name}}
        accelerator.init_trackers("hf_seg", config=settings, init_kwargs=names)
        is_hidden = not accelerator.is_main_process
        self.bar = tqdm(total=args.max_train_steps, initial=step, unit="step", smoothing=0.05, disable=is_hidden)

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Take note of one micro-batch: its losses, and its images over all processes."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value.detach()
        self._count += 1
        self._images += images

    def require_finite(self, loss: Tensor, step: int, image_ids: list[str]) -> None:
        """Raise `UserError` naming step and images where the loss is not finite.

        On CUDA the host does not wait for the loss: it is checked in a later step, at the latest before
        anything is logged, scored or saved (`check_losses`).
        """
        self._check(loss, "the loss", f"step {step}, images {', '.join(image_ids)}")

    def require_finite_gradient(self, norm: Tensor, step: int) -> None:
        """Raise `UserError` where a loss is finite, but the norm of its gradient is not; checked as the loss is.

        In fp16 that is no error: the scaler leaves such a step out.
        """
        if self.args.mixed_precision != "fp16":
            self._check(norm, "the gradient's norm", f"step {step}")

    def _check(self, value: Tensor, name: str, where: str) -> None:
        if value.device.type != "cuda":
            self._require_finite(value, name, where)
            return
        copy = torch.empty((), dtype=value.dtype, pin_memory=True)  # else the copy would wait
        copy.copy_(value.detach(), non_blocking=True)
        copied = torch.Event(value.device)
        copied.record()
        self._unchecked.append((copied, copy, name, where))
        while self._unchecked and self._unchecked[0][0].query():
            self._require_finite(*self._unchecked.popleft()[1:])

    def check_losses(self) -> None:
        """Wait for the losses and norms that were not checked yet; raises as `require_finite`."""
        while self._unchecked:
            copied, copy, name, where = self._unchecked.popleft()
            copied.synchronize()
            self._require_finite(copy, name, where)

    def _require_finite(self, value: Tensor, name: str, where: str) -> None:
        if math.isfinite(value.item()):
            return
        self.bar.close()
        saved = sorted(self.path.parent.glob("checkpoints/step_*[0-9]"))
        after = f"{saved[-1]} is from before" if saved else "there is no checkpoint yet"
        raise UserError(
            f"{name} is {value.item()} at {where}; {after}; "
            "try a lower --learning_rate, --max_grad_norm 1, bf16 for fp16"
        )

    def end_step(self, step: int, learning_rate: float) -> dict[str, float] | None:
        """Advance the bar; every `logging_steps` steps, and after the last, write the means since, and return them."""
        self.bar.update()
        if step % self.args.logging_steps and step < self.args.max_train_steps:
            return None
        reduce = self.accelerator.reduce
        means = {name: float(reduce(total / self._count, "mean")) for name, total in self._sums.items()}
        rate = self._images / (time.perf_counter() - self._since)
        shown = {"loss": f"{means['loss']:.3f}", "lr": f"{learning_rate:.1e}", "img_s": f"{rate:.1f}", **self._score}
        self.bar.set_postfix(shown)
        record = {"step": step, **means, "learning_rate": learning_rate, "images_per_second": round(rate, 2)}
        if self.accelerator.device.type == "cuda":
            record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.write(record)
        self.restart_clock()
        return means

    def restart_clock(self) -> None:
        """Begin a new average, e.g. after a validation."""
        self._sums: dict[str, Tensor] = {}
        self._count, self._images, self._since = 0, 0, time.perf_counter()

    def write(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and send its numbers to the tracker; the bar shows a validation's mIoU."""
        self.check_losses()
        if "mean_iou" in record:
            self._score = {"mIoU": f"{record['mean_iou']:.4f}"}
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        self.accelerator.log(numbers, step=record["step"])

    def close(self) -> None:
        """End the progress bar and print the last and the best score; `accelerator.end_training` ends the tracker."""
        self.bar.close()
        scored = [record for record in read_metrics(self.path) if any(name.endswith("mean_iou") for name in record)]
        if not scored or not self.accelerator.is_main_process:
            return
        names = [name for name in scored[-1] if name.endswith("_mean_iou")] or ["mean_iou"]
        last = (f"{scored[-1][name]:.4f} {name.removesuffix('mean_iou').replace('_', ' ')}".strip() for name in names)
        best = max(scored, key=lambda record: float(record.get("mean_iou", 0)))
        of_best = f"; best {best['mean_iou']:.4f} after step {best['step']}" if "mean_iou" in best else ""
        print(f"mIoU after step {scored[-1]['step']}: {', '.join(last)}{of_best}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; none if there is no file, and not a last line that a kill cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
