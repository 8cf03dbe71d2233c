"""A run that is stopped or killed at any moment, again and again, ends as the run that nobody disturbed.

`make chaos` kills 25 times (MRPO_CHAOS_KILLS), `make test` 3 times. MRPO_CHAOS_SEED chooses other moments.
"""

import json
import os
import random
import signal
from collections import Counter

import pytest
import torch

from mrpo_scale.base.errors import EXIT_STATUS
from mrpo_scale.lifecycle import checkpoints
from mrpo_scale.lifecycle.preemption import PREEMPTED, STOP
from tests.distributed.jobs import Job, Kill
from tests.distributed.train_runs import (
    ROWS,
    WINDOW,
    ZERO3,
    chaos,
    final_log,
    final_weights,
    interrupt,
    read_lines,
    write_recipe,
)

KILLS = int(os.environ.get("MRPO_CHAOS_KILLS", "3"))
SEED = int(os.environ.get("MRPO_CHAOS_SEED", "0"))
EPOCHS = 2 if KILLS < 10 else 8
STEPS = EPOCHS * -(-ROWS // WINDOW)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """K=3 on two ranks, live with a write-through cache, dropout on; an evaluation every 7 steps, a checkpoint every 2."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), num_train_epochs=EPOCHS)


def line(words, root):
    return [*words, "--output_dir", root / "out", "--ref_cache_dir", root / "cache"]


@pytest.fixture(scope="module")
def undisturbed(jobs, words, tmp_path_factory):
    """(its folder, seconds of its steps, dealings of each rank with checkpoint files)."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "logs").mkdir()
    (ended,) = jobs.run(Job(line(words, root), 2, chaos, (str(root / "logs"),), ZERO3), timeout=400)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    begun = (root / "logs" / "begun").stat().st_ctime
    seconds = (root / "out" / "model.safetensors").stat().st_mtime - begun
    saving = [len(read_lines([root / "logs" / f"saving-{rank}.jsonl"])) for rank in range(2)]
    return root, seconds, saving


def trained(logs):
    """{step: {(rank, number of the micro-batch): (rows, loss)}} of one life, and the step it began at; None: it did not."""
    begun = read_lines(sorted(logs.glob("optimizer-*")))
    steps = {}
    for rank, path in ((rank, logs / f"trained-{rank}.jsonl") for rank in range(2)):
        for entry in read_lines([path]) if path.exists() else ():
            here = steps.setdefault(entry["step"], {})
            here[rank, sum(key[0] == rank for key in here)] = (entry["rows"], entry["loss"])
    return steps, begun[0]["step"] if begun else None


def lineage(lives):
    """What the result is made of: each life's steps up to where the next one began."""
    result, starts = {}, [trained(logs) for logs in lives]
    starts = [(steps, begun) for steps, begun in starts if begun is not None]
    for (steps, begun), (_, until) in zip(starts, [*starts[1:], ({}, STEPS)], strict=True):
        result |= {step: steps[step] for step in range(begun, until)}
    return result


def assert_same_run(out, lives, undisturbed):
    """Weights bit by bit, every number of the log, every loss and row of every step; and every row once an epoch."""
    root, *_ = undisturbed
    assert final_log(out) == final_log(root / "out")
    weights, expected = final_weights(out), final_weights(root / "out")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    found = lineage(lives)
    assert found == trained(root / "logs")[0]
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS // EPOCHS, (epoch + 1) * STEPS // EPOCHS)
        rows = [row for step in steps for rows, _ in found[step].values() for row in rows]
        assert sorted(rows) == list(range(ROWS))


def test_asked_to_stop_it_saves_and_goes_on(jobs, words, undisturbed, tmp_path):
    """SIGTERM for one rank; STOP in a step after which an evaluation is due; STOP amid an evaluation; then to the end."""
    out, lives = tmp_path / "out", []
    # how, the step (from 0) or evaluation in which it comes, the step that is saved
    for how, at, step in (("SIGTERM", 2, 3), ("STOP", 6, 7), ("evaluation", 14, 14)):
        lives.append(tmp_path / f"logs-{len(lives)}")
        lives[-1].mkdir()
        before = (str(lives[-1]), str(out), how, at)
        (ended,) = jobs.run(Job(line(words, tmp_path), 2, interrupt, before, ZERO3))
        assert [rank.status for rank in ended] == [EXIT_STATUS] * 2, "\n".join(rank.err for rank in ended)
        told = json.loads((out / PREEMPTED).read_text())
        assert told["step"] == step and told["checkpoint"] == str(out / f"checkpoint-{step}")
        assert told["reason"] == ("SIGTERM" if how == "SIGTERM" else "the file STOP")
        assert checkpoints.find_complete(out)[0][-1].step == step
        assert not (out / STOP).exists() and not (out / "trainer_state.json").exists()
        assert f"saved {out / f'checkpoint-{step}'}" in ended[0].err
    lives.append(tmp_path / "logs-last")
    lives[-1].mkdir()
    (out / STOP).touch()
    os.utime(out / STOP, (1e9, 1e9))  # of a previous attempt: it stops nobody
    (ended,) = jobs.run(Job(line(words, tmp_path), 2, chaos, (str(lives[-1]),), ZERO3), timeout=400)
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert not (out / STOP).exists() and not (out / PREEMPTED).exists()
    assert_same_run(out, lives, undisturbed)

    # Once more: it is finished, and says so.
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (ended,) = jobs.run(Job(line(words, tmp_path), 2, None, (), ZERO3))
    assert [rank.status for rank in ended] == [0, 0], ended[0].err
    assert "this run is finished, nothing is trained" in ended[0].err and "MRPO (K=3)" in ended[0].out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == kept


def choose_moment(rng, undisturbed, share, kills_left, logs):
    """(where, Kill or None, (rank, dealing with a checkpoint file) or None). Early in what is left, lest the run end too soon."""
    _, seconds, saving = undisturbed
    if rng.random() < 0.5:
        rank = rng.randrange(2)
        saves = STEPS // 2
        most = max(1, round(min(saves * share, 2 * saves / (kills_left + 1) + 1) * saving[rank] / saves))
        return "amid a checkpoint", None, (rank, rng.randint(1, most))
    victims = rng.choice([[0], [1], [0, 1]])
    if rng.random() < 0.15:
        # Not before: DeepSpeed's build on CPU holds a lock at start, which a killed process leaves behind for ever.
        return "while it starts", Kill(victims, rng.uniform(0, 3), since=str(logs / "starts")), None
    latest = seconds * min(share, 2 / (kills_left + 1) + 0.05)
    return "in training", Kill(victims, rng.uniform(0, latest), since=str(logs / "begun")), None


def test_killed_again_and_again_it_ends_as_undisturbed(jobs, words, undisturbed, tmp_path, capsys):
    rng = random.Random(SEED)
    hits, sides, died, lives_of_runs = Counter(), Counter(), Counter(), []
    while hits.total() < KILLS:
        root = tmp_path / f"run-{len(lives_of_runs)}"
        root.mkdir()
        lives, complete, ended = [], [], []
        while not ended or any(rank.status for rank in ended):
            lives.append(root / f"logs-{len(lives)}")
            lives[-1].mkdir()
            share = 1 - (complete[-1].step / STEPS if complete else 0)
            where, kill, die = choose_moment(rng, undisturbed, share, KILLS - hits.total(), lives[-1])
            if hits.total() == KILLS:
                kill, die = None, (2, 0)  # nobody
            (ended,) = jobs.run(
                Job(line(words, root), 2, chaos, (str(lives[-1]), die), ZERO3),
                kill=kill,
                grace=rng.choice([0, 0.3, 1]),
                timeout=400,
            )
            before, complete = complete, checkpoints.find_complete(root / "out")[0]
            if before:
                assert complete and complete[-1].number >= before[-1].number, "the last complete checkpoint is gone"
            killed = [r for r, rank in enumerate(ended) if rank.status == -signal.SIGKILL and not rank.late]
            assert killed or not any(rank.status for rank in ended), "\n".join(rank.err for rank in ended)
            if killed:
                hits[where] += 1
                sides["both ranks" if len(killed) == 2 else f"rank {killed[0]}"] += 1
                died.update(entry["what"] for entry in read_lines(sorted(lives[-1].glob("died-*"))))
        assert_same_run(root / "out", lives, undisturbed)
        lives_of_runs.append(len(lives))
    with capsys.disabled():
        print(
            f"\n{hits.total()} kills, {lives_of_runs} lives of runs of {STEPS} steps (seed {SEED}): {dict(sides)}, {dict(hits)}; "
            f"checkpoints died before: {', '.join(sorted(died.elements()))}; weights, losses and rows as undisturbed"
        )
