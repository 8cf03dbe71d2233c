"""What a run is made of, as far as its result depends on it: a checkpoint is continued by the same run only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.tokenization import PairDataset
from mrpo_scale.lifecycle.template_date import TEMPLATE_DATE
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.references.scores import identify_models
from mrpo_scale.references.store.identity import ReferenceIdentity

#: Keys of MRPOConfig that decide the result. Models, texts and data enter as hashes of what they are, whatever they are called.
DECIDING_KEYS = (
    *(
        "objective",
        "beta",
        "epsilon_max",
        "clip",
        "ref_weights",
        "weights_split",
        "aggregate",
        "loss_type",
        "loss_weights",
        "label_smoothing",
        "discopop_tau",
    ),
    *("disable_dropout", "neftune_noise_alpha", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "tf32"),
)
#: Keys of MRPOConfig's own that do not: where things lie and run, what is shown, how the same numbers are computed.
OTHER_KEYS = (
    *("logging_steps", "report_to", "resume_from_checkpoint", "max_hours", "gradient_checkpointing"),
    *("dataset_num_proc", "on_bad_row", "max_bad_rows", "head_impl", "head_backward", "shared_prompt"),
    *("ref_shard_size", "ref_placement", "ref_offload", "ref_scoring", "ref_cache_dir", "ref_follow_timeout"),
    *("ref_tokens_per_forward", "heartbeat_timeout", "restore_callback_states_from_checkpoint"),
)
#: Keys that are part of a model's hash or of the rows'.
HASHED_KEYS = (
    *("dtype", "model_revision", "attn_implementation", "trust_remote_code", "anchor"),
    *(
        "chat_template",
        "system",
        "plain_template",
        "template_date",
        "max_length",
        "dataset_layout",
        "ranked_pairs",
        "score_columns",
    ),
)
WINDOW = "pairs per optimizer step"
_ABSENT = "(not set)"


def fingerprint(plan: RunPlan, args: MRPOConfig, pair_sets: Mapping[str, PairDataset], window: int) -> dict[str, Any]:
    """Flat JSON values: the keys that decide, the window, hashes of every model and every set. Collective over the world.

    Raises:
        ConfigError: a model's files cannot be read, or differ between hosts.
    """
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    models = [(plan.policy, plan.texts[0]), *((r.source, plan.texts[r.view]) for r in plan.references)]
    policy, *references = identify_models(models, args, args.ref_cache_folder or args.folder)
    return {
        **{key: _json(getattr(args, key)) for key in DECIDING_KEYS if hasattr(args, key)},
        WINDOW: window,
        "sharding": "none" if stage is None else f"ZeRO stage {stage}",
        **({TEMPLATE_DATE: args.template_date} if plan.dated else {}),
        "policy": _model(policy),
        **{f"reference {r.name}": _model(r) for r in references},
        **{f"{split} pairs": _rows(pairs) for split, pairs in pair_sets.items()},
    }


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, in the checkpoint, now) wherever two fingerprints differ."""
    keys = [*saved, *(key for key in now if key not in saved)]
    pairs = [(key, saved.get(key, _ABSENT), now.get(key, _ABSENT)) for key in keys]
    return [(key, _shown(old), _shown(new)) for key, old, new in pairs if _identity(old) != _identity(new)]


def _model(identity: ReferenceIdentity) -> dict[str, str]:
    """The key is compared, the path is shown: a model that moved is the same one."""
    return {"key": identity.key, "path": identity.path}


def _identity(value: Any) -> Any:
    return value["key"] if isinstance(value, Mapping) and "key" in value else value


def _shown(value: Any) -> Any:
    return f"{value.get('path')} ({value['key']})" if isinstance(value, Mapping) and "key" in value else value


def _rows(pairs: PairDataset) -> str:
    """How many, and a hash of their texts in their order."""
    return f"{len(pairs)}, {hashlib.sha256(pairs.row_keys.tobytes()).hexdigest()[:16]}"


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else str(getattr(value, "value", value))
