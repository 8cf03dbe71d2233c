"""`mrpo compare`: plan the runs of a comparison, score once, run what is missing, and say which run is best."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import refuse_links
from mrpo_scale.commands.score import Recipe
from mrpo_scale.compare.paper_command import paper_table
from mrpo_scale.compare.paper_tables import FIXED_WEIGHTS, TABLES
from mrpo_scale.compare.plan import Run, Shared, plan_arms, plan_runs, read_words
from mrpo_scale.compare.processes import LOG, command, is_complete, mark, run_all
from mrpo_scale.compare.results import compare_runs, read_run
from mrpo_scale.compare.scoring import fill_cache
from mrpo_scale.compare.show import as_json, plot, table, verdict
from mrpo_scale.config.recipe import parse
from mrpo_scale.training.preflight import preflight

logger = logging.getLogger(__name__)


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"mrpo compare: {message}.")


@dataclass(frozen=True)
class _Plan:
    """A comparison before anything ran."""

    folder: Path
    runs: list[Run]
    score_words: list[str]
    recipe: Recipe
    launch: str

    @property
    def commands(self) -> list[list[str]]:
        return [command("train", run.argv, self.launch) for run in self.runs]

    @property
    def score_command(self) -> list[str]:
        return command("score", self.score_words, self.launch)


def compare(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 where a run failed.

    Raises:
        ConfigError: before anything runs, if any of the runs could not be what it is called.
        TrainingError: the scoring failed.
    """
    flags, rest = _flags().parse_known_args(list(argv))
    _check(flags)
    if flags.table:
        return paper_table(flags, rest)
    plan = _plan(flags, rest)
    todo = [(run, argv) for run, argv in zip(plan.runs, plan.commands, strict=True) if not is_complete(run)]
    print(f"{len(plan.runs)} runs in {plan.folder}, {len(plan.runs) - len(todo)} of them complete", flush=True)
    if flags.dry_run:
        _print_plan(plan, {run.folder for run, _ in todo})
        return 0
    if flags.slurm:
        _write_array(plan, todo)
        return 0
    failed: list[Run] = []
    if todo and not flags.report:
        fill_cache(plan.recipe, plan.score_command, plan.folder / f"score_{LOG}")
        first = len(plan.runs) - len(todo) + 1
        pending, commands = zip(*todo, strict=True)
        failed = run_all(pending, commands, jobs=flags.jobs, first=first, total=len(plan.runs))
    _show(plan)
    return int(bool(failed))


def _flags() -> argparse.ArgumentParser:
    parser = _Flags(prog="mrpo compare", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--objectives", nargs="+", default=["dpo:each", "mrpo", "multi_dpo"])
    parser.add_argument("--vary", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--launch", default="")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--table", choices=tuple(TABLES))
    parser.add_argument("--sets", nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--fixed_weights", nargs="+", type=float, default=list(FIXED_WEIGHTS))
    parser.add_argument("--choose_on", type=float, default=0.5)
    return parser


def _check(flags: argparse.Namespace) -> None:
    for key in ("seeds", "jobs"):
        if getattr(flags, key) < 1:
            raise ConfigError(f"`--{key} {getattr(flags, key)}` must be at least 1.")
    ours, others = ("objectives", "vary", "slurm"), ("sets", "methods", "fixed_weights", "choose_on")
    plain = vars(_flags().parse_args([]))
    for key in ours if flags.table else others:
        if getattr(flags, key) != plain[key]:
            why = f"has no meaning with `--table {flags.table}`" if flags.table else "needs `--table`"
            raise ConfigError(f"`--{key}` {why}; leave it out.")


def _plan(flags: argparse.Namespace, argv: list[str]) -> _Plan:
    values, script, config = read_words(flags.config, argv)
    folder = flags.output or config.folder / "compare"
    refuse_links(folder, "--output")
    if config.weights_fraction is None and any("validation" in word for word in (*flags.objectives, *flags.vary)):
        argv = [*argv, "--weights_split=0.5"]  # for all runs alike, or their held-out pairs would differ

    folder.mkdir(parents=True, exist_ok=True)
    # A copy, so that a recipe that is edited meanwhile does not change the runs that are still to come.
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    paths = [f"--config={folder / 'recipe.yaml'}"]
    if not config.ref_cache_dir:
        paths.append(f"--ref_cache_dir={folder / 'ref_cache'}")
    score_words = [*paths, *argv, f"--output_dir={folder}"]
    recipe = Recipe.open(score_words)
    if "eval" not in recipe.pair_sets:
        raise ConfigError("a comparison needs held-out pairs; name a test split, or set `held_out`.")
    references = list(zip(recipe.plan.names, [None, *script.ref_models], strict=True))
    arms = plan_arms(flags.objectives, flags.vary, references)
    shared = Shared(values, tuple(argv), tuple(paths), flags.launch)
    runs = plan_runs(arms, shared, range(config.seed, config.seed + flags.seeds), folder)
    for run in runs[: len(arms)]:
        try:
            own_script, own_config = parse(run.argv)
            if not flags.report:
                preflight(own_config, own_script.ref_models)
        except ConfigError as error:
            raise ConfigError(f"{run.arm.name}: {error}") from None
    return _Plan(folder, runs, score_words, recipe, flags.launch)


def _print_plan(plan: _Plan, todo: set[Path]) -> None:
    print(f"once, where scores are missing:\n  {shlex.join(plan.score_command)}")
    for run, argv in zip(plan.runs, plan.commands, strict=True):
        print(f"{run.name}: {'to run' if run.folder in todo else 'complete'}\n  {shlex.join(argv)}")
    print("Each run keeps its trained model in its folder.")


def _write_array(plan: _Plan, todo: Sequence[tuple[Run, list[str]]]) -> None:
    """`runs.txt`, one run a line, and the two sbatch lines that work through it."""
    lines = []
    for run, argv in todo:
        mark(run, argv)
        lines.append(f"{shlex.join(argv)} > {shlex.quote(str(run.folder / LOG))} 2>&1")
    file = plan.folder / "runs.txt"
    file.write_text("".join(f"{line}\n" for line in lines))
    if not todo:
        print("nothing left to submit")
        return
    task = f'eval "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(file))})"'
    print(f"{file}: {len(todo)} runs. Add what your cluster wants (--gres, --partition, --time) to both lines:\n")
    print(f"JOB=$(sbatch --parsable --wrap {shlex.quote(shlex.join(plan.score_command))})")
    print(f"sbatch --dependency=afterok:$JOB --array=1-{len(todo)} --wrap {shlex.quote(task)}\n")
    print(
        "Afterwards the same command with --report instead of --slurm prints the table; with --slurm again, what is missing."
    )


def _show(plan: _Plan) -> None:
    results = [read_run(run) for run in plan.runs if is_complete(run)]
    if not results:
        print("no run has finished: there is nothing to compare")
        return
    comparison = compare_runs(results, plan.runs, policy_is_reference=not plan.recipe.config.anchor)
    text = f"{table(comparison)}\n\n{verdict(comparison)}"
    print(f"\n{text}\n")
    (plan.folder / "comparison.txt").write_text(f"{text}\n")
    summary: dict[str, Any] = as_json(comparison)
    (plan.folder / "comparison.json").write_text(json.dumps(summary, indent=2) + "\n")
    model = Path(str(plan.recipe.script.model_name_or_path)).name
    plot(comparison, plan.folder / "comparison.png", f"{model}: {len(results)} runs, {comparison.pairs} held-out pairs")
    print(f"{plan.folder}/comparison.txt, comparison.json, comparison.png")
