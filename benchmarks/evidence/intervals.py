"""Differences between methods, paired over seeds and pairs: a seed gives all methods the same training pairs in the same order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mrpo_scale.compare.results import cohens_d

RESAMPLES = 4000
#: A difference of accuracies within so much of 0 on both sides is too small to matter.
NEGLIGIBLE = 0.01
SEEDS = 5  #: that an answer needs


@dataclass(frozen=True)
class Difference:
    """A method's mean, of accuracy or of margins, minus that of another, on the seeds that both have."""

    mean: float
    low: float
    high: float
    cohens_d: float | None  #: of the values per seed, pooled deviation
    paired_d: float | None  #: mean over deviation of the differences per seed
    seeds: int

    @property
    def answer(self) -> str:
        """yes, no, undecided, too few seeds; see the plan."""
        if self.seeds < SEEDS:
            return "too few seeds"
        if self.low > 0:
            return "yes"
        if self.high < 0 or (self.low >= -NEGLIGIBLE and self.high <= NEGLIGIBLE):
            return "no"
        return "undecided"


def paired_difference(right_SN: np.ndarray, other_SN: np.ndarray, seed: int = 0) -> Difference:
    """Of two methods' values, right or not, or margins, of the same N pairs with the same S seeds; 95% interval of the
    bootstrap whose resamples draw pairs and seeds."""
    change_SN = right_SN.astype(float) - other_SN.astype(float)
    seeds, pairs = change_SN.shape
    draw = np.random.default_rng(seed)
    pairs_BN = draw.multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)
    seeds_BS = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    means_B = ((pairs_BN @ change_SN.T) * seeds_BS).sum(1) / (pairs * seeds)
    low, high = np.quantile(means_B, [0.025, 0.975])
    per_seed = change_SN.mean(1).tolist()
    spread = statistics.stdev(per_seed) if seeds > 1 else 0.0
    return Difference(
        mean=float(change_SN.mean()),
        low=float(low),
        high=float(high),
        cohens_d=cohens_d(right_SN.mean(1).tolist(), other_SN.mean(1).tolist()),
        paired_d=statistics.mean(per_seed) / spread if spread > 0 else None,
        seeds=seeds,
    )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def share_interval(right: int, pairs: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's)."""
    z = 1.959963984540054
    share, extra = right / pairs, z * z / pairs
    middle, half = share + extra / 2, z * ((share * (1 - share) + extra / 4) / pairs) ** 0.5
    return (middle - half) / (1 + extra), (middle + half) / (1 + extra)
