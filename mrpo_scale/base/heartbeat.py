"""A rank that is gone ends the job on every host, with its name, instead of leaving the others in a collective for half an hour.

Every rank beats on a board that the ranks of its host share in memory: that it lives and what it does. The first of them that
lives, its speaker, copies the board into the job's store. Rank 0 watches all others, the speakers watch rank 0 and the store. So a
host, not a rank, costs the store two small requests a second, and from two thousand hosts on fewer (``MAX_REQUESTS``). Who finds
something wrong leaves a verdict in the store, which the speakers read within a tick and hang on their boards. Clocks of two hosts
are never compared: what counts is how long, on the watcher's own clock, nothing new came.

Beating and watching are threads, so they go on while the main thread hangs in a collective; torch and safetensors let them run
while they write or read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrpo_scale.base.errors import Preempted, one_line
from mrpo_scale.base.host_board import HostBoard, Seat

TIMEOUT = 30.0  #: seconds without a sign of life after which a rank counts as dead
BEATS = 6  #: beats in that time
TICKS = 5  #: looks for a verdict between two beats, fewer where the store would get too many requests
MAX_REQUESTS = 5000  #: a second, of all hosts; one store serves several times as many
PER_TICK = (
    2.4  #: requests of a host at most: a look, a beat where an activity changed, and once a beat two that read rank 0's
)
LONGEST = 150  #: characters of an activity on the board, LONGEST_NOTICE of a verdict
LONGEST_NOTICE = 1200

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
    # A connection for each thread: one that waits for an answer would hold up the other. The store of the process group
    # has no public name.
    stores = [dist.distributed_c10d._get_default_store().clone() for _ in range(2)]  # type: ignore[attr-defined]
    _running = Heartbeat(Seat.from_launcher(), timeout, *(dist.PrefixStore(prefix, store) for store in stores))
    _running.start()
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
    """Why the job ends. ``ranks`` are those at fault; ``failed`` by an error of their own, else gone, or the store is."""

    ranks: tuple[int, ...]
    failed: bool
    text: str
    store_lost: bool = False


@dataclass
class Peer:
    """What a watcher knows of a rank. ``silent``: seconds since its last new beat."""

    host: str = "a host that is not known yet"
    doing: str = "starting"
    beats: int = 0
    silent: float = 0.0


@dataclass
class Record:
    """A host's board as it was read last from the store. ``beats``: of each rank, with its activity."""

    text: bytes = b""
    host: str = ""
    beats: dict[int, Any] = field(default_factory=dict)


class Heartbeat:
    """The two threads of one rank and what they know. See :func:`heartbeat`."""

    def __init__(self, seat: Seat, timeout: float, store: dist.Store, main_store: dist.Store) -> None:
        """``store`` is for the thread that beats, ``main_store`` for the main thread."""
        self.seat, self.rank, self.world_size, self.timeout = seat, seat.rank, seat.world_size, timeout
        self.beat = timeout / BEATS
        self._pace()
        self._store, self._main_store = store, main_store
        self._board: HostBoard | None = None
        self._peers: dict[int, Peer] = {}  # of this host; for rank 0 everybody, for others also rank 0
        self._hosts: dict[str, Record] = {}  # by their keys in the store
        self._departed: set[int] = set()  # by themselves: not missed
        self._steps, self._unread, self._told_at, self._listed = 0, 0.0, 0, False
        self._told: list[str] = []  # the activities that the store knows
        self._answers = 0
        self._leaving, self._ended, self._speaking = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._beat_and_watch, self._watch_store)
        ]

    def _pace(self) -> None:
        """The ticks of a beat, from the number of hosts that share the store."""
        hosts = -(-self.world_size // self.seat.ranks_on_host)
        self.ticks = max(1, min(TICKS, int(self.beat * MAX_REQUESTS / (hosts * PER_TICK))))
        self.tick = self.beat / self.ticks

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    # ---- the main thread leaves --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Leave without being missed. Rank 0 goes last: the others watch it, and the store may live in its process."""
        set_activity("waiting for the other ranks to end")
        try:
            self._say_ended(self._main_store, float("inf") if self.rank == 0 else 0.0)
        except dist.DistError as error:
            logger.warning("the job's store is gone at the end of the run: %s", _one_line(error))
        self._stop()

    def fail(self, error: BaseException) -> None:
        """Tell the others, and stay until they know, because the launcher may take the store away when this process goes."""
        if _is_loss_of_a_peer(error):
            # A symptom. Which rank is at fault, the threads will find out and end this process.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"rank {self.rank} on {self.seat.host} lost a connection while {_doing}: {_one_line(error)}\n"
                    f"waiting up to {self.timeout:.0f} s to see which rank is gone",
                    file=sys.stderr,
                    flush=True,
                )
            set_activity(f"{_doing} (a connection broke)")
            time.sleep(self.timeout + 3 * self.beat)
        verdict = Verdict(
            (self.rank,), True, f"rank {self.rank} on {self.seat.host} failed while {_doing}: {_one_line(error)}"
        )
        set_activity(f"ending with {_one_line(error)}")
        self._leaving.set()  # from now on only the death of the store can end this process early
        try:
            self._main_store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            self._say_ended(self._main_store, self.beat + 3 * self.tick)
        except dist.DistError as gone:
            logger.warning("the job's store is gone: %s", _one_line(gone))
        self._stop()

    def _say_ended(self, store: dist.Store, patience: float) -> None:
        """Note that this rank ends, and wait for the others to note it too, for at most ``patience`` seconds."""
        deadline = time.monotonic() + patience
        store.set(f"ended/{self.rank}", "")
        ended = store.add("ended", 1)
        # All ranks may fail alike, and then all of them ask.
        pause = max(self.tick / 10, 0.0 if self.rank == 0 else self.world_size / MAX_REQUESTS)
        while ended < self.world_size and time.monotonic() < deadline:
            time.sleep(pause)
            ended = store.add("ended", 0)

    def _stop(self) -> None:
        self._leaving.set()
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self.tick)  # Python aborts where a thread comes back from C++ after its end
        if self._board is not None:
            self._board.write(self.rank - self.seat.first, None)  # the next rank speaks for the host
            self._board.unlink()

    # ---- the threads -------------------------------------------------------------------------------------------------

    def _beat_and_watch(self) -> None:
        last = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                # A stall of this process itself (SIGSTOP, a debugger) says nothing about the others.
                self.step(min(now - last, 2 * self.tick))
                last = now
                self._answers += 1
                if self._ended.wait(self.tick):
                    return
        except dist.DistError as error:
            self._lose_store(f"the connection to it broke: {_one_line(error)}")

    def step(self, seconds: float) -> None:
        """One tick, so many ``seconds`` after the last one: beat, and read what is new; a verdict ends the process."""
        board = self._board or self._join()
        if board is None:
            return
        self._steps += 1
        board.write(self.rank - self.seat.first, [self._steps, _shortened(_doing, LONGEST)])
        on_board = {rank: beat for rank in self.seat.ranks if (beat := board.read(rank - self.seat.first))}
        if len(on_board) == self.seat.ranks_on_host:
            board.unlink()
        self._note(self.seat.host, on_board, seconds)
        # One that has not beaten for so long may be stuck: the next one speaks, and at worst two do.
        if any(self._peers[rank].silent <= self.beat + self.tick for rank in on_board if rank < self.rank):
            return
        if self._store.check(["verdict"]):
            self._end(_verdict(self._store.get("verdict")))
            return
        self._speak(on_board)
        self._read_hosts(seconds)
        self._judge()

    def _join(self) -> HostBoard | None:
        """The host's board, which its first rank makes; one of its own for a rank that cannot see it, as in another container."""
        seat, key = self.seat, f"board/{self.seat.first}"
        try:
            if seat.ranks_on_host == 1:
                self._board = HostBoard(1)
            elif seat.local_rank == 0:
                self._board = HostBoard.create(seat.ranks_on_host)
                self._store.set(key, json.dumps([seat.host, str(self._board.path)]))
            elif self._store.check([key]):
                host, path = json.loads(self._store.get(key))
                self._board = HostBoard(seat.ranks_on_host, Path(path if host == seat.host else ""))
        except (OSError, ValueError) as error:
            logger.warning("rank %d does not share its heartbeat with its host: %s", self.rank, _one_line(error))
            if seat.local_rank == 0:
                self._store.set(key, json.dumps([seat.host, ""]))
            self.seat, self._board = replace(seat, local_rank=0, ranks_on_host=1), HostBoard(1)
            self._pace()
        return self._board

    def _note(self, host: str, beats: Mapping[int, Any], seconds: float) -> None:
        """What stands on a board now: {rank: [beats, activity]}, so many ``seconds`` after it was read last."""
        for rank, (beat, doing) in beats.items():
            peer = self._peers.get(rank) or self._peers.setdefault(rank, Peer())
            peer.silent = 0.0 if beat != peer.beats else peer.silent + seconds
            peer.host, peer.doing, peer.beats = host, doing, beat

    def _speak(self, on_board: dict[int, Any]) -> None:
        """Copy the board into the store, once a beat and where a rank does something else now."""
        doing = [doing for _, doing in on_board.values()]
        if self._told != doing or self._steps - self._told_at >= self.ticks:
            self._told, self._told_at = doing, self._steps
            self._store.set(f"host/{self.seat.first}", json.dumps({"host": self.seat.host, "ranks": on_board}))
            if not self._listed:
                self._store.append("hosts", f"{self.seat.first} ")  # type: ignore[attr-defined]
                self._listed = True

    def _read_hosts(self, seconds: float) -> None:
        """Rank 0 reads all hosts each tick, the others once a beat that of rank 0."""
        self._unread += seconds
        if self.rank == 0:
            if len(self._peers) < self.world_size:
                listed = {int(first) for first in self._store.get("hosts").split()} - {self.seat.first}
                self._hosts = {f"host/{n}": self._hosts.get(f"host/{n}") or Record() for n in sorted(listed)}
        elif self.seat.first == 0:
            return  # the board has it
        elif not self._hosts:
            self._hosts = {"host/0": Record()} if self._store.check(["host/0"]) else {}
        elif (self._steps + self.rank // self.seat.ranks_on_host) % self.ticks:
            return  # hosts that started together take turns
        if not self._hosts:
            return
        for record, text in zip(self._hosts.values(), self._store.multi_get(list(self._hosts)), strict=True):
            if text != record.text:
                found = json.loads(text)
                record.text, record.host = text, found["host"]
                record.beats = {int(r): beat for r, beat in found["ranks"].items() if self.rank == 0 or r == "0"}
            self._note(record.host, record.beats, self._unread)
        self._unread = 0.0

    def _judge(self) -> None:
        """Find who has been silent for too long: rank 0 among all ranks, a speaker whether it is rank 0."""
        watched = (set(self._peers) if self.rank == 0 else {0} & set(self._peers)) - {self.rank} - self._departed
        silent = {rank: peer for rank in sorted(watched) if (peer := self._peers[rank]).silent > 2 * self.beat}
        for rank in list(silent):
            if self._store.check([f"ended/{rank}"]):
                self._departed.add(rank)
                del silent[rank]
        if any(peer.silent >= self.timeout for peer in silent.values()):
            # Ranks that died together fell silent within a beat of each other.
            gone = {rank: peer for rank, peer in silent.items() if peer.silent > self.timeout - 1.5 * self.beat}
            verdict = Verdict(tuple(gone), False, f"no sign of life for {self.timeout:.0f} s from {_names(gone)}")
            winner = self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))
            self._end(_verdict(winner))

    def _watch_store(self) -> None:
        """The other thread may wait for an answer for ever, where a host is down or a link is cut. Others may know why."""
        answers, silent, last = -1, 0.0, time.monotonic()
        while not self._ended.wait(self.tick):
            now = time.monotonic()
            silent = 0.0 if self._answers != answers else silent + min(now - last, 2 * self.tick)
            answers, last = self._answers, now
            self._read_notice()
            if silent >= self.timeout:
                self._lose_store(f"no answer from it for {self.timeout:.0f} s")

    def _read_notice(self) -> None:
        """What another rank of this host has found ends this one too."""
        if self._board is not None and (notice := self._board.read_notice()):
            self._end(_verdict(notice))

    def _hang_notice(self, verdict: Verdict) -> None:
        if self._board is not None:
            here = tuple(rank for rank in verdict.ranks if rank in self.seat.ranks)
            text = _shortened(verdict.text, LONGEST_NOTICE)
            self._board.write_notice(asdict(replace(verdict, ranks=here, text=text)))

    def _lose_store(self, how: str) -> None:
        peer = self._peers.get(0) if self.rank else None
        last = f"; rank 0 on {peer.host} was last seen {peer.doing}" if peer else ""
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        where = f"the job's store on {peer.host if peer else self.seat.host} ({address}), the host of rank 0, is gone"
        remedy = "" if peer is None else f": {peer.host} or its launcher is down, or the network to it is cut"
        # The store is in the launcher's process, or in rank 0's, which then cannot speak for its host.
        suspects = () if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else (0,)
        self._end(Verdict(suspects, False, f"{where}{remedy}; {how}{last}", store_lost=True))

    def _end(self, verdict: Verdict) -> None:
        """End this process, unless the main thread is about to. One rank of each host speaks."""
        with self._speaking:
            self._hang_notice(verdict)
            # An error of the same cause may be on its way up the main thread, with a better message.
            grace = self.beat if verdict.failed or verdict.store_lost else 0.0
            if self._ended.wait(grace) or (self._leaving.is_set() and not verdict.store_lost):
                return
            speaker = min(set(self.seat.ranks) - set(verdict.ranks), default=self.rank)
            if self.rank in (speaker, *verdict.ranks):
                print(
                    f"\nerror: {verdict.text}.\nRank {self.rank} on {self.seat.host} was {_doing} and ends now. The same command "
                    "continues from the last complete checkpoint.\n",
                    file=sys.stderr,
                )
            else:
                time.sleep(2 * self.beat)  # most often the launcher ends this process when the speaker is gone
                print(
                    f"rank {self.rank} on {self.seat.host} was {_doing} and ends as well: {verdict.text}",
                    file=sys.stderr,
                )
            if not verdict.store_lost:
                try:
                    self._say_ended(self._store, 0.0)
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


def _verdict(found: bytes | dict[str, Any]) -> Verdict:
    values = found if isinstance(found, dict) else json.loads(found)
    return Verdict(**{**values, "ranks": tuple(values["ranks"])})


def _shortened(text: str, characters: int) -> str:
    """Without its middle, where it is too long: a path's end says most."""
    half = characters // 2 - 1
    return text if len(text) <= characters else f"{text[:half]}...{text[-half:]}"


def _names(peers: dict[int, Peer]) -> str:
    """``rank 2 on host-b, last seen saving checkpoint-40; rank 3 ...``, shortened where a large host went."""
    names = [f"rank {rank} on {peer.host}, last seen {peer.doing}" for rank, peer in peers.items()]
    more = f"; and {len(names) - 8} more, ranks {', '.join(map(str, list(peers)[8:]))}" if len(names) > 8 else ""
    return "; ".join(names[:8]) + more


def _one_line(error: BaseException) -> str:
    text = one_line(error)
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__
