"""What a layout is: how one data set format is recognised and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from mrpo_scale.data.pairs import PreferencePair


class Layout(ABC):
    """One data set format. Stateless: a layout travels to worker processes and its name stands for it in cache keys."""

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]  #: the columns it cannot do without
    describe: ClassVar[str]  #: what those columns hold, for error messages

    @abstractmethod
    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        """Whether a data set with these columns, of which ``example`` is one row, is in this layout."""

    @abstractmethod
    def to_pair(self, row: Mapping[str, Any]) -> PreferencePair:
        """Read one row.

        Raises:
            BadRow: this row is not what the layout promises, though others may be.
        """
