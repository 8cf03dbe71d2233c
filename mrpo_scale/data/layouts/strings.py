"""TRL's standard format: prompt, chosen and rejected are plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.messages import read_text
from mrpo_scale.data.pairs import PreferencePair


class Strings(Layout):
    """Every model reads the prompt as it is, without a chat template."""

    name = "strings"
    columns = ("prompt", "chosen", "rejected")
    describe = "all three plain strings"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if self.missing(columns) or "system" in columns:  # with a system turn it is a conversation: see orca.py
            return False
        return all(isinstance(example[column], str) for column in self.columns)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        prompt, chosen, rejected = (read_text(row[column], column) for column in self.columns)
        return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)
