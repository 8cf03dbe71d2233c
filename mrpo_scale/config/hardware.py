"""What keys of a run ask of the machine that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

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
        return cls(
            gpu, bf16=is_torch_bf16_gpu_available() and not use_cpu, tf32=is_torch_tf32_available() and not use_cpu
        )


def missing_hardware(args: TrainingArguments, head_impl: str, machine: Hardware) -> Iterator[str]:
    """Keys that ask for more than the machine of the run has, each with its remedy."""
    if args.fp16 and not machine.gpu:
        yield "`fp16: True` needs a GPU, and there is none (on a CPU only the references would be rounded); remove the key"
    if args.bf16 and not machine.bf16 and not args.use_cpu:
        yield (
            "`bf16: True` needs a GPU that computes in bf16, and there is none; remove the key, or set `use_cpu: true` for "
            "bf16 on a CPU, which is slow"
        )
    if args.tf32 and not machine.tf32:
        yield "`tf32: True` needs a GPU with TF32 (NVIDIA Ampere or later), and there is none; remove the key"
    if head_impl == "triton" and not machine.gpu:
        yield "`head_impl: triton` needs a CUDA GPU and there is none; use `auto` or `torch`"
    attention = getattr(args, "attn_implementation", None)
    if attention in GPU_ATTENTION and not machine.gpu:
        yield f"`attn_implementation: {attention}` needs a CUDA GPU and there is none; remove the key"
