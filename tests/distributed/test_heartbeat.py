"""A rank that is gone, hangs or fails: what the others say of it and how they end. Real processes, a short timeout."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mrpo_scale.base.errors import EXIT_STATUS, Preempted, TrainingError
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from tests.distributed.jobs import Job, Kill

TIMEOUT = 3.0
HANG = 300.0  # what only the heartbeat can end


def rank(body, folder, *args):
    """A whole process: join, beat, run ``body``. Exits with what it raises, as a program does."""
    dist.init_process_group("gloo")
    with heartbeat(TIMEOUT):
        globals()[body](Path(folder), *args)
    sys.exit(0)


def run(jobs, tmp_path, body, *args, ranks=2, kill=None):
    job = Job((), ranks, before=rank, args=(body, str(tmp_path), *args), env={"LOCAL_WORLD_SIZE": str(ranks)})
    (ended,) = jobs.run(job, kill=kill, timeout=60)
    assert not any(e.late for e in ended), "the heartbeat ends every rank; nobody had to kill one"
    return ended


def message(ended):
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    return line


# --- what ranks do


def one_hangs(folder, others):
    """Rank 1 tells that it is where it will be killed; the others wait for it in an all-reduce, or are busy and do not notice."""
    if dist.get_rank() == 1:
        set_activity("saving checkpoint-40")
        time.sleep(2 * TIMEOUT / 6)  # a beat tells the others
        (folder / "now").touch()
        time.sleep(HANG)
    set_activity("computing step 41")
    if others == "busy":
        time.sleep(HANG)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        if others == "wrapping":  # as saving a checkpoint does
            raise TrainingError("checkpoint-40 could not be written") from error
        raise


def first_stops(folder):
    set_activity("computing step 7")
    time.sleep(2 * TIMEOUT / 6)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def one_raises(folder, which):
    set_activity("computing step 3")
    if dist.get_rank() == which:
        raise ValueError("a shape\nthat does not fit")
    dist.all_reduce(torch.zeros(1))


def all_raise(folder):
    raise SystemExit(2)


def leave_when_told(folder):
    """Rank 0 has most to do at the end: longer than others wait for one that failed."""
    if dist.get_rank() == 0:
        time.sleep(TIMEOUT / 2)
    raise Preempted("told to stop")


def end_apart(folder, slow):
    if dist.get_rank() == slow:
        time.sleep(1.5 * TIMEOUT)


def pause_all(folder):
    """As a virtual machine that is suspended: every process stops for longer than the timeout, and all go on."""
    dist.barrier()  # all at once: a rank that still runs sees the stopped one fall silent, and is right to end
    me, child = os.getpid(), os.fork()
    if child == 0:
        os.kill(me, signal.SIGSTOP)
        time.sleep(1.5 * TIMEOUT)
        os.kill(me, signal.SIGCONT)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(TIMEOUT / 2)
    dist.barrier()


def train_twice(folder):
    """Two blocks in one process, and one inside another, as `mrpo train` with baselines has them."""
    for _ in range(2):
        with heartbeat(TIMEOUT):
            dist.barrier()
    assert len([t for t in threading.enumerate() if "_beat_and_watch" in t.name]) == 1


# --- what comes of it


@pytest.mark.parametrize("others", ["waiting", "wrapping", "busy"])
def test_a_killed_rank_is_named_with_what_it_did(jobs, tmp_path, others):
    kill = Kill(ranks=[1], seconds=0.0, since=str(tmp_path / "now"))
    ended = run(jobs, tmp_path, "one_hangs", others, ranks=3, kill=kill)
    assert [e.status for e in ended] == [1, -signal.SIGKILL, 1]
    assert "no sign of life for 3 s from rank 1 on " in message(ended[0])
    assert message(ended[0]).endswith(", last seen saving checkpoint-40.")
    assert "rank 2 on " in ended[2].err and "ends as well: no sign of life for 3 s from rank 1 on " in ended[2].err
    assert "computing step 41" in ended[0].err
    assert ("lost a connection while computing step 41" in ended[0].err) == (others != "busy")


def test_a_stopped_rank_counts_as_dead(jobs, tmp_path):
    """Rank 0's process holds the store here, so it is the store that the other one misses."""
    (ended,) = jobs.run(Job((), 2, before=rank, args=("first_stops", str(tmp_path))), timeout=60, grace=1)
    assert ended[0].late, "nobody but its launcher can end a stopped process"
    assert ended[1].status == 1
    assert "the job's store on " in message(ended[1])
    assert "no answer from it for 3 s; rank 0 on " in message(ended[1])
    assert message(ended[1]).endswith(" was last seen computing step 7.")


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_fails_tells_why(jobs, tmp_path, which):
    ended = run(jobs, tmp_path, "one_raises", which)
    assert [e.status for e in ended] == [1, 1]
    assert "ValueError: a shape\nthat does not fit" in ended[which].err
    assert "error: " not in ended[which].err.replace("ValueError: ", "")
    assert f"error: rank {which} on " in message(ended[1 - which])
    assert "failed while computing step 3: ValueError: a shape that does not fit." in message(ended[1 - which])


def test_ranks_that_fail_alike_keep_their_own_end(jobs, tmp_path):
    """An error that all ranks raise has its message and exit code already."""
    for e in run(jobs, tmp_path, "all_raise"):
        assert (e.status, "error: " in e.err) == (2, False)


def test_a_preempted_rank_has_not_failed(jobs, tmp_path):
    for e in run(jobs, tmp_path, "leave_when_told"):
        assert (e.status, "error: " in e.err) == (EXIT_STATUS, False)


@pytest.mark.parametrize("slow", [0, 1])
def test_ranks_may_end_one_after_the_other(jobs, tmp_path, slow):
    assert [e.status for e in run(jobs, tmp_path, "end_apart", slow)] == [0, 0]


def test_a_pause_of_everything_is_no_death(jobs, tmp_path):
    ended = run(jobs, tmp_path, "pause_all")
    assert [e.status for e in ended] == [0, 0], "\n".join(e.err for e in ended)


def test_blocks_within_and_after_each_other(jobs, tmp_path):
    ended = run(jobs, tmp_path, "train_twice")
    assert [e.status for e in ended] == [0, 0], ended[0].err


def test_alone_there_is_nothing_to_watch():
    before = threading.active_count()
    with heartbeat():
        assert threading.active_count() == before
