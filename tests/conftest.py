"""One pool of workers per world size, and one process that forks command lines, for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.jobs import Jobs
from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool4() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    jobs = Jobs()
    yield jobs
    jobs.close()
