"""The pair table: pairs made of ranked answers, or of several data sets, as an Arrow table on disk with one pair a row.

A set whose rows are pairs is read row by row and needs none. Ranked answers and mixes do: there one row gives several pairs, or
several rows give one, and sets of different columns stand side by side. The table keeps the text, or the reason why there is none,
and the numbers of the rows it comes from, so that messages name the rows of the user's own data set.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mrpo_scale.base.atomic_files import is_about_disk
from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts.base import AnyLayout, Layout, RankedLayout
from mrpo_scale.data.messages import (
    Message,
    check_text_only,
    pair_from_messages,
    read_template_kwargs,
    read_text,
)
from mrpo_scale.data.pairs import BadRow, PreferencePair
from mrpo_scale.data.ranking import choose_pairs
from mrpo_scale.data.repeated_prompt import repeats_prompt, without_prompt

#: Raised whenever the same rows would give other pairs, so that no table of an older version is read.
SCHEME = 3

#: What to do where the disk is full on which rows, pairs and tokens are kept.
MAKE_ROOM = "Make room, or name a folder on another disk with the variable HF_DATASETS_CACHE, and start again."
_PARTS = ("prompt", "chosen", "rejected")
_TEXT = (*_PARTS, "tools", "chat_template_kwargs", "reason", "detail", "source")
FEATURES = datasets.Features(
    {
        **{column: datasets.Value("string") for column in _TEXT},
        "messages": datasets.List(
            datasets.Value("string")
        ),  # those of prompt, chosen and rejected that are the JSON of messages
        "rows": datasets.List(datasets.Value("int64")),
    }
)


class PairTable(Layout):
    """How the table itself is read. It is not among ``LAYOUTS``: nobody brings one."""

    name = "pair_table"
    columns = tuple(FEATURES)
    describe = "made by pair_table()"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        return columns == set(self.columns)

    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        if row["reason"]:
            raise BadRow(row["reason"], row["detail"])
        parts = {name: json.loads(row[name]) if name in row["messages"] else row[name] for name in _PARTS}
        return PreferencePair(**parts, tools=json.loads(row["tools"]) if row["tools"] else None)


class PairReader:
    """How every row of a data set whose rows are pairs is read: its layout, and what the keys say of all pairs.

    Attributes:
        name: the layout's.
        strips: whether prompts are taken off responses that begin with them.
        settings: what else the pairs depend on.
    """

    def __init__(self, layout: Layout, options: PairOptions) -> None:
        self._layout = layout
        self.name = layout.name
        self.strips = options.repeated_prompt == "strip"
        self.settings = [self.strips, options.chat_template_kwargs]
        self._kwargs = json.loads(options.chat_template_kwargs)

    def to_pair(self, row: Mapping[str, Any]) -> PreferencePair:
        """The row's pair. Raises BadRow, see Layout.to_pair."""
        return self.read(row)[0]

    def read(self, row: Mapping[str, Any]) -> tuple[PreferencePair, bool]:
        """The same, and whether both responses began with their prompt."""
        pair = self._layout.to_pair(row)
        if self._kwargs:
            pair = replace(pair, chat_template_kwargs={**self._kwargs, **(pair.chat_template_kwargs or {})})
        repeated = repeats_prompt(pair)
        return without_prompt(pair) if repeated and self.strips else pair, repeated


def as_pairs(
    rows: datasets.Dataset, layout: AnyLayout, options: PairOptions, num_proc: int | None = None
) -> tuple[datasets.Dataset, PairReader]:
    """``rows`` as they are where each one is a pair, otherwise the pair table of their ranked answers; and how they are read."""
    if isinstance(layout, Layout):
        return rows, PairReader(layout, options)
    return pair_table(rows, layout, options, num_proc=num_proc), PairReader(PairTable(), options)


def pair_table(
    rows: datasets.Dataset, layout: AnyLayout, options: PairOptions, *, source: str = "", num_proc: int | None = None
) -> datasets.Dataset:
    """The pairs of ``rows`` in order, bad ones with their reason. Kept beside the files of ``rows`` and found there again.

    Args:
        source: what the set is called in messages.

    Raises:
        ConfigError: ``options`` do not fit the columns; the disk is full.
    """
    if isinstance(layout, RankedLayout):
        layout.check(set(rows.column_names), options)
    rows = rows.with_format(None)
    order, starts = _groups(rows, layout)
    parts = [SCHEME, rows._fingerprint, layout.name, asdict(options), source]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    files = rows.cache_files
    groups = datasets.Dataset.from_dict({"start": starts[:-1], "end": starts[1:]})
    try:
        return groups.map(
            _read_groups,
            batched=True,
            batch_size=100,
            fn_kwargs={"rows": rows, "order": order, "layout": layout, "options": options, "source": source},
            remove_columns=groups.column_names,
            features=FEATURES,
            num_proc=num_proc,
            # The table of group bounds lives in memory, so `datasets` would keep the result there too.
            cache_file_name=str(Path(files[0]["filename"]).parent / f"pair-table-{key}.arrow") if files else None,
            new_fingerprint=key,
            desc=f"Making pairs of {source or layout.name}",
        )
    except OSError as error:
        if not is_about_disk(error):
            raise
        raise ConfigError(f"pairs could not be written ({one_line(error)}). {MAKE_ROOM}") from error


def group_numbers(rows: datasets.Dataset, layout: AnyLayout) -> np.ndarray:
    """[rows] which prompt each row belongs to, numbered in the order in which prompts appear. Splits keep prompts whole."""
    if not isinstance(layout, RankedLayout) or layout.group_by is None:
        return np.arange(len(rows))
    column = rows.with_format(None).select_columns(layout.group_by)
    # 16 bytes a row instead of the prompts themselves.
    digests = b"".join(
        hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()
        for batch in column.iter(batch_size=1000)
        for prompt in batch[layout.group_by]
    )
    _, first, group = np.unique(np.frombuffer(digests, dtype="S16"), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def row_numbers(rows: datasets.Dataset) -> np.ndarray | None:
    """Numbers of these rows in the file they come from; None where they are all of them, in order."""
    # A selection (the held-out split of a file) keeps the numbers of the rows it selects, in a place without a public name.
    return None if rows._indices is None else rows._indices.column(0).to_numpy()


def source_of(rows: datasets.Dataset, row: int) -> dict[str, Any]:
    """Where a row of any data set given to ``prepare_pairs`` comes from: ``{row}``, with ``other_row`` where two rows make the
    pair and ``dataset`` in a mix."""
    if rows.features != FEATURES:
        indices = rows._indices
        return {"row": row if indices is None else indices.column(0)[row].as_py()}
    entry = rows.select_columns(["rows", "source"])[row]
    first, *others = entry["rows"]
    return {
        **({"dataset": entry["source"]} if entry["source"] else {}),
        "row": first,
        **({"other_row": others[0]} if others else {}),
    }


def describe_source(source: Mapping[str, Any]) -> str:
    """``row 3``, ``rows 3 and 4``, ``nectar.jsonl: row 3``."""
    where = f"rows {source['row']} and {source['other_row']}" if "other_row" in source else f"row {source['row']}"
    return f"{source['dataset']}: {where}" if "dataset" in source else where


def _groups(rows: datasets.Dataset, layout: AnyLayout) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of their groups, and where in that order each group starts, with the end of the last one."""
    groups = group_numbers(rows, layout)
    order = np.argsort(groups, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(groups))])


def _read_groups(
    batch: Mapping[str, list[int]],
    *,
    rows: datasets.Dataset,
    order: np.ndarray,
    layout: Layout | RankedLayout,
    options: PairOptions,
    source: str,
) -> dict[str, list[Any]]:
    """A block of the table; groups lie next to each other in ``order``."""
    begin, end = batch["start"][0], batch["end"][-1]
    columns = rows[order[begin:end]]
    numbers = row_numbers(rows)
    entries = []
    for start, stop in zip(batch["start"], batch["end"], strict=True):
        group = [{name: values[i - begin] for name, values in columns.items()} for i in range(start, stop)]
        places = [int(i if numbers is None else numbers[i]) for i in order[start:stop]]
        for pair, used in _pairs(layout, group, options, places[0]):
            entries.append({**_entry(pair), "source": source, "rows": [places[i] for i in used]})
    return {column: [entry[column] for entry in entries] for column in FEATURES}


def _pairs(
    layout: Layout | RankedLayout, group: Sequence[Mapping[str, Any]], options: PairOptions, number: int
) -> Iterator[tuple[PreferencePair | BadRow, list[int]]]:
    """The pairs of one row or prompt, and of which rows of the group each is made."""
    try:
        if isinstance(layout, Layout):
            yield layout.to_pair(group[0]), [0]
            return
        for row in group:
            check_text_only(row)
        given = read_template_kwargs(group[0].get("chat_template_kwargs"))
        comparison = layout.read(group, options)
    except BadRow as bad:
        yield bad, [0]
        return
    rng = random.Random(f"{options.seed} {number}")
    for (better, worse), bad_pair in choose_pairs(comparison, options.ranked_pairs, rng):
        used = list(dict.fromkeys([better.row, worse.row]))
        try:
            if bad_pair is not None:
                raise bad_pair
            yield replace(_answered(comparison.prompt, better.text, worse.text), chat_template_kwargs=given), used
        except BadRow as bad:
            yield bad, used


def _answered(prompt: list[Message], better: Any, worse: Any) -> PreferencePair:
    """The pair of two answers: texts, or lists of messages."""
    if isinstance(better, list) and isinstance(worse, list):
        return pair_from_messages(prompt, better, worse)
    return PreferencePair(prompt, read_text(better, "answer"), read_text(worse, "answer"))


def _entry(pair: PreferencePair | BadRow) -> dict[str, Any]:
    if isinstance(pair, BadRow):
        empty = dict.fromkeys((*_PARTS, "tools", "chat_template_kwargs"), "")
        return {**empty, "messages": [], "reason": pair.reason, "detail": pair.detail}
    parts = {name: getattr(pair, name) for name in _PARTS}
    return {
        **{name: part if isinstance(part, str) else _json(part) for name, part in parts.items()},
        "tools": _json(pair.tools) if pair.tools else "",
        "chat_template_kwargs": _json(pair.chat_template_kwargs) if pair.chat_template_kwargs else "",
        "messages": [name for name, part in parts.items() if not isinstance(part, str)],
        "reason": "",
        "detail": "",
    }


def _json(value: Any) -> str:
    # Arrow reads times out of strings; templates would print them with str().
    return json.dumps(value, ensure_ascii=False, default=str)
