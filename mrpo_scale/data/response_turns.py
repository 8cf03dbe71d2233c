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

#: Of a text that begins with a turn, and where what the turn says ends: where its text ends and where its end of turn does.
Ending = Callable[[str, int], tuple[int, int]]
#: The conversation as text, with a generation prompt or without. Raises TemplateError.
Render = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class Turns(Turn):
    """A response of several turns as one model's template renders it. ``lead`` is all that stands before the last turn, ``body``
    all that the assistant writes in it, ``head`` empty.

    Attributes:
        response: the text of the last turn; empty where it calls tools, so that it cannot be cut.
        begin: the character of ``lead + body`` at which the first turn begins to depend on what the assistant says.
        spans: the characters of ``lead + body`` that the assistant writes in each turn, ends of turn included but for the last.
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
        """Whether the assistant writes any of these characters of ``lead + body`` and the end of turn after them."""
        return end > len(self.lead) or any(start < b and end > a for a, b in self.spans)


class _Place(NamedTuple):
    """Of one message, in characters of the rendering: where a model that answers takes over (of the assistant's turns), where what
    the message says begins, and where it ends."""

    start: int
    begin: int
    end: int


def read_turns(
    render: Render, prompt: Sequence[Message], response: Sequence[Message], ending: Ending, header: str
) -> Turns:
    """The response as the template renders it after ``prompt``.

    Args:
        header: the assistant's header, where the template writes none for a generation prompt.

    Raises:
        TemplateError: the template rejects the conversation, drops a turn or a tool call of it, or writes it in an order in which
            its turns cannot be told apart.
    """
    messages = [*prompt, *response]
    whole = render(messages, False)
    mark = _unused(whole)
    places: list[_Place] = []
    for i in range(len(prompt), len(messages)):
        places.append(_place(render, messages, i, whole, mark, places[-1].end if places else 0, header))
    _check_calls(render, messages, len(prompt), mark)
    found: list[
        tuple[int, int, int]
    ] = []  # of each assistant turn: where it starts, where its text and its end of turn end
    for message, place, after in zip(response, places, [*places[1:], None], strict=True):
        if message["role"] == "assistant":
            following = len(whole) if after is None else after.begin
            text_end, closed = ending(whole[place.start : following], place.end - place.start)
            found.append((place.start, place.start + text_end, place.start + closed))
    start, end, closed = found[-1]
    turns = [message for message in response if message["role"] == "assistant"]
    return Turns(
        head="",
        lead=whole[:start],
        body=whole[start:end],
        response="" if response[-1].get("tool_calls") else response[-1]["content"],
        begin=max(places[0].begin, places[0].start),
        spans=(*((start, closed) for start, _, closed in found[:-1]), (start, end)),
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
    mark = _unused(text)
    results = [i for i, message in enumerate(prompt) if message["role"] == "tool"]
    marked, marks = _with_names(prompt, 0, mark)
    for i in results:
        marked[i] = {**marked[i], "content": f"{mark}-{i}-"}
    text = render(marked, True)
    return not all(name in text for name in [*marks, *(f"{mark}-{i}-" for i in results)])


def _place(
    render: Render, messages: Sequence[Message], i: int, whole: str, mark: str, reached: int, header: str
) -> _Place:
    """Of message ``i``, which stands after character ``reached``: what changes when it says something else."""
    message = messages[i]
    is_answer = message["role"] == "assistant"
    other = {**({"role": message["role"]} if is_answer else message), "content": mark}
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
    start = _start(render, messages[:i], text, begin, end, header) if is_answer else begin
    if text is not whole:  # where the same stands in the whole
        moved = whole.find(text[start:end], reached) - start
        start, begin, end = start + moved, begin + moved, end + moved
    if start < reached:
        raise TemplateError(f"the {message['role']} turn in message {i + 1} cannot be told from what stands before it")
    return _Place(start, begin, end)


def _start(render: Render, before: Sequence[Message], text: str, begin: int, end: int, header: str) -> int:
    """Where a model that is given ``before`` begins to write."""
    prompt = render(before, True) + header
    if text.startswith(prompt) and len(prompt) <= end:
        return len(prompt)
    # Earlier turns were rewritten, or the generation prompt begins a reasoning that the template drops later on.
    bare = render(before, False)
    opening = prompt.removeprefix(bare) if prompt.startswith(bare) else header
    if not opening:
        # White space alone is no header: it is the answer's, unless it ends what stands before.
        return min(begin, len(text[:begin].rstrip()) + len(bare) - len(bare.rstrip()))
    at = text.rfind(opening, 0, begin)
    return begin if at < 0 else at + len(opening)


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


def _unused(text: str) -> str:
    """A word that is not in ``text``."""
    mark = SENTINEL
    while mark in text:
        mark += "X"
    return mark
