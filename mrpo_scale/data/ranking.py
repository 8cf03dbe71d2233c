"""Ranked or scored answers to one prompt, and the pairs that they make."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mrpo_scale.data.pairs import BadRow


@dataclass(frozen=True)
class Answer:
    """One answer. ``value`` is higher for the better one; None where the data set has none. ``row``: from which of the rows."""

    text: Any
    value: float | None
    row: int = 0


@dataclass(frozen=True)
class Comparison:
    """All answers to one prompt. ``by`` says what a tie is: between ranks a contradiction, between scores an ordinary thing."""

    prompt: list[dict[str, Any]]
    answers: list[Answer]
    by: Literal["rank", "score"]


def choose_pairs(
    comparison: Comparison, how: str, rng: random.Random
) -> Iterator[tuple[tuple[Answer, Answer], BadRow | None]]:
    """(better, worse) for each pair that ``how`` asks for, or two answers and the reason why they are none.

    Reasons: ``rank_missing``/``score_missing`` (once per such answer; the others are still compared), ``tied_ranks``,
    ``tied_scores``, ``single_answer``. Under ``best_vs_*`` tied scores are reported only where they leave no pair.
    """
    by, answers = comparison.by, comparison.answers
    ranked = sorted((a for a in answers if a.value is not None), key=_value, reverse=True)
    for i, answer in enumerate(answers):
        if answer.value is None:
            yield (answer, answer), BadRow(f"{by}_missing", f"answer {i + 1} of {len(answers)} has no {by}")
    if len(ranked) < 2:
        if len(answers) < 2:
            yield (
                (answers[0], answers[0]),
                BadRow("single_answer", "one answer to this prompt, none to compare it with"),
            )
        return
    tied = [(a, b) for a, b in itertools.combinations(ranked, 2) if a.value == b.value]
    if how == "all":
        pairs = [(a, b) for a, b in itertools.combinations(ranked, 2) if a.value != b.value]
    else:
        below = [answer for answer in ranked if answer.value != ranked[0].value]
        pairs = [(ranked[0], rng.choice(below) if how == "best_vs_random" else below[-1])] if below else []
        if by == "score":
            tied = [] if pairs else tied[:1]
    yield from ((pair, None) for pair in pairs)
    for a, b in tied:
        yield (a, b), BadRow(f"tied_{by}s", f"two answers have {by} {abs(_value(a)) if by == 'rank' else _value(a):g}")


def _value(answer: Answer) -> float:
    assert answer.value is not None
    return answer.value
