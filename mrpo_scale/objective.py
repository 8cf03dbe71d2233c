"""The MRPO objective: clip, weigh and aggregate K references, then the DPO loss. Pure tensor functions, no model, no collectives.

Shapes: K references, P pairs; the last axis of size 2 is (chosen, rejected). Log-probs are natural logs of the probability of a
whole response, summed over its tokens. Reference 0 is the anchor. The arithmetic of Equations 8-10 and Proposition 1 lives once,
in :mod:`mrpo_kernels.virtual_reference`; this module adds the outer losses (Equations 7 and 11) around it: :func:`combine` forms
the virtual reference, once for all pairs of a step, and :func:`loss_against` holds a policy to it, as often as is convenient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch
from mrpo_kernels import CombinedReferences, combine_logps
from mrpo_kernels.outer_losses import LEVELLED, LOSSES, REFUSED, SMOOTHED, PairTerms
from mrpo_kernels.virtual_reference import AGGREGATES, CLIPS, WEIGHTINGS, exponent_of
from torch import Tensor

from mrpo_scale.base.errors import ConfigError, check_one_of

OBJECTIVES = ("mrpo", "dpo", "multi_dpo", "kd", "rlhf")
SAMPLED = ("kd", "rlhf")  #: those that train on responses that the policy samples; see training/sampled_loss.py
LOSS_TYPES = tuple(LOSSES)
REF_WEIGHTS = (*WEIGHTINGS, "validation")
REFERENCE_MARGINS = ("signed", "nonnegative")


def _named_mean(aggregate: str | float) -> str | float:
    """The name of a power mean, or the exponent of one that has none."""
    try:
        p = exponent_of(aggregate)
    except ValueError:
        raise ConfigError(
            f"`aggregate: {aggregate}` is not known; choose one of {', '.join(AGGREGATES)}, or the exponent of a power mean."
        ) from None
    return next((name for name, exponent in AGGREGATES.items() if exponent == p), p)


@dataclass(frozen=True)
class Objective:
    """What is optimised, checked on construction.

    Args:
        name: ``mrpo`` (Eq. 7), ``dpo`` (the anchor alone), ``multi_dpo`` (Eq. 11), ``kd`` (DPO on the anchor and KL to the others)
            or ``rlhf`` (Eq. 6).
        beta: strength of the tie to the (virtual) reference, > 0. For ``ipo`` it is that paper's tau.
        epsilon_max: trust region around the anchor (Eq. 8-9), >= 0. Zero makes MRPO plain DPO on the anchor.
        clip: one of ``CLIPS``: ``adaptive`` (Eq. 9), ``fixed`` (epsilon_max everywhere) or ``none``.
        ref_weights: one of ``WEIGHTINGS``, ``confidence`` (Eq. 10) or ``uniform``; or K numbers >= 0 that sum to 1. ``validation``
            stands for numbers that references/validation_weights.py puts in its place before training; no loss can be computed
            with the word itself.
        aggregate: a power mean of the references' probabilities: one of ``AGGREGATES``, as ``harmonic`` (Proposition 1), or its
            exponent. An exponent that has a name becomes that name.
        loss_type: outer loss, one of ``LOSS_TYPES`` (see mrpo_kernels/outer_losses.py), or several, which are added.
        loss_weights: a factor >= 0 for each loss type, not all zero; None is 1 for each.
        label_smoothing: probability in [0, 0.5) that a preference label is flipped; for ``sigmoid`` (cDPO), ``robust`` and
            ``exo_pair``, which needs it above 0.
        discopop_tau: temperature of ``discopop``, > 0.
        reference_margin: ``signed``, or ``nonnegative`` (HyPO, arXiv 2602.11902): where the virtual reference prefers the rejected
            response, its preference counts as none.

    Raises:
        ConfigError: an unknown name, a value out of range, or a combination without meaning.
    """

    name: Literal["mrpo", "dpo", "multi_dpo", "kd", "rlhf"] = "mrpo"
    beta: float = 0.1
    epsilon_max: float = 0.1
    clip: str = "adaptive"
    ref_weights: str | Sequence[float] = "confidence"
    aggregate: str | float = "harmonic"
    loss_type: str | Sequence[str] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    reference_margin: Literal["signed", "nonnegative"] = "signed"

    def __post_init__(self) -> None:
        check_one_of("objective", self.name, OBJECTIVES)
        check_one_of("clip", self.clip, CLIPS)
        object.__setattr__(self, "aggregate", _named_mean(self.aggregate))
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"`beta: {self.beta}` must be a number above 0; the papers use 0.01 to 0.5.")
        if not (math.isfinite(self.epsilon_max) and self.epsilon_max >= 0):
            raise ConfigError(
                f"`epsilon_max: {self.epsilon_max}` must be 0 or more; use `clip: none` for no trust region."
            )
        self._check_losses()
        check_one_of("reference_margin", self.reference_margin, REFERENCE_MARGINS)
        if self.name == "multi_dpo" and self.reference_margin != "signed":
            raise ConfigError(
                f"`reference_margin: {self.reference_margin}` has no meaning with `objective: multi_dpo`, which forms no virtual "
                "reference; leave it out or use `objective: mrpo`."
            )
        if self.name == "multi_dpo" and self.aggregate != "harmonic":
            raise ConfigError(
                f"`aggregate: {self.aggregate}` has no meaning with `objective: multi_dpo`, which averages K losses "
                "and forms no virtual reference; leave it out or use `objective: mrpo`."
            )
        self._check_weights()

    def _check_losses(self) -> None:
        types = self.loss_types
        object.__setattr__(self, "loss_type", types[0] if len(types) == 1 else types)
        for name in types:
            if name in REFUSED:
                raise ConfigError(f"`loss_type: {name}` is not supported: {REFUSED[name]}; use `sigmoid`.")
            if name not in LOSSES:
                near = get_close_matches(str(name), LOSS_TYPES, 1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ConfigError(f"`loss_type: {name}` is not known; {hint}choose from {', '.join(LOSS_TYPES)}.")
        given = " ".join(types)
        if not types or len(set(types)) != len(types):
            raise ConfigError(f"`loss_type: {given or '[]'}` must name each loss once; give one or more.")
        levelled = [name for name in types if name in LEVELLED]
        if self.name == "multi_dpo" and levelled:
            raise ConfigError(
                f"`loss_type: {levelled[0]}` has no meaning with `objective: multi_dpo`, which averages losses of margins; "
                "use `objective: mrpo` or a loss of the margin such as `sigmoid`."
            )
        self._check_loss_numbers(types, given)

    def _check_loss_numbers(self, types: tuple[str, ...], given: str) -> None:
        if self.loss_weights is not None:
            weights = tuple(float(w) for w in self.loss_weights)
            object.__setattr__(self, "loss_weights", weights)
            if len(weights) != len(types):
                raise ConfigError(
                    f"`loss_weights: {list(weights)}` has {len(weights)} entries for {len(types)} of `loss_type: {given}`; "
                    "give one for each."
                )
            if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
                raise ConfigError(f"`loss_weights: {list(weights)}` must be numbers >= 0, one of them above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"`label_smoothing: {self.label_smoothing}` must lie in [0, 0.5).")
        if self.label_smoothing and not set(types) & set(SMOOTHED):
            raise ConfigError(
                f"`label_smoothing: {self.label_smoothing}` has no meaning with `loss_type: {given}`; "
                f"use one of {', '.join(SMOOTHED)} or leave it out."
            )
        if "exo_pair" in types and not self.label_smoothing:
            raise ConfigError(
                "`label_smoothing: 0` makes `loss_type: exo_pair` infinite; give a number above 0 such as 0.001."
            )
        if not (math.isfinite(self.discopop_tau) and self.discopop_tau > 0):
            raise ConfigError(f"`discopop_tau: {self.discopop_tau}` must be a number above 0; the paper uses 0.05.")

    @property
    def loss_types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def _check_weights(self) -> None:
        if isinstance(self.ref_weights, str):
            check_one_of("ref_weights", self.ref_weights, REF_WEIGHTS)
            if self.name in SAMPLED and self.ref_weights == "confidence":
                raise ConfigError(
                    f"`ref_weights: confidence` has no meaning with `objective: {self.name}`: Eq. 10 needs a labelled pair, and "
                    "samples are none; give one number for each reference, the anchor first, or use `uniform`."
                )
            return
        weights = tuple(float(w) for w in self.ref_weights)
        if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
            raise ConfigError(
                f"`ref_weights: {list(weights)}` sums to {sum(weights):g}; give one number >= 0 for each reference, "
                "the anchor first, summing to 1, or use `confidence` or `uniform`."
            )
        object.__setattr__(self, "ref_weights", weights)

    def check_references(self, num_references: int) -> None:
        """Raise ConfigError when a fixed weight list does not have one entry per reference (the anchor included), or KD has nobody
        to learn from."""
        if self.name == "kd" and num_references == 1:
            raise ConfigError(
                "`objective: kd` learns from the references beside the anchor; name some in `ref_models`."
            )
        if not isinstance(self.ref_weights, str) and len(self.ref_weights) != num_references:
            raise ConfigError(
                f"`ref_weights: {list(self.ref_weights)}` has {len(self.ref_weights)} entries but there are "
                f"{num_references} references (the anchor and {num_references - 1} of `ref_models`); give one per reference."
            )

    @property
    def modes(self) -> dict[str, Any]:
        """How the references are combined: keyword arguments of ``virtual_reference`` and ``combine_logps``.

        ``dpo`` is given the anchor alone. Under ``multi_dpo`` the virtual reference only serves the rewards: Eq. 11's K margins
        average around the geometric mean. So do the K log-ratios of Eq. 6, ``rlhf``, which clips none.
        """
        return {
            "epsilon_max": self.epsilon_max,
            "clip": "none" if self.name == "rlhf" else self.clip,
            "ref_weights": "confidence" if self.name == "dpo" else self.ref_weights,
            "aggregate": "geometric" if self.name in ("multi_dpo", *SAMPLED) else self.aggregate,
        }

    @property
    def of_pairs(self) -> Objective:
        """What labelled pairs are held to: of ``kd`` and ``rlhf``, plain DPO on the anchor."""
        return self.on_anchor() if self.name in SAMPLED else self

    def on_anchor(self) -> Objective:
        """Plain DPO on the anchor with the same outer loss: what the comparison metrics are computed with."""
        return replace(self, name="dpo", ref_weights="confidence", aggregate="harmonic")


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss and what led to it. Only ``loss``, ``losses_P``, ``rewards_P2`` and ``margins_P`` carry gradients."""

    loss: Tensor  #: scalar, mean over pairs
    losses_P: Tensor
    rewards_P2: Tensor  #: beta * (policy - virtual reference)
    margins_P: Tensor  #: reward of chosen minus reward of rejected
    virtual_logps_P2: Tensor
    weights_KP: Tensor
    epsilon_P2: Tensor
    clipped_KP2: Tensor  #: reference log-probs after Eq. 8
    parts: dict[str, Tensor] = field(default_factory=dict)  #: loss type -> its unweighted losses [P]


def _parts(
    policy_P2: Tensor, reference_P2: Tensor, anchor_P2: Tensor, lengths_P2: Tensor | None, objective: Objective
) -> dict[str, Tensor]:
    """Loss type -> its losses around ``reference_P2``, which may have K before P."""
    level = anchor_P2.mean(-1, keepdim=True) - reference_P2.mean(-1, keepdim=True)
    ratios_P2 = policy_P2 - reference_P2
    terms = PairTerms(
        policy_P2=policy_P2.expand_as(ratios_P2),
        ratios_P2=ratios_P2,
        recentred_P2=ratios_P2 - level,
        lengths_P2=lengths_P2,
        beta=objective.beta,
        smoothing=objective.label_smoothing,
        tau=objective.discopop_tau,
    )
    return {name: LOSSES[name](terms) for name in objective.loss_types}


def combine(ref_logps_KP2: Tensor, objective: Objective, impl: str = "auto") -> CombinedReferences:
    """The virtual reference of P pairs, and what led to it.

    Args:
        ref_logps_KP2: raw log-probs, anchor first; treated as constants. ``dpo`` uses the anchor and ignores the rest.
        impl: of the arithmetic, as in :func:`mrpo_kernels.combine_logps`.

    Raises:
        ConfigError: a fixed weight list whose length is not K.
    """
    ref_logps_KP2 = ref_logps_KP2.detach()
    if objective.name == "dpo":
        ref_logps_KP2 = ref_logps_KP2[:1]
    else:
        objective.check_references(len(ref_logps_KP2))
    return combine_logps(ref_logps_KP2, **objective.modes, impl=impl)


def _virtual(references: CombinedReferences, objective: Objective) -> Tensor:
    """The virtual log-probs [P, 2] that the loss is held to: as they are, or moved to their mean where rejected has the higher."""
    virtual_P2 = references.virtual_logps_P2
    if objective.reference_margin == "signed":
        return virtual_P2
    half_P1 = (virtual_P2[:, 1:] - virtual_P2[:, :1]).clamp(min=0) / 2
    return virtual_P2 + torch.cat([half_P1, -half_P1], -1)


def loss_against(
    policy_logps_P2: Tensor,
    references: CombinedReferences,
    objective: Objective,
    lengths_P2: Tensor | None = None,
) -> PreferenceLoss:
    """The loss of P pairs (Eq. 7, or 11 for ``multi_dpo``) against references that are combined already.

    Args:
        policy_logps_P2: the policy's log-probs; gradients flow into these only.
        references: of the same pairs, combined with the same ``objective``.
        lengths_P2: the policy's tokens in each response. ``sigmoid_norm`` and ``sft`` need them; ``ipo`` without them takes every
            response as one unit, which is ``ipo_whole``.

    Returns:
        PreferenceLoss. Under ``multi_dpo`` the rewards are those against the weighted mean of the clipped references,
        which is the point around which Eq. 11's K margins average.
    """
    virtual_P2 = _virtual(references, objective)
    rewards_P2 = objective.beta * (policy_logps_P2 - virtual_P2)
    margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    weights_KP, anchor_P2 = references.weights_KP, references.ref_logps_KP2[0]
    if objective.name == "multi_dpo":
        each = _parts(policy_logps_P2, references.clipped_KP2, anchor_P2, lengths_P2, objective)
        parts = {name: (weights_KP * x).masked_fill(weights_KP == 0, 0).sum(0) for name, x in each.items()}
    else:
        parts = _parts(policy_logps_P2, virtual_P2, anchor_P2, lengths_P2, objective)
    factors = objective.loss_weights or (1.0,) * len(parts)
    weighted = [x if factor == 1 else factor * x for factor, x in zip(factors, parts.values(), strict=True)]
    losses_P = sum(weighted[1:], weighted[0])
    return PreferenceLoss(
        loss=losses_P.mean(),
        losses_P=losses_P,
        rewards_P2=rewards_P2,
        margins_P=margins_P,
        virtual_logps_P2=virtual_P2,
        weights_KP=references.weights_KP,
        epsilon_P2=references.epsilon_P2,
        clipped_KP2=references.clipped_KP2,
        parts=parts,
    )


def preference_loss(
    policy_logps_P2: Tensor, ref_logps_KP2: Tensor, objective: Objective, *, lengths_P2: Tensor | None = None
) -> PreferenceLoss:
    """:func:`loss_against` the references whose raw log-probs, anchor first, are ``ref_logps_KP2``: both steps in one.

    Raises:
        ValueError: shapes that do not fit, or no ``lengths_P2`` for a loss that divides by them.
        ConfigError: a fixed weight list whose length is not K.
    """
    if policy_logps_P2.ndim != 2 or ref_logps_KP2.ndim != 3 or ref_logps_KP2.shape[1:] != policy_logps_P2.shape:
        raise ValueError(
            f"expected policy [P, 2] and references [K, P, 2], got {tuple(policy_logps_P2.shape)} and {tuple(ref_logps_KP2.shape)}"
        )
    return loss_against(policy_logps_P2, combine(ref_logps_KP2, objective), objective, lengths_P2)
