"""The losses of responses that the policy samples: the KL terms of KD and the reward of RLHF (Eq. 6), as score-function gradients.

Two responses y_0, y_1 of one prompt, drawn from the policy. Each has a value f(y): for ``kd``

    beta * sum_{k>=2} alpha_k (log pi(y) - log pi_k(y)) / n(y),

pi_k clipped by Eq. 8 and n the policy's tokens; for ``rlhf`` beta * sum_k alpha_k (log pi(y) - log pi_k(y)) - r(y). The loss is
E[f]. A backward through the log-ratios differentiates f alone, and the mean of that gradient is 0 but for n: what moves the loss is
that the policy draws y. With s(y) = df / dlog pi(y),

    grad E[f] = E[(f(y) + s(y)) grad log pi(y)].

Adaptive epsilon (Eq. 9) makes f of one sample depend on the other, so the loss is E[F], F = (f(y_0|y_1) + f(y_1|y_0)) / 2, and

    grad E[F] = E[sum_j (F + s(y_j) / 2 - b(y_other)) grad log pi(y_j)]

for any baseline b that y_j has no part in. Here b = f + s/2 of the other sample with an epsilon from that sample alone. Under
``clip: fixed`` and ``none`` this is leave-one-out REINFORCE, (f(y_0) - f(y_1)) / 2 and its negative (arXiv 2402.14740); under
``adaptive`` that difference would be biased, since f(y_1|y_0) depends on y_0.

K references, P prompts, 2 samples each; reference 0 is the anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mrpo_kernels import CombinedReferences
from mrpo_kernels.virtual_reference import clip_to_anchor
from torch import Tensor

from mrpo_scale.objective import Objective


@dataclass(frozen=True)
class SampledLoss:
    """Losses of P prompts. Only ``losses_P`` carries a gradient, the estimator's; its value is F."""

    losses_P: Tensor
    coefficients_P2: Tensor  #: d losses_P / d log pi: what each response's log-prob is multiplied by
    coefficients_T: Tensor | None = None  #: of each token, under `kd_level: aligned`, in their place


def sampled_loss(
    policy_logps_P2: Tensor,
    references: CombinedReferences,
    objective: Objective,
    *,
    lengths_P2: Tensor | None = None,
    rewards_P2: Tensor | None = None,
) -> SampledLoss:
    """The loss of two samples for each of P prompts.

    Args:
        policy_logps_P2: log-probs of the sampled tokens, of the forward that is trained through: the advantage takes them from here
            (detached) and not from whatever drew the samples.
        references: of the same samples, combined with ``objective``.
        objective: ``kd`` or ``rlhf``.
        lengths_P2: of ``kd``: divide by the policy's tokens of each response, as GKD does; None: by nothing.
        rewards_P2: of ``rlhf``.
    """
    logps_P2 = policy_logps_P2.detach()
    weights_K = references.weights_KP[..., None]
    taught = slice(1, None) if objective.name == "kd" else slice(None)
    scale_P2 = objective.beta / (1 if lengths_P2 is None else lengths_P2.clamp(min=1).to(logps_P2))

    def values(clipped_KP2: Tensor) -> Tensor:
        terms_KP2 = weights_K[taught] * (logps_P2 - clipped_KP2[taught])
        values_P2 = scale_P2 * terms_KP2.masked_fill(weights_K[taught] == 0, 0).sum(0)
        return values_P2 if rewards_P2 is None else values_P2 - rewards_P2

    slope_P2 = scale_P2 * weights_K[taught].sum(0)
    joint_P1 = values(references.clipped_KP2).mean(-1, keepdim=True)
    alone_P2 = values(clip_to_anchor(references.ref_logps_KP2, own_epsilon(references, objective)))
    coefficients_P2 = joint_P1 + slope_P2 / 2 - (alone_P2 + slope_P2 / 2).flip(-1)
    losses_P = joint_P1.squeeze(-1) + (coefficients_P2 * (policy_logps_P2 - logps_P2)).sum(-1)
    return SampledLoss(losses_P, coefficients_P2)


def own_epsilon(references: CombinedReferences, objective: Objective) -> Tensor:
    """[P, 2] epsilon of each sample that depends on no other: Eq. 9's mean over a pair, where Eq. 9 looks at both."""
    if objective.modes["clip"] != "adaptive":
        return references.epsilon_P2
    return torch.full_like(references.epsilon_P2, objective.epsilon_max / 2)
