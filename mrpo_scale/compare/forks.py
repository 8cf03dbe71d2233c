"""Runs forked from a process that has imported what a run needs, once: the imports take longer than a small run.

Every run is a process of its own all the same, with its own session, log and exit status. The process that is forked has
done nothing but import: no thread of a library runs yet, and no GPU was touched.
"""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

_CLI = "mrpo_scale.cli"
_PRELOAD = [
    "mrpo_scale.commands.train",
    "mrpo_scale.commands.score",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]


class Forked:
    """The part of ``subprocess.Popen`` that a comparison uses."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # a fork copies one thread
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._process = context.Process(target=_run, args=(list(argv), str(log)))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(_CLI, timeout or 0.0)
        return self._process.exitcode


def can_fork(argv: Sequence[str]) -> bool:
    """Whether ``argv`` is a command of this project under this Python, without a launcher, and there is no accelerator: libraries
    look for one as they are imported, and what they find does not survive a fork. Seconds do not matter there."""
    return list(argv[:3]) == [sys.executable, "-m", _CLI] and not torch.accelerator.is_available()


def _run(argv: list[str], log: str) -> None:
    """Be ``argv``, as if it had been started: its session, its streams, its words."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    fcntl.flock(stream, fcntl.LOCK_EX)  # as long as this process or a child of it lives
    for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stream), (2, stream)):
        os.dup2(file, number)
    sys.argv = [_CLI, *argv[3:]]
    importlib.import_module(_CLI).main()
