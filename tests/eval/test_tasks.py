"""lm-evaluation-harness on a saved folder, with a task from a local file and no hub: its number is the one computed by hand."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import train_main
from mrpo_scale.eval.config import EvalConfig
from mrpo_scale.eval.tasks import find_tasks
from tests.tiny import WORDS, pair_rows, write_models
from tests.tools import require_module

require_module("lm_eval", "pip install 'mrpo-scale[eval]'")

ROOT = Path(__file__).parents[2]
TASK = """task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def documents(count):
    """Choices of 1 to 4 words, so that accuracy by log-prob and by log-prob per character differ."""
    rng = random.Random(0)

    def words(most):
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [{"q": words(6), "choices": [words(4) for _ in range(3)], "gold": rng.randrange(3)} for _ in range(count)]


@torch.no_grad()
def by_hand(folder, docs):
    """(accuracy of the likeliest choice, of the likeliest per character)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right, right_per_character = 0, 0
    for doc in docs:
        context = tokenizer(f"Question: {doc['q']}\nAnswer:")["input_ids"]
        scores = []
        for choice in doc["choices"]:
            ids = context + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logps[t - 1, ids[t]].item() for t in range(len(context), len(ids))))
        per_character = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
        right += scores.index(max(scores)) == doc["gold"]
        right_per_character += per_character.index(max(per_character)) == doc["gold"]
    return right / len(docs), right_per_character / len(docs)


def evaluate_offline(tmp_path, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/eval.py"), *words],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
        },
        capture_output=True,
        text=True,
    )


def trained(folders, tmp_path):
    """A folder as `mrpo train` leaves it, after two steps."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(8)))
    train_main(
        [
            *("--model_name_or_path", folders["llama"], "--ref_models", folders["qwen2"], "--use_cpu", "true"),
            *("--dataset_name", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "trained")),
            *("--max_steps", "2", "--learning_rate", "1e-2", "--save_strategy", "no", "--report_to", "none"),
        ]
    )
    return str(tmp_path / "trained")


@pytest.mark.processes
@pytest.mark.slow
def test_the_harness_says_what_a_hand_computation_says(tmp_path):
    """A folder that `mrpo train` saved and one of another architecture, 40 documents."""
    folders, docs = write_models(tmp_path), documents(40)
    folders["trained"] = trained(folders, tmp_path)
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=tmp_path / "docs.jsonl"))
    words = ["--include_path", "tasks", "--output", "out.json", "--task_batch_size", "7"]
    done = evaluate_offline(
        tmp_path, "--model", folders["trained"], folders["gpt_neox"], "--tasks", "local_choice", *words
    )
    assert done.returncode == 0, done.stderr
    assert "local_choice acc_norm" in done.stdout
    results = json.loads((tmp_path / "out.json").read_text())["tasks"]
    for name in ("trained", "gpt_neox"):
        accuracy, per_character = by_hand(folders[name], docs)
        assert accuracy != per_character, "the two metrics must be told apart"
        assert results[name]["local_choice"]["acc"] == pytest.approx(accuracy, abs=1e-12)
        assert results[name]["local_choice"]["acc_norm"] == pytest.approx(per_character, abs=1e-12)


@pytest.mark.slow
def test_the_tasks_that_the_documentation_names_exist():
    """Their data sets are on the hub, so they cannot be run here; the harness knows all of them, and says which it does not."""
    named = ["gsm8k,truthfulqa_mc2,hellaswag,mmlu,arc_easy,winogrande", "no_such_task"]
    with pytest.raises(ConfigError, match="has no task `no_such_task`"):
        find_tasks(EvalConfig(model=["m"], tasks=named))
