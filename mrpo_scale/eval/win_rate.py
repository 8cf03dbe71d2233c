"""From verdicts to a win rate with its uncertainty, and to what they say of the judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mrpo_scale.base.tables import aligned_table, percent
from mrpo_scale.eval.judge import Verdict
from mrpo_scale.eval.verdicts import Call, Verdicts

Z95 = 1.959963984540054  # the normal distribution's 97.5% point
Side = Literal["ours", "theirs", "tie"]


@dataclass(frozen=True)
class Comparison:
    """Two responses to one prompt."""

    prompt: str
    ours: str
    theirs: str

    @property
    def identical(self) -> bool:
        """Nothing to judge: a tie, for which nobody is asked."""
        return self.ours.strip() == self.theirs.strip()

    @property
    def calls(self) -> tuple[Call, Call]:
        """The question in both orders, our response first and second."""
        return Call(self.prompt, self.ours, self.theirs), Call(self.prompt, self.theirs, self.ours)


@dataclass(frozen=True)
class WinRate:
    """How often the first model's response was preferred. A tie is half a win.

    Attributes:
        prompts: those with a verdict in both orders; ``invalid`` had none in one of them and are left out.
        wins, losses: both orders agree. ties: both say tie. identical: the responses are the same text.
        disagreements: the orders contradict each other, counted as ties.
        followed_position: of those, where the judge took the same position twice.
        rate, low, high: the win rate and Wilson's 95% interval, each prompt one trial.
        rate_shown_first, rate_shown_second: of one order alone, ties half; identical responses not counted, None where all are.
    """

    prompts: int
    wins: int
    losses: int
    ties: int
    identical: int
    disagreements: int
    followed_position: int
    invalid: int
    rate: float
    low: float
    high: float
    rate_shown_first: float | None
    rate_shown_second: float | None

    @property
    def judged(self) -> int:
        return self.prompts - self.identical


def win_rate(comparisons: Sequence[Comparison], verdicts: Verdicts) -> WinRate:
    """The outcome of settled calls, at least one of which is valid."""
    counts: Counter[str] = Counter()
    shown_first, shown_second = [], []
    for comparison in comparisons:
        if comparison.identical:
            counts["identical"] += 1
            continue
        said = [verdicts.of(call) for call in comparison.calls]
        if None in said:
            counts["invalid"] += 1
            continue
        first, second = _side(said[0], ours="A"), _side(said[1], ours="B")
        shown_first.append(_half_points(first))
        shown_second.append(_half_points(second))
        if first == second:
            counts[first] += 1
        else:
            counts["disagreements"] += 1
            counts["followed_position"] += said[0] == said[1]
    prompts = len(comparisons) - counts["invalid"]
    points = counts["ours"] + 0.5 * (counts["tie"] + counts["disagreements"] + counts["identical"])
    low, high = wilson(points, prompts)
    return WinRate(
        prompts=prompts,
        wins=counts["ours"],
        losses=counts["theirs"],
        ties=counts["tie"],
        identical=counts["identical"],
        disagreements=counts["disagreements"],
        followed_position=counts["followed_position"],
        invalid=counts["invalid"],
        rate=points / prompts,
        low=low,
        high=high,
        rate_shown_first=sum(shown_first) / len(shown_first) if shown_first else None,
        rate_shown_second=sum(shown_second) / len(shown_second) if shown_second else None,
    )


def _side(verdict: Verdict | None, ours: Verdict) -> Side:
    return "tie" if verdict == "tie" else "ours" if verdict == ours else "theirs"


def _half_points(side: Side) -> float:
    return {"ours": 1.0, "tie": 0.5, "theirs": 0.0}[side]


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% score interval (JASA 22, 1927) of a proportion; half successes are taken as they are. (0, 1) of no trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate_table(results: dict[str, WinRate]) -> str:
    """One line per comparison, and a warning under those in which the judge went by position."""
    header = (
        "win rate",
        "prompts",
        "rate",
        "95% interval",
        "won",
        "lost",
        "tie",
        "same text",
        "orders disagree",
        "invalid",
    )
    rows = [
        (
            name,
            str(r.prompts),
            percent(r.rate),
            f"{percent(r.low)} to {percent(r.high)}",
            *map(str, (r.wins, r.losses, r.ties, r.identical, r.disagreements, r.invalid)),
        )
        for name, r in results.items()
    ]
    notes = [note for name, r in results.items() for note in _notes(name, r)]
    return "\n".join([aligned_table(header, rows), *notes])


def _notes(name: str, r: WinRate) -> list[str]:
    if not r.judged:
        return []
    notes = [
        f"{name}: {percent(r.rate_shown_first)} when shown first, {percent(r.rate_shown_second)} when shown second"
    ]
    if r.disagreements > r.judged / 2:
        notes.append(
            f"{name}: the judge contradicts itself on {r.disagreements} of {r.judged} prompts when the order is swapped (on "
            f"{r.followed_position} it takes the same position twice): this rate says little about the responses."
        )
    return notes
