"""nvidia/HelpSteer and HelpSteer2: single answers with scores; the rows of one prompt are compared with each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts.base import RankedLayout, check_columns, number
from mrpo_scale.data.messages import Message, read_text
from mrpo_scale.data.pairs import BadRow
from mrpo_scale.data.ranking import Answer, Comparison

# HelpSteer2 writes later turns into the prompt: "first\n<extra_id_1>Assistant\nanswer\n<extra_id_1>User\nsecond".
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n?")
ROLES = {"User": "user", "Assistant": "assistant"}


class HelpSteer(RankedLayout):
    """Rows with the same prompt belong together, next to each other or not. The score is the sum of ``score_columns``."""

    name = "helpsteer"
    columns = ("prompt", "response")
    describe = (
        "`prompt` and `response` strings, one answer a row, beside a number `helpfulness` (or other `score_columns`)"
    )
    group_by = "prompt"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if self.missing(columns) or not all(isinstance(example[column], str) for column in self.columns):
            return False
        return number(example.get("helpfulness")) is not None

    def check(self, columns: set[str], options: PairOptions) -> None:
        check_columns(options.score_columns, columns, "score_columns")

    def read(self, rows: Sequence[Mapping[str, Any]], options: PairOptions) -> Comparison:
        prompt = _turns(read_text(rows[0]["prompt"], "prompt"))
        answers = []
        for i, row in enumerate(rows):
            scores = [number(row[column]) for column in options.score_columns]
            given = [score for score in scores if score is not None]
            score = sum(given) if len(given) == len(scores) else None
            answers.append(Answer(row["response"], score, row=i))
        return Comparison(prompt, answers, by="score")


def _turns(prompt: str) -> list[Message]:
    first, *pieces = TURN.split(prompt)
    turns = [{"role": "user", "content": first}]
    turns += [{"role": ROLES[who], "content": text} for who, text in zip(pieces[::2], pieces[1::2], strict=True)]
    if turns[-1]["role"] == "assistant":
        raise BadRow("malformed", "`prompt` ends with an assistant turn")
    return turns
