"""References that are scored in the step: where they lie, what they hold, gather and compute."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from mrpo_scale.logps.flops import forward_flops
from mrpo_scale.planner.cluster import Cluster, Traffic
from mrpo_scale.planner.job import MOVED_FORWARD, Job, Phase, PlannedModel, Setting, seconds_of
from mrpo_scale.references.low_bits import check_low_bits
from mrpo_scale.references.placement import partition, spread


@functools.lru_cache(maxsize=1024)
def _lay_out(
    kind: str,
    costs: tuple[tuple[int, float], ...],
    cluster: Cluster,
    shard_size: int | None,
    together: tuple[tuple[int, int], ...],
) -> tuple[set[tuple[int, ...]], dict[int, int], dict[int, int]]:
    """(which references lie on one rank together, ranks of the largest group of each, ranks of each)."""
    if kind == "spread":
        placement = spread([k for k, _ in costs], cluster.nodes, shard_size)
    else:
        placement = partition(dict(costs), cluster.nodes, shard_size, dict(together))
    of_rank: dict[int, list[int]] = {}
    for k, _ in costs:
        for rank in placement.ranks(k):
            of_rank.setdefault(rank, []).append(k)
    groups = {k: max(map(len, placement.groups[k])) for k, _ in costs}
    return {tuple(which) for which in of_rank.values()}, groups, {k: len(placement.ranks(k)) for k, _ in costs}


class ScoredLive:
    """The references of a job under a setting. Values of a rank are of the one where they come to most."""

    def __init__(self, job: Job, setting: Setting, cluster: Cluster, accumulation: int) -> None:
        self.job, self.setting, self.cluster = job, setting, cluster
        planned: Sequence[PlannedModel] = job.references[:1] if setting.only_anchor else job.references
        self.models = dict(enumerate(planned))
        pairs = setting.micro_batch * accumulation
        mean = job.workload.mean_lengths
        costs = {k: m.size.active * float(mean[m.tokenization]) for k, m in self.models.items()}
        together = {k: k if m.shares_with is None else m.shares_with for k, m in self.models.items()}
        layout = _lay_out(setting.placement, tuple(costs.items()), cluster, setting.shard_size, tuple(together.items()))
        self.held_together, self.group, self.num_ranks = layout
        for k, m in self.models.items():
            if m.size.quantize is not None:
                check_low_bits(
                    m.size.quantize, m.size.name, group_size=self.group[k], offload=setting.offload, loads=False
                )
        # Pairs of a window that one rank of each reference scores.
        self.pairs = {
            k: pairs if setting.placement == "spread" else -(-pairs * cluster.gpus // self.num_ranks[k])
            for k in self.models
        }
        self.shares = {
            k: job.workload.reference(
                m.size,
                m.tokenization,
                pairs=pairs * cluster.gpus,
                ranks=self.num_ranks[k],
                tokens_per_forward=job.tokens_per_forward,
            )
            for k, m in self.models.items()
        }

    def on_one_rank(self, values: Mapping[int, float], combine: Callable[[Iterable[float]], float] = sum) -> float:
        """Under spread a rank has all references, under partition its own."""
        return max(combine(values[k] for k in which) for which in self.held_together)

    @property
    def held(self) -> int:
        return int(self.on_one_rank({k: m.held_bytes(self.group[k]) for k, m in self.models.items()}))

    def moment(self) -> dict[str, int]:
        """Gathered weights, and what a forward without gradient holds for a moment."""
        gathered, heads, activations = {}, {}, {}
        earlier = 0  # tied heads stay whole from their body's forward until all heads are used
        for k, m in self.models.items():
            b, size = m.size.itemsize, m.size
            largest, window = self.job.workload.largest_scoring(
                size, m.tokenization, self.pairs[k], self.job.tokens_per_forward
            )
            sharded = self.group[k] > 1 or self.setting.offload
            # Of a layer that computes and the next one, which is on its way; a tied head is whole with the root.
            own = 2 * size.layer + (size.head if size.tied else max(size.embedding, size.head))
            gathered[k] = b * own * sharded + size.dequantized_bytes + earlier
            own_head = sharded and m.shares_with is None
            earlier += b * size.head * (own_head and size.tied and self.setting.placement == "spread")
            heads[k] = b * (size.head * own_head + window.response_tokens * size.hidden)
            activations[k] = b * (largest.positions * (3 * size.hidden + 3 * size.widest_mlp) + 2 * largest.scores)
        while_heads = self.on_one_rank(heads)
        while_layers = self.on_one_rank(gathered, max) + self.on_one_rank(activations, max)
        if while_heads > while_layers:
            return {"gathered": int(while_heads)}
        return {
            "gathered": int(self.on_one_rank(gathered, max)),
            "activations": int(self.on_one_rank(activations, max)),
        }

    def traffic(self) -> Traffic:
        return max((self._of_rank(which) for which in self.held_together), key=self.cluster.seconds)

    def phase(self) -> Phase:
        products, elementwise = {}, {}
        for k, m in self.models.items():
            flops = forward_flops(m.size.costs, self.shares[k].total)
            products[k] = seconds_of(flops.body + flops.head, flops.attention, self.cluster, m.size.itemsize)
            moved = MOVED_FORWARD * m.size.activations.kept(self.shares[k].total, m.size.itemsize, checkpointing=False)
            elementwise[k] = moved / (self.cluster.gpu.memory_bandwidth * self.cluster.assumed.memory)
        links = self.cluster.seconds(self.traffic())
        if self.setting.offload:
            links += self.held * max(len(s.forwards) for s in self.shares.values()) / self.cluster.gpu.host_link
        return Phase("references", self.on_one_rank(products), self.on_one_rank(elementwise), links)

    def flops(self) -> int:
        return sum(
            forward_flops(m.size.costs, self.shares[k].mean).total * self.num_ranks[k] for k, m in self.models.items()
        )

    def _of_rank(self, which: Sequence[int]) -> Traffic:
        total = Traffic()
        for k in which:
            size = self.models[k].size
            calls = size.activations.num_layers + 2  # layers, embedding and head
            group = self.group[k]
            if self.models[k].is_policy:
                group = self.cluster.gpus if self.setting.zero.stage == 3 else 1
            gather = self.cluster.gather(size.itemsize * size.parameters, group, calls)
            total += gather * len(self.shares[k].forwards)
        return total
