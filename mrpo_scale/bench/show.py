"""A benchmark as people read it: two tables and a picture, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mrpo_scale.base.tables import aligned_table, number, percent
from mrpo_scale.bench.clock import PHASES
from mrpo_scale.reports.pictures import PALETTE

_COLOURS = {phase: (*PALETTE, "#BBBBBB")[i] for i, phase in enumerate(PHASES)}
_MARKERS = "osD^v"


def tables(result: Mapping[str, Any]) -> str:
    """Plain text with a legend."""
    arms = result["arms"]
    shown = [phase for phase in PHASES if any(arm["phases"][phase]["median"] > 0 for arm in arms)]
    time_rows = [
        (arm["name"], _interval(arm["seconds"], 1e3, ".1f"), *(_ms(arm["phases"][phase]) for phase in shown))
        for arm in arms
    ]
    cost_rows = [
        (
            arm["name"],
            _interval(arm["overhead"], 1, ".3f"),
            f"{arm['overhead']['flop_floor']:.3f}",
            f"{(arm['flops_per_step']['policy'] + arm['flops_per_step']['references']) / 1e9:.4g}",
            f"{arm['tokens_per_second']:.0f}",
            percent(arm["mfu"]),
            f"{max(arm['peak_memory_gib']):.3f}",
            f"{gathered_mib(arm):.2f}",
            f"{1e3 * max(arm['link_seconds']):.1f}",
        )
        for arm in arms
    ]
    cost_header = ("x DPO's step [95% interval]", "x DPO's FLOPs", "GFLOP/step", "tokens/s", "MFU")
    machine = result["machine"]
    return "\n".join(
        [
            f"{result['recipe']} on {machine['name']}, {machine['ranks']} rank(s), {result['rounds']} rounds of "
            f"{result['pairs_per_step']} pairs; the mean rank has {percent(arms[0]['balance']['median'])} of the slowest one's "
            "tokens in a micro-batch",
            "",
            aligned_table(("ms, median over rounds", "step [95% interval]", *shown), time_rows),
            "",
            aligned_table(("", *cost_header, "GiB peak", "MiB gathered", "ms links"), cost_rows),
            "",
            _LEGEND,
        ]
    )


_LEGEND = """The references' time is part of the step. Medians of phases need not add up to the median of the step; the phases of
each single step do (JSON). x DPO's step: median over rounds of this step over DPO's on the same pairs, scored in the same way;
x DPO's FLOPs: what that would be if time were FLOPs. GiB peak: of the rank that needed most, references of other arms left out.
MiB gathered: received by one rank in one step's all-gathers, and in the broadcasts that gather references on CPUs. ms links: a
collective was under way in one profiled step, waiting for the other ranks included."""


def gathered_mib(arm: Mapping[str, Any]) -> float:
    """Received in the all-gathers and broadcasts of one step by the rank that receives most."""
    nothing = {"bytes": [0] * len(arm["peak_memory_gib"])}
    both = [arm["collectives"].get(kind, nothing)["bytes"] for kind in ("all_gather", "broadcast")]
    return max(map(sum, zip(*both, strict=True))) / 2**20


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Left: a bar per arm, made of its phases. Right: overhead over DPO against K, with the FLOP floor beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = result["arms"]
    figure = Figure(figsize=(13.5, 2.9 + 0.42 * len(arms)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # Agg whatever the user's display or MPLBACKEND says
    machine = result["machine"]
    figure.suptitle(
        f"What a step costs: {result['recipe']}, {machine['name']}, {machine['ranks']} rank(s), {result['rounds']} rounds",
        fontsize=12.5,
        fontweight="bold",
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _bars(left, arms)
    _overheads(right, arms)
    for axis in (left, right):
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _bars(axis: Any, arms: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(arms))
    reached = [0.0] * len(arms)
    for phase in PHASES:
        # Means, because they add up; the step's median and interval lie on top.
        widths = [1e3 * sum(s["phases"][phase] for s in arm["steps"]) / len(arm["steps"]) for arm in arms]
        axis.barh(places, widths, left=reached, height=0.72, color=_COLOURS[phase], label=phase)
        reached = [a + b for a, b in zip(reached, widths, strict=True)]
    for place, arm in zip(places, arms, strict=True):
        low, middle, high = (1e3 * arm["seconds"][name] for name in ("low", "median", "high"))
        bars = [[middle - low], [high - middle]]
        axis.errorbar([middle], [place], xerr=bars, fmt="o", color="black", markersize=3.5, capsize=3, linewidth=1.2)
    axis.set_yticks(list(places), [arm["name"] for arm in arms])
    axis.invert_yaxis()
    axis.set_xlabel("ms per optimizer step: mean of each phase; dot: median of the step, 95% interval", fontsize=9)
    axis.grid(True, axis="x", color="#DDDDDD", linewidth=0.7)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=8.5, frameon=False)


def _overheads(axis: Any, arms: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    ways = list(dict.fromkeys((arm["scoring"], arm["placement"]) for arm in arms))
    for i, way in enumerate(ways):
        own = [arm for arm in arms if (arm["scoring"], arm["placement"]) == way]
        counts = [arm["references"] for arm in own]
        middle = [arm["overhead"]["median"] for arm in own]
        below = [arm["overhead"]["median"] - arm["overhead"]["low"] for arm in own]
        above = [arm["overhead"]["high"] - arm["overhead"]["median"] for arm in own]
        name, colour = ", ".join(part for part in way if part), PALETTE[i % len(PALETTE)]
        style = {"color": colour, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}
        axis.errorbar(counts, middle, yerr=[below, above], capsize=3, label=f"{name}: measured", **style)
        floors = [arm["overhead"]["flop_floor"] for arm in own]
        axis.plot(counts, floors, linestyle="--", color=colour, linewidth=1.2, label=f"{name}: FLOPs")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.95), max(high, 1.1))  # a hundredth must not look like a cliff
    axis.set_xlabel("K, references with the anchor", fontsize=9)
    axis.set_title("Step time over DPO's, median and 95% interval", fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8.5, frameon=False)


def _interval(values: Mapping[str, float], scale: float, spec: str) -> str:
    middle, low, high = (number(scale * values[name], spec) for name in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _ms(values: Mapping[str, float]) -> str:
    return number(1e3 * values["median"], ".1f")
