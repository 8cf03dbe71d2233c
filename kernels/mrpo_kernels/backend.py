"""Which implementation runs: decided once per call from what the tensors are, logged once per decision, never swallowed.

``auto`` takes Triton where it should be the faster path, which no GPU has confirmed yet (the log says so): bfloat16 and float16 on
an NVIDIA GPU with tensor cores for both (capability 8.0 and up), rows 16-byte aligned. It leaves float32 to cuBLAS, whose
full-precision product no Triton tile beats. A forced ``triton`` that cannot run is an error that says why; a forced ``torch`` runs
everywhere.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

IMPLS = ("auto", "triton", "torch")
_TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)
# The finishing kernel holds a pair's references in one block, which has this many rows whatever their number.
MAX_REFERENCES = 64
EXPECTED = "expected to be the faster path; nobody has timed it on a GPU yet: benchmarks/bench_kernels.py does"
_KERNEL_DTYPES = (*_TENSOR_CORE_DTYPES, torch.float32)


def resolve_impl(impl: str, tensors: Sequence[Tensor], *, products: bool = True, references: int = 1) -> str:
    """``triton`` or ``torch`` for these hidden states and head weights; or, without ``products``, for log-probs.

    ``references``: how many are combined.

    Raises:
        ValueError: an unknown ``impl``, or ``triton`` for tensors it cannot take.
        RuntimeError: ``triton`` on a machine that cannot run it.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "torch":
        return impl
    devices, dtypes = {tensor.device for tensor in tensors}, {tensor.dtype for tensor in tensors}
    device, dtype = tensors[0].device, tensors[0].dtype
    unfit = _unfit_tensors(devices, dtypes)
    if references > MAX_REFERENCES:
        unfit = f"they are {references} references' and the kernel combines at most {MAX_REFERENCES}"
    unable = None if unfit else _unable_machine(device)
    if impl == "triton":
        if unfit:
            raise ValueError(f"impl='triton' cannot take these tensors: {unfit}; use impl='auto' or 'torch'")
        if unable:
            raise RuntimeError(f"impl='triton' cannot run here: {unable}; use impl='auto' or 'torch'")
        return impl
    slower = _slower_products(tensors) if products else None
    interpreted = None if device.type == "cuda" else "the tensors are on the CPU"
    reason = unfit or interpreted or unable or slower
    _log_choice("torch" if reason else "triton", device.type, str(dtype), reason or EXPECTED)
    return "torch" if reason else "triton"


def is_aligned(matrix: Tensor) -> bool:
    """Whether all its rows start at, and end before, a multiple of 16 bytes of a 2-byte dtype."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 8 == 0 and matrix.shape[1] % 8 == 0


def _slower_products(tensors: Sequence[Tensor]) -> str | None:
    if tensors[0].dtype not in _TENSOR_CORE_DTYPES:
        return f"{tensors[0].dtype} is faster in cuBLAS"
    return None if all(map(is_aligned, tensors)) else "rows that are not 16-byte aligned are faster in cuBLAS"


def _unfit_tensors(devices: set[torch.device], dtypes: set[torch.dtype]) -> str | None:
    if len(devices) > 1:
        return f"they are on several devices ({', '.join(sorted(map(str, devices)))})"
    if len(dtypes) > 1:
        return f"they have several dtypes ({', '.join(sorted(map(str, dtypes)))})"
    dtype = next(iter(dtypes))
    return None if dtype in _KERNEL_DTYPES else f"{dtype} is not one of {', '.join(map(str, _KERNEL_DTYPES))}"


def _unable_machine(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _unable_interpreter(device)
    if device.type == "cpu":
        return "the tensors are on the CPU and TRITON_INTERPRET is not 1"
    if device.type != "cuda" or torch.version.hip:
        return f"the kernels are written for NVIDIA GPUs, not for {'ROCm' if torch.version.hip else device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def _unable_interpreter(device: torch.device) -> str | None:
    import triton

    if device.type != "cpu":
        return "under TRITON_INTERPRET=1 the kernels follow addresses on the CPU, and the tensors are not there"
    # Triton's own functions are wrapped when it is imported, for the interpreter or for the compiler.
    late = isinstance(triton.language.cdiv, triton.runtime.JITFunction)
    return "TRITON_INTERPRET=1 was set after triton had been imported" if late else None


@functools.cache
def _log_choice(impl: str, device: str, dtype: str, reason: str) -> None:
    logger.info("log-prob kernels: %s for %s on %s (%s)", impl, dtype, device, reason)
