"""What would waste a run, found before its first step: arguments without effect, a save that fails, updates that rounding loses."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.ranks import fail_together, world_group
from mrpo_scale.models.saving import unvalidated_generation_config

if TYPE_CHECKING:
    from mrpo_scale.training.trainer import MRPOTrainer

logger = logging.getLogger(__name__)

_NO_LOGITS = "logits are never formed; `compute_metrics` gets the log-probs of policy and references"
#: Arguments of transformers' Trainer that cannot do here what they do there.
_REFUSED = {
    "data_collator": "pairs are tokenized and put together by the trainer",
    "compute_loss_func": "choose `objective`, `loss_type` and `label_smoothing`",
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "model_init": "name the model, or pass a loaded one; a search starts one run for each setting",
}


def check_trainer_arguments(kwargs: Mapping[str, Any]) -> None:
    """Refuse what the Trainer takes and this trainer would ignore.

    Raises:
        ConfigError: names the argument and what to use.
    """
    for name, remedy in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ConfigError(f"`{name}` is not supported by MRPOTrainer: {remedy}.")


def check_optimizer(kwargs: Mapping[str, Any], policy: nn.Module) -> None:
    """Refuse an optimizer of other parameters than the policy's, which would train nothing.

    Raises:
        ConfigError: one of its parameters is not the policy's.
    """
    optimizer = (kwargs.get("optimizers") or (None,))[0]
    if optimizer is None:
        return
    own = {id(parameter) for parameter in policy.parameters()}
    if not all(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError(
            "`optimizers` updates parameters that are not the policy's: pass the loaded model that it was made for as `model`, or "
            "use `optim` or `optimizer_cls_and_kwargs`."
        )


class BeforeFirstStep(TrainerCallback):
    """Looks when models, optimizer and engine are ready and nothing is trained yet."""

    def __init__(self, trainer: MRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rehearse_save(self.trainer)
        if self.trainer.is_world_process_zero() and (warning := lost_updates(self.trainer)):
            logger.warning("%s", warning)


def rehearse_save(trainer: MRPOTrainer) -> None:
    """Write all of a model folder but its weights, and throw it away: what refuses to be saved does so now. Collective.

    Raises:
        ConfigError: a config, tokenizer or argument that cannot be written.
    """
    with fail_together(world_group()):
        if not trainer.args.should_save:
            return
        trainer.source_files()
        try:
            with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=trainer.args.folder) as folder:
                with unvalidated_generation_config(trainer.policy):
                    trainer.policy.save_pretrained(folder, state_dict={})
                if trainer.processing_class is not None:
                    trainer.processing_class.save_pretrained(folder)
                torch.save(trainer.args, f"{folder}/{TRAINING_ARGS_NAME}")
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(
                f"a save of the trained model would fail: {reason}; repair the policy's folder, or what was changed in the loaded "
                "model, tokenizer or arguments."
            ) from error


def lost_updates(trainer: MRPOTrainer) -> str | None:
    """What to say where the optimizer updates 16-bit weights themselves and not float32 copies; None where it does not.

    A weight in bfloat16 has 8 significant bits: an update of less than 1/512 of it leaves it what it was, and Adam's are about as
    large as the learning rate.
    """
    groups = _innermost(trainer.optimizer).param_groups
    parameters = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
    short = [parameter for parameter in parameters if parameter.dtype in (torch.bfloat16, torch.float16)]
    if not short:
        return None
    dtype, rate = str(short[0].dtype).removeprefix("torch."), trainer.args.learning_rate
    count, total = (sum(parameter.numel() for parameter in some) for some in (short, parameters))
    return (
        f"`dtype: {dtype}`: the optimizer updates {count:,} of {total:,} weights in {dtype} itself; with `learning_rate: {rate:g}` "
        "most updates are smaller than its rounding and are lost. Leave `dtype: auto` (float32 weights) and set `bf16: true` to "
        "compute in bfloat16, or train with DeepSpeed ZeRO, which keeps float32 copies; or take an `optim` that rounds "
        "stochastically or keeps what rounding loses."
    )


def _innermost(optimizer: Any) -> Any:
    """accelerate and DeepSpeed wrap the one that updates weights, DeepSpeed around float32 copies."""
    *_, innermost = _layers(optimizer)
    return innermost


def _layers(optimizer: Any) -> Iterator[Any]:
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)
