"""Float32 matrix products on a CPU through oneDNN, where it has the wider instructions.

Design note. ``torch.mm`` of float32 goes to MKL, which keeps its AVX-512 kernels for Intel's processors and runs AVX2 on others: on
an AMD EPYC (Zen 5) a core makes 112 GFLOP/s that way and 250 in oneDNN, which torch ships as well and asks for convolutions and low
precision only (docs/performance.md). The operator below is what ``torch.compile`` emits for a linear layer; it adds up in float32
like the other, in another order. oneDNN compiles each product anew for each number of rows, about 2 ms, and keeps up to 1,024 of
them, so layers take it for products that are worth that only. One rule decides: AVX-512 and the size, or torch's own way. It is a
rule and not a measurement at start, so that every rank and every resumed run computes the same bits. Not measured on an Intel
processor.

M rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

#: FLOPs from which a layer's product goes to oneDNN: 0.6 ms of MKL's on one core, the smallest of SmolLM2-135M with 304 tokens.
SMALLEST = 1 << 26


@functools.cache
def has_fast_products() -> bool:
    """Whether this machine and this torch have them."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fast(*tensors: Tensor) -> bool:
    """Whether :func:`fast_product` takes these: float32 on such a CPU, and nobody is compiling or casting."""
    return (
        not torch.compiler.is_compiling()
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        and has_fast_products()
        and not torch.is_autocast_enabled("cpu")
    )


def fast_product(a_MI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` [M, O] of tensors that are :func:`fast`; either may be a transposed view. No autograd."""
    return torch.ops.mkldnn._linear_pointwise(a_MI, b_OI, bias_O, "none", [], "")


if has_fast_products():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        """For whoever counts with ``FlopCounterMode``: torch knows the operator, but not its work."""
        return 2 * math.prod(a_shape) * b_shape[0]


def _product(a_MI: Tensor, b_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """:func:`fast_product`, or torch's where that is not worth compiling for."""
    if 2 * a_MI.numel() * len(b_OI) < SMALLEST:
        return nn.functional.linear(a_MI, b_OI, bias_O)
    return fast_product(a_MI, b_OI, bias_O)


class CpuLinear(nn.Linear):
    """``nn.Linear`` whose products, forward and backward, are :func:`fast_product`'s where they can be and pay.

    A linear layer becomes one by its class alone, so that names, hooks and sharding stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not fast(x, self.weight) or x.numel() == 0:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        # No `view`: a model may add to its layer's output in place (Gemma 3n does), which autograd forbids on a view made here.
        return torch.ops.aten._unsafe_view(
            _product(x.flatten(0, -2), weight_OI, bias_O), [*x.shape[:-1], len(weight_OI)]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI = ctx.saved_tensors
        d_y_MO, x_MI = d_y.flatten(0, -2), x.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(d_y_MO, weight_OI.t()).view_as(x) if needs_x else None,
            _product(d_y_MO.t().contiguous(), x_MI.t().contiguous()) if needs_weight else None,
            d_y_MO.sum(0) if needs_bias else None,
        )
