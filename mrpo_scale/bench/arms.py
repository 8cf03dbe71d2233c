"""Which steps a benchmark compares, and in which order it takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["settle", "count", "profile", "memory", "timed"]

#: Steps of each arm before the clock counts: one in which caches fill and ZeRO-3 learns its order of gathers; then collectives are
#: counted in one, profiled in the next, and the peak of memory is taken in the last.
UNTIMED: tuple[Kind, ...] = ("settle", "count", "profile", "memory")


@dataclass(frozen=True)
class Arm:
    """One way to take a step. K = 1 is DPO on the anchor."""

    references: int  #: K
    scoring: str  #: live or cached
    placement: str = ""  #: of live references

    @property
    def name(self) -> str:
        what = "DPO" if self.references == 1 else f"MRPO K={self.references}"
        return f"{what} {self.scoring}" + f", {self.placement}" * bool(self.placement)

    @property
    def baseline(self) -> Arm:
        """DPO, scored in the same way."""
        return Arm(1, self.scoring, self.placement)


@dataclass(frozen=True)
class Step:
    """One optimizer step of the benchmark."""

    arm: Arm
    kind: Kind
    round: int  #: of the timed steps; -1 before them
    window: int  #: which pairs it trains


def plan_arms(references: Sequence[int], scoring: Sequence[str], placements: Sequence[str]) -> list[Arm]:
    """All combinations, those that hold least first: peaks of memory are taken in this order, before the next references load.

    DPO is always among them: without it there is no overhead to speak of.
    """
    counts = sorted({1, *references})
    arms = [Arm(k, "cached") for k in counts if "cached" in scoring]
    if "live" in scoring:
        arms += [Arm(k, "live", placement) for placement in dict.fromkeys(placements) for k in counts]
    return arms


def plan_steps(arms: Sequence[Arm], rounds: int, windows: int, heaviest: int, seed: int) -> list[Step]:
    """First each arm's untimed steps on the heaviest window, arm after arm; then ``rounds`` rounds in which every arm trains the
    same window, in an order drawn anew for each round, so that drift of the machine hits all alike. The same on all ranks."""
    steps = [Step(arm, kind, -1, heaviest) for arm in arms for kind in UNTIMED]
    rng = random.Random(seed)
    for i in range(rounds):
        steps += [Step(arm, "timed", i, i % windows) for arm in rng.sample(list(arms), len(arms))]
    return steps
