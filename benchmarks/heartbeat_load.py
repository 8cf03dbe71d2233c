"""How many requests a second the heartbeats of many ranks send to the job's store, on the host of rank 0: counted, not timed.

    python -m benchmarks.heartbeat_load [--ranks 1024 16384] [--ranks_per_host 8] [--output benchmarks/results/heartbeat-load.json]

All ranks are `Heartbeat`s of mrpo_scale/base/heartbeat.py in this process, without threads: a clock that is only a number calls
their ticks, at moments of their own, and their store is a dict that counts. Boards of the hosts are real. What is simulated: start,
a run whose ranks begin a step together every five seconds, the same with something else to do at each tick (the most that there
can be), and the last host gone: when the last of the others knows, and what that costs.

`get` and `multi_get` count twice: torch's TCPStore waits for the keys first, a request of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from mrpo_scale.base.heartbeat import TIMEOUT, Heartbeat, Verdict, set_activity
from mrpo_scale.base.host_board import Seat
from mrpo_scale.base.tables import aligned_table

STEP = 5.0  #: seconds of an optimizer step; a heartbeat cannot tell shorter ones apart


class CountingStore:
    """A store of the job, and how often it was asked in each second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.values: dict[str, bytes] = {}
        self.requests: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()  # of keys and values, both ways

    def _count(self, requests: int, keys: Sequence[str], *values: bytes) -> None:
        self.requests[int(self.now)] += requests
        self.bytes[int(self.now)] += sum(map(len, keys)) * requests + sum(map(len, values))

    def set(self, key: str, value: str) -> None:
        self._count(1, [key], value.encode())
        self.values[key] = value.encode()

    def append(self, key: str, value: str) -> None:
        self._count(1, [key], value.encode())
        self.values[key] = self.values.get(key, b"") + value.encode()

    def add(self, key: str, amount: int) -> int:
        self._count(1, [key])
        self.values[key] = b"%d" % (int(self.values.get(key, b"0")) + amount)
        return int(self.values[key])

    def check(self, keys: Sequence[str]) -> bool:
        self._count(1, keys)
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """A missing key, for which the real one would wait, is an error."""
        found = [self.values[key] for key in keys]
        self._count(2, keys, *found)
        return found

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._count(1, [key], desired.encode())
        if self.values.get(key, b"") == expected.encode():
            self.values[key] = desired.encode()
        return self.values[key]


class Simulated(Heartbeat):
    """A rank whose end is noted instead of carried out."""

    verdict: Verdict | None = None

    def _end(self, verdict: Verdict) -> None:
        if self.verdict is None:
            self.verdict = verdict
            self._hang_notice(verdict)
            self._say_ended(self._store, 0.0)


class Cluster:
    """Ranks on hosts, one store, one clock."""

    def __init__(self, ranks: int, ranks_per_host: int, timeout: float = TIMEOUT, seed: int = 0) -> None:
        self.store = CountingStore()
        store: Any = self.store
        self.alive = [
            Simulated(Seat(rank, ranks, rank % ranks_per_host, ranks_per_host, f"host-{host}"), timeout, store, store)
            for rank in range(ranks)
            for host in [rank // ranks_per_host]
        ]
        self.tick = self.alive[0].tick
        self.rank0_seconds: list[float] = []  # CPU of each tick of rank 0, which reads all hosts, store included
        self._ticks = 0
        drawn = random.Random(seed)
        self._phases = {rank.rank: drawn.random() * self.tick for rank in self.alive}
        self.alive.sort(key=lambda rank: self._phases[rank.rank])

    def run(self, seconds: float, step: float | None = STEP) -> None:
        """``step``: seconds after which all ranks do something else; None: at every tick."""
        for _ in range(max(1, round(seconds / self.tick))):
            began = self._ticks * self.tick
            set_activity(f"computing step {self._ticks if step is None else int(began // step)}")
            for rank in self.alive:
                self.store.now = began + self._phases[rank.rank]
                started = time.thread_time()
                rank.step(self.tick)
                if rank.rank == 0:
                    self.rank0_seconds.append(time.thread_time() - started)
                rank._read_notice()
            self._ticks += 1

    def kill(self, ranks: Sequence[int]) -> None:
        self.alive = [rank for rank in self.alive if rank.rank not in ranks]

    def run_until_ended(self, limit: float) -> float:
        """Seconds until the last rank knows why all end; ranks that know do no more."""
        since, left = self.store.now, {rank.rank: rank for rank in self.alive}
        while left and self.store.now - since < limit:
            self.run(0.0)
            left = {rank: found for rank, found in left.items() if found.verdict is None}
            self.alive = [rank for rank in self.alive if rank.rank in left]
        assert not left, f"{len(left)} ranks never knew"
        return self.store.now - since


def rates(requests: Counter[int], begun: float, until: float) -> dict[str, float]:
    counted = [requests[second] for second in range(int(begun), int(until))]
    return {"mean": sum(counted) / len(counted), "most": max(counted)}


def simulate(ranks: int, ranks_per_host: int) -> dict[str, Any]:
    cluster = Cluster(ranks, ranks_per_host)
    store = cluster.store
    cluster.run(15.0)
    begun = store.now
    start = sum(store.requests.values()) - store.requests[int(begun)]
    cluster.run(30.0)
    steady, bytes_ = (rates(counted, begun + 1, store.now) for counted in (store.requests, store.bytes))
    rank0_ms = median(cluster.rank0_seconds[len(cluster.rank0_seconds) // 2 :]) * 1e3
    changing = store.now
    cluster.run(10.0, step=None)
    most = rates(store.requests, changing + 1, store.now)
    cluster.run(10.0)
    survivors = list(cluster.alive)
    lost = range(ranks - ranks_per_host, ranks)
    died = store.now
    cluster.kill(lost)
    noticed = cluster.run_until_ended(4 * TIMEOUT)
    (verdict,) = (rank.verdict for rank in survivors if rank.rank == 0)
    assert verdict is not None and verdict.ranks == tuple(lost), verdict
    return {
        "name": f"{ranks}",
        "ranks": ranks,
        "hosts": ranks // ranks_per_host,
        "ranks_per_host": ranks_per_host,
        "tick": cluster.tick,
        "first_15_s": start,
        "steady": steady,
        "steady_bytes": bytes_,
        "rank0_tick_ms": rank0_ms,
        "changing_each_tick": most,
        "host_lost_most": max(store.requests[s] for s in range(int(died), int(store.now) + 1)),
        "host_lost_seconds": noticed,
    }


def cpu_of_a_request(count: int = 20_000) -> float:
    """Microseconds of CPU, of client and server together, that a real TCPStore takes for a look."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    begun = time.process_time()
    for _ in range(count):
        store.check(["verdict"])
    return (time.process_time() - begun) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--ranks_per_host", type=int, default=8)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a mapped board keeps a descriptor in each rank
    result = {
        "store_cpu_us": cpu_of_a_request(),
        "simulated": [simulate(ranks, flags.ranks_per_host) for ranks in flags.ranks],
    }
    rows = [
        (
            *(f"{found[key]:,}" for key in ("ranks", "hosts")), f"{found['tick']:.1f} s", f"{found['first_15_s']:,}",
            f"{found['steady']['mean']:,.0f}", f"{found['steady']['most']:,}", f"{found['changing_each_tick']['most']:,}",
            f"{found['steady_bytes']['mean'] / 1e6:.2f}", f"{found['host_lost_most']:,}", f"{found['host_lost_seconds']:.1f} s",
            f"{found['rank0_tick_ms']:.1f}",
        )
        for found in result["simulated"]
    ]  # fmt: skip
    header = (
        *("ranks", "hosts", "tick", "first 15 s", "requests/s, mean", "most", "most, activity changes each tick"),
        *("MB/s", "most when a host is lost", "all know after", "rank 0's tick, ms"),
    )
    print(aligned_table(header, rows))
    print(f"a look costs client and server together {result['store_cpu_us']:.0f} microseconds of CPU")
    if flags.output:
        flags.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
