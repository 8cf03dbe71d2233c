"""What a run is made of, as far as its result depends on it: a checkpoint is continued by the same run only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mrpo_scale.config.fields import Role
from mrpo_scale.config.keys import MRPOConfig, keys_of_role
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.lifecycle.template_date import TEMPLATE_DATE
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.references.store.identity import ReferenceIdentity
from mrpo_scale.references.stores import identify_models

WINDOW = "pairs per optimizer step"
_ABSENT = "(not set)"


def fingerprint(plan: RunPlan, args: MRPOConfig, pair_sets: Mapping[str, PairDataset], window: int) -> dict[str, Any]:
    """Flat JSON values: the keys that decide, the window, hashes of every model and every set (what keys of ``Role.HASHED`` name
    enters here, whatever it is called). Collective over the world.

    Raises:
        ConfigError: a model's files cannot be read, or differ between hosts.
    """
    stage = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    models = [(plan.policy, plan.texts[0]), *((r.source, plan.texts[r.tokenization]) for r in plan.references)]
    policy, *references = identify_models(models, args, args.ref_cache_folder or args.folder)
    return {
        **{key: _json(getattr(args, key)) for key in keys_of_role(Role.DECIDES)},
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
    return f"{len(pairs)}, {hashlib.sha256(pairs.row_keys.view(np.uint8).data).hexdigest()[:16]}"


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_json(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else str(getattr(value, "value", value))
