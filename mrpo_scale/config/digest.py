"""What a run was asked to do, without where: the keys that are not defaults, and a digest that tells one recipe from another."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mrpo_scale.config.fields import Role, non_default_keys
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments, keys_of_role
from mrpo_scale.config.model_spec import parse_ref_models


def recipe_of(script: ScriptArguments | None, args: MRPOConfig) -> dict[str, Any]:
    """The keys of a run that are not defaults, without those that say where."""
    keys = {**(non_default_keys(script) if script else {}), **args.non_default_keys}
    if keys.get("ref_models"):
        keys["ref_models"] = [_as_typed(entry) for entry in keys["ref_models"]]
    places = keys_of_role(Role.PLACE)
    return {key: value for key, value in keys.items() if key not in places}


def command_digest(script: ScriptArguments | None, args: MRPOConfig) -> str:
    """Tells one recipe from another, local paths included, which the report does not show."""
    return hashlib.sha256(json.dumps(recipe_of(script, args), sort_keys=True, default=str).encode()).hexdigest()


def _as_typed(entry: str) -> str | dict[str, Any]:
    """A reference as a recipe writes it; the command line carries mappings as JSON."""
    return non_default_keys(parse_ref_models([entry])[0]) if entry.lstrip().startswith("{") else entry
