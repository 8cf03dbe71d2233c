"""From what every rank measured to the figures that are reported: medians over rounds, with intervals, and ratios to DPO."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.bench.arms import Arm
from mrpo_scale.bench.clock import PHASES
from mrpo_scale.bench.trainer import Measured, Survey
from mrpo_scale.data.dealing import efficiency

RESAMPLES, CONFIDENCE = 2000, 0.95

#: Of one rank.
RankResult = tuple[Sequence[Measured], Mapping[Arm, Survey]]


def summarise(arms: Sequence[Arm], ranks: Sequence[RankResult], peak_flops: float | None) -> list[dict[str, Any]]:
    """One JSON mapping per arm; docs/performance.md says what each figure is.

    Args:
        ranks: results of all ranks, in rank order.
        peak_flops: FLOP/s of one device; None where it is not known, and ``mfu`` is None too.

    Raises:
        TrainingError: the arms of a round did not train the same pairs, so that they do not compare.
    """
    steps = {arm: _steps_of(arm, ranks) for arm in arms}
    first = steps[arms[0]]
    for arm, taken in steps.items():
        if [step["rows"] for step in taken] != [step["rows"] for step in first]:
            raise TrainingError(
                f"{arm.name} did not train the same pairs as {arms[0].name}; this is a fault of the benchmark."
            )
    return [_arm(arm, steps, [surveys[arm] for _, surveys in ranks], peak_flops) for arm in arms]


def _steps_of(arm: Arm, ranks: Sequence[RankResult]) -> list[dict[str, Any]]:
    """An arm's steps in the order of rounds: seconds are means over the ranks, which move in step; the rest are sums."""
    by_rank = [sorted((m for m in measured if m.step.arm == arm), key=lambda m: m.step.round) for measured, _ in ranks]
    steps = []
    for together in zip(*by_rank, strict=True):
        phases = {phase: statistics.fmean(m.phases[phase] for m in together) for phase in PHASES}
        rows = sorted(row for m in together for row in m.rows)
        steps.append(
            {
                "round": together[0].step.round,
                "seconds": sum(phases.values()),
                "phases": phases,
                "pairs": len(rows),
                "rows": hashlib.blake2b(str(rows).encode(), digest_size=8).hexdigest(),
                "tokens": sum(sum(m.tokens) for m in together),
                "balance": efficiency(np.array([m.tokens for m in together])),
                "flops": {
                    "policy": sum(m.policy_flops for m in together),
                    "references": sum(m.reference_flops for m in together),
                    "useful": sum(m.useful_flops for m in together),
                },
            }
        )
    return steps


def _arm(
    arm: Arm, steps: Mapping[Arm, list[dict[str, Any]]], surveys: Sequence[Survey], peak_flops: float | None
) -> dict[str, Any]:
    taken, baseline = steps[arm], steps[arm.baseline]
    seconds, total = [step["seconds"] for step in taken], sum(step["seconds"] for step in taken)
    flops = {what: sum(step["flops"][what] for step in taken) / len(taken) for what in taken[0]["flops"]}
    ratios = [mine["seconds"] / dpo["seconds"] for mine, dpo in zip(taken, baseline, strict=True)]
    kinds = sorted({kind for survey in surveys for kind in survey.bytes})
    useful = sum(step["flops"]["useful"] for step in taken)
    return {
        "name": arm.name,
        "references": arm.references,
        "scoring": arm.scoring,
        "placement": arm.placement or None,
        "seconds": estimate(seconds),
        "phases": {phase: estimate([step["phases"][phase] for step in taken]) for phase in PHASES},
        "balance": estimate([step["balance"] for step in taken]),
        "tokens_per_second": sum(step["tokens"] for step in taken) / total,
        "mfu": useful / (total * peak_flops * len(surveys)) if peak_flops else None,
        "flops_per_step": flops,
        "overhead": {"baseline": arm.baseline.name, **estimate(ratios), "flop_floor": flop_floor(taken, baseline)},
        "peak_memory_gib": [survey.peak_memory_gib for survey in surveys],
        "collectives": {
            kind: {
                "bytes": [survey.bytes.get(kind, 0) for survey in surveys],
                "calls": [survey.calls.get(kind, 0) for survey in surveys],
            }
            for kind in kinds
        },
        "link_seconds": [survey.link_seconds for survey in surveys],
        "steps": taken,
    }


def flop_floor(taken: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> float:
    """What the overhead over DPO would be if time were FLOPs: those of the arm's steps over those of DPO's on the same pairs."""
    mine, dpo = (
        sum(step["flops"]["policy"] + step["flops"]["references"] for step in steps) for steps in (taken, baseline)
    )
    return mine / dpo


def estimate(values: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Median of the rounds, and the interval that holds it with 95% confidence (percentile bootstrap over rounds)."""
    values_N = np.asarray(values)
    draws = np.random.default_rng(seed).integers(0, len(values_N), (RESAMPLES, len(values_N)))
    low, high = np.quantile(np.median(values_N[draws], axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"median": float(np.median(values_N)), "low": float(low), "high": float(high)}
