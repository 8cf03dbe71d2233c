"""`mrpo score`: fill the score cache of a recipe, say what is in it, check every part of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from mrpo_scale.base.ranks import barrier
from mrpo_scale.base.tables import aligned
from mrpo_scale.base.untrusted import printable
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.recipe import parse
from mrpo_scale.data.inputs import prepare_sets, read_rows
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.template_date import decide_date, record_date
from mrpo_scale.models.plan import RunPlan, plan_models
from mrpo_scale.references.precompute import Share, score_ahead
from mrpo_scale.references.served import compare_served
from mrpo_scale.references.store.cache import CacheEntry, ReferenceStore, list_cache
from mrpo_scale.references.store.part_files import PART_NAME
from mrpo_scale.references.stores import count_missing, distinct_rows, open_stores
from mrpo_scale.training.preflight import preflight


@dataclass(frozen=True)
class Recipe:
    """A recipe as far as scoring needs it: no policy, no optimizer."""

    script: ScriptArguments
    config: MRPOConfig
    plan: RunPlan
    pair_sets: dict[str, PairDataset]

    @classmethod
    def open(cls, argv: Sequence[str]) -> Recipe:
        """Read and check what the words of a command line name. Collective over the world.

        Raises:
            ConfigError: as training with them would, or no ``ref_cache_dir``.
        """
        return cls.read(*parse(argv))

    @classmethod
    def read(cls, script: ScriptArguments, config: MRPOConfig) -> Recipe:
        """As :meth:`open`, of words that are parsed."""
        if config.ref_cache_folder is None:
            raise ConfigError(
                "`ref_cache_dir` is missing; name the folder of the scores in the recipe or as --ref_cache_dir."
            )
        set_activity("reading the data")
        train, held_out = read_rows(script, config)
        config.anchor = resolve(config.anchor) if config.anchor else None
        references = [resolve(reference) for reference in script.ref_models]
        policy = resolve(str(script.model_name_or_path))
        check_output_folder(config, policy, references)
        decide_date(config)
        plan = plan_models(policy, references, config, None)
        record_date(config, plan.dated)
        return cls(script, config, plan, prepare_sets(plan, config, train, held_out))


def score(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 where ``--verify`` found a bad part.

    Raises:
        ConfigError, TrainingError: see errors.py.
    """
    flags, rest = _flags().parse_known_args(list(argv))
    script, config = parse(rest)
    if not (flags.list or flags.verify):
        preflight(config, script.ref_models, trains=False)
    with heartbeat(config.heartbeat_timeout):
        return _score(flags, Recipe.read(script, config))


def _score(flags: argparse.Namespace, recipe: Recipe) -> int:
    unknown = set(flags.reference) - set(recipe.plan.names)
    if unknown:
        raise ConfigError(f"`--reference {min(unknown)}`: the recipe's references are {', '.join(recipe.plan.names)}.")
    stores = open_stores(recipe.plan, recipe.config, recipe.pair_sets, read=not flags.verify)
    chosen = [k for k, name in enumerate(recipe.plan.names) if not flags.reference or name in flags.reference]
    share = _share(flags.job) if flags.job else None
    if flags.verify:
        return _verify([stores[k] for k in chosen], recipe.config)
    keys = distinct_rows(recipe.pair_sets)
    missing = count_missing(stores, keys)
    if not flags.list:
        compare_served(recipe.plan, stores, missing, is_main=recipe.config.process_index == 0)
        score_ahead(recipe.plan, stores, [k for k in chosen if missing[k]], recipe.pair_sets, recipe.config, share)
    if recipe.config.process_index == 0:
        print(f"\n{_overview(recipe, stores, len(keys))}\n", flush=True)
    return 0


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrpo score", add_help=False, allow_abbrev=False)
    parser.add_argument("--reference", nargs="+", default=[])
    parser.add_argument("--job")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--list", action="store_true")
    return parser


def _share(job: str) -> Share:
    """Of ``--job 3/100``. Raises ConfigError."""
    words = job.split("/")
    if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[0]) < int(words[1]):
        return Share(int(words[0]), int(words[1]))
    raise ConfigError(
        f"`--job {job}` is not a job's number, from 0, and how many there are; write 3/100 for the fourth of 100."
    )


def _verify(stores: Sequence[ReferenceStore], config: MRPOConfig) -> int:
    """Every part of the references, read in full by rank 0. Returns 1 if one of them is bad."""
    bad = 0
    if config.process_index == 0:
        print(f"\n{config.ref_cache_folder}")
        for store in stores:
            reports = store.verify()
            parts = [report for report in reports if PART_NAME.fullmatch(report.name)]
            wrong = [report for report in reports if report.problem]
            whole = [report for report in parts if not report.problem]
            rows = sum(report.rows for report in whole)
            print(
                f"{store.identity.name}: {len(whole)} of {len(parts)} parts are whole, every byte of {rows} rows"
                if parts
                else f"{store.identity.name}: no parts yet"
            )
            for report in wrong:
                print(f"  {store.folder / report.name} {report.problem}")
            bad += len(wrong)
        print(flush=True)
    barrier()
    return int(bad > 0)


def _overview(recipe: Recipe, stores: Sequence[ReferenceStore], total: int) -> str:
    """One line per reference of the recipe, then one per reference that only others use."""
    root = recipe.config.ref_cache_folder
    assert root is not None
    entries = {entry.key: entry for entry in list_cache(root)}
    rows: list[tuple[str, ...]] = [("reference", "key", "rows of this recipe", "rows stored", "parts", "MiB", "")]
    keys = distinct_rows(recipe.pair_sets)
    for store in stores:
        entry = entries.pop(store.identity.key, CacheEntry(store.identity.key, {}, 0, 0, 0))
        have = total - int(store.missing(keys).sum())
        state = "complete" if have == total else f"{total - have} to score"
        rows.append((store.identity.name, *_cells(entry, f"{have} of {total}", state)))
    for entry in entries.values():
        rows.append(
            (f"({printable(str(entry.description.get('name', '?')))})", *_cells(entry, "-", "not in this recipe"))
        )
    return f"{root}\n{aligned(rows)}"


def _cells(entry: CacheEntry, rows: str, state: str) -> tuple[str, ...]:
    size = f"{entry.bytes / 2**20:.2f}"
    return entry.key, rows, str(entry.rows), str(entry.parts), size, "; ".join([state, *entry.problems])
