"""Keys of objectives that train on responses which the policy samples (`kd`, `rlhf`): TRL's names where it has them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mrpo_scale.config.fields import AtLeast, Decides, Other, UsedBy, key
from mrpo_scale.objective import SAMPLED

logger = logging.getLogger(__name__)


@dataclass
class SamplingKeys:
    """How many responses are sampled, how, and what they are worth."""

    sampled_fraction: Annotated[Decides[float], UsedBy(SAMPLED)] = key(
        1.0, "Fraction of each step's prompts to which the policy samples two responses, at least one."
    )
    max_completion_length: Annotated[Decides[int], AtLeast(1), UsedBy(SAMPLED)] = key(
        256, "Most tokens of a sampled response; one that is longer has no end of turn in any model."
    )
    temperature: Annotated[Decides[float], UsedBy(SAMPLED)] = key(
        1.0, "Of sampling. Only 1: the gradient needs samples of the policy itself."
    )
    kd_level: Annotated[Decides[Literal["sequence", "aligned"]], UsedBy(("kd",))] = key(
        "sequence",
        "What a token's gradient is weighed by: the KL of its whole response, or that of the pieces which are not over before it, "
        "between byte boundaries that two tokenizations share.",
    )
    kd_normalize: Annotated[Decides[Literal["tokens", "none"]], UsedBy(("kd",))] = key(
        "tokens", "Divide a response's KL by the policy's tokens, as GKD does, or by nothing."
    )
    reward_model: Annotated[Decides[dict[str, Any] | str | None], UsedBy(("rlhf",))] = key(
        None,
        "The reward of `rlhf`: hub id or folder of a sequence classifier with one label, or a mapping as in `ref_models`.",
    )
    generation_batch_size: Annotated[Other[int | None], AtLeast(1)] = key(
        None, "Prompts that a rank answers at a time, twice each (default: all of its step)."
    )
    ds3_gather_for_generation: Other[bool] = key(
        True,
        "Under ZeRO-3 gather the whole policy on every rank while it generates; false: layer by layer, for each token, where it "
        "would not fit.",
    )

    def sampling_mistakes(self, objective: str, ref_scoring: str, ref_placement: str) -> Iterator[str]:
        """Values that do not go together, each with its remedy."""
        if objective not in SAMPLED:  # which read none of these keys, so that runs to be compared can share a recipe
            self._say_what_recipes_mean()
            return
        if self.temperature != 1:
            yield (
                f"`temperature: {self.temperature}` would sample from another distribution than the policy, and its gradient would "
                "be that of nothing; only 1 is right, remove it"
            )
        if not 0 < self.sampled_fraction <= 1:
            yield f"`sampled_fraction: {self.sampled_fraction}` must be above 0 and at most 1"
        if objective == "rlhf" and not self.reward_model:
            yield "`objective: rlhf` needs `reward_model`, which `mrpo reward` trains"
        if ref_scoring != "live":
            yield (
                f"`ref_scoring: {ref_scoring}` does not work with `objective: {objective}`: samples are new in every step, so no "
                "score of theirs is ever in a cache; use `live`"
            )
        if ref_placement != "spread":
            yield (
                f"`ref_placement: {ref_placement}` does not work with `objective: {objective}`: a sample is known to its own rank "
                "alone; use `spread`"
            )

    def _say_what_recipes_mean(self) -> None:
        """Recipes of TRL's earlier versions have a key of this name for labelled responses."""
        if self.max_completion_length != type(self).max_completion_length:
            logger.warning(
                "`max_completion_length: %s` has no effect without `objective: kd` or `rlhf`: `max_length` bounds prompt and "
                "response together",
                self.max_completion_length,
            )
