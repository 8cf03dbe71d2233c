"""What it is worth to deal a window's pairs over the ranks by length: simulated for many ranks, measured on a few.

    python -m benchmarks.dealing [--pairs preferences-en-300.json] [--ranks 4] [--output benchmarks/results/dealing-cpu.json]

**Simulated**: the part of the time in which the mean rank works, where all wait for the slowest in each micro-batch: as pairs were
dealt before (chance says which rank gets which, and a rank sorts its own), as they are dealt now, and cut by a token budget that
the longest pairs need anyhow. Lengths are log-normal, sigma 0.6, at most 2.5 medians; or those of ``--pairs``, in the tokens of a
tokenizer of 4,096 words that is made from them.

**Measured**: ranks under ZeRO-3 on gloo train every window twice, in the old order and in the new, by turns; `learning_rate: 0`, so
both find the same weights, and losses and gradient norms must agree. The ratio is new over old, window by window. Two clocks:
``wall``, which shows what idle ranks cost only where every rank has a core of its own; and ``critical path``, the sum over
micro-batches of the CPU seconds of the rank that needs most: the step of a machine with a core for each rank, whatever else runs
on this one. ``--cores_per_rank 0.5`` gives each rank a speed of its own (cpu_quota.py, needs root), so that the wall clock shows
it too. Needs the clone: words and tokenizer are those of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from benchmarks.against_trl import processor_name
from benchmarks.cpu_quota import cpu_quota
from mrpo_scale.base.ranks import all_gather_object, world_group
from mrpo_scale.base.tables import aligned_table
from mrpo_scale.bench.results import estimate
from mrpo_scale.bench.trainer import Listed
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.dealing import Dealt, WindowShape, deal, efficiency
from mrpo_scale.training.trainer import MRPOTrainer

ROOT = Path(__file__).parents[1]
SIGMA, CAP = 0.6, 2.5  #: of the log-normal lengths; the longest is so many medians
#: Ranks, pairs of a micro-batch, micro-batches of a step.
SHAPES = (WindowShape(8, 2, 4), WindowShape(64, 1, 8), WindowShape(256, 1, 2))
POLICY = {"hidden_size": 320, "intermediate_size": 880, "num_hidden_layers": 4, "vocab_size": 2048}
MEDIAN = 960  #: tokens of a pair that is trained; at half of it gloo and the optimizer are a third of a step
LARGEST_DIFFERENCE = 1e-5  #: relative, of a window's loss and gradient norm between the two orders; float32 sums


def as_drawn(lengths_N: np.ndarray, shape: WindowShape) -> Dealt:
    """As it was until November 2026: chance deals the pairs to the ranks, and each sorts its own."""
    share_RL = np.arange(shape.size).reshape(shape.accumulation, shape.ranks, shape.pairs).swapaxes(0, 1)
    share_RL = share_RL.reshape(shape.ranks, -1)
    order_RL = np.argsort(-lengths_N[share_RL], axis=1, kind="stable")
    parts = [slice(i, i + shape.pairs) for i in range(0, share_RL.shape[1], shape.pairs)]
    return Dealt(np.take_along_axis(share_RL, order_RL, 1), parts)


# ---- simulated ---------------------------------------------------------------------------------------------------------


def log_normal(rng: np.random.Generator, count: int, median: int = 400) -> np.ndarray:
    return np.minimum(rng.lognormal(np.log(median), SIGMA, count), CAP * median).round()


def simulate(draw: Any, shape: WindowShape, windows: int = 100) -> dict[str, Any]:
    """Efficiencies over some windows whose lengths ``draw(count)`` draws."""
    lengths = [draw(shape.size) for _ in range(windows)]
    longest = int(max(lengths_N.max() for lengths_N in lengths)) * shape.pairs
    budget = WindowShape(shape.ranks, shape.pairs, shape.accumulation, max_tokens=longest)
    found = {
        "drawn": [as_drawn(lengths_N, shape) for lengths_N in lengths],
        "dealt": [deal(lengths_N, shape) for lengths_N in lengths],
        "budget": [deal(lengths_N, budget) for lengths_N in lengths],
    }
    means: dict[str, Any] = {
        name: float(np.mean([efficiency(one.loads(n)) for one, n in zip(dealt, lengths, strict=True)]))
        for name, dealt in found.items()
    }
    shown = {"ranks": shape.ranks, "micro_batches": shape.accumulation, "pairs": shape.pairs}
    fewer = float(np.mean([len(one.micro_batches) for one in found["budget"]]))
    return {**shown, **means, "budget_tokens": longest, "budget_micro_batches": fewer}


def real_lengths(path: Path, max_length: int = 1024) -> np.ndarray:
    """Tokens of each pair, its prompt once, in the words of a tokenizer that is trained on the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mrpo_scale.data import find_layout
    from mrpo_scale.data.loading import load_rows
    from mrpo_scale.data.model_text import ModelText
    from mrpo_scale.data.pair_dataset import prepare_pairs

    rows, _ = load_rows(str(path))
    layout = find_layout(rows)
    texts = [text for row in rows for pair in [layout.to_pair(row)] for text in (pair.chosen, pair.rejected)]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}assistant: "
    pairs = prepare_pairs(
        rows, layout, [ModelText(words, name="policy", max_context=None)], max_length=max_length, max_bad_rows=0.5
    )
    return pairs.lengths[:, 0].sum(1)


def simulations(pairs: Path | None) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = [{"lengths": "log-normal", **simulate(lambda n: log_normal(rng, n), shape)} for shape in SHAPES]
    if pairs is not None:
        real_N = real_lengths(pairs)
        for shape in SHAPES:
            drawn = simulate(lambda n: rng.choice(real_N, n, replace=n > len(real_N)), shape)
            found.append({"lengths": pairs.name, **drawn})
    return found


# ---- measured ----------------------------------------------------------------------------------------------------------


class Paired(MRPOTrainer):
    """Trains each window in both orders, by turns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.orders: list[str] = []
        self.measured: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        sampler: Any = super()._get_train_sampler(train_dataset)
        draws = []
        for i, window in enumerate(sampler.windows()):
            lengths_N = sampler.lengths_N[[draw.row for draw in window]]
            found = {"drawn": as_drawn(lengths_N, sampler.shape), "dealt": deal(lengths_N, sampler.shape)}
            for order in list(found)[:: 1 if i % 2 else -1]:
                self.orders.append(order)
                draws += sampler.arranged(window, found[order])
        return Listed(draws)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.measured.append({"cpu": [], "tokens": []})
        started = time.thread_time()
        found = super().get_batch_samples(*args, **kwargs)
        self.measured[-1]["cpu"].append(time.thread_time() - started)
        return found

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        started = time.thread_time()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.measured[-1]["cpu"].append(time.thread_time() - started)
        self.measured[-1]["tokens"] += [batch.pairs.num_tokens for batch in inputs]
        return loss


def write_pairs(path: Path, count: int) -> None:
    """Rows whose tokens are log-normal together, a third of them the prompt's."""
    from tests.tiny import WORDS, tokenizer

    words, rng = random.Random(0), np.random.default_rng(1)
    per_word = len(tokenizer(None, 280)(" ".join(WORDS), add_special_tokens=False).input_ids) / len(WORDS)

    def text(tokens: float) -> str:
        return " ".join(words.choices(WORDS, k=max(1, round(tokens / per_word))))

    lines = [
        json.dumps({part: text(tokens / 3) for part in ("prompt", "chosen", "rejected")})
        for tokens in log_normal(rng, count, MEDIAN)
    ]
    path.write_text("\n".join(lines) + "\n")


def both_orders(trainer: Paired) -> list[dict[str, Any]]:
    """Train, and what this rank has measured in each step."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [
        {**measured, "order": order, "wall": wall, "loss": entry["loss"], "grad_norm": entry["grad_norm"]}
        for measured, order, wall, entry in zip(trainer.measured, trainer.orders, trainer.clock.steps, log, strict=True)
    ]


def rank(folder: Path, flags: argparse.Namespace) -> None:
    """One rank of the launcher. The first window warms up."""
    import datasets
    from transformers import PrinterCallback

    config = config_of(folder, flags.pairs_per_micro_batch, flags.micro_batches, 1 + flags.windows)
    rows = datasets.Dataset.from_json(str(folder / "pairs.jsonl"), cache_dir=str(folder / f"cache{os.environ['RANK']}"))
    trainer = Paired(str(folder / "policy"), args=config, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    with cpu_quota(flags.cores_per_rank) if flags.cores_per_rank else nullcontext():
        steps = both_orders(trainer)[2:]
    everybody = all_gather_object(steps, world_group())
    if config.process_index == 0:
        (folder / "steps.json").write_text(json.dumps(everybody))


def config_of(folder: Path, pairs: int, micro_batches: int, windows: int, **keys: Any) -> MRPOConfig:
    return MRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=micro_batches,
        max_steps=2 * windows,
        learning_rate=0.0,
        objective="dpo",
        gradient_checkpointing=False,
        logging_steps=1,
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **keys,
    )


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks; ratios of new over old."""
    from benchmarks.validate_planner import write_model

    with tempfile.TemporaryDirectory(prefix="mrpo-dealing-") as name:
        folder = Path(name)
        write_model(folder / "policy", "llama", {**POLICY, "max_position_embeddings": 4096})
        size = flags.ranks * flags.micro_batches * flags.pairs_per_micro_batch
        write_pairs(folder / "pairs.jsonl", size * (1 + flags.windows))
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(flags.ranks)),
            *("--config_file", str(ROOT / "launch/accelerate/cpu_zero3.yaml"), "-m", "benchmarks.dealing"),
            *(f"--{key}={getattr(flags, key)}" for key in ("micro_batches", "pairs_per_micro_batch", "windows")),
            f"--folder={folder}",
            *([f"--cores_per_rank={flags.cores_per_rank}"] if flags.cores_per_rank else []),
        ]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ranks = json.loads((folder / "steps.json").read_text())
    return summarise(ranks) | {
        "ranks": flags.ranks,
        "micro_batches": flags.micro_batches,
        "pairs": flags.pairs_per_micro_batch,
        "cores_per_rank": flags.cores_per_rank,
    }


def summarise(ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of every rank's steps, two to a window."""
    steps = []
    for together in zip(*ranks, strict=True):
        cpu_RM = np.array([step["cpu"] for step in together])
        tokens_RM = np.array([step["tokens"] for step in together])
        steps.append(
            {
                **{key: together[0][key] for key in ("order", "loss", "grad_norm")},
                "wall": max(step["wall"] for step in together),
                "critical path": float(cpu_RM.max(0).sum()),
                "efficiency": efficiency(tokens_RM),
            }
        )
    windows = [sorted(steps[i : i + 2], key=lambda step: step["order"]) for i in range(0, len(steps), 2)]
    difference = max(abs(new[key] / old[key] - 1) for new, old in windows for key in ("loss", "grad_norm"))
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"the two orders disagree by {difference:.1e} relative: nothing to compare")
    return {
        "windows": len(windows),
        "largest_relative_difference": difference,
        "efficiency": {
            s["order"]: float(np.mean([w[i]["efficiency"] for w in windows])) for i, s in enumerate(windows[0])
        },
        "ratio": {key: estimate([new[key] / old[key] for new, old in windows]) for key in ("wall", "critical path")},
        "steps": steps,
    }


# ---- shown -------------------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    header = (
        "lengths",
        "ranks",
        "micro-batches",
        "pairs",
        "as drawn",
        "dealt",
        "by token budget",
        "micro-batches then",
    )
    rows = [
        (
            *(str(found[key]) for key in ("lengths", "ranks", "micro_batches", "pairs")),
            *(f"{found[key]:.3f}" for key in ("drawn", "dealt", "budget")), f"{found['budget_micro_batches']:.1f}",
        )
        for found in result["simulated"]
    ]  # fmt: skip
    print(aligned_table(header, rows))
    if measured := result.get("measured"):
        kept = ", ".join(f"{order} {value:.3f}" for order, value in measured["efficiency"].items())
        print(
            f"\n{measured['ranks']} ranks, {measured['windows']} windows in both orders; efficiency by tokens: {kept}"
        )
        print(f"losses and gradient norms agree to {measured['largest_relative_difference']:.1e}")
        for key, ratio in measured["ratio"].items():
            print(f"{key}, new over old: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, help="real pairs whose lengths are simulated too")
    parser.add_argument("--ranks", type=int, default=4, help="0: simulate only")
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--pairs_per_micro_batch", type=int, default=2)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--cores_per_rank", type=float, help="hold each rank to so much of a core; needs root")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    flags = parser.parse_args()
    if flags.folder:
        rank(flags.folder, flags)
        return
    result: dict[str, Any] = {"simulated": simulations(flags.pairs)}
    if flags.ranks:
        machine = {"name": processor_name(), "cores": os.cpu_count(), "host": platform.platform()}
        result |= {"machine": {**machine, "load_average": os.getloadavg()}, "measured": measure(flags)}
    show(result)
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
