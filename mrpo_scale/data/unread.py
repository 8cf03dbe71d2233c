"""The columns of a data set that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import datasets

from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts import AnyLayout, Layout, RankedLayout
from mrpo_scale.data.pair_table import FEATURES
from mrpo_scale.data.pairs import BadRow
from mrpo_scale.data.remarks import Remark

_LOOKED_AT = 10  #: rows; bad ones among them are read up to what is wrong


class _Watched(Mapping[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: Mapping[str, Any], asked: set[str]) -> None:
        self._row, self._asked = row, asked

    def __getitem__(self, column: str) -> Any:
        self._asked.add(column)
        return self._row[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def unread_columns(rows: datasets.Dataset, layout: AnyLayout, options: PairOptions) -> list[Remark]:
    """The columns that reading the first rows does not ask for; said in one remark, if there are any."""
    if rows.features == FEATURES:  # a mix, of whose sets it was said when they were read
        return []
    asked: set[str] = set()
    for row in rows.with_format(None).select(range(min(_LOOKED_AT, len(rows)))):
        watched = _Watched(row, asked)
        with suppress(BadRow):
            if isinstance(layout, Layout):
                layout.to_pair(watched)
            elif isinstance(layout, RankedLayout):
                asked.add("chat_template_kwargs")  # which making pairs asks for
                layout.read([watched], options)
    unread = [f"`{column}`" for column in rows.column_names if column not in asked]
    return [Remark(f"unread:{', '.join(unread)}", 0, {})] if unread else []
