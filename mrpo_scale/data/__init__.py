"""Preference data: rows of any supported layout become PreferencePairs, the same text for every model."""

from __future__ import annotations

from mrpo_scale.config.data_keys import DatasetSpec, PairOptions, parse_datasets
from mrpo_scale.data.layouts import LAYOUTS, AnyLayout, Layout, RankedLayout
from mrpo_scale.data.loading import find_layout, load_rows
from mrpo_scale.data.messages import merge_turns
from mrpo_scale.data.pair_table import as_pairs
from mrpo_scale.data.pairs import BadRow, PreferencePair

__all__ = [
    "LAYOUTS",
    "AnyLayout",
    "BadRow",
    "DatasetSpec",
    "Layout",
    "PairOptions",
    "PreferencePair",
    "RankedLayout",
    "as_pairs",
    "find_layout",
    "load_rows",
    "merge_turns",
    "parse_datasets",
]
