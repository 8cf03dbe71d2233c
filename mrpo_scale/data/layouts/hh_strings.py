"""Anthropic's HH format: both sides are whole transcripts, ``\\n\\nHuman: ...\\n\\nAssistant: ...``, as plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import Message, read_text, split_conversations
from mrpo_scale.data.pairs import BadRow, PreferencePair

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


class HHStrings(Layout):
    """The turns that both transcripts share are the prompt. Turns, not characters: two responses may well begin alike."""

    name = "hh_strings"
    columns = ("chosen", "rejected")
    describe = "transcripts that begin with `\\n\\nHuman:`, as strings, and no `prompt`"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if not set(self.columns) <= columns or "prompt" in columns:
            return False
        return all(isinstance(example[column], str) and TURN.match(example[column]) for column in self.columns)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        chosen, rejected = (read_transcript(read_text(row[column], column), column) for column in self.columns)
        return split_conversations(chosen, rejected)


def read_transcript(transcript: str, column: str) -> list[Message]:
    """The turns of ``Human: ...\\n\\nAssistant: ...``. Raises BadRow where it begins with anything else."""
    before, *pieces = TURN.split(transcript)
    if before.strip():
        raise BadRow("malformed", f"`{column}` has text before its first `Human:` or `Assistant:`")
    return [
        {"role": ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
