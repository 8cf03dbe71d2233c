"""The anchor of a LoRA run: the policy with its adapter switched off. No second copy of the weights is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mrpo_scale.base.ranks import all_reduce_max, world_group
from mrpo_scale.data.dealing import cut_by_tokens
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.pair_forward import score_pairs, score_tokens
from mrpo_scale.references.live import padded_lengths


@dataclass(frozen=True)
class AdapterOffAnchor:
    """Scores pairs as the policy's own frozen weights do. Collective over the world: under ZeRO-3 each forward gathers the policy.

    Args:
        model: the policy as the training step calls it, inside whatever engine wraps it.
        policy: the peft model in it.
        shared_prompt, end_to_end, pad_token_id: the layout of the policy's batches.
        tokens_per_forward: most padded tokens of one forward.
    """

    model: nn.Module
    policy: Any
    device: torch.device
    shared_prompt: bool
    end_to_end: bool
    pad_token_id: int
    tokens_per_forward: int

    def score(self, examples: Sequence[PairExample]) -> Tensor:
        """Log-probs [P, 2] float32 of P >= 1 examples, in their order."""
        return torch.stack(self._in_order(examples, lambda batch: list(score_pairs(self.model, batch).float())))

    def score_tokens(self, examples: Sequence[PairExample]) -> Tensor:
        """The same of each token [T], example after example."""

        def scored(batch: PairBatch) -> list[Tensor]:
            lengths = [end - start for start, end in pairwise(batch.bounds)]
            return list(score_tokens(self.model, batch).float().split(lengths))

        return torch.cat(self._in_order(examples, scored))

    @torch.no_grad()
    def _in_order(self, examples: Sequence[PairExample], scored: Callable[[PairBatch], list[Tensor]]) -> list[Tensor]:
        """What a forward over a batch says of each of its pairs, in the order of ``examples``."""
        tokens = [example.tokens[0] for example in examples]
        lengths = padded_lengths(tokens, self.shared_prompt)
        order = sorted(range(len(tokens)), key=lambda i: -lengths[i])
        ordered = [tokens[i] for i in order]
        parts = cut_by_tokens([lengths[i] for i in order], self.tokens_per_forward, padded=not self.shared_prompt)
        (forwards,) = all_reduce_max([len(parts)], world_group())
        training = self.model.training
        self.model.eval()
        try:
            with self.policy.disable_adapter():
                # A rank that is through with its pairs still takes part in the gathers of the others.
                found = [
                    scored(self._batch(ordered[part])) for part in [*parts, *[slice(0, 1)] * (forwards - len(parts))]
                ]
        finally:
            self.model.train(training)
        by_length = [of_pair for part in found[: len(parts)] for of_pair in part]
        return [by_length[place] for place in np.argsort(order)]

    def _batch(self, pairs: Sequence[Any]) -> PairBatch:
        batch = collate_pairs(
            pairs, shared_prompt=self.shared_prompt, end_to_end=self.end_to_end, pad_token_id=self.pad_token_id
        )
        return batch.to(self.device)
