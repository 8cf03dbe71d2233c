"""How much work a step brings to each model: drawn windows for time, the longest pairs for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mrpo_scale.logps.flops import NO_WORK, Work, total_work, work_of_lengths
from mrpo_scale.planner.model_size import ModelSize
from mrpo_scale.references.live import cut_by_tokens

STEPS, RANKS = 4, 16  #: windows that are drawn for an estimate, and at most how many ranks of each


@dataclass(frozen=True)
class Share:
    """One rank's part of a step for one model, forward by forward, and what the average rank has."""

    forwards: tuple[Work, ...]  #: of the busiest rank, for which the others wait
    mean: Work

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
    def _counts(self) -> np.ndarray:
        """[N, V, 4]: tokens of prompt, chosen and rejected, and how many of both responses are scored."""
        scored_NV2 = self.lengths_NV3[..., 1:] if self.scored_NV2 is None else self.scored_NV2
        return np.concatenate([self.lengths_NV3, scored_NV2.sum(-1, keepdims=True)], axis=-1)

    def policy(self, size: ModelSize, *, micro_batch: int, accumulation: int, ranks: int) -> Share:
        """The policy's micro-batches: pairs of like length, as window.py makes them."""

        def forwards(rows: np.ndarray) -> tuple[Work, ...]:
            counts_P4 = self._sorted(self._counts[rows, 0], size.shared_prompt)
            return tuple(
                _work(counts_P4[i : i + micro_batch], size) for i in range(0, micro_batch * accumulation, micro_batch)
            )

        key = ("policy", size.name, micro_batch, accumulation, min(ranks, RANKS))
        return self._share(key, forwards, micro_batch * accumulation, ranks)

    def reference(
        self, size: ModelSize, tokenization: int, *, pairs: int, ranks: int, tokens_per_forward: int
    ) -> Share:
        """A reference's forwards over a rank's ``pairs`` of a window."""

        def forwards(rows: np.ndarray) -> tuple[Work, ...]:
            return _reference_forwards(self._counts[rows, tokenization], size, tokens_per_forward)

        key = ("reference", size.name, tokenization, pairs, min(ranks, RANKS), tokens_per_forward)
        return self._share(key, forwards, pairs, ranks)

    def largest_micro_batch(self, size: ModelSize, micro_batch: int) -> Work:
        """The longest pairs, which meet sooner or later: what activations need room for."""
        key = ("largest", size.name, micro_batch)
        if key not in self._largest:
            counts_N4 = self._sorted(self._counts[:, 0], size.shared_prompt)
            self._largest[key] = (_work(np.resize(counts_N4[:micro_batch], (micro_batch, 4)), size),)
        return self._largest[key][0]

    def largest_scoring(
        self, size: ModelSize, tokenization: int, pairs: int, tokens_per_forward: int
    ) -> tuple[Work, Work]:
        """(largest forward, all of the window) of a reference that scores the longest ``pairs``."""
        key = ("scoring", size.name, tokenization, pairs, tokens_per_forward)
        if key not in self._largest:
            counts_N4 = self._sorted(self._counts[:, tokenization], size.shared_prompt)
            self._largest[key] = _reference_forwards(np.resize(counts_N4[:pairs], (pairs, 4)), size, tokens_per_forward)
        return max(self._largest[key]), total_work(self._largest[key])

    def _share(
        self, key: tuple[object, ...], forwards: Callable[[np.ndarray], tuple[Work, ...]], pairs: int, ranks: int
    ) -> Share:
        if key not in self._shares:
            random = np.random.default_rng(self.seed)
            busiest: list[tuple[Work, ...]] = []
            everything: list[Work] = []
            for _ in range(STEPS):
                drawn = [forwards(self._draw(random, pairs)) for _ in range(min(ranks, RANKS))]
                busiest.append(max(drawn, key=lambda works: total_work(works).positions))
                everything += [total_work(works) for works in drawn]
            mean = Work(*(round(total / len(everything)) for total in total_work(everything)))
            # Of the drawn steps the one whose busiest rank is in the middle.
            middle = sorted(busiest, key=lambda works: total_work(works).positions)[(STEPS - 1) // 2]
            self._shares[key] = Share(middle, mean)
        return self._shares[key]

    def _draw(self, random: np.random.Generator, pairs: int) -> np.ndarray:
        total = len(self.lengths_NV3)
        return random.choice(total, pairs, replace=pairs > total)

    @staticmethod
    def _sorted(counts_P4: np.ndarray, shared_prompt: bool) -> np.ndarray:
        """Longest segments first."""
        return counts_P4[np.argsort(-_segments(counts_P4, shared_prompt), kind="stable")]


def _segments(counts_P4: np.ndarray, shared_prompt: bool) -> np.ndarray:
    """As :func:`~mrpo_scale.logps.pair_batch.segment_length`."""
    responses = counts_P4[:, 1:3]
    return counts_P4[:, 0] + (responses.sum(1) if shared_prompt else responses.max(1))


def _work(counts_P4: np.ndarray, size: ModelSize) -> Work:
    return work_of_lengths(
        counts_P4[:, :3],
        scored=int(counts_P4[:, 3].sum()),
        shared_prompt=size.shared_prompt,
        end_to_end=size.end_to_end,
        attn_implementation=size.costs.attn_implementation,
    )


def _reference_forwards(counts_P4: np.ndarray, size: ModelSize, tokens_per_forward: int) -> tuple[Work, ...]:
    counts_P4 = Workload._sorted(counts_P4, size.shared_prompt)
    segments: Sequence[int] = _segments(counts_P4, size.shared_prompt).tolist()
    parts = cut_by_tokens(segments, size.shared_prompt, tokens_per_forward)
    return tuple(_work(counts_P4[part], size) for part in parts) or (NO_WORK,)
