"""Which ranks hold which reference, and the process groups that follow from it.

``spread``: every reference lies on every shard group, the groups tile the world, and each rank scores its own pairs.
``partition``: the ranks are divided among the references by cost, and each reference's ranks score everybody's pairs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.ranks import all_gather_object, get_rank, new_group, world_group
from mrpo_scale.base.tables import aligned

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """``groups[k]``: the shard groups of reference k; every group holds one whole copy. Only references that are loaded."""

    groups: Mapping[int, tuple[Ranks, ...]]

    def ranks(self, k: int) -> list[int]:
        """All ranks that hold a part of reference k."""
        return [rank for group in self.groups[k] for rank in group]

    def group_of(self, k: int, rank: int) -> Ranks | None:
        """The shard group of reference k that ``rank`` is in, if any."""
        return next((group for group in self.groups[k] if rank in group), None)


def spread(which: Sequence[int], nodes: Sequence[Sequence[int]], shard_size: int | None) -> Placement:
    """The references ``which`` on groups of ``shard_size`` ranks; None takes the ranks of a node, which no gather then leaves.

    Raises:
        ConfigError: ``shard_size`` is less than 1 or more than the world.
    """
    world = [rank for node in nodes for rank in node]
    _check_shard_size(shard_size, len(world))
    groups = _tile(world, shard_size) if shard_size else tuple(tuple(node) for node in nodes)
    return Placement(dict.fromkeys(which, groups))


def partition(
    costs: Mapping[int, float],
    nodes: Sequence[Sequence[int]],
    shard_size: int | None,
    together: Mapping[int, int] | None = None,
) -> Placement:
    """Divide the ranks among the references in proportion to ``costs`` (FLOPs of a pair, in any unit).

    Where there are nodes enough, whole nodes are divided, else ranks; each reference gets at least one. Its ranks form groups of
    at most ``shard_size``; None lets a group fill its node but never cross it. With fewer ranks than references, a rank holds
    several, the costliest dealt first.

    Args:
        together: {reference: the one that it lies with, itself where it is the first}, of those that share their weights.

    Raises:
        ConfigError: as :func:`spread`.
    """
    world = [rank for node in nodes for rank in node]
    _check_shard_size(shard_size, len(world))
    if together is not None:
        sums: dict[int, float] = {}
        for k, cost in costs.items():
            sums[together[k]] = sums.get(together[k], 0.0) + cost
        placed = partition(sums, nodes, shard_size)
        return Placement({k: placed.groups[together[k]] for k in costs})
    if len(world) < len(costs):
        return Placement({k: ((rank,),) for k, rank in _deal(costs, world).items()})
    groups: dict[int, tuple[Ranks, ...]] = {}
    start = 0
    seats = nodes if len(nodes) >= len(costs) else [[rank] for rank in world]
    for k, count in _apportion(costs, len(seats)).items():
        own = [rank for seat in seats[start : start + count] for rank in seat]
        start += count
        held = set(own)
        per_node = [[rank for rank in node if rank in held] for node in nodes]
        groups[k] = _tile(own, shard_size) if shard_size else tuple(tuple(part) for part in per_node if part)
    return Placement(groups)


def find_nodes() -> list[list[int]]:
    """The ranks of each node, in rank order. Collective over the world."""
    if not dist.is_initialized():
        return [[0]]
    # The launcher's own number where it gives one: two nodes may be on one host, or two hosts have one name.
    mine = os.environ.get("GROUP_RANK") or socket.gethostname()
    names = all_gather_object(mine, world_group())
    return [[rank for rank, _ in node] for _, node in groupby(enumerate(names), key=lambda entry: entry[1])]


def process_groups(
    placement: Placement, timeout: timedelta | None = None, *, of_one: bool = False
) -> dict[Ranks, dist.ProcessGroup]:
    """The process groups that this rank is in. Collective over the world: every rank makes every group, in one order.

    Args:
        timeout: of the groups' collectives; None is the backend's.
        of_one: also for groups of one rank, which need none unless their weights stream from host memory.
    """
    wanted = dict.fromkeys(group for groups in placement.groups.values() for group in groups)
    if not dist.is_initialized():
        return {}
    made = {
        ranks: new_group(ranks, timeout, f"references on ranks {_in_words([ranks])}")
        for ranks in wanted
        if len(ranks) > 1 or of_one
    }
    return {ranks: group for ranks, group in made.items() if group is not None}


def shard_group(
    shard_size: int | None, timeout: timedelta | None = None, *, of_one: bool = False
) -> dist.ProcessGroup | None:
    """This rank's group for a single model, spread as :func:`spread` does; None where it is alone. Collective over the world."""
    placement = spread([0], find_nodes(), shard_size)
    groups = process_groups(placement, timeout, of_one=of_one)
    ranks = placement.group_of(0, get_rank())
    return None if ranks is None else groups.get(ranks)


@dataclass(frozen=True)
class Share:
    """What one rank holds of a reference, for the table."""

    model_type: str
    bytes_per_rank: int  #: of its own
    gathered_bytes: int  #: of what a forward gathers, another reference's perhaps
    group_size: int
    shared_prompt: bool
    offload: bool
    mapped: bool
    quantize: str | None = None
    shares_with: str = ""  #: the reference whose weights it uses


def placement_table(
    names: Sequence[str],
    placement: Placement,
    shares: Mapping[int, Share],
    forwards: Mapping[int, int],
    *,
    not_loaded: str = "not loaded: all scores are cached",
) -> str:
    """What lies where, one line per reference.

    Args:
        not_loaded: what is said of those that are in no group.
        shares: of the loaded references, on a rank that holds most of it.
        forwards: of each per optimizer step, as expected from the data; each gathers the reference once.
    """
    rows = [("reference", "model type", "on ranks", "GiB per rank", "gathers/step", "MiB received/step", "attention")]
    for k, name in enumerate(names):
        if k not in placement.groups:
            rows.append((name, "-", not_loaded, "0", "0", "0", "-"))
            continue
        share, gathers = shares[k], forwards[k] if shares[k].group_size > 1 else 0
        rows.append(
            (
                name,
                share.model_type,
                _in_words(placement.groups[k]),
                f"{share.bytes_per_rank / 2**30:.3f}"
                + (f" (weights of {share.shares_with})" if share.shares_with else "")
                + (f" ({share.quantize})" if share.quantize else "")
                + " (host memory)" * share.offload
                + " (its files, shared by a host)" * share.mapped,
                str(gathers),
                f"{gathers * share.gathered_bytes * (share.group_size - 1) / 2**20:.1f}",
                "shared prompt" if share.shared_prompt else "separate",
            )
        )
    return aligned(rows)


def _check_shard_size(shard_size: int | None, world_size: int) -> None:
    if shard_size is not None and not 1 <= shard_size <= world_size:
        raise ConfigError(
            f"`ref_shard_size: {shard_size}` does not fit this run of {world_size} process(es); give a number from 1 (each rank "
            f"holds whole references) to {world_size} (one copy over all ranks)."
        )


def _tile(ranks: Sequence[int], size: int) -> tuple[Ranks, ...]:
    """Contiguous groups of ``size`` ranks; the last one is smaller where they do not divide."""
    return tuple(tuple(ranks[i : i + size]) for i in range(0, len(ranks), size))


def _apportion(costs: Mapping[int, float], seats: int) -> dict[int, int]:
    """Seats in proportion to cost, at least one each, every further one to whoever is slowest with what it has."""
    counts = dict.fromkeys(costs, 1)
    for _ in range(seats - len(costs)):
        counts[max(costs, key=lambda k: costs[k] / counts[k])] += 1
    return counts


def _deal(costs: Mapping[int, float], ranks: Sequence[int]) -> dict[int, int]:
    """{reference: its rank}: the costliest first, each to the rank with the least so far."""
    load = dict.fromkeys(ranks, 0.0)
    rank_of = {}
    for k in sorted(costs, key=lambda k: -costs[k]):
        rank_of[k] = min(load, key=lambda rank: load[rank])
        load[rank_of[k]] += costs[k]
    return rank_of


def _in_words(groups: Sequence[Ranks]) -> str:
    if len(groups) > 4:
        return f"{groups[0][0]}-{groups[-1][-1]}, in {len(groups)} groups of {len(groups[0])}"
    return " ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)
