"""hpZ on four ranks as two nodes of two: plain ZeRO-3's losses and weights; killed, it goes on bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mrpo_scale.config.ds_config import resource
from tests.distributed.jobs import Job
from tests.distributed.train_runs import ZERO3, final_log, final_weights, write_recipe

STEPS, SAVED = 6, 4
pytestmark = pytest.mark.processes


def die(step):
    """Rank 1 is killed in step ``step``, from 0, as a node that goes away."""
    from mrpo_scale.training.trainer import MRPOTrainer

    compute_loss = MRPOTrainer.compute_loss

    def deadly(self, *args, **kwargs):
        if self.state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_loss(self, *args, **kwargs)

    MRPOTrainer.compute_loss = deadly


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """{name: the variables of a launcher}; zero3_hpz.json's group of a node is two ranks here."""
    folder, found = tmp_path_factory.mktemp("ds_configs"), {}
    for name, size in (("plain", None), ("hpz", 2)):
        config = json.loads((resource("ds_configs") / "zero3_cpu.json").read_text())
        if size:
            config["zero_optimization"]["zero_hpz_partition_size"] = size
        (folder / f"{name}.json").write_text(json.dumps(config))
        found[name] = {**ZERO3, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / f"{name}.json")}
    return found


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    keys = {"max_steps": STEPS, "save_steps": SAVED, "logging_steps": 1, "eval_strategy": "no", "eval_on_start": False}
    return write_recipe(folder, disable_dropout=True, gradient_accumulation_steps=2, save_total_limit=None, **keys)


def run(jobs, words, out, env, ranks=4, before=None, args=(), *more):
    job = Job([*words, "--output_dir", out, *more], ranks, before, args, env)
    (ended,) = jobs.run(job, timeout=400)
    return ended


def finish(*args, **kwargs):
    ended = run(*args, **kwargs)
    assert [rank.status for rank in ended] == [0] * len(ended), "\n".join(rank.err[-2000:] for rank in ended)


def assert_close(out, expected, relative):
    log, expected_log = final_log(out), final_log(expected)
    assert [entry.get("step") for entry in log] == [entry.get("step") for entry in expected_log]
    for entry, other in zip(log, expected_log, strict=True):
        for key in {"loss", "grad_norm", "train_loss"} & other.keys():
            assert entry[key] == pytest.approx(other[key], rel=relative), (entry["step"], key)
    weights, others = final_weights(out), final_weights(expected)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, others[name], rtol=relative, atol=relative, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def undisturbed(jobs, words, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("hpz") / "out"
    finish(jobs, words, out, settings["hpz"])
    return out


def test_losses_and_weights_are_plain_zero3s(jobs, words, settings, undisturbed, tmp_path):
    finish(jobs, words, tmp_path / "out", settings["plain"])
    assert_close(undisturbed, tmp_path / "out", 1e-6)
    config = [json.loads((Path(out) / "config.json").read_text()) for out in (undisturbed, tmp_path / "out")]
    assert config[0] == config[1]


def test_killed_it_goes_on_bit_for_bit(jobs, words, settings, undisturbed, tmp_path):
    ended = run(jobs, words, tmp_path / "out", settings["hpz"], 4, die, (SAVED,))
    assert ended[1].status == -signal.SIGKILL and all(rank.status for rank in ended)
    finish(jobs, words, tmp_path / "out", settings["hpz"])
    assert final_log(tmp_path / "out") == final_log(undisturbed)
    weights, expected = final_weights(tmp_path / "out"), final_weights(undisturbed)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_ranks_go_on_from_a_checkpoint_of_four(jobs, words, settings, undisturbed, tmp_path):
    shutil.copytree(undisturbed / f"checkpoint-{SAVED}", tmp_path / "out" / f"checkpoint-{SAVED}")
    more = ("--gradient_accumulation_steps", "4")
    finish(jobs, words, tmp_path / "out", settings["hpz"], 2, None, (), *more)
    assert_close(tmp_path / "out", undisturbed, 1e-5)
