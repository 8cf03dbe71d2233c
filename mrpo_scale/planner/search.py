"""The cheapest setting that fits: everything the planner may choose, tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mrpo_scale.planner.cluster import Cluster
from mrpo_scale.planner.estimate import Estimate, estimate
from mrpo_scale.planner.job import Job, Setting
from mrpo_scale.planner.zero import read_zero

DS_CONFIGS = ("zero2", "zero3", "zero3_hpz", "zero3_offload")
PLACEMENTS: tuple[Literal["spread", "partition"], ...] = ("spread", "partition")


@dataclass(frozen=True)
class Found:
    """``best`` is None where nothing fits; ``least`` is then what needs least memory."""

    best: Estimate | None
    least: Estimate
    tried: int
    fitting: int


def search(job: Job, cluster: Cluster, max_tokens: int | None = None, *, live: bool = True) -> Found:
    """Try every setting at the job's window; time decides among those that fit. ``max_tokens``: of a micro-batch, where the recipe
    bounds it so."""
    best: Estimate | None = None
    least: Estimate | None = None
    tried = fitting = 0
    for setting in settings(job, cluster, max_tokens, live=live):
        found = estimate(job, setting, cluster)
        tried += 1
        fitting += found.fits
        if least is None or found.peak < least.peak:
            least = found
        if found.fits and (best is None or _worth(found) < _worth(best)):
            best = found
    assert least is not None
    return Found(best, least, tried, fitting)


def _worth(found: Estimate) -> tuple[float, ...]:
    """Less is better: time to a hundredth, then nothing in host memory, then nothing computed twice, then device memory."""
    moved = found.setting.offload + found.setting.zero.offload_optimizer
    return (round(math.log(found.seconds) / math.log(1.01)), moved, found.setting.checkpointing, found.peak)


def settings(job: Job, cluster: Cluster, max_tokens: int | None = None, *, live: bool = True) -> Iterator[Setting]:
    """All combinations of micro-batch, gradient checkpointing, ds_config, and where references lie and what their groups are."""
    per_rank = max(1, job.window // cluster.gpus)
    micro_batches = [n for n in range(1, per_rank + 1) if per_rank % n == 0] if max_tokens is None else [per_rank]
    quantized = any(m.size.quantize for m in job.references)  # those are neither sharded nor offloaded
    zeros = [read_zero(name) for name in (*DS_CONFIGS, *(["none"] if cluster.gpus == 1 else []))]
    for zero in zeros:
        if zero.secondary > 1 and (cluster.num_nodes == 1 or zero.secondary > cluster.per_node):
            continue  # a second copy inside the node is worth something only where there are several
        for checkpointing in (False, True):
            for micro_batch in micro_batches:
                policy = Setting(micro_batch, checkpointing, zero, live=live, max_tokens=max_tokens)
                if not live:
                    yield policy
                    continue
                for placement in PLACEMENTS if len(job.references) > 1 and cluster.gpus > 1 else PLACEMENTS[:1]:
                    for shard_size in [1] if quantized else shard_sizes(cluster):
                        for offload in (False,) if quantized else (False, True):
                            yield replace(policy, placement=placement, shard_size=shard_size, offload=offload)


def shard_sizes(cluster: Cluster) -> list[int]:
    """Doublings of one device up to a node, then of nodes up to the whole cluster."""
    sizes, size = [], 1
    while size < cluster.per_node:
        sizes.append(size)
        size *= 2
    nodes = 1
    while nodes * cluster.per_node < cluster.gpus:
        sizes.append(nodes * cluster.per_node)
        nodes *= 2
    return [*sizes, cluster.gpus]


#: What was tried, for the reader.
TRIED = (
    "per_device_train_batch_size (divisors of a rank's share of the step), gradient_checkpointing, ds_config "
    f"({', '.join(DS_CONFIGS)}), ref_placement, ref_shard_size (1, 2, 4, ... a node, 2 nodes, ... all), ref_offload"
)


def smallest_that_fits(
    job: Job, cluster: Cluster, max_tokens: int | None = None, *, most: int = 16384
) -> tuple[Cluster, Found] | None:
    """The cluster grown by doublings of its nodes until something fits; None if not even ``most`` devices do."""
    while cluster.gpus * 2 <= most:
        gpus = cluster.gpus * 2
        cluster = replace(cluster, gpus=gpus, per_node=min(gpus, max(cluster.per_node, min(8, gpus))))
        grown = replace(job, window=max(job.window, gpus))
        found = search(grown, cluster, max_tokens)
        if found.best is not None:
            return cluster, found
    return None
