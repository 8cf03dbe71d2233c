"""What the ranks of a step send each other: bytes and calls counted at the dispatcher, and how long the links were busy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    **dict.fromkeys(
        ("_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"), "all_gather"
    ),
    **dict.fromkeys(("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"), "reduce_scatter"),
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), "all_reduce"),
    "broadcast_": "broadcast",
}


class CollectiveCounter(TorchDispatchMode):
    """Counts every collective of torch.distributed, whoever calls it: DeepSpeed, FSDP2, this package.

    Attributes:
        bytes: by kind, of this rank: what an all-gather or a broadcast brings from others, what a reduce-scatter sends to them,
            the tensor itself of everything else.
        calls: by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind = _KINDS.get(name, name)
            first, second = (_bytes(arg) for arg in (*args[:2], *[None] * (2 - len(args))))
            if kind in ("all_gather", "reduce_scatter"):
                self.bytes[kind] += abs(first - second)
            elif kind != "broadcast" or dist.ProcessGroup.unbox(args[1]).rank() != args[2]:
                self.bytes[kind] += first
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def link_profiler(device: torch.device) -> profile:
    """A profiler that sees the collectives of a step; :func:`busy_seconds` reads it."""
    gpu = [ProfilerActivity.CUDA] * (device.type == "cuda")
    return profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)


def busy_seconds(profiler: profile) -> float:
    """Seconds in which a collective was under way on this rank, waiting for the others included, beside computation or not."""
    intervals = sorted(_collectives(profiler))
    busy, reached = 0.0, float("-inf")
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def _collectives(profiler: profile) -> Iterator[tuple[float, float]]:
    for event in profiler.events() or ():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA and "nccl" in event.name.lower()
        if on_gpu or event.name.startswith("gloo:"):
            yield event.time_range.start, event.time_range.end


def _bytes(argument: Any) -> int:
    leaves: Sequence[Any] = tree_leaves(argument)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
