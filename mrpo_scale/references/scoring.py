"""Score the pairs of a window with every reference: examples -> ref_logps [K, P, 2].

One reference after the other runs its body over the window and leaves the hidden states of its response positions; then the K
output heads are gathered together and one ``virtual_reference`` call turns the hidden states of all of them into log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from mrpo_kernels import virtual_reference
from torch import Tensor

from mrpo_scale.objective import Objective
from mrpo_scale.pair_batch import PairBatch, collate_pairs, segment_length
from mrpo_scale.references.sharding import ShardedReference
from mrpo_scale.tokenization import PairTokens
from mrpo_scale.window import PairExample


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
        objective: Objective,
        *,
        tokens_per_forward: int,
        impl: str = "auto",
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.references, self.objective = list(references), objective
        self.tokens_per_forward, self.impl, self.group, self.device = tokens_per_forward, impl, group, device

    @torch.no_grad()
    def score(self, examples: Sequence[PairExample]) -> Tensor:
        """Log-probs [K, P, 2] float32 of P >= 1 examples, in their order."""
        # One order for all references, so that pair p is the same pair in each; longest first, so that neighbours pad little.
        order = sorted(
            range(len(examples)), key=lambda i: -sum(_length(examples[i].tokens[r.view]) for r in self.references)
        )
        batches_K = [self._batches(r, [examples[i].tokens[r.view] for i in order]) for r in self.references]
        hidden_K = [
            self._run_body(reference, batches, forwards)
            for reference, batches, forwards in zip(self.references, batches_K, self._forwards(batches_K), strict=True)
        ]
        with ExitStack() as gathered:
            heads = [gathered.enter_context(r.model.gathered_head()) for r in self.references]
            combined = virtual_reference(
                hidden_K,
                [head.weight for head in heads],
                [torch.cat([b.labels_T for b in batches]) for batches in batches_K],
                [_joined_seqlens(batches) for batches in batches_K],
                bias=[head.bias for head in heads],
                softcap=[head.softcap for head in heads],
                logit_scale=[head.logit_scale for head in heads],
                epsilon_max=self.objective.epsilon_max,
                clip=self.objective.clip,
                ref_weights=self.objective.ref_weights,
                aggregate=self.objective.aggregate,
                impl=self.impl,
            )
        return combined.ref_logps_KP2[:, torch.tensor(order, device=self.device).argsort()]

    def _run_body(self, reference: Reference, batches: list[PairBatch], forwards: int) -> Tensor:
        """Hidden states [T, D] of the window's response positions, pair after pair."""
        # A rank that is through with its own rows still takes part in the gathers of its group.
        padded = [*batches, *[None] * (forwards - len(batches))]
        return torch.cat([reference.model.response_hidden(batch) for batch in padded])

    def _batches(self, reference: Reference, pairs: Sequence[PairTokens]) -> list[PairBatch]:
        shared = reference.model.shared_prompt
        return [
            collate_pairs(pairs[part], shared_prompt=shared, pad_token_id=reference.pad_token_id).to(self.device)
            for part in cut_by_tokens(pairs, shared, self.tokens_per_forward)
        ]

    def _forwards(self, batches_K: list[list[PairBatch]]) -> list[int]:
        """Forwards per reference that the busiest rank of the group needs; all ranks run that many."""
        counts_K = torch.tensor([len(batches) for batches in batches_K], device=self.device)
        if self.group is not None:
            dist.all_reduce(counts_K, dist.ReduceOp.MAX, group=self.group)
        return counts_K.tolist()


def _length(pair: PairTokens) -> int:
    return segment_length(pair, shared_prompt=True)


def cut_by_tokens(pairs: Sequence[PairTokens], shared_prompt: bool, tokens_per_forward: int) -> list[slice]:
    """Consecutive parts of ``pairs``, each of at most ``tokens_per_forward`` padded tokens or of one pair."""
    starts, tokens, widest = [0], 0, 0
    for i, pair in enumerate(pairs):
        length = segment_length(pair, shared_prompt)
        widest = max(widest, length)
        # Shared-prompt pairs are packed, so they cost their own length; separate rows are padded to the widest.
        size = tokens + length if shared_prompt else 2 * widest * (i + 1 - starts[-1])
        if size > tokens_per_forward and i > starts[-1]:
            starts.append(i)
            tokens, widest = 0, length
        tokens += length
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(pairs)], strict=True)]


def _joined_seqlens(batches: Sequence[PairBatch]) -> Tensor:
    """[2P+1] boundaries of all responses, batch after batch."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0).to(lengths.dtype)])
