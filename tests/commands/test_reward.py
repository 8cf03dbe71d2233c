"""`mrpo reward`: what TRL's RewardTrainer is given and what is saved. Most of it needs the extra `rlhf`, which CI lacks."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.commands.reward import RESULTS, reward
from mrpo_scale.references.reward import RewardModel
from tests.references.test_reward import write_reward
from tests.tiny import pair_rows, write_models

HAS_TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl is not installed: pip install 'mrpo-scale[rlhf]'")
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models; and 16 + 16 pairs, `yes` chosen and `no` rejected, one of them longer than MAX_LENGTH."""
    root = tmp_path_factory.mktemp("world")
    rows = pair_rows(32)
    for row in rows:
        row["chosen"][0]["content"] = "yes yes yes"
        row["rejected"][0]["content"] = "no no no"
    rows[3]["chosen"][0]["content"] = "yes " * 60
    (root / "data").mkdir()
    for split, part in (("train", rows[:16]), ("test", rows[16:])):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return {**write_models(root), "data": str(root / "data"), "rows": rows}


def run(model, world, folder, *words):
    keys = (
        f"--max_length {MAX_LENGTH} --use_cpu --report_to none --save_strategy no --disable_tqdm true --logging_steps 1"
    )
    argv = ["--model_name_or_path", model, "--dataset_name", world["data"], "--output_dir", str(folder)]
    reward([*argv, *keys.split(), "--per_device_train_batch_size", "16", *words])
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return log, json.loads((Path(folder) / RESULTS).read_text())


@needs_trl
def test_the_loss_is_bradley_terry_on_our_tokens_and_cuts(world, tmp_path):
    """A learning rate of 0, so that what is saved is what the loss was of."""
    log, results = run(world["llama"], world, tmp_path / "a", "--max_steps", "1", "--learning_rate", "0")
    assert results["pairs"] == 16 and results["held_out"]["eval"]["pairs"] == 16  # the long one is cut, not left out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (model.config.num_labels, model.config.pad_token_id, model.dtype) == (1, 0, torch.float32)

    def score(row, side):
        text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False).removesuffix("\n")
        return model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_LENGTH]])).logits[0, 0]

    with torch.no_grad():
        margins = [score(row, "chosen") - score(row, "rejected") for row in world["rows"]]
    assert log[0]["loss"] == pytest.approx(-logsigmoid(torch.stack(margins[:16])).mean().item(), abs=1e-5)
    held_out = torch.stack(margins[16:])
    assert results["held_out"]["eval"]["accuracy"] == (held_out > 0).float().mean().item()
    assert results["held_out"]["eval"]["margin"] == pytest.approx(held_out.mean().item(), abs=1e-6)

    # The new head comes from the seed; and a classifier goes on with the head it has.
    again, _ = run(world["llama"], world, tmp_path / "b", "--max_steps", "1", "--learning_rate", "0")
    other, _ = run(world["llama"], world, tmp_path / "c", "--max_steps", "1", "--learning_rate", "0", "--seed", "1")
    assert again[0]["loss"] == log[0]["loss"] != other[0]["loss"]
    log, results = run(str(tmp_path / "a"), world, tmp_path / "d", "--max_steps", "20", "--learning_rate", "3e-3")
    assert log[0]["loss"] == pytest.approx(again[0]["loss"], abs=1e-5) and log[-2]["loss"] < 0.3
    assert results["held_out"]["eval"]["accuracy"] > 0.8
    prompt, trained = world["rows"][0]["prompt"], RewardModel.load(str(tmp_path / "d"), device=torch.device("cpu"))
    good, bad = trained.scores([prompt] * 2, ["yes yes yes", "no no no"])
    assert good > bad


@needs_trl
@pytest.mark.parametrize(
    "model, words, message",
    [
        ("two", [], "has 2 labels, and a reward is one number"),
        ("llama", ["--use_peft"], "`use_peft: true` is not supported by `mrpo reward`"),
        ("llama", ["--center_rewards_coefficient=-1"], "`center_rewards_coefficient: -1.0` must be at least 0"),
    ],
)
def test_refused_before_weights_load(world, tmp_path, model, words, message):
    folder = write_reward(tmp_path / "two", world["qwen2"], 2) if model == "two" else world[model]
    with pytest.raises(ConfigError, match=message):
        run(folder, world, tmp_path / "out", *words)


@needs_trl
def test_a_policys_folder_is_left_alone(world, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a policy that `mrpo train` made"):
        run(world["llama"], world, tmp_path)


@pytest.mark.skipif(HAS_TRL, reason="trl is installed")
def test_without_trl_it_says_what_to_install(capsys):
    with pytest.raises(SystemExit) as left:
        run_command("reward", ["--config", "quickstart", "--use_cpu"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: `mrpo reward`") and "pip install 'mrpo-scale[rlhf]'" in line
