"""report.html while a run trains, and whatever ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from mrpo_scale.base.errors import one_line
from mrpo_scale.reports.artifacts import write_run_report
from mrpo_scale.reports.run_facts import RunFacts


class LiveReport(TrainerCallback):
    """report.html anew after every evaluation, which takes longer than writing it."""

    def __init__(self, facts: Callable[[], RunFacts]) -> None:
        self.facts = facts

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_run_report(self.facts(), f"running, step {state.global_step} of {state.max_steps}")


@contextmanager
def report_if_stopped(facts: Callable[[], RunFacts], *, write: bool) -> Iterator[None]:
    """report.html with what there is, whatever ends the run. ``write``: on one rank."""
    try:
        yield
    except BaseException as error:
        if write:
            found = facts()
            write_run_report(found, f"stopped after step {found.step}: {one_line(error) or type(error).__name__}")
        raise
