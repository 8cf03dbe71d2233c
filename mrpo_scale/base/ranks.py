"""What the ranks of a run tell each other about themselves: whether one of them failed, and who has most to do.

Numbers and objects that the host wants travel between hosts, over :func:`control_group`; only :func:`sum_over_ranks`, of a tensor
that stays on its device, uses the device's communicator. So nothing here makes a host wait for its GPU.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mrpo_scale.base.errors import ConfigError, TrainingError, one_line

T = TypeVar("T")

_control: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


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
    """``tensor``, on the run's device, in which the sum over all ranks now stands. Collective over the world."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def new_group(ranks: Sequence[int], timeout: timedelta | None, description: str) -> dist.ProcessGroup | None:
    """A group for the tensors of ``ranks``, and beside it its :func:`control_group`; None on the other ranks. Collective over the
    world: every rank makes every group, in one order.

    Args:
        timeout: of the groups' collectives; None is the backend's.
    """
    group = dist.new_group(list(ranks), timeout=timeout, group_desc=description)
    if takes_host_tensors(world_group()):
        return group if get_rank() in ranks else None
    control = dist.new_group(list(ranks), timeout=timeout, backend="gloo", group_desc=f"control of {description}")
    if get_rank() not in ranks:
        return None
    _control[group] = control
    return group


def control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group over which the ranks of ``group`` say what their hosts want to know: gloo's, with the same timeout.

    ``group`` itself if it takes tensors of the host, as gloo does. The world's is made at the first call, which is collective as
    all calls here are; that of a shard group by :func:`new_group`.

    Raises:
        ConfigError: the hosts do not reach each other over the network that gloo chose.
    """
    if takes_host_tensors(group):
        return group
    if group not in _control:
        assert group is dist.group.WORLD, "a shard group's control group is made with it, by new_group"
        backend = group._get_backend(group._device_types[0])
        try:
            _control[group] = dist.new_group(
                timeout=backend.options._timeout, backend="gloo", group_desc="control of the world"
            )
        except RuntimeError as error:
            raise ConfigError(
                f"the ranks cannot talk to each other over gloo, which carries what their hosts must agree on: {one_line(error)}; "
                "set `GLOO_SOCKET_IFNAME` to the interface between the hosts, as `NCCL_SOCKET_IFNAME` (docs/cluster.md)."
            ) from error
    return _control[group]


def takes_host_tensors(group: dist.ProcessGroup | None) -> bool:
    """Whether the group has a backend for them, as a run on CPUs has: then it is its own control group."""
    return group is None or torch.device("cpu") in group._device_types


@contextmanager
def fail_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """An error on one rank of the group becomes an error on all: the others would wait for it in their next collective.

    Raises:
        ConfigError, TrainingError: on the ranks that had no error of their own, with that of the first that had.
    """
    try:
        yield
    except Exception as error:
        all_reduce_max([1], group)
        all_gather_object((isinstance(error, TrainingError), f"{type(error).__name__}: {one_line(error)}"), group)
        raise
    (failed,) = all_reduce_max([0], group)  # a number each is all that is said where nobody failed
    for rank, report in enumerate(all_gather_object(None, group) if failed else ()):
        if report is not None:
            where = "" if group is dist.group.WORLD else " of this shard group"
            in_training, text = report
            raise (TrainingError if in_training else ConfigError)(f"rank {rank}{where} failed: {text}")


def all_gather_object(mine: T, group: dist.ProcessGroup | None) -> list[T]:
    """What each rank of the group says. Collective."""
    everybody = [mine] * (1 if group is None else group.size())
    if group is not None:
        dist.all_gather_object(everybody, mine, group=control_group(group))
    return everybody


def broadcast_from_rank0(mine: T, group: dist.ProcessGroup | None) -> T:
    """What the first rank of the group says; the others' own is ignored. Collective."""
    said = [mine]
    if group is not None:
        dist.broadcast_object_list(said, group=control_group(group), group_src=0)
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


def all_reduce_max(counts: Sequence[int], group: dist.ProcessGroup | None) -> list[int]:
    """Element-wise maximum over the ranks of ``group``. Collective."""
    if group is None or not counts:
        return list(counts)
    counts_N = torch.tensor(counts)
    dist.all_reduce(counts_N, dist.ReduceOp.MAX, group=control_group(group))
    return counts_N.tolist()


def sum_of_ranks(number: float) -> float:
    """Sum of what the hosts of all ranks say, in float64. Collective over the world."""
    if (group := world_group()) is None:
        return number
    total = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(total, group=control_group(group))
    return total.item()


def barrier() -> None:
    """Wait for all ranks; their devices may be behind. Nothing for a process that is alone. Collective over the world."""
    if (group := world_group()) is not None:
        dist.barrier(control_group(group))
