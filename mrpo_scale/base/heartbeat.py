"""A rank that is gone ends the job on every host, with its name, instead of leaving the others in a collective for half an hour.

Every rank beats into the job's store: that it lives and what it does. Rank 0 watches all others, they watch rank 0 and the
store, so a rank costs the store three small requests a second, however many there are. Who finds something wrong leaves a verdict
in the store, which everybody reads within a second. Clocks of two hosts are never compared: what counts is how long, on the
watcher's own clock, nothing new came.

Beating and watching are threads, so they go on while the main thread hangs in a collective; torch and safetensors let them run
while they write or read.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch.distributed as dist

from mrpo_scale.base.errors import Preempted, one_line

TIMEOUT = 30.0  #: seconds without a sign of life after which a rank counts as dead
BEATS = 6  #: beats in that time
TICKS = 5  #: looks for a verdict between two beats

logger = logging.getLogger(__name__)
_doing = "starting"
_running: Heartbeat | None = None
_begun = 0


def set_activity(what: str) -> None:
    """Say what this rank begins to do now: the others name it should it stop there. Free of cost."""
    global _doing
    _doing = what


@contextmanager
def heartbeat(timeout: float = TIMEOUT) -> Iterator[None]:
    """Beat and watch inside the block. Collective over the world, of which every rank must have joined the process group.

    An exception that leaves the block is told to the others, and a rank that leaves it without one is not missed. Nothing
    happens in a world of one, inside another such block, or with a ``timeout`` of 0.

    Args:
        timeout: seconds after which a silent rank counts as dead; it beats six times as often. Each host prints one message
            then, and all processes leave with exit code 1, also those that hang.
    """
    global _running, _begun
    if _running is not None or not timeout or not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    # The store outlives a restart by the launcher, and one process may train twice: no beat of before may count.
    _begun += 1
    prefix = f"mrpo_heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_begun}"
    _running = Heartbeat(prefix, timeout)
    try:
        yield
    except BaseException as error:
        if isinstance(error, Preempted):
            _running.finish()  # all ranks have agreed to leave
        else:
            _running.fail(error)
        raise
    else:
        _running.finish()
    finally:
        _running = None


@dataclass(frozen=True)
class Verdict:
    """Why the job ends. ``ranks`` are those at fault; ``failed`` by an error of their own, else gone."""

    ranks: tuple[int, ...]
    failed: bool
    text: str


@dataclass
class Peer:
    """What a watcher knows of a rank. ``silent``: seconds since its last new beat."""

    host: str = "a host that is not known yet"
    doing: str = "starting"
    beats: int = 0
    silent: float = 0.0


class Heartbeat:
    """The two threads of one rank and what they know. See :func:`heartbeat`."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self.beat = timeout / BEATS
        self.tick = self.beat / TICKS
        self.host = socket.gethostname()
        # A connection for each thread: one that waits for an answer would hold up the other. The store of the process group
        # has no public name.
        stores = [dist.distributed_c10d._get_default_store().clone() for _ in range(2)]  # type: ignore[attr-defined]
        self._store, self._main_store = (dist.PrefixStore(prefix, store) for store in stores)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self._watched = {rank: Peer() for rank in (others if self.rank == 0 else [0])}
        self._answers = 0
        self._leaving, self._ended, self._speaking = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._beat_and_watch, self._watch_store)
        ]
        for thread in self._threads:
            thread.start()

    # ---- the main thread leaves --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Leave without being missed. Rank 0 goes last: the others watch it, and the store may live in its process."""
        set_activity("waiting for the other ranks to end")
        try:
            self._say_ended(float("inf") if self.rank == 0 else 0.0)
        except dist.DistError as error:
            logger.warning("the job's store is gone at the end of the run: %s", _one_line(error))
        self._stop()

    def fail(self, error: BaseException) -> None:
        """Tell the others, and stay until they know, because the launcher may take the store away when this process goes."""
        if _is_loss_of_a_peer(error):
            # A symptom. Which rank is at fault, the threads will find out and end this process.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"rank {self.rank} on {self.host} lost a connection while {_doing}: {_one_line(error)}\n"
                    f"waiting up to {self.timeout:.0f} s to see which rank is gone",
                    file=sys.stderr,
                    flush=True,
                )
            set_activity(f"{_doing} (a connection broke)")
            time.sleep(self.timeout + 3 * self.beat)
        verdict = Verdict(
            (self.rank,), True, f"rank {self.rank} on {self.host} failed while {_doing}: {_one_line(error)}"
        )
        set_activity(f"ending with {_one_line(error)}")
        self._leaving.set()  # from now on only the death of the store can end this process early
        try:
            self._main_store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            self._say_ended(self.beat + 3 * self.tick)
        except dist.DistError as gone:
            logger.warning("the job's store is gone: %s", _one_line(gone))
        self._stop()

    def _say_ended(self, patience: float) -> None:
        """Note that this rank ends, and wait for the others to note it too, for at most ``patience`` seconds."""
        deadline = time.monotonic() + patience
        self._main_store.set(f"ended/{self.rank}", "")
        everybody = [f"ended/{rank}" for rank in range(self.world_size)]
        while time.monotonic() < deadline and not self._main_store.check(everybody):
            time.sleep(self.tick / 10)

    def _stop(self) -> None:
        self._leaving.set()
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self.tick)  # Python aborts where a thread comes back from C++ after its end

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _beat_and_watch(self) -> None:
        last, said = time.monotonic(), ""
        try:
            for tick in count():
                if tick % TICKS == 0 or _doing != said:
                    said = _doing
                    beat = {"host": self.host, "doing": said, "beats": tick + 1}
                    self._store.set(f"beat/{self.rank}", json.dumps(beat))
                now = time.monotonic()
                # A stall of this process itself (SIGSTOP, a debugger) says nothing about the others.
                self._look(min(now - last, 2 * self.tick))
                last = now
                self._answers += 1
                if self._ended.wait(self.tick):
                    return
        except dist.DistError as error:
            self._lose_store(f"the connection to it broke: {_one_line(error)}")

    def _look(self, seconds: float) -> None:
        """Read what is new since the last look, so many ``seconds`` ago; a verdict ends the process."""
        if self._store.check(["verdict"]):
            self._end(_verdict(self._store.get("verdict")))
            return
        begun = [rank for rank, peer in self._watched.items() if peer.beats or self._store.check([f"beat/{rank}"])]
        if not begun:
            return
        for rank, text in zip(begun, self._store.multi_get([f"beat/{rank}" for rank in begun]), strict=True):
            peer, beat = self._watched[rank], json.loads(text)
            peer.silent = 0.0 if beat["beats"] != peer.beats else peer.silent + seconds
            peer.host, peer.doing, peer.beats = beat["host"], beat["doing"], beat["beats"]
            if peer.silent > 2 * self.beat and self._store.check([f"ended/{rank}"]):
                del self._watched[rank]
        if any(peer.silent >= self.timeout for peer in self._watched.values()):
            # Ranks that died together fell silent within a beat of each other.
            gone = {rank: peer for rank, peer in self._watched.items() if peer.silent > self.timeout - 1.5 * self.beat}
            verdict = Verdict(tuple(gone), False, f"no sign of life for {self.timeout:.0f} s from {_names(gone)}")
            winner = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            self._end(_verdict(winner))

    def _watch_store(self) -> None:
        """The other thread may wait for an answer for ever, where a host is down or a link is cut."""
        answers, silent, last = -1, 0.0, time.monotonic()
        while not self._ended.wait(self.tick):
            now = time.monotonic()
            silent = 0.0 if self._answers != answers else silent + min(now - last, 2 * self.tick)
            answers, last = self._answers, now
            if silent >= self.timeout:
                self._lose_store(f"no answer from it for {self.timeout:.0f} s")

    def _lose_store(self, how: str) -> None:
        peer = self._watched.get(0)
        last = f"; rank 0 on {peer.host} was last seen {peer.doing}" if peer else ""
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        where = f"the job's store on {peer.host if peer else self.host} ({address}), the host of rank 0, is gone"
        remedy = "" if peer is None else f": {peer.host} or its launcher is down, or the network to it is cut"
        # The store is in the launcher's process, or in rank 0's, which then cannot speak for its host.
        suspects = () if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else (0,)
        self._end(Verdict(suspects, False, f"{where}{remedy}; {how}{last}"), store_lost=True)

    def _end(self, verdict: Verdict, *, store_lost: bool = False) -> None:
        """End this process, unless the main thread is about to. One rank of each host speaks."""
        with self._speaking:
            # An error of the same cause may be on its way up the main thread, with a better message.
            grace = self.beat if verdict.failed or store_lost else 0.0
            if self._ended.wait(grace) or (self._leaving.is_set() and not store_lost):
                return
            local_rank, on_host = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            first = self.rank - local_rank
            speaker = min(set(range(first, first + on_host)) - set(verdict.ranks), default=self.rank)
            if self.rank in (speaker, *verdict.ranks):
                print(
                    f"\nerror: {verdict.text}.\nRank {self.rank} on {self.host} was {_doing} and ends now. The same command "
                    "continues from the last complete checkpoint.\n",
                    file=sys.stderr,
                )
            else:
                time.sleep(2 * self.beat)  # most often the launcher ends this process when the speaker is gone
                print(f"rank {self.rank} on {self.host} was {_doing} and ends as well: {verdict.text}", file=sys.stderr)
            if not store_lost:
                try:
                    self._store.set(f"ended/{self.rank}", "")
                except dist.DistError as error:
                    print(f"the job's store is gone as well: {_one_line(error)}", file=sys.stderr)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            time.sleep(2 * self.tick)  # all read the verdict before the store goes with this process or its launcher
            logging.shutdown()
            os._exit(1)  # the main thread may hang in a collective: no exception could reach it


def _is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, and this error comes from that. gloo raises plain RuntimeErrors."""
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError) or (type(cause) is RuntimeError and any(s in str(cause) for s in signs)):
            return True
        cause = cause.__cause__
    return False


def _verdict(text: bytes) -> Verdict:
    values: dict[str, Any] = json.loads(text)
    return Verdict(tuple(values["ranks"]), values["failed"], values["text"])


def _names(peers: dict[int, Peer]) -> str:
    """``rank 2 on host-b, last seen saving checkpoint-40; rank 3 ...``, shortened where a large host went."""
    names = [f"rank {rank} on {peer.host}, last seen {peer.doing}" for rank, peer in peers.items()]
    more = f"; and {len(names) - 8} more, ranks {', '.join(map(str, list(peers)[8:]))}" if len(names) > 8 else ""
    return "; ".join(names[:8]) + more


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
