"""A window's pairs dealt over ranks and micro-batches by length, so that no rank waits for another.

Under ZeRO-3 every micro-batch ends together on all ranks: a step takes the sum, over its micro-batches, of what the slowest rank
needs for each. So shares of like length are computed at the same time. The longest pairs that are left begin a micro-batch, one on
each rank; the next longest follow, the longest of them where least is so far, and last every rank gets, of all pairs that are left,
the one that brings it level with the others (where pairs lie end to end: in padded rows a short pair beside a long one saves
nothing). The heaviest share of a micro-batch goes to the rank that has least of the window. Every rank gets equally many pairs of
each micro-batch. The longest come first: what does not fit fails at once, and while the largest activations are held no gradients
have been added up yet.

The loss is a sum over the window, so who computes which pair changes nothing but the order of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WindowShape:
    """What a window's pairs are dealt into: of each rank ``accumulation`` batches of the loader, of ``pairs`` pairs each.

    Those are the policy's micro-batches, too, unless ``max_tokens`` is set: then every micro-batch takes as many pairs as keep all
    ranks within so many positions, at least one. There are as many micro-batches on every rank, of equally many pairs.

    ``padded``: pairs lie in rows as long as the longest of their batch, so each counts as long as that one, and a micro-batch is
    made of neighbours in length to its end.
    """

    ranks: int
    pairs: int
    accumulation: int = 1
    max_tokens: int | None = None
    padded: bool = False

    @property
    def size(self) -> int:
        """Pairs of the window over all ranks."""
        return self.ranks * self.pairs * self.accumulation

    def takes(self, count: int, load: float, longest: float) -> bool:
        """Whether a rank can have so many pairs in a micro-batch, of ``load`` positions in all, ``longest`` in one."""
        if self.max_tokens is None:
            return count <= self.pairs
        return (count * longest if self.padded else load) <= self.max_tokens


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
    rest_n = np.argsort(-lengths_N, kind="stable")
    pairs_RL = np.empty((shape.ranks, len(rest_n) // shape.ranks), dtype=np.int64)
    total_R = np.zeros(shape.ranks)
    parts: list[slice] = []
    while len(rest_n):
        shares_Rl, rest_n = _micro_batch(rest_n, lengths_N, shape)
        load_R = lengths_N[shares_Rl].sum(1)
        least_first, heaviest_first = total_R.argsort(kind="stable"), (-load_R).argsort(kind="stable")
        start = parts[-1].stop if parts else 0
        parts.append(slice(start, start + shares_Rl.shape[1]))
        pairs_RL[least_first, parts[-1]] = shares_Rl[heaviest_first]
        total_R[least_first] += load_R[heaviest_first]
    return Dealt(pairs_RL, parts)


def _micro_batch(rest_n: np.ndarray, lengths_N: np.ndarray, shape: WindowShape) -> tuple[np.ndarray, np.ndarray]:
    """The next micro-batch of the pairs that are left, longest first: pairs for each of R shares, [R, l], and what is left then."""
    ranks = shape.ranks
    longest = lengths_N[rest_n[0]]
    layers, load_R, rest_n = [rest_n[:ranks]], lengths_N[rest_n[:ranks]], rest_n[ranks:]
    found = layers, rest_n
    while len(rest_n):
        least_first = load_R.argsort(kind="stable")
        last_R, next_R = np.empty_like(least_first), np.empty_like(least_first)
        taken_R = np.arange(ranks) if shape.padded else _levelling(lengths_N[rest_n], load_R[least_first])
        last_R[least_first], next_R[least_first] = rest_n[taken_R], rest_n[:ranks]
        if not shape.takes(len(layers) + 1, (load_R + lengths_N[last_R]).max(), longest):
            break
        found = [*layers, last_R], np.delete(rest_n, taken_R)
        layers.append(next_R)  # should it not be the last
        load_R, rest_n = load_R + lengths_N[next_R], rest_n[ranks:]
    layers, rest_n = found
    return np.stack(layers, axis=1), rest_n


def _levelling(lengths_n: np.ndarray, load_R: np.ndarray) -> np.ndarray:
    """Places [R], ascending, of pairs sorted longest first: for each load, which ascend, the pair that brings it to what the least
    and the longest make together, or comes next to that."""
    wanted_R, rank_R = load_R[0] + lengths_n[0] - load_R, np.arange(len(load_R))
    place_R = np.searchsorted(-lengths_n, -wanted_R)
    place_R = np.maximum.accumulate(place_R - rank_R) + rank_R  # none twice
    return np.minimum(place_R, len(lengths_n) - len(load_R) + rank_R)


def deal_to_ranks(lengths_N: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Indices of any number of pairs for each rank, longest first, dealt as one micro-batch; the pairs that are over, the shortest,
    go to the first ranks. For scoring, where ranks meet in every forward."""
    order_N = np.argsort(-lengths_N, kind="stable")
    each = len(order_N) // ranks
    dealt_N, over = order_N[: each * ranks], order_N[each * ranks :]
    pairs_RL = dealt_N[deal(lengths_N[dealt_N], WindowShape(ranks, each)).pairs_RL]
    shares = [np.append(pairs_L, over[rank : rank + 1]) for rank, pairs_L in enumerate(pairs_RL)]
    return [share[np.argsort(-lengths_N[share], kind="stable")] for share in shares]


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
