"""One epoch of DPO: this project at K=1 against TRL's DPOTrainer; same pairs, model, dtype, batch, optimizer and threads.

    pip install 'mrpo-scale[bench]'
    python benchmarks/against_trl.py --model models/smollm2 --pairs pairs.json --output benchmarks/results/against-trl.json

Every run is a process of its own, so that its peak resident memory (VmHWM, from start to end) is its own; the two programs take
turns, so that a busy machine slows both. The clock is around ``trainer.train()``: one epoch, the reference's forwards inside it
when they are live, optimizer, clipping and logging of every step included; imports, loading and tokenizing are outside. Both read
the very same token ids, in the same order, and both report the loss, the two log-probs and the gradient norm of every step: if
these differ, there is nothing to compare and the benchmark stops.

With ``--dtype bfloat16`` both train float32 weights under autocast, and TRL's reference is computed so as well, while ours holds
bfloat16 weights.

With ``--flops`` the products of an epoch are counted in both (torch's counter, a run of its own), and how many a second this
processor makes of them, with one thread and with all: what their quotient says is the least time that the epoch can take here.

The pairs are the first ``--num_pairs`` whose two sides (prompt + response) fit ``--max_length`` uncut. TRL runs with what is
fastest for it here: its chunked head is always on; its Liger kernels need a GPU, its padding-free batches are switched off in 1.16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

PROGRAMS = ("mrpo_scale", "trl")
COMPARED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
#: Relative, of any step's figure: float32 sums of thousands of tokens in another order; bfloat16 rounds each product, and where a
#: program rounds differs (TRL's head multiplies in bfloat16, ours in float32).
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--pairs", required=True, help="pairs in any layout that is known here")
    parser.add_argument("--num_pairs", type=int, default=16, help="fewer make a round shorter")
    parser.add_argument(
        "--dtype", choices=list(LARGEST_DIFFERENCE), default="float32", help="bfloat16: mixed precision, in both"
    )
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--pairs_per_step", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scoring", nargs="+", choices=["live", "precomputed"], default=["live", "precomputed"])
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations, in both")
    parser.add_argument(
        "--flops", action="store_true", help="count both programs' products and measure the processor's rate"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one_run", nargs=2, metavar=("PROGRAM", "SCORING"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one_run:
        program, scoring = flags.one_run
        one_run(flags, program, scoring)
        return
    run_benchmark(flags, measure, print_table)


def run_benchmark(
    flags: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    print_table: Callable[[dict[str, Any]], None],
) -> None:
    """Measure in a folder that is gone afterwards; print the table; write ``flags.output``, if it names a file."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        result = measure(flags, Path(work))
    print_table(result)
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps(result, indent=2) + "\n")


# ---- the comparison ----------------------------------------------------------------------------------------------------


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Alternating runs of both programs in processes of their own."""
    from mrpo_scale.config.hardware import bf16_instructions

    tokens = child(flags, work, "prepare", "pairs")
    runs: dict[str, dict[str, list[dict]]] = {s: {p: [] for p in PROGRAMS} for s in flags.scoring}
    turns = [(s, p) for i in range(flags.rounds) for s in flags.scoring for p in PROGRAMS[:: 1 if i % 2 else -1]]
    for scoring, program in tqdm(turns, desc="Runs"):
        runs[scoring][program].append(child(flags, work, program, scoring))
    counted: dict[str, Any] = {}
    if flags.flops:
        counted["rates"] = child(flags, work, "rate", "products")
        counted["flops"] = {
            s: {p: child(flags, work, p, s, "--flops")["flops"] for p in PROGRAMS} for s in flags.scoring
        }
    difference = max(largest_difference(programs) for programs in runs.values())
    if not difference <= LARGEST_DIFFERENCE[flags.dtype]:
        raise SystemExit(f"the two disagree by {difference:.1e} relative: nothing to compare")
    return {
        "machine": {
            "name": processor_name(),
            "host": platform.platform(),
            "threads": flags.threads,
            "load_average": os.getloadavg(),
        },
        "versions": runs[flags.scoring[0]]["trl"][0]["versions"],
        "model": Path(flags.model).name,
        "dtype": flags.dtype,
        "bf16_instructions": bf16_instructions(),
        "gradient_checkpointing": flags.gradient_checkpointing,
        "pairs": flags.num_pairs,
        "pairs_per_step": flags.pairs_per_step,
        "max_length": flags.max_length,
        **tokens,
        "largest_relative_difference": difference,
        "ratios": {scoring: ratios(programs) for scoring, programs in runs.items()},
        **counted,
        "runs": runs,
    }


def child(flags: argparse.Namespace, work: Path, program: str, scoring: str, *more: str) -> dict[str, Any]:
    """One run in a process of its own; what it reports."""
    command = [sys.executable, __file__, "--one_run", program, scoring, "--work", str(work)]
    for key in ("model", "pairs", "num_pairs", "max_length", "pairs_per_step", "threads", "dtype"):
        command += [f"--{key}", str(getattr(flags, key))]
    command += [*more, *["--gradient_checkpointing"] * flags.gradient_checkpointing]
    threads = {"OMP_NUM_THREADS": str(flags.threads), "MKL_NUM_THREADS": str(flags.threads)}
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    report = work / "report.json"
    if done.returncode or not report.exists():
        raise SystemExit(f"{program} ({scoring}) failed:\n{done.stdout.decode()[-4000:]}")
    figures = json.loads(report.read_text())
    report.unlink()
    return figures


def largest_difference(programs: dict[str, list[dict]]) -> float:
    """Of any step's figures between any two runs, relative."""
    first = programs["trl"][0]["steps"]
    return max(
        abs(step[key] - expected[key]) / abs(expected[key])
        for runs in programs.values()
        for run in runs
        for step, expected in zip(run["steps"], first, strict=True)
        for key in COMPARED
    )


def ratios(programs: dict[str, list[dict]]) -> dict[str, Any]:
    """This project over TRL, round by round, and the medians."""
    rounds = list(zip(programs["mrpo_scale"], programs["trl"], strict=True))
    both = {key: [ours[key] / theirs[key] for ours, theirs in rounds] for key in ("seconds", "peak_rss_gib")}
    return {key: {"median": statistics.median(values), "rounds": values} for key, values in both.items()}


def processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['model']}, {result['pairs']} pairs, {result['pairs_per_step']} per step, {result['dtype']}, "
        f"{result['machine']['threads']} threads of {result['machine']['name']}, gradient checkpointing "
        f"{'on' if result['gradient_checkpointing'] else 'off'}"
    )
    print(f"tokens: {result['tokens']}; largest relative difference of a step's figures: ", end="")
    print(f"{result['largest_relative_difference']:.1e}\n")
    print(f"{'':24}{'seconds per epoch':>24}{'peak RSS, GiB':>24}")
    for scoring, programs in result["runs"].items():
        for program, runs in programs.items():
            cells = [" ".join(f"{run[key]:.4g}" for run in runs) for key in ("seconds", "peak_rss_gib")]
            print(f"{scoring + ', ' + program:24}{cells[0]:>24}{cells[1]:>24}")
        found = result["ratios"][scoring]
        cells = [f"{found[key]['median']:.3f}x" for key in ("seconds", "peak_rss_gib")]
        print(f"{'  median ratio':24}{cells[0]:>24}{cells[1]:>24}")
    if "flops" in result:
        rate = max(max(by_threads.values()) for by_threads in result["rates"].values())
        print(f"\nGFLOP/s by library and threads: {result['rates']}")
        for scoring, flops in result["flops"].items():
            ours, theirs = (flops[program] / 1e9 for program in PROGRAMS)
            print(
                f"{scoring}: {ours:.0f} GFLOP of {theirs:.0f}, {ours / theirs:.3f}x; at that rate {ours / rate:.1f} s"
            )
    print()


# ---- one run, in its own process ---------------------------------------------------------------------------------------


def one_run(flags: argparse.Namespace, program: str, scoring: str) -> None:
    """Write work/report.json: what `program` took for the epoch, or, for `prepare`, which pairs that epoch has."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(flags.threads)
    if program == "prepare":
        report = prepare(flags)
    elif program == "rate":
        report = product_rates(flags.model, flags.threads)
    else:
        trainer = {"mrpo_scale": our_trainer, "trl": trl_trainer}[program](flags, scoring)
        with FlopCounterMode(display=False) if flags.flops else nullcontext() as counter:
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
        # Counting slows the run: its clock says nothing.
        report = {"flops": counter.get_total_flops()} if counter else {"seconds": seconds, **figures_of(trainer)}
    (flags.work / "report.json").write_text(json.dumps(report))


def product_rates(model: str, threads: int, rows: int = 2048, seconds: float = 3.0) -> dict[str, Any]:
    """GFLOP/s of the float32 product of ``rows`` positions with the model's MLP, {library: {threads: median over some seconds}}."""
    import torch
    from mrpo_kernels.cpu_linear import fast, fast_product
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    x, weight = torch.randn(rows, config.hidden_size), torch.randn(config.intermediate_size, config.hidden_size)
    ways = {"MKL": torch.nn.functional.linear} | ({"oneDNN": fast_product} if fast(x, weight) else {})
    found: dict[str, Any] = {name: {} for name in ways}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        for name, product in ways.items():
            taken, until = [], time.perf_counter() + seconds
            while time.perf_counter() < until:
                started = time.perf_counter()
                product(x, weight)
                taken.append(time.perf_counter() - started)
            found[name][str(count)] = 2 * x.numel() * len(weight) / statistics.median(taken) / 1e9
    return found


def figures_of(trainer: Any) -> dict[str, Any]:
    import torch
    import transformers
    import trl

    from mrpo_scale.base.device import peak_memory_gib

    steps = [
        {k: v for k, v in entry.items() if k in COMPARED} for entry in trainer.state.log_history if "loss" in entry
    ]
    return {
        "peak_rss_gib": peak_memory_gib(torch.device("cpu")),
        "steps": steps,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def prepare(flags: argparse.Namespace) -> dict[str, Any]:
    """Choose the pairs; write their rows for this project and their token ids for TRL."""
    from mrpo_scale.config.keys import MRPOConfig
    from mrpo_scale.data import load_rows
    from mrpo_scale.data.inputs import prepare_sets
    from mrpo_scale.models.plan import plan_models

    args = MRPOConfig(**common(flags, "prepare"), max_length=flags.max_length, max_bad_rows=1.0)
    plan = plan_models(flags.model, [], args, None)
    rows, _ = load_rows(flags.pairs)
    everything = prepare_sets(plan, args, rows, None)["train"]
    whole = [i for i in range(len(everything)) if everything.cut(i) == (False, False)][: flags.num_pairs]
    if len(whole) < flags.num_pairs:
        raise SystemExit(f"{flags.pairs} holds {len(whole)} pairs that fit {flags.max_length} tokens; see --num_pairs")
    rows.select([everything.source_row(i) for i in whole]).to_json(flags.work / "rows.jsonl")
    pairs = [everything.tokens(i)[0] for i in whole]
    ids = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    (flags.work / "ids.json").write_text(json.dumps(ids))
    tokens = {name.removesuffix("_ids"): sum(len(pair[name]) for pair in ids) for name in ids[0]}
    return {"tokens": tokens}


def common(flags: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What both programs are told; everything else is TrainingArguments' default in both."""
    import torch

    return {
        "output_dir": str(flags.work / folder),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": flags.dtype == "bfloat16",
        "per_device_train_batch_size": flags.pairs_per_step,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "beta": 0.1,
        "gradient_checkpointing": flags.gradient_checkpointing,
        "disable_dropout": True,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def our_trainer(flags: argparse.Namespace, scoring: str) -> Any:
    from mrpo_scale.config.keys import MRPOConfig
    from mrpo_scale.data import load_rows
    from mrpo_scale.training.trainer import MRPOTrainer

    shutil.rmtree(flags.work / "mrpo_scale", ignore_errors=True)  # the last run's reference scores
    rows, _ = load_rows(str(flags.work / "rows.jsonl"))
    args = MRPOConfig(
        **common(flags, "mrpo_scale"),
        max_length=flags.max_length,
        ref_scoring="precompute" if scoring == "precomputed" else "live",
    )
    return MRPOTrainer(flags.model, args=args, train_dataset=rows)


def trl_trainer(flags: argparse.Namespace, scoring: str) -> Any:
    import datasets
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets.disable_caching()
    precompute = scoring == "precomputed"
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32),
        args=trl.DPOConfig(**common(flags, "trl"), max_length=None, precompute_ref_log_probs=precompute),
        # A row for the constructor; the rows of the epoch come as token ids, the same that the other program reads.
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(flags.model),
    )
    rows = datasets.Dataset.from_list(json.loads((flags.work / "ids.json").read_text()))
    trainer.train_dataset = trainer._precompute_ref_logps(rows, "train", flags.pairs_per_step) if precompute else rows
    return trainer


if __name__ == "__main__":
    main()
