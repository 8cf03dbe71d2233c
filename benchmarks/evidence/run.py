"""Runs of the study, in one process: libraries, models and scores are loaded once; a run begins by putting the first weights back.

    python -m benchmarks.evidence.run --set truthfulqa --direction l-from-m --methods mrpo dpo-anchor --seeds 0 1 2 3 4

What has its JSON is not run again. The learning rate is chosen first where no choice is on disk, and the specialists are made
where a method needs one. `--models` and `--data` say where models and sets lie.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.records import Scores, commit, machine, packed, run_file, write_json
from benchmarks.evidence.rules import combined, margins, weights_of
from benchmarks.evidence.study import (
    ALL,
    ANCHOR,
    DIRECTIONS,
    EPOCHS,
    EXPERT,
    HIGH,
    HIGH_RATES,
    LEARNING_RATES,
    METHODS,
    OTHER,
    RESULTS,
    RULES,
    SELF,
    SETS,
    SFT,
    SINGLES,
    TUNING_SEEDS,
    Direction,
    Method,
    SetPlan,
)
from benchmarks.evidence.train import Runner, training_rows
from benchmarks.evidence.world import load_upper, open_world
from mrpo_scale.objective import Objective, combine

EXPERT_SEED = 1000
#: Methods among which something is chosen on validation pairs and judged on final pairs. All others are scored on test pairs only.
JUDGED = (*SINGLES, *RULES)


class Study:
    """One set in one direction, with its files under ``results`` (kept) and ``work`` (made again where it is missing)."""

    def __init__(
        self, set_name: str, plan: SetPlan, direction: Direction, models: dict[str, str], data: Path, work: Path,
        results: Path, *, bf16: bool = False, variant: str = "",
    ) -> None:  # fmt: skip
        self.plan, self.direction, self.results, self.work = plan, direction, results, work / set_name / direction.name
        self.set_name, self.variant, self.bf16 = set_name, variant, bf16
        self.world = open_world(plan, direction, models, data, work)
        self.name = f"{set_name}-{direction.name}"
        self._runner: Runner | None = None
        self._selves: dict[tuple[int, float], torch.Tensor] = {}

    @property
    def runner(self) -> Runner:
        if self._runner is None:
            self.work.mkdir(parents=True, exist_ok=True)
            load_upper(self.world, self.direction.layers, self.work / f"hidden-{self.direction.layers}.pt")
            self._runner = Runner(self.world, bf16=self.bf16)
        return self._runner

    def validation_accuracy(self) -> float:
        """Of the policy as it is now."""
        return float((margins(self.runner.score(self.world.rows("validation"))) > 0).float().mean())

    def learning_rate(self, rates: Sequence[float] = LEARNING_RATES, variant: str = "") -> float:
        """The one of ``rates`` chosen on validation pairs; see the plan."""
        path = self.results / "chosen" / f"{self.name}{variant}.json"
        if not path.exists():
            write_json(path, self._choose_learning_rate(rates))
        return json.loads(path.read_text())["learning_rate"]

    def _choose_learning_rate(self, rates: Sequence[float]) -> dict[str, Any]:
        method = METHODS["dpo-anchor"]
        references, found = combine(self.world.references((ANCHOR,)), method.objective()), {}
        for rate in rates:
            found[f"{rate:g}"] = []
            for seed in TUNING_SEEDS:
                rows = training_rows(self.world, seed, self.plan.train)
                self.runner.train(rows, references, method.objective(), seed=seed, learning_rate=rate)
                found[f"{rate:g}"].append(self.validation_accuracy())
        best = max(rates, key=lambda rate: (np.mean(found[f"{rate:g}"]), -rate))
        return {"learning_rate": best, "validation_accuracy": found, "seeds": TUNING_SEEDS, "commit": commit()}

    def make_specialists(self) -> None:
        """S and E: the policy trained on the specialists' pairs, their log-probs of every pair kept with the references'."""
        path = self.results / "scores" / f"{self.name}.npz"
        if path.exists() and set(names := Scores.load(path).names) >= {SFT, EXPERT}:
            kept = Scores.load(path)
            self.world.ref_logps |= {n: torch.from_numpy(kept.ref_logps_KN2[names.index(n)]) for n in (SFT, EXPERT)}
            return
        rows, anchor = self.world.rows("specialists"), self.world.references((ANCHOR,))
        everything = np.arange(len(self.world.pairs))
        for name, objective in (
            (SFT, Objective(name="dpo", loss_type="sft")),
            (EXPERT, METHODS["dpo-anchor"].objective()),
        ):
            rate = self.learning_rate()
            self.runner.train(rows, combine(anchor, objective), objective, seed=EXPERT_SEED, learning_rate=rate)
            self.world.ref_logps[name] = self.runner.score(everything)
        self.save_scores()

    def keep_scores(self) -> None:
        """The references' log-probs, unless those on disk are of the same pairs in the same parts; tables are made from them."""
        path = self.results / "scores" / f"{self.name}.npz"
        if not path.exists() or not np.array_equal(Scores.load(path).part_N, self.world.part_N):
            self.save_scores()

    def save_scores(self) -> None:
        names = [name for name in (ANCHOR, OTHER, SFT, EXPERT) if name in self.world.ref_logps]
        pairs = self.world.pairs
        Scores(
            names,
            self.world.part_N,
            np.array([pairs.source_row(i) for i in range(len(pairs))]),
            self.world.references(names).numpy(),
            pairs.scored[:, 0],
        ).save(self.results / "scores" / f"{self.name}.npz")

    def _references(self, method: Method, seed: int, rate: float) -> torch.Tensor:
        if {SFT, EXPERT} & set(method.references):
            self.make_specialists()
        if SELF in method.references:
            self.world.ref_logps[SELF] = self._self_trained(seed, rate)
        return self.world.references(method.references)

    def _self_trained(self, seed: int, rate: float) -> torch.Tensor:
        """Pre-DPO's guide: the log-probs of the policy that DPO on the anchor made of the same pairs; NaN where nobody asks."""
        rows, method = training_rows(self.world, seed, self.plan.train), METHODS["dpo-anchor"]
        references = combine(self.world.references((ANCHOR,)), method.objective())
        self.runner.train(rows, references, method.objective(), seed=seed, learning_rate=rate)
        guide_N2 = torch.full_like(self.world.ref_logps[ANCHOR], torch.nan)
        guide_N2[torch.from_numpy(rows)] = self.runner.score(rows)
        return guide_N2

    def run(self, name: str, seed: int, command: str) -> None:
        """Train, score the held-out pairs and write the JSON, unless it is there."""
        path = run_file(self.results, self.set_name + self.variant, self.direction.name, name, seed)
        if path.exists():
            return
        method, world, began = METHODS[name], self.world, time.perf_counter()
        rate = self.learning_rate(HIGH_RATES, HIGH) if self.variant.endswith(HIGH) else self.learning_rate()
        everything = self.variant.startswith(ALL)
        ref_logps = self._references(method, seed, rate)
        validation = torch.from_numpy(world.rows("validation"))
        length_N = torch.from_numpy(world.pairs.scored[:, 0]).float()
        references = combined(method, ref_logps, validation, length_N[:, 0] - length_N[:, 1])
        weights = weights_of(method, ref_logps[:, validation])
        count = len(world.rows("pool")) if everything else self.plan.train
        rows = training_rows(world, seed, count)
        if everything:
            rows = np.union1d(rows, world.rows("specialists"))
        trained = self.runner.train(
            rows,
            references,
            method.objective(weights),
            seed=seed,
            learning_rate=rate,
            epochs=1 if everything else EPOCHS,
        )
        parts = ("validation", "test", "final") if name in JUDGED else ("test",)
        scored = {part: self.runner.score(world.rows(part)) for part in parts}
        write_json(
            path,
            {
                "method": name, "seed": seed, "set": self.set_name + self.variant, "direction": self.direction.name,
                "learning_rate": rate, "layers": self.direction.layers, "dtype": "bf16 autocast" if self.bf16 else "float32",
                "train_pairs": len(rows), "steps": len(trained.losses), "weights": weights,
                "first_loss": trained.losses[0], "last_loss": trained.losses[-1], "largest_loss": max(trained.losses),
                "cpu_seconds": round(trained.cpu_seconds, 1), "seconds": round(time.perf_counter() - began, 1),
                "command": command, "commit": commit(), "machine": machine(),
                "margins": {part: packed(margins(logps).numpy()) for part, logps in scored.items()},
            },
        )  # fmt: skip
        print(
            f"{time.strftime('%H:%M:%S')} {self.name}{self.variant} {name} seed {seed}: loss "
            f"{trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}, {trained.cpu_seconds:.0f} s of CPU to train",
            flush=True,
        )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", required=True, choices=SETS)
    parser.add_argument("--direction", required=True, choices=DIRECTIONS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", default="/work/models", help="folder with smollm2 and gemma3")
    parser.add_argument("--data", default="../shared/data", type=Path)
    parser.add_argument("--work", default="runs/evidence", type=Path, help="scores and hidden states, not kept in git")
    parser.add_argument("--results", default=RESULTS, type=Path)
    parser.add_argument("--layers", type=int, help="upper layers that train; default: the plan's")
    parser.add_argument("--bf16", action="store_true", help="autocast, for runs and their scores")
    parser.add_argument(
        "--variant", default="", choices=["", HIGH, "-full", ALL, ALL + HIGH, "-bf16"], help="a name for other settings"
    )
    parser.add_argument(
        "--together", type=int, default=100, help="so many methods, all their seeds, before the next ones"
    )
    parser.add_argument(
        "--scores_only", type=int, metavar="PAIRS", help="score so many pairs, drawn by chance; train nothing"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    direction = DIRECTIONS[args.direction]
    if args.layers is not None:
        direction = Direction(direction.name, direction.policy, direction.other, args.layers)
    models = {name: str(Path(args.models) / name) for name in ("smollm2", "gemma3")}
    plan = SETS[args.set]
    if args.scores_only:
        plan = replace(plan, parts={"pool": args.scores_only})
    study = Study(
        args.set,
        plan,
        direction,
        models,
        args.data,
        args.work,
        args.results,
        bf16=args.bf16,
        variant=args.variant,
    )
    print(
        study.name,
        study.world.counts,
        {str(p): int((study.world.part_N == p).sum()) for p in np.unique(study.world.part_N)},
        flush=True,
    )
    if args.scores_only:
        study.save_scores()
        return
    study.keep_scores()
    command = shlex.join(["python", "-m", "benchmarks.evidence.run", *(sys.argv[1:] if argv is None else argv)])
    for start in range(0, len(args.methods), args.together):
        for seed in args.seeds:
            for method in args.methods[start : start + args.together]:
                study.run(method, seed, command)


if __name__ == "__main__":
    main()
