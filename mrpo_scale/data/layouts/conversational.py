"""TRL's conversational format: chosen and rejected are lists of messages, the prompt explicit or shared by both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import add_system, pair_from_messages, read_messages, read_tools, split_conversations
from mrpo_scale.data.pairs import PreferencePair

PROMPTS = ("prompt", "messages", "conversation")  #: where the prompt stands: TRL's name, axolotl's


class Conversational(Layout):
    """The prompt is a list of messages, a string, or absent; ``tools``, where present, go to the chat templates.

    A ``system`` column becomes the first turn, where there is none yet. A response is a list of messages, or one message (axolotl).
    Beside a string prompt (HuggingFaceH4/ultrafeedback_binarized) chosen and rejected hold the whole conversation, so the prompt
    is what they share; where they hold the response alone, the string is the user turn.
    """

    name = "conversational"
    columns = ("chosen", "rejected")
    describe = "lists of {role, content} messages, beside a `prompt` list or with the prompt in both"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        return set(self.columns) <= columns and all(_are_messages(_as_list(example[column])) for column in self.columns)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        chosen, rejected = (read_messages(_as_list(row[column]), column) for column in self.columns)
        tools = read_tools(row.get("tools"))
        column = next((name for name in PROMPTS if row.get(name) is not None), PROMPTS[0])
        prompt = row.get(column)
        if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
            prompt = [{"role": "user", "content": prompt}]
        if prompt is None or isinstance(prompt, str):
            return add_system(split_conversations(chosen, rejected, tools), row)
        return add_system(pair_from_messages(read_messages(_as_list(prompt), column), chosen, rejected, tools), row)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
