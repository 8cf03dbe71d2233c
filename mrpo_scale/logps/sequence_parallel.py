"""A row of tokens over several ranks (DeepSpeed Ulysses): each rank computes an equal run of its tokens, and in every attention
an equal part of the heads over all of them.

Everything but attention treats tokens one by one, so a rank needs only its own. Around an attention function the ranks of a
*sequence group* trade: each gives its tokens of the others' heads and gets the others' tokens of its own heads, all-to-all, and
back with the outputs. In between a head sees its whole row, so causal order, windows, spans and kernels are what they are on one
rank. Log-probs of responses are sums over tokens: each rank sums its own, and the group adds the sums up.

It is told to attention call by call, as the ``spans`` of the batch (:class:`RowOfGroup`): a model that is given plain spans, such
as a reference in the same process, does not notice.

n tokens of L of this rank, G heads of keys, d the width of a head, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mrpo_scale.base.ranks import get_rank, get_world_size, new_group


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that compute the tokens of one row together, as this rank sees them."""

    group: dist.ProcessGroup
    rank: int  #: of this process, in the group
    size: int

    def tokens(self, length: int) -> slice:
        """This rank's positions of a row of ``length``, a multiple of ``size``."""
        each = length // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def total(self, mine: Tensor) -> Tensor:
        """The sum of what all ranks have, on all; differentiable: whoever uses it, its gradient reaches every rank's part."""
        return _OverRanks.apply(mine, self.group, _summed)


@dataclass(frozen=True)
class RowOfGroup:
    """``spans`` of a row that lies over a sequence group."""

    spans: Any  #: as the attention takes them for the whole row
    group: SequenceGroup


def group_ranks(world_size: int, size: int) -> list[range]:
    """The ranks of each sequence group: neighbours, which a node's fast links join."""
    return [range(start, start + size) for start in range(0, world_size, size)]


def make_sequence_group(size: int, timeout: timedelta | None) -> SequenceGroup | None:
    """This rank's group of ``size``, which divides the world; None for groups of one. Collective over the world."""
    if size == 1:
        return None
    found = None
    for ranks in group_ranks(get_world_size(), size):
        group = new_group(ranks, timeout, f"sequences on ranks {ranks[0]} to {ranks[-1]}")
        if group is not None:
            found = SequenceGroup(group, get_rank() - ranks[0], size)
    return found


def with_exchange(
    attention: Callable[..., tuple[Tensor, Tensor | None]],
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """An attention function of transformers that also takes the ``spans`` of a row over a sequence group: query, key, value
    [1, heads, n, d] of this rank's tokens to [1, n, heads, d]."""

    @wraps(attention)
    def exchanging(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        spans: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(spans, RowOfGroup):
            return attention(module, query, key, value, attention_mask, spans=spans, **kwargs)
        group = spans.group
        sinks = kwargs.get("s_aux")
        if sinks is not None:
            kwargs["s_aux"] = sinks.chunk(group.size)[group.rank]
        query, key, value = tokens_to_heads((query, key, value), group)
        output_1LHd, _ = attention(module, query, key, value, attention_mask, spans=spans.spans, **kwargs)
        return heads_to_tokens(output_1LHd, group), None

    return exchanging


def tokens_to_heads(states: Sequence[Tensor], group: SequenceGroup) -> list[Tensor]:
    """Query, key, value [1, heads, n, d] of this rank's tokens as [1, heads / size, L, d] of its heads."""
    parts = [heads_by_rank(state, group.size) for state in states]
    if len({part.dtype for part in parts}) == 1:
        received = list(
            _OverRanks.apply(torch.cat(parts, 2), group.group, _traded).split([part.shape[2] for part in parts], 2)
        )
    else:  # under autocast rotations leave queries and keys in float32
        received = [_OverRanks.apply(part, group.group, _traded) for part in parts]
    return [heads_of_rank(part, state.shape[3]) for part, state in zip(received, states, strict=True)]


def heads_by_rank(state_1Gnd: Tensor, size: int) -> Tensor:
    """[size, n, heads of a rank * d]: what goes to each rank. Where ``size`` does not divide the heads, of keys then, each is
    repeated just so often that it does; by their order each rank's heads of queries find their own among them."""
    _, heads, tokens, width = state_1Gnd.shape
    if heads % size:
        repeats = math.lcm(heads, size) // heads
        state_1Gnd, heads = state_1Gnd.repeat_interleave(repeats, 1), heads * repeats
    return state_1Gnd.view(size, heads // size, tokens, width).transpose(1, 2).reshape(size, tokens, -1)


def heads_of_rank(received: Tensor, width: int) -> Tensor:
    """[size, n, heads of a rank * d] from all ranks as [1, heads of a rank, L, d]."""
    size, tokens, together = received.shape
    return received.reshape(size * tokens, together // width, width).transpose(0, 1)[None]


def heads_to_tokens(output_1LHd: Tensor, group: SequenceGroup) -> Tensor:
    """Outputs [1, L, heads / size, d] of this rank's heads as [1, n, heads, d] of its tokens."""
    _, length, heads, width = output_1LHd.shape
    given = output_1LHd.reshape(group.size, length // group.size, heads * width)
    return tokens_of_rank(_OverRanks.apply(given, group.group, _traded), width)


def tokens_of_rank(received: Tensor, width: int) -> Tensor:
    """[size, n, heads of a rank * d] from all ranks as [1, n, heads, d]."""
    size, tokens, together = received.shape
    return received.view(size, tokens, together // width, width).transpose(0, 1).reshape(1, tokens, -1, width)


class _OverRanks(torch.autograd.Function):
    """``exchange(given, group)``, a linear map over all ranks' tensors that is its own adjoint: its backward is itself."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, group: dist.ProcessGroup, exchange: Callable[[Tensor, dist.ProcessGroup], Tensor]
    ) -> Tensor:
        ctx.group, ctx.exchange = group, exchange
        return exchange(given, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange(grad, ctx.group), None, None


def _traded(given: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[size, ...] of which each rank gets its part, as what it got from each."""
    received = torch.empty(given.shape, dtype=given.dtype, device=given.device)
    dist.all_to_all_single(received, given.contiguous(), group=group)
    return received


def _summed(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = mine.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
