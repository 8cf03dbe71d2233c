"""`kd_level: aligned`: the loss of :mod:`~mrpo_scale.training.sampled_loss` with a gradient of less variance.

The log-ratio of a response is the sum of those of its pieces, which both tokenizations are cut into at common bytes. A token of
the policy has no part in the pieces that are over before it is drawn, so what they cost is a baseline for it. With v_t(y) the value
of the settled pieces before token t, which the tokens before t alone decide (:mod:`~mrpo_scale.data.alignment`), and a_j what
`sequence` multiplies all of y_j by,

    grad E[F] = E[sum_j sum_t (a_j - (v_t(y_j) - v_t(y_other)) / 2) grad log pi(y_jt | y_j<t)].

v_t(y_other) makes the other sample's baseline that of the same place: what it had before it when it was as long. Neither has
a part in what token t is, so the expectation is that of `sequence`, for every clip and length, and so is the loss itself. v_t is
f of the beginning of the response, with Eq. 8's bounds of that beginning and an epsilon that no sample decides; where f divides by
n(y) it is divided by what a sample can know of that: n(y_other), or its own length so far where it is more.

K references, P prompts with 2 samples each, T tokens of the policy in all of them, one response after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from mrpo_kernels.chunked_head import response_sums
from mrpo_kernels.virtual_reference import clip_to_anchor
from torch import Tensor

from mrpo_scale.base.device import send
from mrpo_scale.data.alignment import AlignedResponse
from mrpo_scale.objective import Objective
from mrpo_scale.training.sampled_loss import SampledLoss, own_epsilon, sampled_loss


@dataclass(frozen=True)
class SettledPlaces:
    """Of each token of the policy, and each reference but the anchor: how far its response is settled before it, in tokens of its
    own beginning. All int64."""

    policy_KT: Tensor
    reference_KT: Tensor
    anchor_KT: Tensor

    @classmethod
    def of(cls, responses: Sequence[AlignedResponse], tokenizations: Sequence[int]) -> SettledPlaces:
        """Of samples one after the other. ``tokenizations``: of each reference, anchor first; 0 is the policy's."""

        def settled(k: int, tokenization: int) -> np.ndarray:
            every = tokenizations[k] == tokenizations[0] == 0
            return np.concatenate([r.settled(tokenization, every_token=every) for r in responses])

        taught = range(1, len(tokenizations))
        read = ([0] * len(tokenizations), tokenizations, [tokenizations[0]] * len(tokenizations))
        return cls(*(torch.from_numpy(np.stack([settled(k, by[k]) for k in taught])) for by in read))

    def to(self, device: torch.device) -> SettledPlaces:
        return SettledPlaces(*(send(x, device) for x in (self.policy_KT, self.reference_KT, self.anchor_KT)))


@dataclass(frozen=True)
class SettledValues:
    """The same, and what the references say of it: constants, formed once for a window."""

    policy_KT: Tensor
    logps_KT: Tensor  #: of the reference, after Eq. 8

    def __getitem__(self, tokens: slice) -> SettledValues:
        return SettledValues(self.policy_KT[:, tokens], self.logps_KT[:, tokens])


def settled_values(
    token_logps: Sequence[Tensor],
    cu_seqlens: Sequence[Tensor],
    places: SettledPlaces,
    policy_cu_seqlens: Tensor,
    references: CombinedReferences,
    objective: Objective,
) -> SettledValues:
    """What K references say of the settled beginnings of 2P samples.

    Args:
        token_logps: of each reference, anchor first, the log-probs of its tokens [T_k], sample after sample.
        cu_seqlens: of each reference, [2P+1] boundaries of the samples.
        policy_cu_seqlens: [2P+1] of the policy's T tokens.
        references: of the same samples, combined with ``objective``.
    """
    response_T = _responses(policy_cu_seqlens)
    epsilon_T = own_epsilon(references, objective).flatten()[response_T]
    clipped = []
    for k in range(1, len(token_logps)):
        anchor_T = _beginnings(token_logps[0], cu_seqlens[0], response_T, places.anchor_KT[k - 1])
        raw_T = _beginnings(token_logps[k], cu_seqlens[k], response_T, places.reference_KT[k - 1])
        clipped.append(clip_to_anchor(torch.stack([anchor_T, raw_T]), epsilon_T)[1])
    return SettledValues(places.policy_KT, torch.stack(clipped))


def aligned_loss(
    token_logps_T: Tensor,
    cu_seqlens: Tensor,
    references: CombinedReferences,
    objective: Objective,
    settled: SettledValues,
    *,
    by_tokens: bool,
) -> SampledLoss:
    """The loss of two samples for each of P prompts, of whose T tokens the log-probs are these.

    Args:
        token_logps_T: of the forward that is trained through.
        cu_seqlens: [2P+1] boundaries of the samples.
        references: of the same samples, combined with ``objective``, which is ``kd``.
        by_tokens: divide by the policy's tokens of each response.
    """
    logps_T, lengths_S = token_logps_T.detach(), cu_seqlens.diff()
    logps_P2, lengths_P2 = response_sums(logps_T, cu_seqlens).view(-1, 2), lengths_S.view(-1, 2)
    whole = sampled_loss(logps_P2, references, objective, lengths_P2=lengths_P2 if by_tokens else None)

    response_T = _responses(cu_seqlens)
    weights_KP = references.weights_KP[1:]
    begun_KT = torch.stack([_beginnings(logps_T, cu_seqlens, response_T, reach_T) for reach_T in settled.policy_KT])
    value_T = _weighted(weights_KP[:, response_T // 2], begun_KT - settled.logps_KT)
    alone_KP2 = clip_to_anchor(references.ref_logps_KP2, own_epsilon(references, objective))[1:]
    value_S = _weighted(weights_KP[..., None], logps_P2 - alone_KP2).flatten()

    other_T = response_T ^ 1
    position_T, other_length_T = (
        torch.arange(len(logps_T), device=logps_T.device) - cu_seqlens[response_T],
        lengths_S[other_T],
    )
    same_place_T = cu_seqlens[other_T] + torch.minimum(position_T, other_length_T - 1)
    other_value_T = torch.where(position_T < other_length_T, value_T[same_place_T], value_S[other_T])
    if by_tokens:
        value_T = value_T / torch.maximum(other_length_T, position_T + 1)
        other_value_T = other_value_T / other_length_T.clamp(min=1)
    coefficients_T = whole.coefficients_P2.flatten()[response_T] - objective.beta / 2 * (value_T - other_value_T)
    zeros_T = coefficients_T * (token_logps_T - logps_T)  # which have a gradient
    losses_P = whole.losses_P + torch.zeros_like(whole.losses_P).index_add(0, response_T // 2, zeros_T)
    return SampledLoss(losses_P, whole.coefficients_P2, coefficients_T)


def _responses(cu_seqlens: Tensor) -> Tensor:
    """[T] which response each token belongs to."""
    return torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device).repeat_interleave(cu_seqlens.diff().long())


def _beginnings(token_logps_U: Tensor, cu_seqlens: Tensor, response_T: Tensor, count_T: Tensor) -> Tensor:
    """[T] log-probs of the first ``count_T`` tokens of the responses ``response_T``, summed in float64."""
    sums_U = torch.cat([token_logps_U.new_zeros(1, dtype=torch.float64), token_logps_U.double().cumsum(0)])
    start_T = cu_seqlens[response_T].long()
    return (sums_U[start_T + count_T] - sums_U[start_T]).to(token_logps_U.dtype)


def _weighted(weights_K: Tensor, terms_K: Tensor) -> Tensor:
    """Sum over references; one without weight may say what it will."""
    return (weights_K * terms_K).masked_fill(weights_K == 0, 0).sum(0)
