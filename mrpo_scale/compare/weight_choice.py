"""The fixed weights of Multi-DPO, RLHF and KD: the best of a few, found on pairs that no table reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mrpo_scale.compare.paper_results import Measured


@dataclass(frozen=True)
class Choice:
    """What was tried for a method in a direction.

    Args:
        tried: {weight of the first reference: what its run measured}.
        failed: weights of which no run finished.
    """

    method: str
    set_name: str
    direction: str
    tried: Mapping[float, Measured]
    failed: Sequence[float]

    @property
    def weight(self) -> float | None:
        """Of the highest preference accuracy as the paper measures it, then of the highest margin; None where all runs failed."""
        return max(self.tried, key=lambda w: (self.tried[w].reward_accuracy, self.tried[w].reward_margin), default=None)

    def sentence(self) -> str:
        figures = [
            f"{weight:g}: {100 * one.reward_accuracy:.1f}% (margin {one.reward_margin:+.4f})"
            for weight, one in self.tried.items()
        ]
        figures += [f"{weight:g}: failed" for weight in self.failed]
        chosen = "none" if self.weight is None else f"{self.weight:g}"
        return f"{self.method}, {self.direction}: {chosen} of {', '.join(figures)}"


def validation_keys(row_keys: np.ndarray, prompt_keys: np.ndarray, fraction: float) -> np.ndarray:
    """Keys of the held-out pairs that weights are chosen on: all pairs of some prompts.

    A key is a hash, so its order is as good as any random one, and the same for every run, seed and call.

    Args:
        row_keys, prompt_keys: [N], of the held-out pairs.
        fraction: of the prompts, at least one and never all of them.
    """
    prompts = np.unique(prompt_keys)
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    return row_keys[np.isin(prompt_keys, prompts[:count])]
