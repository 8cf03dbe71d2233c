"""KD and RLHF under ZeRO-3: one process takes the same steps on the same samples, a run that goes on exactly its own."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.jobs import Job
from tests.distributed.train_runs import ZERO3, final_log, final_weights, read_lines, write_recipe
from tests.references.test_reward import write_reward

pytestmark = pytest.mark.processes
AT = 2


def recording(folder):
    """In a rank: write down every sample, or, where a folder of them is there, take those."""
    from mrpo_scale.training.sampling import PolicySampler

    Path(folder).mkdir(exist_ok=True)
    drawn = PolicySampler._responses

    def recorded(self, prompts, rows, step):
        responses = drawn(self, prompts, rows, step)
        with open(f"{folder}/{os.environ['RANK']}.jsonl", "a") as file:
            file.writelines(json.dumps([step, *one]) + "\n" for one in zip(rows, responses, strict=True))
        return responses

    PolicySampler._responses = recorded


def repeating(folder):
    from mrpo_scale.training.sampling import PolicySampler

    # A filler, which the last rank has, repeats a row with samples of its own: those of the real one come last here.
    lines = reversed(read_lines(sorted(folder.glob("*.jsonl"))))
    known = {(step, row): both for step, row, both in lines}
    PolicySampler._responses = lambda self, prompts, rows, step: [known[step, row] for row in rows]


@pytest.fixture(scope="module", params=["kd", "rlhf"])
def words(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("recipe")
    keys = {"objective": request.param, "ref_weights": [0.2, 0.5, 0.3], "max_completion_length": 10, "max_steps": 4}
    keys |= {"disable_dropout": True, "save_total_limit": None, "logging_steps": 1, "eval_steps": 4, "seed": 5}
    line = write_recipe(folder, **keys, sampled_fraction=0.7)
    if request.param == "kd":
        line += ["--kd_level", "aligned"]
    else:
        line += ["--reward_model", write_reward(folder / "reward", folder / "qwen2")]
    return line


def run(jobs, words, output_dir, ranks, *more, before=None, args=()):
    line = [*words, "--output_dir", output_dir, *more]
    (ended,) = jobs.run(Job(line, ranks, before, args, env=ZERO3 if ranks > 1 else {}), timeout=240)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err


def close(log, whole):
    for entry, expected in zip(log, whole, strict=True):
        for key in (
            "loss",
            "grad_norm",
            "eval_loss",
            "sampled/kl/llama",
            "sampled/cut",
            "sampled/reward",
            "sampled/pieces",
        ):
            if key in expected:
                assert entry[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (expected["step"], key)


@pytest.fixture(scope="module")
def whole(jobs, words, tmp_path_factory):
    """Two ranks from the first step to the last: (folder, samples)."""
    root = tmp_path_factory.mktemp("whole")
    run(jobs, words, root / "out", 2, before=recording, args=(str(root / "samples"),))
    return root / "out", root / "samples"


def test_one_process_takes_the_steps_of_two_ranks(jobs, words, whole, tmp_path):
    folder, samples = whole
    log = final_log(folder)
    assert len({entry["sampled/kl/llama"] for entry in log if "loss" in entry}) > 2
    more = ("--gradient_accumulation_steps", 4)
    run(jobs, words, tmp_path / "one", 1, *more, before=repeating, args=(samples,))
    close(final_log(tmp_path / "one"), log)


def test_two_ranks_go_on(jobs, words, whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / f"checkpoint-{AT}", tmp_path / "again" / f"checkpoint-{AT}")
    run(jobs, words, tmp_path / "again", 2)
    assert final_log(tmp_path / "again") == final_log(folder)
    again = final_weights(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in final_weights(folder).items())


@pytest.mark.parametrize("words", ["kd"], indirect=True)
def test_a_policy_that_is_gathered_layer_by_layer_samples_the_same(jobs, words, tmp_path):
    """Ranks whose longest samples differ in length: forwards that one of them did not run would hang the other."""
    one_step = ("--max_steps", 1, "--save_strategy", "no", "--eval_on_start", "false")
    gathered, layers = tmp_path / "gathered", tmp_path / "layers"
    run(jobs, words, gathered, 2, *one_step, before=recording, args=(str(tmp_path / "a"),))
    more = ("--ds3_gather_for_generation", "false")
    run(jobs, words, layers, 2, *one_step, *more, before=recording, args=(str(tmp_path / "b"),))
    both = [read_lines(sorted((tmp_path / name).glob("*.jsonl"))) for name in "ab"]
    assert both[0] == both[1] and len(both[0]) == 4
    close(final_log(layers), final_log(gathered))
