"""What the device can do and what this process took of it."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import torch

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
