"""The bytes of living tensors, and of what operations read and write, counted operation by operation."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated while it is active, of real tensors and of torch's fake ones.

    Each storage counts once, from the operation that returns it until its last tensor is gone; so views and in-place
    operations cost nothing. What lived before is not counted, and workspaces inside an operation are not seen.

    Attributes:
        now, peak: bytes that live, and the most that lived at once.
        moved: bytes read and written by operations other than matrix products and ungrouped convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.moved = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def free(_: object) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self.now += size
        self.peak = max(self.peak, self.now)
        self._alive[key] = weakref.ref(storage, free)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors(args), _tensors(result)
        if not func.is_view and not _is_product(func, args):
            self.moved += sum(each.numel() * each.element_size() for each in (*inputs, *outputs))
        for tensor in outputs:
            self.add(tensor)
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def _is_product(func: Any, args: Any) -> bool:
    """Tell whether an operation's time is that of its arithmetic; a depthwise convolution's is that of its memory."""
    packet = func._overloadpacket
    if "convolution" in str(packet):
        groups = args[8] if packet is torch.ops.aten.convolution else args[9]
        return groups == 1
    return packet in flop_registry or "attention" in str(packet)
