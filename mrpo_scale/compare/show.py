"""A comparison as people read it: a table, plain sentences, a picture; and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mrpo_scale.base.tables import aligned
from mrpo_scale.compare.results import ArmResult, Comparison, Difference
from mrpo_scale.reports.pictures import PALETTE

_LINES = ("-", "--", ":")  # when the palette is used up


def table(comparison: Comparison) -> str:
    """Plain text with a legend."""
    header = (
        "run",
        "seeds",
        "held-out accuracy",
        "to best single",
        "d best",
        "d DPO",
        "where refs differ",
        "moved right",
    )
    rows: list[tuple[str, ...]] = [(*header, "reward accuracy", "reward margin")]
    for arm in sorted(comparison.arms, key=lambda arm: -arm.accuracy[0]):
        seeds = str(len(arm.runs)) if len(arm.runs) == arm.planned else f"{len(arm.runs)} of {arm.planned}"
        rows.append(
            (
                *(arm.arm.name, seeds, _share(arm.accuracy), _points(arm.to_best_single), _d(arm.to_best_single)),
                *(_d(arm.to_dpo), _share(arm.disagreeing), _share(arm.moved_right)),
                *(_share(arm.reward_accuracy), _plain(arm.reward_margin)),
            )
        )
    as_they_are = ", ".join(f"{name} {share:.1%}" for name, share in comparison.references.items())
    return "\n".join(
        [
            aligned(rows),
            "",
            f"{comparison.pairs} held-out pairs. References as they are, untrained: {as_they_are} ranked right; they disagree",
            f"about {comparison.disagree:.1%} of the pairs (`where refs differ`: accuracy on exactly those).",
            "anchor: reference 0, the policy's own starting weights unless the recipe says otherwise.",
            "held-out accuracy: share of pairs to whose chosen response the trained policy gives the higher log-prob; mean ±",
            "standard deviation over seeds. It compares between runs. Reward accuracy and margin are measured against each run's",
            "own reference and do not. to best single: difference to the best DPO run on a single reference, in points, with a",
            f"{comparison.confidence:.1%} interval (paired bootstrap over pairs and seeds). d: Cohen's effect size of the",
            "accuracies per seed (difference of the means over the pooled standard deviation), to the best single reference and",
            "to DPO on the anchor. moved right: share of pairs whose chosen response gained more log-prob in training than the",
            "rejected one; it compares too, and notices steps that are too small to change a ranking.",
        ]
    )


def verdict(comparison: Comparison) -> str:
    """Which run is best, and whether several references beat the best single one beyond noise."""
    single, several = comparison.best_single, comparison.best_multiple
    if single is None or several is None:
        return (
            "No verdict: it takes a finished DPO run on a single reference and a finished run with several references."
        )
    top = max(single.accuracy[0], several.accuracy[0])
    best = [arm for arm in comparison.arms if arm.accuracy[0] == top]
    names = ", ".join(arm.arm.name for arm in best)
    lines = [f"Best: {'a tie of ' if len(best) > 1 else ''}{names}, {_share(best[0].accuracy)}."]
    difference = several.to_best_single
    assert difference is not None
    noise = "beyond noise" if difference.beyond_noise else "NOT beyond noise"
    lines.append(
        f"Best run with several references ({several.arm.name}) minus best single reference ({single.arm.name}): "
        f"{_points(difference)} points, {noise}."
    )
    if difference.beyond_noise and difference.mean < 0:
        lines.append("The single reference is better here: spend the other references' GPU hours elsewhere.")
    fewest = min(len(single.runs), len(several.runs))
    if fewest < 3:
        lines.append(
            f"{fewest} seed{'s' if fewest > 1 else ''} cannot say how much seeds matter, so the interval is too narrow; run three "
            "or more."
        )
    lines.append(
        "Both were picked on the pairs they are reported on, which flatters them: confirm on pairs not used here."
    )
    if comparison.missing:
        lines.append(f"Missing: {'; '.join(run.name for run in comparison.missing)}.")
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything in the table, unrounded, and each run's own values."""
    return {
        "held_out_pairs": comparison.pairs,
        "references_untrained_accuracy": comparison.references,
        "references_disagree": comparison.disagree,
        "interval": comparison.confidence,
        "missing": [run.name for run in comparison.missing],
        "verdict": verdict(comparison).splitlines(),
        "arms": [_arm_as_json(arm) for arm in comparison.arms],
    }


def plot(comparison: Comparison, path: Path, title: str) -> None:
    """Held-out accuracy over steps, of each run at its end, and against every varied number."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = _varied_keys(comparison.arms)
    columns = 2 + len(keys)
    figure = Figure(figsize=(5.6 * columns, 1.6 + max(3.6, 0.36 * len(comparison.arms))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # Agg whatever the user's display or MPLBACKEND says
    figure.suptitle(title, fontsize=13, fontweight="bold")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    styles = {
        arm.arm.name: {"color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[i // len(PALETTE) % len(_LINES)]}
        for i, arm in enumerate(comparison.arms)
    }
    _plot_curves(axes[0], comparison, styles)
    _plot_ends(axes[1], comparison, styles)
    for axis, key in zip(axes[2:], keys, strict=True):
        _plot_key(axis, comparison, key)
    for axis in axes:
        axis.grid(True, color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _plot_curves(axis: Any, comparison: Comparison, styles: dict[str, dict[str, str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, arm in enumerate(comparison.arms):
        steps, means, deviations = _curve(arm, comparison.start)
        style = styles[arm.arm.name]
        # Ever thinner, so that curves that coincide all show.
        width = max(1.2, 4.4 - 0.8 * i)
        axis.plot(steps, means, marker="o", markersize=2.5 + width, linewidth=width, label=arm.arm.name, **style)
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axis.set_title("Held-out accuracy (mean and standard deviation over seeds)", fontsize=10)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    _percent_axis(axis.yaxis)
    _legend_below(axis)


def _plot_ends(axis: Any, comparison: Comparison, styles: dict[str, dict[str, str]]) -> None:
    ordered = sorted(comparison.arms, key=lambda arm: arm.accuracy[0])
    for place, arm in enumerate(ordered):
        colour = styles[arm.arm.name]["color"]
        axis.scatter(
            [r.accuracy for r in arm.runs],
            [place] * len(arm.runs),
            s=26,
            facecolors="white",
            edgecolors=colour,
            zorder=3,
        )
        mean, deviation = arm.accuracy
        axis.errorbar([mean], [place], xerr=[deviation or 0.0], fmt="D", markersize=5, capsize=3, color=colour)
    for i, (name, share) in enumerate(comparison.references.items()):
        axis.axvline(share, label=f"{name}, untrained", **_grey(i))
    axis.set_yticks(range(len(ordered)), [arm.arm.name for arm in ordered], fontsize=8.5)
    axis.set_ylim(-0.7, len(ordered) - 0.3)
    axis.set_title("At the end: each seed, mean and standard deviation", fontsize=10)
    axis.set_xlabel("held-out accuracy", fontsize=9)
    _percent_axis(axis.xaxis)
    _legend_below(axis)


def _plot_key(axis: Any, comparison: Comparison, key: str) -> None:
    """Accuracy against one varied key; values that the other keys share are one line."""
    values = list(dict.fromkeys(arm.arm.varied[key] for arm in comparison.arms if key in arm.arm.varied))
    values.sort(key=_sortable)
    places = {value: place for place, value in enumerate(values)}
    lines: dict[str, list[ArmResult]] = {}
    for arm in comparison.arms:
        if key in arm.arm.varied:
            lines.setdefault(arm.arm.name.replace(f" {key}={arm.arm.varied[key]}", ""), []).append(arm)
    for i, (label, arms) in enumerate(lines.items()):
        arms = sorted(arms, key=lambda arm: places[arm.arm.varied[key]])
        aside = 0.06 * (i - (len(lines) - 1) / 2)  # or the error bars of two lines would cover each other
        x = [places[arm.arm.varied[key]] + aside for arm in arms]
        deviations = [arm.accuracy[1] or 0.0 for arm in arms]
        colour = PALETTE[i % len(PALETTE)]
        axis.errorbar(
            x, [arm.accuracy[0] for arm in arms], yerr=deviations, fmt="o-", capsize=3, color=colour, label=label
        )
    for i, arm in enumerate(arm for arm in comparison.singles if key not in arm.arm.varied):
        axis.axhline(arm.accuracy[0], label=arm.arm.name, **_grey(i))
    axis.set_xticks(range(len(values)), values)
    axis.set_xlim(-0.4, len(values) - 0.6)
    axis.set_xlabel(key, fontsize=9)
    axis.set_title(f"Held-out accuracy against {key}", fontsize=10)
    _percent_axis(axis.yaxis)
    _legend_below(axis)


def _curve(arm: ArmResult, start: float | None) -> tuple[list[int], list[float], list[float]]:
    """Steps that all seeds measured, with mean and standard deviation; from ``start`` on where step 0 was not measured."""
    import statistics

    curves = [dict(result.curve) for result in arm.runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    means = [statistics.mean(curve[step] for curve in curves) for step in steps]
    deviations = [statistics.stdev(curve[step] for curve in curves) if len(curves) > 1 else 0.0 for step in steps]
    if start is not None and 0 not in steps:
        return [0, *steps], [start, *means], [0.0, *deviations]
    return steps, means, deviations


def _varied_keys(arms: Sequence[ArmResult]) -> list[str]:
    """Keys of which two values or more were run by one line of runs."""
    keys = dict.fromkeys(key for arm in arms for key in arm.arm.varied)
    return [key for key in keys if len({arm.arm.varied[key] for arm in arms if key in arm.arm.varied}) > 1]


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), value
    except ValueError:
        return 1, 0.0, value


def _legend_below(axis: Any) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)


def _grey(i: int) -> dict[str, Any]:
    """A line to compare with, the i-th of its panel."""
    return {"color": ("#555555", "#888888", "#BBBBBB")[i % 3], "linestyle": ("--", ":", "-.")[i % 3], "linewidth": 1.2}


def _percent_axis(axis: Any) -> None:
    """Whole percents over ten points at least, so that a tenth of a point does not look like a cliff."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    low, high = axis.get_view_interval()
    middle, half = (low + high) / 2, max((high - low) / 2, 0.05)
    axis.set_view_interval(middle - half, middle + half, ignore=True)
    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))


def _arm_as_json(arm: ArmResult) -> dict[str, Any]:
    both = {"to_dpo_on_anchor": arm.to_dpo, "to_best_single": arm.to_best_single}
    means = ("accuracy", "reward_accuracy", "reward_margin", "disagreeing", "moved_right")
    return {
        "name": arm.arm.name,
        "objective": arm.arm.objective,
        "reference": arm.arm.reference,
        "varied": arm.arm.varied,
        "planned_seeds": arm.planned,
        **{
            name: {"mean": pair[0], "standard_deviation": pair[1]} if (pair := getattr(arm, name)) else None
            for name in means
        },
        **{name: {**asdict(d), "beyond_noise": d.beyond_noise} if d else None for name, d in both.items()},
        "runs": [
            {
                "seed": result.run.seed,
                "folder": str(result.run.folder),
                "accuracy": result.accuracy,
                "reward_accuracy": result.reward_accuracy,
                "reward_margin": result.reward_margin,
                "curve": result.curve,
            }
            for result in arm.runs
        ],
    }


def _share(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value[0]:.1f}%" + (f" ± {100 * value[1]:.1f}" if value[1] is not None else "")


def _plain(value: tuple[float, float | None]) -> str:
    return f"{value[0]:+.3f}" + (f" ± {value[1]:.3f}" if value[1] is not None else "")


def _points(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _d(difference: Difference | None) -> str:
    return "-" if difference is None or difference.cohens_d is None else f"{difference.cohens_d:+.2f}"
