"""A window's pairs dealt over ranks and micro-batches by length, so that no rank waits for another.

Under ZeRO-3 every micro-batch ends together on all ranks: a step takes the sum, over its micro-batches, of what the slowest rank
needs for each. So pairs of like length are computed at the same time. The window's pairs are sorted, longest first, and cut into
*layers* of one pair for each rank; consecutive layers make a micro-batch. Inside it each layer's longest pair goes to the rank that
has least of it so far, and the heaviest share goes to the rank that has least of the window so far. Every rank gets equally many
pairs. The longest micro-batch is the first: what does not fit fails at once, and while its activations are held no gradients have
been added up yet.

The loss is a sum over the window, so who computes which pair changes nothing but the order of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowShape:
    """What a window's pairs are dealt into: of each rank ``accumulation`` batches of the loader, of ``pairs`` pairs each.

    Those are the policy's micro-batches, too, unless ``max_tokens`` is set: then a rank's share is cut anew, at the same places on
    all ranks, into as few micro-batches as keep each within so many padded tokens (a pair that is longer gets one for itself).
    """

    ranks: int
    pairs: int
    accumulation: int = 1
    max_tokens: int | None = None
    padded: bool = False  #: how :func:`cut_by_tokens` counts

    @property
    def size(self) -> int:
        """Pairs of the window over all ranks."""
        return self.ranks * self.pairs * self.accumulation


@dataclass(frozen=True)
class Dealt:
    """Which of a window's N pairs each rank takes, micro-batch after micro-batch."""

    pairs_RL: np.ndarray  #: [ranks, layers] indices of pairs
    micro_batches: Sequence[slice]  #: of layers

    def loads(self, lengths_N: np.ndarray) -> np.ndarray:
        """[ranks, micro-batches] sums of ``lengths_N``."""
        lengths_RL = lengths_N[self.pairs_RL]
        return np.stack([lengths_RL[:, part].sum(1) for part in self.micro_batches], axis=1)


def deal(lengths_N: np.ndarray, shape: WindowShape) -> Dealt:
    """Deal N = ``shape.size`` pairs of these lengths. The same lengths are dealt the same way everywhere."""
    layers_LR = np.argsort(-lengths_N, kind="stable").reshape(-1, shape.ranks)
    if shape.max_tokens is None:
        micro_batches = [slice(i, i + shape.pairs) for i in range(0, len(layers_LR), shape.pairs)]
    else:
        # By each layer's longest pair: no rank has more.
        micro_batches = cut_by_tokens(lengths_N[layers_LR[:, 0]].tolist(), shape.max_tokens, padded=shape.padded)
    pairs_RL = np.empty(layers_LR.shape[::-1], dtype=np.int64)
    total_R = np.zeros(shape.ranks)
    for part in micro_batches:
        shares_RL, load_R = _shares(layers_LR[part], lengths_N)
        least_first, heaviest_first = total_R.argsort(kind="stable"), (-load_R).argsort(kind="stable")
        pairs_RL[least_first, part] = shares_RL[heaviest_first]
        total_R[least_first] += load_R[heaviest_first]
    return Dealt(pairs_RL, micro_batches)


def _shares(layers_LR: np.ndarray, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One pair of each layer for each share, [R, L], and the sum of each share's lengths."""
    shares_RL = np.empty(layers_LR.shape[::-1], dtype=np.int64)
    load_R = np.zeros(layers_LR.shape[1])
    for i, layer_R in enumerate(layers_LR):
        least_first = load_R.argsort(kind="stable")
        shares_RL[least_first, i] = layer_R
        load_R[least_first] += lengths_N[layer_R]
    return shares_RL, load_R


def deal_to_ranks(lengths_N: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Indices of any number of pairs for each rank, longest first: as :func:`deal` of one micro-batch, and the pairs that are over,
    the shortest, to the first ranks. For scoring, where ranks meet in every forward."""
    order = np.argsort(-lengths_N, kind="stable")
    whole = len(order) // ranks * ranks
    shares_RL, _ = _shares(order[:whole].reshape(-1, ranks), lengths_N)
    return [np.append(share_L, order[whole + rank : whole + rank + 1]) for rank, share_L in enumerate(shares_RL)]


def efficiency(loads_RM: np.ndarray) -> float:
    """Of ranks that wait for the slowest in each micro-batch, the part of the time in which the mean rank works."""
    return float(loads_RM.mean(0).sum() / loads_RM.max(0).sum())


def pair_lengths(lengths_N3: np.ndarray, *, shared_prompt: bool, end_to_end: bool) -> np.ndarray:
    """[N] positions that a model computes for a pair, of the tokens of prompt, chosen and rejected: the prompt once where one
    forward shares it, else twice; two rows that are padded to each other where they do not lie end to end."""
    prompt_N, responses_N2 = lengths_N3[:, 0], lengths_N3[:, 1:]
    if shared_prompt:
        return prompt_N + responses_N2.sum(1)
    if end_to_end:
        return 2 * prompt_N + responses_N2.sum(1)
    return 2 * (prompt_N + responses_N2.max(1))


def cut_by_tokens(lengths: Sequence[int], most: int, *, padded: bool) -> list[slice]:
    """Consecutive parts of pairs of these lengths, each of at most ``most`` positions or of one pair.

    Args:
        padded: to the longest pair of their part. Shared-prompt pairs are packed into rows and cost their own length.
    """
    if not lengths:
        return []
    starts, tokens, widest = [0], 0, 0
    for i, length in enumerate(lengths):
        widest = max(widest, length)
        size = widest * (i + 1 - starts[-1]) if padded else tokens + length
        if size > most and i > starts[-1]:
            starts.append(i)
            tokens, widest = 0, length
        tokens += length
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]
