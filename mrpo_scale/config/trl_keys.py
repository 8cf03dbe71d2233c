"""Keys of recipes written for TRL, of this year's and of earlier versions: which are taken under another name, which are refused,
and what to write instead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.mixtures import from_list, from_mixer, splits_of

logger = logging.getLogger(__name__)

# TRL keys that have no counterpart here: the values that ask for nothing, and what to say of all others.
TRL_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_8bit": (
        (False,),
        "bitsandbytes' 8-bit products differ between training and evaluation (a response's log-prob by 1.4%); use `load_in_4bit`",
    ),
    "precompute_ref_batch_size": ((None,), "use `ref_tokens_per_forward`"),
    "truncation_mode": (("keep_start",), "long responses are cut at their end, as TRL's keep_start does"),
    "padding_free": ((False, True), ""),
    "pad_to_multiple_of": (("auto", None), "pairs are packed into rows without padding to a multiple"),
    "ld_alpha": ((None, 1.0), "length desensitisation is not supported"),
    "f_divergence_type": (
        ("reverse_kl",),
        "Equations 8-10 and Proposition 1 are derived for reverse KL, others have no virtual reference",
    ),
    "f_alpha_divergence_coef": ((0.5,), "only reverse KL is supported"),
    "use_weighting": ((False,), "WPO weighting is not supported"),
    "sync_ref_model": ((False,), "references are frozen"),
    "ref_model_mixup_alpha": ((0.6,), "references are frozen"),
    "ref_model_sync_steps": ((512,), "references are frozen"),
    "dataset_streaming": (
        (False,),
        "data sets of any size are written to disk as Arrow files once and memory-mapped, so memory stays small without it",
    ),
    "ignore_bias_buffers": ((False,), "there is nothing to ignore"),
    "streaming": ((False,), "data sets of any size are written to disk once and memory-mapped; it is not needed"),
    "reference_free": ((False,), "a loss without references is not what this project does"),
    "generate_during_eval": ((False,), "use `mrpo eval` on the saved model"),
    "force_use_ref_model": ((False, True), ""),
    "is_encoder_decoder": ((None, False), "policies are causal language models"),
    "label_pad_token_id": ((None, -100), "padding is masked, no label is needed"),
    "save_safetensors": ((True,), "weights are always safetensors"),
    "pad_token": ((None,), "padding is masked, no token is needed"),
    "lora_task_type": (("CAUSAL_LM",), "policies are causal language models"),
}

#: Other names of keys: TRL's, and those of earlier versions of transformers.
RENAMED_TRL_KEYS = {
    "torch_dtype": "dtype",
    "chat_template_path": "chat_template",
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "test_split_size": "held_out",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "preprocessing_num_workers": "dataset_num_proc",
    "push_to_hub_revision": "push_to_hub",
}
_BOTH = "`max_length` bounds prompt and response together"
#: Keys of earlier versions that are left out, with a word: TRL and transformers have dropped them, or it is done anyway.
DROPPED_KEYS = {
    "max_prompt_length": _BOTH,
    "max_target_length": _BOTH,
    "overwrite_output_dir": "a run that is in the folder goes on, `resume_from_checkpoint: never` starts anew",
    "group_by_length": "pairs of a step are grouped by length already",
}
#: Keys that nothing here stands for, whatever their value.
REMOVED_KEYS = {
    "env": "export the variables before the run starts, the launcher and torch read them first",
    "ref_model_init_kwargs": "write a reference as a mapping: `ref_models: [{model: NAME, revision: R, dtype: D}]`",
    "tokenizer_name_or_path": "the tokenizer is the model's own; put the other one into the model's folder",
}


#: Keys that are made from other keys' values as well, and those keys.
_ADDS_TO = {"rpo_alpha": ("loss_type", "loss_weights")}


def take_trl_keys(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe without TRL's keys that ask for nothing, others under the name they have here; and what is wrong with the rest."""
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for key in sorted(values, key=_ADDS_TO.__contains__):  # what adds to another key comes after it
        value = values[key]
        try:
            taken = _take(key, value, values)
        except ConfigError as error:
            problems.append(str(error).rstrip("."))
            continue
        clash = next((name for name in taken if name != key and (name in values or name in kept)), None)
        if clash is not None and clash not in _ADDS_TO.get(key, ()):
            problems.append(f"`{key}` and `{clash}` say the same; leave `{clash}`")
            continue
        if set(taken) - {key}:
            logger.info("`%s` is taken as %s", key, ", ".join(f"`{name}: {given}`" for name, given in taken.items()))
        kept |= taken
    return kept, problems


def _take(key: str, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What one key of a recipe is here: keys and values. Raises ConfigError where it can be nothing."""
    if key in _MADE:
        return _MADE[key](value, values)
    if key in DROPPED_KEYS:
        if value not in (None, False):
            logger.warning("`%s: %s` has no effect: %s", key, value, DROPPED_KEYS[key])
        return {}
    if key == "tokenizer_name_or_path" and value in (None, values.get("model_name_or_path")):
        return {}
    if key in TRL_KEYS:
        if value not in TRL_KEYS[key][0]:
            raise ConfigError(f"TRL's `{key}: {value}` has no counterpart: {TRL_KEYS[key][1]}. Remove the key")
        return {}
    return {RENAMED_TRL_KEYS.get(key, key): value}


def _precompute(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if value is True:
        return {"ref_scoring": "precompute"}
    if value not in (None, False):
        raise ConfigError(f"`precompute_ref_log_probs: {value}` must be true or false")
    return {}


def _warmup(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if value is None or (value == 0 and "warmup_steps" in values):
        return {}
    if not _is_fraction(value):
        raise ConfigError(f"`warmup_ratio: {value}` must be a fraction below 1")
    return {"warmup_steps": value}


def _sft_term(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """RPO's term: alpha times the chosen response's loss per token, beside the preference loss."""
    if value is None or value == 0:
        return {}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ConfigError(f"`rpo_alpha: {value}` must be a number, 0 or more")
    given = values.get("loss_type") or "sigmoid"
    types = [given] if isinstance(given, str) else list(given)
    if "sft" in types:
        raise ConfigError(
            f"`rpo_alpha: {value}` and `sft` in `loss_type` say the same; leave `sft`, with `loss_weights`"
        )
    weights = list(values.get("loss_weights") or [1.0] * len(types))
    return {"loss_type": [*types, "sft"], "loss_weights": [*weights, float(value)]}


#: Of `model_init_kwargs`: what its keys are here; None: what asks for nothing, because it is so anyway.
_INIT_KWARGS: dict[str, str | None] = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "use_cache": None,
    "low_cpu_mem_usage": None,
}


def _init_kwargs(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value or {}, Mapping):
        raise ConfigError(
            f"`model_init_kwargs: {value}` must be a mapping; use `dtype`, `attn_implementation`, `model_revision`"
        )
    taken: dict[str, Any] = {}
    for name, given in (value or {}).items():
        if name == "use_kernels" and given:
            raise ConfigError(
                "`model_init_kwargs: use_kernels` is not supported: kernels of the hub are not loaded; remove it"
            )
        if name == "device_map" and given is not None:
            raise ConfigError(
                "`model_init_kwargs: device_map` is not supported: the launcher places the model; remove it"
            )
        if name not in (*_INIT_KWARGS, "use_kernels", "device_map"):
            known = ", ".join(sorted({f"`{here}`" for here in _INIT_KWARGS.values() if here}))
            raise ConfigError(f"`model_init_kwargs: {name}` has no counterpart; {known} are keys of their own")
        here = _INIT_KWARGS.get(name)
        if here is not None and given is not None:
            taken[here] = given
    return taken


def _mixture(value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """alignment-handbook's: the sets, and the number of pairs of the mix to hold out. Its `seed` is the recipe's here."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            "`dataset_mixture` must be a mapping with `datasets`; write them under `dataset_name` (docs/data.md)"
        )
    unknown = sorted(set(value) - {"datasets", "test_split_size", "seed"})
    if unknown:
        raise ConfigError(
            f"`dataset_mixture`: unknown key `{unknown[0]}`; known keys are datasets, test_split_size, seed"
        )
    taken: dict[str, Any] = {"dataset_name": from_list("dataset_mixture", value.get("datasets"))}
    if value.get("test_split_size") is not None:
        taken["held_out"] = value["test_split_size"]
    if value.get("seed") not in (None, values.get("seed")):
        logger.warning(
            "`dataset_mixture: seed: %s` has no effect: `seed` decides how sets are split and mixed", value["seed"]
        )
    return taken


#: Keys that become other values than their own, by (value, recipe).
_MADE: dict[str, Callable[[Any, Mapping[str, Any]], dict[str, Any]]] = {
    "precompute_ref_log_probs": _precompute,
    "warmup_ratio": _warmup,
    "rpo_alpha": _sft_term,
    "model_init_kwargs": _init_kwargs,
    "dataset_mixture": _mixture,
    "dataset_mixer": lambda value, _: {"dataset_name": from_mixer("dataset_mixer", value)},
    "datasets": lambda value, _: {"dataset_name": from_list("datasets", value)},
    "dataset_splits": lambda value, _: splits_of("dataset_splits", value),
}


def taken_keys() -> frozenset[str]:
    """Names of keys that a recipe may have: this project's, and others that are taken as something or refused with a remedy."""
    ours = {field.name for kind in (ScriptArguments, MRPOConfig) for field in fields(kind)}
    return frozenset({*ours, *TRL_KEYS, *RENAMED_TRL_KEYS, *DROPPED_KEYS, *REMOVED_KEYS, *_MADE})


def asks_for_nothing(key: str) -> bool:
    """Whether a recipe's key, where it is taken, leaves nothing behind."""
    return key in TRL_KEYS or key in DROPPED_KEYS


def remedy_of(key: str) -> str | None:
    """What to write instead of a key of TRL's on the command line, where only this project's own keys are taken."""
    if key in RENAMED_TRL_KEYS:
        return f"write `{RENAMED_TRL_KEYS[key]}`"
    if key in REMOVED_KEYS or key in DROPPED_KEYS:
        return REMOVED_KEYS.get(key) or f"remove it, {DROPPED_KEYS[key]}"
    if key in _MADE:
        return "write it in a recipe, where it is taken as the keys that stand for it (docs/from_trl.md)"
    return (TRL_KEYS[key][1] or "it has no effect, remove it") if key in TRL_KEYS else None


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
