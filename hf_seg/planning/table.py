"""The document of predicted memory, time and cost of all recipes."""

from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging as transformers_logging

from hf_seg.arguments import RecipeArguments, Stage1Arguments, Stage2Arguments
from hf_seg.errors import UserError
from hf_seg.files import write_atomic
from hf_seg.planning import devices
from hf_seg.planning.devices import DEVICES, Device
from hf_seg.planning.plan import Plan, choose_plan
from hf_seg.settings import packaged_folder, parse_arguments

# The released pipeline: two networks label, three are averaged.
PAPER = (
    "stage1/segformer_b3",
    "stage1/segformer_b5",
    "stage2/segformer_b5",
    "stage2/upernet_convnextv2_base",
    "stage2/upernet_swinv2_base",
)
_COUNTS = (1, 4, 8)

_TEXT = """# Planning a training run

Every figure here is **predicted**, none is measured on a GPU. The command that wrote this file, and the one for a
single run:

```bash
hf-seg fit table --output docs/planning.md
hf-seg fit stage2 --config stage2/segformer_b5.yaml --memory 24GB --price 2.5
```

## Method

Memory: one step of the recipe on fake tensors, which have shapes and lifetimes but no values; every living tensor is
counted (`hf_seg/planning/dry_step.py`). `tests/test_planning.py` compares it with the resident memory of real steps of
toys on a CPU: of 24 cases 20 are within 10 %, the others, of stage 2 and three of them with gradient checkpointing, are
predicted 10 to 16 % too high. That holds if the C library returns what is freed (`MALLOC_MMAP_THRESHOLD_=65536`); its
default keeps up to half more. On CUDA it was not compared.

Time: FLOPs / ({peak:.0%} of the peak) + bytes of all other operations / ({bandwidth:.0%} of the bandwidth) +
gradients over the link between devices, or the loader's time if that is longer. These shares are assumptions; the peaks
are those of data sheets (`hf_seg/planning/devices.py`). Validation, labelling and exports are not included. For tensors
there are {memory:.0%} of the memory, less {reserved:.1f} GB.

## Micro-batch x accumulation on one GPU, predicted

`c`: with gradient checkpointing; in parentheses the predicted peak of tensors in GB and the hours of the whole run. A
dash: nothing fits.

{recipes}

## The paper's trainings, predicted

The two networks of stage 1 and the three of stage 2 of the released pipeline, one after the other. A run takes as many
of the GPUs as divide its images and leave UperNet two for each; GPU-hours times the price of one is the cost.

{paper}

## One process per GPU and DDP; neither FSDP nor DeepSpeed

Sharding saves weights, gradients and the optimizer's averages. With {millions} million parameters these are
{share_low:.0f} to {share_high:.0f} % of the predicted peak at the recipes' batch, at most {static:.1f} GB; the rest are
activations, which gradient checkpointing and smaller micro-batches reduce. So there are no settings for FSDP and
DeepSpeed.
"""


def write_table(path: Path) -> None:
    """Plan every recipe on every device and write the document."""
    transformers_logging.set_verbosity_error()
    folder = packaged_folder("recipes") / "configs"
    names = [
        f"{stage}/{file.stem}" for stage in ("stage1", "stage2") for file in sorted((folder / stage).glob("*.yaml"))
    ]
    recipes = {name: read_recipe(folder, name) for name in names}
    plans = {(name, key): plan_or_none(args, key, 1) for name, args in recipes.items() for key in DEVICES}
    rows = [
        [f"`{name}`", *(_cell(plans[name, key], recipes[name], DEVICES[key]) for key in DEVICES)] for name in recipes
    ]
    full = [choose_plan(recipes[name], 1e12) for name in PAPER]
    fixed = [each.needs.static + each.needs.gradients for each in full]
    shares = [100 * part / each.peak for part, each in zip(fixed, full, strict=True)]
    sizes = [each.needs.parameters / 1e6 for each in full]
    write_atomic(
        path,
        _TEXT.format(
            peak=devices.PEAK_SHARE,
            bandwidth=devices.BANDWIDTH_SHARE,
            memory=1 - devices.RESERVED_SHARE,
            reserved=devices.RESERVED_BYTES / 1e9,
            recipes=_markdown(["recipe", *(each.name for each in DEVICES.values())], rows),
            paper=_markdown(["GPU", *(f"{count} GPU(s)" for count in _COUNTS)], paper_rows(recipes)),
            millions=f"{min(sizes):.0f} to {max(sizes):.0f}",
            share_low=min(shares),
            share_high=max(shares),
            static=max(fixed) / 1e9,
        ),
    )


def read_recipe(folder: Path, name: str) -> RecipeArguments:
    """Read a recipe's settings."""
    kind = Stage1Arguments if name.startswith("stage1") else Stage2Arguments
    return parse_arguments(kind, ["--config", str(folder / f"{name}.yaml")])


def plan_or_none(args: RecipeArguments, device: str, processes: int) -> Plan | None:
    """Return the plan, None if nothing fits."""
    try:
        return choose_plan(args, DEVICES[device].memory, processes)
    except UserError:
        return None


def paper_rows(recipes: dict[str, RecipeArguments]) -> list[list[str]]:
    """Return hours and GPU-hours of all trainings of the paper, for each device and number of devices."""
    rows = []
    for key, device in DEVICES.items():
        cells = []
        for count in _COUNTS:
            hours = gpu_hours = 0.0
            for name in PAPER:
                args = recipes[name]
                found = [(plan_or_none(args, key, n), n) for n in (8, 4, 2, 1) if n <= count]
                plan, used = next(((plan, n) for plan, n in found if plan), (None, 0))
                hours += plan.hours(args, device) if plan else float("inf")
                gpu_hours += used * plan.hours(args, device) if plan else 0
            cells.append(f"{hours:,.0f} h, {gpu_hours:,.0f} GPU-hours" if hours < float("inf") else "-")
        rows.append([device.name, *cells])
    return rows


def _cell(plan: Plan | None, args: RecipeArguments, device: Device) -> str:
    if plan is None:
        return "-"
    mark = " c" if plan.gradient_checkpointing else ""
    return f"{plan.batch} x {plan.accumulation}{mark} ({plan.peak / 1e9:.0f}; {plan.hours(args, device):.0f} h)"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
