"""A pool of gloo workers that outlives the tests, because starting one costs 20 s of imports per rank.

The parent talks to each worker over a pipe. A function travels as (file, qualified name), since pytest's importlib mode leaves
test modules without an importable name; arguments and results are pickled. Run as a script, this file is the worker.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.distributed.ports import free_port  # by PYTHONPATH where this file is the worker

ROOT = Path(__file__).resolve().parents[2]
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
START_TIMEOUT = 240.0  #: seconds until every worker has its imports and its process group
GRACE = 10.0  #: seconds that the others get once a rank has failed: most often they wait for it in a collective


class WorkerError(AssertionError):
    """A rank raised, died or hung. The message names it and holds what it left behind."""


class Pool:
    """``world_size`` processes in one gloo group, started at first use and again after a failure that left ranks apart."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank at once; its result per rank.

        Args:
            function: of a module's top level.
            timeout: seconds, for this call alone.

        Raises:
            WorkerError: a rank raised, died, or did not come back in time.
        """
        if not self.processes:
            self._start()
        where = (function.__module__, sys.modules[function.__module__].__file__, function.__qualname__)
        for pipe in self._pipes:
            pipe.send(where)
            pipe.send_bytes(pickle.dumps((args, kwargs)))  # apart: they may hold classes of the module named there
        return self._collect(timeout, function.__qualname__)

    def close(self) -> None:
        """End every worker; ask first, then kill."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mrpo-pool-")
        shared = {
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "LOCAL_SIZE": "1",  # as for jobs
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        for rank in range(self.world_size):
            ours, theirs = Pipe()
            with self._log(rank).open("wb") as log, theirs:
                self.processes.append(
                    subprocess.Popen(
                        # -P: this folder must not become an import root.
                        [sys.executable, "-P", __file__, str(theirs.fileno()), self._folder.name],
                        env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                    )
                )
            self._pipes.append(ours)
        self._collect(START_TIMEOUT, "start of the workers")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """One answer per rank. A call that fails on some ranks leaves them apart: the pool is killed, to start afresh."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while pending := [r for r in range(self.world_size) if r not in results and r not in failures]:
            ready = wait([self._pipes[r] for r in pending], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [r for r in pending if self._pipes[r] in ready]:
                try:
                    succeeded, value = pickle.loads(self._pipes[rank].recv_bytes())  # noqa: S301 (from our own worker)
                except (EOFError, ConnectionError):
                    status = self.processes[rank].wait(GRACE)
                    failures[rank] = f"the process ended with status {status}\n{self._tail(rank)}"
                else:
                    (results if succeeded else failures)[rank] = value
                if rank in failures:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not pending and not failures:
            return [results[r] for r in range(self.world_size)]
        message = "".join(f"\n--- rank {r} failed in {what}:\n{failures[r]}" for r in sorted(failures))
        message += self._stacks(pending, what)
        if len(failures) < self.world_size or any(p.poll() is not None for p in self.processes):
            self._kill()
        raise WorkerError(message)

    def _stacks(self, ranks: list[int], what: str) -> str:
        """Where the ranks that have not answered are."""
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGUSR1)
        if ranks:
            time.sleep(1.0)
        return "".join(f"\n--- rank {r} hangs in {what}:\n{self._tail(r)}" for r in ranks)

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.close()

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"rank{rank}.log"

    def _tail(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")[-4000:]


def _serve(pipe: Connection, folder: str) -> None:
    """Answer calls until the parent closes the pipe, or dies."""
    faulthandler.register(signal.SIGUSR1)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    pipe.send((True, None))
    while True:
        try:
            module_name, file, qualname = pipe.recv()
            payload = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            break
        try:
            function = _load(module_name, file, qualname)
            args, kwargs = pickle.loads(payload)  # noqa: S301 (from our own parent)
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except Exception:  # noqa: BLE001 (the parent raises it)
            answer = pickle.dumps((False, traceback.format_exc()))
        gc.collect()  # a ZeRO-3 config that a trainer's cycles keep alive would partition the next test's models
        pipe.send_bytes(answer)
    dist.destroy_process_group()


def _load(module_name: str, file: str, qualname: str) -> Any:
    """A function of a test module, under the name the parent has for it, so that pickles mean the same on both sides."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    value: Any = sys.modules[module_name]
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
