"""A rank's share of a window as micro-batches for the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from mrpo_scale.base.device import send
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs


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


def policy_batches(
    examples: Sequence[PairExample],
    references: CombinedReferences,
    *,
    shared_prompt: bool,
    end_to_end: bool = False,
    pad_token_id: int,
) -> list[MicroBatch]:
    """This rank's share of a window, with its ``references``, as the micro-batches that its examples were dealt to."""
    device = references.virtual_logps_P2.device
    batches = []
    for _, group in groupby(range(len(examples)), key=lambda i: examples[i].micro_batch):
        chosen = list(group)
        pairs = collate_pairs(
            [examples[i].tokens[0] for i in chosen],
            shared_prompt=shared_prompt,
            end_to_end=end_to_end,
            pad_token_id=pad_token_id,
        )
        weights = tuple(examples[i].weight for i in chosen)
        batches.append(
            MicroBatch(
                pairs=pairs.to(device),
                rows=tuple(examples[i].row for i in chosen),
                weights=weights,
                weight_P=send(torch.tensor(weights), device),
                references=references[chosen[0] : chosen[-1] + 1],
            )
        )
    return batches
