"""A rank's share of a window as micro-batches for the policy.

Without a sequence group a rank computes its own. The ranks of a group compute one rank's micro-batch after the other's, each an
equal part of its tokens: as much work for each, in as many forwards more as the group has ranks, with as much less to keep in each.
A micro-batch's loss and metrics are its owner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from mrpo_scale.base.device import send
from mrpo_scale.base.ranks import all_gather_object
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class MicroBatch:
    """What one policy forward takes. Not a Mapping, so that nothing casts or moves its tensors behind our back."""

    pairs: PairBatch
    rows: tuple[int, ...]
    weights: tuple[float, ...]  #: of each pair: 1, or 0 for a filler
    weight_P: Tensor  #: the same, on the device
    references: CombinedReferences

    @property
    def num_pair_tokens(self) -> int:
        """Positions of pairs that count: neither padding nor a filler, so that no split into batches changes their sum."""
        return sum(count for count, weight in zip(self.pairs.positions, self.weights, strict=True) if weight > 0)


@dataclass(frozen=True)
class PeerBatch:
    """Another rank's micro-batch, of which this rank computes its part of the tokens. Nothing of it is measured here."""

    pairs: PairBatch
    num_pair_tokens: int = 0


def policy_batches(
    examples: Sequence[PairExample],
    references: CombinedReferences,
    *,
    shared_prompt: bool,
    end_to_end: bool = False,
    pad_token_id: int,
) -> list[MicroBatch]:
    """This rank's share of a window, with its ``references``, as the micro-batches that its examples were dealt to."""
    layout: Any = {"shared_prompt": shared_prompt, "end_to_end": end_to_end, "pad_token_id": pad_token_id}
    return [
        _micro_batch(collate_pairs([e.tokens[0] for e in examples[part]], **layout), examples[part], references[part])
        for part in _parts(examples)
    ]


def group_batches(
    examples: Sequence[PairExample],
    references: CombinedReferences,
    group: SequenceGroup,
    *,
    shared_prompt: bool,
    pad_token_id: int,
) -> list[MicroBatch | PeerBatch]:
    """The same over a sequence group: the first micro-batch of each of its ranks, then the second ones, and so on. Collective over
    the group; every rank has equally many."""
    parts = _parts(examples)
    mine = [[e.tokens[0] for e in examples[part]] for part in parts]
    batches: list[MicroBatch | PeerBatch] = []
    for part, of_ranks in zip(parts, zip(*all_gather_object(mine, group.group), strict=True), strict=True):
        for rank, tokens in enumerate(of_ranks):
            pairs = collate_pairs(
                tokens, shared_prompt=shared_prompt, end_to_end=True, pad_token_id=pad_token_id, group=group
            )
            if rank == group.rank:
                batches.append(_micro_batch(pairs, examples[part], references[part]))
            else:
                batches.append(PeerBatch(pairs.to(references.virtual_logps_P2.device)))
    return batches


def _parts(examples: Sequence[PairExample]) -> list[slice]:
    """The examples of each micro-batch, which stand together."""
    numbers = [len(list(group)) for _, group in groupby(examples, key=lambda example: example.micro_batch)]
    ends = list(accumulate(numbers))
    return [slice(end - number, end) for end, number in zip(ends, numbers, strict=True)]


def _micro_batch(pairs: PairBatch, examples: Sequence[PairExample], references: CombinedReferences) -> MicroBatch:
    device = references.virtual_logps_P2.device
    weights = tuple(example.weight for example in examples)
    return MicroBatch(
        pairs=pairs.to(device),
        rows=tuple(example.row for example in examples),
        weights=weights,
        weight_P=send(torch.tensor(weights), device),
        references=references,
    )
