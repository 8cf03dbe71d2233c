"""The columns of a paper's table: every set in every direction, each with a recipe of its own.

Swapping policy and reference swaps the models, with what belongs to them (revision, chat template, attention); how a policy is
trained and how a reference is loaded (dtype, quantize) stays where it is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models

#: Key of a reference's mapping -> the policy's key of the same meaning.
_OF_MODEL = {
    "model": "model_name_or_path",
    "revision": "model_revision",
    "chat_template": "chat_template",
    "system": "system",
    "trust_remote_code": "trust_remote_code",
    "attn_implementation": "attn_implementation",
}
#: What no set may say: it would not be a set any more, or belongs to the comparison.
_NOT_OF_SETS = {
    *_OF_MODEL.values(),
    "ref_models",
    "anchor",
    "baselines",
    "objective",
    "output_dir",
    "seed",
    "data_seed",
}


@dataclass(frozen=True)
class Side:
    """A set in a direction.

    Args:
        set_name, direction: what the columns are called: ``toy:pairs``, ``llama <- qwen2``.
        folder: of its runs.
        values: its recipe.
        argv: further words, for all its runs.
    """

    set_name: str
    direction: str
    folder: Path
    values: Mapping[str, Any]
    argv: tuple[str, ...]

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self) -> None:
        """A copy, so that a recipe that is edited meanwhile does not change the runs that are still to come."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe_file.write_text(yaml.safe_dump(dict(self.values), sort_keys=False))


@dataclass(frozen=True)
class _Set:
    name: str
    values: Mapping[str, Any]


def plan_sides(
    values: Mapping[str, Any],
    argv: Sequence[str],
    script: ScriptArguments,
    config: MRPOConfig,
    *,
    sets: Sequence[str],
    both_ways: bool,
    root: Path,
) -> list[Side]:
    """All directions of the first set, then of the others.

    Args:
        values: what the file of ``--config`` says.
        argv: the words after it.
        script, config: both, parsed.
        sets: names, or mappings as YAML: ``{name: S1, dataset_name: FILE, held_out: 100}``; none: the recipe's own.
        both_ways: policy and first further reference in both roles; otherwise the policy with each further reference.

    Raises:
        ConfigError: no further reference, one that cannot be a policy, or a set that cannot be read.
    """
    if config.anchor:
        raise ConfigError(
            f"`anchor: {config.anchor}`: in the paper's tables the policy starts as the first reference; leave it out."
        )
    references = parse_ref_models(script.ref_models)
    if not references:
        raise ConfigError("`ref_models` is empty; the paper's tables need a second reference.")
    own = _own_spec(script, config)
    ways = _both_ways(own, references[0]) if both_ways else [(own, reference) for reference in references]
    labels = [f"{_short(policy)} <- {_short(reference)}" for policy, reference in ways]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"`ref_models`: two columns would be called {labels[0]}; give the references a `name`.")
    sides = []
    for one in _read_sets(sets, script):
        ours = {*_OF_MODEL.values(), "ref_models", *one.values}
        rest = {key: value for key, value in values.items() if key not in {*ours, "baselines"}}
        for (policy, reference), label in zip(ways, labels, strict=True):
            folder = root / _file_name(one.name) / _file_name(label.replace("<-", "from"))
            recipe = {**_recipe_keys(policy, reference), **rest, **one.values}
            sides.append(Side(one.name, label, folder, recipe, tuple(without(argv, [*ours, "baselines"]))))
    if len({side.folder for side in sides}) < len(sides):
        raise ConfigError("`--sets`: two sets would have the same folder; give each a `name` of its own.")
    return sides


def left_out(script: ScriptArguments, *, both_ways: bool) -> list[str]:
    """Further references of the recipe that a table has no column for."""
    return [_short(spec) for spec in parse_ref_models(script.ref_models)[1:]] if both_ways else []


def without(argv: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The words of a command line but those of ``keys``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in keys:
        parser.add_argument(f"--{key}", nargs="*")
    return parser.parse_known_args(list(argv))[1]


def _own_spec(script: ScriptArguments, config: MRPOConfig) -> ModelSpec:
    given = {**vars(script), **vars(config)}
    return ModelSpec(**{key: given[policy_key] for key, policy_key in _OF_MODEL.items()})


def _both_ways(own: ModelSpec, other: ModelSpec) -> list[tuple[ModelSpec, ModelSpec]]:
    if other.url:
        raise ConfigError(
            f"`ref_models.url: {other.url}`: {other.model} is served elsewhere and cannot be the policy of the other direction; "
            "name its folder."
        )
    return [(own, other), (other, replace(own, dtype=other.dtype, quantize=other.quantize))]


def _recipe_keys(policy: ModelSpec, reference: ModelSpec) -> dict[str, Any]:
    """The models of a direction as a recipe has them; what is a default is left out."""
    plain = ModelSpec(model="")
    keys = {_OF_MODEL[key]: getattr(policy, key) for key in _OF_MODEL if getattr(policy, key) != getattr(plain, key)}
    shown = {f.name: getattr(reference, f.name) for f in fields(ModelSpec)}
    mapping = {key: value for key, value in shown.items() if value != getattr(plain, key)}
    return {**keys, "ref_models": [mapping if len(mapping) > 1 else reference.model]}


def _read_sets(words: Sequence[str], script: ScriptArguments) -> list[_Set]:
    if not words:
        names = script.dataset_name if isinstance(script.dataset_name, list) else [script.dataset_name]
        return [_Set("+".join(_last(spec.name) for spec in script.datasets) if names else "", {})]
    sets = []
    for word in words:
        try:
            given = yaml.safe_load(word) if word.lstrip().startswith("{") else {"dataset_name": word}
        except yaml.YAMLError:
            given = None
        if not isinstance(given, dict) or not isinstance(given.get("dataset_name"), (str, list)):
            raise ConfigError(
                f"`--sets {word}` is no set; write a name, or a mapping such as {{name: S1, dataset_name: FILE, held_out: 100}}."
            )
        name = str(given.pop("name", None) or _last(str(given["dataset_name"])))
        if wrong := sorted(_NOT_OF_SETS & set(given)):
            raise ConfigError(
                f"`--sets {word}`: `{wrong[0]}` is not a set's to say; set it for all of them as --{wrong[0]}."
            )
        sets.append(_Set(name, given))
    return sets


def _last(name: str) -> str:
    """Of a path its last part; names of the toy world and of the hub as they are."""
    return Path(name).name if Path(name).exists() or name.startswith(("/", "~", ".")) else name


def _short(spec: ModelSpec) -> str:
    return spec.name or Path(spec.model.removeprefix("toy:")).name


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)
