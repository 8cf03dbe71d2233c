"""Conversations as lists of ``{"role", "content", ...}`` messages: read from a row, split into prompt and responses, merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mrpo_scale.base.untrusted import parse_json
from mrpo_scale.config.data_keys import RESERVED
from mrpo_scale.data.pairs import BadRow, Message, PreferencePair, Response, as_response, is_plain

#: Types of parts of a content that are text: chat completions', and those of OpenAI's responses.
TEXT_PARTS = ("text", "input_text", "output_text")
#: What data sets and chat templates call the reasoning of an assistant's turn; the first is what it is called here.
REASONING = ("reasoning_content", "thinking", "reasoning")
#: Columns of what no model here reads.
MEDIA = tuple(f"{kind}{plural}" for kind in ("image", "video", "audio") for plural in ("", "s"))


def without_none(value: Any) -> Any:
    """``value`` without the None-valued keys that Arrow fills in so that all structs of a column have the same fields."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def read_messages(value: Any, column: str) -> list[Message]:
    """A column's messages, checked: each has a role, and text unless it calls tools. System turns without text are left out, parts
    of text are joined, and reasoning is called ``reasoning_content`` (each template gets it under the name that it knows).

    Raises:
        BadRow: ``malformed``, naming the column and the message; ``not_text``, naming the type of a part that is no text.
    """
    if not isinstance(value, list):
        raise BadRow("malformed", f"`{column}` is {_kind(value)}, not a list of messages")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict) or not isinstance(item.get("role"), str):
            raise BadRow("malformed", f"`{column}[{i}]` is not a message with a `role`")
        message = _with_one_reasoning(without_none(item))
        if isinstance(message.get("content"), list):
            message["content"] = _joined_parts(message["content"], f"{column}[{i}].content")
        if "tool_calls" in message:
            message["tool_calls"] = _read_calls(message["tool_calls"], f"{column}[{i}].tool_calls")
            if not message["tool_calls"]:  # some templates take a turn with an empty list for one that calls tools
                del message["tool_calls"]
        if not isinstance(message.get("content"), str) and not ("content" not in message and message.get("tool_calls")):
            raise BadRow("malformed", f"`{column}[{i}].content` is {_kind(item.get('content'))}, not a string")
        messages.append(message)
    return without_blank_system(messages)


def _joined_parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts, joined as chat templates that know parts do: with nothing in between."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"text": part}
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS:
            raise BadRow("not_text", f"`{where}` has a part of type {kind}; models read text here")
        if not isinstance(part.get("text"), str):
            raise BadRow("malformed", f"`{where}` has a part of type {kind} without `text`")
        texts.append(part["text"])
    return "".join(texts)


def _with_one_reasoning(message: Message) -> Message:
    name = next((name for name in REASONING if name in message), None)
    if name in (None, REASONING[0]):
        return message
    return {REASONING[0] if key == name else key: value for key, value in message.items()}


def _read_calls(value: Any, where: str) -> list[Any]:
    """Tool calls as chat templates take them: ``arguments`` that are JSON text of an object (OpenAI's way) become that object."""
    if not isinstance(value, list):
        raise BadRow("malformed", f"`{where}` is {_kind(value)}, not a list")
    return [_read_call(call, f"{where}[{i}]") for i, call in enumerate(value)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = called(call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("malformed", f"`{where}` names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise BadRow("malformed", f"`{where}`: its arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise BadRow("malformed", f"`{where}`: its arguments are {_kind(arguments)}, not an object")
    return with_function(call, {**function, "arguments": arguments})


def called(call: dict[str, Any]) -> Any:
    """The ``{name, arguments}`` of a tool call, which stand in its ``function`` or in itself."""
    return call.get("function", call)


def with_function(call: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """The call with another :func:`called`."""
    return {**call, "function": function} if "function" in call else function


def as_text(messages: Sequence[Message]) -> str:
    """Messages for people's eyes."""
    return "\n\n".join(f"[{message['role']}]\n{said(message)}" for message in messages)


def said(message: Message) -> str:
    """A message's text, and its tool calls as JSON, each on a line of its own."""
    calls = (json.dumps(called(call), ensure_ascii=False) for call in message.get("tool_calls", ()))
    return "\n".join([*([message["content"]] if message.get("content") else []), *calls])


def without_blank_system(messages: list[Message]) -> list[Message]:
    """The messages without system turns that say nothing, which data sets write where a row has none: templates would render them
    (a blank line, an empty turn), or reject them."""
    return [m for m in messages if m["role"] != "system" or m.get("content", "").strip()]


def read_tools(value: Any) -> list[Any] | None:
    """The ``tools`` of a row, which may be a list or JSON text of one; None when there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise BadRow("malformed", f"`tools` is not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise BadRow("malformed", f"`tools` is {_kind(value)}, not a list")
    return without_none(value)


def read_template_kwargs(value: Any) -> dict[str, Any] | None:
    """The ``chat_template_kwargs`` of a row, which may be a mapping or JSON text of one; None when there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise BadRow("malformed", f"`chat_template_kwargs` is not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, dict):
        raise BadRow("malformed", f"`chat_template_kwargs` is {_kind(value)}, not a mapping")
    taken = sorted(RESERVED & set(value))
    if taken:
        raise BadRow("malformed", f"`chat_template_kwargs` sets `{taken[0]}`, which is not the row's to decide")
    return without_none(value) or None


def check_text_only(row: Mapping[str, Any]) -> None:
    """Raises BadRow ``not_text`` for a row with pictures, films or sound: its text was written about them."""
    for column in MEDIA:
        value = row.get(column)
        if value is not None and not (isinstance(value, (str, list, dict)) and not value):
            raise BadRow("not_text", f"`{column}` is not empty; models read text here")


def read_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow("malformed", f"`{column}` is {_kind(value)}, not a string")
    return value


def split_conversations(
    chosen: list[Message], rejected: list[Message], tools: list[Any] | None = None
) -> PreferencePair:
    """A pair from two whole conversations: the messages they share are the prompt, the others of each are its response. Where they
    part in what a user or a tool says, the response begins with the assistant's turn before that, which both share.

    Raises:
        BadRow: ``malformed`` when one does not end with an assistant turn, or they part between two; ``empty_prompt`` when they
            share nothing.
    """
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1]["role"] != "assistant":
            raise BadRow("malformed", f"`{column}` does not end with an assistant turn")
    # Two equal conversations still have a response each, so that they are counted as what they are: identical responses.
    longest = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    while shared and not chosen[shared]["role"] == rejected[shared]["role"] == "assistant":
        shared -= 1
    if shared and chosen[shared - 1]["role"] == "assistant":
        # Only a row with a prompt of its own says where the responses begin; in whole conversations turns are whole.
        raise BadRow("malformed", "an assistant turn follows an assistant turn, in a row without a prompt of its own")
    return pair_from_messages(chosen[:shared], chosen[shared:], rejected[shared:], tools)


def pair_from_messages(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], tools: list[Any] | None = None
) -> PreferencePair:
    """A pair from a prompt and the messages that answer it, or continue its last turn where that is the assistant's.

    Raises:
        BadRow: when a response does not begin and end with an assistant turn, or when there is no turn to answer.
    """
    if not prompt:
        raise BadRow("empty_prompt", "the responses have no turn before them, or not the same one")
    responses = [_response(messages, column) for messages, column in ((chosen, "chosen"), (rejected, "rejected"))]
    return PreferencePair(prompt=prompt, chosen=responses[0], rejected=responses[1], tools=tools)


def add_system(pair: PreferencePair, row: Mapping[str, Any]) -> PreferencePair:
    """``pair`` with the text of the row's ``system`` column, where it has any, as the first turn. An own first turn stays.

    Raises:
        BadRow: ``malformed`` when it is not text.
    """
    system = row.get("system")
    if not system or pair.prompt[0]["role"] == "system":  # type: ignore[index]
        return pair
    turn = {"role": "system", "content": read_text(system, "system")}
    return replace(pair, prompt=[*without_blank_system([turn]), *pair.prompt])


def merge_turns(messages: Sequence[Message]) -> list[Message]:
    """The same text in turns that strict templates take: no system turn, no two turns of one role in a row.

    System text goes in front of the first user turn; neighbours of one role are joined with a blank line.
    """
    system = [message["content"] for message in messages if message["role"] == "system"]
    merged: list[Message] = []
    for message in messages:
        if message["role"] == "system":
            continue
        same_role = merged and merged[-1]["role"] == message["role"]
        if same_role and set(message) == set(merged[-1]) == {"role", "content"}:
            merged[-1] = {**message, "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    if not system:
        return merged
    first = next((i for i, message in enumerate(merged) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(system)}, *merged]
    content = "\n\n".join([*system, merged[first]["content"]])
    return [*merged[:first], {**merged[first], "content": content}, *merged[first + 1 :]]


def _response(messages: list[Message], column: str) -> Response:
    if not messages:
        raise BadRow("empty_response", f"`{column}` has no message")
    for place, message in (("answers with", messages[0]), ("ends with", messages[-1])):
        if message["role"] != "assistant":
            raise BadRow("malformed", f"`{column}` {place} a {message['role']} turn")
    if any(message["role"] == "system" for message in messages):
        raise BadRow("malformed", f"`{column}` has a system turn")
    if not (len(messages) == 1 and is_plain(messages[0])):
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and not said(message).strip():
                raise BadRow("empty_response", f"`{column}`: the assistant says nothing in message {i + 1}")
    return as_response(messages)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
