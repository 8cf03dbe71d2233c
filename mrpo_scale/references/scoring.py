"""Score the pairs of a window with every reference, one reference after the other: examples -> ref_logps [K, P, 2]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mrpo_scale.pair_batch import collate_pairs, segment_length
from mrpo_scale.references.sharding import ShardedReference
from mrpo_scale.tokenization import PairTokens
from mrpo_scale.window import PairExample, sorted_by_length


@dataclass(frozen=True)
class Reference:
    """A loaded reference and how it reads pairs."""

    name: str
    model: ShardedReference
    view: int  #: which of an example's token views is this model's
    pad_token_id: int


class ReferenceScorer:
    """K references on this rank's shard group. Collective: every rank of the group calls :meth:`score` equally often.

    Args:
        tokens_per_forward: most padded tokens of one no-grad forward. A window within it takes one forward, so one gather of the
            weights, per reference; a larger one takes as many as its size asks for.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        *,
        tokens_per_forward: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.references = list(references)
        self.tokens_per_forward, self.group, self.device = tokens_per_forward, group, device

    @torch.no_grad()
    def score(self, examples: Sequence[PairExample]) -> Tensor:
        """Log-probs [K, P, 2] float32 of ``examples`` (P may be 0), in their order."""
        ref_logps_KP2 = torch.empty(len(self.references), len(examples), 2, device=self.device)
        batches_K = [
            _batches([e.tokens[r.view] for e in examples], r.model.shared_prompt, self.tokens_per_forward)
            for r in self.references
        ]
        for k, (reference, forwards) in enumerate(zip(self.references, self._forwards(batches_K), strict=True)):
            for i in range(forwards):
                # A rank that is through with its own rows still takes part in the gathers of its group.
                batch = batches_K[k][i] if i < len(batches_K[k]) else []
                pairs = [examples[p].tokens[reference.view] for p in batch]
                if not pairs:
                    reference.model.score(None)
                    continue
                collated = collate_pairs(
                    pairs, shared_prompt=reference.model.shared_prompt, pad_token_id=reference.pad_token_id
                )
                ref_logps_KP2[k, batch] = reference.model.score(collated.to(self.device))
        return ref_logps_KP2

    def _forwards(self, batches_K: list[list[list[int]]]) -> list[int]:
        """Forwards per reference that the busiest rank of the group needs; all ranks run that many."""
        counts_K = torch.tensor([len(batches) for batches in batches_K], device=self.device)
        if self.group is not None:
            dist.all_reduce(counts_K, dist.ReduceOp.MAX, group=self.group)
        return counts_K.tolist()


def _batches(pairs: Sequence[PairTokens], shared_prompt: bool, tokens_per_forward: int) -> list[list[int]]:
    """Indices of ``pairs``, longest first, cut where one forward would pass ``tokens_per_forward`` padded tokens."""
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted_by_length(pairs, shared_prompt):
        # Shared-prompt pairs are packed, so they cost their own length; separate ones are padded to the batch's longest.
        longest = i if shared_prompt or not batches else batches[-1][0]
        cost = segment_length(pairs[longest], shared_prompt) * (1 if shared_prompt else 2)
        if not batches or tokens + cost > tokens_per_forward:
            batches.append([])
            tokens, cost = 0, segment_length(pairs[i], shared_prompt) * (1 if shared_prompt else 2)
        batches[-1].append(i)
        tokens += cost
    return batches
