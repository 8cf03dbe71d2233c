"""berkeley-nest/Nectar: a transcript as the prompt, and answers with ranks, 1 the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts.base import RankedLayout, number
from mrpo_scale.data.layouts.hh_strings import read_transcript
from mrpo_scale.data.messages import read_text
from mrpo_scale.data.pairs import BadRow
from mrpo_scale.data.ranking import Answer, Comparison


class Nectar(RankedLayout):
    """The prompt is ``\\n\\nHuman: ...\\n\\nAssistant: ``, or plain text. Ranks need not be consecutive, but they must differ."""

    name = "nectar"
    columns = ("prompt", "answers")
    describe = "`prompt` a string, `answers` a list of {answer, rank}"

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        if self.missing(columns) or not isinstance(example["prompt"], str):
            return False
        answers = example["answers"]
        return bool(answers) and isinstance(answers, list) and all(_is_answer(answer) for answer in answers)

    def read(self, rows: Sequence[Mapping[str, Any]], options: PairOptions) -> Comparison:
        (row,) = rows
        prompt = read_text(row["prompt"], "prompt")
        turns = read_transcript(prompt, "prompt") if prompt.lstrip().startswith("Human:") else [_user(prompt)]
        if turns[-1] == {"role": "assistant", "content": ""}:
            turns = turns[:-1]  # the `Assistant:` that asks for an answer
        if not turns or turns[-1]["role"] != "user":
            raise BadRow("malformed", "`prompt` does not end with a user turn")
        answers = row["answers"]
        if not isinstance(answers, list) or not answers or not all(_is_answer(answer) for answer in answers):
            raise BadRow("malformed", "`answers` is not a list of {answer, rank}")
        return Comparison(turns, [Answer(a["answer"], _negative(number(a["rank"]))) for a in answers], by="rank")


def _is_answer(value: Any) -> bool:
    return isinstance(value, dict) and {"answer", "rank"} <= set(value)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _negative(rank: float | None) -> float | None:
    return None if rank is None else -rank
