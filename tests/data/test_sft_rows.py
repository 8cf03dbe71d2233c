"""Preference rows of several layouts as rows for supervised finetuning."""

import json
import logging
from pathlib import Path

import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.data.sft_rows import sft_rows
from tests.tiny import pair_rows

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompt_and_chosen(tmp_path, caplog):
    rows = [*pair_rows(3), {**pair_rows(1)[0], "chosen": [{"role": "assistant", "content": None}]}]
    rows.append({**rows[0], "prompt": [*rows[0]["prompt"], {"role": "assistant", "content": "so far"}]})
    with caplog.at_level(logging.INFO, "mrpo_scale"):
        made = sft_rows(write(tmp_path, rows))
    assert made.to_list() == [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows[:3]]
    assert "3 rows for finetuning; left out: 1 " in caplog.text and "1 prefilled" in caplog.text


def test_texts_stay_texts():
    row = sft_rows(str(FIXTURES / "strings.jsonl"))[0]
    assert isinstance(row["prompt"], str) and isinstance(row["completion"], str)


def test_of_ranked_answers_the_best():
    made = sft_rows(str(FIXTURES / "nectar.jsonl"))
    assert [row["completion"][0]["content"] for row in made][:2] == ["Lima.", "Nine"]
    prompts = [json.dumps(row["prompt"]) for row in made]
    assert len(set(prompts)) == len(prompts)


def test_nothing_left(tmp_path):
    row = {**pair_rows(1)[0], "chosen": []}
    with pytest.raises(ConfigError, match="gives no row for finetuning"):
        sft_rows(write(tmp_path, [row, row]), layout="conversational")
