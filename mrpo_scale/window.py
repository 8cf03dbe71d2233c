"""The pairs of one optimizer step: which ones, with what weight, scored together.

A *global window* is every pair that one optimizer step trains on, over all ranks and micro-batches. The list of rows is padded to
whole windows with filler rows of weight 0, so every rank has the same number of equally large micro-batches (no rank waits in a
collective that another never enters) and every real row is trained exactly once. The loss is the weighted sum over the window
divided by the number of real pairs in it, whatever the split into ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mrpo_scale.pair_batch import PairBatch, collate_pairs, segment_length
from mrpo_scale.tokenization import PairTokens


@dataclass(frozen=True)
class PairExample:
    """A row on its way to the models: its tokens for each distinct text view, policy first."""

    row: int
    weight: float  #: 1, or 0 for a filler
    tokens: tuple[PairTokens, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What one policy forward takes. Not a Mapping, so that nothing casts or moves its tensors behind our back."""

    pairs: PairBatch
    rows: tuple[int, ...]
    weight_P: Tensor
    references: CombinedReferences

    @property
    def num_pair_tokens(self) -> int:
        """Positions of pairs that count: neither padding nor a filler, so that no split into batches changes their sum."""
        segment = self.pairs.segment_BL[self.pairs.segment_BL >= 0].long()
        pair = segment if self.pairs.shared_prompt else segment // 2
        return int((self.weight_P[pair] > 0).sum())


class TokenizedPairs(Protocol):
    """The part of tokenization.PairDataset that a window needs."""

    @property
    def row_keys(self) -> np.ndarray: ...  # [N] S16
    @property
    def lengths(self) -> np.ndarray: ...  # [N, texts, 3]
    def __len__(self) -> int: ...
    def tokens(self, row: int) -> tuple[PairTokens, ...]: ...


class WeightedPairs(Dataset[PairExample]):
    """Rows of a tokenized set. Index n + row is the filler copy of that row, with weight 0."""

    def __init__(self, pairs: TokenizedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PairExample:
        row = index % len(self.pairs)
        return PairExample(row=row, weight=float(index < len(self.pairs)), tokens=self.pairs.tokens(row))


class WindowSampler(Sampler[int]):
    """Row indices of one epoch in order, padded with fillers to a multiple of ``window`` (pairs per optimizer step, all ranks).

    The order depends on (seed, epoch) only, so neither the number of ranks nor the micro-batch size changes which pairs share a
    step. ``drop_last`` leaves the rows of the last, unfilled window out instead of padding it.
    """

    def __init__(self, num_rows: int, window: int, *, shuffle: bool, seed: int, drop_last: bool = False) -> None:
        self.num_rows, self.window, self.shuffle, self.seed, self.drop_last = num_rows, window, shuffle, seed, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        windows = self.num_rows / self.window
        return self.window * (int(windows) if self.drop_last else -int(-windows // 1))

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        else:
            order = list(range(self.num_rows))
        fillers = [self.num_rows + order[0]] * max(0, len(self) - self.num_rows)
        yield from (order + fillers)[: len(self)]


def sorted_by_length(pairs: Sequence[PairTokens], shared_prompt: bool) -> list[int]:
    """Indices of ``pairs``, longest first, so that neighbours need little padding. Stable: the same window, the same batches."""
    return sorted(range(len(pairs)), key=lambda i: -segment_length(pairs[i], shared_prompt))


def policy_batches(
    examples: Sequence[PairExample],
    references: CombinedReferences,
    num_batches: int,
    *,
    shared_prompt: bool,
    end_to_end: bool = False,
    pad_token_id: int,
) -> list[MicroBatch]:
    """This rank's share of a window, with its ``references``, as ``num_batches`` equally large micro-batches of pairs of similar
    length."""
    order = sorted_by_length([e.tokens[0] for e in examples], shared_prompt)
    size = len(examples) // num_batches
    device = references.virtual_logps_P2.device
    batches = []
    for start in range(0, num_batches * size, size):
        chosen = order[start : start + size]
        pairs = collate_pairs(
            [examples[i].tokens[0] for i in chosen],
            shared_prompt=shared_prompt,
            end_to_end=end_to_end,
            pad_token_id=pad_token_id,
        )
        batches.append(
            MicroBatch(
                pairs=pairs.to(device),
                rows=tuple(examples[i].row for i in chosen),
                weight_P=torch.tensor([examples[i].weight for i in chosen], device=device),
                references=references[torch.tensor(chosen, device=device)],
            )
        )
    return batches
