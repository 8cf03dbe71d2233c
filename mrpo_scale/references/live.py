"""Score the pairs of a window with live references: examples -> ref_logps [references, P, 2], or what they combine to.

:class:`SpreadScorer`: each rank scores its own pairs. One reference after the other runs its body over the window and leaves the
hidden states of its response positions; then the output heads are gathered together and one ``virtual_reference`` call turns the
hidden states of all of them into their virtual reference. :class:`PartitionScorer`: the ranks of a reference score everybody's
pairs; row numbers go out and scores come back, nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from mrpo_kernels import CombinedReferences, sequence_logps, virtual_reference
from torch import Tensor

from mrpo_scale.base.device import send
from mrpo_scale.base.ranks import all_gather_object, all_reduce_max, get_rank, sum_over_ranks, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.dealing import cut_by_tokens, deal_to_ranks
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.data.window import PairExample, TokenizedPairs
from mrpo_scale.logps.pair_batch import PairBatch, segment_length
from mrpo_scale.logps.pair_forward import FusedHead, every_token
from mrpo_scale.models.plan import PlannedReference
from mrpo_scale.objective import Objective, combine
from mrpo_scale.references.adapters import can_share
from mrpo_scale.references.placement import Placement
from mrpo_scale.references.sharding import ShardedReference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """A loaded reference and how it reads pairs."""

    name: str
    model: ShardedReference
    tokenization: int  #: which of an example's tokenizations is this model's
    pad_token_id: int

    def batch(self, pairs: Sequence[PairTokens]) -> PairBatch:
        return self.model.batch(pairs, self.pad_token_id)

    def batches(self, pairs: Sequence[PairTokens], tokens_per_forward: int) -> list[PairBatch]:
        """``pairs``, in their order, as batches of at most ``tokens_per_forward`` padded tokens or of one pair."""
        return [self.batch(pairs[part]) for part in self.parts(pairs, tokens_per_forward)]

    def parts(self, pairs: Sequence[PairTokens], tokens_per_forward: int) -> list[slice]:
        """Of :meth:`batches`."""
        shared = self.model.shared_prompt
        return cut_by_tokens(padded_lengths(pairs, shared), tokens_per_forward, padded=not shared)


def load_reference(
    planned: PlannedReference,
    group: dist.ProcessGroup | None,
    args: MRPOConfig,
    beside: Iterable[Reference] = (),
) -> Reference:
    """A reference on this rank's shard group. Collective over the group. Raises as :class:`ShardedReference` does.

    Args:
        beside: what is in memory on that group: one of the same weights lends them.
    """
    lender = next((r.model for r in beside if can_share(r.model.source, planned.source)), None)
    if lender is not None:
        model = lender.sharing(planned.source)
    else:
        model = ShardedReference(
            planned.source, group, args.device, shared_prompt=args.shared_prompt, offload=args.ref_offload
        )
    return Reference(planned.name, model, planned.tokenization, planned.pad_token_id)


@dataclass(frozen=True)
class _Scorable:
    """A window as one reference's head takes it."""

    hidden_TD: Tensor
    head: FusedHead
    labels_T: Tensor
    cu_seqlens: Tensor


class SpreadScorer:
    """K references on this rank's shard group. Collective: every rank of the group calls each method equally often.

    Args:
        references: {k: reference}; those whose scores are all cached are left out.
        tokens_per_forward: most padded tokens of one no-grad forward. A window within it takes one forward, so one gather of the
            weights, per reference; a larger one takes as many as its size asks for.
    """

    def __init__(self, references: Mapping[int, Reference], *, tokens_per_forward: int, impl: str = "auto") -> None:
        self.references = dict(references)
        self.tokens_per_forward, self.impl = tokens_per_forward, impl
        self._most_forwards = 1

    @torch.no_grad()
    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, which: Sequence[int]) -> Tensor:
        """Raw log-probs [len(which), P, 2] float32 of this rank's P >= 0 examples, in their order, by the references ``which``."""
        with self._scorable(examples, which) as (references, places_P):
            logps_K = [self._logps(r, r.cu_seqlens) for r in references]
        return torch.stack(logps_K).view(len(which), -1, 2)[:, places_P]

    @torch.no_grad()
    def score_tokens(self, examples: Sequence[PairExample], which: Sequence[int]) -> list[Tensor]:
        """Of each of ``which`` the log-probs [T] of its tokens, example after example. Else as :meth:`score`."""
        with self._scorable(examples, which) as (references, places_P):
            tokens_K = [self._logps(r, every_token(r.labels_T)) for r in references]
        return [
            _placed(logps_T, r.cu_seqlens[::2].diff(), places_P)
            for logps_T, r in zip(tokens_K, references, strict=True)
        ]

    def _logps(self, scorable: _Scorable, cu_seqlens: Tensor) -> Tensor:
        """Log-prob of each run of tokens that ``cu_seqlens`` bounds."""
        return sequence_logps(
            *(scorable.hidden_TD, scorable.head.weight, scorable.labels_T, cu_seqlens),
            bias=scorable.head.bias,
            softcap=scorable.head.softcap,
            logit_scale=scorable.head.logit_scale,
            impl=self.impl,
        )

    @torch.no_grad()
    def combined(
        self, examples: Sequence[PairExample], pairs: TokenizedPairs, which: Sequence[int], objective: Objective
    ) -> CombinedReferences:
        """The virtual reference of these examples in one call, by ``which``, all of a run's references. Else as :meth:`score`."""
        with self._scorable(examples, which) as (references, places_P):
            combined = virtual_reference(
                [r.hidden_TD for r in references],
                [r.head.weight for r in references],
                [r.labels_T for r in references],
                [r.cu_seqlens for r in references],
                bias=[r.head.bias for r in references],
                softcap=[r.head.softcap for r in references],
                logit_scale=[r.head.logit_scale for r in references],
                **objective.modes,
                impl=self.impl,
            )
        return combined[places_P]

    @contextmanager
    def _scorable(
        self, examples: Sequence[PairExample], which: Sequence[int]
    ) -> Iterator[tuple[list[_Scorable], Tensor]]:
        """Of each reference what its head takes, all heads gathered; and each example's place in them."""
        references = [self.references[k] for k in which]
        # One order for all references, so that pair p is the same pair in each; longest first, so that neighbours pad little. Of
        # all texts, not of those read by ``which``: a resumed run may find one reference's scores in the cache and not another's,
        # and must score that one's pairs beside the same neighbours.
        order = sorted(range(len(examples)), key=lambda i: -sum(map(_length, examples[i].tokens)))
        batches_K = [
            r.batches([examples[i].tokens[r.tokenization] for i in order], self.tokens_per_forward) for r in references
        ]
        hidden_K = [
            _run_body(reference, batches, forwards)
            for reference, batches, forwards in zip(
                references, batches_K, self._forwards(references, batches_K), strict=True
            )
        ]
        places_P = send(torch.tensor(np.argsort(order), dtype=torch.long), hidden_K[0].device)
        with ExitStack() as gathered:
            heads = [gathered.enter_context(r.model.gathered_head()) for r in references]
            yield (
                [
                    _Scorable(hidden_TD, head, _joined_labels(batches, hidden_TD), _joined_seqlens(batches, hidden_TD))
                    for hidden_TD, head, batches in zip(hidden_K, heads, batches_K, strict=True)
                ],
                places_P,
            )

    def _forwards(self, references: Sequence[Reference], batches_K: Sequence[list[PairBatch]]) -> list[int]:
        """Forwards per reference that the busiest rank of the group needs; all ranks run that many."""
        model = references[0].model
        counts = all_reduce_max([len(batches) for batches in batches_K], model.group)
        if max(counts) > self._most_forwards:
            self._most_forwards = max(counts)
            logger.info(
                "a window is larger than ref_tokens_per_forward: %d, so a reference takes %d forwards, each of which gathers it",
                self.tokens_per_forward,
                self._most_forwards,
            )
        return counts


class PartitionScorer:
    """References that lie on different ranks. Collective over the world.

    Args:
        held: {k: reference} of which this rank holds a part.
    """

    def __init__(
        self,
        held: Mapping[int, Reference],
        placement: Placement,
        device: torch.device,
        *,
        tokens_per_forward: int,
        impl: str = "auto",
    ) -> None:
        self.references, self.placement, self.device = dict(held), placement, device
        self.tokens_per_forward, self.impl = tokens_per_forward, impl
        self.rank = get_rank()

    @torch.no_grad()
    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, which: Sequence[int]) -> Tensor:
        """As :meth:`SpreadScorer.score`; all ranks score rows of the same ``pairs``, from which the rows of others are read."""
        own = np.array([example.row for example in examples], dtype=np.int64)
        rows = self._everybodys_rows(own)
        scores_KU2 = torch.zeros(len(which), len(rows), 2, device=self.device)
        for i, k in enumerate(which):
            if k in self.references:
                ranks = self.placement.ranks(k)
                lengths = pairs.lengths[rows, self.references[k].tokenization].sum(-1)
                mine = deal_to_ranks(lengths, len(ranks))[ranks.index(self.rank)]
                tokens = [pairs.tokens(int(row))[self.references[k].tokenization] for row in rows[mine]]
                for part, logps_P2 in score_in_step(self.references[k], tokens, self.tokens_per_forward):
                    scores_KU2[i, send(torch.from_numpy(mine[part]), self.device)] = logps_P2
        sum_over_ranks(scores_KU2)  # one rank wrote each entry, the others add zeros: exact
        return scores_KU2[:, send(torch.from_numpy(np.searchsorted(rows, own)), self.device)]

    def combined(
        self, examples: Sequence[PairExample], pairs: TokenizedPairs, which: Sequence[int], objective: Objective
    ) -> CombinedReferences:
        """As :meth:`SpreadScorer.combined`, from log-probs."""
        return combine(self.score(examples, pairs, which), objective, self.impl)

    def _everybodys_rows(self, own: np.ndarray) -> np.ndarray:
        """Row numbers of all ranks' examples, each once, ascending. Ranks may have different numbers of examples."""
        return np.unique(np.concatenate(all_gather_object(own, world_group())))


@torch.no_grad()
def score_in_step(
    reference: Reference, pairs: Sequence[PairTokens], tokens_per_forward: int
) -> Iterator[tuple[slice, Tensor]]:
    """Forward by forward: which of the n >= 0 pairs, and their log-probs [.., 2]. Longest first, to pad little.

    Collective over the reference's shard group: as many forwards as its busiest rank needs.
    """
    model = reference.model
    parts = reference.parts(pairs, tokens_per_forward)
    (forwards,) = all_reduce_max([len(parts)], model.group)
    for part in [*parts, *[None] * (forwards - len(parts))]:
        logps_P2 = model.score(None if part is None else reference.batch(pairs[part]))
        if part is not None:
            yield part, logps_P2


def _run_body(reference: Reference, batches: Sequence[PairBatch], forwards: int) -> Tensor:
    """Hidden states [T, D] of the window's response positions, pair after pair."""
    # A rank that is through with its own rows still takes part in the gathers of its group.
    padded = [*batches, *[None] * (max(forwards, 1) - len(batches))]
    return torch.cat([reference.model.response_hidden(batch) for batch in padded])


def _placed(logps_T: Tensor, lengths_P: Tensor, places_P: Tensor) -> Tensor:
    """[T] the tokens of P pairs, pair ``places_P[0]`` first."""
    if not len(places_P):
        return logps_T
    parts = logps_T.split(lengths_P.tolist())
    return torch.cat([parts[place] for place in places_P.tolist()])


def _length(pair: PairTokens) -> int:
    return segment_length(pair, shared_prompt=True)


def padded_lengths(pairs: Sequence[PairTokens], shared_prompt: bool) -> list[int]:
    """Positions of each pair in a batch of its own: one row, or two that are padded to each other."""
    return [segment_length(pair, shared_prompt) * (1 if shared_prompt else 2) for pair in pairs]


def _joined_labels(batches: Sequence[PairBatch], hidden_TD: Tensor) -> Tensor:
    """[T] labels of all responses, batch after batch."""
    return torch.cat([torch.zeros(0, dtype=torch.long, device=hidden_TD.device), *(b.labels_T for b in batches)])


def _joined_seqlens(batches: Sequence[PairBatch], hidden_TD: Tensor) -> Tensor:
    """[2P+1] boundaries of all responses, batch after batch."""
    start = torch.zeros(1, dtype=torch.int32, device=hidden_TD.device)
    lengths = torch.cat([start, *(batch.cu_seqlens.diff() for batch in batches)])
    return lengths.cumsum(0).to(torch.int32)
