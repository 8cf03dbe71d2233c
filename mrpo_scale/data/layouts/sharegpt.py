"""ShareGPT's preference format, as LLaMA-Factory reads it: turns are ``{"from", "value"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import Message, add_system, pair_from_messages, read_tools, without_blank_system
from mrpo_scale.data.pairs import BadRow, PreferencePair

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


class ShareGPT(Layout):
    """``conversations`` is the prompt; chosen and rejected are one turn each. A ``system`` column becomes the first turn."""

    name = "sharegpt"
    columns = ("conversations", "chosen", "rejected")
    describe = "`conversations` a list of {from, value} turns, the others one such turn each"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if not set(self.columns) <= columns or not isinstance(example["conversations"], list):
            return False
        turns = [*example["conversations"], example["chosen"], example["rejected"]]
        return all(isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in turns)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        if not isinstance(row["conversations"], list):
            raise BadRow("malformed", "`conversations` is not a list of turns")
        prompt = [_message(turn, f"conversations[{i}]") for i, turn in enumerate(row["conversations"])]
        chosen, rejected = ([_message(row[column], column)] for column in ("chosen", "rejected"))
        tools = read_tools(row.get("tools"))
        pair = pair_from_messages(without_blank_system(prompt), chosen, rejected, tools)
        return add_system(pair, row)


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise BadRow("malformed", f"`{where}` is not a {{from, value}} turn with text")
    if turn.get("from") not in ROLES:
        raise BadRow("malformed", f"`{where}.from` is {turn.get('from')!r}, not one of {', '.join(ROLES)}")
    return {"role": ROLES[turn["from"]], "content": turn["value"]}
