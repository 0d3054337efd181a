"""Predict whether a training run fits into a device's memory, how long it takes and what it costs, before it starts.

    hf-seg fit stage2 --config stage2/segformer_b5.yaml --memory 24GB
    hf-seg fit stage1 --config stage1/upernet_convnextv2_base.yaml --device a100-40 --processes 2 --price 2.5
    hf-seg fit table --output docs/planning.md

One dry step of the recipe, without weights and without arithmetic (`hf_seg/planning/dry_step.py`), tells what it needs.
Chosen are micro-batch, accumulation and, if need be, gradient checkpointing, so that the images of a step stay those of
the recipe. If nothing fits, one line says what is lacking, and the exit code is 2. Further settings are those of the
stage. All figures are predicted: the memory of tensors, plus a reserve; the time by data sheets and assumptions
(`hf_seg/planning/devices.py`), without validation.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_seg.arguments import RecipeArguments, Stage1Arguments, Stage2Arguments
from hf_seg.errors import UserError, one_line_errors
from hf_seg.planning.devices import DEVICES, Device, parse_bytes, smallest_device, usable
from hf_seg.settings import Parser, is_completing, parse_arguments
from hf_seg.terminal import print_summary

STAGES = {"stage1": Stage1Arguments, "stage2": Stage2Arguments}


def main(argv: Sequence[str] | None = None) -> None:
    """Predict a run, or write the table."""
    own, rest = _parse_own(sys.argv[1:] if argv is None else argv)
    if own.what == "table":
        if rest or own.output is None:
            raise UserError("fit table takes --output FILE")
        from hf_seg.planning.table import write_table

        write_table(Path(own.output))
        print_summary("", {"output": own.output}, [own.output])
        return
    if own.memory is None and own.device is None:
        raise UserError("fit needs --memory, e.g. 24GB, or --device, e.g. rtx4090")
    args = parse_arguments(STAGES[own.what], rest)
    memory = DEVICES[own.device].memory if own.memory is None else parse_bytes(own.memory)
    device = smallest_device(memory) if own.device is None else DEVICES[own.device]
    predict(own.what, args, memory, device, own)


def _parse_own(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog="hf-seg fit", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=[*STAGES, "table"], help="a stage, whose settings may follow, or all recipes")
    parser.add_argument("--memory", help="of each device, e.g. 24GB; default: that of --device")
    parser.add_argument("--device", choices=[*DEVICES], help="default: the first that has the memory")
    parser.add_argument("--processes", type=int, default=1, help="devices, one process each (1)")
    parser.add_argument("--price", type=float, help="of one device for an hour, in any currency")
    parser.add_argument("--output", help="for table: the document to write")
    if is_completing():
        parser.parse_args(words)
    own, rest = parser.parse_known_args(words)
    if own.processes < 1:
        raise UserError(f"--processes must be at least 1; it is {own.processes}")
    if own.price is not None and not 0 <= own.price < math.inf:
        raise UserError(f"--price must be at least 0 and finite; it is {own.price}")
    return own, rest


def predict(stage: str, args: RecipeArguments, memory: float, device: Device, own: argparse.Namespace) -> None:
    """Print the plan of a run."""
    from transformers.utils import logging as transformers_logging

    from hf_seg.planning.plan import choose_plan

    transformers_logging.set_verbosity_error()
    plan = choose_plan(args, memory, own.processes)
    seconds, hours = plan.step_seconds(args, device), plan.hours(args, device)
    facts: dict[str, Any] = {
        "per_device_train_batch_size": plan.batch,
        "gradient_accumulation_steps": plan.accumulation,
        "processes": plan.processes,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "predicted_peak_bytes": round(plan.peak),
        "usable_bytes": round(usable(memory)),
        "predicted_step_seconds": seconds,
        "predicted_hours": hours,
        "device": device.name,
        "parameters": plan.needs.parameters,
    }
    lines = [
        f"{plan.batch} images x {plan.accumulation} micro-batches x {plan.processes} process(es) = "
        f"{plan.batch * plan.accumulation * plan.processes} a step, gradient checkpointing "
        f"{'on' if plan.gradient_checkpointing else 'off'}",
        f"predicted peak {plan.peak / 1e9:.2f} GB of tensors; {usable(memory) / 1e9:.2f} of {memory / 1e9:.4g} GB are "
        "for them",
        f"predicted on {device.name}: {seconds:.2f} s a step, {hours:.1f} h for {args.max_train_steps} steps",
    ]
    if own.price is not None:
        facts["predicted_cost"] = hours * plan.processes * own.price
        lines.append(f"predicted cost {facts['predicted_cost']:.2f} at {own.price:g} per device and hour")
    command = f"hf-seg {stage}" + (f" --config {args.config}" if getattr(args, "config", None) else "")
    command += f" --nproc {plan.processes}" if plan.processes > 1 else ""
    command += f" --per_device_train_batch_size {plan.batch} --gradient_accumulation_steps {plan.accumulation}"
    command += " --gradient_checkpointing true" if plan.gradient_checkpointing else ""
    print_summary("\n".join(lines), facts, hints=[command])


if __name__ == "__main__":
    with one_line_errors():
        main()
