"""A model as a recipe names it, before any file of it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mrpo_scale.base.errors import ConfigError, check_one_of
from mrpo_scale.base.untrusted import parse_json

DTYPES = ("auto", "float32", "bfloat16", "float16")
SYSTEM_TURNS = ("native", "merge", "error")


@dataclass(frozen=True)
class ModelSpec:
    """One model as a recipe names it. A reference is written as its path or as a mapping of these keys."""

    model: str
    name: str = ""
    revision: str | None = None
    dtype: str = "auto"
    chat_template: str | None = None
    system: str = "native"
    trust_remote_code: bool = False
    attn_implementation: str | None = None


def parse_ref_models(ref_models: Sequence[str | Mapping[str, Any]], key: str = "ref_models") -> list[ModelSpec]:
    """Models as typed under ``key``: paths, hub ids, mappings, or mappings as JSON text (how the command line carries them).

    Raises:
        ConfigError: an unknown key of a mapping, or a mapping without ``model``.
    """
    known = {f.name for f in fields(ModelSpec)}
    specs: list[ModelSpec] = []
    for entry in ref_models:
        values: Any = entry
        if isinstance(entry, str):
            try:
                values = parse_json(entry) if entry.lstrip().startswith("{") else {"model": entry}
            except ValueError as error:
                raise ConfigError(f"`{key}: {entry}` is not a model name nor a JSON mapping: {error}.") from None
        if not isinstance(values, Mapping):
            what = type(entry).__name__  # not its text: a loaded model's is a page long
            raise ConfigError(
                f"`{key}` holds a {what}; write a folder, a hub id, or a mapping with `model`. A loaded model goes to a folder "
                "first, with save_pretrained (its tokenizer too)."
            )
        unknown = set(values) - known
        if unknown or "model" not in values:
            problem = f"unknown key `{min(unknown)}`" if unknown else "key `model` is missing"
            raise ConfigError(f"`{key}: {dict(values)}`: {problem}; known keys are {', '.join(sorted(known))}.")
        values = {k: v for k, v in values.items() if v is not None}
        for k, value in values.items():
            # Not the truth of the value: the text "false" is true, and would let the model's code run.
            wanted = bool if k == "trust_remote_code" else str
            if not isinstance(value, wanted):
                what = "true or false, without quotes" if wanted is bool else "text"
                raise ConfigError(f"`{key}.{k}: {value!r}` must be {what}.")
        spec = ModelSpec(**values)
        check_one_of(f"{key}.dtype", spec.dtype, DTYPES)
        check_one_of(f"{key}.system", spec.system, SYSTEM_TURNS)
        specs.append(spec)
    return specs
