"""The heartbeat of more ranks than a machine can run: its real code under the clock of benchmarks/heartbeat_load.py."""

import re

import pytest

from benchmarks.heartbeat_load import Cluster, CountingStore
from mrpo_scale.base import heartbeat
from mrpo_scale.base.heartbeat import MAX_REQUESTS, TIMEOUT
from mrpo_scale.base.host_board import HostBoard


@pytest.fixture(autouse=True)
def activity(monkeypatch):
    monkeypatch.setattr(heartbeat, "_doing", "starting")


@pytest.fixture
def cluster():
    """12 hosts of 4 ranks that have beaten for a while."""
    cluster = Cluster(48, 4)
    cluster.run(15.0)
    return cluster


def requests_per_second(cluster, store, ticks):
    """The most that there are: every rank does something else at each tick."""
    before = store.requests.total()
    cluster.run(ticks * cluster.tick, step=None)
    return (store.requests.total() - before) / (ticks * cluster.tick)


def ends_with(cluster, names):
    """Seconds until all know, and that all end for this reason."""
    survivors = list(cluster.alive)
    seconds = cluster.run_until_ended(3 * TIMEOUT)
    for rank in survivors:
        assert re.findall(r"rank (\d+) on (host-\d+), last seen computing step \d+", rank.verdict.text) == names, (
            rank.rank
        )
    return seconds


def test_a_host_costs_the_same_with_more_ranks():
    few, many = Cluster(32, 2), Cluster(128, 8)
    for cluster in (few, many):
        cluster.run(15.0)
    costs = [requests_per_second(cluster, cluster.store, 20) / 16 for cluster in (few, many)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert costs[1] <= 2.5, "a look and a beat a second, and two more that read rank 0's in five"


def test_ticks_grow_where_the_store_would_get_too_many():
    """Three thousand hosts, of which two are made: at one tick a second they would send more than MAX_REQUESTS."""
    cluster, of_host_1, hosts = Cluster(8, 4), CountingStore(), 3000
    of_host_1.values = cluster.store.values
    for rank in cluster.alive:
        rank.world_size = 4 * hosts
        rank._pace()
        if rank.seat.host == "host-1":
            rank._store = of_host_1
    cluster.tick = rank.tick
    assert 1.0 < rank.tick <= rank.beat
    cluster.run(6 * rank.tick)
    assert requests_per_second(cluster, of_host_1, 30) * hosts <= MAX_REQUESTS


def test_a_lost_host_is_named_with_all_its_ranks(cluster):
    lost = [20, 21, 22, 23]
    cluster.kill(lost)
    assert ends_with(cluster, [(str(rank), "host-5") for rank in lost]) < TIMEOUT + 4 * cluster.tick


@pytest.mark.parametrize("lost", [20, 21])
def test_of_a_host_only_the_lost_rank_is_named(cluster, lost):
    """Also the one that speaks for its host: the next one does then."""
    cluster.kill([lost])
    ends_with(cluster, [(str(lost), "host-5")])


def test_rank_0_is_missed_on_its_own_host_and_on_others(cluster):
    cluster.kill([0])
    ends_with(cluster, [("0", "host-0")])


def test_with_the_whole_host_of_rank_0_the_others_name_rank_0(cluster):
    """Where the store lives on, in a launcher that is alive."""
    cluster.kill([0, 1, 2, 3])
    ends_with(cluster, [("0", "host-0")])


def test_ranks_that_leave_are_not_missed(cluster):
    """A whole host, its speaker first."""
    for rank in [rank for rank in cluster.alive if rank.rank in (20, 21, 22, 23)]:
        rank._say_ended(rank._main_store, 0.0)
        rank._board.write(rank.rank - 20, None)
        cluster.kill([rank.rank])
        cluster.run(2.0)
    cluster.run(3 * TIMEOUT)
    assert not [rank for rank in cluster.alive if rank.verdict]


def test_ranks_that_cannot_see_the_board_beat_by_themselves(monkeypatch, caplog):
    """As in containers of their own, or where memory is full: they cost more, and are missed as before."""
    monkeypatch.setattr(
        HostBoard, "create", lambda slots: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    cluster = Cluster(8, 4)
    cluster.run(15.0)
    assert "rank 5 does not share its heartbeat with its host" in caplog.text
    cluster.kill([6])
    ends_with(cluster, [("6", "host-1")])
