"""What LoRA saves and costs beside full finetuning: peak memory of a rank and seconds of a step, the same pairs, references cached.

    python benchmarks/adapter_cost.py --model models/smollm2 --references models/gemma3 --pairs pairs.json \
        --output adapter-cost.json

Every run is a process of its own, or two with ZeRO-3 between them, so that its peak resident memory (VmHWM, from its start to the
end of the last step) is its own; the arms take turns, so that a busy machine slows all. A step's seconds go from its window to the
optimizer's end; each run's first step is left out, which allocates. References are scored once before: no run loads one. All arms
start from the same policy, so the loss of the first step must be the same, or the benchmark stops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from against_trl import processor_name, run_benchmark
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-6},
    "LoRA q, v": {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]},
    "LoRA all-linear": {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["all-linear"]},
}
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero3_cpu.json"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
}
ROW = (
    "| {layout} | {arm} | {trained:,} | {peak_rss_gib:.2f} | {memory_over_full:.2f} | {seconds_per_step:.2f} "
    "| {seconds_over_full:.2f} |"
)
WARM_UP = 3  #: steps left out: ZeRO-3 takes up to three times as long for its first and third
LARGEST_DIFFERENCE = 1e-4  #: relative, of the first loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--references", nargs="*", default=[], help="folders of references beside the anchor")
    parser.add_argument("--pairs", required=True, help="a JSON file of pairs in any layout that is known here")
    parser.add_argument("--pairs_per_step", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one_run", choices=[*ARMS, "score"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one_run:
        one_run(flags)
        return
    run_benchmark(flags, measure, print_table)


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Alternating runs of all arms; medians over ranks' steps and rounds."""
    started = time.perf_counter()
    job(flags, work, "score", 1)
    layouts = {"one process" if n == 1 else f"ZeRO-3 on {n} ranks": n for n in flags.ranks}
    runs: dict[str, dict[str, list[list[dict]]]] = {layout: {arm: [] for arm in ARMS} for layout in layouts}
    turns = [(way, a) for i in range(flags.rounds) for way in layouts for a in list(ARMS)[:: -1 if i % 2 else 1]]
    for layout, arm in tqdm(turns, desc="Runs"):
        runs[layout][arm].append(job(flags, work, arm, layouts[layout]))
    losses = [rank["losses"][0] for arms in runs.values() for some in arms.values() for ranks in some for rank in ranks]
    if max(losses) - min(losses) > LARGEST_DIFFERENCE * min(losses):
        raise SystemExit(f"the first losses differ: {losses}: nothing to compare")
    return {
        "machine": {"name": processor_name(), "host": platform.platform(), "load_average": os.getloadavg()},
        "model": Path(flags.model).name,
        "references": [Path(folder).name for folder in flags.references],
        "dtype": "float32",
        "gradient_checkpointing": True,
        "pairs_per_step": flags.pairs_per_step,
        "max_length": flags.max_length,
        "steps": flags.steps - WARM_UP,
        "rounds": flags.rounds,
        "arms": ARMS,
        "results": [row for layout, arms in runs.items() for row in summary(layout, arms)],
        "runs": runs,
        "seconds": time.perf_counter() - started,
    }


def summary(layout: str, arms: dict[str, list[list[dict]]]) -> list[dict[str, Any]]:
    """Of each arm: the rank that holds most, the median step, and both over full finetuning's."""
    rows: list[dict[str, Any]] = []
    for arm, runs in arms.items():
        memory = statistics.median(max(rank["peak_rss_gib"] for rank in ranks) for ranks in runs)
        step = statistics.median(seconds for ranks in runs for seconds in ranks[0]["seconds"][WARM_UP:])
        full = rows[0] if rows else {"peak_rss_gib": memory, "seconds_per_step": step}
        rows.append(
            {
                "layout": layout,
                "arm": arm,
                "trained": runs[0][0]["trained"],
                "peak_rss_gib": memory,
                "memory_over_full": memory / full["peak_rss_gib"],
                "seconds_per_step": step,
                "seconds_over_full": step / full["seconds_per_step"],
            }
        )
    return rows


def job(flags: argparse.Namespace, work: Path, arm: str, ranks: int) -> list[dict[str, Any]]:
    """One run in processes of its own; what each rank reports."""
    command = [
        sys.executable,
        __file__,
        "--one_run",
        arm,
        "--work",
        str(work),
        "--model",
        flags.model,
        "--pairs",
        flags.pairs,
    ]
    for key in ("pairs_per_step", "max_length", "steps"):
        command += [f"--{key}", str(getattr(flags, key))]
    command += ["--references", *flags.references]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env |= {**ZERO3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        with (work / f"log-{rank}").open("w") as log:
            started.append(subprocess.Popen(command, env={**env, **own}, stdout=log, stderr=subprocess.STDOUT))
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise SystemExit(f"{arm} on {ranks} failed:\n{(work / 'log-0').read_text()[-4000:]}")
    reports = [work / f"report-{rank}.json" for rank in range(ranks)]
    figures = [json.loads(report.read_text()) for report in reports]
    for report in reports:
        report.unlink()
    return figures


def one_run(flags: argparse.Namespace) -> None:
    """In a rank's process: train, and write what it took; or score the pairs once, for the cache that all others read."""
    import datasets
    from transformers import TrainerCallback

    from mrpo_scale import MRPOConfig, MRPOTrainer
    from mrpo_scale.models.adapter import count_parameters

    scores = flags.one_run == "score"
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    seconds: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            seconds.append(now - self.started)
            self.started = now

    rows = datasets.Dataset.from_list(json.loads(Path(flags.pairs).read_text()))
    args = MRPOConfig(
        output_dir=str(flags.work / f"run-{list(ARMS).index(flags.one_run) if not scores else flags.one_run}-{ranks}"),
        ref_cache_dir=str(flags.work / "cache"),
        ref_scoring="precompute",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=flags.pairs_per_step // ranks,
        max_steps=flags.steps,
        max_length=flags.max_length,
        max_bad_rows=1.0,  # prompts that leave no room; the same in all runs
        **{"learning_rate": 1e-4, **({} if scores else ARMS[flags.one_run])},
        logging_steps=1,
        save_strategy="no",
        resume_from_checkpoint="never",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = rows.select(range(min(len(rows), 4 * flags.pairs_per_step * flags.steps)))
    trainer = MRPOTrainer(flags.model, flags.references, args, rows, callbacks=[Watch()])
    if scores:
        (flags.work / "report-0.json").write_text("{}")
        return
    trainer.train()
    trained = count_parameters(trainer.policy)[1]
    report = {
        "peak_rss_gib": peak_rss() / 2**30,
        "seconds": seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "trained": trained,
    }
    (flags.work / f"report-{rank}.json").write_text(json.dumps(report))


def peak_rss() -> int:
    """Bytes, of this process since its start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def print_table(result: dict[str, Any]) -> None:
    """As docs/adapters.md has it."""
    for of in result["results"]:
        print(ROW.format(**of))
    print(f"{result['seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
