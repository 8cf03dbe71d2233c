"""Where the assistant's turns stand in a template's rendering of a conversation whose response has several, or calls tools.

Nothing is asked of the template but to render. A turn is found by rendering the conversation once more with a mark in place of what
the turn says: the two renderings agree before the turn's text and after it. Where it begins to be the assistant's is told by the
rendering of what stands before it with a generation prompt: that is where a model that answers takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import TemplateError

from mrpo_scale.data.messages import called, with_function
from mrpo_scale.data.pairs import Message
from mrpo_scale.data.turns import SENTINEL, Turn, shared_length

#: The conversation as text, with a generation prompt or without. Raises TemplateError.
Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Turns(Turn):
    """A response of several turns as one model's template renders it; ``body`` is all that the assistant writes in the last one.

    Attributes:
        head: the generation prompt of the last turn with all that stands before it; empty where the rendering begins otherwise.
        response: the text of the last turn; empty where it calls tools, so that it cannot be cut.
        begin: the character of ``head + lead + body`` at which the first turn begins to depend on what the assistant says.
        spans: the characters of ``head + lead + body`` that the assistant writes in earlier turns, each with its end of turn.
        ending: what ends the last turn; empty where the template writes nothing that does.
        texts: every text of an assistant turn as the row has it, and what the template writes in that turn.
    """

    begin: int
    spans: tuple[tuple[int, int], ...]
    ending: str
    texts: tuple[tuple[str, str], ...]

    @property
    def changed(self) -> bool:
        return any(text.strip() not in written for text, written in self.texts)

    @property
    def trimmed(self) -> bool:
        return not self.changed and any(text not in written for text, written in self.texts)

    @property
    def skipped(self) -> int | None:
        """Below zero by as much as ``body`` has before the text of the last turn."""
        text = self.response.strip()
        at = self.body.rfind(text) if text else -1
        return None if at < 0 else self.response.index(text) - at

    def scores(self, start: int, end: int) -> bool:
        """Whether the assistant writes any of these characters of ``head + lead + body``."""
        last = len(self.head) + len(self.lead)
        return end > last or any(start < b and end > a for a, b in self.spans)


class _Place(NamedTuple):
    """Of what a message says, in characters of the rendering."""

    begin: int
    end: int


def read_turns(
    render: Render, prompt: Sequence[Message], response: Sequence[Message], ending: Callable[[str], str], header: str
) -> Turns:
    """The response as the template renders it after ``prompt``.

    Args:
        ending: of a text that follows a turn, what ends that turn.
        header: the assistant's header, where the template writes none for a generation prompt.

    Raises:
        TemplateError: the template rejects the conversation, drops a turn or a tool call of it, or writes it in an order in which
            its turns cannot be told apart.
    """
    messages = [*prompt, *response]
    whole = render(messages, False)
    mark = SENTINEL
    while mark in whole:
        mark += "X"
    numbers = range(len(prompt), len(messages))
    places = [_place(render, messages, i, whole, mark) for i in numbers]
    nexts = [place.begin for place in places[1:]] + [len(whole)]
    found: list[
        tuple[int, int, int]
    ] = []  # of each assistant turn: where it starts, where its text and its end of turn end
    reached = 0
    for i, place, following in zip(numbers, places, nexts, strict=True):
        if place.begin < reached:
            raise TemplateError(f"turn {i - len(prompt) + 1} of the response cannot be told from the one before it")
        reached = place.end
        if messages[i]["role"] == "assistant":
            start = _start(render, messages[:i], whole, place, found[-1][2] if found else 0, header)
            reached += len(ending(whole[place.end : following]))
            found.append((start, place.end, reached))
    _check_calls(render, messages, len(prompt), mark)
    start, end, closed = found[-1]
    is_prompt = whole[:start] == render(messages[:-1], True) + header
    turns = [message for message in response if message["role"] == "assistant"]
    return Turns(
        head=whole[:start] if is_prompt else "",
        lead="" if is_prompt else whole[:start],
        body=whole[start:end],
        response="" if response[-1].get("tool_calls") else response[-1]["content"],
        begin=max(places[0].begin, found[0][0]),
        spans=tuple((start, closed) for start, _, closed in found[:-1]),
        ending=whole[end:closed],
        texts=tuple(
            (text, whole[start:end])
            for message, (start, end, _) in zip(turns, found, strict=True)
            for text in (message.get("reasoning_content"), message.get("content"))
            if text
        ),
    )


def drops_tools(render: Render, prompt: Sequence[Message], without_tools: Render | None) -> bool:
    """Whether the template leaves tools, tool calls or tool results out of a prompt.

    Args:
        without_tools: renders with no ``tools``; None where the row has none.
    """
    text = render(prompt, True)
    try:
        if without_tools is not None and without_tools(prompt, True) == text:
            return True
    except TemplateError:
        pass  # it asks for tools, so it sees them
    if not any(message.get("tool_calls") or message["role"] == "tool" for message in prompt):
        return False
    mark = SENTINEL
    while mark in text:
        mark += "X"
    results = [i for i, message in enumerate(prompt) if message["role"] == "tool"]
    marked, marks = _with_names(prompt, 0, mark)
    for i in results:
        marked[i] = {**marked[i], "content": f"{mark}-{i}-"}
    text = render(marked, True)
    return not all(name in text for name in [*marks, *(f"{mark}-{i}-" for i in results)])


def _place(render: Render, messages: Sequence[Message], i: int, whole: str, mark: str) -> _Place:
    """Of message ``i``: what changes when it says something else."""
    message = messages[i]
    spoken = {"role": message["role"]} if message["role"] == "assistant" else message
    other = {**spoken, "content": mark}
    text = whole
    try:
        marked = render([*messages[:i], other, *messages[i + 1 :]], False)
    except TemplateError:
        # Strict templates let no turn but one that calls tools stand before a tool's; at the end any turn may stand.
        text, marked = render(messages[: i + 1], False), render([*messages[:i], other], False)
    if mark not in marked:
        raise TemplateError(f"it drops {message['role']} turns of responses")
    before, after = marked.partition(mark)[0], marked.rpartition(mark)[2]
    begin = shared_length(text, before)
    end = max(begin, len(text) - shared_length(text[::-1], after[::-1]))
    if not whole.startswith(text[:end]):
        raise TemplateError(f"it writes a {message['role']} turn of the response otherwise once others follow")
    return _Place(begin, end)


def _start(render: Render, before: Sequence[Message], whole: str, place: _Place, reached: int, header: str) -> int:
    """Where a model that is given ``before`` begins to write."""
    prompt = render(before, True) + header
    if whole.startswith(prompt) and len(prompt) <= place.end:
        return len(prompt)
    # Earlier turns were rewritten, or the generation prompt begins a reasoning that the template drops later on.
    opening = prompt.removeprefix(render(before, False))
    at = whole.rfind(opening, reached, place.begin) if opening and opening != prompt else -1
    return place.begin if at < 0 else at + len(opening)


def _check_calls(render: Render, messages: Sequence[Message], first: int, mark: str) -> None:
    """Raises TemplateError where the template does not write the tool calls of messages from ``first`` on."""
    marked, marks = _with_names(messages, first, mark)
    if marks:
        text = render(marked, False)
        if not all(name in text for name in marks):
            raise TemplateError("it drops tool calls of responses")


def _with_names(messages: Sequence[Message], first: int, mark: str) -> tuple[list[Message], list[str]]:
    """The messages with names of their own for every function that is called from message ``first`` on, and the names."""
    marked = list(messages)
    names: list[str] = []
    for i, message in enumerate(messages[first:], first):
        calls = []
        for call in message.get("tool_calls", ()):
            names.append(f"{mark}_{len(names)}_")
            calls.append(with_function(call, {**called(call), "name": names[-1]}))
        if calls:
            marked[i] = {**message, "tool_calls": calls}
    return marked, names
