"""What the device can do and what this process took of it."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mrpo_scale.base.gpus import GPUS, recognise_gpu


def map_blocks_from(size: int, *, keep: int | None = None) -> None:
    """Let glibc map every block of ``size`` bytes or more by itself, so that it goes back to the system when it is freed: its heap
    cannot refill the aligned blocks that torch asks for. ``keep``: free bytes at the heap's end that stay. Other C libraries have
    no such call, and nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1  # malloc.h
        mallopt(mmap_threshold, size)
        if keep is not None:
            mallopt(trim_threshold, keep)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on ``device``. To a GPU from pinned memory and behind what it is doing: ``torch.tensor(..., device=)``
    and ``.to`` make the host wait until the device has come that far."""
    return host.to(device) if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def send_together(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """The same of several tensors of whole numbers or truth values, in one copy; those that are there stay as they are."""
    given = list(tensors)
    if not given or given[0].device == device:
        return given
    if device.type == "cpu":
        return [x.to(device) for x in given]
    parts = send(torch.cat([x.flatten().long() for x in given]), device).split([x.numel() for x in given])
    return [part.view(x.shape).to(x.dtype) for part, x in zip(parts, given, strict=True)]


class HostCopy:
    """A tensor on its way to the host; the device goes on. :meth:`numpy` waits until it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        self._copy = tensor.detach()
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def numpy(self) -> np.ndarray:
        if self._there is not None:
            self._there.synchronize()
        return self._copy.numpy()


def reset_peak_memory() -> None:
    """Start a new peak, so that two runs in one process do not report each other's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists():
        clear_refs.write_text("5")  # Linux: reset VmHWM to the present resident size


def peak_memory_gib(device: torch.device) -> float:
    """Peak since the last reset, in GiB: allocated GPU memory, else the largest resident set (VmHWM; 0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match.group(1)) / 2**20 if match else 0.0


def device_name(device: torch.device) -> str:
    """The GPU, or the processor as Linux names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that ``mfu`` is a share of (the policy's 6 x parameters x tokens; references are not counted); None if not known."""
    name = recognise_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if name is None else GPUS[name].bf16_flops
