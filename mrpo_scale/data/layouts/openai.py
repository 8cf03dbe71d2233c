"""OpenAI's preference files: an ``input`` with messages, and two outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import pair_from_messages, read_messages, read_tools
from mrpo_scale.data.pairs import BadRow, PreferencePair


class OpenAI(Layout):
    """``input.messages`` is the prompt, ``input.tools`` its tools; the outputs are lists of messages."""

    name = "openai"
    columns = ("input", "preferred_output", "non_preferred_output")
    describe = "`input` {messages, tools}, the others lists of {role, content} messages"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        given = example.get("input")
        return not self.missing(columns) and isinstance(given, dict) and "messages" in given

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        given = row["input"]
        if not isinstance(given, dict):
            raise BadRow("malformed", "`input` is not a mapping with `messages`")
        prompt = read_messages(given.get("messages"), "input.messages")
        chosen, rejected = (read_messages(row[column], column) for column in self.columns[1:])
        return pair_from_messages(prompt, chosen, rejected, read_tools(given.get("tools")))
