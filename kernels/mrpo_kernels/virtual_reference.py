"""K reference log-probs to one virtual reference: clip, weigh, aggregate (Equations 8-10, Proposition 1).

The only place where this arithmetic is written in torch; it is the CPU path and the oracle of the fused kernel. K references,
P pairs; the last axis of size 2 is (chosen, rejected); reference 0 is the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CLIPS = ("adaptive", "fixed", "none")
WEIGHTS = ("confidence", "uniform", "fixed")  # fixed: K numbers
AGGREGATES = ("harmonic", "geometric", "arithmetic", "min")


class CombinedReferences(NamedTuple):
    virtual_logps_P2: Tensor
    weights_KP: Tensor
    epsilon_P2: Tensor
    clipped_KP2: Tensor


def _share(numerator: Tensor, dim: int, when_zero: float) -> Tensor:
    """numerator / its sum over ``dim``; ``when_zero`` where that sum is zero."""
    total = numerator.sum(dim, keepdim=True)
    return torch.where(total > 0, numerator / total.where(total > 0, 1), when_zero)


def adaptive_epsilon(ref_logps_KP2: Tensor, epsilon_max: float) -> Tensor:
    """Eq. 9, from raw log-probs: [K, P, 2] -> [P, 2]. A pair whose log-probs are all zero gets epsilon_max / 2."""
    return epsilon_max * _share(ref_logps_KP2.sum(0).abs(), -1, 0.5)


def clip_to_anchor(ref_logps_KP2: Tensor, epsilon_P2: Tensor) -> Tensor:
    """Eq. 8: keep references 1.. inside [(1+e) l_0, (1-e) l_0]; log-probs are negative, so the former is the lower bound."""
    anchor_P2 = ref_logps_KP2[0]
    clipped = torch.minimum(torch.maximum(ref_logps_KP2, (1 + epsilon_P2) * anchor_P2), (1 - epsilon_P2) * anchor_P2)
    return torch.cat([ref_logps_KP2[:1], clipped[1:]])


def confidence_weights(ref_logps_KP2: Tensor) -> Tensor:
    """Eq. 10, from raw log-probs: how decisively each reference tells the two responses apart. [K, P, 2] -> [K, P]."""
    return _share((ref_logps_KP2[..., 0] - ref_logps_KP2[..., 1]).abs(), 0, 1 / ref_logps_KP2.shape[0])


def aggregate_logps(clipped_KP2: Tensor, weights_KP: Tensor, aggregate: str) -> Tensor:
    """Weighted mean of K probabilities, in log space: [K, P, 2], [K, P] -> [P, 2]. A weight of zero removes its reference.

    ``harmonic`` is Proposition 1, ``geometric`` the exact optimum of Eq. 6 under reverse KL; ``min`` takes the lowest among the
    references whose weight is not zero.
    """
    weights_KP1 = weights_KP[..., None]
    gone_KP1 = weights_KP1 == 0
    if aggregate == "harmonic":
        return -torch.logsumexp((weights_KP1.log() - clipped_KP2).masked_fill(gone_KP1, -torch.inf), 0)
    if aggregate == "geometric":
        return (weights_KP1 * clipped_KP2).masked_fill(gone_KP1, 0).sum(0)
    if aggregate == "arithmetic":
        return torch.logsumexp((weights_KP1.log() + clipped_KP2).masked_fill(gone_KP1, -torch.inf), 0)
    if aggregate == "min":
        return clipped_KP2.masked_fill(gone_KP1, torch.inf).amin(0)
    raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}")


def combine_references(
    ref_logps_KP2: Tensor, *, epsilon_max: float, clip: str, ref_weights: str | Sequence[float], aggregate: str
) -> CombinedReferences:
    """From raw reference log-probs [K, P, 2] to the virtual reference, in the input's dtype (float32 or float64).

    Args:
        clip: ``adaptive`` (Eq. 9), ``fixed`` (epsilon_max everywhere) or ``none`` (epsilon is then reported as infinite).
        ref_weights: ``confidence`` (Eq. 10), ``uniform`` or K numbers that sum to 1.

    Raises:
        ValueError: an unknown mode.
    """
    num_refs, num_pairs, _ = ref_logps_KP2.shape
    if clip == "adaptive":
        epsilon_P2 = adaptive_epsilon(ref_logps_KP2, epsilon_max)
    elif clip in ("fixed", "none"):
        epsilon_P2 = torch.full_like(ref_logps_KP2[0], epsilon_max if clip == "fixed" else torch.inf)
    else:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    clipped_KP2 = ref_logps_KP2 if clip == "none" else clip_to_anchor(ref_logps_KP2, epsilon_P2)

    if isinstance(ref_weights, str) and ref_weights == "confidence":
        weights_KP = confidence_weights(ref_logps_KP2)
    elif isinstance(ref_weights, str) and ref_weights == "uniform":
        weights_KP = ref_logps_KP2.new_full((num_refs, num_pairs), 1 / num_refs)
    elif isinstance(ref_weights, str):
        raise ValueError(f"ref_weights must be confidence, uniform or {num_refs} numbers, got {ref_weights!r}")
    else:
        weights_KP = ref_logps_KP2.new_tensor(ref_weights)[:, None].expand(num_refs, num_pairs)
    return CombinedReferences(aggregate_logps(clipped_KP2, weights_KP, aggregate), weights_KP, epsilon_P2, clipped_KP2)
