"""The pairs of one optimizer step: which ones, with what weight, and which rank computes them when.

A *global window* is every pair that one optimizer step trains on, over all ranks and micro-batches. The list of rows is padded to
whole windows with filler rows of weight 0, so every rank has the same number of equally large micro-batches (no rank waits in a
collective that another never enters) and every real row is trained exactly once. The loss is the weighted sum over the window
divided by the number of real pairs in it, whatever the split into ranks and micro-batches.

Chance decides which pairs share a window, length decides where in it they stand (dealing.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mrpo_scale.data.dealing import Dealt, WindowShape, deal
from mrpo_scale.data.tokenization import PairTokens


class Draw(NamedTuple):
    """A row of the set as the sampler names it."""

    row: int
    filler: bool = False
    micro_batch: int = 0  #: of the window, the same number on all ranks


@dataclass(frozen=True)
class PairExample:
    """A row on its way to the models: its tokens for each distinct ModelText, policy first."""

    row: int
    weight: float  #: 1, or 0 for a filler
    tokens: tuple[PairTokens, ...]
    micro_batch: int = 0  #: of the window, in which the policy computes it


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
    """Rows of a tokenized set, by :class:`Draw` or by number."""

    def __init__(self, pairs: TokenizedPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Draw | int) -> PairExample:
        draw = index if isinstance(index, Draw) else Draw(index)
        return PairExample(draw.row, float(not draw.filler), self.pairs.tokens(draw.row), draw.micro_batch)


class WindowSampler(Sampler[Draw]):
    """Rows of one epoch window after window, each dealt over ranks and micro-batches, in the order in which a loader hands batches
    of ``shape.pairs`` to the ranks in turn. Copies of weight 0 of its shortest pair fill the last window.

    Which pairs share a step depends on (seed, epoch) and the size of a window only, neither on the number of ranks nor on the size
    of a micro-batch. ``drop_last`` leaves the rows of the last, unfilled window out instead of filling it.

    Args:
        lengths_N: tokens that the policy computes for each row.
    """

    def __init__(
        self, lengths_N: np.ndarray, shape: WindowShape, *, shuffle: bool, seed: int, drop_last: bool = False
    ) -> None:
        self.lengths_N, self.shape, self.shuffle, self.seed, self.drop_last = lengths_N, shape, shuffle, seed, drop_last
        self.epoch = 0
        self.skipped = (
            0  #: windows of the epoch that were trained before; whoever resumes takes as many rows and drops them
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, over = divmod(len(self.lengths_N), self.shape.size)
        return self.shape.size * (whole + (over > 0 and not self.drop_last))

    def __iter__(self) -> Iterator[Draw]:
        # Not dealt: half an epoch of ten million rows would take minutes. No set has a row of this number.
        yield from repeat(Draw(len(self.lengths_N)), self.skipped * self.shape.size)
        for window in self.windows(self.skipped):
            yield from self.arranged(window, self.deal(window))

    def windows(self, first: int = 0) -> Iterator[list[Draw]]:
        """The pairs of each window from number ``first`` on, in the order in which chance drew them."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.lengths_N), generator=generator).numpy()
        else:
            order = np.arange(len(self.lengths_N))
        for start in range(first * self.shape.size, len(self), self.shape.size):
            rows = order[start : start + self.shape.size].tolist()
            filler = Draw(min(rows, key=lambda row: self.lengths_N[row]), filler=True)
            yield [Draw(row) for row in rows] + [filler] * (self.shape.size - len(rows))

    def deal(self, window: Sequence[Draw]) -> Dealt:
        return deal(self.lengths_N[[draw.row for draw in window]], self.shape)

    def arranged(self, window: Sequence[Draw], dealt: Dealt) -> list[Draw]:
        """``window`` as the loader is to read it, so that every rank gets what was dealt to it."""
        shape = self.shape
        number_L = np.repeat(np.arange(len(dealt.micro_batches)), [s.stop - s.start for s in dealt.micro_batches])
        # Rank after rank takes a batch, then each its next one.
        place_ARP = dealt.pairs_RL.reshape(shape.ranks, shape.accumulation, shape.pairs).swapaxes(0, 1)
        number_ARP = np.broadcast_to(number_L.reshape(-1, 1, shape.pairs), place_ARP.shape)
        return [
            window[place]._replace(micro_batch=number)
            for place, number in zip(place_ARP.flat, number_ARP.ravel().tolist(), strict=True)
        ]


def held_out_sampler(pairs: TokenizedPairs, ranks: int, batch: int) -> WindowSampler:
    """All rows once as one window, the longest first, for sets whose order changes nothing: they are measured, not trained."""
    shape = WindowShape(ranks, batch, -(-len(pairs) // (ranks * batch)))
    return WindowSampler(pairs.lengths[:, 0].sum(-1), shape, shuffle=False, seed=0)
