"""The cheapest settings that fit: everything the planner may choose, tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from mrpo_scale.planner.cluster import Cluster
from mrpo_scale.planner.estimate import Estimate, estimate
from mrpo_scale.planner.job import Job, Setting
from mrpo_scale.planner.zero import read_zero

DS_CONFIGS = ("zero2", "zero3", "zero3_hpz", "zero3_offload")
PLACEMENTS: tuple[Literal["spread", "partition"], ...] = ("spread", "partition")


@dataclass(frozen=True)
class Found:
    """``plans``: the cheapest of each engine, the cheapest engine first; none where nothing fits, and ``least`` is then what needs
    least memory. An engine is how the policy is divided over the ranks: a ds_config and the sequence-parallel ranks."""

    plans: tuple[Estimate, ...]
    least: Estimate
    tried: int
    fitting: int

    @property
    def best(self) -> Estimate | None:
        return self.plans[0] if self.plans else None


def search(job: Job, cluster: Cluster, max_tokens: int | None = None, *, live: bool = True) -> Found:
    """Try every setting at the job's window; time decides among those that fit. ``max_tokens``: of a micro-batch, where the recipe
    bounds it so."""
    best: dict[tuple[str, int], Estimate] = {}
    least: Estimate | None = None
    tried = fitting = 0
    for setting in settings(job, cluster, max_tokens, live=live):
        found = estimate(job, setting, cluster)
        tried += 1
        fitting += found.fits
        if least is None or found.peak < least.peak:
            least = found
        engine = setting.zero.name, setting.sequence_parallel
        if found.fits and (engine not in best or _worth(found) < _worth(best[engine])):
            best[engine] = found
    assert least is not None
    return Found(tuple(sorted(best.values(), key=_worth)[:PLANS]), least, tried, fitting)


PLANS = 3  #: that are shown


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
        if zero.secondary > 1 and (cluster.num_nodes == 1 or cluster.per_node % zero.secondary):
            continue  # a second copy inside the node is worth something only where there are several
        for checkpointing, micro_batch, ranks in product((False, True), micro_batches, sequence_sizes(job, cluster)):
            policy = Setting(
                micro_batch, checkpointing, zero, live=live, max_tokens=max_tokens, sequence_parallel=ranks
            )
            if not live:
                yield policy
                continue
            for placement in PLACEMENTS if len(job.references) > 1 and cluster.gpus > 1 else PLACEMENTS[:1]:
                for shard_size in [1] if quantized else shard_sizes(cluster):
                    for offload in (False,) if quantized else (False, True):
                        yield replace(policy, placement=placement, shard_size=shard_size, offload=offload)


def sequence_sizes(job: Job, cluster: Cluster) -> list[int]:
    """Ranks that divide the policy's heads: doublings of one within a node, and 2 or 4 nodes; one alone where its attention is not
    over spans."""
    if not job.policy.end_to_end:
        return [1]
    node = cluster.per_node
    whole = [node * n for n in (2, 4) if cluster.num_nodes % n == 0]
    within = [n for n in (1, 2, 4, 8, 16) if node % n == 0]
    return [n for n in (*within, *whole) if job.policy.heads % n == 0]


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
    f"({', '.join(DS_CONFIGS)}), sequence_parallel_size (1, 2, 4, ... a node, 2, 4 nodes), ref_placement, ref_shard_size (1, 2, "
    "4, ... a node, 2 nodes, ... all), ref_offload"
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
