"""What a step of KD and of RLHF costs over one of DPO and of MRPO: `mrpo train` of one recipe, objectives in turns.

    python benchmarks/sampled_cost.py --config quickstart --reward_model runs/reward [--steps 8] [--rounds 3] [-- --key value ...]

What stands behind ``--`` are further words for `mrpo train`. The recipe's `baselines` are left out. Every run is a process of
its own and all of them see the same pairs; a step's seconds are the run's own `time/step`, its first step left out. Samples are as
long as the policy makes them, at most `max_completion_length`; their mean length is in the result, since cost follows it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from against_trl import processor_name, run_benchmark
from tqdm.auto import tqdm

from mrpo_scale.config.recipe import find_recipe, read_recipe

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("time/step", "time/references", "time/samples", "sampled/length", "sampled/cut")
ROW = "| {objective} | {of_step:.2f} | {over_dpo:.2f} ({low:.2f} to {high:.2f}) | {samples:.2f} | {references:.2f} | {length} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", default=["dpo", "mrpo", "kd", "rlhf"], help="dpo first")
    parser.add_argument("--reward_model", help="of rlhf")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--config", default="quickstart", help="recipe")
    parser.add_argument("train", nargs="*", metavar="-- --key value", help="of `mrpo train`")
    run_benchmark(parser.parse_args(), measure, print_table)


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = read_recipe(find_recipe(flags.config))
    recipe.pop("baselines", None)
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    runs: dict[str, list[list[dict[str, float]]]] = {objective: [] for objective in flags.objectives}
    turns = [(i, name) for i in range(flags.rounds) for name in flags.objectives[:: -1 if i % 2 else 1]]
    for i, name in tqdm(turns, desc="Runs"):
        runs[name].append(train(flags, name, work / "recipe.yaml", work / f"{name}-{i}"))
    return {
        "machine": {"name": processor_name(), "host": platform.platform(), "load_average": os.getloadavg()},
        "threads": flags.threads,
        "command": [
            "mrpo",
            "train",
            "--config",
            flags.config,
            *(Path(word).name if word.startswith("/") else word for word in flags.train),
        ],
        "steps": flags.steps - 1,
        "rounds": flags.rounds,
        "results": {name: summary(name, runs) for name in runs},
        "runs": runs,
        "seconds": time.perf_counter() - started,
    }


def train(flags: argparse.Namespace, objective: str, recipe: Path, folder: Path) -> list[dict[str, float]]:
    """The figures of every step but the first."""
    own = {
        "objective": objective,
        "max_steps": flags.steps,
        "logging_steps": 1,
        "output_dir": folder,
        "disable_tqdm": True,
    }
    off = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "report_to": "none"}
    if objective != "mrpo":
        own["ref_weights"] = "uniform"
    if objective == "rlhf":
        own["reward_model"] = flags.reward_model
    words = [word for key, value in (own | off).items() for word in (f"--{key}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "mrpo_scale.cli", "train", "--config", str(recipe), *flags.train, *words]
    run = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode:
        raise SystemExit(f"{objective} failed:\n{run.stdout[-4000:]}")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "time/step" in entry]
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in steps[1:]]


def summary(name: str, runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians over steps and rounds; over DPO: of each round's median, with the least and the largest round."""

    def median(figure: str, rounds: list[list[dict[str, float]]]) -> float:
        return statistics.median(step.get(figure, 0.0) for steps in rounds for step in steps)

    ratios = [
        median("time/step", [own]) / median("time/step", [dpo])
        for own, dpo in zip(runs[name], runs["dpo"], strict=True)
    ]
    return {
        "of_step": median("time/step", runs[name]),
        "samples": median("time/samples", runs[name]),
        "references": median("time/references", runs[name]),
        "length": statistics.mean(step.get("sampled/length", 0.0) for steps in runs[name] for step in steps),
        "over_dpo": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def print_table(result: dict[str, Any]) -> None:
    print("| objective | s/step | over DPO | of it sampling | of it references | tokens of a sample |")
    for name, row in result["results"].items():
        print(ROW.format(objective=name, **row | {"length": f"{row['length']:.0f}" if row["length"] else ""}))
    print(f"{result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
