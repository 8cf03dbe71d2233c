"""One setting on one cluster: memory of a rank by kind, and the seconds and bytes of an optimizer step by phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mrpo_kernels.chunked_head import token_blocks, word_tiles

from mrpo_scale.logps.flops import TrainingFlops, Work, over_ranks, training_flops
from mrpo_scale.planner.cluster import Cluster, Traffic
from mrpo_scale.planner.job import MOVED_BACKWARD, MOVED_FORWARD, Job, Phase, Setting, seconds_of
from mrpo_scale.planner.live import ScoredLive
from mrpo_scale.planner.model_size import ModelSize
from mrpo_scale.planner.workload import Share
from mrpo_scale.planner.zero import Zero, policy_states, policy_traffic


@dataclass(frozen=True)
class Estimate:
    """Bytes are of the rank that holds most."""

    setting: Setting
    cluster: Cluster
    held: Mapping[str, int]  #: device bytes, by kind, from the first step to the last
    moments: Mapping[str, Mapping[str, int]]  #: beside them: {moment of a step: {kind: device bytes}}
    host: Mapping[str, int]
    phases: tuple[Phase, ...]
    traffic: Mapping[str, Traffic]
    policy_flops: int  #: of a step, all ranks
    reference_flops: int
    useful_flops: int
    accumulation: int
    efficiency: float  #: of the policy's micro-batches, for which all ranks wait: mean over longest

    @property
    def moment(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + sum(self.moments[self.moment].values())

    @property
    def fits(self) -> bool:
        """On the device, and what is offloaded beside it."""
        return self.peak <= self.cluster.usable and sum(self.host.values()) <= self.cluster.assumed.host_memory

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def flops(self) -> int:
        return self.policy_flops + self.reference_flops

    @property
    def mfu(self) -> float:
        peak = self.cluster.gpu.bf16_flops if self.cluster.name != "cpu" else self.cluster.gpu.float32_flops
        return self.useful_flops / (self.seconds * self.cluster.gpus * peak)


def estimate(job: Job, setting: Setting, cluster: Cluster) -> Estimate:
    """Memory, time and traffic of a step.

    Raises:
        ConfigError: a shard size that does not fit the cluster.
    """
    accumulation = max(1, job.window // (setting.micro_batch * cluster.gpus))
    share = job.workload.policy(
        job.policy,
        micro_batch=setting.micro_batch,
        accumulation=accumulation,
        ranks=cluster.gpus,
        max_tokens=setting.max_tokens,
        sequence=setting.sequence_parallel,
    )
    references = ScoredLive(job, setting, cluster, accumulation) if setting.live else None
    states = policy_states(job.policy, setting.zero, cluster)
    held, host = dict(states.device), dict(states.host)
    moments: dict[str, dict[str, int]] = {
        "forward and backward": {"gathered": states.gathered, **_policy_moment(job, setting)},
        "optimizer step": {"step": states.step},
    }
    phases, traffic = [], {}
    reference_flops = 0
    if references is not None:
        (host if setting.offload else held)["references"] = references.held
        moments["scoring"] = references.moment()
        phases.append(references.phase())
        traffic["references"] = references.traffic()
        reference_flops = references.flops()
    policy_phases, policy_link = _policy_phases(job, setting, cluster, share)
    costs = _training(job, setting, share.mean)
    return Estimate(
        setting=setting,
        cluster=cluster,
        held=held,
        moments=moments,
        host=host,
        phases=(*phases, *policy_phases),
        traffic={**traffic, "policy": policy_link},
        policy_flops=costs.total * cluster.gpus,
        reference_flops=reference_flops,
        useful_flops=costs.useful * cluster.gpus,
        accumulation=accumulation,
        efficiency=share.efficiency,
    )


def _training(job: Job, setting: Setting, work: Work) -> TrainingFlops:
    return training_flops(
        job.policy.costs,
        work,
        gradient_checkpointing=setting.checkpointing,
        gradients_in_forward=job.gradients_in_forward,
        frozen=job.policy.trained is not None,
    )


def _policy_moment(job: Job, setting: Setting) -> dict[str, int]:
    """Activations and head at the start of the backward of the largest micro-batch."""
    size, ranks = job.policy, setting.sequence_parallel
    most = None if setting.max_tokens is None else setting.max_tokens * ranks
    work = over_ranks(job.workload.largest_micro_batch(size, setting.micro_batch, most), ranks)
    moment = {
        "activations": size.activations.kept(work, size.itemsize, checkpointing=setting.checkpointing, ranks=ranks),
        "head": head_bytes(size, work.response_tokens, job.device_type, in_forward=job.gradients_in_forward),
    }
    if setting.checkpointing:
        moment["recomputed layer"] = size.activations.layer(work, size.itemsize, ranks=ranks)
    return moment


def head_bytes(size: ModelSize, tokens: int, device_type: str, *, in_forward: bool) -> int:
    """The head's own memory in a backward: a tile of logits, gradients of hidden and weight. The weight is among the gathered ones.

    Its gradient is float32 where it is a sum over blocks of tokens, or made in the forward.
    """
    blocks = list(token_blocks(tokens, device_type))
    block = blocks[0].stop if blocks else 0
    tile = word_tiles(block, size.head // size.hidden, device_type)[0]
    logits = 4 * block * (tile.stop - tile.start)
    gradient = size.head * (4 if in_forward or len(blocks) > 1 else size.itemsize)
    if gradient and size.itemsize < 4 and (in_forward or len(blocks) > 1):
        gradient += size.head * size.itemsize  # cast at the end
    return logits + gradient + tokens * size.hidden * (4 if in_forward else size.itemsize)


def _policy_phases(job: Job, setting: Setting, cluster: Cluster, share: Share) -> tuple[tuple[Phase, ...], Traffic]:
    gpu, assumed, size = cluster.gpu, cluster.assumed, job.policy
    flops = _training(job, setting, share.total)
    total = share.total
    attention = size.costs.per_score * total.scores
    again = attention // 2 if size.costs.attn_implementation != "eager" else 0
    in_backward = (2 + setting.checkpointing) * attention + again
    rest = flops.backward + flops.recompute + flops.head - in_backward  # the head wherever it is done
    products = {
        "forward": seconds_of(flops.forward - attention, attention, cluster, size.itemsize),
        "backward": seconds_of(rest, in_backward, cluster, size.itemsize),
    }
    ranks = setting.sequence_parallel
    layer_bytes = size.activations.kept(total, size.itemsize, checkpointing=False, ranks=ranks)
    moved = {
        "forward": MOVED_FORWARD * layer_bytes,
        "backward": (MOVED_BACKWARD + MOVED_FORWARD * setting.checkpointing) * layer_bytes,
    }
    count, sent = len(share.forwards), policy_traffic(size, setting.zero, cluster, checkpointing=setting.checkpointing)
    links = {"forward": sent.forwards(count), "backward": sent.backward * count}
    exchanged = exchanged_by_attention(size, total.positions, count, ranks, cluster)
    exchanges = {"forward": exchanged, "backward": exchanged * (1 + setting.checkpointing)}
    phases = [
        Phase(
            f"policy {name}",
            products[name],
            moved[name] / (gpu.memory_bandwidth * assumed.memory),
            cluster.seconds(links[name]),
            setting.zero.overlap,
            cluster.seconds(exchanges[name]),
        )
        for name in ("forward", "backward")
    ]
    phases.append(_optimizer_phase(size, setting.zero, cluster, sent.step))
    return tuple(phases), sum((*links.values(), *exchanges.values()), sent.step)


def exchanged_by_attention(size: ModelSize, tokens: int, forwards: int, ranks: int, cluster: Cluster) -> Traffic:
    """All-to-alls of sequence parallelism over ``forwards`` forwards, in which a rank has ``tokens``: in every layer queries, keys
    and values on the way to the ranks of their heads, and outputs on the way back. Heads of keys that the ranks do not divide are
    repeated until they do."""
    keys = math.lcm(size.key_heads, ranks)
    layers = size.activations.num_layers
    elements = tokens * layers * size.head_size * (2 * size.heads + 2 * keys)
    return cluster.exchange(size.itemsize * elements, ranks, 2 * layers * forwards)


def _optimizer_phase(size: ModelSize, zero: Zero, cluster: Cluster, step: Traffic) -> Phase:
    shard, assumed = size.trained_shard(zero.ranks(cluster)), cluster.assumed
    # Read master, two moments, gradient; write master, two moments, weight.
    moved = shard * (4 * 7 + size.itemsize)
    links = cluster.seconds(step)
    if zero.offload_optimizer:
        return Phase(
            "optimizer",
            0.0,
            moved / assumed.host_bandwidth,
            links + 2 * size.itemsize * shard / cluster.gpu.host_link,
            False,
        )
    return Phase("optimizer", 0.0, moved / (cluster.gpu.memory_bandwidth * assumed.memory), links, False)
