"""The keys of `mrpo reward`: those of `mrpo train`, so that one recipe's data serve both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated

from transformers import TrainingArguments

from mrpo_scale.config.fields import AtLeast, Decides, Place, key
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments

#: What a reward model has a use for beside transformers' keys and those that say which data there are.
_USED = (
    *(
        "dtype",
        "model_revision",
        "attn_implementation",
        "trust_remote_code",
        "disable_dropout",
        "chat_template",
        "system",
    ),
    *("plain_template", "template_date", "chat_template_kwargs", "dataset_layout", "dataset_num_proc", "ranked_pairs"),
    *("score_columns", "max_length", "repeated_prompt", "on_bad_row", "max_bad_rows", "center_rewards_coefficient"),
)
_OF_POLICIES = ("ref_models", "baselines")


@dataclass
class RewardConfig(MRPOConfig):
    """Those of the objective, of references and of the output head have no part in a reward model."""

    # TRL's default
    learning_rate: Decides[float] = key(1e-4, "The initial learning rate for AdamW.")
    resume_from_checkpoint: Place[str | None] = key(
        "never", "never, also what auto means here; true: from the newest checkpoint of output_dir; or a checkpoint."
    )
    center_rewards_coefficient: Annotated[Decides[float | None], AtLeast(0)] = key(
        None, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (0.01 is common)."
    )

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.use_peft:
            yield "`use_peft: true` is not supported by `mrpo reward`, which trains the whole model; remove it"

    def unused_keys(self, script: ScriptArguments) -> list[str]:
        """The keys that were given and have no part in a reward model."""
        known = {field.name for field in fields(TrainingArguments)} | set(_USED)
        return [*(name for name in _OF_POLICIES if getattr(script, name)), *(set(self.non_default_keys) - known)]
