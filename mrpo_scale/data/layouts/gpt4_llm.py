"""GPT-4-LLM's comparison data: an Alpaca instruction and answers that GPT-4 scored, in the three forms they are passed on in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.config.data_keys import PairOptions
from mrpo_scale.data.layouts.base import RankedLayout, number
from mrpo_scale.data.layouts.orca import join_input
from mrpo_scale.data.messages import read_text
from mrpo_scale.data.pairs import BadRow
from mrpo_scale.data.ranking import Answer, Comparison

# The Alpaca prompt around an instruction: the chat templates of the models take its place.
ALPACA = re.compile(
    r"Below is an instruction that describes a task.*?### Instruction:\n(.*?)"
    r"(?:\n\n### Input:\n(.*?))?(?:\n\n### Response:\s*)?",
    re.DOTALL,
)


class GPT4LLM(RankedLayout):
    """Answers with scores (``responses_and_scores``), a list from best to worst (``output``), or two (``completion_a`` wins)."""

    name = "gpt4_llm"
    columns = ("user_input|instruction", "responses_and_scores|output|completion_a")
    describe = (
        "an instruction (or `user_input`) beside `responses_and_scores` [{response, score}], or `output` [best, ..., worst], or "
        "`completion_a` and the worse `completion_b`"
    )

    def matches(self, columns: set[str], example: Mapping[str, Any]) -> bool:
        return not self.missing(columns) and isinstance(_prompt(example), str) and bool(_answers(example))

    def read(self, rows: Sequence[Mapping[str, Any]], options: PairOptions) -> Comparison:
        (row,) = rows
        text = read_text(_prompt(row), "instruction")
        wrapped = ALPACA.fullmatch(text)
        if wrapped:
            text = join_input(wrapped[1], wrapped[2])
        answers = _answers(row)
        if not answers:
            raise BadRow("malformed", "no list of answers that says which is better")
        by = "score" if isinstance(row.get("responses_and_scores"), list) else "rank"
        return Comparison([{"role": "user", "content": text}], answers, by=by)  # type: ignore[arg-type]


def _prompt(row: Mapping[str, Any]) -> Any:
    return row["user_input"] if "user_input" in row else join_input(row.get("instruction"), row.get("input"))


def _answers(row: Mapping[str, Any]) -> list[Answer]:
    """Empty where the row has none of the three forms."""
    scored, ordered = row.get("responses_and_scores"), row.get("output")
    if isinstance(scored, list):
        if not all(isinstance(item, dict) and {"response", "score"} <= set(item) for item in scored):
            return []
        return [Answer(item["response"], number(item["score"])) for item in scored]
    if row.get("completion_a") is not None and row.get("completion_b") is not None:
        ordered = [row["completion_a"], row["completion_b"]]
    if not isinstance(ordered, list) or len(ordered) < 2:
        return []
    return [Answer(text, -float(rank)) for rank, text in enumerate(ordered, start=1)]
