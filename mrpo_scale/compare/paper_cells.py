"""A paper's table filled: every cell from the runs that have finished, and a line for every run that has not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mrpo_scale.base.untrusted import read_json
from mrpo_scale.compare.paper_plan import Slot, TablePlan, reward_folder
from mrpo_scale.compare.paper_results import Cell, Column, Measured, mark, untrained
from mrpo_scale.compare.paper_show import Filled
from mrpo_scale.compare.paper_tables import ACCURACY, Block, Method
from mrpo_scale.compare.plan import Run
from mrpo_scale.compare.processes import LOG, is_complete, tail
from mrpo_scale.compare.sides import Side
from mrpo_scale.compare.weight_choice import Choice


def fill(plan: TablePlan, choices: Sequence[Choice]) -> Filled:
    """All figures of the table."""
    columns: dict[Block, list[Column]] = {block: [] for block in plan.table.blocks}
    before: dict[Block, dict[str, list[float | None]]] = {block: {} for block in plan.table.blocks}
    pairs, holes, finished = [], [], []
    for side in plan.sides:
        slots = {method.name: plan.cell(method, side, choices) for method in plan.methods}
        done = {name: [slot for slot in cell if is_complete(slot.run)] for name, cell in slots.items()}
        found = {name: [plan.measure(slot, plan.reported(slot)) for slot in cell] for name, cell in done.items()}
        for block, into in columns.items():
            into.append(_column(plan, block, found))
            for what, value in _before(plan, block, done).items():
                before[block].setdefault(what, []).append(value)
        pairs.append(next((cell[0].pairs for cell in found.values() if cell), 0))
        for method in plan.methods:
            holes += _holes(plan, side, method, slots[method.name])
        finished += [slot for cell in done.values() for slot in cell]
    return Filled(
        title=f"In the layout of the paper's Table {plan.table.number}",
        table=plan.table,
        methods=[method.name for method in plan.methods],
        sides=[(side.set_name, side.direction) for side in plan.sides],
        columns=columns,
        before=before,
        pairs=pairs,
        set_aside=[len(plan.validation.get(side.folder, ())) for side in plan.sides],
        seeds=list(plan.seeds),
        choices=choices,
        holes=holes,
        facts=_facts(plan, finished),
    )


def _column(plan: TablePlan, block: Block, found: dict[str, list[Measured]]) -> Column:
    cells = {
        name: Cell([getattr(one, block.name) for one in measured], len(plan.seeds)) for name, measured in found.items()
    }
    return mark(cells) if plan.table.marked else Column(cells)


def _before(plan: TablePlan, block: Block, done: dict[str, list[Slot]]) -> dict[str, float | None]:
    """What is measured on the untrained policy: of rewards, of those methods whose rewards are not zero then."""
    if block == ACCURACY:
        cell = next((cell for cell in done.values() if cell), [])
        return {"the policy": _untrained(plan, cell, block)}
    return {method.name: _untrained(plan, done[method.name], block) for method in plan.methods if method.virtual}


def _untrained(plan: TablePlan, cell: Sequence[Slot], block: Block) -> float | None:
    return getattr(plan.measure(cell[0], untrained(plan.reported(cell[0]))), block.name) if cell else None


def _holes(plan: TablePlan, side: Side, method: Method, cell: Sequence[Slot]) -> list[str]:
    """A line for each run that is missing, and why."""
    missing = [slot.run.name for slot in cell if not is_complete(slot.run)]
    if not cell:
        missing = [f"{side.set_name}, {side.direction}, {method.name}"]
    reward = next((run for run in plan.reward_runs() if run.folder == reward_folder(side)), None)
    if method.needs_reward_model and reward is not None and not is_complete(reward):
        return [f"{name}: its reward model is missing: {_why(reward.folder)}" for name in missing]
    if not cell:
        return [f"{name}: no weight could be chosen, all its runs failed" for name in missing]
    return [f"{slot.run.name}: {_why(slot.run.folder)}" for slot in cell if slot.run.name in missing]


def _why(folder: Path) -> str:
    last = tail(folder / LOG).splitlines()
    return f"not finished; its log ends: {last[-1]}" if last else "not started"


def _reward_fact(run: Run) -> str:
    held_out = read_json(run.folder / run.result)["held_out"]
    shares = [f"{one['accuracy']:.1%} of {one['pairs']:.0f} held-out pairs" for one in held_out.values()]
    return f"Reward model, {run.of}: ranks {', '.join(shares)} right."


def _facts(plan: TablePlan, finished: Sequence[Slot]) -> list[str]:
    """How the runs were trained, of all that have finished."""
    if not finished:
        return []
    steps = sorted({int(read_json(slot.run.folder / "trainer_state.json")["max_steps"]) for slot in finished})
    config = plan.config
    lengths = " or ".join(map(str, steps))
    return [
        *(_reward_fact(run) for run in plan.reward_runs() if is_complete(run)),
        f"Every run: {lengths} optimizer steps of {config.window_size} pairs, learning rate {config.learning_rate:g}, beta "
        f"{config.beta:g}, epsilon_max {config.epsilon_max:g} unless the table says otherwise; order of the pairs by seed: "
        f"{', '.join(map(str, plan.seeds))}.",
    ]
