"""Graphics processors by their data sheets, and the assumptions that turn those into times. Nothing here is measured.

Sources: NVIDIA's data sheets of A100 (Tensor Core GPU, 40 GB PCIe and 80 GB SXM), H100 (SXM), L4 and T4, and its Ada
GPU architecture white paper (RTX 4090). Dense figures, without sparsity; T4 has no bfloat16, its figure is of float16.
"""

import math
from dataclasses import dataclass

from hf_seg.errors import UserError

# Assumptions
PEAK_SHARE = 0.4  # of the peak FLOP/s, in matrix products and convolutions
BANDWIDTH_SHARE = 0.7  # of the peak bandwidth, in all other operations
RESERVED_BYTES = 0.8e9  # CUDA context, libraries and their workspaces
RESERVED_SHARE = 0.08  # of the memory: the allocator's fragmentation
LOADER_SECONDS = 0.06  # of one core to decode and augment a crop of 1024 x 1024
LOADER_WORKERS = 4  # per process, the recipes' default


@dataclass(frozen=True)
class Device:
    """A device class.

    Attributes:
        memory: bytes.
        half, single: peak FLOP/s with bf16 or fp16 matrix products, and in float32.
        bandwidth: bytes per second to its memory.
        link: bytes per second between two devices of one machine.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


DEVICES = {
    "t4": Device("T4", 16e9, 65e12, 8.1e12, 320e9, 16e9),
    "rtx4090": Device("RTX 4090", 24e9, 165e12, 82.6e12, 1008e9, 16e9),
    "l4": Device("L4", 24e9, 121e12, 30.3e12, 300e9, 16e9),
    "a100-40": Device("A100 40 GB", 40e9, 312e12, 19.5e12, 1555e9, 300e9),
    "a100-80": Device("A100 80 GB", 80e9, 312e12, 19.5e12, 2039e9, 300e9),
    "h100": Device("H100 80 GB", 80e9, 989e12, 67e12, 3350e9, 450e9),
}


def usable(memory: float) -> float:
    """Return the bytes that tensors may take."""
    return memory * (1 - RESERVED_SHARE) - RESERVED_BYTES


def smallest_device(memory: float) -> Device:
    """Return the first device of the list with so many bytes of memory; the largest if none has."""
    return next((each for each in DEVICES.values() if each.memory >= memory), DEVICES["h100"])


def parse_bytes(text: str) -> float:
    """Read `24GB`, `24GiB`, `900MB` or a number of bytes.

    Raises:
        UserError: it is none of these.
    """
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "": 1}
    for unit, factor in units.items():
        number = text.strip().removesuffix(unit)
        if (
            text.strip().endswith(unit)
            and number.strip().replace(".", "", 1).isdigit()
            and 0 < float(number) < math.inf
        ):
            return float(number) * factor
    raise UserError(f"--memory must be an amount like 24GB or 22.5GiB; it is {text!r}")
