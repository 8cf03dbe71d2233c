"""The table of a tokenized data set: a pair a row, with its tokens for every ModelText, or why it is left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers

from mrpo_scale.data.pair_table import PairReader
from mrpo_scale.data.pairs import NO_CUTS, SIDES, BadRow, Cut, Cuts, PairTokens
from mrpo_scale.data.tokenization import ModelText, prompt_key, row_key, tokenize_pair

#: Raised whenever the same inputs would give other tokens, so that no cache of an older version is read.
SCHEME = 7
TEMPLATE_FLAGS = ("merged", "trimmed", "changed", "no_tools")  #: what a template did to a pair, per ModelText


def tokenize_row(
    row: Mapping[str, Any], *, layout: PairReader, texts: Sequence[ModelText], max_length: int | None
) -> dict[str, Any]:
    """One row of the tokenized table: columns as in ``features_of``."""
    fields = tuple(PairTokens.__dataclass_fields__)
    try:
        pair, repeated = layout.read(row)
        done = tokenize_pair(pair, texts, max_length)
    except BadRow as bad:
        tokens: dict[str, list[int]] = {f"{field}_{i}": [] for i in range(len(texts)) for field in fields}
        flags = {f"{flag}_{i}": False for i in range(len(texts)) for flag in TEMPLATE_FLAGS}
        row_keys: dict[str, Any] = {"row_key_0": 0, "row_key_1": 0, "prompt_key": 0, "repeats_prompt": False}
        row_keys |= {f"remarks_{i}": [] for i in range(len(texts))}
        row_keys |= {f"largest_id_{i}": -1 for i in range(len(texts))}
        return {"reason": bad.reason, "detail": bad.detail, **row_keys, **_columns(NO_CUTS), **flags, **tokens}
    halves = np.frombuffer(row_key(done.pair, done.cuts, done.whole), dtype="<i8").tolist()
    return {
        "reason": "",
        "detail": "",
        "row_key_0": halves[0],
        "row_key_1": halves[1],
        "prompt_key": prompt_key(done.whole),
        "repeats_prompt": repeated,
        **{f"remarks_{i}": words for i, words in enumerate(done.remarks)},
        **{
            f"largest_id_{i}": max([*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids], default=-1)
            for i, pair in enumerate(done.tokens)
        },
        **_columns(done.cuts),
        **{f"{flag}_{i}": value for flag in TEMPLATE_FLAGS for i, value in enumerate(getattr(done, flag))},
        **{f"{field}_{i}": ids for i, tokens in enumerate(done.tokens) for field, ids in vars(tokens).items()},
    }


def _columns(cuts: Cuts) -> dict[str, int]:
    """Messages and characters that are left of each response. No messages: it was not cut; -1 characters: to the end of a turn."""
    columns = {}
    for side, cut in zip(SIDES, cuts, strict=True):
        columns[f"{side}_messages"] = 0 if cut is None else cut.messages
        columns[f"{side}_chars"] = -1 if cut is None or cut.characters is None else cut.characters
    return columns


def cuts_of(stored: Mapping[str, Any]) -> Cuts:
    """What ``_columns`` made of the cuts of a row, read back."""
    kept = ((stored[f"{side}_messages"], stored[f"{side}_chars"]) for side in SIDES)
    chosen, rejected = (
        Cut(messages, None if characters < 0 else characters) if messages else None for messages, characters in kept
    )
    return chosen, rejected


def features_of(num_texts: int) -> datasets.Features:
    """Columns of the tokenized table, fixed so that a first block of bad rows does not decide their types."""
    columns: dict[str, Any] = {"reason": datasets.Value("string"), "detail": datasets.Value("string")}
    columns |= {key: datasets.Value("int64") for key in ("row_key_0", "row_key_1", "prompt_key")}
    columns |= {"repeats_prompt": datasets.Value("bool")}
    columns |= {f"{side}_{what}": datasets.Value("int64") for side in SIDES for what in ("messages", "chars")}
    for i in range(num_texts):
        columns |= {f"remarks_{i}": datasets.List(datasets.Value("string"))}
        columns |= {f"largest_id_{i}": datasets.Value("int32")}  # so that no start reads the tokens of every row
        columns |= {f"{flag}_{i}": datasets.Value("bool") for flag in TEMPLATE_FLAGS}
        columns |= {f"{field}_{i}": datasets.List(datasets.Value("int32")) for field in PairTokens.__dataclass_fields__}
    return datasets.Features(columns)


def table_fingerprint(
    rows: datasets.Dataset, layout: PairReader, texts: Sequence[ModelText], max_length: int | None
) -> str:
    """Of everything that the tokenized table depends on. It names the cache file, so a stale one is never read."""
    parts = [
        SCHEME,
        [transformers.__version__, tokenizers.__version__],
        rows._fingerprint,
        layout.name,
        layout.settings,
        max_length,
        [[text.name, text.fingerprint(), text.max_context] for text in texts],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
