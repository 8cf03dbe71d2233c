"""The one form every data set takes: a prompt and two responses, as text or turns, the same for every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SIDES = ("chosen", "rejected")
#: Reasons for which answers give no pair though nothing is wrong with them: counted and listed, but no cause to stop a run.
NO_PAIR = frozenset({"tied_scores", "single_answer"})


class BadRow(ValueError):  # noqa: N818 (a verdict on a row, not a failure of the program)
    """A row that cannot be trained on. ``reason`` is a short stable word that rows are counted by, e.g. ``empty_response``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


Message = dict[str, Any]
#: The text of one assistant turn, or messages that begin and end with an assistant turn: several turns, or one that says more than
#: text (tool calls, reasoning). One plain assistant turn is always its text.
Response = str | list[Message]


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the response people chose and the one they rejected.

    ``prompt`` is either a conversation, a list of ``{"role", "content", ...}`` messages that is rendered with each model's own chat
    template, or a string, which every model reads as it is (TRL's "standard" format; its responses are strings too). Where a
    conversation ends with an assistant turn, the responses are strings that continue it. ``tools`` and ``chat_template_kwargs`` go
    to the chat templates unchanged.
    """

    prompt: list[Message] | str
    chosen: Response
    rejected: Response
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Cut:
    """What ``max_length`` leaves of a response.

    Attributes:
        messages: how many are left; 1 of a text.
        characters: how many of the last one's text, and then no end of turn; None: all of it, with its end of turn.
    """

    messages: int
    characters: int | None

    def of(self, response: Response) -> Response:
        """What is left of ``response``."""
        if isinstance(response, str):
            return response[: self.characters]
        kept = list(response[: self.messages])
        if self.characters is not None:
            kept[-1] = {**kept[-1], "content": kept[-1]["content"][: self.characters]}
        return as_response(kept)


Cuts = tuple[Cut | None, Cut | None]  #: of chosen, rejected; None: all of it is left
NO_CUTS: Cuts = (None, None)


@dataclass(frozen=True)
class PairTokens:
    """One pair in one model's tokens. Responses include the end of turn unless they were cut.

    ``chosen_context`` and ``rejected_context`` are the bounds ``[start, end, start, end, ...]`` of those runs of the response's
    tokens that are read and not scored: what users and tools say between the assistant's turns, and the headers of turns.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_context: list[int] = field(default_factory=list)
    rejected_context: list[int] = field(default_factory=list)

    @property
    def scored_lengths(self) -> tuple[int, int]:
        """Tokens of chosen and rejected that are scored."""
        return len(self.scored("chosen")), len(self.scored("rejected"))

    def scored(self, side: str) -> list[int]:
        """Places of the scored tokens in ``chosen_ids`` or ``rejected_ids``."""
        bounds = [0, *getattr(self, f"{side}_context"), len(getattr(self, f"{side}_ids"))]
        return [i for start, end in zip(bounds[::2], bounds[1::2], strict=True) for i in range(start, end)]


def as_response(messages: list[Message]) -> Response:
    """``messages``, or its text where it is one plain assistant turn."""
    return messages[0]["content"] if len(messages) == 1 and is_plain(messages[0]) else messages


def is_plain(message: Message) -> bool:
    """Whether a message says nothing but its text."""
    return isinstance(message.get("content"), str) and not (
        message.get("tool_calls") or message.get("reasoning_content")
    )


def is_prefilled(prompt: Sequence[Message] | str) -> bool:
    """Whether responses continue the last turn of a prompt: it is the assistant's."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"
