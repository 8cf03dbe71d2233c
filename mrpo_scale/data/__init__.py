"""Preference data: rows of any supported layout become PreferencePairs, the same text for every model."""

from __future__ import annotations

from mrpo_scale.data.layouts import LAYOUTS, Layout
from mrpo_scale.data.loading import find_layout, load_rows
from mrpo_scale.data.messages import merge_turns
from mrpo_scale.data.pairs import BadRow, PreferencePair

__all__ = ["LAYOUTS", "BadRow", "Layout", "PreferencePair", "find_layout", "load_rows", "merge_turns"]
