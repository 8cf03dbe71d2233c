"""How much work a step brings to each model: drawn windows for time, the longest pairs for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mrpo_scale.data.dealing import WindowShape, cut_by_tokens, deal, deal_to_ranks, efficiency, pair_lengths
from mrpo_scale.logps.flops import NO_WORK, Work, over_ranks, total_work, work_of_lengths
from mrpo_scale.planner.model_size import ModelSize

STEPS, RANKS = 4, 16  #: windows that are drawn for an estimate, and of how many ranks at most the mean is taken


@dataclass(frozen=True)
class Share:
    """One rank's part of a step for one model, forward by forward, and what the average rank has."""

    forwards: tuple[Work, ...]  #: of the busiest rank, for which the others wait
    mean: Work
    efficiency: float  #: see dealing.py: the part of the time in which the mean rank works

    @property
    def total(self) -> Work:
        return total_work(self.forwards)


@dataclass(frozen=True)
class Workload:
    """The pairs of a training set as every model sees them.

    Args:
        lengths_NV3: tokens of prompt, chosen and rejected in each model's tokenization, the policy's first.
        scored_NV2: those of chosen and rejected that are scored; None: all.
    """

    lengths_NV3: np.ndarray
    seed: int = 0
    scored_NV2: np.ndarray | None = None
    _shares: dict[tuple[object, ...], Share] = field(default_factory=dict, repr=False, compare=False)
    _largest: dict[tuple[object, ...], tuple[Work, ...]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def mean_lengths(self) -> np.ndarray:
        """[V] tokens of a pair, all three texts."""
        return self.lengths_NV3.sum(-1).mean(0)

    @cached_property
    def _counts(self) -> np.ndarray:
        """[N, V, 4]: tokens of prompt, chosen and rejected, and how many of both responses are scored."""
        scored_NV2 = self.lengths_NV3[..., 1:] if self.scored_NV2 is None else self.scored_NV2
        return np.concatenate([self.lengths_NV3, scored_NV2.sum(-1, keepdims=True)], axis=-1)

    def policy(
        self,
        size: ModelSize,
        *,
        micro_batch: int,
        accumulation: int,
        ranks: int,
        max_tokens: int | None = None,
        sequence: int = 1,
    ) -> Share:
        """The policy's micro-batches, dealt over the ranks as a run deals them: of each, the slowest rank's.

        Args:
            sequence: ranks of a group that computes the micro-batches of its ranks one after the other, a part of the tokens each.
        """
        most = None if max_tokens is None else max_tokens * sequence
        shape = WindowShape(ranks, micro_batch, accumulation, most, padded=not size.end_to_end)

        def window(rows: np.ndarray) -> Share:
            counts_N4 = self._counts[rows, 0]
            lengths_N = _lengths(counts_N4, size)
            found = deal(lengths_N, shape)
            loads_GSM = found.loads(lengths_N).reshape(
                -1, sequence, len(found.micro_batches)
            )  # S ranks in each of G groups
            slowest = [
                (int(group) * sequence + rank, part)
                for part, groups_S in zip(found.micro_batches, loads_GSM.argmax(0).T, strict=True)
                for rank, group in enumerate(groups_S)
            ]
            some = [
                _work(counts_N4[found.pairs_RL[rank, part]], size)
                for rank in _some(ranks)
                for part in found.micro_batches
            ]
            return Share(
                tuple(
                    over_ranks(_work(counts_N4[found.pairs_RL[rank, part]], size), sequence) for rank, part in slowest
                ),
                _mean(some, len(_some(ranks))),
                efficiency(loads_GSM.reshape(len(loads_GSM), -1)),
            )

        return self._share(("policy", size.name, shape, sequence), window, shape.size)

    def reference(
        self, size: ModelSize, tokenization: int, *, pairs: int, ranks: int, tokens_per_forward: int
    ) -> Share:
        """A reference's forwards over a rank's share of a window of ``pairs``, which are dealt over its ranks."""

        def window(rows: np.ndarray) -> Share:
            counts_N4 = self._counts[rows, tokenization]
            lengths_N = counts_N4[:, :3].sum(1)
            shares = deal_to_ranks(lengths_N, ranks)
            loads_R = np.array([lengths_N[share].sum() for share in shares])

            def forwards(rank: int) -> tuple[Work, ...]:
                return _reference_forwards(counts_N4[shares[rank]], size, tokens_per_forward)

            mean = _mean([work for rank in _some(ranks) for work in forwards(rank)], len(_some(ranks)))
            return Share(forwards(int(loads_R.argmax())), mean, efficiency(loads_R[:, None]))

        key = ("reference", size.name, tokenization, pairs, ranks, tokens_per_forward)
        return self._share(key, window, pairs)

    def largest_micro_batch(self, size: ModelSize, micro_batch: int, max_tokens: int | None = None) -> Work:
        """The longest pairs, which meet sooner or later: what activations need room for."""
        key = ("largest", size.name, micro_batch, max_tokens)
        if key not in self._largest:
            counts_N4 = self._sorted(self._counts[:, 0], size)
            if max_tokens is None:
                self._largest[key] = (_work(np.resize(counts_N4[:micro_batch], (micro_batch, 4)), size),)
            else:
                parts = cut_by_tokens(_lengths(counts_N4, size).tolist(), max_tokens, padded=not size.end_to_end)
                self._largest[key] = (max(_work(counts_N4[part], size) for part in parts),)
        return self._largest[key][0]

    def largest_scoring(
        self, size: ModelSize, tokenization: int, pairs: int, tokens_per_forward: int
    ) -> tuple[Work, Work]:
        """(largest forward, all of the window) of a reference that scores the longest ``pairs``."""
        key = ("scoring", size.name, tokenization, pairs, tokens_per_forward)
        if key not in self._largest:
            counts_N4 = self._sorted(self._counts[:, tokenization], size)
            self._largest[key] = _reference_forwards(np.resize(counts_N4[:pairs], (pairs, 4)), size, tokens_per_forward)
        return max(self._largest[key]), total_work(self._largest[key])

    def _share(self, key: tuple[object, ...], window: Callable[[np.ndarray], Share], pairs: int) -> Share:
        """Of the drawn windows the one in the middle, and the mean of all."""
        if key not in self._shares:
            random = np.random.default_rng(self.seed)
            drawn = [window(self._draw(random, pairs)) for _ in range(STEPS)]
            middle = sorted(drawn, key=lambda share: share.total.positions)[(STEPS - 1) // 2]
            mean = _mean([share.mean for share in drawn], STEPS)
            self._shares[key] = Share(middle.forwards, mean, float(np.mean([share.efficiency for share in drawn])))
        return self._shares[key]

    def _draw(self, random: np.random.Generator, pairs: int) -> np.ndarray:
        total = len(self.lengths_NV3)
        return random.choice(total, pairs, replace=pairs > total)

    @staticmethod
    def _sorted(counts_P4: np.ndarray, size: ModelSize) -> np.ndarray:
        """Longest first."""
        return counts_P4[np.argsort(-_lengths(counts_P4, size), kind="stable")]


def _lengths(counts_P4: np.ndarray, size: ModelSize) -> np.ndarray:
    return pair_lengths(counts_P4[:, :3], shared_prompt=size.shared_prompt, end_to_end=size.end_to_end)


def _some(ranks: int) -> range:
    """Ranks whose mean stands for that of all."""
    return range(0, ranks, -(-ranks // RANKS))


def _mean(works: Sequence[Work], count: int) -> Work:
    return Work(*(round(total / count) for total in total_work(works)))


def _work(counts_P4: np.ndarray, size: ModelSize) -> Work:
    return work_of_lengths(
        counts_P4[:, :3],
        scored=int(counts_P4[:, 3].sum()),
        shared_prompt=size.shared_prompt,
        end_to_end=size.end_to_end,
        attn_implementation=size.costs.attn_implementation,
    )


def _reference_forwards(counts_P4: np.ndarray, size: ModelSize, tokens_per_forward: int) -> tuple[Work, ...]:
    counts_P4 = Workload._sorted(counts_P4, size)
    # As references cut them: by rows that are padded to each other, unless the prompt is shared.
    lengths = pair_lengths(counts_P4[:, :3], shared_prompt=size.shared_prompt, end_to_end=False).tolist()
    parts = cut_by_tokens(lengths, tokens_per_forward, padded=not size.shared_prompt)
    return tuple(_work(counts_P4[part], size) for part in parts) or (NO_WORK,)
