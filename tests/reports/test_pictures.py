"""The table and the pictures: what is in them and what is left out."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from mrpo_scale.reports import pictures as report
from mrpo_scale.reports.pictures import RunSummary, comparison_table, plot_comparison, plot_curves, reference_names

HISTORY: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 0.7 - step / 50,
        "rewards/margins": step / 10,
        "rewards/accuracies": 0.5 + step / 20,
        "references/anchor/weight": 0.4,
        "references/org/model-7B/weight": 0.6,
        "references/anchor/clipped": 0.0,
        "references/org/model-7B/clipped": 0.5,
        "references/org/model-7B/rewards/margins": 1.0,
    }
    for step in range(1, 6)
] + [
    {
        "step": 5,
        "eval_loss": 0.5,
        "eval_rewards/margins": 0.3,
        "eval_rewards/accuracies": 0.7,
        "eval_logps/accuracies": 0.6,
    }
]


def test_table_aligns_and_dashes_what_is_missing() -> None:
    rows = [
        RunSummary("base", 0.5),
        RunSummary("MRPO (K=3)", 0.75, 0.8125, -0.25, 1.5, [0.5, 2.25, 1.0]),
    ]
    lines = comparison_table(rows).splitlines()
    header, base, mrpo = lines[0], lines[2], lines[3]
    assert header.split("  ")[0] == "run" and "held-out accuracy" in header and "peak memory per rank" in header
    assert len(header) == len(base) == len(mrpo) == len(lines[1])
    assert base.split() == ["base", "50.0%", "-", "-", "-", "-"]
    assert mrpo.split() == [
        "MRPO",
        "(K=3)",
        "75.0%",
        "81.2%",
        "-0.250",
        "1.50",
        "2.25",
        "GiB",
    ]  # the highest of the ranks
    assert "higher log-probability" in lines[5]


def test_table_takes_a_run_without_held_out_pairs() -> None:
    assert comparison_table([RunSummary("DPO", None, None, None, 1.0, [])]).splitlines()[2].split() == [
        "DPO",
        "-",
        "-",
        "-",
        "1.00",
        "-",
    ]


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels that reach the drawing, which still happens."""
    drawn: list[Any] = []
    draw_panel = report._draw_panel

    def record(axes: Any, panel: Any) -> None:
        drawn.append(panel)
        draw_panel(axes, panel)

    monkeypatch.setattr(report, "_draw_panel", record)
    return drawn


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_curves_leave_out_panels_without_data(tmp_path: Path, panels: list[Any]) -> None:
    plot_curves(HISTORY, tmp_path / "new" / "curves.png", "run")
    assert [panel.title.split()[0] for panel in panels] == [
        "Loss",
        "Reward",
        "Reward",
        "Weight",
        "Moved",
    ]  # no "decides"
    assert [(line.label, line.steps, line.values) for line in panels[1].lines] == [
        ("train", [1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ("held-out", [5], [0.3]),
    ]
    assert [line.label for line in panels[3].lines] == ["anchor", "org/model-7B"]
    assert len({line.colour for line in panels[3].lines}) == 2
    width, height = size_of_png(tmp_path / "new" / "curves.png")
    assert width > 1000 and height > 600


def test_a_step_logged_twice_by_a_resumed_run_counts_once(tmp_path: Path, panels: list[Any]) -> None:
    history = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "loss": 3.0},
        {"step": 1, "loss": 1.0},
        {"step": 3, "loss": float("nan")},
    ]
    plot_curves(history, tmp_path / "curves.png", "run")
    assert (panels[0].lines[0].steps, panels[0].lines[0].values) == ([1, 2], [1.0, 3.0])


def test_curves_of_an_empty_history_are_a_page_that_says_so(tmp_path: Path, panels: list[Any]) -> None:
    plot_curves([{"train_runtime": 3.0, "step": 5}], tmp_path / "curves.png", "run")
    assert panels == []
    size_of_png(tmp_path / "curves.png")


def test_comparison_overlays_runs_in_their_own_colours(tmp_path: Path, panels: list[Any]) -> None:
    plot_comparison({"DPO": HISTORY, "MRPO (K=3)": HISTORY[:-1]}, tmp_path / "comparison.png")
    loss, accuracy = panels[0], panels[1]
    assert [line.label for line in loss.lines] == ["DPO", "MRPO (K=3)"]
    assert loss.lines[0].colour != loss.lines[1].colour
    assert [line.label for line in accuracy.lines] == ["DPO"]  # the other was never evaluated
    assert len(panels) == 4
    size_of_png(tmp_path / "comparison.png")


def test_reference_names_keep_slashes_and_order() -> None:
    assert reference_names(HISTORY) == ["anchor", "org/model-7B"]
