"""Outer losses: what a pair's log-ratios cost. One pure function for each of TRL 1.16's names that is a loss of pairs.

A log-ratio is log policy - log reference of a whole response; s_w and s_l are those of chosen and rejected, d = beta (s_w - s_l),
n_w and n_l the policy's tokens in them. The level of a virtual reference is arbitrary (Proposition 1 gives it up to a constant of
the prompt), only the difference between its two log-probs carries meaning. Losses that see s_w and s_l apart therefore take
w = beta s_w and l = beta s_l against the virtual reference shifted, by one constant per pair, to the anchor's mean of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_EXPONENT = 80.0  # of exp in float32: a pair this wrong has a large, finite loss


@dataclass(frozen=True)
class PairTerms:
    """What a loss may look at, for P pairs; any axes may stand before P. The last axis is (chosen, rejected)."""

    policy_P2: Tensor  #: log-probs
    ratios_P2: Tensor  #: log-ratios against the (virtual) reference
    recentred_P2: Tensor  #: the same, the reference shifted to the anchor's level
    lengths_P2: Tensor | None  #: the policy's response tokens
    beta: float
    smoothing: float
    tau: float

    @property
    def margin(self) -> Tensor:
        """d."""
        return self.beta * (self.ratios_P2[..., 0] - self.ratios_P2[..., 1])

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """w and l."""
        return self.beta * self.recentred_P2[..., 0], self.beta * self.recentred_P2[..., 1]

    def per_token(self, values_P2: Tensor) -> Tensor:
        """Values of whole responses divided by the responses' tokens; an empty response counts as one token."""
        if self.lengths_P2 is None:
            raise ValueError("this loss divides by the responses' tokens: pass lengths_P2")
        return values_P2 / self.lengths_P2.to(values_P2.dtype).clamp(min=1)

    @property
    def token_margin(self) -> Tensor:
        """s_w / n_w - s_l / n_l, not multiplied by beta."""
        means_P2 = self.per_token(self.ratios_P2)
        return means_P2[..., 0] - means_P2[..., 1]


def sigmoid(t: PairTerms) -> Tensor:
    """-(1 - e) logsig(d) - e logsig(-d): DPO (arXiv 2305.18290, Eq. 7); with label smoothing e conservative DPO."""
    loss = -F.logsigmoid(t.margin)
    return loss if not t.smoothing else (1 - t.smoothing) * loss - t.smoothing * F.logsigmoid(-t.margin)


def hinge(t: PairTerms) -> Tensor:
    """relu(1 - d): SLiC (arXiv 2305.10425) with normalised likelihoods (RSO, arXiv 2309.06657)."""
    return torch.relu(1 - t.margin)


def ipo_whole(t: PairTerms) -> Tensor:
    """(s_w - s_l - 1 / (2 beta))^2: IPO (arXiv 2310.12036, Eq. 17, beta is its tau) of whole responses."""
    return (t.margin / t.beta - 1 / (2 * t.beta)).square()


def ipo(t: PairTerms) -> Tensor:
    """(s_w / n_w - s_l / n_l - 1 / (2 beta))^2: IPO per token, as its authors ran it and TRL has it.

    Without lengths a response is one unit, which is :func:`ipo_whole`.
    """
    return ipo_whole(t) if t.lengths_P2 is None else (t.token_margin - 1 / (2 * t.beta)).square()


def sigmoid_norm(t: PairTerms) -> Tensor:
    """-logsig(beta (s_w / n_w - s_l / n_l)): length-normalised DPO (Tulu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(t.beta * t.token_margin)


def robust(t: PairTerms) -> Tensor:
    """(-(1 - e) logsig(d) + e logsig(-d)) / (1 - 2e): unbiased under flipped labels (arXiv 2403.00409)."""
    e = t.smoothing
    return ((e - 1) * F.logsigmoid(t.margin) + e * F.logsigmoid(-t.margin)) / (1 - 2 * e)


def exo_pair(t: PairTerms) -> Tensor:
    """sig(d) (logsig(d) - log(1 - e)) + sig(-d) (logsig(-d) - log e), e > 0: EXO (arXiv 2402.00856, Eq. 16)."""
    d, e = t.margin, t.smoothing
    chosen = torch.sigmoid(d) * (F.logsigmoid(d) - math.log1p(-e))
    return chosen + torch.sigmoid(-d) * (F.logsigmoid(-d) - math.log(e))


def discopop(t: PairTerms) -> Tensor:
    """-(1 - m) logsig(d) + m exp(-d) with m = sig(d / tau): DiscoPOP (arXiv 2406.08414, Eq. 5)."""
    d = t.margin
    mix = torch.sigmoid(d / t.tau)
    return mix * torch.exp((-d).clamp(max=_MAX_EXPONENT)) - (1 - mix) * F.logsigmoid(d)


def sft(t: PairTerms) -> Tensor:
    """-log policy(chosen) / n_w, of each pair: a mean over pairs, not over a micro-batch's tokens as in TRL, so that no split
    into micro-batches changes it."""
    return -t.per_token(t.policy_P2)[..., 0]


def nca_pair(t: PairTerms) -> Tensor:
    """-logsig(w) - logsig(-w) / 2 - logsig(-l) / 2: NCA (arXiv 2402.05369)."""
    w, rejected = t.rewards
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(t: PairTerms) -> Tensor:
    """-logsig(w) - logsig(-l): BCO (arXiv 2404.04656) without its running delta, as TRL 1.16 has it."""
    w, rejected = t.rewards
    return -F.logsigmoid(w) - F.logsigmoid(-rejected)


def sppo_hard(t: PairTerms) -> Tensor:
    """(s_w - 1 / (2 beta))^2 + (s_l + 1 / (2 beta))^2: SPPO with hard labels (arXiv 2405.00675, Eq. 4.7)."""
    s_w, s_l = t.recentred_P2.unbind(-1)
    return (s_w - 0.5 / t.beta).square() + (s_l + 0.5 / t.beta).square()


def apo_zero(t: PairTerms) -> Tensor:
    """1 - sig(w) + sig(l): APO-zero (arXiv 2408.06266, Eq. 7)."""
    w, rejected = t.rewards
    return torch.sigmoid(-w) + torch.sigmoid(rejected)


def apo_down(t: PairTerms) -> Tensor:
    """sig(w) + 1 - sig(d): APO-down (arXiv 2408.06266, Eq. 8)."""
    return torch.sigmoid(t.rewards[0]) + torch.sigmoid(-t.margin)


LOSSES: dict[str, Callable[[PairTerms], Tensor]] = {
    f.__name__: f
    for f in (
        *(sigmoid, hinge, ipo, ipo_whole, sigmoid_norm, robust, exo_pair, discopop, sft),
        *(nca_pair, bco_pair, sppo_hard, apo_zero, apo_down),
    )
}
SMOOTHED = ("sigmoid", "robust", "exo_pair")  #: that use label_smoothing
LEVELLED = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")  #: that see chosen and rejected apart
#: Names of TRL's that are refused, and why.
REFUSED = dict.fromkeys(
    ("aot", "aot_unpaired"),
    "it sorts over the batch, so it is no loss of pairs and would change with the micro-batches",
)
