"""The pool of workers itself: what it says of a rank that raises, hangs or ends, and that it starts afresh afterwards.

In a file of few imports, which every new worker has to do again.
"""

import os
import time

import pytest
import torch.distributed as dist

from tests.distributed.pool import Pool, WorkerError


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("broken on purpose")
    return dist.get_rank()


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)


def exit_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)


def worker_pid():
    return os.getpid()


@pytest.fixture
def own_pool():
    pool = Pool(2)
    yield pool
    pool.close()


def test_pool_reports_and_recovers(own_pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 0 failed in fail_on.*ValueError: broken on purpose"):
        own_pool.run(fail_on, 0)
    pids = own_pool.run(worker_pid)
    with pytest.raises(WorkerError, match=r"(?s)rank 1 hangs in hang_on.*in hang_on") as caught:
        own_pool.run(hang_on, 1, timeout=5.0)
    assert "rank 0" not in str(caught.value)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(WorkerError, match=r"rank 0 failed in exit_on.*\n?.*ended with status 3"):
        own_pool.run(exit_on, 0)
