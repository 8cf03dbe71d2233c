"""The references that a run scores with live: where each goes, loading them, and what scores pairs with them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from tqdm.auto import tqdm

from mrpo_scale.base.errors import refuse
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import all_gather_object, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.model_spec import LIVE_SERVED
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.logps.flops import active_parameters
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import check_config
from mrpo_scale.models.stored import build_on_meta
from mrpo_scale.references.adapters import lenders, loaded_apart
from mrpo_scale.references.live import PartitionScorer, Reference, SpreadScorer, load_reference
from mrpo_scale.references.mapped import ranks_that_share
from mrpo_scale.references.placement import (
    Placement,
    Ranks,
    Share,
    partition,
    placement_table,
    process_groups,
    spread,
)

logger = logging.getLogger(__name__)

#: References in memory, by number and ranks.
Pool = dict[tuple[int, Ranks], Reference]


@dataclass(frozen=True)
class LiveReferences:
    """What this rank holds of the references ``which``, and what scores pairs with all of them."""

    which: Sequence[int]
    references: dict[int, Reference]  #: {k: reference} as far as this rank holds a part
    scorer: SpreadScorer | PartitionScorer


def load_references(
    plan: RunPlan,
    args: MRPOConfig,
    pair_sets: Mapping[str, PairDataset],
    which: Sequence[int],
    pool: Pool | None = None,
) -> LiveReferences:
    """Load the references ``which`` one after the other, and log what went where. Collective over the world.

    Args:
        pair_sets: every set that will be scored: its lengths say what a reference costs.
        pool: references that are in memory already; those that load now join them.

    Raises:
        ConfigError: a reference that cannot be loaded.
    """
    tokens, impl = args.ref_tokens_per_forward, args.head_impl
    references: dict[int, Reference] = {}
    if not which:
        return LiveReferences(which, references, SpreadScorer(references, tokens_per_forward=tokens, impl=impl))
    refuse([LIVE_SERVED.format(plan.names[k]) for k in which if plan.references[k].source.server])
    pool = {} if pool is None else pool
    lengths = {k: _mean_length(pair_sets, plan.references[k].tokenization) for k in which}
    placement = _place(plan, args, which, lengths)
    for sentence in loaded_apart({k: plan.references[k].source for k in which}):
        logger.info("%s", sentence)
    groups = process_groups(placement, timedelta(seconds=args.ddp_timeout), of_one=args.ref_offload)
    for k in tqdm(which, desc="Loading references", disable=args.disable_tqdm or args.local_process_index != 0):
        set_activity(f"loading reference {plan.names[k]}")
        ranks = placement.group_of(k, args.process_index)
        if ranks is not None:
            if (k, ranks) not in pool:
                beside = [reference for (_, others), reference in pool.items() if others == ranks]
                pool[k, ranks] = load_reference(plan.references[k], groups.get(ranks), args, beside)
            references[k] = pool[k, ranks]
    _report(plan.names, args, references, placement, lengths)
    if args.ref_placement == "partition":
        partitioned = PartitionScorer(references, placement, args.device, tokens_per_forward=tokens, impl=impl)
        return LiveReferences(which, references, partitioned)
    return LiveReferences(which, references, SpreadScorer(references, tokens_per_forward=tokens, impl=impl))


def _place(plan: RunPlan, args: MRPOConfig, live: Sequence[int], lengths: Mapping[int, float]) -> Placement:
    nodes = ranks_that_share([plan.references[k].source for k in live], args)
    if args.ref_placement == "spread":
        return spread(live, nodes, args.ref_shard_size)
    costs = {}
    for k in live:
        source = plan.references[k].source
        with fail_together(world_group()):
            model = build_on_meta(source, check_config(source))
        costs[k] = active_parameters(model) * lengths[k]  # of a mixture, those that a token meets
    together = lenders({k: plan.references[k].source for k in live})
    return partition(costs, nodes, args.ref_shard_size, together)


def _mean_length(pair_sets: Mapping[str, PairDataset], tokenization: int) -> float:
    """Tokens of a pair in one model's tokenization: prompt, chosen and rejected."""
    return float(np.concatenate([pairs.lengths[:, tokenization].sum(-1) for pairs in pair_sets.values()]).mean())


def _report(
    names: Sequence[str],
    args: MRPOConfig,
    references: Mapping[int, Reference],
    placement: Placement,
    lengths: Mapping[int, float],
) -> None:
    """Log what went where. Collective over the world."""
    everybody = [entry for some in all_gather_object(_shares(references), world_group()) for entry in some.items()]
    shares = dict(sorted(everybody, key=lambda entry: entry[1].bytes_per_rank))  # the rank that holds most is shown
    window = args.train_batch_size * args.gradient_accumulation_steps
    forwards = {}
    for k, length in lengths.items():
        sharing = args.world_size if args.ref_placement == "spread" else len(placement.ranks(k))
        tokens = window * args.world_size / sharing * length
        forwards[k] = max(1, math.ceil(tokens / args.ref_tokens_per_forward))
    if args.process_index == 0:
        said = {"not_loaded": "the policy, its adapter off"} if args.anchor_is_policy else {}
        logger.info("references:\n%s", placement_table(names, placement, shares, forwards, **said))


def _shares(references: Mapping[int, Reference]) -> dict[int, Share]:
    return {
        k: Share(
            model_type=r.model.config.model_type,
            bytes_per_rank=r.model.bytes_per_rank,
            gathered_bytes=r.model.weight_bytes,
            group_size=r.model.group_size,
            shared_prompt=r.model.shared_prompt,
            offload=r.model.offload,
            mapped=r.model.mapped,
            quantize=r.model.source.quantize,
            shares_with=r.model.shares_with,
        )
        for k, r in references.items()
    }
