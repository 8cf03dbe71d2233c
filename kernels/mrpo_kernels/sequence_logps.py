"""Hidden states to per-response log-probs without a [tokens, vocabulary] tensor.

Design note. The head's logits of T response tokens over V words dwarf everything else in a preference step (T=16384,
V=128256: 8.4 GB in float32), yet only one number per response leaves it. On a GPU the forward is two Triton launches that never
write a logit (:mod:`~mrpo_kernels.partials`, :mod:`~mrpo_kernels.finish`). Elsewhere the tokens go through the head in chunks: each
chunk's logits live in float32 just long enough for their maximum, their sum of exponentials and the label's logit. Backward
recomputes them chunk by chunk in cuBLAS, turns them in place into dlogits with the response's upstream gradient folded in, and
accumulates the weight gradient in float32. Sums over a response's tokens are taken in float64 and returned as float32: a
4,096-token response stays exact to the last float32 digit.

The backward's probabilities are exp(its own logits - the forward's logsumexp), so both must come from the same logits to their last
digit. In torch they do. cuBLAS and the Triton kernel add a logit's products up in different orders: in bfloat16 and float16 that
digit is far below a gradient's own; in float32 it is not, and there the backward takes the logsumexp from cuBLAS too (2TDV more,
where Triton was forced: ``auto`` leaves float32 to torch).

T tokens, D hidden, V vocabulary, S responses. Token t belongs to response s where cu_seqlens[s] <= t < cu_seqlens[s+1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mrpo_kernels.backend import resolve_impl
from mrpo_kernels.chunked_head import OutputHead, recomputed_gradients, response_sums, token_logps


def sequence_logps(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    labels_T: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Sum of label log-probs of each response, ``log_softmax(softcap(logit_scale * (hidden @ W.T + bias)))``.

    Args:
        hidden_TD: hidden states of response positions, already shifted: row t predicts ``labels_T[t]``.
        head_weight_VD: output head, may be tied; bias: [V] or None.
        labels_T: int64 token ids in [0, V).
        cu_seqlens: [S+1] integers from 0 to T, ascending; equal neighbours are an empty response with log-prob 0. On the device of
            the others, where nothing checks what it holds: the kernel gives NaN for a response outside [0, T].
        softcap: ``c * tanh(logits / c)`` (Gemma 2), after the scale. logit_scale: multiplies the logits (Granite, Cohere).
        impl: ``auto`` (Triton where it is the faster path, logged once), ``triton`` or ``torch``.

    Returns:
        [S] float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        ValueError: inputs that do not fit, an unknown ``impl``, or ``triton`` for tensors it cannot take.
        RuntimeError: ``triton`` on a machine that cannot run it.
    """
    check_inputs(hidden_TD, head_weight_VD, labels_T, cu_seqlens, bias, softcap)
    use_triton = resolve_impl(impl, (hidden_TD, head_weight_VD)) == "triton"
    return _SequenceLogps.apply(hidden_TD, head_weight_VD, bias, labels_T, cu_seqlens, softcap, logit_scale, use_triton)


def check_inputs(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    labels_T: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> None:
    """Raises ValueError for what would be read past its end, from another device's memory, or as something else."""
    if hidden_TD.ndim != 2 or head_weight_VD.ndim != 2 or hidden_TD.shape[1] != head_weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TD.shape)} and head weight {tuple(head_weight_VD.shape)} do not fit")
    if labels_T.shape != hidden_TD.shape[:1] or cu_seqlens.ndim != 1:
        raise ValueError(f"labels {tuple(labels_T.shape)} must be one per row of hidden {tuple(hidden_TD.shape)}")
    if bias is not None and bias.shape != head_weight_VD.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be one per row of head weight {tuple(head_weight_VD.shape)}")
    tensors = {"hidden": hidden_TD, "head weight": head_weight_VD, "labels": labels_T, "cu_seqlens": cu_seqlens}
    devices = {name: str(x.device) for name, x in (tensors | {"bias": bias}).items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none, got {softcap}")


def _torch_forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    cu_seqlens: Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps_S, max_T, log_sum_T); a token's logsumexp is max + log_sum."""
    logps_T, max_T, log_sum_T = token_logps(hidden_TD, OutputHead(weight_VD, bias_V, softcap, scale), labels_T)
    return response_sums(logps_T, cu_seqlens), max_T, log_sum_T


def _triton_forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    cu_seqlens: Tensor,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in two launches. Imported here because triton exists on Linux only."""
    from mrpo_kernels.finish import response_logps
    from mrpo_kernels.partials import Head, vocabulary_partials

    head = Head(hidden_TD, weight_VD, labels_T, cu_seqlens, bias_V, softcap, scale)
    return response_logps(vocabulary_partials([head]), len(cu_seqlens) - 1)


class _SequenceLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        cu_seqlens: Tensor,
        softcap: float | None,
        scale: float,
        use_triton: bool,
    ) -> Tensor:
        forward = _triton_forward if use_triton else _torch_forward
        with torch.autocast(hidden_TD.device.type, enabled=False):  # it would round products whose dtype is chosen here
            logps_S, max_T, log_sum_T = forward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap, scale)
        logsumexp = (None, None) if use_triton and hidden_TD.dtype == torch.float32 else (max_T, log_sum_T)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, *logsumexp)
        ctx.softcap, ctx.scale = softcap, scale
        return logps_S

    @staticmethod
    def backward(ctx: Any, d_logps_S: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, max_T, log_sum_T = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The output's size is given because otherwise a host would wait for the device to tell it.
        d_token_T = torch.repeat_interleave(d_logps_S, cu_seqlens.diff().long(), output_size=len(labels_T))
        head = OutputHead(weight_VD, bias_V, ctx.softcap, ctx.scale)
        needs = (needs_hidden, needs_weight, needs_bias)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            if max_T is None:
                _, max_T, log_sum_T = token_logps(hidden_TD, head, labels_T)
            gradients = recomputed_gradients(hidden_TD, head, labels_T, d_token_T, (max_T, log_sum_T), needs)
        return *gradients, None, None, None, None, None
