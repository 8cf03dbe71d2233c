"""LoRA under ZeRO-3: the steps of one process, resumed exactly, on other numbers of ranks, and a folder that peft reads."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import Job
from tests.distributed.train_runs import ZERO3, final_log, write_recipe
from tests.tools import require_module

require_module("peft", "pip install peft")
pytestmark = pytest.mark.processes
AT = 4


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    keys = {"use_peft": True, "lora_target_modules": ["query_key_value", "dense"], "gradient_checkpointing": True}
    keys |= {
        "disable_dropout": True,
        "save_total_limit": None,
        "max_steps": 8,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    return write_recipe(tmp_path_factory.mktemp("recipe"), **keys)


def run(jobs, words, output_dir, ranks, accumulation=2):
    line = [*words, "--output_dir", output_dir, "--gradient_accumulation_steps", accumulation]
    env = ZERO3 if ranks > 1 else {}
    (ended,) = jobs.run(Job(line, ranks, env=env), timeout=240)
    assert [rank.status for rank in ended] == [0] * ranks, ended[0].err
    return ended[0].err


@pytest.fixture(scope="module")
def two(jobs, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    return folder, run(jobs, words, folder, 2)


def close(folder, other):
    for entry, expected in zip(final_log(folder), final_log(other), strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in expected:
                assert entry[key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)


def test_two_ranks_take_the_steps_of_one(jobs, words, two, tmp_path):
    folder, said = two
    assert "the policy, its adapter off" in said and "differ from the anchor's by at most 0.0e+00" in said
    run(jobs, words, tmp_path / "one", 1, 4)
    close(folder, tmp_path / "one")
    weights, alone = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "one"))
    assert weights.keys() == alone.keys() and any(name.endswith("lora_B.weight") for name in weights)
    for name, value in weights.items():
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(jobs, words, two, tmp_path):
    folder, _ = two
    shutil.copytree(folder / f"checkpoint-{AT}", tmp_path / "out" / f"checkpoint-{AT}")
    run(jobs, words, tmp_path / "out", 2)
    assert final_log(tmp_path / "out") == final_log(folder)
    weights, again = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "out"))
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_another_number_of_ranks_goes_on(jobs, words, two, tmp_path):
    folder, _ = two
    shutil.copytree(folder / f"checkpoint-{AT}", tmp_path / "out" / f"checkpoint-{AT}")
    run_four = [*words, "--output_dir", tmp_path / "out", "--gradient_accumulation_steps", 1]
    (ended,) = jobs.run(Job(run_four, 4, env=ZERO3), timeout=240)
    assert [rank.status for rank in ended] == [0] * 4, ended[0].err
    close(tmp_path / "out", folder)
