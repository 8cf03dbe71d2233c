"""This rank's shard group, as a test asks for it."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from mrpo_scale.references.placement import find_nodes, process_groups, spread


def shard_group(shard_size: int | None, *, of_one: bool = False) -> dist.ProcessGroup | None:
    """The group of ``shard_size`` ranks that this one is in; None where it is alone. Collective over the world."""
    placement = spread([0], find_nodes(), shard_size)
    groups = process_groups(placement, timedelta(seconds=60), of_one=of_one)
    ranks = placement.group_of(0, dist.get_rank() if dist.is_initialized() else 0)
    return None if ranks is None else groups.get(ranks)
