"""Prompts that end with an assistant turn: the responses continue that turn, and only what they add to it is scored.

The prompt ends where the turn's text does in the template's own rendering of the conversation, as with transformers'
``continue_final_message``: without an end of turn. White space at its end stays, since text follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from mrpo_scale.data.pairs import BadRow, Message, Response
from mrpo_scale.data.response_turns import Render
from mrpo_scale.data.turns import SENTINEL, Turn, shared_length


def render_prefilled(render: Render, prompt: Sequence[Message]) -> str:
    """The prompt as text, as a model gets it that shall continue its last turn.

    Raises:
        BadRow: ``malformed``, when that turn calls tools or says nothing, or is all there is.
        TemplateError: the template rejects the conversation, or drops or rewrites what the turn says.
    """
    return _around(render, prompt)[0]


def read_continuation(render: Render, prompt: Sequence[Message], response: Response) -> Turn:
    """The response as the template renders it in the last turn of ``prompt``; ``head`` is :func:`render_prefilled`, ``lead`` empty.

    Raises:
        BadRow: ``malformed``: see :func:`render_prefilled`; or the response is not one text.
        TemplateError: see :func:`render_prefilled`; or the template writes the prompt otherwise once the response follows.
    """
    if not isinstance(response, str):
        raise BadRow(
            "malformed",
            "the prompt ends with an assistant turn and a response is not one text: nothing says whether its first turn "
            "continues that one or follows it",
        )
    head, after = _around(render, prompt)
    whole = _with_text(render, prompt, response)
    if not whole.startswith(head):
        raise TemplateError("it writes the assistant turn that ends the prompt otherwise once a response continues it")
    text = whole[: len(whole) - shared_length(whole[::-1], after[::-1])]
    return Turn(head, "", text[len(head) :], response)


def _around(render: Render, prompt: Sequence[Message]) -> tuple[str, str]:
    """What the template writes before and after a text that continues the prompt."""
    last = prompt[-1]
    said = [last.get("reasoning_content", "").strip(), last.get("content", "")]
    if len(prompt) == 1:
        raise BadRow("malformed", "the prompt is one assistant turn: there is nothing that it answers")
    if last.get("tool_calls"):
        raise BadRow("malformed", "the prompt ends with an assistant turn that calls tools, which no text continues")
    if not any(text.strip() for text in said):
        raise BadRow("malformed", "the prompt ends with an assistant turn that says nothing")
    before, found, after = _with_text(render, prompt, SENTINEL).rpartition(SENTINEL)
    if not (found and before.endswith(said[1]) and said[0] in before):
        raise TemplateError("it drops or rewrites the assistant turn that ends the prompt")
    return before, after


def _with_text(render: Render, prompt: Sequence[Message], text: str) -> str:
    """The conversation with ``text`` at the end of its last turn."""
    return render([*prompt[:-1], {**prompt[-1], "content": prompt[-1].get("content", "") + text}], False)
