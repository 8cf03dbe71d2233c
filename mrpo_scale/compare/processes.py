"""Runs as processes: a few at a time, each with its own log, resumable, and none of them left behind."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import read_json, refuse_links
from mrpo_scale.compare.forks import Forked, can_fork
from mrpo_scale.compare.plan import Run

logger = logging.getLogger(__name__)

MARKER = "compare.json"
LOG = "log.txt"
_TAIL = 12  #: lines of a failed run's log that are shown
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0


def command(verb: str, argv: Sequence[str], launch: str) -> list[str]:
    """``python -m mrpo_scale.cli VERB ...``, under the launcher if there is one."""
    return [*(shlex.split(launch) or [sys.executable]), "-m", "mrpo_scale.cli", verb, *argv]


def is_complete(run: Run) -> bool:
    """Whether the run ended as planned, with these settings.

    Raises:
        ConfigError: it ended, but with other settings; nothing is overwritten.
    """
    state = _read_json(run.folder / "trainer_state.json")
    marker = _read_json(run.folder / MARKER)
    if state is None or marker is None or not (run.folder / run.result).is_file():
        return False
    if state["global_step"] < state["max_steps"]:
        return False
    if marker["settings"] != run.settings:
        raise ConfigError(
            f"`--output`: {run.folder} holds a finished run with other settings ({_difference(marker['settings'], run.settings)});"
            " name another folder, or delete this run's."
        )
    return True


def mark(run: Run, argv: Sequence[str]) -> None:
    """Say in the run's folder what is about to run there."""
    refuse_links(run.folder, "--output")
    run.folder.mkdir(parents=True, exist_ok=True)
    marker = {"arm": run.arm.name, "seed": run.seed, "settings": run.settings, "command": shlex.join(argv)}
    (run.folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


@dataclass
class _Process:
    number: int
    run: Run
    process: subprocess.Popen | Forked
    started: float = field(default_factory=time.monotonic)


def run_all(
    pending: Sequence[Run], commands: Sequence[Sequence[str]], *, jobs: int, first: int, total: int
) -> list[Run]:
    """Run what is pending, ``jobs`` at a time; returns those that failed. One line is printed as each ends.

    Args:
        first: the number of the first pending run among all ``total``.

    Raises:
        ConfigError: a run of an earlier call is still going in its folder.
    """
    queue = deque(zip(range(first, first + len(pending)), pending, commands, strict=True))
    running: list[_Process] = []
    failed: list[Run] = []
    seconds: list[float] = []
    with _ended_together(running):
        while queue or running:
            while queue and len(running) < jobs:
                number, run, argv = queue.popleft()
                mark(run, argv)
                running.append(_Process(number, run, start(argv, run.folder / LOG)))
            time.sleep(_POLL_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                seconds.append(time.monotonic() - one.started)
                left = sum(seconds) / len(seconds) * (len(queue) + len(running) / 2) / jobs
                if not _report(one, total, seconds[-1], left if queue or running else None):
                    failed.append(one.run)
    return failed


def run_alone(argv: Sequence[str], log: Path) -> int:
    """One process to its end; returns its exit status."""
    running: list[_Process] = []
    with _ended_together(running):
        process = start(argv, log)
        running.append(_Process(0, None, process))  # type: ignore[arg-type]
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
    return int(process.returncode or 0)


def start(argv: Sequence[str], log: Path) -> subprocess.Popen | Forked:
    """Start a process in a session of its own, forked where it is a command of this project. Its log is locked as long as it or a
    child of it lives, also if we are killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a process that an earlier `mrpo compare` started still writes {log}; wait for it, or end it."
            ) from None
        stream.truncate(0)
        stream.write(f"$ {shlex.join(argv)}\n".encode())
        stream.flush()
        if can_fork(argv):
            return Forked(argv, log)
        return subprocess.Popen(argv, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True)


def tail(log: Path) -> str:
    """The one line of an error that a user can mend, or the last lines."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    told = [line for line in lines if line.startswith("error: ")]
    return told[-1] if told else "\n".join(lines[-_TAIL:])


def _report(one: _Process, total: int, seconds: float, left: float | None) -> bool:
    """Print how a run ended; returns whether it did as planned."""
    done = one.process.returncode == 0 and is_complete(one.run)
    took = f"in {minutes(seconds)}"
    rest = "" if left is None else f", about {minutes(left)} left"
    if done:
        print(f"[{one.number}/{total}] {one.run.name}: done {took}{rest}", flush=True)
    else:
        log = one.run.folder / LOG
        print(
            f"[{one.number}/{total}] {one.run.name}: FAILED (status {one.process.returncode}) {took}{rest}; {log} ends:"
        )
        print("\n".join(f"    {line}" for line in tail(log).splitlines()), flush=True)
    return done


@contextmanager
def _ended_together(running: list[_Process]) -> Iterator[None]:
    """Whatever ends this block early, SIGTERM too, ends the processes that it started."""

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for one in running:
            _end(one.process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for one in running:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _end(one.process, signal.SIGKILL)


def _end(process: subprocess.Popen | Forked, how: signal.Signals) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:  # forked this moment: it has no session of its own yet
            with suppress(ProcessLookupError):
                os.kill(process.pid, how)


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file or a kill cut it short."""
    try:
        value = read_json(path)
        if isinstance(value, dict):
            return value
        error: Exception = ValueError("is not what a run writes")
    except FileNotFoundError:
        return None
    except ValueError as damage:
        error = damage
    logger.warning("%s %s: its run starts again", path, error)
    return None


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first thing that two settings do not share."""
    for key in {**theirs["recipe"], **ours["recipe"]}:
        a, b = theirs["recipe"].get(key), ours["recipe"].get(key)
        if a != b:
            return f"{key}: {a} there, {b} now"
    if theirs["launch"] != ours["launch"]:
        return f"--launch: {theirs['launch']!r} there, {ours['launch']!r} now"
    return f"`{shlex.join(theirs['words'])}` there, `{shlex.join(ours['words'])}` now"


def minutes(seconds: float) -> str:
    """A duration as people say it."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
