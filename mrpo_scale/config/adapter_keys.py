"""Keys of LoRA training: TRL's names and defaults (ModelConfig of TRL 1.16). The adapter itself is models/adapter.py's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from mrpo_scale.config.fields import AtLeast, Decides, OneOf, key

_STORAGE = ("uint8", "bfloat16", "float16", "float32")


@dataclass
class AdapterKeys:
    """What of the policy trains: all weights, or a LoRA adapter beside frozen ones."""

    use_peft: Decides[bool] = key(
        False,
        "Train a LoRA adapter instead of all weights (needs `peft`); the anchor is the policy with it switched off.",
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

    # Frozen weights beside the adapter, quantized as they load (QLoRA)
    load_in_4bit: Decides[bool] = key(False, "Keep the policy's frozen weights in 4 bits (needs `bitsandbytes`).")
    bnb_4bit_quant_type: Decides[Literal["nf4", "fp4"]] = key("nf4", "Data type of the 4 bits.")
    use_bnb_nested_quant: Decides[bool] = key(False, "Quantize the scales of the 4 bits too.")
    bnb_4bit_quant_storage: Annotated[Decides[str | None], OneOf((None, *_STORAGE))] = key(
        None, "dtype that 4 bits are stored in: uint8 (default), bfloat16, float16 or float32."
    )

    def adapter_mistakes(self) -> Iterator[str]:
        """Values that do not go together, each with its remedy."""
        if not self.use_peft:
            for field in fields(AdapterKeys):
                value = getattr(self, field.name)
                if value != field.default:
                    yield f"`{field.name}: {value}` has no effect without `use_peft: true`; set that, or remove it"
        if not 0 <= self.lora_dropout < 1:
            yield f"`lora_dropout: {self.lora_dropout}` must be from 0 to below 1"
