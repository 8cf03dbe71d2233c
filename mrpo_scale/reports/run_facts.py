"""What the reports know of a run: plain values, whoever has trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mrpo_scale.reports.pictures import RunSummary


@dataclass(frozen=True)
class RunFacts:
    """A run at one moment. What :class:`~mrpo_scale.reports.model_card.ModelCard` has too is explained there."""

    folder: Path  #: the run's ``output_dir``
    name: str  #: as tables and legends call it, see :func:`run_name`
    objective: str
    step: int  #: optimizer steps taken
    base_model: str
    dataset: str | Sequence[str]
    settings: Mapping[str, Any]
    references: Sequence[tuple[str, str, str | None]]
    reference_keys: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    remarks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""  #: digest of the recipe, local paths included, which the report does not show
    baselines: Sequence[str] = ()  #: folders of other runs within ``folder``
    rows: Sequence[RunSummary] = ()  #: the comparison, this run's row last
    log: Sequence[dict[str, Any]] = ()  #: entries as the Trainer logs them


def run_name(objective: str, references: int) -> str:
    """As tables and legends call a run: ``DPO``, ``MRPO (K=3)``."""
    return "DPO" if objective == "dpo" else f"{objective.upper().replace('_', '-')} (K={references})"
