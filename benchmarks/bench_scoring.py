"""Reference log-probs of real pairs: `mrpo score` against TRL's `precompute_ref_log_probs`, same model, pairs, dtype and threads.

    pip install 'mrpo-scale[bench]'
    python benchmarks/bench_scoring.py --model models/smollm2 --pairs pairs.json --output benchmarks/results/scoring-cpu.json

One process takes turns, TRL first in every other round, each round from an empty cache. The clock runs from the tokenized data set
to the log-probs on disk; loading, tokenizing and hashing the model are outside for both. Tokens are what the pairs have in the
model's tokenizer, prompt counted twice, whatever a program computes: the same number for both. First the two are compared pair
by pair: a program that is fast and wrong is not fast.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
from against_trl import run_benchmark
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.models.plan import plan_models
from mrpo_scale.references import precompute as ahead
from mrpo_scale.references.stores import open_stores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--pairs", required=True, help="pairs in any layout that is known here")
    parser.add_argument("--num_pairs", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl_batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="TRL is timed at its best")
    parser.add_argument("--tokens_per_forward", type=int, default=4096)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    run_benchmark(flags, measure, print_table)


def measure(flags: argparse.Namespace, work: Path) -> dict:
    ours = Ours(flags, work)
    theirs = Theirs(flags, ours.text_rows())
    batch_size, tried = theirs.best_batch_size(flags.trl_batch_sizes)
    got, expected = ours.score(), theirs.score(batch_size)
    difference = ((got - expected) / expected).abs().max().item()
    if difference > 1e-4:
        raise SystemExit(f"the two disagree by {difference:.1e} relative: nothing to compare")
    seconds: dict[str, list[float]] = {"mrpo_scale": [], "trl": []}
    for i in range(flags.rounds):
        turns = [("mrpo_scale", ours.score), ("trl", lambda: theirs.score(batch_size))]
        for name, run in turns if i % 2 else turns[::-1]:
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    tokens = int(ours.pairs.lengths[:, 0].dot([2, 1, 1]).sum())
    ratios = [t / o for t, o in zip(seconds["trl"], seconds["mrpo_scale"], strict=True)]
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": flags.threads},
        "versions": {"torch": torch.__version__, "trl": theirs.version},
        "model": Path(flags.model).name,
        "pairs": len(ours.pairs),
        "tokens": tokens,
        "max_length": flags.max_length,
        "largest_relative_difference": difference,
        "trl_batch_size": batch_size,
        "trl_batch_sizes_tried": tried,
        "tokens_per_forward": flags.tokens_per_forward,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / statistics.median(s) for name, s in seconds.items()},
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
    }


class Ours:
    """`mrpo score` without its command line: the same functions."""

    def __init__(self, flags: argparse.Namespace, work: Path) -> None:
        self.work = work
        self.args = MRPOConfig(
            output_dir=str(work),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            max_length=flags.max_length,
            max_bad_rows=0.9,
            disable_tqdm=True,
            ref_cache_dir=str(work / "cache"),
            ref_tokens_per_forward=flags.tokens_per_forward,
            bf16=False,
        )
        self.plan = plan_models(flags.model, [], self.args, None)
        self.pairs = self._first_good(flags)
        self.stores = open_stores(self.plan, self.args, {"train": self.pairs})
        self.reference = ahead.load_reference(self.plan.references[0], None, self.args)

    def _first_good(self, flags: argparse.Namespace) -> PairDataset:
        """The first pairs that fit uncut, so that both programs score the same tokens."""
        from mrpo_scale.data import load_rows

        rows, _ = load_rows(flags.pairs)
        everything = prepare_sets(self.plan, self.args, rows, None)["train"]
        whole = [i for i in range(len(everything)) if everything.cut(i) == (False, False)][: flags.num_pairs]
        return prepare_sets(self.plan, self.args, rows.select([everything.source_row(i) for i in whole]), None)["train"]

    def text_rows(self) -> list[dict[str, str]]:
        """Prompt and responses as the model reads them, ids turned back into nothing but themselves: TRL gets the very tokens."""
        return [
            {"prompt_ids": t.prompt_ids, "chosen_ids": t.chosen_ids, "rejected_ids": t.rejected_ids}
            for t in (self.pairs.tokens(i)[0] for i in range(len(self.pairs)))
        ]

    def score(self) -> torch.Tensor:
        """[P, 2] from an empty cache, read back from disk."""
        shutil.rmtree(self.work / "cache", ignore_errors=True)
        (store,) = open_stores(self.plan, self.args, {"train": self.pairs})
        store.prepare_to_write()
        ahead.fill(self.reference, store, {"train": self.pairs}, self.args)
        return torch.from_numpy(store.lookup(self.pairs.row_keys).logps_N2)


class Theirs:
    """TRL's DPOTrainer; the part of it that `precompute_ref_log_probs` runs."""

    def __init__(self, flags: argparse.Namespace, rows: list[dict]) -> None:
        try:
            import trl
        except ImportError:
            raise SystemExit("TRL is not installed: pip install 'mrpo-scale[bench]'") from None
        self.version = trl.__version__
        datasets.disable_caching()  # or the second round reads the first one's file
        self.rows = datasets.Dataset.from_list(rows)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = trl.DPOTrainer(
                AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32),
                args=trl.DPOConfig(
                    output_dir=folder,
                    use_cpu=not torch.cuda.is_available(),
                    report_to="none",
                    bf16=False,
                    max_length=None,
                ),
                train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
                processing_class=AutoTokenizer.from_pretrained(flags.model),
            )
        self.trainer._precompute_model_hash = "the model"  # hashing it is outside the clock for both

    def score(self, batch_size: int) -> torch.Tensor:
        """[P, 2]"""
        scored = self.trainer._precompute_ref_logps(self.rows, "train", batch_size)
        return torch.tensor([scored["ref_chosen_logps"][:], scored["ref_rejected_logps"][:]]).T

    def best_batch_size(self, sizes: list[int]) -> tuple[int, dict[str, float]]:
        """The fastest of ``sizes``, from one run each after one that warms up."""
        self.score(sizes[0])
        tried = {}
        for size in sizes:
            started = time.perf_counter()
            self.score(size)
            tried[str(size)] = time.perf_counter() - started
        return int(min(tried, key=lambda size: tried[size])), tried


def print_table(result: dict) -> None:
    speed = result["tokens_per_second"]
    print(
        f"\n{result['model']}, {result['pairs']} pairs, {result['tokens']} tokens, {result['machine']['threads']} threads"
    )
    print(f"largest relative difference of a log-prob: {result['largest_relative_difference']:.1e}")
    print(
        f"  TRL {result['versions']['trl']}, precompute_ref_batch_size {result['trl_batch_size']}: {speed['trl']:.0f} tokens/s"
    )
    print(f"  mrpo_scale: {speed['mrpo_scale']:.0f} tokens/s")
    low, high = min(result["ratios"]), max(result["ratios"])
    print(f"  ratio {result['ratio_median']:.2f} (median of {len(result['ratios'])} rounds, {low:.2f} to {high:.2f})\n")


if __name__ == "__main__":
    main()
