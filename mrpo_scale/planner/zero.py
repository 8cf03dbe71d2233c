"""What a ds_config asks of DeepSpeed: how the policy's states are divided, and where they lie. Read as DeepSpeed 0.19 does it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.ds_config import check_sharding, find_ds_config, read_ds_config
from mrpo_scale.planner.cluster import Cluster, Traffic
from mrpo_scale.planner.model_size import ModelSize

#: DeepSpeed's defaults of what ds_configs here leave out.
_DEFAULTS = {
    "reduce_bucket_size": 5 * 10**8,
    "allgather_bucket_size": 5 * 10**8,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
    "stage3_max_live_parameters": 10**9,
    "sub_group_size": 10**9,
    "zero_hpz_partition_size": 1,
}
#: What transformers writes for ``auto``, with h the hidden size.
_AUTO = {
    "reduce_bucket_size": lambda h: h * h,
    "stage3_prefetch_bucket_size": lambda h: int(0.9 * h * h),
    "stage3_param_persistence_threshold": lambda h: 10 * h,
}


@dataclass(frozen=True)
class Zero:
    """``stage`` 0: no DeepSpeed; weights, gradients and optimizer whole on every rank."""

    name: str
    stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overlap: bool = True
    keys: tuple[tuple[str, Any], ...] = ()

    def number(self, key: str, hidden: int) -> int:
        """A size of the config, ``auto`` as transformers fills it in."""
        value = dict(self.keys).get(key, _DEFAULTS[key])
        return _AUTO[key](hidden) if value == "auto" else int(value)

    @property
    def secondary(self) -> int:
        """Ranks that share a second copy of the weights, for gathers that stay in a node (hpZ); 1: there is none."""
        return self.number("zero_hpz_partition_size", 0)

    def ranks(self, cluster: Cluster) -> int:
        return cluster.gpus if self.stage else 1


def read_zero(name: str, cluster: Cluster | None = None) -> Zero:
    """A ds_config by its path or by the name of one of the package (zero3, zero2, ...); ``none`` for no DeepSpeed.

    Args:
        cluster: the ranks that its groups are to divide.

    Raises:
        ConfigError: no such file, or one that is not JSON, or a stage the planner does not know, or groups that nodes are not made
            of.
    """
    if name == "none":
        return Zero("none")
    path = find_ds_config(name, "--ds_config")
    settings = read_ds_config(path)
    if cluster is not None:
        check_sharding(settings, cluster.gpus, cluster.per_node)
    try:
        config = settings["zero_optimization"]
        stage = int(config["stage"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a DeepSpeed config with `zero_optimization.stage`: {error}.") from error
    if stage not in (2, 3):
        raise ConfigError(
            f"{path}: `zero_optimization.stage: {stage}` cannot be estimated; the planner knows stages 2 and 3."
        )

    def offloaded(key: str) -> bool:
        return (config.get(key) or {}).get("device", "none") != "none"

    return Zero(
        name=Path(path).stem,
        stage=stage,
        offload_optimizer=offloaded("offload_optimizer"),
        offload_parameters=offloaded("offload_param"),
        overlap=bool(config.get("overlap_comm", False)),
        keys=tuple((key, config[key]) for key in _DEFAULTS if key in config),
    )


@dataclass(frozen=True)
class PolicyStates:
    """Bytes per rank, by where they lie. ``gathered``: whole weights at the worst moment of a step."""

    device: dict[str, int]
    host: dict[str, int]
    gathered: int
    step: int  #: what the optimizer's step needs for a moment, beside the states


def policy_states(size: ModelSize, zero: Zero, cluster: Cluster) -> PolicyStates:
    """Weights, gradients and AdamW's states of the policy, between two forwards of one step.

    DeepSpeed's optimizer always has a float32 copy of the weights, also of weights that are float32 (seen with 0.19.8). Without
    DeepSpeed, mixed precision keeps float32 weights and gradients.
    """
    ranks, b, n = zero.ranks(cluster), size.itemsize, size.parameters
    shard, trained = size.zero_shard(ranks), size.trained_shard(ranks)
    parts: dict[str, int] = {}
    if zero.stage == 3:
        whole = size.persistent(zero.number("stage3_param_persistence_threshold", size.hidden))
        parts["parameters"] = b * shard
        extra = b * whole
        if zero.secondary > 1:
            threshold = zero.number("stage3_param_persistence_threshold", size.hidden)
            extra += b * size.secondary_shard(min(zero.secondary, ranks), ranks, threshold)
        gradients = b * trained
        bucket = b * min(zero.number("reduce_bucket_size", size.hidden), size.trained_parameters)
        live = min(n - whole, zero.number("stage3_max_live_parameters", size.hidden))
        gathered = b * max(live, min(size.embedding, n), size.layer)
    else:
        b_weights = b if zero.stage else 4
        parts["parameters"], extra, gathered = b_weights * n, (2 * n if zero.stage == 0 and b == 2 else 0), 0
        gradients = b * trained if zero.stage else 4 * size.trained_parameters
        bucket = 2 * b * zero.number("reduce_bucket_size", size.hidden) if zero.stage else 0
    master = 4 * trained if zero.stage else 0
    optimizer = {"optimizer": master + 8 * trained}
    step = min(trained, zero.number("sub_group_size", size.hidden)) * 4 if b < 4 and zero.stage else 0
    device: dict[str, int] = {}
    host: dict[str, int] = {}
    (host if zero.offload_parameters else device).update(parts)
    device["parameters"] = device.get("parameters", 0) + extra
    if zero.offload_optimizer:
        host |= optimizer | {"gradients": gradients + 4 * trained}
        device["gradients"], step = bucket, 0
    else:
        device |= optimizer
        device["gradients"] = gradients + bucket
    return PolicyStates(device, host, gathered, step)


class PolicyTraffic(NamedTuple):
    """``first``: of the first forward of an optimizer step; ``forward``, ``backward``: of each further one, and of each backward;
    ``step``: once per optimizer step, after them."""

    first: Traffic
    forward: Traffic
    backward: Traffic
    step: Traffic

    def forwards(self, count: int) -> Traffic:
        return self.first + self.forward * (count - 1)


def policy_traffic(size: ModelSize, zero: Zero, cluster: Cluster) -> PolicyTraffic:
    """What ZeRO sends.

    ZeRO-3 gathers every weight for the forward and again for the backward (whose recomputation needs no third gather), one
    weight at a time, and scatters the gradients of every micro-batch in buckets. hpZ keeps what the first forward after an
    optimizer step has gathered on the ranks of each node: all gathers until the next step stay there. ZeRO-2 scatters the gradients
    and gathers the updated weights once; plain data parallelism does both in one all-reduce.
    """
    ranks, total, h = cluster.gpus, size.itemsize * size.parameters, size.hidden
    trained = size.itemsize * size.trained_parameters
    if zero.stage == 3:
        buckets = size.gradient_buckets(zero.number("reduce_bucket_size", h))
        calls = size.gathered_weights(zero.number("stage3_param_persistence_threshold", h))
        first = cluster.gather(total, ranks, calls)
        again = cluster.gather(total, min(zero.secondary, ranks), calls) if zero.secondary > 1 else first
        return PolicyTraffic(first, again, again + cluster.gather(trained, ranks, buckets), Traffic())
    none = Traffic()
    if zero.stage == 2:
        calls = math.ceil(size.trained_parameters / zero.number("allgather_bucket_size", h))
        buckets = size.gradient_buckets(zero.number("reduce_bucket_size", h))
        return PolicyTraffic(none, none, cluster.gather(trained, ranks, buckets), cluster.gather(trained, ranks, calls))
    reductions = size.trained_parameters / zero.number("reduce_bucket_size", h)
    return PolicyTraffic(none, none, cluster.gather(4 * size.trained_parameters, ranks, reductions) * 2, none)
