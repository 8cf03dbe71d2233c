"""Hidden states to per-response log-probs without a [tokens, vocabulary] tensor.

Design note. The head's logits of T response tokens over V words dwarf everything else in a preference step (T=16384,
V=128256: 8.4 GB in float32), yet only one number per response leaves it. On a GPU the forward is two Triton launches that never
write a logit (:mod:`~mrpo_kernels.partials`, :mod:`~mrpo_kernels.finish`). Elsewhere the tokens go through the head in chunks: each
chunk's logits live in float32 just long enough for their maximum, their sum of exponentials and the label's logit. Backward
recomputes them chunk by chunk in cuBLAS, turns them in place into dlogits with the response's upstream gradient folded in, and
accumulates the weight gradient in float32. Sums over a response's tokens are taken in float64 and returned as float32: a
4,096-token response stays exact to the last float32 digit.

T tokens, D hidden, V vocabulary, S responses. Token t belongs to response s where cu_seqlens[s] <= t < cu_seqlens[s+1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mrpo_kernels.backend import resolve_impl

# Bytes of one chunk's float32 logits. On a CPU it should stay near the caches, on a GPU it must fill the device.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


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
        cu_seqlens: [S+1] integers from 0 to T, ascending; equal neighbours are an empty response with log-prob 0.
        softcap: ``c * tanh(logits / c)`` (Gemma 2), after the scale. logit_scale: multiplies the logits (Granite, Cohere).
        impl: ``auto`` (Triton where it is the faster path, logged once), ``triton`` or ``torch``.

    Returns:
        [S] float32 (float64 for float64 inputs), differentiable in hidden, weight and bias.

    Raises:
        ValueError: shapes that do not fit, an unknown ``impl``, or ``triton`` for tensors it cannot take.
        RuntimeError: ``triton`` on a machine that cannot run it.
    """
    check_shapes(hidden_TD, head_weight_VD, labels_T, cu_seqlens)
    use_triton = resolve_impl(impl, (hidden_TD, head_weight_VD)) == "triton"
    return _SequenceLogps.apply(hidden_TD, head_weight_VD, bias, labels_T, cu_seqlens, softcap, logit_scale, use_triton)


def check_shapes(hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor, cu_seqlens: Tensor) -> None:
    """Raises ValueError for shapes that do not fit each other."""
    if hidden_TD.ndim != 2 or head_weight_VD.ndim != 2 or hidden_TD.shape[1] != head_weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TD.shape)} and head weight {tuple(head_weight_VD.shape)} do not fit")
    if labels_T.shape != hidden_TD.shape[:1] or cu_seqlens.ndim != 1:
        raise ValueError(f"labels {tuple(labels_T.shape)} must be one per row of hidden {tuple(hidden_TD.shape)}")


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(num_tokens: int, vocabulary: int, device_type: str) -> range:
    size = max(1, _CHUNK_BYTES.get(device_type, 1 << 30) // (4 * vocabulary))
    return range(0, num_tokens, size)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    """One chunk's final logits [C, V] in the accumulation dtype."""
    dtype = _accumulate_dtype(hidden_CD.dtype)
    if hidden_CD.is_cuda and hidden_CD.dtype != dtype:
        # cuBLAS can hand out its float32 sums; rounded to bfloat16 they would cost tenths of a nat per response.
        logits_CV = torch.mm(hidden_CD, weight_VD.t(), out_dtype=dtype)
    else:
        logits_CV = torch.mm(hidden_CD, weight_VD.t()).to(dtype)
    if bias_V is not None:
        logits_CV += bias_V
    if scale != 1.0:
        logits_CV *= scale
    if softcap is not None:
        logits_CV.div_(softcap).tanh_().mul_(softcap)
    return logits_CV


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
    dtype = _accumulate_dtype(hidden_TD.dtype)
    token_logps_T = torch.empty(len(labels_T), dtype=dtype, device=hidden_TD.device)
    max_T, log_sum_T = torch.empty_like(token_logps_T), torch.empty_like(token_logps_T)
    chunks = _chunks(len(labels_T), weight_VD.shape[0], hidden_TD.device.type)
    for start in chunks:
        part = slice(start, start + chunks.step)
        logits_CV = _logits(hidden_TD[part], weight_VD, bias_V, softcap, scale)
        max_T[part] = logits_CV.amax(1)
        logits_CV.sub_(max_T[part, None])
        label_logits_C = logits_CV.gather(1, labels_T[part, None]).squeeze(1)
        log_sum_T[part] = logits_CV.exp_().sum(1).log()
        token_logps_T[part] = label_logits_C - log_sum_T[part]
    logps_S = torch.segment_reduce(token_logps_T.double(), "sum", lengths=cu_seqlens.diff().long()).to(dtype)
    return logps_S, max_T, log_sum_T


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
    def forward(ctx, hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap, scale, use_triton):  # type: ignore[no-untyped-def]
        forward = _triton_forward if use_triton else _torch_forward
        logps_S, max_T, log_sum_T = forward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap, scale)
        # The logsumexp in two parts: their float32 sum would lose digits that peaked logits need in backward.
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, max_T, log_sum_T)
        ctx.softcap, ctx.scale = softcap, scale
        return logps_S

    @staticmethod
    def backward(ctx, d_logps_S):  # type: ignore[no-untyped-def]
        hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, max_T, log_sum_T = ctx.saved_tensors
        softcap, scale = ctx.softcap, ctx.scale
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = _accumulate_dtype(hidden_TD.dtype)
        d_token_T = torch.repeat_interleave(d_logps_S.to(dtype), cu_seqlens.diff().long())
        d_hidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=dtype) if needs_bias else None
        chunks = _chunks(len(labels_T), weight_VD.shape[0], hidden_TD.device.type)
        for start in chunks:
            part = slice(start, start + chunks.step)
            logits_CV = _logits(hidden_TD[part], weight_VD, bias_V, softcap, scale)
            capped_CV = None if softcap is None else logits_CV.clone()
            # d logits = d_token * (onehot - softmax), formed in place in the chunk's own logits
            softmax_CV = logits_CV.sub_(max_T[part, None]).sub_(log_sum_T[part, None]).exp_()
            d_logits_CV = softmax_CV.mul_(-d_token_T[part, None])
            d_logits_CV.scatter_add_(1, labels_T[part, None], d_token_T[part, None])
            if capped_CV is not None:
                d_logits_CV.mul_(1 - capped_CV.div_(softcap).square_())
            if scale != 1.0:
                d_logits_CV *= scale
            d_input_CV = d_logits_CV.to(hidden_TD.dtype)
            if d_hidden_TD is not None:
                torch.mm(d_input_CV, weight_VD, out=d_hidden_TD[part])
            if d_weight_VD is not None and d_weight_VD.dtype == hidden_TD.dtype:
                d_weight_VD.addmm_(d_input_CV.t(), hidden_TD[part])
            elif d_weight_VD is not None:
                d_weight_VD += torch.mm(d_input_CV.t(), hidden_TD[part])
            if d_bias_V is not None:
                d_bias_V += d_logits_CV.sum(0)
        if d_weight_VD is not None:
            d_weight_VD = d_weight_VD.to(weight_VD.dtype)
        if d_bias_V is not None:
            d_bias_V = d_bias_V.to(bias_V.dtype)
        return d_hidden_TD, d_weight_VD, d_bias_V, None, None, None, None, None
