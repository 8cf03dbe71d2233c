"""Where in a template's rendering of a whole conversation the response stands: found in the text of each conversation.

Templates write things around a response that depend on it (an empty think block where it has no reasoning), and change it (trim it,
drop its reasoning). What a template did is read off its own rendering, next to that of the same conversation with a sentinel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SENTINEL = "SENTINELRESPONSE"


@dataclass(frozen=True)
class Turn:
    """A response as one model's template renders it: the model reads ``head + lead + body`` and the end of turn.

    Attributes:
        head: the generation prompt, where the rendering begins with it: tokenized by itself, as it is when a model generates.
        lead: what the template writes from there to the response: an empty think block, a channel, a blank.
        body: the response; where the template changes it, what it makes of it.
        response: the response as the data set has it.
    """

    head: str
    lead: str
    body: str
    response: str

    @property
    def changed(self) -> bool:
        """Whether the template drops or rewrites more of the response than white space at its ends."""
        # Of a response that begins with what the generation prompt ends with (``<think>``), that much stands in ``head``.
        return not (self.head + self.lead + self.body).rstrip().endswith(self.response.strip())

    @property
    def trimmed(self) -> bool:
        """Whether the template drops white space at the response's ends, and nothing else."""
        return self.body != self.response and self.body.strip() == self.response.strip()

    @property
    def skipped(self) -> int | None:
        """How many characters of the response stand before ``body``; None where ``body`` is not one piece of it."""
        at = self.response.rfind(self.body)
        return None if at < 0 else at

    def upto(self, characters: int) -> str | None:
        """``body`` as far as it is made of the first ``characters`` of the response; None where that cannot be told."""
        return None if self.skipped is None else self.body[: max(0, characters - self.skipped)]


def find_turn(whole: str, sentinel: str, *, prompt: str, bare: str, opening: str, response: str) -> Turn | None:
    """Where the response stands in ``whole``; None where the template writes no answer after this conversation.

    Args:
        whole: the template's rendering of the conversation and its response.
        sentinel: the same with SENTINEL for the response.
        prompt: of the conversation with a generation prompt, which is what a model gets that shall answer; ``bare``: without one.
        opening: what the template writes between generation prompt and response elsewhere.
    """
    before, found, after = sentinel.rpartition(SENTINEL)
    if not found:
        return None
    text = whole[: len(whole) - shared_length(whole[::-1], after[::-1])]
    start = _start(text, before, prompt, response)
    if text.startswith(prompt):
        # A generation prompt may end in `<think>`: the response begins after that, though its own text begins with it.
        start = max(start, len(prompt))
        return Turn(prompt, text[len(prompt) : start], text[start:], response)
    if text.startswith(bare):
        return Turn("", text[:start], text[start:], response)
    # The template writes earlier turns otherwise once an answer follows (Mistral's: the system text stands in the last user turn
    # if that is the last turn). A model that shall answer sees them as the generation prompt has them.
    return Turn(prompt, opening, text[start:], response)


def _start(text: str, before: str, prompt: str, response: str) -> int:
    """Where the response begins in ``text``, which ends with it."""
    start = shared_length(text, before)
    if text[start:].strip() == response.strip():
        return start
    if text.endswith(response):
        return len(text) - len(response)
    kept = text.rstrip()
    if kept.endswith(response.strip()):
        return len(kept) - len(response.strip())
    if start < len(before) and text.startswith(
        prompt
    ):  # what stands before it depends on it: all that is not prompt is response
        return len(prompt)
    return start


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences share at their beginnings."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
