"""What the DPO recipes of alignment-handbook say, as facts: their keys and values, without their text. Read in November 2026."""

from __future__ import annotations

from typing import Any

Recipe = dict[str, Any]

_COMMON: Recipe = {
    "bf16": True,
    "beta": 0.1,
    "do_eval": True,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "learning_rate": 5.0e-7,
    "log_level": "info",
    "logging_steps": 10,
    "lr_scheduler_type": "cosine",
    "max_length": 1024,
    "max_prompt_length": 512,
    "num_train_epochs": 1,
    "optim": "adamw_torch",
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 42,
    "warmup_ratio": 0.1,
}
_NO_REENTRANT: Recipe = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
_EVALUATES: Recipe = {"eval_steps": 100}
_OLD: Recipe = {"evaluation_strategy": "steps", **_EVALUATES}
_NEW: Recipe = {"eval_strategy": "steps", **_EVALUATES}
_NOT_SAVED: Recipe = {"save_strategy": "no", "save_steps": None, "save_total_limit": None}
_BOTH_TRACKERS: Recipe = {"report_to": ["tensorboard", "wandb"]}


def _mixer(*names: str, splits: tuple[str, str] = ("train_prefs", "test_prefs")) -> Recipe:
    return {
        "dataset_mixer": dict.fromkeys(names, 1.0),
        "dataset_splits": list(splits),
        "preprocessing_num_workers": 12,
    }


def _mixture(
    *sets: tuple[str, str, str, float], columns: tuple[str, ...] = ("chosen", "rejected"), **more: Any
) -> Recipe:
    entries = [
        {"id": name, "config": config, "split": split, "columns": list(columns), "weight": weight}
        for name, config, split, weight in sets
    ]
    return {"dataset_mixture": {"datasets": entries, **more}, "dataset_num_proc": 12}


def _recipe(model: str, *parts: Recipe, **keys: Any) -> Recipe:
    merged: Recipe = {"model_name_or_path": model, **_COMMON}
    for part in (*parts, keys):
        merged |= part
    return {
        key: value for key, value in merged.items() if value is not None or key in ("torch_dtype", "save_total_limit")
    }


_UF = "HuggingFaceH4/ultrafeedback_binarized"
_ORCA = "HuggingFaceH4/orca_dpo_pairs"
_UF_BOTH = ((_UF, "default", "train_prefs", 1.0), (_UF, "default", "test_prefs", 1.0))

RECIPES: dict[str, Recipe] = {
    "constitutional-ai": _recipe(
        "alignment-handbook/mistral-7b-sft-constitutional-ai",
        _mixer(_UF, "HuggingFaceH4/cai-conversation-harmless"),
        _OLD,
        {
            "torch_dtype": None,
            "do_train": True,
            "eval_steps": 1000,
            "lr_scheduler_type": "linear",
            "num_train_epochs": 3,
        },
        {"optim": "rmsprop", "output_dir": "data/cai", "push_to_hub": True, "hub_model_id": "cai"},
    ),
    "gpt2-nl": _recipe(
        "BramVanroy/gpt2-sft-dutch",
        _mixer("BramVanroy/ultra_feedback_dutch"),
        _OLD,
        _NO_REENTRANT,
        {"model_revision": "main", "torch_dtype": "bfloat16", "gradient_accumulation_steps": 8, "report_to": ["wandb"]},
        {"per_device_train_batch_size": 8, "output_dir": "data/gpt2", "push_to_hub": True, "hub_model_id": "gpt2"},
    ),
    "pref_align_scan openhermes": _recipe(
        "teknium/OpenHermes-2.5-Mistral-7B",
        _mixer(_ORCA),
        _OLD,
        _NO_REENTRANT,
        {"torch_dtype": None, "beta": 0.01, "loss_type": "sigmoid", "do_train": True, "gradient_accumulation_steps": 2},
        {"hub_model_id": "scan", "hub_model_revision": "v1.0", "push_to_hub_revision": True, "output_dir": "data/scan"},
        {"max_length": None, "log_level": None, "per_device_train_batch_size": 8},
    ),
    "pref_align_scan zephyr": _recipe(
        "alignment-handbook/zephyr-7b-sft-full",
        _mixer(_UF),
        _OLD,
        _NO_REENTRANT,
        {"torch_dtype": None, "beta": 0.01, "loss_type": "sigmoid", "gradient_accumulation_steps": 2},
        {"hub_model_id": "scan", "hub_model_revision": "b-0.01", "push_to_hub_revision": True, "output_dir": "data/z"},
        {"max_length": None, "log_level": None, "per_device_train_batch_size": 8},
    ),
    "smollm2 1.7B": _recipe(
        "loubnabnl/smollm2-1.7B-sft",
        _mixture(*_UF_BOTH, test_split_size=2000, seed=0),
        {**_NEW, **_NO_REENTRANT, **_NOT_SAVED, **_BOTH_TRACKERS},
        {"torch_dtype": "bfloat16", "beta": 0.5, "hub_private_repo": True, "gradient_accumulation_steps": 8},
        {"learning_rate": 1.0e-6, "num_train_epochs": 3, "per_device_eval_batch_size": 4, "save_total_limit": None},
        {"hub_model_id": "smol", "push_to_hub": True, "output_dir": "data/smol"},
    ),
    "smollm2 360M": _recipe(
        "loubnabnl/smollm2-360M-sft",
        _mixer(_UF),
        {**_NEW, **_NO_REENTRANT, **_NOT_SAVED, **_BOTH_TRACKERS},
        {"torch_dtype": "bfloat16", "beta": 0.5, "hub_private_repo": True, "gradient_accumulation_steps": 8},
        {"learning_rate": 1.0e-6, "num_train_epochs": 2, "per_device_eval_batch_size": 4},
        {"hub_model_id": "smol", "push_to_hub": True, "output_dir": "data/smol"},
    ),
    "smollm3 apo": _recipe(
        "HuggingFaceTB/SmolLM3-3B-checkpoints",
        _mixture(
            ("HuggingFaceTB/smoltalk2", "Preference", "tulu_no_think", 0.5),
            ("HuggingFaceTB/smoltalk2", "Preference", "tulu_think", 0.25),
            columns=("chosen", "rejected", "prompt", "chat_template_kwargs"),
        ),
        {"model_revision": "it-SFT", "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2"},
        {"trust_remote_code": True, "do_eval": False, "eval_strategy": "no", "gradient_accumulation_steps": 2},
        {
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "run_name": "SmolLM3-DPO",
            "hub_strategy": "every_save",
        },
        {"learning_rate": 1.0e-6, "logging_steps": 1, "logging_strategy": "steps", "max_grad_norm": 0.2, "beta": 0.05},
        {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "loss_type": "apo_zero",
        },
        {"max_length": 24576, "max_prompt_length": None, "overwrite_output_dir": True, "padding_free": True},
        {"per_device_train_batch_size": 1, "push_to_hub": True, "report_to": ["wandb"], "save_steps": 0.5},
        {"use_liger_kernel": True, "output_dir": "data/SmolLM3-DPO"},
    ),
    "starchat2": _recipe(
        "HuggingFaceH4/starchat2-15b-sft-v0.1",
        _mixture(
            (_UF, "default", "train_prefs", 1.0),
            (_ORCA, "default", "train_prefs", 1.0),
            (_UF, "default", "test_prefs", 1.0),
            (_ORCA, "default", "test_prefs", 1.0),
            test_split_size=2000,
            seed=0,
        ),
        {**_NEW, **_NO_REENTRANT, **_NOT_SAVED, **_BOTH_TRACKERS},
        {"torch_dtype": "bfloat16", "beta": 0.05, "gradient_accumulation_steps": 8, "num_train_epochs": 2},
        {"per_device_eval_batch_size": 4, "hub_model_id": "star", "push_to_hub": True, "output_dir": "data/star"},
    ),
    "zephyr-7b-beta full": _recipe(
        "alignment-handbook/zephyr-7b-sft-full",
        _mixture(*_UF_BOTH, test_split_size=2000, seed=0),
        _NEW,
        _NO_REENTRANT,
        {"torch_dtype": None, "beta": 0.01, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"hub_model_id": "zephyr", "push_to_hub": True, "output_dir": "data/zephyr"},
    ),
    "zephyr-7b-beta qlora": _recipe(
        "alignment-handbook/zephyr-7b-sft-qlora",
        _mixer(_UF),
        _OLD,
        _NO_REENTRANT,
        {"torch_dtype": "float16", "use_peft": True, "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16},
        {"lora_dropout": 0.05, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
        {"beta": 0.01, "learning_rate": 5.0e-6, "optim": "paged_adamw_32bit", "per_device_train_batch_size": 4},
        {"hub_model_id": "zephyr", "push_to_hub": True, "output_dir": "data/zephyr"},
    ),
    "zephyr-7b-gemma": _recipe(
        "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1",
        _mixer("argilla/dpo-mix-7k", splits=("train", "test")),
        {**_OLD, **_NO_REENTRANT, **_NOT_SAVED, **_BOTH_TRACKERS},
        {"torch_dtype": "bfloat16", "beta": 0.05, "gradient_accumulation_steps": 8, "num_train_epochs": 2},
        {"per_device_eval_batch_size": 4, "hub_model_id": "gemma", "push_to_hub": True, "output_dir": "data/gemma"},
    ),
    "its tests' fixture": _recipe(
        "alignment-handbook/zephyr-7b-sft-full",
        _mixer(_UF),
        _OLD,
        _NOT_SAVED,
        {"lr_scheduler_type": "linear", "num_train_epochs": 3, "optim": "rmsprop", "per_device_train_batch_size": 8},
        {"per_device_eval_batch_size": 4, "hub_model_id": "zephyr", "push_to_hub": True, "output_dir": "data/zephyr"},
    ),
}
