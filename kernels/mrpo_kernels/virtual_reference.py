"""K reference log-probs to one virtual reference: clip, weigh, aggregate (Equations 8-10, Proposition 1).

The only place where this arithmetic is written in torch; it is the CPU path and the oracle of the fused kernel. K references,
P pairs; the last axis of size 2 is (chosen, rejected); reference 0 is the anchor.

Another way to clip, weigh or aggregate is an entry of ``CLIPS``, ``WEIGHTINGS`` or ``AGGREGATES``; the first two need a branch of
``_combine`` in :mod:`mrpo_kernels.finish` as well. Everything else (the objective, its keys and their errors) reads these tables.

References are added up one after the other, never by a reduction whose order depends on where in memory a pair lies: a pair's
values are the same bits in whatever window, micro-batch or order it is combined.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class CombinedReferences:
    """What K references say of P pairs and the virtual reference that they make: constants, formed once for a window.

    ``combined[pairs]`` is the same of some pairs, a slice or a tensor of indices.
    """

    ref_logps_KP2: Tensor  #: raw
    virtual_logps_P2: Tensor
    weights_KP: Tensor
    epsilon_P2: Tensor  #: infinite where nothing is clipped
    clipped_KP2: Tensor  #: after Eq. 8

    def __getitem__(self, pairs: slice | Tensor) -> CombinedReferences:
        return CombinedReferences(
            self.ref_logps_KP2[:, pairs],
            self.virtual_logps_P2[pairs],
            self.weights_KP[:, pairs],
            self.epsilon_P2[pairs],
            self.clipped_KP2[:, pairs],
        )

    @classmethod
    def joined(cls, pieces: Sequence[CombinedReferences]) -> CombinedReferences:
        """The pairs of all ``pieces``, at least one, in their order."""
        along = {f.name: 1 if "_K" in f.name else 0 for f in fields(cls)}
        return cls(**{name: torch.cat([getattr(piece, name) for piece in pieces], dim) for name, dim in along.items()})

    @property
    def decides(self) -> Tensor:
        """[P, 2] which reference decides: the one of the lowest clipped log-prob among those with weight, which rules the
        harmonic mean."""
        return self.clipped_KP2.masked_fill(self.weights_KP[..., None] == 0, torch.inf).argmin(0)


def _total(x_K: Tensor) -> Tensor:
    """Sum over references, in their order."""
    return functools.reduce(torch.add, x_K.unbind(0))


def _share(part: Tensor, total: Tensor, when_zero: float) -> Tensor:
    """part / total; ``when_zero`` where the total is zero."""
    return torch.where(total > 0, part / total.where(total > 0, 1), when_zero)


def adaptive_epsilon(ref_logps_KP2: Tensor, epsilon_max: float) -> Tensor:
    """Eq. 9, from raw log-probs: [K, P, 2] -> [P, 2]. A pair whose log-probs are all zero gets epsilon_max / 2."""
    size_P2 = _total(ref_logps_KP2).abs()
    return epsilon_max * _share(size_P2, size_P2.sum(-1, keepdim=True), 0.5)


def fixed_epsilon(ref_logps_KP2: Tensor, epsilon_max: float) -> Tensor:
    """epsilon_max for every response: [K, P, 2] -> [P, 2]."""
    return torch.full_like(ref_logps_KP2[0], epsilon_max)


def no_epsilon(ref_logps_KP2: Tensor, epsilon_max: float) -> Tensor:
    """Infinity, no trust region: [K, P, 2] -> [P, 2]."""
    return torch.full_like(ref_logps_KP2[0], torch.inf)


def clip_to_anchor(ref_logps_KP2: Tensor, epsilon_P2: Tensor) -> Tensor:
    """Eq. 8: keep references 1.. inside [(1+e) l_0, (1-e) l_0]; log-probs are negative, so the former is the lower bound.

    An infinite epsilon leaves a log-prob as it is (a log-prob of 0 times infinity would be NaN).
    """
    anchor_P2 = ref_logps_KP2[0]
    clipped = torch.minimum(torch.maximum(ref_logps_KP2, (1 + epsilon_P2) * anchor_P2), (1 - epsilon_P2) * anchor_P2)
    return torch.cat([ref_logps_KP2[:1], torch.where(epsilon_P2.isinf(), ref_logps_KP2, clipped)[1:]])


def confidence_weights(ref_logps_KP2: Tensor) -> Tensor:
    """Eq. 10, from raw log-probs: how decisively each reference tells the two responses apart. [K, P, 2] -> [K, P]."""
    gaps_KP = (ref_logps_KP2[..., 0] - ref_logps_KP2[..., 1]).abs()
    return _share(gaps_KP, _total(gaps_KP), 1 / len(gaps_KP))


def uniform_weights(ref_logps_KP2: Tensor) -> Tensor:
    """[K, P, 2] -> [K, P]."""
    return torch.full_like(ref_logps_KP2[..., 0], 1 / len(ref_logps_KP2))


#: (raw log-probs [K, P, 2], epsilon_max) -> epsilon [P, 2].
CLIPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "adaptive": adaptive_epsilon,
    "fixed": fixed_epsilon,
    "none": no_epsilon,
}
#: Raw log-probs [K, P, 2] -> weights [K, P]. K numbers are the other way to weigh.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {"confidence": confidence_weights, "uniform": uniform_weights}
#: The weighted power means that have a name, and their exponents.
AGGREGATES = {"harmonic": -1.0, "geometric": 0.0, "arithmetic": 1.0, "min": -math.inf, "max": math.inf}


def exponent_of(aggregate: str | float) -> float:
    """The exponent p of a power mean: a name of ``AGGREGATES``, or a number, as text too.

    Past 1e30 or below 1e-30 in size it is infinite or zero: to every digit of float64 the mean has reached that limit.

    Raises:
        ValueError: neither, or NaN.
    """
    try:
        p = AGGREGATES[aggregate] if aggregate in AGGREGATES else float(aggregate)
    except (TypeError, ValueError):
        p = math.nan
    if math.isnan(p):
        raise ValueError(f"aggregate must be one of {', '.join(AGGREGATES)} or a number, got {aggregate!r}")
    return math.copysign(math.inf, p) if abs(p) > 1e30 else 0.0 if abs(p) < 1e-30 else p


def aggregate_logps(clipped_KP2: Tensor, weights_KP: Tensor, aggregate: str | float) -> Tensor:
    """Weighted power mean of K probabilities, in log space: log (sum_k a_k exp(p c_k) / sum_k a_k)^(1/p).

    Its exponent p is -1 for the harmonic mean (Proposition 1), 0, the limit, for the geometric one (the exact optimum of Eq. 6
    under reverse KL), 1 for the arithmetic one, infinite for the extremes. A weight of zero removes its reference.

    Dividing by p magnifies what the logarithm is off by. So where all t_k = p (c_k - m) are small, m the weighted mean of c, it is
    m + log1p(mean_k expm1(t_k)) / p: t's own digits carry through, whatever m was rounded to. All of it is done in float64 and
    rounded once.

    Args:
        clipped_KP2, weights_KP: [K, P, 2] and [K, P].
        aggregate: see :func:`exponent_of`.

    Returns:
        [P, 2] in the dtype of ``clipped_KP2``.
    """
    p = exponent_of(aggregate)
    gone_KP1 = weights_KP[..., None] == 0
    if math.isinf(p):
        present_KP2 = clipped_KP2.masked_fill(gone_KP1, -p)
        return present_KP2.amax(0) if p > 0 else present_KP2.amin(0)
    shares_KP1 = weights_KP[..., None].double()
    shares_KP1 = shares_KP1 / _total(shares_KP1)
    logps_KP2 = clipped_KP2.double().masked_fill(gone_KP1, 0)
    mean_P2 = _total(shares_KP1 * logps_KP2)
    if p == 0:
        return mean_P2.to(clipped_KP2.dtype)
    t_KP2 = (p * (logps_KP2 - mean_P2)).masked_fill(gone_KP1, 0)
    near_P2 = mean_P2 + _total(shares_KP1 * t_KP2.expm1()).log1p() / p
    x_KP2 = shares_KP1.log() + p * logps_KP2
    top_P2 = x_KP2.amax(0)
    shift_P2 = top_P2.where(top_P2.isfinite(), 0)  # infinite minus infinite would be NaN
    far_P2 = (shift_P2 + _total((x_KP2 - shift_P2).exp()).log()) / p
    return torch.where(t_KP2.abs().amax(0) < 1, near_P2, far_P2).to(clipped_KP2.dtype)


def combine_references(
    ref_logps_KP2: Tensor, *, epsilon_max: float, clip: str, ref_weights: str | Sequence[float], aggregate: str | float
) -> CombinedReferences:
    """From raw reference log-probs [K, P, 2] to the virtual reference, in the input's dtype (float32 or float64).

    Args:
        clip: ``adaptive`` (Eq. 9), ``fixed`` (epsilon_max everywhere) or ``none`` (epsilon is then infinite).
        ref_weights: ``confidence`` (Eq. 10), ``uniform`` or K numbers that sum to 1.
        aggregate: a name or the exponent of a power mean, see :func:`aggregate_logps`.

    Raises:
        ValueError: an unknown mode.
    """
    num_refs, num_pairs, _ = ref_logps_KP2.shape
    check_modes(clip, ref_weights, aggregate, num_refs)
    epsilon_P2 = CLIPS[clip](ref_logps_KP2, epsilon_max)
    clipped_KP2 = clip_to_anchor(ref_logps_KP2, epsilon_P2)
    if isinstance(ref_weights, str):
        weights_KP = WEIGHTINGS[ref_weights](ref_logps_KP2)
    else:
        weights_KP = ref_logps_KP2.new_tensor(ref_weights)[:, None].expand(num_refs, num_pairs)
    virtual_P2 = aggregate_logps(clipped_KP2, weights_KP, aggregate)
    return CombinedReferences(ref_logps_KP2, virtual_P2, weights_KP, epsilon_P2, clipped_KP2)


def check_modes(clip: str, ref_weights: str | Sequence[float], aggregate: str | float, num_refs: int) -> None:
    """Raises ValueError for what :func:`combine_references` does not know."""
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    exponent_of(aggregate)
    known = ref_weights in WEIGHTINGS if isinstance(ref_weights, str) else len(ref_weights) == num_refs
    if not known:
        raise ValueError(f"ref_weights must be {', '.join(WEIGHTINGS)} or {num_refs} numbers, got {ref_weights!r}")
