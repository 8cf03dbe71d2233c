"""The pairs of one optimizer step: which ones, with what weight, scored together.

A *global window* is every pair that one optimizer step trains on, over all ranks and micro-batches. The list of rows is padded to
whole windows with filler rows of weight 0, so every rank has the same number of equally large micro-batches (no rank waits in a
collective that another never enters) and every real row is trained exactly once. The loss is the weighted sum over the window
divided by the number of real pairs in it, whatever the split into ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mrpo_scale.data.tokenization import PairTokens


@dataclass(frozen=True)
class PairExample:
    """A row on its way to the models: its tokens for each distinct ModelText, policy first."""

    row: int
    weight: float  #: 1, or 0 for a filler
    tokens: tuple[PairTokens, ...]


class TokenizedPairs(Protocol):
    """The part of pair_dataset.PairDataset that a window needs."""

    @property
    def row_keys(self) -> np.ndarray: ...  # [N] S16
    @property
    def lengths(self) -> np.ndarray: ...  # [N, texts, 3]
    @property
    def scored(self) -> np.ndarray: ...  # [N, texts, 2]
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
