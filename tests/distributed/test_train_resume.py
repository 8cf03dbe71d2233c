"""A checkpoint of two ranks goes on on one, two and four: the same steps, the same Adam state."""

import shutil
from itertools import groupby

import pytest

from mrpo_scale.lifecycle import checkpoints
from tests.distributed.jobs import Job
from tests.distributed.ports import free_port
from tests.distributed.train_runs import ZERO3, final_log, read_lines, record, write_recipe

AT = 12  # the checkpoint that all of them continue from, in the second epoch
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    # Without dropout, whose random numbers belong to a rank.
    return write_recipe(tmp_path_factory.mktemp("recipe"), disable_dropout=True, save_total_limit=None, max_steps=16)


def run(jobs, words, output_dir, logs, ranks=2, *more):
    logs.mkdir()
    env = dict(ZERO3)
    if ranks == 1:  # DeepSpeed on one rank, as `accelerate launch --num_processes 1` starts it
        env |= {**ALONE, "MASTER_PORT": str(free_port())}
        more = (*more, "--ddp_backend", "gloo")
    line = [*words, "--output_dir", output_dir, *more]
    (ended,) = jobs.run(Job(line, ranks, record, (str(logs),), env=env), timeout=240)
    return ended


def adam(logs):
    """Of all ranks: every step counter, and the norms of the two moments."""
    ranks = read_lines(sorted(logs.glob("optimizer-*")))
    assert all(rank["shared"] == 0 for rank in ranks), "parameters share one step tensor"
    norms = {key: sum(rank[key] for rank in ranks) ** 0.5 for key in ("exp_avg", "exp_avg_sq")}
    return {step for rank in ranks for step in rank["steps"]}, norms


@pytest.fixture(scope="module")
def native(jobs, words, tmp_path_factory):
    """Two ranks to step 16, and again from step 12: (folder of the first, log, Adam state at step 12)."""
    root = tmp_path_factory.mktemp("native")
    ended = run(jobs, words, root / "out", root / "logs")
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    shutil.copytree(root / "out" / f"checkpoint-{AT}", root / "again" / f"checkpoint-{AT}")
    ended = run(jobs, words, root / "again", root / "logs-again")
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert final_log(root / "again") == final_log(root / "out")
    steps, norms = adam(root / "logs-again")
    assert steps == {AT}
    return root / "out", final_log(root / "out"), norms


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (4, 1)])
def test_other_numbers_of_ranks_take_the_same_steps(jobs, words, native, tmp_path, ranks, accumulation):
    folder, log, norms = native
    out = tmp_path / "out"
    shutil.copytree(folder / f"checkpoint-{AT}", out / f"checkpoint-{AT}")
    ended = run(jobs, words, out, tmp_path / "logs", ranks, "--gradient_accumulation_steps", accumulation)
    assert [rank.status for rank in ended] == [0] * ranks, "\n".join(rank.err for rank in ended)
    steps, found = adam(tmp_path / "logs")
    assert steps == {AT}
    assert found == pytest.approx(norms, rel=1e-6)
    assert len(final_log(out)) == len(log)
    for entry, expected in zip(final_log(out), log, strict=True):
        assert entry.keys() == expected.keys()
        for key in ("loss", "grad_norm", "eval_loss", "train_loss"):
            if key in expected:
                assert entry[key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)
    trained = sorted(read_lines(sorted((tmp_path / "logs").glob("trained-*"))), key=lambda line: line["step"])
    assert [step for step, _ in groupby(line["step"] for line in trained)] == [12, 13, 14, 15]
    # Its own checkpoints are ordinary ones of so many ranks.
    assert {c.step: c.world_size for c in checkpoints.find_complete(out)[0]} == {AT: 2, 14: ranks, 16: ranks}


def test_other_pairs_per_step_are_refused_on_every_rank(jobs, words, native, tmp_path):
    folder, *_ = native
    shutil.copytree(folder / f"checkpoint-{AT}", tmp_path / "out" / f"checkpoint-{AT}")
    ended = run(jobs, words, tmp_path / "out", tmp_path / "logs", 4)
    assert [rank.status for rank in ended] == [2] * 4
    assert "set `gradient_accumulation_steps: 1`" in ended[0].err
