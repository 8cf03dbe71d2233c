"""`mrpo compare` through the real command line, with tiny models: one scoring, every run a process, resumed, failures named."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.cli import run_command
from mrpo_scale.compare.command import compare
from mrpo_scale.compare.forks import Forked
from mrpo_scale.compare.processes import command, start, tail
from tests.tiny import pair_rows, write_models


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a recipe of K=2, two optimizer steps of two pairs, and a baseline that a comparison must not run."""
    root = tmp_path_factory.mktemp("world")
    folders = write_models(root / "models")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(14)))
    (root / "tiny.yaml").write_text(
        f"""
model_name_or_path: {folders["llama"]}
ref_models: [{{model: {folders["qwen2"]}, name: other}}]
dataset_name: {root}/pairs.jsonl
baselines: [dpo]
held_out: 6
max_steps: 2
per_device_train_batch_size: 2
gradient_checkpointing: false
learning_rate: 1.0e-3
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
"""
    )
    return root


def words(world, *more):
    return ["--config", f"{world}/tiny.yaml", "--output", f"{world}/out", "--seeds", "1", *more]


@pytest.mark.processes
def test_a_comparison_is_scored_once_and_resumed(world, capsys):
    """Four runs, one of which fails at its second step (its loss is not finite); then two start again."""
    vary = ["--objectives", "mrpo", "mrpo:learning_rate=1e38"]
    assert compare(words(world, *vary, "--jobs", "2")) == 1
    printed = capsys.readouterr().out
    assert "4 runs in" in printed and "scores: 28 to compute with 2 references" in printed
    failed = next(line for line in printed.splitlines() if "FAILED" in line)
    assert "mrpo learning_rate=1e38, seed 42" in failed and "log.txt ends:" in failed and "is not finite" in printed
    assert printed.count(": done in") == 3 and "Missing: mrpo learning_rate=1e38, seed 42." in printed
    summary = json.loads((world / "out/comparison.json").read_text())
    assert {arm["name"] for arm in summary["arms"]} == {"dpo on anchor", "dpo on other", "mrpo"}
    assert summary["held_out_pairs"] == 6 and set(summary["references_untrained_accuracy"]) == {"anchor", "other"}
    assert (world / "out/comparison.png").stat().st_size > 10_000
    for arm in ("dpo_on_anchor", "dpo_on_other", "mrpo"):
        log = (world / f"out/{arm}/seed-42/log.txt").read_text()
        assert "score cache: anchor: 14 of 14 rows" in log and "Loading references" not in log
    # A run that a kill left without its last file starts again, and only that one.
    stamp = (world / "out/mrpo/seed-42/model.safetensors").stat().st_mtime_ns
    before = json.loads((world / "out/dpo_on_other/seed-42/trainer_state.json").read_text())["log_history"]
    (world / "out/dpo_on_other/seed-42/trainer_state.json").unlink()
    assert compare(words(world, "--objectives", "mrpo")) == 0
    printed = capsys.readouterr().out
    assert "3 runs in" in printed and "2 of them complete" in printed and "scores: complete" in printed
    assert printed.count(": done in") == 1 and "[3/3] dpo on other, seed 42: done" in printed
    assert (world / "out/mrpo/seed-42/model.safetensors").stat().st_mtime_ns == stamp
    after = json.loads((world / "out/dpo_on_other/seed-42/trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in after if "loss" in entry] == [e["loss"] for e in before if "loss" in e]
    # Finished runs are not overwritten by others of the same name.
    with pytest.raises(ConfigError, match=r"other settings.*max_steps.*delete"):
        compare(words(world, "--objectives", "mrpo", "--max_steps", "3"))


@pytest.mark.processes
def test_the_plan_without_a_run(world, capsys):
    out = world / "plan"
    vary = ["--vary", "epsilon_max=0,0.1", "ref_weights=validation"]
    assert compare(words(world, *vary, "--output", str(out), "--dry_run", "--launch", "accelerate launch")) == 0
    printed = capsys.readouterr().out
    assert printed.count(": to run") == 6
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  ")]
    assert all(
        line[:5] == ["accelerate", "launch", "-m", "mrpo_scale.cli", verb]
        for line, verb in zip(commands, ["score", *["train"] * 6], strict=True)
    )
    assert all("--weights_split=0.5" in line for line in commands), "all are measured on the same half"
    assert not [path for path in out.rglob("*.safetensors") if "ref_cache" not in path.parts]
    assert compare(words(world, *vary, "--output", str(out), "--slurm")) == 0
    printed = capsys.readouterr().out
    lines = (out / "runs.txt").read_text().splitlines()
    assert len(lines) == 6 and "--array=1-6" in printed and "afterok" in printed
    task = next(line for line in printed.splitlines() if "--array" in line)
    wrapped = shlex.split(task)[-1]
    shown = subprocess.run(
        ["bash", "-c", wrapped.replace("eval", "echo")],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == lines[1]
    assert compare(words(world, *vary, "--output", str(out), "--report")) == 0
    assert "nothing to compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--vary", "betta=1"], ["dpo on anchor betta=1", "unknown key `betta`"]),
        (["--vary", "beta=0.1,-1"], ["dpo on anchor beta=-1", "above 0"]),
        (
            ["--objectives", "mrpo:lr_scheduler_type=cosine_with_min_lr"],
            ["mrpo lr_scheduler_type=cosine_with_min_lr", "min_lr"],
        ),
        (["--output_dir", "x"], ["--output_dir", "`--output`"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--seeds", "two"], ["mrpo compare", "two"]),
        (["--config", "no_such"], ["no_such", "quickstart"]),
        (["--ref_weights", "half"], ["ref_weights: half", "validation"]),
        (["--weights_split", "1.5"], ["weights_split: 1.5"]),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(more, expected, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command("compare", words(world, "--output", str(tmp_path / "out"), *more))
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and all(word in error[0] for word in expected), error
    assert not list(tmp_path.rglob("log.txt"))


def test_it_needs_held_out_pairs(world, tmp_path):
    recipe = (world / "tiny.yaml").read_text().replace("held_out: 6\n", "")
    (tmp_path / "none.yaml").write_text(recipe)
    with pytest.raises(ConfigError, match="held-out pairs"):
        compare(["--config", f"{tmp_path}/none.yaml", "--output", f"{tmp_path}/out"])


@pytest.mark.processes
def test_a_process_that_outlived_its_comparison_keeps_its_folder(tmp_path):
    """The log stays locked as long as the process lives, whoever started it."""
    sleeper = start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log.txt")
    try:
        with pytest.raises(ConfigError, match="still writes"):
            start(["true"], tmp_path / "log.txt")
    finally:
        os.killpg(sleeper.pid, signal.SIGKILL)
        sleeper.wait()
    start(["true"], tmp_path / "log.txt").wait()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="nothing is forked where there is a GPU")
@pytest.mark.processes
def test_a_forked_command_is_that_command(tmp_path):
    """Its words, its log with nothing else in it, its exit status, a session of its own; and the log is locked until it ends."""
    argv = command("report", [f"{tmp_path}/nowhere"], "")
    forked = start(argv, tmp_path / "log.txt")
    assert isinstance(forked, Forked) and forked.pid != os.getpid()
    assert forked.wait(60) == forked.poll() == 2
    assert (tmp_path / "log.txt").read_text().startswith(f"$ {shlex.join(argv)}\n")
    assert "nowhere holds no trainer_state.json" in tail(tmp_path / "log.txt")
    start(["true"], tmp_path / "log.txt").wait()
    assert isinstance(start(["true"], tmp_path / "other.txt"), subprocess.Popen), "a launcher is started"


@pytest.mark.processes
def test_a_comparison_that_is_stopped_ends_its_processes(tmp_path):
    script = f"""
import pathlib
from mrpo_scale.compare.processes import run_alone
run_alone(["sh", "-c", "echo $$; exec sleep 60"], pathlib.Path({str(tmp_path / "log.txt")!r}))
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    log = tmp_path / "log.txt"
    while not log.is_file() or len(log.read_text().splitlines()) < 2:
        assert parent.poll() is None
        time.sleep(0.1)
    child = int(log.read_text().splitlines()[1])
    parent.terminate()
    assert parent.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
