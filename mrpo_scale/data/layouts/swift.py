"""ms-swift's preferences: a conversation with its answer, and what was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import Message, add_system, pair_from_messages, read_messages, read_tools
from mrpo_scale.data.pairs import BadRow, PreferencePair


class Swift(Layout):
    """``messages`` ends with the chosen response; ``rejected_response`` is the text, or are the messages, to stand in its place.
    ``rejected_messages`` is a whole conversation."""

    name = "swift"
    columns = ("messages", "rejected_response|rejected_messages")
    describe = "`messages` that end with the chosen response, beside the text of the `rejected_response`"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        rejected = example.get("rejected_response"), example.get("rejected_messages")
        return not self.missing(columns) and isinstance(example["messages"], list) and any(rejected)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        messages = read_messages(row["messages"], "messages")
        start = _last_answer(messages)
        prompt, chosen = messages[:start], messages[start:]
        rejected = _rejected(row)
        if row.get("rejected_messages") is not None:
            if rejected[:start] != prompt:
                raise BadRow("malformed", "`rejected_messages` does not begin as `messages` does")
            rejected = rejected[start:]
        return add_system(pair_from_messages(prompt, chosen, rejected, read_tools(row.get("tools"))), row)


def _rejected(row: Mapping[str, Any]) -> list[Message]:
    if row.get("rejected_messages") is not None:
        return read_messages(row["rejected_messages"], "rejected_messages")
    given = row.get("rejected_response")
    if isinstance(given, str):
        return [{"role": "assistant", "content": given}]
    return read_messages(given, "rejected_response")


def _last_answer(messages: list[Message]) -> int:
    """Where what the assistant says after the last user turn begins: the response, as ms-swift has it."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    start = users[-1] + 1 if users else 0
    if start == len(messages):
        raise BadRow("malformed", "`messages` does not end with an assistant turn")
    return start
