"""Attention in plain products, with everything that some kernel lacks: soft-capped scores, sinks, dropout, any mask.

It is the oracle of the kernels (``varlen_reference``) and what a model has in calls that no kernel takes, such as generation.

Q queries, K keys, d the width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """query [..., heads, Q, d], key and value [..., heads of keys, K, d] to [..., heads, Q, d].

    Args:
        mask: broadcast to [..., heads, Q, K]; boolean (True = seen) or added to the scores. None: causal, aligned at the end.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: [heads] scores of a key that is seen by all queries and has no value.
    """
    repeats = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(repeats, -3) if repeats > 1 else x for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = causal_mask(query.shape[-2], key.shape[-2], None, query.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)[..., : key.shape[-2]]
    return drop(weights, dropout, training=dropout > 0) @ value


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, K], True = seen: the last ``queries`` of ``keys`` positions see themselves and what is before them, ``window`` in all."""
    back_QK = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return back_QK >= 0 if window is None else (back_QK >= 0) & (back_QK < window)


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` on any device, sequence by sequence: what kernels must agree with.

    ``window_size`` is (keys seen before a query's own, 0), -1 for all of them. Reads the device.

    Raises:
        ValueError: it is not causal, lengths that are not the longest are called so, or heads differ without ``enable_gqa``.
    """
    lengths_q, lengths_k = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    if (max(lengths_q), max(lengths_k)) != (max_q, max_k):
        raise ValueError(f"the longest sequences have {max(lengths_q)} and {max(lengths_k)}, not {max_q} and {max_k}")
    if window_size[1] != 0:
        raise ValueError(f"window_size {window_size} is not causal")
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("enable_gqa is False and heads differ")
    window = None if window_size[0] < 0 else window_size[0] + 1
    outputs = []
    for q, k, v in zip(query.split(lengths_q), key.split(lengths_k), value.split(lengths_k), strict=True):
        seen = causal_mask(len(q), len(k), window, query.device)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        output = masked_attention(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks, dropout=dropout)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)
