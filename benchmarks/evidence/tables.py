"""From stored runs to figures: every cell of the plan with its mean, intervals and effect sizes, or the reason why it is empty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.intervals import SEEDS, Difference, mean_and_deviation, paired_difference
from benchmarks.evidence.records import Scores, run_file, unpacked
from benchmarks.evidence.rules import combined, margins
from benchmarks.evidence.scores_alone import proposition2
from benchmarks.evidence.study import ALL, ANCHOR, EXPERT, HIGH, METHODS, RULES, SELF, SFT, SINGLES

#: Methods of the issue that no run of this study can have, and why.
NEVER = dict.fromkeys(
    ("KD", "RLHF"),
    "not run: samples from the whole policy, so that no state of frozen layers can be looked up, at 4.5 times DPO's step "
    "(benchmarks/results/sampled-cost-smollm2.json): half an hour of two cores for 5 seeds",
)
#: Worlds of the plan that may have no run, and the minutes of CPU that their main comparison (8 methods, 5 seeds) costs, counted in
#: products of a run, where truthfulqa, L <- M, takes 20.
PLANNED = {
    "truthfulqa-m-from-l": 65,
    "gsm8k-solutions-l-from-m": 85,
    "gsm8k-solutions-m-from-l": 280,
    f"truthfulqa-l-from-m{ALL}": 20,
    "truthfulqa-l-from-m-full": 100,
}
#: Claims of the paper: method, and what it is said to be above.
CLAIMS = {
    "MRPO over DPO": ("mrpo", "dpo-anchor"),
    "MRPO over Multi-DPO": ("mrpo", "multi-dpo-uniform"),
    "MRPO over Mean Ref": ("mrpo", "mean-ref"),
    "adaptive over fixed epsilon, 0.1": ("mrpo", "mrpo-fixed-0.1"),
    "adaptive over fixed epsilon of half the width": ("mrpo", "mrpo-fixed-0.05"),
    "a clip is needed across families": ("mrpo", "mrpo-no-clip"),
    "a clip is needed in one family (setting (i))": ("mrpo-sft", "mrpo-sft-no-clip"),
    "across families over one family": ("mrpo", "mrpo-sft"),
    "confidence over uniform weights": ("mrpo", "mrpo-uniform"),
    "K = 3 over K = 2": ("mrpo-k3", "mrpo"),
}


@dataclass
class Cell:
    """Runs of one method in one world, by seed."""

    runs: dict[int, dict[str, Any]]

    def margins(self, part: str, seeds: Sequence[int]) -> np.ndarray | None:
        """[S, N], or None where some run has none of this part."""
        if not seeds or any(part not in self.runs[s]["margins"] for s in seeds):
            return None
        return np.stack([unpacked(self.runs[s]["margins"][part]) for s in seeds])


@dataclass
class Results:
    """All runs of one world: a set in one direction."""

    world: str
    set_name: str
    direction: str
    cells: dict[str, Cell]
    scores: Scores

    @classmethod
    def read(cls, root: Path, set_name: str, direction: str, variant: str = "") -> Results:
        cells = {}
        for method in METHODS:
            folder = run_file(root, set_name + variant, direction, method, 0).parent
            runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
            cells[method] = Cell({run["seed"]: run for run in runs})
        world = f"{set_name}-{direction}"
        return cls(f"{world}{variant}", set_name, direction, cells, Scores.load(root / "scores" / f"{world}.npz"))

    def difference(self, a: str, b: str, part: str = "test", *, of_margins: bool = False) -> Difference | None:
        """Of accuracies, or of mean margins in nats, on the seeds that both methods have."""
        seeds = sorted(self.cells[a].runs.keys() & self.cells[b].runs.keys())
        mine, other = self.cells[a].margins(part, seeds), self.cells[b].margins(part, seeds)
        if mine is None or other is None:
            return None
        return paired_difference(mine, other) if of_margins else paired_difference(mine > 0, other > 0)

    def accuracies(self, method: str, part: str = "test") -> list[float]:
        cell = self.cells[method]
        found = cell.margins(part, sorted(cell.runs))
        return [] if found is None else (found > 0).mean(1).tolist()

    def best_single(self) -> str | None:
        """By validation accuracy, mean over seeds, of those with most seeds; ties go to the one that stands first."""
        found = {name: self.accuracies(name, "validation") for name in SINGLES}
        most = max(map(len, found.values()))
        having = {name: np.mean(values) for name, values in found.items() if values and len(values) == most}
        return max(having, key=lambda name: having[name], default=None)

    def virtual_margins(self, method: str, part: str) -> np.ndarray | None:
        """[N] of what the method's rewards are measured against; None where that is another for each seed."""
        spec = METHODS[method]
        if SELF in spec.references or not set(spec.references) <= set(self.scores.names):
            return None
        length_N = torch.from_numpy(self.scores.tokens_N2[:, 0] - self.scores.tokens_N2[:, 1]).float()
        validation = torch.from_numpy(self.scores.rows("validation"))
        found = combined(spec, self.scores.of(spec.references), validation, length_N)
        return margins(found.virtual_logps_P2).numpy()[self.scores.rows(part)]

    def start_margins(self, part: str = "test") -> np.ndarray:
        """[N] of the untrained policy."""
        return margins(self.scores.of((ANCHOR,))[0]).numpy()[self.scores.rows(part)]


def row_of(results: Results, method: str, best: str | None) -> dict[str, Any]:
    """One cell's figures; ``reason`` where it is empty or short of seeds."""
    runs = results.cells[method].runs
    row: dict[str, Any] = {"name": method, "title": METHODS[method].title, "seeds": len(runs), "reason": ""}
    if len(runs) < SEEDS:
        row["reason"] = _reason(results, method)
    if not runs:
        return row
    seeds = sorted(runs)
    found = results.cells[method].margins("test", seeds)
    assert found is not None
    moved = (found - results.start_margins() > 0).mean(1).tolist()
    mean, deviation = mean_and_deviation(results.accuracies(method))
    row |= {"accuracy": mean, "deviation": deviation, "moved_right": float(np.mean(moved))}
    row["margin_gain"] = float((found - results.start_margins()).mean())
    gained = results.difference(method, "dpo-anchor", of_margins=True) if method != "dpo-anchor" else None
    row["margin_to_dpo"] = None if gained is None else asdict(gained)
    row["largest_loss"] = max(run["largest_loss"] for run in runs.values())
    row["cpu_seconds"] = float(np.mean([run["cpu_seconds"] for run in runs.values()]))
    row["weights"] = runs[seeds[0]]["weights"]
    virtual = results.virtual_margins(method, "test")
    row["paper_accuracy"] = None if virtual is None else float((found > virtual).mean())
    row["paper_accuracy_at_step_0"] = None if virtual is None else float((results.start_margins() > virtual).mean())
    for name, other in (("to_dpo", "dpo-anchor"), ("to_best_single", best)):
        difference = results.difference(method, other) if other and other != method else None
        row[name] = None if difference is None else _shown(difference)
    return row


def _shown(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "answer": difference.answer}


def _reason(results: Results, method: str) -> str:
    if {SFT, EXPERT} & set(METHODS[method].references):
        if not len(results.scores.rows("specialists")):
            return "not run: no pairs of this set were kept for a specialist"
        if f"-{results.direction}{ALL}" in results.world:
            return "not run: the specialists' pairs are trained on"
    seconds = [run["cpu_seconds"] for cell in results.cells.values() for run in cell.runs.values()]
    runs = results.cells[method].runs
    missing = SEEDS - len(runs)
    cost = f"about {missing * np.mean(seconds) * 1.5 / 60:.0f} minutes of CPU" if seconds else "no time was left"
    return f"{missing} of {SEEDS} seeds not run: {cost}"


def claims_of(results: Results) -> list[dict[str, Any]]:
    found = []
    for claim, (a, b) in CLAIMS.items():
        difference = results.difference(a, b)
        gained = results.difference(a, b, of_margins=True)
        found.append(
            {"name": claim, "world": results.world, "margin": None if gained is None else asdict(gained)}
            | (_shown(difference) if difference else {"answer": "not run"})
        )
    fixed = [name for name in ("mrpo-uniform", "mrpo-validation", "mrpo-one-hot") if results.cells[name].runs]
    if fixed and results.cells["mrpo"].runs:
        best = max(fixed, key=lambda name: np.mean(results.accuracies(name)))
        difference = results.difference("mrpo", best)
        assert difference is not None
        entry: dict[str, Any] = {
            "name": "confidence weights near the best fixed ones",
            "world": results.world,
            "best_fixed": best,
            "margin": None,
            **_shown(difference),
        }
        if difference.seeds >= SEEDS:  # near: at most 2 points below
            entry["answer"] = "yes" if difference.low > -0.02 else "no" if difference.high < 0 else "undecided"
        found.append(entry)
    return found


def claims_across(worlds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each claim over all worlds, in their order; yes over all of them only where one says yes and none says no."""
    found = []
    for first in worlds[0]["claims"] if worlds else ():
        name = first["name"]
        claims = [next((c for c in world["claims"] if c["name"] == name), None) for world in worlds]
        answers = [claim["answer"] if claim else "not run" for claim in claims]
        answer = "no" if "no" in answers else "yes" if "yes" in answers else "undecided"
        cells = [f"{said} {_interval(claim, seeds=False)}".strip() for said, claim in zip(answers, claims, strict=True)]
        line = f"| {name} | **{answer}** | {' | '.join(cells)} |"
        found.append({"name": name, "answer": answer, "answers": answers, "line": line})
    return found


def rule_of(results: Results) -> dict[str, Any]:
    """Which rule the validation pairs choose, and that rule on the final pairs against the best single reference."""
    run = [name for name in RULES if results.cells[name].runs]
    seeds = sorted(set.intersection(*(set(results.cells[name].runs) for name in run))) if run else []
    found = {name: results.cells[name].margins("validation", seeds) for name in run}
    having = {name: float((m > 0).mean()) for name, m in found.items() if m is not None}
    best = results.best_single()
    if not having or best is None:
        return {"world": results.world, "answer": "not run"}

    rule = max(having, key=lambda name: (having[name], float(np.mean(found[name]))))  # type: ignore[arg-type]
    gained = results.difference(rule, best, "final", of_margins=True)
    difference = results.difference(rule, best, "final")
    return {
        "world": results.world,
        "chosen_with_seeds": seeds,
        "validation": having,
        "margin": None if gained is None else asdict(gained),
        "rule": rule,
        "title": METHODS[rule].title,
        "best_single": best,
        "accuracy": float(np.mean(results.accuracies(rule, "final"))),
        "best_single_accuracy": float(np.mean(results.accuracies(best, "final"))),
        **(_shown(difference) if difference else {"answer": "not run"}),
    }


def proposition2_after_training(results: Results) -> list[dict[str, Any]]:
    """On test pairs, with the policies that MRPO's runs end with, per mean; and with no clip."""
    rows, found = results.scores.rows("test"), []
    policy = results.cells["mrpo"]
    margins_SN = policy.margins("test", sorted(policy.runs))
    if margins_SN is None:
        return found
    for method in ("mrpo-min", "mrpo", "mrpo-geometric", "mrpo-arithmetic", "mrpo-no-clip"):
        spec = METHODS[method]
        references = combined(
            spec, results.scores.of(spec.references)[:, rows], torch.arange(0), torch.zeros(len(rows))
        )
        counts = [
            proposition2(
                torch.stack([torch.from_numpy(m.copy()), torch.zeros(len(m))], 1), references, references.weights_KP
            )
            for m in margins_SN
        ]
        apply, fail = sum(c["apply"] for c in counts), sum(c["fail"] for c in counts)
        found.append({"name": method, "apply": apply, "fail": fail, "share": fail / apply if apply else 0.0})
    return found


def world_summary(results: Results) -> dict[str, Any]:
    best = results.best_single()
    rows = [row_of(results, method, best) for method in METHODS]
    for row in rows:
        row["line"] = _markdown_row(row)
    claims = claims_of(results)
    for claim in claims:
        claim["line"] = f"| {claim['name']} | {claim['answer']} | {_interval(claim)} | {_nats(claim['margin'])} |"
    return {
        "name": results.world,
        "best_single": best,
        "start": float((results.start_margins() > 0).mean()),
        "test_pairs": len(results.scores.rows("test")),
        "parts": {str(p): int(n) for p, n in zip(*np.unique(results.scores.part_N, return_counts=True), strict=True)},
        "rows": rows,
        "claims": claims,
        "rule": rule_of(results),
        "proposition2": proposition2_after_training(results),
        "never": NEVER,
    }


def commands_of(all_results: Sequence[Results]) -> list[dict[str, Any]]:
    """Each command with its runs: method, seed, commit, machine, dtype."""
    found: dict[tuple[str, ...], list[str]] = {}
    for results in all_results:
        for method, cell in results.cells.items():
            for seed, run in sorted(cell.runs.items()):
                key = (run["command"], run["commit"], run["machine"], run["dtype"])
                found.setdefault(key, []).append(f"{results.world} {method} {seed}")
    return [
        {"command": command, "commit": commit, "machine": machine, "dtype": dtype, "runs": runs}
        for (command, commit, machine, dtype), runs in found.items()
    ]


def markdown(worlds: Sequence[Mapping[str, Any]], commands: Sequence[Mapping[str, Any]]) -> str:
    lines = ["# Tables of the evidence study", "", "Written by `make evidence` from the runs beside this file.", ""]
    for world in worlds:
        lines += [
            f"## {world['name']}",
            "",
            f"{world['test_pairs']} test pairs; the untrained policy: {world['start']:.1%}; best single reference on validation "
            f"pairs: {world['best_single'] or 'none run'}.",
            "",
            "| method | seeds | accuracy | to DPO on the anchor | d | to best single | d | margin to DPO, nats | moved right | "
            "paper's accuracy (at step 0) | reason |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [row["line"] for row in world["rows"]]
        lines += [f"| {name} | 0 | | | | | | | | | {reason} |" for name, reason in world["never"].items()]
        lines += ["", "| claim | answer | difference | of margins, nats |", "|---|---|---|---|"]
        lines += [claim["line"] for claim in world["claims"]]
        lines.append("")
    names = {world["name"] for world in worlds}
    absent = [name for name in PLANNED if name not in names]
    if absent and not any(world["name"].startswith("toy") for world in worlds):
        lines += ["## Planned and not run", "", "| world | reason |", "|---|---|"]
        lines += [
            f"| {name} | not run at the plan's rates, which hardly moved a ranking: see {name}{HIGH} |"
            if f"{name}{HIGH}" in names
            else f"| {name} | not run: about {PLANNED[name]} minutes of CPU for 8 methods with 5 seeds |"
            for name in absent
        ]
        lines.append("")
    lines += ["## Runs", ""]
    for one in commands:
        lines += [f"`{one['command']}` at {one['commit']}, {one['dtype']}, {one['machine']}:", ""]
        lines += [f"- {run}" for run in _by_method(one["runs"])] + [""]
    return "\n".join(lines)


def _by_method(runs: Sequence[str]) -> list[str]:
    grouped: dict[str, list[str]] = {}
    for run in runs:
        cell, _, seed = run.rpartition(" ")
        grouped.setdefault(cell, []).append(seed)
    return [f"{cell}: seeds {', '.join(seeds)}" for cell, seeds in grouped.items()]


def _interval(difference: Mapping[str, Any] | None, *, seeds: bool = True) -> str:
    if not difference or "mean" not in difference:
        return ""
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" + (f", {difference['seeds']} seeds" if seeds else "")


def _nats(difference: Mapping[str, Any] | None) -> str:
    return "" if not difference else f"{difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _markdown_row(row: Mapping[str, Any]) -> str:
    if not row["seeds"]:
        return f"| {row['title']} | 0 | | | | | | | | | {row['reason']} |"
    spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
    cells = [row["title"], str(row["seeds"]), f"{row['accuracy']:.1%}{spread}"]
    for name in ("to_dpo", "to_best_single"):
        difference = row[name] or {}
        cells += [_interval(difference), _number(difference.get("cohens_d"), "+.2f")]
    cells.append(_nats(row["margin_to_dpo"]))
    paper = (
        "" if row["paper_accuracy"] is None else f"{row['paper_accuracy']:.1%} ({row['paper_accuracy_at_step_0']:.1%})"
    )
    return "| " + " | ".join([*cells, f"{row['moved_right']:.1%}", paper, row["reason"]]) + " |"
