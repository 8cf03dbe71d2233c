"""Keys of LoRA training: TRL's names and defaults (ModelConfig of TRL 1.16). The adapter itself is models/adapter.py's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated

from mrpo_scale.config.fields import AtLeast, Decides, key


@dataclass
class AdapterKeys:
    """What of the policy trains: all weights, or a LoRA adapter beside frozen ones."""

    use_peft: Decides[bool] = key(
        False, "Train a LoRA adapter instead of all weights (needs `peft`); the anchor is the policy with it switched off."
    )
    lora_r: Annotated[Decides[int], AtLeast(1)] = key(16, "Rank of the adapter.")
    lora_alpha: Annotated[Decides[int], AtLeast(1)] = key(32, "The adapter's output is scaled by lora_alpha / lora_r.")
    lora_dropout: Decides[float] = key(0.05, "Dropout before the adapter, under `disable_dropout: false`.")
    lora_target_modules: Decides[list[str] | None] = key(
        None, "Names of the layers that get one, or all-linear. Default: what peft has for the model's type."
    )
    lora_target_parameters: Decides[list[str] | None] = key(
        None, "Names of parameters that get one, such as a mixture's stacked experts."
    )
    lora_modules_to_save: Decides[list[str] | None] = key(None, "Modules that are trained whole beside the adapter.")
    use_rslora: Decides[bool] = key(False, "Scale by lora_alpha / sqrt(lora_r) instead (rank-stabilised).")
    use_dora: Decides[bool] = key(False, "Train magnitude and direction apart (DoRA).")

    def adapter_mistakes(self) -> Iterator[str]:
        """Values that do not go together, each with its remedy."""
        if not self.use_peft:
            for field in fields(AdapterKeys):
                if getattr(self, field.name) != field.default:
                    yield f"`{field.name}: {getattr(self, field.name)}` has no effect without `use_peft: true`; set that, or remove it"
        if not 0 <= self.lora_dropout < 1:
            yield f"`lora_dropout: {self.lora_dropout}` must be from 0 to below 1"
