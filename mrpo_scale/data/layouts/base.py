"""What a layout is: how one data set format is recognised and read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.messages import check_text_only, read_template_kwargs
from mrpo_scale.data.pairs import BadRow, PreferencePair
from mrpo_scale.data.ranking import Comparison

#: Where data sets keep the scores behind `chosen` and `rejected`: TRL and HuggingFaceH4 first, then argilla's spellings.
SCORE_COLUMNS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


class AnyLayout(ABC):
    """One data set format. Stateless: a layout travels to worker processes and its name stands for it in cache keys."""

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  #: the columns it cannot do without; `a|b` is either
    describe: ClassVar[str]  #: what those columns hold, for error messages

    @abstractmethod
    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        """Whether a data set with these columns, of which ``example`` is one row, is in this layout."""

    def missing(self, columns: set[str]) -> list[str]:
        """Those of ``columns`` of this layout that a data set with these columns lacks."""
        return [needed for needed in self.columns if not columns & set(needed.split("|"))]


class Layout(AnyLayout):
    """One row is one pair."""

    def to_pair(self, row: Mapping[str, Any]) -> PreferencePair:
        """Read one row.

        Raises:
            BadRow: this row is not what the layout promises, though others may be; ``not_text``; ``contradictory_scores`` when the
                row's own scores say that the rejected response is the better one. Equal scores are no contradiction.
        """
        check_text_only(row)
        for chosen, rejected in SCORE_COLUMNS:
            better, worse = number(row.get(chosen)), number(row.get(rejected))
            if better is not None and worse is not None and better < worse:
                raise BadRow("contradictory_scores", f"`{chosen}` {better:g} is below `{rejected}` {worse:g}")
        return replace(self.read(row), chat_template_kwargs=read_template_kwargs(row.get("chat_template_kwargs")))

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> PreferencePair:
        """The pair of one row, but for what its ``chat_template_kwargs`` say. Raises BadRow."""


class RankedLayout(AnyLayout):
    """Rows hold answers, ranked or scored, of which pairs are made: 0 to n from one row, or one from several rows."""

    group_by: ClassVar[str | None] = (
        None  #: the column by which rows belong together; None: each row is a prompt of its own
    )

    @abstractmethod
    def read(self, rows: Sequence[Mapping[str, Any]], options: PairOptions) -> Comparison:
        """All answers to one prompt. Raises BadRow."""

    def check(self, columns: set[str], options: PairOptions) -> None:
        """Raises ConfigError where ``options`` do not fit these columns."""


def number(value: Any) -> float | None:
    """A score or rank as a float; None where it is none. Numbers as text count."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


def check_columns(wanted: Sequence[str], columns: set[str], key: str) -> None:
    for column in wanted:
        if column not in columns:
            raise ConfigError(
                f"`{key}: {' '.join(wanted)}`: the data set has no column `{column}`; it has {', '.join(sorted(columns))}."
            )
