"""What keys of a run ask of the machine that runs it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

from mrpo_scale.base.errors import ConfigError

logger = logging.getLogger(__name__)

#: Flag of /proc/cpuinfo -> the instructions that multiply bfloat16, fastest first.
_BF16_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}

#: Names of attention whose kernels a CPU does not have.
GPU_ATTENTION = ("fa3_spans", "varlen_spans", "fa2_spans", "flex_spans")


@dataclass(frozen=True)
class Hardware:
    """What keys of a run may ask of a machine."""

    gpu: bool
    bf16: bool
    tf32: bool

    @classmethod
    def of_this_machine(cls, use_cpu: bool) -> Hardware:
        gpu = torch.cuda.is_available() and not use_cpu
        bf16 = is_torch_bf16_gpu_available() and not use_cpu
        return cls(
            gpu,
            bf16=bf16 or (not gpu and bf16_instructions() is not None),
            tf32=is_torch_tf32_available() and not use_cpu,
        )


@functools.cache
def bf16_instructions() -> str | None:
    """By which instructions this processor multiplies bfloat16 faster than float32; None: by none, or Linux does not say."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return next((name for flag, name in _BF16_FLAGS.items() if flag in flags), None)


def choose_bf16(asked: Any, *, gpu: bool) -> bool:
    """``bf16`` of a run: as asked; ``auto``: where the device has it in hardware; None, the default: so on a GPU, never on a CPU.

    Raises:
        ConfigError: another word.
    """
    if asked not in (None, "auto", True, False):
        raise ConfigError(f"`bf16: {asked}` is not known; choose one of auto, true, false.")
    if isinstance(asked, bool):
        return asked
    if gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return asked == "auto" and bf16_instructions() is not None


@functools.cache  # a command with baselines makes several configurations
def say_bf16(asked: Any, chosen: bool) -> None:
    """Log what a CPU makes of ``bf16``, where its user may not expect it."""
    has = bf16_instructions()
    if asked == "auto":
        reason = "this processor has neither AMX nor AVX512-BF16" if has is None else f"this processor has {has}"
        logger.info("bf16: auto is %s on this CPU: %s", str(chosen).lower(), reason)
    elif chosen and has is None:
        logger.warning(
            "bf16: this processor has neither AMX nor AVX512-BF16, so bfloat16 is slower than float32 here; `bf16: auto` takes it "
            "only where it is faster"
        )


def missing_hardware(args: TrainingArguments, head_impl: str, machine: Hardware) -> Iterator[str]:
    """Keys that ask for more than the machine of the run has, each with its remedy."""
    if args.fp16 and not machine.gpu:
        yield "`fp16: True` needs a GPU, and there is none (on a CPU only the references would be rounded); remove the key"
    if args.bf16 and not machine.bf16 and not args.use_cpu:
        yield (
            "`bf16: True` needs a GPU that computes in bf16, or a processor with AMX or AVX512-BF16, and there is none; remove the "
            "key, or set `use_cpu: true` for bf16 without them, which is slow"
        )
    if args.tf32 and not machine.tf32:
        yield "`tf32: True` needs a GPU with TF32 (NVIDIA Ampere or later), and there is none; remove the key"
    if head_impl == "triton" and not machine.gpu:
        yield "`head_impl: triton` needs a CUDA GPU and there is none; use `auto` or `torch`"
    attention = getattr(args, "attn_implementation", None)
    if attention in GPU_ATTENTION and not machine.gpu:
        yield f"`attn_implementation: {attention}` needs a CUDA GPU and there is none; remove the key"
