"""The control plane beside groups that take no tensors of the host, for which gloo's stand in here: another group for each, with
the same ranks and timeout, over which everything travels that a host wants to know."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mrpo_scale.base import ranks
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.references.placement import partition, process_groups, spread

pytestmark = pytest.mark.processes

TIMEOUT = timedelta(seconds=47)


def timeout_of(group):
    return group._get_backend(torch.device("cpu")).options._timeout


def talk():
    """Over groups that overlap, of which this rank is in some: {what: what was heard}."""
    ranks.takes_host_tensors = lambda group: group is None or group in ranks._control.values()
    world, rank = ranks.world_group(), ranks.get_rank()
    used = []
    all_gather_object, all_reduce = dist.all_gather_object, dist.all_reduce
    dist.all_gather_object = lambda *a, group=None, **k: (used.append(group), all_gather_object(*a, group=group, **k))[
        1
    ]
    dist.all_reduce = lambda *a, group=None, **k: (used.append(group), all_reduce(*a, group=group, **k))[1]
    try:
        pairs = process_groups(spread([0], [[0, 1, 2, 3]], 2), TIMEOUT)
        parts = process_groups(partition({0: 3.0, 1: 1.0}, [[0, 1, 2, 3]], None), TIMEOUT)
        (pair,) = pairs.values()
        heard = {
            "world": ranks.all_gather_object(rank, world),
            "pair": ranks.all_gather_object(rank, pair),
            "parts": sorted(parts),
            "most": ranks.all_reduce_max([rank, -rank], world),
            "sum": ranks.sum_of_ranks(rank),
            "first": ranks.broadcast_from_rank0(rank, pair),
        }
        for ours in parts.values():
            heard["of part"] = ranks.all_reduce_max([rank], ours)
        try:
            with ranks.fail_together(pair):
                if rank == 3:
                    raise ValueError("broken on purpose")
        except (ConfigError, ValueError) as error:
            heard["failure"] = str(error)
        controls = {id(group) for group in ranks._control.values()}
        heard["over control groups alone"] = all(id(group) in controls for group in used) and len(used) >= 6
        heard["timeouts"] = timeout_of(ranks._control[pair]), timeout_of(ranks._control[world]) == timeout_of(world)
        ranks.barrier()
        return heard
    finally:
        dist.all_gather_object, dist.all_reduce = all_gather_object, all_reduce
        ranks._control.clear()
        ranks.takes_host_tensors = TAKES


TAKES = ranks.takes_host_tensors


def test_what_hosts_say_travels_beside_the_devices_group(pool4):
    for rank, heard in enumerate(pool4.run(talk)):
        mine = [0, 1] if rank < 2 else [2, 3]
        assert heard["world"] == [0, 1, 2, 3] and heard["most"] == [3, 0] and heard["sum"] == 6
        assert heard["pair"] == mine and heard["first"] == mine[0]
        assert heard["parts"] == ([(0, 1, 2)] if rank < 3 else [])
        assert heard.get("of part") == ([2] if rank < 3 else None)
        assert heard["over control groups alone"]
        assert heard["timeouts"] == (TIMEOUT, True)
        wrong = {2: "rank 1 of this shard group failed: ValueError: broken on purpose", 3: "broken on purpose"}
        assert heard.get("failure") == wrong.get(rank)
