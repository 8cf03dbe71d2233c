"""`SCALE=small make evidence`: the whole study with three tiny models and pairs that are made here, from nothing.

    python -m benchmarks.evidence.small [--results FOLDER] [--seeds 0 1 2 3 4] [--methods ...]

It shows that the machinery runs and that its figures come again; it says nothing about real models. Compared with the table that is
kept in benchmarks/results/evidence/small: accuracies are shares of pairs, so they are equal or differ by whole pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import report
from benchmarks.evidence.run import Study
from benchmarks.evidence.study import METHODS, RESULTS, Direction, SetPlan
from mrpo_scale.data.toy_world import ToySettings, make_world

PLAN = SetPlan("train.jsonl", {"validation": 60, "test": 120, "final": 60, "specialists": 48, "pool": 96}, train=64)
DIRECTION = Direction("llama-from-qwen2", "llama", "qwen2", layers=99)
KEPT = RESULTS / "small" / "summary.json"


def run(
    work: Path, results: Path, seeds: Sequence[int], methods: Sequence[str], settings: ToySettings | None = None,
    plan: SetPlan = PLAN, command: str = "python -m benchmarks.evidence.small",
) -> None:  # fmt: skip
    """Make the world under ``work``, run what ``results`` lacks, write tables and pictures there."""
    world = make_world(work / "world", settings)
    models = {name: str(path) for name, path in world.models.items()}
    study = Study("toy", plan, DIRECTION, models, world.data_dir, work, results)
    for seed in seeds:
        for method in methods:
            study.run(method, seed, command)
    study.save_scores()
    report.main(["--results", str(results)])


def against_kept(results: Path, kept: Path = KEPT) -> str:
    """How many cells of the table are the kept ones, and the largest difference of the others."""
    if not kept.exists():
        return "no kept table to compare with"
    (mine,), (theirs,) = (json.loads(p.read_text())["worlds"] for p in (results / "summary.json", kept))
    old = {row["name"]: row for row in theirs["rows"] if row["seeds"]}
    new = {row["name"]: row for row in mine["rows"] if row["seeds"]}
    both = [name for name in new if name in old and new[name]["seeds"] == old[name]["seeds"]]
    gaps = [abs(new[name]["accuracy"] - old[name]["accuracy"]) for name in both]
    same = sum(gap < 1e-9 for gap in gaps)
    largest = max(gaps, default=0)
    return (
        f"{same} of {len(both)} cells have the kept accuracy to the last digit; the largest difference is {largest:.4f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="runs/evidence/small/work", type=Path)
    parser.add_argument("--results", default="runs/evidence/small/results", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    args = parser.parse_args(argv)
    run(args.work, args.results, args.seeds, args.methods)
    print(against_kept(args.results))


if __name__ == "__main__":
    main()
