"""One pool of workers per world size, and one process that forks command lines, for the whole session.

Tests that start processes bear the mark `processes`, which `make check` leaves out: all of distributed/ and multihost/, and single
ones elsewhere. Nobody has to remember it: a test that starts one without the mark fails.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import Jobs
from tests.distributed.pool import Pool

ROOT = Path(__file__).parents[1]
STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_started: list[str] | None = None  # what the running test has started; None between tests and in other processes
_pid = os.getpid()


def _note(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: note a process that this repository's code starts. Libraries run programs of their own
    (matplotlib `fc-list`, when it first looks for fonts), which says nothing of the test; a fork is always somebody's worker.
    """
    if event not in ("os.fork", "subprocess.Popen") or _started is None or os.getpid() != _pid:
        return
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(("<", STANDARD_LIBRARY)):
        if "site-packages" in frame.f_code.co_filename:
            break
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    if ours or event == "os.fork":
        _started.append(f"{event} {args[1] if args else ''} at {path.name}:{frame.f_lineno}")


sys.addaudithook(_note)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {ROOT / "tests" / "distributed", ROOT / "tests" / "multihost"}
    fixtures = {"pool2", "pool4", "jobs", "browser"}  # shared: which of their tests starts them depends on the order
    for item in items:
        if folders & set(item.path.parents) or fixtures & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _started
    _started = []
    try:
        return (yield)
    finally:
        _started = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if _started and not item.get_closest_marker("processes"):
        pytest.fail(f"starts a process, so mark it @pytest.mark.processes: {_started[0]}", pytrace=False)
    return result


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
