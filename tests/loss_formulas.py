"""The outer losses and the virtual reference by their formulas in float64, written apart from the code that is tested."""

from __future__ import annotations

import torch
from torch import Tensor

from mrpo_scale.objective import Objective

BETA, E, TAU, EPSILON_MAX = 0.7, 0.1, 0.05, 0.1


def objective(name: str, **keys: object) -> Objective:
    """With the constants of this file."""
    smoothing = E if name in ("robust", "exo_pair") else 0.0
    return Objective(**{"beta": BETA, "loss_type": name, "label_smoothing": smoothing, "discopop_tau": TAU, **keys})


def virtual(references: Tensor) -> Tensor:
    """Equations 8 to 10 and Proposition 1, pair by pair; references [K, P, 2], the anchor first."""
    result = torch.empty_like(references[0])
    for pair in range(references.shape[1]):
        raw = references[:, pair]
        size = raw.sum(0).abs()
        epsilon = EPSILON_MAX * size / size.sum()
        clipped = [raw[0]] + [
            torch.stack([min(max(r[j], (1 + epsilon[j]) * raw[0, j]), (1 - epsilon[j]) * raw[0, j]) for j in (0, 1)])
            for r in raw[1:]
        ]
        gaps = [abs(r[0] - r[1]) for r in raw]
        # The harmonic mean of probabilities of e^-20 and less is within float64's range.
        result[pair] = -torch.log(sum(gap / sum(gaps) / torch.exp(c) for gap, c in zip(gaps, clipped, strict=True)))
    return result


def loss_by_formula(name: str, policy: Tensor, reference: Tensor, anchor: Tensor, lengths: Tensor) -> Tensor:
    """The losses [P] around ``reference``; all log-probs [P, 2]."""

    def sig(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    s = policy - reference
    d = BETA * (s[:, 0] - s[:, 1])
    mean = s / lengths
    shifted = policy - (reference - reference.mean(-1, keepdim=True) + anchor.mean(-1, keepdim=True))
    w, l = BETA * shifted[:, 0], BETA * shifted[:, 1]  # noqa: E741
    p = sig(d)
    return {
        "sigmoid": -torch.log(p),
        "hinge": torch.clamp(1 - d, min=0),
        "ipo": (mean[:, 0] - mean[:, 1] - 1 / (2 * BETA)) ** 2,
        "ipo_whole": (s[:, 0] - s[:, 1] - 1 / (2 * BETA)) ** 2,
        "sigmoid_norm": -torch.log(sig(BETA * (mean[:, 0] - mean[:, 1]))),
        "robust": (-(1 - E) * torch.log(p) + E * torch.log(1 - p)) / (1 - 2 * E),
        "exo_pair": p * torch.log(p / (1 - E)) + (1 - p) * torch.log((1 - p) / E),
        "discopop": -torch.log(p) * (1 - sig(d / TAU)) + torch.exp(-d) * sig(d / TAU),
        "sft": -policy[:, 0] / lengths[:, 0],
        "nca_pair": -torch.log(sig(w)) - 0.5 * torch.log(sig(-w)) - 0.5 * torch.log(sig(-l)),
        "bco_pair": -torch.log(sig(w)) - torch.log(sig(-l)),
        "sppo_hard": (w / BETA - 0.5 / BETA) ** 2 + (l / BETA + 0.5 / BETA) ** 2,
        "apo_zero": 1 - sig(w) + sig(l),
        "apo_down": sig(w) + 1 - sig(d),
    }[name]
