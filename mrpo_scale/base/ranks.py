"""What the ranks of a run tell each other about themselves: whether one of them failed, and who has most to do."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mrpo_scale.base.errors import ConfigError, TrainingError, one_line

T = TypeVar("T")


def world_group() -> dist.ProcessGroup | None:
    """The group of all ranks; None for a process that is alone. In this module None always means alone."""
    return dist.group.WORLD if dist.is_initialized() else None


def get_rank() -> int:
    """This process's rank; 0 for a process that is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """How many ranks there are; 1 for a process that is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first_of_node() -> bool:
    """Whether this rank is the one of its node that downloads and prepares what the others then read."""
    return get_rank() == 0 or os.environ.get("LOCAL_RANK") == "0"


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """``tensor``, in which the sum over all ranks now stands. Collective over the world."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def fail_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """An error on one rank of the group becomes an error on all: the others would wait for it in their next collective.

    Raises:
        ConfigError, TrainingError: on the ranks that had no error of their own, with that of the first that had.
    """
    try:
        yield
    except Exception as error:
        all_gather_object((isinstance(error, TrainingError), f"{type(error).__name__}: {one_line(error)}"), group)
        raise
    for rank, report in enumerate(all_gather_object(None, group)):
        if report is not None:
            where = "" if group is dist.group.WORLD else " of this shard group"
            in_training, text = report
            raise (TrainingError if in_training else ConfigError)(f"rank {rank}{where} failed: {text}")


def all_gather_object(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """What each rank of the group says. Collective."""
    everybody = [mine] * (1 if group is None else group.size())
    if group is not None:
        dist.all_gather_object(everybody, mine, group=group)
    return everybody


def broadcast_from_rank0(mine: T, group: dist.ProcessGroup | None) -> T:
    """What the first rank of the group says; the others' own is ignored. Collective."""
    said = [mine]
    if group is not None:
        dist.broadcast_object_list(said, group=group, group_src=0)
    return said[0]


def share_within_node(make: Callable[[], T]) -> T:
    """What ``make`` returns to the first rank of a node, on all of its ranks: the others get it through a file. Collective over the
    world.

    Raises:
        ConfigError, TrainingError: on every rank if ``make`` fails on one.
    """
    if not dist.is_initialized():
        return make()
    with tempfile.TemporaryDirectory(prefix="mrpo-") as folder:  # only this user's
        file = Path(folder) / "shared"
        value: list[T] = []
        with fail_together(world_group()):
            if is_first_of_node():
                value.append(make())
                file.write_bytes(pickle.dumps(value[0]))
        files = all_gather_object(str(file) if value else None, world_group())
        with fail_together(world_group()):  # its end is also when the file may go
            if not value:
                (*_, nearest) = (path for path in files[: get_rank()] if path)
                value.append(pickle.loads(Path(nearest).read_bytes()))  # noqa: S301 (of this run)
    return value[0]


def all_reduce_max(counts: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Element-wise maximum over the ranks of ``group``. Collective."""
    if group is None:
        return list(counts)
    counts_N = torch.tensor(counts, device=device)
    dist.all_reduce(counts_N, dist.ReduceOp.MAX, group=group)
    return counts_N.tolist()
