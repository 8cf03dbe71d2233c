"""`mrpo compare --table paper1`: run what one of the paper's tables lacks, choose the fixed weights on the way, print the table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence

from mrpo_scale.compare.paper_cells import fill
from mrpo_scale.compare.paper_plan import Slot, TablePlan, check_arms, plan_table
from mrpo_scale.compare.paper_show import Filled, as_html, as_json, as_markdown, as_text, plot
from mrpo_scale.compare.plan import Run
from mrpo_scale.compare.processes import LOG, command, is_complete, minutes, run_all
from mrpo_scale.compare.scoring import fill_cache


def paper_table(flags: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run the command; returns the exit status: 1 where a run failed.

    Raises:
        ConfigError: before anything runs, if any of the runs could not be what it is called.
        TrainingError: the scoring failed.
    """
    started = time.monotonic()
    plan = plan_table(flags, argv)
    first = plan.first()
    total = len(first) + plan.after_choice
    print(f"Table {plan.table.number}: {total} runs in {plan.folder}", flush=True)
    for name in plan.left_out:
        print(f"left out: {name}; a column has two references, the policy's own start and the first of `ref_models`")
    if flags.dry_run:
        _print_plan(plan, first)
        return 0
    failed = [] if flags.report else _rewards(plan, flags.jobs)
    if not flags.report:
        check_arms(slot for slot in plan.ready(first) if slot.method.needs_reward_model)
        failed += _work(plan, first, flags.jobs, 0, total)
    choices = plan.choose() if plan.chooses else []
    for choice in choices:
        print(f"weight of the first reference, chosen on {choice.set_name}: {choice.sentence()}", flush=True)
    ran = {slot.run.folder for slot in first}
    later = [slot for cell in plan.cells(choices) for slot in cell if slot.run.folder not in ran]
    if not flags.report:
        failed += _work(plan, later, flags.jobs, len(first), total)
    if not any(is_complete(slot.run) for slot in (*first, *later)):
        print("no run has finished: there is no table")
        return int(bool(failed))
    _write(plan, fill(plan, choices))
    print(f"this call took {minutes(time.monotonic() - started)}")
    return int(bool(failed))


def _rewards(plan: TablePlan, jobs: int) -> list[Run]:
    """Train the reward models that are not there; returns what failed."""
    runs = plan.reward_runs()
    todo = [run for run in runs if not is_complete(run)]
    commands = [command("reward", run.argv, plan.launch) for run in todo]
    return run_all(todo, commands, jobs=jobs, first=len(runs) - len(todo) + 1, total=len(runs))


def _work(plan: TablePlan, slots: Sequence[Slot], jobs: int, before: int, total: int) -> list[Run]:
    """Run what has not finished, after one scoring; returns what failed.

    Args:
        before: runs that are numbered before these, of ``total``.
    """
    todo = [slot for slot in plan.ready(slots) if not is_complete(slot.run)]
    for side in plan.sides:
        if any(slot.side is side for slot in todo):
            words = command("score", plan.score_words(side), plan.launch)
            fill_cache(plan.recipes[side.folder], words, side.folder / f"score_{LOG}")
    commands = [command("train", slot.run.argv, plan.launch) for slot in todo]
    first = before + len(slots) - len(todo) + 1
    return run_all([slot.run for slot in todo], commands, jobs=jobs, first=first, total=total)


def _print_plan(plan: TablePlan, first: Sequence[Slot]) -> None:
    for side in plan.sides:
        print(f"once, where scores are missing:\n  {shlex.join(command('score', plan.score_words(side), plan.launch))}")
    for run in plan.reward_runs():
        state = "complete" if is_complete(run) else "to run"
        print(f"{run.name}: {state}\n  {shlex.join(command('reward', run.argv, plan.launch))}")
    for slot in first:
        state = "complete" if is_complete(slot.run) else "to run"
        print(f"{slot.run.name}: {state}\n  {shlex.join(command('train', slot.run.argv, plan.launch))}")
    if plan.after_choice:
        print(f"and {plan.after_choice} runs with the weights that the first ones choose")
    print("Each run keeps its trained model in its folder.")


def _write(plan: TablePlan, filled: Filled) -> None:
    print(f"\n{as_text(filled, styled=sys.stdout.isatty())}\n")
    file = plan.folder / plan.name
    texts = {
        "txt": as_text(filled, styled=False) + "\n",
        "md": as_markdown(filled),
        "html": as_html(filled),
        "json": json.dumps(as_json(filled), indent=2) + "\n",
    }
    for ending, text in texts.items():
        file.with_suffix(f".{ending}").write_text(text)
    plot(filled, file.with_suffix(".png"))
    print(f"{file}.txt, {', '.join(f'.{ending}' for ending in (*list(texts)[1:], 'png'))}")
