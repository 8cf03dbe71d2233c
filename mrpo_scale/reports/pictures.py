"""What a run shows people: a table for the terminal and curves as PNG. Pure presentation of what it is given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrpo_scale.base.tables import aligned_table, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = list[dict[str, Any]]  # transformers' state.log_history

# Okabe and Ito's palette, told apart by colour-blind readers; yellow left out, it is too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: Below this share of decided texts a reference cannot move the virtual reference.
DECIDES_NOTHING = 0.01


@dataclass(frozen=True)
class RunSummary:
    """One row of the comparison. ``None`` is what was not measured.

    Args:
        name: such as ``base``, ``DPO``, ``MRPO (K=3)``.
        ranking_accuracy: share of held-out pairs with log p(chosen) > log p(rejected).
        reward_accuracy: share of held-out pairs whose chosen reward is higher, against this run's own (virtual) reference.
        reward_margin: mean reward of chosen minus rejected, held-out.
        seconds_per_step: wall time of one optimizer step.
        peak_memory_gib_per_rank: one peak per rank, GiB; the table shows the highest.
    """

    name: str
    ranking_accuracy: float | None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    seconds_per_step: float | None = None
    peak_memory_gib_per_rank: list[float] | None = None


TABLE_HEADER = ("run", "held-out accuracy", "reward accuracy", "reward margin", "s/step", "peak memory per rank")
TABLE_LEGEND = (
    "held-out accuracy: share of held-out pairs to whose chosen response the model gives a higher log-probability than to\n"
    "the rejected one. Reward accuracy and margin are measured on the same pairs against each run's own reference, so they\n"
    "do not compare between objectives. Peak memory: of the rank that needed most."
)


def comparison_table(rows: Sequence[RunSummary]) -> str:
    """An aligned plain-text table with a legend below, no trailing newline."""
    return f"{aligned_table(TABLE_HEADER, table_cells(rows))}\n\n{TABLE_LEGEND}"


def table_cells(rows: Sequence[RunSummary]) -> list[tuple[str, ...]]:
    """The comparison's cells as text, in the order of TABLE_HEADER."""
    return [
        (
            row.name,
            percent(row.ranking_accuracy),
            percent(row.reward_accuracy),
            number(row.reward_margin, "+.3f"),
            number(row.seconds_per_step, ".2f"),
            number(
                max(row.peak_memory_gib_per_rank, default=None) if row.peak_memory_gib_per_rank else None, ".2f", " GiB"
            ),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class _Line:
    label: str
    steps: list[float]
    values: list[float]
    held_out: bool = False  #: few points: drawn with markers
    colour: str = PALETTE[0]


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: list[_Line]
    share: bool = False  #: values lie in [0, 1]


def plot_curves(log_history: History, path: Path, title: str) -> None:
    """One run's curves as PNG: loss, reward margins, reward accuracies, and per reference weight, decides and clipped.

    Panels without data are left out. A history with none of them gives a page that says so.
    """
    panels = [
        _Panel("Loss", _train_and_held_out(log_history, "loss")),
        _Panel("Reward margin (chosen - rejected)", _train_and_held_out(log_history, "rewards/margins")),
        _Panel("Reward accuracy", _train_and_held_out(log_history, "rewards/accuracies"), share=True),
    ]
    names = reference_names(log_history)
    for metric, text in (
        ("weight", "Weight of each reference"),
        ("decides", "Where each reference decides (lowest log-prob)"),
        ("clipped", "Moved by the trust region (clipped)"),
    ):
        lines = [
            _line(log_history, f"references/{name}/{metric}", label=name, colour=PALETTE[i % len(PALETTE)])
            for i, name in enumerate(names)
        ]
        panels.append(_Panel(text, [line for line in lines if line.steps], share=True))
    _draw(panels, path, title)


def plot_comparison(histories: Mapping[str, History], path: Path) -> None:
    """Several runs (name -> history) on shared axes as PNG: training loss, held-out accuracy, reward accuracy and margin."""
    panels = []
    for key, text, share in (
        ("loss", "Training loss", False),
        ("eval_logps/accuracies", "Held-out accuracy: log p(chosen) > log p(rejected)", True),
        ("eval_rewards/accuracies", "Held-out reward accuracy", True),
        ("eval_rewards/margins", "Held-out reward margin", False),
    ):
        lines = [
            _line(history, key, label=name, held_out=key.startswith("eval_"), colour=PALETTE[i % len(PALETTE)])
            for i, (name, history) in enumerate(histories.items())
        ]
        panels.append(_Panel(text, [line for line in lines if line.steps], share))
    _draw(panels, path, "Comparison of runs")


def reference_names(log_history: History) -> list[str]:
    """Names in ``references/<name>/...`` in the order they were first logged, the anchor's first."""
    names: dict[str, None] = {}
    for entry in log_history:
        for key in entry:
            # A name may hold slashes, so it is what lies between the first part and the metric.
            parts = key.split("/")
            if parts[0] == "references" and parts[-1] in ("weight", "decides", "clipped"):
                names["/".join(parts[1:-1])] = None
    return list(names)


def _train_and_held_out(log_history: History, key: str) -> list[_Line]:
    lines = [
        _line(log_history, key, label="train", colour=PALETTE[0]),
        _line(log_history, f"eval_{key}", label="held-out", held_out=True, colour=PALETTE[1]),
    ]
    return [line for line in lines if line.steps]


def _line(log_history: History, key: str, *, label: str, held_out: bool = False, colour: str) -> _Line:
    return _Line(label, *points(log_history, key), held_out, colour)


def points(log_history: History, key: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric. A resumed run logs a step again: the later entry counts."""
    values = {
        float(entry["step"]): float(entry[key])
        for entry in log_history
        if key in entry and "step" in entry and math.isfinite(float(entry[key]))
    }
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw(panels: Sequence[_Panel], path: Path, title: str) -> None:
    """Panels with lines on a grid of two or three columns, each with its legend below the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if panel.lines]
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3) or 1
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.8 * columns, 3.7 * rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # Agg whatever the user's display or MPLBACKEND says
    figure.suptitle(title, fontsize=14, fontweight="bold")
    if not panels:
        figure.text(0.5, 0.5, "No metrics were logged.", ha="center", va="center")
    for i, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, columns, i + 1), panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for line in panel.lines:
        # One logged point is invisible as a line.
        marker = "o" if line.held_out or len(line.steps) == 1 else None
        axes.plot(
            line.steps, line.values, label=line.label, color=line.colour, marker=marker, markersize=4, linewidth=1.6
        )
    axes.set_title(panel.title, fontsize=10.5)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if panel.share:
        # Accuracies live above chance; weights and shares use the whole range.
        axes.set_ylim(0.37 if min(min(line.values) for line in panel.lines) >= 0.4 else -0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=min(3, len(panel.lines)), fontsize=8.5, frameon=False
    )
