"""What is measured on pairs, in training and on the held-out set: per-pair values whose weighted means are the metrics.

``rewards/*`` belong to the run's objective; ``anchor/rewards/*`` and ``references/<name>/rewards/*`` are what plain DPO against
that single reference would call the rewards. Under MRPO the former are not zero at step 0, because the virtual reference is not
the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from mrpo_scale.base.ranks import sum_over_ranks
from mrpo_scale.objective import Objective, PreferenceLoss, combine, loss_against


@torch.no_grad()
def pair_metrics(
    policy_logps_P2: Tensor,
    references: CombinedReferences,
    loss: PreferenceLoss,
    objective: Objective,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """Metric name -> value of each pair, [P] float32. ``names`` are the references', the anchor's first; at least those of
    ``references``.

    ``references/<name>/decides`` is the share of a pair's two texts for which the reference decides (see CombinedReferences),
    ``clipped`` the share of the two that Eq. 8 moved.
    """
    names = names[: len(references.ref_logps_KP2)]  # DPO's is the anchor alone
    metrics = {
        "logps/chosen": policy_logps_P2[:, 0],
        "logps/rejected": policy_logps_P2[:, 1],
        "logps/accuracies": policy_logps_P2[:, 0] > policy_logps_P2[:, 1],
        **_rewards("rewards", loss.rewards_P2),
        **_rewards("anchor/rewards", objective.beta * (policy_logps_P2 - references.ref_logps_KP2[0])),
    }
    if len(loss.parts) > 1:
        metrics |= {f"loss/{name}": losses_P.detach() for name, losses_P in loss.parts.items()}
    moved_KP2 = references.clipped_KP2 != references.ref_logps_KP2
    decides_P2 = references.decides
    for k, name in enumerate(names):
        metrics[f"references/{name}/weight"] = references.weights_KP[k]
        metrics[f"references/{name}/clipped"] = moved_KP2[k].float().mean(-1)
        metrics[f"references/{name}/decides"] = (decides_P2 == k).float().mean(-1)
    for k, name in enumerate(names[1:], start=1):
        rewards_P2 = objective.beta * (policy_logps_P2 - references.ref_logps_KP2[k])
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        metrics[f"references/{name}/rewards/accuracies"] = margins_P > 0
        metrics[f"references/{name}/rewards/margins"] = margins_P
    return {name: value.float() for name, value in metrics.items()}


def metric_names(objective: Objective, names: Sequence[str]) -> list[str]:
    """What :func:`pair_metrics` calls the metrics of a run. ``names`` are the K references', the anchor's first."""
    objective = objective.of_pairs
    if objective.ref_weights == "validation":  # weights found later; they rename nothing
        objective = replace(objective, ref_weights="uniform")
    policy_logps_P2, references = -torch.ones(1, 2), combine(-torch.ones(len(names), 1, 2), objective)
    loss = loss_against(policy_logps_P2, references, objective, torch.ones(1, 2))
    return list(pair_metrics(policy_logps_P2, references, loss, objective, names))


def _rewards(prefix: str, rewards_P2: Tensor) -> dict[str, Tensor]:
    chosen_P, rejected_P = rewards_P2.unbind(-1)
    return {
        f"{prefix}/chosen": chosen_P,
        f"{prefix}/rejected": rejected_P,
        f"{prefix}/accuracies": chosen_P > rejected_P,
        f"{prefix}/margins": chosen_P - rejected_P,
    }


class MetricSums:
    """Weighted sums of per-pair metrics: of what was added since the last :meth:`read`, on the device and of this rank; of all
    before, on the host and of all ranks."""

    def __init__(self) -> None:
        self._unread: dict[str, Tensor] = {}
        self.totals: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._unread or self.totals)

    def add(self, metrics: Mapping[str, Tensor], weight_P: Tensor, prefix: str = "") -> None:
        """``prefix``: of all these metrics' names, whose mean is taken over what was added under it, apart from all others."""
        for name, value_P in {**metrics, "_pairs" + prefix: torch.ones_like(weight_P)}.items():
            self.add_sum(name, (value_P * weight_P).double().sum())

    def add_sum(self, name: str, total: Tensor) -> None:
        """A sum that is no metric starts with "_"; it is in ``totals`` and not among the means."""
        self._unread[name] = self._unread[name] + total if name in self._unread else total.double()

    def read(self, *others: Tensor) -> list[float]:
        """Add what all ranks have measured to the totals, and return ``others``, scalars of this rank. Here the host waits for its
        device, once. Collective over the world."""
        names = list(self._unread)
        sums = sum_over_ranks(torch.stack([self._unread[name] for name in names]))
        values = torch.cat([sums, *(x.detach().double().reshape(1) for x in others)]).tolist()
        self._unread = {}
        for name, value in zip(names, values, strict=False):
            self.totals[name] = self.totals.get(name, 0.0) + value
        return values[len(names) :]

    def means(self) -> dict[str, float]:
        """Means over all pairs of all ranks, then start anew. Collective over the world if something was not read."""
        if self._unread:
            self.read()
        totals, self.totals = self.totals, {}
        counts = {name.removeprefix("_pairs"): x for name, x in totals.items() if name.startswith("_pairs")}
        metrics = {name: x for name, x in totals.items() if not name.startswith("_")}
        of = {name: counts.get(name[: name.find("/") + 1], counts.get("", 0.0)) for name in metrics}
        return {name: x / of[name] for name, x in metrics.items() if of[name]}
