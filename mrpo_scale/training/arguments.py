"""What MRPOTrainer is called with: arguments as TRL has them, and values that only look like ours, in one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mrpo_scale.base.errors import ConfigError, refuse
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.training.preflight import check_evaluation, preflight

#: Arguments of TRL's DPOTrainer that have no counterpart, and what to do instead. None, their default, asks for nothing.
TRL_ARGUMENTS = {
    "ref_model": "name the references in `ref_models`, a list; the policy's own starting weights are one already",
    "peft_config": "set `use_peft`, `lora_r`, `lora_target_modules`, ... in `args`",
    "quantization_config": "set `use_peft` and `load_in_4bit` in `args`",
    "tokenizer": "its name is `processing_class`",
}
_NO_LOGITS = "logits are never formed; `compute_metrics` gets the log-probs of policy and references"
#: Arguments of transformers' Trainer that cannot do here what they do there.
TRAINER_ARGUMENTS = {
    "data_collator": "pairs are tokenized and put together by the trainer",
    "compute_loss_func": "choose `objective`, `loss_type` and `label_smoothing`",
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "model_init": "name the model, or pass a loaded one; a search starts one run for each setting",
}


def check_arguments(
    model: Any, ref_models: Any, args: Any, eval_dataset: Any, kwargs: dict[str, Any]
) -> tuple[Sequence[str | Mapping[str, Any]], MRPOConfig]:
    """The references and the configuration, checked before anything loads. TRL's arguments that ask for nothing leave ``kwargs``.

    Raises:
        ConfigError: all that cannot be used, each with its remedy; then what preflight.py finds.
    """
    problems = [
        f"`{key}` is an argument of TRL's: {remedy}"
        for key, remedy in TRL_ARGUMENTS.items()
        if kwargs.pop(key, None) is not None
    ]
    problems += [
        f"`{key}` is not supported by MRPOTrainer: {remedy}"
        for key, remedy in TRAINER_ARGUMENTS.items()
        if kwargs.get(key) is not None
    ]
    if args is None:
        args = MRPOConfig()
    elif not isinstance(args, MRPOConfig):
        problems.append(
            f"`args` is a {type(args).__name__}; make an MRPOConfig, which takes the keys of transformers' TrainingArguments and "
            "most of TRL's DPOConfig (docs/from_trl.md)"
        )
    if isinstance(ref_models, (str, Mapping)):
        ref_models = [ref_models]
    elif ref_models is not None and not isinstance(ref_models, Sequence):
        problems.append(f"`ref_models` is a {type(ref_models).__name__}; give a list of names")
    if hasattr(model, "peft_config"):
        problems.append(
            "`model` has a PEFT adapter already: call its merge_and_unload() first, and set `use_peft` in `args` for a new one"
        )
    refuse(problems)
    own_optimizer = any(kwargs.get("optimizers") or ()) or kwargs.get("optimizer_cls_and_kwargs") is not None
    preflight(args, ref_models or (), own_optimizer=own_optimizer)
    check_evaluation(args, eval_dataset)
    return ref_models or (), args


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
