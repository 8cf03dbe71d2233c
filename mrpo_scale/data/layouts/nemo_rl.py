"""NeMo-RL's preferences: a context and ranked completions, 0 the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts.base import RankedLayout, number
from mrpo_scale.data.messages import Message, read_messages
from mrpo_scale.data.pairs import BadRow
from mrpo_scale.data.ranking import Answer, Comparison


class NeMoRL(RankedLayout):
    """Each of ``completions`` has a ``rank`` and its ``completion``, messages that answer ``context``."""

    name = "nemo_rl"
    columns = ("context|prompt", "completions")
    describe = "`context` a list of messages, `completions` a list of {rank, completion}"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        return not self.missing(columns) and _are_completions(example["completions"])

    def read(self, rows: Sequence[Mapping[str, Any]], options: PairOptions) -> Comparison:
        (row,) = rows
        column = "context" if row.get("context") is not None else "prompt"
        context, completions = row.get(column), row["completions"]
        if isinstance(context, str):
            context = [{"role": "user", "content": context}]
        if not _are_completions(completions):
            raise BadRow("malformed", "`completions` is not a list of {rank, completion}")
        answers = []
        for one in completions:
            rank = number(one["rank"])
            answers.append(Answer(_completion(one["completion"]), None if rank is None else -rank))
        return Comparison(read_messages(context, column), answers, by="rank")


def _completion(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return read_messages(value, "completion")


def _are_completions(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and {"rank", "completion"} <= set(one) for one in value)
    )
