"""`mrpo eval` on two ranks gives the very numbers, responses and calls of one process."""

import json
from pathlib import Path

import pytest

from mrpo_scale.eval.run import run
from tests.chat_server import ChatServer, completion
from tests.tiny import pair_rows, write_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def responses(folder):
    records = [
        json.loads(line) for file in Path(folder).glob("responses-*.jsonl") for line in file.read_text().splitlines()
    ]
    return {record["key"]: record["response"] for record in records}


@pytest.mark.parametrize("shard_size", [1, 2])
def test_two_ranks_say_what_one_says(folders, tmp_path, pool2, monkeypatch, shard_size):
    """19 pairs in batches of a few: an odd number of batches, so that one rank has none at the end. Equal to the last bit."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pair_rows(19)))
    with ChatServer(lambda text, n: completion("Verdict: A")) as server:
        words = [
            *("--model", folders["llama"], folders["gpt_neox"], "--reference", folders["qwen2"]),
            *("--dataset_name", str(data), "--tokens_per_forward", "300", "--max_new_tokens", "4"),
            *("--generation_batch_size", "3", "--max_prompts", "8", "--yes"),
            *("--judge_model", "judge", "--judge_url", server.url),
        ]
        alone = run([*words, "--output_dir", str(tmp_path / "one")])
        asked = server.asked.copy()
        ranks = pool2.run(run, [*words, "--shard_size", str(shard_size), "--output_dir", str(tmp_path / "two")])
    assert ranks[0]["preference"] == ranks[1]["preference"] == alone["preference"]
    assert responses(tmp_path / "two") == responses(tmp_path / "one") and len(responses(tmp_path / "one")) == 16
    assert (tmp_path / "two" / "responses-1.jsonl").exists(), "the second rank generated its share"
    assert ranks[0]["win_rate"] == alone["win_rate"] and "win_rate" not in ranks[1]
    assert server.asked == asked + asked
