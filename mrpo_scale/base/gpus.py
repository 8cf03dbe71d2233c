"""What accelerators can do, by their makers' data sheets. The one table of the project: MFU and the planner read it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from mrpo_scale.base.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One device. Rates are peaks: dense, without sparsity; links are per device and direction."""

    bf16_flops: float  #: FLOP/s of the matrix units with bfloat16 operands and float32 sums
    float32_flops: float  #: FLOP/s in plain float32, TF32 off
    memory: float  #: bytes; a data sheet's GB is about a GiB of what the driver shows
    memory_bandwidth: float  #: bytes/s
    node_link: float  #: bytes/s to the other devices of its node
    host_link: float  #: bytes/s to host memory
    pattern: str  #: regular expression that the driver's device name matches


# Order matters where one pattern matches another's device: the first match wins.
GPUS = {
    # NVIDIA A100 data sheet (2021), SXM: 312 TF, FP32 19.5 TF, 1,555 and 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4.0
    "a100-40gb": GPU(312e12, 19.5e12, 40 * GIB, 1555e9, 300e9, 32e9, r"\bA100.*40GB"),
    "a100-80gb": GPU(312e12, 19.5e12, 80 * GIB, 2039e9, 300e9, 32e9, r"\bA100"),
    # NVIDIA H100 data sheet (2023): bf16 with sparsity 1,979 (SXM), 1,513 (PCIe), 1,671 TF (NVL), dense is half; NVLink 900 GB/s,
    # the PCIe card over PCIe 5.0, NVL's bridge 600 GB/s
    "h100-pcie": GPU(756e12, 51e12, 80 * GIB, 2000e9, 64e9, 64e9, r"\bH100 PCIe"),
    "h100-nvl": GPU(835e12, 60e12, 94 * GIB, 3900e9, 300e9, 64e9, r"\bH100 NVL"),
    "h100-80gb": GPU(989e12, 67e12, 80 * GIB, 3350e9, 450e9, 64e9, r"\bH100"),
    # NVIDIA H200 data sheet (2024), SXM: as H100, 141 GB at 4.8 TB/s
    "h200": GPU(989e12, 67e12, 141 * GIB, 4800e9, 450e9, 64e9, r"\bH200"),
    # NVIDIA GB200 NVL72 data sheet (2024), half of a superchip: bf16 with sparsity 5 PF, 186 GB, 8 TB/s, NVLink 1.8 TB/s
    "gb200": GPU(2500e12, 80e12, 186 * GIB, 8000e9, 900e9, 225e9, r"\bGB200"),
    # NVIDIA DGX B200 data sheet (2024), an eighth: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s; HGX B200: bf16 with sparsity 4.5 PF
    "b200": GPU(2250e12, 75e12, 180 * GIB, 8000e9, 900e9, 64e9, r"\bB200"),
    # NVIDIA L40S data sheet (2023): bf16 362 TF dense, 48 GB at 864 GB/s, PCIe 4.0, no NVLink; L4: with sparsity 242 TF, 300 GB/s
    "l40s": GPU(362e12, 91.6e12, 48 * GIB, 864e9, 32e9, 32e9, r"\bL40S"),
    "l4": GPU(121e12, 30.3e12, 24 * GIB, 300e9, 32e9, 32e9, r"\bL4\b"),
    # NVIDIA A10 data sheet (2021): bf16 125 TF, FP32 31.2 TF, 24 GB at 600 GB/s, PCIe 4.0
    "a10": GPU(125e12, 31.2e12, 24 * GIB, 600e9, 32e9, 32e9, r"\bA10\b"),
    # NVIDIA Ada architecture white paper (2022), RTX 4090: bf16 with float32 sums 165.2 TF, 24 GB at 1,008 GB/s, PCIe 4.0
    "rtx4090": GPU(165.2e12, 82.6e12, 24 * GIB, 1008e9, 32e9, 32e9, r"\bRTX 4090"),
    # NVIDIA Ampere GA102 white paper (2020), RTX 3090: bf16 with float32 sums 71 TF, 24 GB at 936 GB/s, PCIe 4.0
    "rtx3090": GPU(71e12, 35.6e12, 24 * GIB, 936e9, 32e9, 32e9, r"\bRTX 3090$"),
    # AMD Instinct MI300X data sheet (2023): bf16 1,307 TF, FP32 vector 163.4 TF, 192 GB at 5.3 TB/s, 7 links of 64 GB/s a direction
    "mi300x": GPU(1307e12, 163.4e12, 192 * GIB, 5300e9, 448e9, 64e9, r"\bMI300X"),
    # No data sheet: one x86-64 core with AVX2 at 3 GHz (2 FMAs of 8 floats a cycle) and a tenth of a socket's DDR5. Its memory is
    # whatever the machine has; a CPU rank computes in float32.
    "cpu": GPU(96e9, 96e9, 0, 20e9, 10e9, 10e9, r"\bcpu\b"),
}


def find_gpu(name: str) -> GPU:
    """By its name in the table; ``cpu`` has this machine's memory.

    Raises:
        ConfigError: a name that is not there; lists those that are.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"`--gpu {name}` is not known; the known ones are {', '.join(GPUS)}.")
    gpu = GPUS[name.lower()]
    if gpu.memory:
        return gpu
    return replace(gpu, memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def recognise_gpu(device_name: str) -> str | None:
    """The table's name for what the driver calls a device; None if it is not there."""
    return next((name for name, gpu in GPUS.items() if re.search(gpu.pattern, device_name)), None)
