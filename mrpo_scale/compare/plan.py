"""Which runs a comparison has: every objective times every varied value times every seed, and DPO on each single reference.

Runs are comparable because all of them see the same rows: what decides on rows and on the held-out set cannot be varied, the
seeds only change the order of the training pairs, and DPO on one reference keeps the tokenizers of the others (they decide which
pairs every model can score).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.fields import COMMON, keys_unused_by, keys_with
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.recipe import find_recipe, parse, read_recipe
from mrpo_scale.objective import OBJECTIVES

#: Keys of which a comparison plans the values itself, with what to say instead.
_OURS = {"output_dir": "--output", "baselines": "--objectives", "objective": "--objectives", "data_seed": "--seeds"}
HELD_OUT = "eval_logps.npz"
#: Keys that would give the runs other models, rows or scores, or that a comparison sets itself.
FIXED = {f.name for f in fields(ScriptArguments)} | set(keys_with(MRPOConfig, COMMON))


def read_words(recipe: str | None, argv: Sequence[str]) -> tuple[dict[str, Any], ScriptArguments, MRPOConfig]:
    """What the recipe's file says, without ``baselines``, and the whole command line parsed.

    Raises:
        ConfigError: a key that a comparison decides itself, or one that may not stand in its files.
    """
    for key, remedy in _OURS.items():
        if any(word == f"--{key}" or word.startswith(f"--{key}=") for word in argv):
            raise ConfigError(f"`--{key}`: a comparison decides it for each run; use `{remedy}`.")
    values = read_recipe(find_recipe(recipe)) if recipe else {}
    values.pop("baselines", None)
    script, config = parse([*(["--config", recipe] if recipe else []), *argv])
    if config.hub_token:
        raise ConfigError(
            "`hub_token`: a comparison keeps the words of its runs in files, and the token with them; leave it out, and "
            "set HF_TOKEN."
        )
    return values, script, config


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str  #: ``dpo on gemma3``, ``mrpo epsilon_max=0.1``
    objective: str
    argv: tuple[str, ...]  #: what it adds to the recipe's command line
    varied: dict[str, str] = field(default_factory=dict)
    reference: str | None = None  #: of DPO: the single reference it runs on

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=+-]+", "_", self.name)


@dataclass(frozen=True)
class Shared:
    """What all runs of a comparison have in common."""

    recipe: dict[str, Any]  #: what the file of ``--config`` says
    argv: tuple[str, ...]  #: the user's own, after ``--config``
    paths: tuple[str, ...]  #: words that say where things are, and change no result
    launch: str  #: the launcher, which decides the number of ranks and so the pairs of a step


@dataclass(frozen=True)
class Run:
    """One process: an arm with a seed."""

    arm: Arm
    seed: int
    folder: Path
    argv: tuple[str, ...]
    settings: dict[str, Any]  #: what its result depends on; a finished run with others is not this one
    of: str = ""  #: set and direction, in a paper's table
    result: str = HELD_OUT  #: the last file that it writes

    @property
    def name(self) -> str:
        return ", ".join(filter(None, [self.of, self.arm.name, f"seed {self.seed}"]))


def plan_arms(
    objectives: Sequence[str], vary: Sequence[str], references: Sequence[tuple[str, str | None]]
) -> list[Arm]:
    """The arms: DPO on each reference first, then the objectives in their order.

    Args:
        objectives: ``mrpo``, ``kd``, ..., ``NAME:KEY=VALUE,...`` for an objective with settings of its own; ``dpo`` and
            ``dpo:each`` say what is done anyway.
        vary: ``KEY=VALUE,VALUE,...``; a value of several words is separated by blanks.
        references: (name, its ``anchor`` value) of each; None is the recipe's own reference 0.

    Raises:
        ConfigError: an unknown objective, or a key that is missing a value, given twice or cannot be varied.
    """
    values = dict(_read_vary(word) for word in vary)
    if len(values) < len(vary):
        raise ConfigError("`--vary`: a key is given twice; give all its values at once, as in epsilon_max=0.01,0.1.")
    arms = [
        make_arm(f"dpo on {name}", "dpo", {}, point, reference=name, anchor=anchor)
        for name, anchor in references
        for point in _points(values, "dpo", {})
    ]
    for word in objectives:
        objective, settings = _read_objective(word)
        if objective != "dpo":
            arms += [make_arm(objective, objective, settings, point) for point in _points(values, objective, settings)]
    return list({arm.name: arm for arm in arms}.values())


def plan_runs(arms: Sequence[Arm], shared: Shared, seeds: Sequence[int], root: Path, of: str = "") -> list[Run]:
    """All arms with the first seed, then all with the second: a comparison that is cut short compares something."""
    runs = []
    for seed in seeds:
        for arm in arms:
            own = [*shared.argv, *arm.argv, f"--data_seed={seed}"]
            folder = root / arm.folder / f"seed-{seed}"
            settings = {"recipe": shared.recipe, "launch": shared.launch, "words": own}
            runs.append(Run(arm, seed, folder, (*shared.paths, *own, f"--output_dir={folder}"), settings, of))
    return runs


def make_arm(
    name: str,
    objective: str,
    settings: dict[str, str],
    point: dict[str, str],
    reference: str | None = None,
    anchor: str | None = None,
) -> Arm:
    both = {**settings, **point}
    argv = [f"--objective={objective}"]
    if objective == "multi_dpo":
        argv.append("--aggregate=harmonic")  # the recipe's has no meaning there
    if anchor is not None:
        argv.append(f"--anchor={anchor}")
    for key, value in both.items():
        parts = value.split()
        argv += [f"--{key}={value}"] if len(parts) == 1 else [f"--{key}", *parts]
    label = " ".join([name, *(f"{key}={value}" for key, value in both.items())])
    return Arm(label, objective, tuple(argv), both, reference)


def _points(values: dict[str, list[str]], objective: str, settings: dict[str, str]) -> list[dict[str, str]]:
    unused = keys_unused_by(MRPOConfig, objective)  # to vary one would run the same thing twice, or be refused
    keys = [key for key in values if key not in unused and key not in settings]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(values[key] for key in keys))]


def _read_vary(word: str) -> tuple[str, list[str]]:
    key, _, listed = word.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if not values:
        raise ConfigError(f"`--vary {word}`: no values; write it as KEY=VALUE,VALUE.")
    _check_key(key, f"--vary {word}")
    return key, list(dict.fromkeys(values))


def _read_objective(word: str) -> tuple[str, dict[str, str]]:
    objective, _, listed = word.partition(":")
    if objective not in OBJECTIVES:
        others = ", ".join(name for name in OBJECTIVES if name != "dpo")
        raise ConfigError(f"`--objectives {word}` is not known; choose from dpo:each, {others}.")
    if objective == "dpo":
        if listed not in ("", "each"):
            raise ConfigError(
                f"`--objectives {word}`: DPO runs on each reference; write dpo:each, and vary keys with --vary."
            )
        return objective, {}
    settings = {}
    for setting in listed.split(",") if listed else []:
        key, found, value = setting.partition("=")
        if not found or not value:
            raise ConfigError(f"`--objectives {word}`: `{setting}` is no KEY=VALUE.")
        _check_key(key, f"--objectives {word}")
        settings[key] = value
    return objective, settings


def _check_key(key: str, where: str) -> None:
    if key in FIXED:
        remedy = "use --seeds" if key in ("seed", "data_seed") else "set it for all runs as --" + key
        raise ConfigError(
            f"`{where}`: runs that differ in `{key}` would not be measured on the same pairs and from the same scores; {remedy}."
        )
