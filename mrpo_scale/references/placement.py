"""Which ranks hold which reference. ``spread``: every reference on every shard group, the groups tiling the world."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from mrpo_scale.errors import ConfigError
from mrpo_scale.references.sharding import ShardedReference


def tile_world(world_size: int, shard_size: int) -> list[list[int]]:
    """Contiguous groups of ``shard_size`` ranks; the last one is smaller where they do not divide the world.

    Raises:
        ConfigError: no such group exists.
    """
    if not 1 <= shard_size <= world_size:
        raise ConfigError(
            f"`ref_shard_size: {shard_size}` does not fit this run of {world_size} process(es); give a number from 1 (each rank "
            f"holds whole references) to {world_size} (one copy over all ranks)."
        )
    return [list(range(i, min(i + shard_size, world_size))) for i in range(0, world_size, shard_size)]


def shard_groups(shard_size: int | None, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """This rank's shard group, or None where it is alone in it. Collective over the world.

    Args:
        shard_size: ranks of a group; None takes the ranks of a node, whose weight gathers then never leave it.
        timeout: of the group's collectives; None is the backend's.

    Raises:
        ConfigError: ``shard_size`` is less than 1 or more than the world.
    """
    if not dist.is_initialized():
        tile_world(1, shard_size or 1)
        return None
    if shard_size is None:
        shard_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    own = None
    for ranks in tile_world(dist.get_world_size(), shard_size):
        if len(ranks) == 1:
            continue
        # Every rank makes every group, in the same order, as new_group demands.
        group = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            own = group
    return own


def placement_table(references: Sequence[ShardedReference]) -> str:
    """What lies where, one line per reference, as this rank sees it."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rows = [("reference", "model type", "ranks", "GiB per rank", "attention over pairs")]
    rows += [
        (
            reference.name,
            reference.config.model_type,
            f"{reference.group_size} of {world_size}",
            f"{reference.bytes_per_rank / 2**30:.3f}",
            "shared prompt" if reference.shared_prompt else "separate",
        )
        for reference in references
    ]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
