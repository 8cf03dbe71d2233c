"""Which runs a paper's table is made of: those that are known beforehand, and those that wait for the choice of weights."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import refuse_links
from mrpo_scale.commands.reward import RESULTS
from mrpo_scale.commands.score import Recipe
from mrpo_scale.compare.paper_results import Measured, measure, select
from mrpo_scale.compare.paper_tables import TABLES, Method, PaperTable, methods_of
from mrpo_scale.compare.plan import HELD_OUT, Arm, Run, Shared, plan_runs, read_words
from mrpo_scale.compare.processes import is_complete
from mrpo_scale.compare.sides import Side, left_out, plan_sides
from mrpo_scale.compare.weight_choice import Choice, validation_keys
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.config.recipe import parse
from mrpo_scale.config.reward_keys import RewardConfig
from mrpo_scale.data.inputs import EVAL_SET
from mrpo_scale.objective import Objective
from mrpo_scale.training.held_out import HeldOutScores
from mrpo_scale.training.preflight import preflight

REWARD = Arm("reward model", "reward", ())


def reward_folder(side: Side) -> Path:
    return side.folder / "reward_model"


@dataclass(frozen=True)
class Slot:
    """One run of a table. ``weight``: of the first reference, where it is fixed."""

    method: Method
    side: Side
    weight: float | None
    run: Run

    @property
    def scores(self) -> HeldOutScores:
        return HeldOutScores.load(self.run.folder / HELD_OUT)


@dataclass
class TablePlan:
    """A table before anything ran.

    Args:
        config: of the recipe, before any method.
        weights: of the first reference, that are tried for the methods with fixed ones; a single one is taken unseen.
        cache: words that name the score cache.
        recipes, validation: by a side's folder; the latter are keys of pairs that weights are chosen on and no table reports.
        left_out: further references of the recipe that the table has no column for.
    """

    name: str
    table: PaperTable
    methods: list[Method]
    sides: list[Side]
    config: MRPOConfig
    seeds: range
    weights: list[float]
    folder: Path
    cache: tuple[str, ...]
    launch: str
    left_out: list[str]
    recipes: dict[Path, Recipe] = field(default_factory=dict)
    validation: dict[Path, np.ndarray] = field(default_factory=dict)
    _objectives: dict[Path, Objective] = field(default_factory=dict)  #: by an arm's folder

    @property
    def chooses(self) -> bool:
        return len(self.weights) > 1 and any(method.weighed for method in self.methods)

    def score_words(self, side: Side) -> list[str]:
        return [*self._paths(side), *side.argv, f"--output_dir={side.folder}"]

    def slots(self, method: Method, side: Side, weight: float | None, seeds: Iterable[int]) -> list[Slot]:
        paths = [*self._paths(side), *([f"--reward_model={reward_folder(side)}"] if method.needs_reward_model else [])]
        shared = Shared(dict(side.values), side.argv, tuple(paths), self.launch)
        runs = plan_runs(
            [method.arm(weight)], shared, list(seeds), side.folder, of=f"{side.set_name}, {side.direction}"
        )
        return [Slot(method, side, weight, run) for run in runs]

    def reward_runs(self) -> list[Run]:
        """The reward models that methods need, one for each column: of its policy, on its training pairs."""
        if not any(method.needs_reward_model for method in self.methods):
            return []
        runs = []
        for side in self.sides:
            folder = reward_folder(side)
            words = (f"--config={side.recipe_file}", *side.argv, f"--output_dir={folder}")
            settings = {"recipe": dict(side.values), "launch": self.launch, "words": list(side.argv)}
            of = f"{side.set_name}, {side.direction}"
            runs.append(Run(REWARD, self.config.seed, folder, words, settings, of, RESULTS))
        return runs

    def ready(self, slots: Iterable[Slot]) -> list[Slot]:
        """Those whose reward model is there, where they need one."""
        there = {run.folder for run in self.reward_runs() if is_complete(run)}
        return [slot for slot in slots if not slot.method.needs_reward_model or reward_folder(slot.side) in there]

    def first(self) -> list[Slot]:
        """Seed by seed: what no choice decides; and of the first set with the first seed, every weight that is tried."""
        slots = []
        for i, seed in enumerate(self.seeds):
            for side in self.sides:
                for method in self.methods:
                    if not method.weighed:
                        slots += self.slots(method, side, None, [seed])
                    elif len(self.weights) == 1:
                        slots += self.slots(method, side, self.weights[0], [seed])
                    elif i == 0 and side.folder in self.validation:
                        slots += self.candidates(method, side)
        return slots

    def candidates(self, method: Method, side: Side) -> list[Slot]:
        return [slot for weight in self.weights for slot in self.slots(method, side, weight, self.seeds[:1])]

    def cell(self, method: Method, side: Side, choices: Sequence[Choice]) -> list[Slot]:
        """The runs of a cell, none where no weight could be chosen. A set takes what the first one chose in its direction."""
        if not method.weighed:
            return self.slots(method, side, None, self.seeds)
        chosen = {(choice.method, choice.direction): choice.weight for choice in choices}
        weight = chosen.get((method.name, side.direction)) if self.chooses else self.weights[0]
        return [] if weight is None else self.slots(method, side, weight, self.seeds)

    def cells(self, choices: Sequence[Choice]) -> Iterator[list[Slot]]:
        """Those of the first seed before those of the second."""
        for i in range(len(self.seeds)):
            for side in self.sides:
                for method in self.methods:
                    yield self.cell(method, side, choices)[i : i + 1]

    @property
    def after_choice(self) -> int:
        """How many runs :meth:`first` does not have."""
        weighed = sum(method.weighed for method in self.methods) if self.chooses else 0
        return weighed * (len(self.sides) * len(self.seeds) - len(self.validation))

    def measure(self, slot: Slot, scores: HeldOutScores) -> Measured:
        arm = slot.run.folder.parent
        if arm not in self._objectives:
            self._objectives[arm] = parse(slot.run.argv)[1].build_objective()
        return measure(scores, self._objectives[arm], virtual=slot.method.virtual)

    def reported(self, slot: Slot) -> HeldOutScores:
        """The pairs that the table speaks of: all that no weight was chosen on, in this set or another."""
        return select(slot.scores, self.seen, without=True)

    @property
    def seen(self) -> np.ndarray:
        """Keys of all pairs that weights are chosen on."""
        return np.concatenate([np.array([], dtype="S16"), *self.validation.values()])

    def choose(self) -> list[Choice]:
        """For every direction of the first set and every method with fixed weights, from the first seed's runs and from the pairs
        that no table reports."""
        return [
            self._choice(method, side)
            for side in self.sides
            if side.folder in self.validation
            for method in self.methods
            if method.weighed
        ]

    def _choice(self, method: Method, side: Side) -> Choice:
        slots = self.candidates(method, side)
        tried = {
            slot.weight: self.measure(slot, select(slot.scores, self.validation[side.folder]))
            for slot in slots
            if slot.weight is not None and is_complete(slot.run)
        }
        failed = [weight for weight in self.weights if weight not in tried]
        return Choice(method.name, side.set_name, side.direction, tried, failed)

    def _paths(self, side: Side) -> tuple[str, ...]:
        return (f"--config={side.recipe_file}", *self.cache)


def plan_table(flags: argparse.Namespace, argv: Sequence[str]) -> TablePlan:
    """Plan and check every run that is known beforehand; writes the recipes of the columns.

    Args:
        flags: of `mrpo compare`.
        argv: further words, keys of the recipe.

    Raises:
        ConfigError: any of the runs could not be what it is called.
    """
    table = TABLES[flags.table]
    for weight in flags.fixed_weights:
        if not 0 <= weight <= 1:
            raise ConfigError(
                f"`--fixed_weights {weight:g}` must lie between 0 and 1; it is the first reference's share."
            )
    if not 0 < flags.choose_on < 1:
        raise ConfigError(f"`--choose_on {flags.choose_on:g}` must be a fraction between 0 and 1.")
    values, script, config = read_words(flags.config, argv)
    if config.weights_fraction is not None:
        raise ConfigError(
            f"`ref_weights: {' '.join(config.ref_weights)}`, `weights_split: {config.weights_fraction:g}`: the paper's MRPO weighs "
            "by `confidence`, and pairs set aside would be missing; leave both out."
        )
    folder = flags.output or config.folder / "paper"
    refuse_links(folder, "--output")
    plan = TablePlan(
        name=flags.table,
        table=table,
        methods=methods_of(table, flags.methods),
        sides=plan_sides(values, argv, script, config, sets=flags.sets, both_ways=table.both_ways, root=folder),
        config=config,
        seeds=range(config.seed, config.seed + flags.seeds),
        weights=list(dict.fromkeys(flags.fixed_weights)),
        folder=folder,
        cache=() if config.ref_cache_dir else (f"--ref_cache_dir={folder / 'ref_cache'}",),
        launch=flags.launch,
        left_out=left_out(script, both_ways=table.both_ways),
    )
    for side in plan.sides:
        _open(plan, side, flags.choose_on)
    if not flags.report:
        _check_reward(plan)
        check_arms(plan.ready(plan.first()))
    return plan


def _open(plan: TablePlan, side: Side, choose_on: float) -> None:
    """Read the pairs of a column."""
    side.write_recipe()
    recipe = plan.recipes[side.folder] = Recipe.open(plan.score_words(side))
    pairs = recipe.pair_sets.get(EVAL_SET)
    if pairs is None or len(np.unique(pairs.prompt_keys)) < 2:
        raise ConfigError(
            f"{side.set_name}: a table needs held-out pairs of two prompts or more; name a test split, or set `held_out`."
        )
    if plan.chooses and side.set_name == plan.sides[0].set_name:
        plan.validation[side.folder] = validation_keys(pairs.row_keys, pairs.prompt_keys, choose_on)


def check_arms(slots: Iterable[Slot]) -> None:
    """Refuse what any of the runs could not do; of runs that differ in their seed, the first is looked at."""
    for slot in {slot.run.folder.parent: slot for slot in slots}.values():
        try:
            script, config = parse(slot.run.argv)
            preflight(config, script.ref_models)
        except ConfigError as error:
            raise ConfigError(f"{slot.method.name}, {slot.side.set_name}, {slot.side.direction}: {error}") from None


def _check_reward(plan: TablePlan) -> None:
    missing = [run for run in plan.reward_runs() if not is_complete(run)]
    if missing and importlib.util.find_spec("trl") is None:
        others = " ".join(shlex.quote(method.name) for method in plan.table.methods if not method.needs_reward_model)
        raise ConfigError(
            f"RLHF needs a reward model, which is trained with TRL: `pip install 'mrpo-scale[rlhf]'`, or `--methods {others}`."
        )
    for run in missing:
        try:
            parse(run.argv, RewardConfig, prog="mrpo reward")
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from None
