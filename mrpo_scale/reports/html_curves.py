"""Which metric of a run stands in which plot of report.html: every one that was logged, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mrpo_scale.reports.pictures import History, points, reference_names

#: Logged once at the end, or no metric.
_NO_CURVES = ("step", "epoch", "total_flos")
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True)
class Run:
    """What a run has written: the facts of its model card (:meth:`ModelCard.facts`, ``name``, ``status``) and its log."""

    folder: str
    facts: Mapping[str, Any]
    history: History

    @cached_property
    def series(self) -> dict[str, dict[str, str]]:
        """{metric: {"training" | "held-out" | "held-out NAME": its key in the log}}."""
        keys = {k for entry in self.history for k, v in entry.items() if isinstance(v, (int, float))}
        keys = {k for k in keys if k not in _NO_CURVES and not k.startswith("train_")}
        trained = {k for k in keys if not k.startswith("eval_")}
        found: dict[str, dict[str, str]] = {key: {"training": key} for key in sorted(trained)}
        metrics = sorted({*trained, *_TIMINGS, "loss"}, key=len, reverse=True)
        for key in sorted(keys - trained):
            rest = key.removeprefix("eval_")
            # Several held-out sets: eval_<set>_<metric>.
            metric = next((m for m in metrics if rest == m or rest.endswith(f"_{m}")), rest)
            of_set = rest.removesuffix(metric).rstrip("_")
            found.setdefault(metric, {})[f"held-out {of_set}".strip()] = key
        return found

    @property
    def references(self) -> list[str]:
        """Names, the anchor first; of a log alone in the order that its file has them in."""
        logged = reference_names(self.history)
        listed = [reference["name"] for reference in self.facts.get("references", [])]
        return [*listed, *(name for name in logged if name not in listed)]

    @property
    def evals(self) -> History:
        return [entry for entry in self.history if "eval_loss" in entry]


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart: their names, else their folders."""
    names = [run.facts["name"] or run.folder for run in runs]
    if len(set(names)) < len(names):
        names = [run.folder for run in runs]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, start=1)]


@dataclass(frozen=True)
class _Plot:
    title: str
    metrics: Mapping[str, str]  #: metric -> its name in the legend
    share: bool = False  #: values lie in [0, 1]


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    plots: list[dict[str, Any]] = field(default_factory=list)


_LEARNING = [
    _Plot("Loss", {"loss": "loss"}),
    _Plot("Reward accuracy", {"rewards/accuracies": "accuracy"}, share=True),
    _Plot("Reward margin", {"rewards/margins": "margin"}),
    _Plot("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    _Plot("Accuracy: chosen more likely than rejected", {"logps/accuracies": "accuracy"}, share=True),
    _Plot("Log-probability of a response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
]
_OPTIMIZER = [_Plot("Gradient norm", {"grad_norm": "norm"}), _Plot("Learning rate", {"learning_rate": "rate"})]
_SPEED = [
    _Plot("Seconds per step", {"time/step": "whole step", "time/references": "of which references"}),
    _Plot("Tokens per second", {"tokens_per_second": "tokens"}),
    _Plot("Share of the device's peak FLOPs (MFU)", {"mfu": "mfu"}),
    _Plot("Evaluation: seconds", {"runtime": "seconds"}),
    _Plot("Evaluation: pairs and batches per second", {"samples_per_second": "pairs", "steps_per_second": "batches"}),
]


def _of_reference(name: str, prefix: str) -> list[_Plot]:
    own = f"references/{name}"
    return [
        _Plot(
            "What it does",
            {f"{own}/weight": "weight", f"{own}/decides": "decides", f"{own}/clipped": "clipped"},
            share=True,
        ),
        _Plot("Reward accuracy against it alone", {f"{prefix}/accuracies": "accuracy"}, share=True),
        _Plot("Reward margin against it alone", {f"{prefix}/margins": "margin"}),
        _Plot("Rewards against it alone", {f"{prefix}/chosen": "chosen", f"{prefix}/rejected": "rejected"}),
    ]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every metric of every run in one plot; what no section knows has one of its own at the end."""
    names = list(dict.fromkeys(name for run in runs for name in run.references))
    specs = [("Learning", "Against the run's own reference, the aggregate of all its reference models.", _LEARNING)]
    for k, name in enumerate(names):
        note = (
            "The anchor: the policy is held near it." if k == 0 else "What DPO against this model alone would report."
        )
        prefix = "anchor/rewards" if k == 0 else f"references/{name}/rewards"
        specs.append((f"Reference: {name}", note, _of_reference(name, prefix)))
    specs += [("Optimizer", "", _OPTIMIZER), ("Speed", "", _SPEED)]
    known = {metric for _, _, plots in specs for plot in plots for metric in plot.metrics}
    others = sorted({metric for run in runs for metric in run.series} - known)
    specs.append(("Other metrics", "", [_Plot(metric, {metric: metric}) for metric in others]))
    found = [Section(title, note, [d for plot in plots for d in _draw(runs, plot)]) for title, note, plots in specs]
    return [section for section in found if section.plots]


def _draw(runs: Sequence[Run], plot: _Plot) -> list[dict[str, Any]]:
    """A plot as the script takes it: of several runs, one for each metric; none where nothing was logged."""
    alone = len(runs) == 1
    names = labels(runs)
    drawn: list[dict[str, Any]] = []
    for group in [list(plot.metrics)] if alone else [[metric] for metric in plot.metrics]:
        lines = []
        for i, run in enumerate(runs):
            for j, metric in enumerate(group):
                for n, (split, key) in enumerate(run.series.get(metric, {}).items()):
                    steps, values = points(run.history, key)
                    if not alone:
                        label, colour = f"{names[i]}, {split}", i
                    elif len(group) > 1:
                        label, colour = f"{plot.metrics[metric]}, {split}", j
                    else:
                        label, colour = split, n
                    line = {"key": key, "label": label, "colour": colour, "held_out": split != "training"}
                    lines.append({**line, "steps": steps, "values": [float(f"{v:.6g}") for v in values]})
        title = plot.title if len(group) == len(plot.metrics) else f"{plot.title}: {plot.metrics[group[0]]}"
        if lines := [line for line in lines if line["steps"]]:
            drawn.append({"title": title, "share": plot.share, "lines": lines})
    return drawn
