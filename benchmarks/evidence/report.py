"""`make evidence`: tables and pictures again from the stored runs and scores. Trains and scores nothing.

python -m benchmarks.evidence.report [--results benchmarks/results/evidence]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.evidence.records import Scores, write_json
from benchmarks.evidence.scores_alone import analyse_all
from benchmarks.evidence.study import RESULTS
from benchmarks.evidence.tables import Results, claims_across, commands_of, markdown, world_summary


def worlds_of(root: Path) -> list[Results]:
    """Every world that has a run, by its folders ``runs/SET/DIRECTION``; scores are those of the set without its variant."""
    found = []
    for folder in sorted((root / "runs").glob("*/*")):
        set_name, direction = folder.parts[-2:]
        names = [set_name.rsplit("-", cut)[0] for cut in range(3)]  # a variant is one word or two
        base = next((name for name in names if (root / "scores" / f"{name}-{direction}.npz").exists()), None)
        if base is not None:
            found.append(Results.read(root, base, direction, set_name.removeprefix(base)))
    return found


def summarise(root: Path) -> dict[str, Any]:
    results = worlds_of(root)
    scores = {path.stem: Scores.load(path) for path in sorted((root / "scores").glob("*.npz"))}
    worlds = [world_summary(one) for one in results]
    return {
        "worlds": worlds,
        "claims": claims_across(worlds),
        "scores": [{"name": name, **found} for name, found in analyse_all(scores).items()],
        "commands": commands_of(results),
    }


def draw_differences(world: Mapping[str, Any], path: Path) -> None:
    """Each method's difference to DPO on the anchor, with its interval."""
    rows = [row for row in world["rows"] if row.get("to_dpo")]
    if not rows:
        return
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        d = row["to_dpo"]
        axes.plot([100 * d["low"], 100 * d["high"]], [y, y], color="0.4", linewidth=2)
        axes.plot(100 * d["mean"], y, "o", color="C0" if row["seeds"] >= 5 else "C1")
    axes.axvline(0, color="0.7", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in reversed(rows)], fontsize=8)
    axes.set_xlabel(
        "ranking accuracy minus that of DPO on the anchor, points, 95% (orange: fewer than 5 seeds)",
        fontsize=8,
    )
    axes.set_title(world["name"], fontsize=10)
    _save(figure, path)


def draw_scores(worlds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy of each reference, with and without what length explains; and calibration."""
    if not worlds:
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = []
    for world in worlds:
        for name, reference in world["references"].items():
            x = len(labels)
            for offset, key, color in ((-0.15, "accuracy", "C0"), (0.15, "accuracy_without_length", "C1")):
                share = reference[key]
                left.plot([x + offset] * 2, [100 * share["low"], 100 * share["high"]], color=color)
                left.plot(x + offset, 100 * share["share"], "o", color=color, markersize=4)
            labels.append(f"{world['name']}\n{name}")
            bins = reference["calibration"]["bins"]
            right.plot(
                [b["confidence"] for b in bins],
                [b["accuracy"] for b in bins],
                ".-",
                label=labels[-1].replace("\n", " "),
            )
    left.axhline(50, color="0.7", linewidth=1)
    left.set_xticks(range(len(labels)), labels, fontsize=5, rotation=60)
    left.set_ylabel("ranked right, % (orange: without length)", fontsize=8)
    right.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1)
    right.set_xlabel("confidence sigma(beta |margin|)", fontsize=8)
    right.set_ylabel("ranked right", fontsize=8)
    right.legend(fontsize=5)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    # No date or version inside: the same runs give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=RESULTS, type=Path)
    root = parser.parse_args(argv).results
    summary = summarise(root)
    write_json(root / "summary.json", summary)
    text = markdown(summary["worlds"], summary["commands"])
    (root / "tables.md").write_text(text, encoding="utf-8")
    for world in summary["worlds"]:
        draw_differences(world, root / f"{world['name']}.png")
    draw_scores([s for s in summary["scores"] if "-k" not in s["name"]], root / "scores.png")
    print(text)


if __name__ == "__main__":
    main()
