"""Keys of recipes written for TRL, of this year's and of earlier versions: which are taken under another name, which are refused,
and what to write instead."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

_FULL_FINETUNING = "this project finetunes all weights"
# TRL keys that have no counterpart here: the values that ask for nothing, and what to say of all others.
TRL_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_peft": ((False,), _FULL_FINETUNING),
    "load_in_4bit": ((False,), _FULL_FINETUNING),
    "load_in_8bit": ((False,), _FULL_FINETUNING),
    "precompute_ref_log_probs": ((False,), ""),  # true: see take_trl_keys
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
    "router_aux_loss_coef": ((None, 0.0), "no auxiliary loss is added"),
    "activation_offloading": ((False,), "use `gradient_checkpointing: true`"),
    "dataset_streaming": (
        (False,),
        "data sets of any size are written to disk as Arrow files once and memory-mapped, so memory stays small without it",
    ),
    "ignore_bias_buffers": ((False,), "there is nothing to ignore"),
    "model_init_kwargs": ((None,), "use `dtype`, `attn_implementation`, `model_revision`"),
    "streaming": ((False,), "data sets of any size are written to disk once and memory-mapped; it is not needed"),
    "overwrite_output_dir": (
        (False,),
        "transformers 5 has none; a run that is in the folder goes on, `resume_from_checkpoint: never` starts anew",
    ),
    "rpo_alpha": ((None, 0.0), "a supervised term beside the preference loss is not supported"),
    "reference_free": ((False,), "a loss without references is not what this project does"),
    "generate_during_eval": ((False,), "use `mrpo eval` on the saved model"),
    "force_use_ref_model": ((False, True), ""),
    "is_encoder_decoder": ((None, False), "policies are causal language models"),
    "label_pad_token_id": ((None, -100), "padding is masked, no label is needed"),
    "save_safetensors": ((True,), "weights are always safetensors"),
    "pad_token": ((None,), "padding is masked, no token is needed"),
    "lora_r": ((16,), _FULL_FINETUNING),
    "lora_alpha": ((32,), _FULL_FINETUNING),
    "lora_dropout": ((0.05,), _FULL_FINETUNING),
    "lora_target_modules": ((None,), _FULL_FINETUNING),
    "lora_target_parameters": ((None,), _FULL_FINETUNING),
    "lora_modules_to_save": ((None,), _FULL_FINETUNING),
    "lora_task_type": (("CAUSAL_LM",), _FULL_FINETUNING),
    "use_rslora": ((False,), _FULL_FINETUNING),
    "use_dora": ((False,), _FULL_FINETUNING),
    "bnb_4bit_quant_type": (("nf4",), _FULL_FINETUNING),
    "use_bnb_nested_quant": ((False,), _FULL_FINETUNING),
    "bnb_4bit_quant_storage": ((None,), _FULL_FINETUNING),
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
}
_LIST = "write `dataset_name: [{name: ORG/SET, config: NAME, split: SPLIT, weight: NUMBER}, ...]` (docs/data.md)"
#: Keys that nothing here stands for, whatever their value.
REMOVED_KEYS = {
    "max_prompt_length": "TRL has dropped it; remove it, `max_length` bounds prompt and response together",
    "max_completion_length": "TRL has dropped it; remove it, `max_length` bounds prompt and response together",
    "max_target_length": "TRL has dropped it; remove it, `max_length` bounds prompt and response together",
    "dataset_mixer": _LIST,
    "dataset_mixture": _LIST,
    "datasets": _LIST,
    "dataset_splits": "write `dataset_train_split` and `dataset_test_split`, or a `split` for each set of `dataset_name`",
    "env": "export the variables before the run starts, the launcher and torch read them first",
    "ref_model_init_kwargs": "write a reference as a mapping: `ref_models: [{model: NAME, revision: R, dtype: D}]`",
    "group_by_length": "pairs of a step are grouped by length already; remove it",
    "tokenizer_name_or_path": "the tokenizer is the model's own; put the other one into the model's folder",
}


def take_trl_keys(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe without TRL's keys that ask for nothing, others under the name they have here; and what is wrong with the rest."""
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        renamed = RENAMED_TRL_KEYS.get(key)
        if key == "precompute_ref_log_probs" and value is True:
            renamed, value = "ref_scoring", "precompute"
        if renamed in values:
            problems.append(f"`{key}` and `{renamed}` say the same; leave `{renamed}`")
        elif key == "warmup_ratio" and not _is_fraction(value):
            problems.append(f"`warmup_ratio: {value}` must be a fraction below 1")
        elif renamed is not None:
            logger.info("`%s` is taken as `%s: %s`", key, renamed, value)
            kept[renamed] = value
        elif key not in TRL_KEYS:
            kept[key] = value
        elif value not in TRL_KEYS[key][0]:
            problems.append(f"TRL's `{key}: {value}` has no counterpart: {TRL_KEYS[key][1]}. Remove the key")
    return kept, problems


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
