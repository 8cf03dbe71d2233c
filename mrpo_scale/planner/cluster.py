"""The machines of a plan, and what a gather over a group of their devices moves over which link."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.gpus import GIB, GPU, find_gpu

#: Network of an HGX or DGX node: one card of this speed for each GPU.
DEFAULT_NETWORK = "400gbit"


@dataclass(frozen=True)
class Assumptions:
    """What a data sheet does not say: shares of a peak that programs reach, and delays. None was measured by this project on a GPU;
    they are what is usual on such machines, and every output says so."""

    matmul: float = 0.65  #: of the peak FLOP/s, in large matrix products
    attention: float = 0.35  #: the same in attention kernels under a mask
    memory: float = 0.80  #: of the memory bandwidth, in elementwise kernels
    links: float = 0.75  #: of a link's rate, in large collectives
    node_hop: float = 1e-6  #: seconds from one device of a node to the next, in each step of a ring
    network_hop: float = 5e-6  #: seconds from one node to the next
    usable_memory: float = 0.90  #: of a device's memory: the rest is the driver's, the communicators' and fragments
    #: bytes for each device of its node's own memory: 2 TB for the eight of a DGX, less what the system takes
    host_memory: float = 240 * GIB
    host_bandwidth: float = (
        20e9  #: bytes/s of host memory for each device, where its optimizer or references live there
    )


class Traffic(NamedTuple):
    """Bytes that each device receives, and the steps of the rings that bring them, one after the other."""

    node_bytes: float = 0.0  #: over the links inside a node
    network_bytes: float = 0.0  #: over its share of the node's network
    node_hops: float = 0.0
    network_hops: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> Traffic:  # type: ignore[override]
        return Traffic(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> Traffic:  # type: ignore[override]
        return Traffic(*(a * times for a in self))


@dataclass(frozen=True)
class Cluster:
    """``gpus`` devices in nodes of ``per_node``; ``network``: bytes/s for each device and direction."""

    name: str
    gpu: GPU
    gpus: int
    per_node: int
    network: float
    assumed: Assumptions = Assumptions()

    @property
    def num_nodes(self) -> int:
        return -(-self.gpus // self.per_node)

    @property
    def nodes(self) -> list[list[int]]:
        """The ranks of each node, as placement.py takes them."""
        ranks = range(self.gpus)
        return [list(ranks[i : i + self.per_node]) for i in range(0, self.gpus, self.per_node)]

    @property
    def usable(self) -> float:
        """Bytes of device memory that a run can count on."""
        return self.gpu.memory * self.assumed.usable_memory

    def gather(self, size: float, ranks: int, calls: float = 1.0) -> Traffic:
        """An all-gather of ``size`` bytes over ``ranks`` neighbours, or a reduce-scatter of as many, in ``calls`` collectives.

        In a ring a byte enters each node once, over any of its network cards, and then passes from device to device inside.
        """
        if ranks <= 1:
            return Traffic()
        inside = min(ranks, self.per_node)
        nodes = -(-ranks // self.per_node)
        network = size * (1 - 1 / nodes) / inside
        return Traffic(size * (ranks - 1) / ranks - network, network, calls * (inside - 1), calls * (nodes - 1))

    def exchange(self, size: float, ranks: int, calls: float = 1.0) -> Traffic:
        """``calls`` all-to-alls over ``ranks`` neighbours, in which each gives its ``size`` bytes away in equal parts."""
        if ranks <= 1:
            return Traffic()
        inside = min(ranks, self.per_node)
        network = size * (1 - inside / ranks)
        return Traffic(size * (1 - 1 / ranks) - network, network, calls, calls * (ranks > inside))

    def seconds(self, traffic: Traffic) -> float:
        """Both kinds of link work at once; the hops wait for each other."""
        rate = self.assumed.links
        bytes_time = max(
            traffic.node_bytes / (self.gpu.node_link * rate), traffic.network_bytes / (self.network * rate)
        )
        return bytes_time + traffic.node_hops * self.assumed.node_hop + traffic.network_hops * self.assumed.network_hop


def make_cluster(gpu: str, gpus: int, per_node: int | None, network: str | None) -> Cluster:
    """From what the command line says.

    Args:
        per_node: default 8, or all of them where there are fewer.
        network: such as ``400gbit``, for each device, or ``3200gbit/node``.

    Raises:
        ConfigError: an unknown GPU, or numbers that make no cluster.
    """
    found = find_gpu(gpu)
    per_node = per_node if per_node is not None else min(8, max(1, gpus))
    for key, value in (("gpus", gpus), ("gpus_per_node", per_node)):
        if value < 1:
            raise ConfigError(f"`--{key} {value}` must be at least 1.")
    if gpus > per_node and gpus % per_node:
        raise ConfigError(f"`--gpus {gpus}` is not a multiple of `--gpus_per_node {per_node}`; nodes must be alike.")
    return Cluster(
        gpu.lower(), found, gpus, min(per_node, gpus), _rate(network or DEFAULT_NETWORK, min(per_node, gpus))
    )


def _rate(network: str, per_node: int) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(gbit|gbps)(/s)?(/node)?", network.lower())
    if not match or not float(match[1]):
        raise ConfigError(
            f"`--network {network}` is not a rate; write 400gbit for each GPU's share, or 3200gbit/node for a whole node's."
        )
    return float(match[1]) * 1e9 / 8 / (per_node if match[4] else 1)
