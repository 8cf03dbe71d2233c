"""Instructions with two answers as plain text: Intel's and argilla's Orca pairs, distilabel's math pairs, Alpaca-style rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.layouts.strings import Strings
from mrpo_scale.data.messages import add_system, read_text, read_tools
from mrpo_scale.data.pairs import BadRow, PreferencePair

QUESTIONS = ("question", "instruction", "input")


class Orca(Layout):
    """A conversation: the ``system`` column, where there is one, then the question. ``input`` beside an instruction is its context.

    A ``system`` column makes prompt/chosen/rejected strings such a set too: as raw strings they would lose the system turn.
    """

    name = "orca"
    columns = ("question|instruction|input|prompt", "chosen|chosen_response", "rejected|rejected_response")
    describe = "strings: a `question`, `instruction` or `input` (or `prompt` beside `system`), and two answers"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if self.missing(columns) or Strings().matches(columns, example):
            return False
        if not columns & set(QUESTIONS) and "system" not in columns:
            return False
        return all(isinstance(value, str) for value in (_question(example), *_answers(example)))

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        if row.get("status") == "tie":  # argilla's verdict on Intel's pairs
            raise BadRow("tied_scores", "`status` is tie")
        prompt = [{"role": "user", "content": read_text(_question(row), "question")}]
        chosen, rejected = _answers(row)
        pair = PreferencePair(
            prompt, read_text(chosen, "chosen"), read_text(rejected, "rejected"), read_tools(row.get("tools"))
        )
        return add_system(pair, row)


def join_input(instruction: Any, context: Any) -> Any:
    """An Alpaca instruction and its ``input``, which may be empty, as one text."""
    return f"{instruction}\n{context}" if isinstance(instruction, str) and context else instruction


def _question(row: Mapping[str, Any]) -> Any:
    if "instruction" in row and "question" not in row:
        return join_input(row["instruction"], row.get("input"))
    return next((row[column] for column in (*QUESTIONS, "prompt") if column in row), None)


def _answers(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row.get("chosen", row.get("chosen_response")), row.get("rejected", row.get("rejected_response"))
