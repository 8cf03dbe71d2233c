"""What an estimate is made of: a job, a setting, and the phases of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrpo_scale.planner.cluster import Cluster
from mrpo_scale.planner.model_size import ModelSize
from mrpo_scale.planner.workload import Workload
from mrpo_scale.planner.zero import Zero

#: Times that elementwise kernels move what a layer keeps: written, read by the next, and what is not kept at all.
MOVED_FORWARD, MOVED_BACKWARD = 3, 6


@dataclass(frozen=True)
class PlannedModel:
    """A reference on its way into an estimate.

    Args:
        tokenization: which of the tokenizations it reads.
        is_policy: it is the policy with its adapter off, which no rank holds twice.
        shares_with: the number of the reference whose weights it uses.
        adapter_bytes: of its adapter, whole on every rank.
    """

    size: ModelSize
    tokenization: int
    is_policy: bool = False
    shares_with: int | None = None
    adapter_bytes: int = 0

    def held_bytes(self, ranks: int) -> int:
        """On the rank of a shard group that holds most, for this reference and no other."""
        shared = self.is_policy or self.shares_with is not None
        return self.adapter_bytes + (0 if shared else self.size.held_bytes(ranks))


@dataclass(frozen=True)
class Job:
    """What every setting has in common."""

    policy: ModelSize
    references: tuple[PlannedModel, ...]  #: the anchor first
    workload: Workload
    window: int  #: pairs of an optimizer step over all ranks
    tokens_per_forward: int
    gradients_in_forward: bool
    device_type: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class Setting:
    """What the planner may choose."""

    micro_batch: int
    checkpointing: bool
    zero: Zero
    placement: Literal["spread", "partition"] = "spread"
    shard_size: int | None = None
    offload: bool = False
    live: bool = True  #: references in the step; False: all scores are in the cache
    only_anchor: bool = False  #: DPO
    max_tokens: int | None = None  #: of a micro-batch, instead of so many pairs
    sequence_parallel: int = 1  #: neighbouring ranks that compute the tokens of each other's pairs together (Ulysses)


@dataclass(frozen=True)
class Phase:
    """Seconds of one part of a step on the busiest rank. Products and elementwise kernels follow each other; links work beside
    them where they overlap, and an exchange between sequence-parallel ranks is waited for."""

    name: str
    products: float
    elementwise: float
    links: float
    overlap: bool = True
    exchange: float = 0.0

    @property
    def seconds(self) -> float:
        computing = self.products + self.elementwise + self.exchange
        return max(computing, self.links) if self.overlap else computing + self.links


def seconds_of(products: float, attention: float, cluster: Cluster, itemsize: int) -> float:
    """Matrix products at the rate that their dtype allows."""
    peak = cluster.gpu.bf16_flops if itemsize == 2 else cluster.gpu.float32_flops
    return products / (peak * cluster.assumed.matmul) + attention / (peak * cluster.assumed.attention)
