"""The command line as a person meets it: mistakes end in one line and exit code 2 before any weights load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrpo_scale.references.live
import mrpo_scale.training.prepare
import mrpo_scale.training.trainer
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.cli import train_main
from mrpo_scale.compare.plan import Arm, Run
from mrpo_scale.compare.results import read_run
from mrpo_scale.training.held_out import HeldOutScores
from tests.distributed.jobs import Job
from tests.tiny import pair_rows, write_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def words(folders, tmp_path):
    """A command line that works: three optimizer steps of K=3."""
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(20))
    return {
        "model_name_or_path": [folders["llama"]],
        "ref_models": [folders["qwen2"], folders["gpt_neox"]],
        "dataset_name": [data],
        "held_out": ["6"],
        "output_dir": [str(tmp_path / "run")],
        "max_steps": ["3"],
        "per_device_train_batch_size": ["4"],
        "per_device_eval_batch_size": ["4"],
        "gradient_checkpointing": ["false"],
        "logging_steps": ["1"],
        "learning_rate": ["1e-3"],
        "save_strategy": ["no"],
        "report_to": ["tensorboard"],
        "use_cpu": ["true"],
    }


def argv(words):
    return [part for key, values in words.items() if values for part in (f"--{key}", *values)]


@pytest.fixture
def no_weights(monkeypatch):
    """Loading any weights is a failure: mistakes must be found before."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(mrpo_scale.training.prepare, "load_policy", fail)
    monkeypatch.setattr(mrpo_scale.references.live, "ShardedReference", fail)


def with_bad_rows(tmp_path, bad):
    rows = pair_rows(20)
    for row in rows[:bad]:
        row["rejected"] = row["chosen"]
    return write_jsonl(tmp_path / "bad.jsonl", rows)


def without_column(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "rejected"} for row in pair_rows(20)]
    return write_jsonl(tmp_path / "columns.jsonl", rows)


def with_system_turns(tmp_path):
    rows = pair_rows(20)
    for row in rows:
        row["prompt"].insert(0, {"role": "system", "content": "be brief"})
    return write_jsonl(tmp_path / "system.jsonl", rows)


def pickled_model(tmp_path, folders):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((Path(folders["llama"]) / name).read_text())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return str(folder)


def model_with_code(tmp_path, folders):
    folder = tmp_path / "custom"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_bytes((Path(folders["llama"]) / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').write('x')\n")
    return str(folder)


CASES = {
    "unknown key": (lambda t, f: {"betta": ["0.1"]}, ["unknown key `betta`", "did you mean `beta`"]),
    "negative beta": (lambda t, f: {"beta": ["-1"]}, ["`beta: -1.0`", "above 0"]),
    "weights that do not sum to 1": (lambda t, f: {"ref_weights": ["0.5", "0.2", "0.2"]}, ["ref_weights", "0.9", "to 1"]),
    "weights for fewer references": (lambda t, f: {"ref_weights": ["0.5", "0.5"]}, ["2 entries", "3 references"]),
    "missing data file": (lambda t, f: {"dataset_name": [f"{t}/none.jsonl"]}, ["dataset_name", "none.jsonl", "no such file"]),
    "missing column": (lambda t, f: {"dataset_name": [without_column(t)]}, ["column `rejected` is missing"]),
    "no safetensors": (lambda t, f: {"ref_models": [pickled_model(t, f)]}, ["no safetensors", "pytorch_model.bin"]),
    "policy without safetensors": (lambda t, f: {"model_name_or_path": [pickled_model(t, f)]}, ["policy", "no safetensors"]),
    "remote code": (lambda t, f: {"ref_models": [model_with_code(t, f)]}, ["trust_remote_code"]),
    "rejected system turn": (
        lambda t, f: {
            "dataset_name": [with_system_turns(t)],
            "ref_models": [json.dumps({"model": f["qwen2"], "system": "error"})],
        },
        ["qwen2", "system: error", "system: merge"],
    ),
    "too many bad rows": (
        lambda t, f: {"dataset_name": [with_bad_rows(t, 9)]},
        ["max_bad_rows: 0.1", "identical_responses", "raise `max_bad_rows`"],
    ),
    "a bad row under error": (
        lambda t, f: {"dataset_name": [with_bad_rows(t, 1)], "on_bad_row": ["error"]},
        ["on_bad_row: error", "identical_responses"],
    ),
    "larger shard than the world": (lambda t, f: {"ref_shard_size": ["8"]}, ["ref_shard_size: 8", "1"]),
    "a tracker that is not installed": (lambda t, f: {"report_to": ["wandb"]}, ["`report_to: wandb`", "pip install wandb"]),
    "an optimizer that is not installed": (
        lambda t, f: {"optim": ["schedule_free_adamw"]},
        ["`optim: schedule_free_adamw`", "schedulefree"],
    ),
    "Liger": (lambda t, f: {"use_liger_kernel": ["true"]}, ["`use_liger_kernel: True`"]),
    "half precision on a CPU": (lambda t, f: {"fp16": ["true"]}, ["`fp16: True`", "needs a GPU"]),
    "an evaluation on nothing": (
        lambda t, f: {"eval_strategy": ["steps"], "held_out": []},
        ["`eval_strategy: steps`", "no held-out pairs", "`held_out`"],
    ),
    "the best by a metric that is not measured": (
        lambda t, f: {"eval_strategy": ["steps"], "metric_for_best_model": ["accuracy"]},
        ["`metric_for_best_model: accuracy`", "rewards/accuracies"],
    ),
    "a schedule without its keys": (lambda t, f: {"lr_scheduler_type": ["cosine_with_min_lr"]}, ["cosine_with_min_lr", "min_lr"]),
    "a DeepSpeed config that is nowhere": (lambda t, f: {"deepspeed": ["zero9"]}, ["`deepspeed: zero9`", "zero3"]),
    "a reward model that is none, with a baseline first": (
        lambda t, f: {"objective": ["rlhf"], "ref_weights": ["uniform"], "reward_model": [f["llama"]], "baselines": ["dpo"]},
        ["not a sequence classifier", "`mrpo reward`"],
    ),
    "several mistakes": (lambda t, f: {"betta": ["1"], "sed": ["1"]}, ["`betta`", "`sed`"]),
    "shared prompt where it cannot be": (lambda t, f: {"shared_prompt": ["yes"]}, ["shared_prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_mistakes_are_one_line_before_weights_load(case, words, folders, tmp_path, capsys, no_weights):
    change, expected = CASES[case]
    with pytest.raises(SystemExit) as stop:
        train_main(argv({**words, **change(tmp_path, folders)}))
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and all(word in error[0] for word in expected), error
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_run_from_the_command_line(words, folders, tmp_path, capsys):
    """Few bad rows are skipped, counted and listed; the saved folder is the source's, trained."""
    words = {**words, "dataset_name": [with_bad_rows(tmp_path, 1)], "held_out": ["4"], "eval_on_start": ["true"]}
    train_main(argv(words))
    printed = capsys.readouterr().out
    assert "MRPO (K=3)" in printed and "base" in printed and "reward margin" in printed
    folder = tmp_path / "run"
    listed = [json.loads(line) for file in folder.glob("bad_rows_*.jsonl") for line in file.read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in listed] == [(0, "identical_responses")]
    saved, source = load_file(folder / "model.safetensors"), load_file(Path(folders["llama"]) / "model.safetensors")
    assert saved.keys() == source.keys()
    assert {k: (v.dtype, v.shape) for k, v in saved.items()} == {k: (v.dtype, v.shape) for k, v in source.items()}
    assert not all(saved[k].equal(source[k]) for k in saved)
    before, after = (json.loads((Path(p) / "config.json").read_text()) for p in (folders["llama"], folder))
    assert before == after
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "one"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    for name in ("README.md", "curves.png", "trainer_state.json", "generation_config.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    recipe = yaml.safe_load((folder / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    assert recipe["ref_models"] == ["qwen2", "gpt_neox"] and recipe["max_steps"] == 3 and "output_dir" not in recipe
    assert "finished" in (folder / "report.html").read_text()
    assert list(folder.glob("runs/**/events.out.tfevents*")), "TensorBoard is on by default"
    last = json.loads((folder / "trainer_state.json").read_text())["log_history"][-1]
    assert {
        "eval_rewards/accuracies",
        "eval_anchor/rewards/margins",
        "eval_references/qwen2/rewards/accuracies",
    } <= last.keys()


def test_a_run_that_stops_leaves_its_report(words, tmp_path, monkeypatch):
    """The second evaluation fails, whatever the reason: report.html has the first one and says why there is no more."""
    evaluate = mrpo_scale.training.trainer.MRPOTrainer.evaluate

    def fails_later(trainer, *args, **kwargs):
        if trainer.state.global_step >= 2:
            raise TrainingError("the disk is on fire")
        return evaluate(trainer, *args, **kwargs)

    monkeypatch.setattr(mrpo_scale.training.trainer.MRPOTrainer, "evaluate", fails_later)
    with pytest.raises(SystemExit) as stop:
        train_main(argv({**words, "eval_strategy": ["steps"], "eval_steps": ["1"]}))
    assert stop.value.code == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "stopped after step 2: the disk is on fire" in page and "eval_rewards/margins" in page
    assert not (tmp_path / "run" / "trainer_state.json").exists(), "that would say that the run is finished"


@pytest.mark.processes
def test_exit_code_through_the_launcher(words, tmp_path):
    """Two launched processes, wrong key: the launcher reports failure and the line is there once."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",  # two processes; `--cpu --num_processes 2` starts one
        str(ROOT / "launch/accelerate/cpu_zero3.yaml"),
        str(ROOT / "launch/train.py"),
    ]
    done = subprocess.run(
        [*command, *argv({**words, "betta": ["1"]})],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,  # the configuration names its files from here
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: unknown key `betta`; did you mean `beta`?") == 1


def test_a_process_that_does_not_see_its_peers_stops(jobs, tmp_path):
    """WORLD_SIZE says two, nothing tells this process which one it is: it must not train alone."""
    ((ended,),) = jobs.run(Job(["train", "--config", "quickstart", "--output_dir", tmp_path], env={"WORLD_SIZE": "2"}))
    assert ended.status == 2
    assert "WORLD_SIZE=2 processes but this process sees a world of 1" in ended.err


# An ordinary TRL DPO recipe; {model}, {pairs} and the last lines stand in for hub names and make it short.
TRL_RECIPE = """
model_name_or_path: {model}
dataset_name: {pairs}
dtype: float32
attn_implementation: sdpa
learning_rate: 5.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
gradient_checkpointing: true
beta: 0.05
loss_type: [sigmoid]
max_length: 512
truncation_mode: keep_start
eval_strategy: steps
eval_steps: 2
logging_steps: 1
use_peft: false
precompute_ref_log_probs: false
report_to: none
save_strategy: "no"
output_dir: {output}
held_out: 4
use_cpu: true
"""


def test_a_trl_recipe_with_one_line_added_runs(folders, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(16))
    recipe = tmp_path / "dpo.yaml"
    text = TRL_RECIPE.format(model=folders["llama"], pairs=data, output=tmp_path / "run")
    recipe.write_text(text + f"ref_models: [{folders['qwen2']}, {folders['gpt_neox']}]\n")
    train_main(["--config", str(recipe)])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # 12 pairs, 4 per step
    assert "references/gpt_neox/weight" in state["log_history"][0]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_table_card_and_comparison_speak_of_the_step_that_is_saved(words, tmp_path, capsys):
    words |= {"eval_strategy": ["steps"], "eval_steps": ["1"], "save_strategy": ["steps"], "save_steps": ["1"]}
    words |= {"load_best_model_at_end": ["true"], "metric_for_best_model": ["loss"], "greater_is_better": ["true"]}
    train_main(argv(words))
    folder = tmp_path / "run"
    state = json.loads((folder / "trainer_state.json").read_text())
    logged = {entry["step"]: entry for entry in state["log_history"] if "eval_loss" in entry}
    best = logged[state["best_global_step"]]
    assert state["best_global_step"] < 3 and sorted(logged) == [1, 2, 3]
    facts = json.loads((folder / "run.json").read_text())
    row, run = facts["rows"][-1], read_run(Run(Arm("MRPO", "mrpo", ()), 0, folder, (), {}))
    assert (
        row["reward_margin"] == run.reward_margin == best["eval_rewards/margins"] != logged[3]["eval_rewards/margins"]
    )
    assert facts["settings"]["weights of step"] == state["best_global_step"]
    assert row["ranking_accuracy"] == run.accuracy == best["eval_logps/accuracies"]
    assert f"{row['reward_margin']:+.3f}" in capsys.readouterr().out
    means = HeldOutScores.load(folder / "eval_logps.npz").policy_logps_N2.mean(0)
    assert means[0] == pytest.approx(best["eval_logps/chosen"], rel=1e-6)
