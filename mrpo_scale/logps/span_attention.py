"""Attention over pairs that lie end to end in one row, without a mask as large as the row squared and without padding.

A *span* is a text that others continue: a trunk and its branches. A shared-prompt pair is the span (prompt, (chosen, rejected)), a
separate response the span (prompt + response, ()). Every branch sees the trunk and itself, so each span takes one causal call of
``scaled_dot_product_attention`` for the trunk with its first branch, and one call for each other branch. What a masked row would
compute and throw away (every pair against every other, and padding in every layer) is never computed. On a CPU that is faster
(docs/performance.md); on a GPU, where many small calls may cost more, it was not measured and is not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mrpo_scale.logps.masked_attention import causal_mask
from mrpo_scale.logps.sequence_parallel import with_exchange

#: Name of the attention below in a model's config. Without ``spans`` it is ``sdpa``.
SPAN_ATTENTION = "sdpa_spans"


@dataclass(frozen=True)
class Spans:
    """Lengths of a row's spans, in order: (trunk, lengths of its branches)."""

    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    _masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def mask(self, queries: int, keys: int, window: int | None, query: Tensor) -> Tensor | None:
        """[1, 1, queries, keys], added to the scores of ``query``: the last ``queries`` of ``keys`` positions see what is before
        them, no further than the window. None where plain causal attention is just that. Made, and kept for the backward, once for
        all layers: of truth values each layer would make numbers of its own."""
        if window is not None and window >= keys:
            window = None
        if queries == keys and window is None:
            return None
        key = (queries, keys, window, query.dtype)
        if key not in self._masks:
            seen_QK = causal_mask(queries, keys, window, query.device)
            added_QK = torch.zeros_like(seen_QK, dtype=query.dtype).masked_fill_(~seen_QK, -math.inf)
            self._masks[key] = added_QK[None, None]
        return self._masks[key]


def span_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    spans: Spans | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key, value [B, heads, L, d] to [B, L, heads, d]. With ``spans``, B is 1."""
    if spans is None or kwargs.get("softcap") is not None:  # which it refuses
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )

    def attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
        mask = spans.mask(query.shape[2], key.shape[2], sliding_window, query)
        # A CPU's kernel takes fewer heads of keys than of queries with a mask, too: nothing is repeated, nothing more is kept.
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    # Split once: the backward of a split is one concatenation, that of many slices as many zero-filled tensors.
    parts = [n for trunk, branches in spans.lengths for n in (trunk, *branches)]
    firsts = [n for trunk, branches in spans.lengths for n in (trunk + sum(branches[:1]), *branches[1:])]
    queries, keys, values = iter(query.split(firsts, 2)), iter(key.split(parts, 2)), iter(value.split(parts, 2))
    outputs = []
    for _, branches in spans.lengths:
        trunk = next(keys), next(values)
        if not branches:
            outputs.append(attend(next(queries), [trunk[0]], [trunk[1]]))
        for _ in branches:
            outputs.append(attend(next(queries), [trunk[0], next(keys)], [trunk[1], next(values)]))
    return torch.cat(outputs, 1), None


AttentionInterface.register(SPAN_ATTENTION, with_exchange(span_attention))
AttentionMaskInterface.register(SPAN_ATTENTION, sdpa_mask)
