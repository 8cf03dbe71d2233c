"""Whole `mrpo` command lines on one or more ranks, forked from a process that has the imports, which cost 20 s each time otherwise.

A forked rank does what the console script does under a launcher: the same words, the variables that a launcher sets, output of its
own. Run as a script, this file is the process that forks. It never starts a thread or a process group itself.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # started with -P; under its own name, so that pickles mean the same on both sides
    sys.path.insert(0, str(ROOT))

from tests.distributed import jobs as this_module  # noqa: E402
from tests.distributed.pool import _load  # noqa: E402
from tests.distributed.ports import free_port  # noqa: E402

START_TIMEOUT = 240.0  #: seconds until the imports are done
ENV = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # a fork copies one thread
    "LOCAL_SIZE": "1",  # what DeepSpeed takes where there is no numactl, which it would look for at each reduction of a gradient
}
IMPORTS = [
    *("mrpo_scale.commands.train", "mrpo_scale.commands.score", "mrpo_scale.commands.inspect_references"),
    *("deepspeed", "matplotlib.figure", "matplotlib.backends.backend_agg"),  # imported by functions of theirs
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "gpt_neox")),  # tests/tiny.py
]


@dataclass(frozen=True)
class Job:
    """One command line. ``before`` is a top-level function of a test module; each rank calls it with ``args`` first."""

    words: Sequence[str]
    ranks: int = 1
    before: Callable[..., None] | None = None
    args: tuple[Any, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kill:
    """SIGKILL for ``ranks`` of the first job, ``seconds`` after the start or after ``since`` exists."""

    ranks: Sequence[int]
    seconds: float
    since: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a rank ended. ``status``: exit code, or minus the signal. ``late``: killed because a rank before it had failed."""

    status: int
    late: bool
    seconds: float  #: since its start
    out: str
    err: str


class Jobs:
    """Runs jobs; the process that forks them starts at the first one and lives until :meth:`close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def run(
        self, *jobs: Job, kill: Kill | None = None, grace: float = 30.0, timeout: float = 120.0
    ) -> list[list[Ended]]:
        """Run jobs at once; how each rank of each ended.

        Args:
            grace: seconds that the others of a job get when one of its ranks has failed: `accelerate launch` gives 30.
            timeout: seconds for all; ranks that are left are killed, with their stacks in ``err``.
        """
        pipe = self._start() if self._pipe is None else self._pipe
        pipe.send(([_portable(job) for job in jobs], kill, grace, timeout))
        answer = _receive(pipe, timeout + 60)
        if isinstance(answer, str):
            raise AssertionError(answer)
        return answer

    def close(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            os.killpg(self._process.pid, signal.SIGKILL)  # it has nothing to tidy up
            self._process.wait()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                env={**os.environ, **ENV},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        _receive(self._pipe, START_TIMEOUT)
        return self._pipe


def _receive(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise AssertionError(f"no answer from the process that forks jobs for {seconds:.0f} s")
    return pipe.recv()


def _portable(job: Job) -> tuple[Any, ...]:
    where = None
    if job.before is not None:
        module = job.before.__module__
        where = (module, sys.modules[module].__file__, job.before.__qualname__)
    return list(map(str, job.words)), job.ranks, where, job.args, dict(job.env)


# --- in the process that forks


@dataclass
class _Rank:
    pid: int
    job: int
    rank: int
    started: float
    status: int | None = None
    late: bool = False
    ended: float = 0.0


def _serve(pipe: Connection) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for module in IMPORTS:
        importlib.import_module(module)
    get_checkpoint_conversion_mapping("llama")  # a table that takes a second to make
    gc.freeze()  # forks need not look through all of these modules' objects again
    threads = list(Path("/proc/self/task").iterdir())
    assert len(threads) == 1, "a lock that another thread holds would stay locked in every fork"
    pipe.send("ready")
    while True:
        try:
            jobs, kill, grace, timeout = pipe.recv()
        except EOFError:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="mrpo-jobs-") as folder:
                pipe.send(_run(jobs, kill, grace, timeout, Path(folder), pipe))
        except Exception:  # noqa: BLE001 (the other side raises it)
            pipe.send(traceback.format_exc())


def _run(
    jobs: list[Any], kill: Kill | None, grace: float, timeout: float, folder: Path, pipe: Connection
) -> list[list[Ended]]:
    ranks = [r for j, job in enumerate(jobs) for r in _fork(j, job, folder, pipe)]
    begun: float | None = time.monotonic() if kill and kill.since is None else None
    deadline = time.monotonic() + timeout
    while any(r.status is None for r in ranks):
        now = time.monotonic()
        for r in ranks:
            if r.status is None:
                pid, status = os.waitpid(r.pid, os.WNOHANG)
                if pid:
                    r.status, r.ended = os.waitstatus_to_exitcode(status), now
        if kill and begun is None and kill.since and Path(kill.since).exists():
            begun = now
        if kill and begun is not None and now - begun >= kill.seconds:
            _kill([r for r in ranks if r.job == 0 and r.rank in kill.ranks])
            kill = None
        for r in ranks:
            failed = [o.ended for o in ranks if o.job == r.job and o.status]
            if r.status is None and failed and now - min(failed) > grace:
                r.late = True
                _kill([r])
        if now > deadline:
            left = [r for r in ranks if r.status is None]
            for r in left:
                os.kill(r.pid, signal.SIGUSR1)  # stacks
            time.sleep(1.0)
            _kill(left)
            deadline = now + 60
        time.sleep(0.002)
    texts = {r.pid: [_text(folder, r.job, r.rank, kind) for kind in ("out", "err")] for r in ranks}
    return [
        [Ended(r.status or 0, r.late, r.ended - r.started, *texts[r.pid]) for r in ranks if r.job == j]
        for j in range(len(jobs))
    ]


def _kill(ranks: list[_Rank]) -> None:
    for r in ranks:
        if r.status is None:
            os.kill(r.pid, signal.SIGKILL)


def _text(folder: Path, job: int, rank: int, kind: str) -> str:
    return (folder / f"{job}.{rank}.{kind}").read_text(errors="replace")


def _fork(j: int, job: Any, folder: Path, pipe: Connection) -> list[_Rank]:
    words, count, before, args, env = job
    port, forked = free_port(), []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            pipe.close()
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in {**(launched | address if count > 1 else {}), **env}.items()})
            _be_a_rank(words, before, args, [folder / f"{j}.{rank}.{kind}" for kind in ("out", "err")])
        forked.append(_Rank(pid, j, rank, time.monotonic()))
    return forked


def _be_a_rank(words: list[str], before: Any, args: tuple[Any, ...], files: list[Path]) -> None:
    """The rest of this process's life."""
    status = 1
    try:
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        faulthandler.register(signal.SIGUSR1)
        if before is not None:
            _load(*before)(*args)
        from mrpo_scale import cli

        sys.argv = ["mrpo", *words]
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: nothing of the process that forked may run here.
        os._exit(status)


if __name__ == "__main__":
    this_module._serve(Connection(int(sys.argv[1])))
