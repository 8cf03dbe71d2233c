"""What references' scores say before anything trains: disagreement, length, the harmonic mean's shape, Proposition 2, rewards at
step 0, calibration. All of it is computed from the stored log-probs of a world."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from benchmarks.evidence.intervals import share_interval
from benchmarks.evidence.records import Scores
from benchmarks.evidence.rules import calibration, margins
from benchmarks.evidence.study import ANCHOR, BETA, OTHER
from mrpo_scale.objective import Objective, combine, loss_against

MEANS = {"min": "-inf", "harmonic": "-1", "geometric": "0", "arithmetic": "1"}
#: How near the harmonic mean has to be to the lowest clipped log-prob, less the log of its weight, to be the minimum: nats.
IS_MINIMUM = 0.1
BINS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0001)


def _share(hits_N: Tensor | np.ndarray) -> dict[str, float]:
    right, pairs = int(hits_N.sum()), len(hits_N)
    low, high = share_interval(right, pairs)
    return {"share": right / pairs, "low": low, "high": high, "pairs": pairs}


def without_length(margin_N: Tensor, difference_N: Tensor) -> Tensor:
    """The margin less what its least-squares line through the origin takes from the difference of lengths: no intercept, because
    swapping the answers negates both."""
    slope = (margin_N * difference_N).sum() / difference_N.square().sum().clamp(min=1e-9)
    return margin_N - slope * difference_N


def _reference(margin_N: Tensor, difference_N: Tensor) -> dict[str, Any]:
    rest_N = without_length(margin_N, difference_N)
    length = torch.stack([margin_N, difference_N]).double()
    return {
        "accuracy": _share(margin_N > 0),
        "accuracy_without_length": _share(rest_N > 0),
        "accuracy_where_equally_long": _share((margin_N > 0)[difference_N == 0]) if (difference_N == 0).any() else None,
        "correlation_with_length": float(torch.corrcoef(length)[0, 1]),
        "margin_mean": float(margin_N.mean()),
        "margin_deviation": float(margin_N.std()),
        "calibration": calibration_of(margin_N),
    }


def calibration_of(margin_N: Tensor) -> dict[str, Any]:
    """Of confidence sigma(beta |margin|), and with a scale fitted on the even pairs and measured on the odd ones: expected
    calibration error, and the accuracy of each bin."""
    even, odd = margin_N[::2], margin_N[1::2]
    scale = float(calibration(even[None])[0])

    def error(factor: float, values_N: Tensor) -> tuple[float, list[dict[str, float]]]:
        confidence_N, right_N = torch.sigmoid(factor * values_N.abs()), (values_N * factor > 0).float()
        total, bins = 0.0, []
        for low, high in itertools.pairwise(BINS):
            inside = (confidence_N >= low) & (confidence_N < high)
            if inside.any():
                says, is_right = float(confidence_N[inside].mean()), float(right_N[inside].mean())
                bins.append({"confidence": says, "accuracy": is_right, "pairs": int(inside.sum())})
                total += abs(says - is_right) * int(inside.sum()) / len(values_N)
        return total, bins

    raw, bins = error(BETA, odd)
    fitted, _ = error(scale, odd)
    return {"error_at_beta": raw, "error_after_scaling": fitted, "scale": scale, "bins": bins}


def proposition2(policy_N2: Tensor, references: CombinedReferences, weights_KN: Tensor) -> dict[str, float]:
    """Where all d_k = reward of rejected - reward of chosen, against the clipped references, share a sign: how often the weight of
    MRPO's gradient, sigma(d), is on the other side of Multi-DPO's, sum_k a_k sigma(d_k), than the proposition says.

    It says at least as large where all are positive (all references find the policy wrong), at most where all are negative.
    """
    d_KN = BETA * (margins(references.clipped_KP2) - margins(policy_N2))
    d_N = BETA * (margins(references.virtual_logps_P2) - margins(policy_N2))
    mrpo_N, multi_N = torch.sigmoid(d_N), (weights_KN * torch.sigmoid(d_KN)).sum(0)
    positive_N, negative_N = (d_KN > 0).all(0), (d_KN < 0).all(0)
    tolerance = 1e-5  # of rounding: float32 log-probs of some hundred nats
    fails_N = (positive_N & (mrpo_N < multi_N - tolerance)) | (negative_N & (mrpo_N > multi_N + tolerance))
    count = int((positive_N | negative_N).sum())
    return {"apply": count, "fail": int(fails_N.sum()), "share": int(fails_N.sum()) / count if count else 0.0}


def _mean(references_KN2: Tensor, aggregate: str) -> dict[str, Any]:
    objective = Objective(aggregate=aggregate, beta=BETA)
    found = combine(references_KN2, objective)
    anchor_N2 = references_KN2[0]
    at_start = loss_against(anchor_N2, found, objective)
    return {
        "virtual_accuracy": _share(margins(found.virtual_logps_P2) > 0),
        "paper_accuracy_at_step_0": _share(at_start.margins_P > 0),
        "reward_margin_at_step_0": float(at_start.margins_P.mean()),
        "largest_reward_at_step_0": float(at_start.rewards_P2.abs().max()),
        "proposition2_at_anchor_plus": {
            # The anchor's own d is exactly 0 at step 0, so no sign is shared: policies whose margin is so much off, in nats.
            f"{shift:+g}": proposition2(anchor_N2 + torch.tensor([shift / 2, -shift / 2]), found, found.weights_KP)
            for shift in (-5.0, -1.0, 1.0, 5.0)
        },
    }


def _harmonic_is_minimum(references_KN2: Tensor, clip: str) -> dict[str, float]:
    found = combine(references_KN2, Objective(clip=clip))
    lowest_N2, which_N2 = found.clipped_KP2.min(0)
    weight_N2 = found.weights_KP.t()[:, None, :].expand(*which_N2.shape, -1).gather(2, which_N2[..., None])[..., 0]
    near_N2 = (found.virtual_logps_P2 - (lowest_N2 - weight_N2.log())).abs() < IS_MINIMUM
    return {
        "share": float(near_N2.double().mean()),
        "anchor_decides": float((found.decides == 0).double().mean()),
        "clipped": float((found.clipped_KP2 != references_KN2)[1:].double().mean()),
    }


def analyse(scores: Scores, names: tuple[str, ...] = (ANCHOR, OTHER)) -> dict[str, Any]:
    """Everything of one world, over all its pairs, for these references, the anchor first."""
    references_KN2 = scores.of(names)
    margin_KN = margins(references_KN2)
    difference_N = torch.from_numpy(scores.tokens_N2[:, 0] - scores.tokens_N2[:, 1]).float()
    right_KN = margin_KN > 0
    split_N = right_KN.any(0) & ~right_KN.all(0)
    return {
        "pairs": len(scores.part_N),
        "references": {name: _reference(m, difference_N) for name, m in zip(names, margin_KN, strict=True)},
        "longer_is_chosen": float((difference_N > 0).double().mean()),
        "shorter_preferred_accuracy": _share(difference_N < 0),
        "disagree": _share(split_N),
        "right_where_agree": _share(right_KN[0][~split_N]),
        "right_where_they_differ": {name: _share(r[split_N]) for name, r in zip(names, right_KN, strict=True)}
        if split_N.any()
        else {},
        "means": {name: _mean(references_KN2, name) for name in MEANS},
        "harmonic_is_minimum": {clip: _harmonic_is_minimum(references_KN2, clip) for clip in ("adaptive", "none")},
        "mean_log_ratio_to_anchor": {
            name: float((logps - references_KN2[0]).mean()) for name, logps in zip(names, references_KN2, strict=True)
        },
    }


def analyse_all(results: Mapping[str, Scores]) -> dict[str, Any]:
    found = {}
    for world, scores in results.items():
        found[world] = analyse(scores)
        if len(scores.names) > 2:
            found[f"{world}-k{len(scores.names)}"] = analyse(scores, tuple(scores.names))
    return found
