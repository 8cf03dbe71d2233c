"""A policy of which only the upper layers train: what the frozen layers below make of a pair is computed once and looked up.

The study's runs are many and its machine is two cores. With the lower layers frozen their hidden states of a pair never change, so
a run pays for the upper layers and the head alone. The upper part stays a causal LM of transformers: its embedding is a table of
hidden states, and the ids of a batch are rows of that table, so that `score_pairs` and everything around it are the project's own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.pairs import PairTokens
from mrpo_scale.logps.layer_masks import body_of
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.pair_forward import response_hidden

PREPARED_TOGETHER = 32  #: pairs whose frozen hidden states are computed in one forward


class HiddenTable(nn.Module):
    """An embedding whose rows are hidden states [N, D] of all positions of all pairs. Not a parameter: it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_ND = torch.empty(0)

    def forward(self, index_BL: Tensor) -> Tensor:
        return self.rows_ND[index_BL]


class UpperLayers:
    """The top ``layers`` of ``policy``, in place, over fixed hidden states. All layers: the policy as it is.

    Args:
        policy: float32, able to score pairs that lie end to end with a shared prompt.
        layers: how many train; the output head, tied to the embedding below, never does.
    """

    def __init__(self, policy: PreTrainedModel, layers: int) -> None:
        self.policy, self.layers, body = policy, layers, body_of(policy)
        self.full = layers >= len(body.layers)
        self._starts: dict[int, int] = {}
        if self.full:
            return
        if policy.get_output_embeddings().weight is not policy.get_input_embeddings().weight:
            raise ConfigError(f"--layers {layers}: the head of {type(policy).__name__} is not tied; train all layers.")
        policy.requires_grad_(False)
        self._lower, self._upper = body.layers[:-layers], body.layers[-layers:]
        self._norm, self._embedding, self._table = body.norm, body.embed_tokens, HiddenTable()
        self._upper.requires_grad_(True)
        self._norm.requires_grad_(True)
        self._config = policy.config

    def _become(self, layers: nn.ModuleList, norm: nn.Module, embedding: nn.Module, first: int) -> None:
        body, config = body_of(self.policy), copy.deepcopy(self._config)
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[first : first + len(layers)]
        body.layers, body.norm, body.embed_tokens = layers, norm, embedding
        body.config = self.policy.config = config

    def prepare(self, pairs: dict[int, PairTokens], file: Path | None = None) -> None:
        """Compute what the frozen layers say of ``pairs`` {row: tokens}, in float32, once; ``file`` keeps it."""
        if self.full:
            return
        lengths = [len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs.values()]
        self._starts = dict(zip(pairs, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        if file is not None and file.exists():
            self._table.rows_ND = torch.load(file, weights_only=True, mmap=True)
        else:
            self._table.rows_ND = self._hidden_of(list(pairs.values()))
            if file is not None:
                unfinished = file.with_suffix(f".{os.getpid()}")
                torch.save(self._table.rows_ND, unfinished)
                unfinished.replace(file)
        self._become(self._upper, self._norm, self._table, len(self._lower))

    @torch.no_grad()
    def _hidden_of(self, pairs: Sequence[PairTokens]) -> Tensor:
        """[N, D] of every position, not only those that predict."""
        self._become(self._lower, nn.Identity(), self._embedding, 0)
        pieces = []
        for start in range(0, len(pairs), PREPARED_TOGETHER):
            batch = _laid_out(pairs[start : start + PREPARED_TOGETHER])
            every = replace(batch, logit_index_T=torch.arange(batch.num_tokens))
            pieces.append(response_hidden(self.policy, every))
        return torch.cat(pieces)

    def batch(self, rows: Sequence[int], tokens: Sequence[PairTokens]) -> PairBatch:
        batch = _laid_out(tokens)
        if self.full:
            return batch
        index = [torch.arange(self._starts[r], self._starts[r] + n) for r, n in zip(rows, batch.positions, strict=True)]
        return replace(batch, input_ids_BL=torch.cat(index)[None])

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]


def _laid_out(tokens: Sequence[PairTokens]) -> PairBatch:
    return collate_pairs(tokens, shared_prompt=True, end_to_end=True)
