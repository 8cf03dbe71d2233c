"""Where the queries and keys of pairs lie in one variable-length attention call: index arithmetic and one gather.

A span of :mod:`~mrpo_scale.logps.span_attention` (a trunk and its branches) becomes one sequence per branch. The queries of the
first are (trunk + branch), those of the others (branch); the keys of each are (trunk + branch). With causal attention aligned at
the end, the last queries with the last keys, each query sees what is before it in its own text, and a window counts what lies
between, as the text does. Queries stay where they are; keys and values are gathered once, each trunk as often as it has branches.

All of it is known on the host from the lengths, so nothing reads the device. It is one tensor of integers, which moves with its
batch.

T tokens of a row, K keys, N sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: (trunk, lengths of its branches) of each span of a row, in order.
Lengths = Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class VarlenLayout:
    """What a variable-length attention call is told beside queries, keys and values."""

    cu_q: Tensor  #: [N+1] int32 boundaries of the sequences in the queries, which are the row's tokens
    cu_k: Tensor  #: [N+1] int32 boundaries in the keys
    max_q: int
    max_k: int
    source_K: Tensor | None  #: the token that each key is; None: each token is a key once
    first_T: Tensor | None  #: where each token's first key lies
    others: tuple[
        tuple[Tensor, Tensor], ...
    ]  #: (tokens, where their next keys lie): of the trunks of second, third branches

    def keys_of(self, x_T: Tensor) -> Tensor:
        """[T, heads, d] of tokens as [K, heads, d] of keys. Its backward sums each token's keys in one order, without atomics."""
        return x_T if self.source_K is None else _Gather.apply(x_T, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, layout: VarlenLayout) -> Tensor:
        assert layout.source_K is not None
        ctx.layout = layout
        return x_T.index_select(0, layout.source_K)

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        layout: VarlenLayout = ctx.layout
        assert layout.first_T is not None
        grad_T = grad_K.index_select(0, layout.first_T)
        for tokens, keys in layout.others:  # no token twice in one of them, so their order does not matter
            grad_T.index_add_(0, tokens, grad_K.index_select(0, keys))
        return grad_T, None


def varlen_index(lengths: Lengths) -> Tensor:
    """[...] int32 on the host: everything that :func:`varlen_layout` cuts out again."""
    queries = [n + (trunk if j == 0 else 0) for trunk, branches in lengths for j, n in enumerate(branches or (0,))]
    keys = [trunk + n for trunk, branches in lengths for n in branches or (0,)]
    parts = [np.cumsum([0, *queries]), np.cumsum([0, *keys])]
    if len(keys) > len(lengths):
        source, first, others = _gather(lengths)
        parts += [source, first, *(part for other in others for part in other)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def _gather(lengths: Lengths) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """(token of each key, first key of each token, [(tokens, keys) of the trunks of second, third, ... branches])."""
    most = max(len(branches) for _, branches in lengths)
    nothing = np.zeros(0, dtype=np.int64)
    source, first = [nothing], [nothing]
    tokens: list[list[np.ndarray]] = [[nothing] for _ in range(most - 1)]
    keys: list[list[np.ndarray]] = [[nothing] for _ in range(most - 1)]
    token = key = 0
    for trunk, branches in lengths:
        trunk_tokens, own = token + np.arange(trunk), token + trunk
        for j, n in enumerate(branches or (0,)):
            source += [trunk_tokens, own + np.arange(n)]
            if j == 0:
                first.append(key + np.arange(trunk))
            else:
                tokens[j - 1].append(trunk_tokens)
                keys[j - 1].append(key + np.arange(trunk))
            first.append(key + trunk + np.arange(n))
            own, key = own + n, key + trunk + n
        token = own
    others = [(np.concatenate(t), np.concatenate(k)) for t, k in zip(tokens, keys, strict=True)]
    return np.concatenate(source), np.concatenate(first), others


def varlen_layout(lengths: Lengths, index: Tensor) -> VarlenLayout:
    """``index`` of :func:`varlen_index`, on any device, as a layout: views of it, sizes from ``lengths``."""
    all_branches = [list(branches or (0,)) for _, branches in lengths]
    count = sum(map(len, all_branches))
    max_q = max(trunk + n[0] for (trunk, _), n in zip(lengths, all_branches, strict=True))
    max_q = max(max_q, *(n for branches in all_branches for n in branches))
    max_k = max(trunk + n for (trunk, _), branches in zip(lengths, all_branches, strict=True) for n in branches)
    sizes = [count + 1, count + 1]
    shared = count > len(lengths)
    if shared:
        num_tokens = sum(trunk + sum(branches) for trunk, branches in lengths)
        sizes += [sum(trunk * len(n) + sum(n) for (trunk, _), n in zip(lengths, all_branches, strict=True)), num_tokens]
        for j in range(1, max(map(len, all_branches))):
            sizes += [sum(trunk for trunk, branches in lengths if len(branches) > j)] * 2
    cu_q, cu_k, *rest = index.split(sizes)
    if not shared:
        return VarlenLayout(cu_q, cu_k, max_q, max_k, None, None, ())
    source_K, first_T, *pairs = rest
    return VarlenLayout(cu_q, cu_k, max_q, max_k, source_K, first_T, tuple(zip(pairs[::2], pairs[1::2], strict=True)))
