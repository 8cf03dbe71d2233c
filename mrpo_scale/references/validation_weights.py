"""`ref_weights: validation`: weights from how often each reference ranks pairs right that are used for nothing else."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mrpo_scale.base.ranks import sum_over_ranks
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.inputs import WEIGHTS_SET
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.window import WeightedPairs, held_out_sampler
from mrpo_scale.objective import Objective
from mrpo_scale.references.scores import ReferenceScores

logger = logging.getLogger(__name__)


def with_validation_weights(
    args: MRPOConfig, scores: ReferenceScores, pair_sets: Mapping[str, PairDataset]
) -> Objective:
    """The objective of ``args``, its word ``validation`` replaced by numbers. Collective over the world.

    Plain DPO has no weights and keeps the word.
    """
    objective = args.build_objective()
    if not args.weights_from_validation or objective.name == "dpo":
        return objective
    right_K = _right(args, scores, pair_sets[WEIGHTS_SET])
    return replace(objective, ref_weights=_weights(right_K, len(pair_sets[WEIGHTS_SET]), scores.names))


def validation_weights(ref_logps_KN2: Tensor, names: Sequence[str]) -> tuple[float, ...]:
    """Weights [K] of N pairs' raw log-probs: proportional to max(accuracy - 1/2, 0), where accuracy is the share of pairs whose
    chosen response has the higher log-prob. Where no reference is above chance, all weigh alike."""
    right_K = (ref_logps_KN2[..., 0] > ref_logps_KN2[..., 1]).sum(1)
    return _weights(right_K, ref_logps_KN2.shape[1], names)


def _weights(right_K: Tensor, pairs: int, names: Sequence[str]) -> tuple[float, ...]:
    accuracy_K = right_K.double().cpu() / max(pairs, 1)
    above_K = (accuracy_K - 0.5).clamp(min=0)
    found = "; ".join(f"{name} {accuracy:.1%}" for name, accuracy in zip(names, accuracy_K.tolist(), strict=True))
    if not above_K.sum() > 0:
        logger.warning(
            "ref_weights: validation: no reference ranks the %d pairs set aside better than chance (%s); all weigh alike",
            pairs,
            found,
        )
        return (1 / len(names),) * len(names)
    weights = tuple((above_K / above_K.sum()).tolist())
    logger.info(
        "ref_weights: validation: of the %d pairs set aside, ranked right: %s; weights: %s",
        pairs,
        found,
        ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, weights, strict=True)),
    )
    return weights


def _right(args: MRPOConfig, scores: ReferenceScores, pairs: PairDataset) -> Tensor:
    """[K] how many of the pairs each reference ranks right, over all ranks."""
    size, rows = args.eval_batch_size, WeightedPairs(pairs)
    # Every rank scores equally often, a filler of weight 0 where the rows do not go round.
    draws = list(held_out_sampler(pairs, args.world_size, size))
    right_K = torch.zeros(len(scores.names), device=args.device)
    for start in range(size * args.process_index, len(draws), size * args.world_size):
        examples = [rows[draw] for draw in draws[start : start + size]]
        ref_logps_KP2 = scores.logps(examples, pairs)
        weight_P = torch.tensor([example.weight for example in examples], device=args.device)
        right_K += ((ref_logps_KP2[..., 0] > ref_logps_KP2[..., 1]) * weight_P).sum(1)
    scores.flush()
    return sum_over_ranks(right_K)
