"""Run artifacts other than weights and log: curves, model card, HTML report and what they are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrpo_scale.reports.html_curves import Run
from mrpo_scale.reports.html_report import RUN_FACTS, write_report
from mrpo_scale.reports.model_card import ModelCard
from mrpo_scale.reports.pictures import RunSummary, plot_curves
from mrpo_scale.reports.run_facts import RunFacts

#: Never uploaded: people's texts, scores and other models that lie in the same folder. `.gitignore` is what the hub's client obeys.
_PRIVATE = ("bad_rows_*.jsonl", "ref_cache/", "anchor/", "file_hashes/", "training_args.bin")
_CURVES = "curves.png"


def write_artifacts(facts: RunFacts, metadata: Mapping[str, Any] | None = None) -> None:
    """curves.png, README.md, .gitignore, run.json and report.html of a finished run, in its folder; call on one rank.

    Args:
        metadata: see :func:`card_of`.
    """
    folder, card = facts.folder, card_of(facts, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    plot_curves(list(facts.log), folder / _CURVES, title=f"{facts.objective}: {card.base_model}")
    (folder / "README.md").write_text(card.render(), encoding="utf-8")
    baselines = [f"{name}/" for name in facts.baselines]
    (folder / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in (*_PRIVATE, *baselines)))
    _write_report(facts, card, "finished")


def write_run_report(facts: RunFacts, status: str) -> None:
    """run.json and report.html of a run that is under way or has ended before its end; call on one rank."""
    _write_report(facts, card_of(facts), status)


def _write_report(facts: RunFacts, card: ModelCard, status: str) -> None:
    values = {"name": facts.name, "status": status, "command": facts.command, **card.facts()}
    facts.folder.mkdir(parents=True, exist_ok=True)
    (facts.folder / RUN_FACTS).write_text(json.dumps(values, indent=2) + "\n")
    write_report([Run(facts.folder.name, values, list(facts.log))], facts.folder / "report.html")


def card_of(facts: RunFacts, metadata: Mapping[str, Any] | None = None) -> ModelCard:
    """The model card of a run.

    Args:
        metadata: of the front matter: license, language, tags; and ``dataset``, a name for rows that came from Python.
    """
    metadata = dict(metadata or {})
    return ModelCard(
        base_model=facts.base_model,
        dataset=metadata.pop("dataset", None) or facts.dataset,
        settings=facts.settings,
        references=facts.references,
        reference_keys=facts.reference_keys,
        data=facts.data,
        remarks=facts.remarks,
        results=facts.results,
        versions=facts.versions,
        curves=_CURVES,
        recipe=facts.recipe,
        rows=facts.rows,
        metadata=metadata,
    )


def finished_run(folder: Path, command: str) -> tuple[list[RunSummary], list[dict[str, Any]]] | None:
    """The comparison's rows and the log of the run that a recipe of digest ``command`` has already made in ``folder``; None if it
    is not through, or is of another recipe."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        facts = json.loads((folder / RUN_FACTS).read_text())
    except (OSError, ValueError):
        return None
    through = state["global_step"] >= state["max_steps"] and facts.get("command") == command
    return ([RunSummary(**row) for row in facts["rows"]], state["log_history"]) if through else None
