"""From finished runs to the cells of a paper's table: what each run measures on which pairs, bold and italic."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from mrpo_scale.compare.results import cohens_d
from mrpo_scale.objective import Objective, combine, loss_against
from mrpo_scale.training.held_out import HeldOutScores

#: Of Cohen's d, from which the paper calls the best method of a column different from the others.
EFFECT_SIZE = 0.5


@dataclass(frozen=True)
class Measured:
    """Of one policy on some held-out pairs."""

    reward_accuracy: float  #: share of pairs whose chosen response has the higher reward
    reward_margin: float  #: mean reward of chosen minus rejected
    accuracy: float  #: share of pairs to whose chosen response the policy gives the higher log-prob
    pairs: int


def measure(scores: HeldOutScores, objective: Objective, *, virtual: bool) -> Measured:
    """What the paper reports of a run, and ours beside it.

    Args:
        objective: of the run; its outer loss is not used.
        virtual: rewards against the virtual reference, beta * log(policy / virtual reference), as the paper has them for MRPO;
            otherwise against the anchor, as for every other method.
    """
    policy_N2 = torch.from_numpy(np.ascontiguousarray(scores.policy_logps_N2))
    ref_KN2 = torch.from_numpy(np.ascontiguousarray(scores.ref_logps_KN2))
    if virtual:
        plain = replace(objective, loss_type="sigmoid", loss_weights=None, label_smoothing=0.0)
        margins_N = loss_against(policy_N2, combine(ref_KN2, plain, impl="torch"), plain).margins_P
    else:
        rewards_N2 = objective.beta * (policy_N2 - ref_KN2[0])
        margins_N = rewards_N2[:, 0] - rewards_N2[:, 1]
    right_N = policy_N2[:, 0] > policy_N2[:, 1]
    return Measured(
        reward_accuracy=float((margins_N > 0).double().mean()),
        reward_margin=float(margins_N.double().mean()),
        accuracy=float(right_N.double().mean()),
        pairs=len(policy_N2),
    )


def untrained(scores: HeldOutScores) -> HeldOutScores:
    """The same pairs as the policy saw them at its start, which is what the anchor is."""
    return replace(scores, policy_logps_N2=scores.ref_logps_KN2[0])


def select(scores: HeldOutScores, keys: np.ndarray, *, without: bool = False) -> HeldOutScores:
    """The pairs whose keys are among ``keys``; or ``without`` them, all others."""
    return scores.select(scores.row_keys[np.isin(scores.row_keys, keys, invert=without)])


@dataclass(frozen=True)
class Cell:
    """A method in a column: a value for every seed that finished."""

    values: Sequence[float]
    planned: int
    mark: Literal["best", "second", ""] = ""

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1)."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Column:
    """The cells of a column, marked, and how far its best method is from the others.

    Args:
        first: of the highest mean.
        distances: Cohen's d of the best to every other finished method; None where a method has one seed or no value varies.
    """

    cells: Mapping[str, Cell]
    first: Sequence[str] = ()
    distances: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """None where several share the highest mean, or nothing finished."""
        return self.first[0] if len(self.first) == 1 else None


def mark(cells: Mapping[str, Cell]) -> Column:
    """Bold and italic as the captions of Tables 1 and 2 have them: bold is the best, where it differs from **every** other method
    by Cohen's d (difference of the means over the pooled standard deviation of the values per seed) of at least 0.5; italic is the
    second best mean. Where several share the highest mean, none is marked.

    Methods without a finished run are holes and compared with nothing.
    """
    means = {name: cell.mean for name, cell in cells.items() if cell.mean is not None}
    ranks = sorted(set(means.values()), reverse=True)
    first = [name for name, mean in means.items() if mean == ranks[0]]
    best = first[0] if len(first) == 1 else None
    distances: dict[str, float | None] = {}
    if best is not None:
        others = [name for name in means if name != best]
        distances = {name: cohens_d(cells[best].values, cells[name].values) for name in others}
    bold = bool(distances) and all(d is not None and d >= EFFECT_SIZE for d in distances.values())
    second = ranks[1] if best is not None and len(ranks) > 1 else None

    def of(name: str) -> Literal["best", "second", ""]:
        if name == best:
            return "best" if bold else ""
        return "second" if second is not None and means.get(name) == second else ""

    return Column({name: replace(cell, mark=of(name)) for name, cell in cells.items()}, first, distances)
