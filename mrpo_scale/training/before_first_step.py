"""What would waste a run, found when models, optimizer and engine are ready and before the first step is taken."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from mrpo_scale.training.callbacks import innermost
from mrpo_scale.training.saver import PolicySaver

logger = logging.getLogger(__name__)


class BeforeFirstStep(TrainerCallback):
    """Rehearses a save, and warns of updates that rounding loses."""

    def __init__(self, saver: PolicySaver) -> None:
        self.saver = saver

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saver.rehearse(args, kwargs["processing_class"])
        if state.is_world_process_zero and (warning := lost_updates(kwargs["optimizer"], args.learning_rate)):
            logger.warning("%s", warning)


def lost_updates(optimizer: Any, learning_rate: float) -> str | None:
    """What to say where the optimizer updates 16-bit weights themselves and not float32 copies; None where it does not.

    A weight in bfloat16 has 8 significant bits: an update of less than 1/512 of it leaves it what it was, and Adam's are about as
    large as the learning rate.
    """
    groups = innermost(optimizer).param_groups
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    short = [parameter for parameter in parameters if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not short:
        return None
    dtype = str(short[0].dtype).removeprefix("torch.")
    count, total = (sum(parameter.numel() for parameter in some) for some in (short, parameters))
    return (
        f"`dtype: {dtype}`: the optimizer updates {count:,} of {total:,} weights in {dtype} itself; with "
        f"`learning_rate: {learning_rate:g}` "
        "most updates are smaller than its rounding and are lost. Leave `dtype: auto` (float32 weights) and set `bf16: true` to "
        "compute in bfloat16, or train with DeepSpeed ZeRO, which keeps float32 copies; or take an `optim` that rounds "
        "stochastically or keeps what rounding loses."
    )
