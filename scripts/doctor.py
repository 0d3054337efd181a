"""Check this installation: packages and their versions, devices, memory, disk, and what is not installed.

    hf-seg doctor

Nothing is downloaded. The exit code is 1 if something keeps hf_seg from working, with the command that repairs it.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf_seg import __version__
from hf_seg.errors import one_line_errors
from hf_seg.settings import Parser, packaged_folder
from hf_seg.terminal import print_summary

GIB = 2**30
DEVELOPERS = {"test", "dev", "docs"}  # extras that no user of hf_seg misses
FEW_GIB = 5  # of free disk space: a network of full size with its checkpoints


class Finding(NamedTuple):
    """One line of the report; `repair` is empty unless something is wrong."""

    name: str
    text: str
    repair: str = ""


def main() -> int:
    """Print what was found; 0: all is well, 1: something needs a repair."""
    Parser(prog="hf-seg doctor", description=__doc__).parse_args()
    findings = [*check_packages(), check_torchvision(), *check_devices(), *check_machine()]
    broken = [finding for finding in findings if finding.repair]
    lines = [f"{state(each):9s}{each.name:14s}{each.text}" for each in findings]
    lines += [f"repair {finding.name}: {finding.repair}" for finding in broken]
    facts = {"problems": len(broken), "findings": [finding._asdict() for finding in findings]}
    print_summary("\n".join(lines), facts)
    return 1 if broken else 0


def state(finding: Finding) -> str:
    """Say whether something is right, wrong, or an extra that is not installed."""
    if finding.repair:
        return "problem"
    return "-" if finding.name.startswith("[") else "ok"


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the ranges that hf_seg asks for, by extra."""
    from packaging.requirements import Requirement

    yield Finding("hf_seg", f"{__version__}, Python {platform.python_version()}")
    wrong: list[str] = []
    missing: dict[str, list[str]] = {}
    for requirement in map(Requirement, importlib.metadata.requires("hf_seg") or ()):
        extra = next((name for name in _extras() if not _is_needed(requirement) and _is_needed(requirement, name)), "")
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.setdefault(extra, []).append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    for package in missing.pop("", []):
        wrong.append(f"{package} is missing")
    yield Finding("packages", "; ".join(wrong) or "all that maps need", (wrong and "pip install -U hf_seg") or "")
    for extra in sorted(missing.keys() - DEVELOPERS):
        packages = missing[extra]
        yield Finding(f"[{extra}]", f"not installed: {', '.join(packages)} (pip install 'hf_seg[{extra}]')")


def _extras() -> list[str]:
    return importlib.metadata.metadata("hf_seg").get_all("Provides-Extra") or []


def _is_needed(requirement: "object", extra: str = "") -> bool:
    marker = getattr(requirement, "marker", None)
    return marker is None or marker.evaluate({"extra": extra})


def check_torchvision() -> Finding:
    """Import torchvision, whose compiled part must be of the same kind as torch's."""
    try:
        return Finding("torchvision", importlib.import_module("torchvision").__version__)
    except ImportError:
        return Finding("torchvision", "not installed; training and encoders of timm need it")
    except RuntimeError as error:
        script = packaged_folder("scripts") / "repair_torchvision.py"
        return Finding("torchvision", f"does not import ({error})", f"{Path(sys.executable).name} {script}")


def check_devices() -> Iterator[Finding]:
    """Compute something on each device."""
    import torch

    threads = f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices += [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"torch {torch.__version__}, {threads}"
        try:
            torch.nn.Conv2d(3, 8, 3, device=device)(torch.ones(1, 3, 16, 16, device=device)).sum().item()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            yield Finding(
                str(device), f"{name}: computes nothing ({reason})", "install a torch of the driver's version"
            )
        else:
            yield Finding(str(device), name)


def check_machine() -> Iterator[Finding]:
    """Tell memory, the Hub's cache and the switches that keep programs offline."""
    import psutil
    from huggingface_hub import constants

    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / GIB
    repair = "" if free > FEW_GIB else "free disk space, or choose another folder with HF_HOME"
    yield Finding("Hub cache", f"{cache}, {free:.1f} GiB free", repair)
    if constants.HF_HUB_OFFLINE:
        yield Finding("offline", "HF_HUB_OFFLINE is set: models of the Hub are found in the cache only")


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
