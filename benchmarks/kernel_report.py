"""Tables and the figure of bench_kernels.py, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tables(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']['name']}, torch {report['machine']['torch']}, {report['machine']['dtype']}"]
    for run in report["runs"]:
        lines += ["", f"## {run['title']}", ""]
        if run.get("gemm_tflops"):
            lines += [f"Plain GEMM of the same size: {run['gemm_ms']:.1f} ms, {run['gemm_tflops']:.3g} TFLOP/s.", ""]
        lines += [
            "| what | pass | ms (median) | quartiles | x baseline | TFLOP/s | of GEMM | extra MiB | x baseline | errors |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(row) for row in run["rows"]]
    if report["absent"]:
        lines += ["", "Absent here: " + "; ".join(f"{name} ({why})" for name, why in report["absent"].items())]
    return "\n".join([*lines, ""])


def _row(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['name']} | {row['pass']} | {row['failed']} |  |  |  |  |  |  |  |"
    low, high = row["quartiles_ms"]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    memory = f"{row['extra_mib']:.0f} | {row['extra_ratio']:.2f}" if row.get("extra_mib") is not None else " | "
    return (
        f"| {row['name']} | {row['pass']} | {row['ms']:.1f} | {low:.1f} to {high:.1f} | {row['time_ratio']:.2f} | "
        f"{row['tflops']:.3g} | {row['of_gemm']:.0%} | {memory} | {errors} |"
    )


RATIOS = {"ms": "time_ratio", "extra_mib": "extra_ratio"}


def figure(report: dict[str, Any], path: Path) -> None:
    """One line of panels per run: time and extra memory of every contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = report["runs"]
    heights = [1.2 + 0.32 * len(run["rows"]) for run in runs]
    fig, grid = plt.subplots(
        len(runs), 2, figsize=(13, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (left, right), run in zip(grid, runs, strict=True):
        rows = run["rows"]
        labels = [f"{row['name']} · {row['pass']}" for row in rows]
        colors = ["tab:orange" if row["name"].startswith("ours") else "tab:gray" for row in rows]
        for axis, key, unit in ((left, "ms", "ms (median, quartiles)"), (right, "extra_mib", "extra memory, MiB")):
            values = [row.get(key) or 0 for row in rows]
            spread = None
            if key == "ms":
                spread = [
                    [max(0, row["ms"] - row["quartiles_ms"][0]) if "ms" in row else 0 for row in rows],
                    [max(0, row["quartiles_ms"][1] - row["ms"]) if "ms" in row else 0 for row in rows],
                ]
            axis.barh(range(len(rows)), values, color=colors, xerr=spread, error_kw={"lw": 1})
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_xlabel(unit)
            axis.spines[["top", "right"]].set_visible(False)
            # One that is far slower must not squeeze the others: its bar is cut, its number beside the cut.
            base = [row[key] / ratio for row in rows if (ratio := row.get(RATIOS[key])) and row.get(key)]
            limit = 2.2 * max(base, default=1)
            axis.set_xlim(0, 1.6 * min(limit, max(values, default=0) or 1))
            for y, row in enumerate(rows):
                x = 0 if "failed" in row else values[y] + (spread[1][y] if spread else 0)
                x = min(x, 1.15 * axis.get_xlim()[1] / 1.6)
                axis.text(x, y, f"  {row.get('failed') or _note(row, key)}", va="center", fontsize=8)
        left.set_yticks(range(len(rows)), labels, fontsize=8)
        right.set_yticks([])
        right.set_visible(any(row.get("extra_mib") is not None for row in rows))
        left.set_title(run["title"], loc="left", fontsize=10)
    fig.suptitle(f"{report['machine']['name']} · torch {report['machine']['torch']} · {report['machine']['dtype']}")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _note(row: dict[str, Any], key: str) -> str:
    if key == "ms":
        return f"{row['time_ratio']:.2f}x, {row['of_gemm']:.0%} of GEMM"
    return "" if row.get("extra_mib") is None else f"{row['extra_mib']:.0f} ({row['extra_ratio']:.2f}x)"
