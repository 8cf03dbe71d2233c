"""The one form every data set takes: a prompt and two responses, as text, the same for every model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Reasons for which answers give no pair though nothing is wrong with them: counted and listed, but no cause to stop a run.
NO_PAIR = frozenset({"tied_scores", "single_answer"})


class BadRow(ValueError):  # noqa: N818 (a verdict on a row, not a failure of the program)
    """A row that cannot be trained on. ``reason`` is a short stable word that rows are counted by, e.g. ``empty_response``."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the response people chose and the one they rejected.

    ``prompt`` is either a conversation, a list of ``{"role", "content", ...}`` messages that ends with a user turn and is rendered
    with each model's own chat template, or a string, which every model reads as it is (TRL's "standard" format). Responses are the
    text of one assistant turn. ``tools`` and ``chat_template_kwargs`` go to the chat templates unchanged.
    """

    prompt: list[dict[str, Any]] | str
    chosen: str
    rejected: str
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
