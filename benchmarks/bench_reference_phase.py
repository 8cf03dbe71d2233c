"""The reference phase of a live step against the forwards it is made of: the same models, unsharded, over the same tokens.

    torchrun --nproc_per_node 2 benchmarks/bench_reference_phase.py --model models/smollm2 --ref_models models/gemma3 \\
        --pairs pairs.json --output benchmarks/results/reference-phase-cpu.json

Four ways to score the same pairs, in turns, each round in another order:

  references     what a step of MRPO does: tokens to batches, K models mapped or on shard groups, gathers, heads in one call
  whole here     each model whole on every rank, through this package: what is left out is sharding, and the one call for K heads
  same batches   each model whole on every rank, transformers' own body under no_grad over the very same packed rows, its own
                 head on the response positions only, log-softmax: the least that scoring these tokens takes; batches are made
                 outside the clock
  as in TRL      each model whole, two padded sequences per pair, logits of every position, log-softmax of the responses

A round's time is that of the slowest rank. First all four are compared pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from mrpo_scale.base.device import device_name
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data import load_rows
from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.window import PairExample, WeightedPairs
from mrpo_scale.logps.pair_batch import PairBatch, attention_mask, collate_pairs
from mrpo_scale.models.plan import plan_models
from mrpo_scale.objective import Objective
from mrpo_scale.references.scores import open_scores
from mrpo_scale.references.sharding import ShardedReference

REFERENCES, WHOLE, SAME, TRL = "references", "whole here", "same batches", "as in TRL"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the policy, whose starting weights are the anchor")
    parser.add_argument("--ref_models", nargs="*", default=[])
    parser.add_argument("--pairs", required=True, help="pairs in any layout that is known here")
    parser.add_argument("--pairs_per_rank", type=int, default=2)
    parser.add_argument(
        "--ref_shard_size", type=int, help="as in a recipe; by default CPUs map files that need no conversion"
    )
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-reference-phase-"))
    try:
        result = measure(flags, work)
    finally:
        shutil.rmtree(work)
    if result["rank"] == 0:
        del result["rank"]
        print_table(result)
        if flags.output:
            flags.output.parent.mkdir(parents=True, exist_ok=True)
            flags.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(flags: argparse.Namespace, work: Path) -> dict:
    ways = Ways(flags, work)
    scores = {name: score() for name, score in ways.all.items()}
    difference = max(
        ((scores[name] - scores[REFERENCES]) / scores[REFERENCES]).abs().max().item() for name in (WHOLE, SAME, TRL)
    )
    if difference > 1e-4:
        raise SystemExit(f"the ways disagree by {difference:.1e} relative: nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in ways.all}
    names = list(ways.all)
    for i in tqdm(range(flags.rounds), unit="round", disable=ways.args.process_index != 0):
        for name in names[i % 4 :] + names[: i % 4]:
            seconds[name].append(timed(ways.all[name]))
    ratios = {
        name: [mine / theirs for mine, theirs in zip(seconds[REFERENCES], seconds[name], strict=True)]
        for name in (WHOLE, SAME, TRL)
    }
    return {
        "rank": ways.args.process_index,
        "machine": {
            "name": device_name(ways.args.device),
            "cores": os.cpu_count(),
            "ranks": ways.args.world_size,
            "threads_per_rank": torch.get_num_threads(),
        },
        "versions": {"torch": torch.__version__},
        "models": [Path(reference.source.path).name for reference in ways.plan.references],
        "shard_group": [reference.model.group_size for reference in ways.scores.references.values()],
        "mapped": [reference.model.mapped for reference in ways.scores.references.values()],
        "pairs_per_rank": flags.pairs_per_rank,
        "positions": [batch.input_ids_BL.numel() for batch in ways.packed],
        "positions_as_in_trl": [batch.input_ids_BL.numel() for batch in ways.separate],
        "response_tokens": [len(batch.labels_T) for batch in ways.packed],
        "largest_relative_difference": difference,
        "seconds": seconds,
        "seconds_median": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_median": {f"references / {name}": statistics.median(values) for name, values in ratios.items()},
        "ratios": {f"references / {name}": values for name, values in ratios.items()},
    }


def timed(score: Callable[[], Tensor]) -> float:
    """Seconds of the slowest rank."""
    if dist.is_initialized():
        dist.barrier()
    started = time.perf_counter()
    score()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - started)
    if dist.is_initialized():
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item()


class Ways:
    """The pairs of this rank, and what scores them."""

    def __init__(self, flags: argparse.Namespace, work: Path) -> None:
        self.args = MRPOConfig(
            output_dir=str(work),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            max_length=flags.max_length,
            ref_shard_size=flags.ref_shard_size,
            max_bad_rows=0.9,
            disable_tqdm=True,
            bf16=False,
        )
        self.plan = plan_models(flags.model, flags.ref_models, self.args, None)
        rows, _ = load_rows(flags.pairs)
        self.pairs = prepare_sets(self.plan, self.args, rows, None)["train"]
        first = flags.pairs_per_rank * self.args.process_index
        examples = WeightedPairs(self.pairs)
        self.examples: list[PairExample] = [examples[first + i] for i in range(flags.pairs_per_rank)]
        self.scores = open_scores(self.plan, self.args, {"train": self.pairs})
        self.own = [ShardedReference(r.source, None, self.args.device) for r in self.plan.references]
        self.models = [self._whole(reference.source) for reference in self.plan.references]
        self.packed, self.separate = (self._batches(shared_prompt=shared) for shared in (True, False))
        self.all = {REFERENCES: self.references, WHOLE: self.whole_here, SAME: self.same_batches, TRL: self.as_in_trl}

    def references(self) -> Tensor:
        """[K, P, 2]"""
        return self.scores.score(self.examples, self.pairs, Objective()).ref_logps_KP2

    def whole_here(self) -> Tensor:
        tokens = [[e.tokens[r.tokenization] for e in self.examples] for r in self.plan.references]
        return torch.stack([m.score(m.batch(pairs)) for m, pairs in zip(self.own, tokens, strict=True)])

    @torch.no_grad()
    def same_batches(self) -> Tensor:
        return torch.stack([body_and_head(m, b) for m, b in zip(self.models, self.packed, strict=True)])

    @torch.no_grad()
    def as_in_trl(self) -> Tensor:
        return torch.stack([whole_forward(m, b) for m, b in zip(self.models, self.separate, strict=True)])

    def _whole(self, source) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=source.dtype)
        return model.eval().requires_grad_(False).to(self.args.device)

    def _batches(self, *, shared_prompt: bool) -> list[PairBatch]:
        return [
            collate_pairs([e.tokens[reference.tokenization] for e in self.examples], shared_prompt=shared_prompt).to(
                self.args.device
            )
            for reference in self.plan.references
        ]


def body_and_head(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """[P, 2] from one forward of the body over packed rows and the head on the response positions."""
    hidden_BLD = model.base_model(
        input_ids=batch.input_ids_BL,
        attention_mask=attention_mask(batch, model),
        position_ids=batch.position_ids_BL,
        use_cache=False,
    ).last_hidden_state
    logits_TV = model.get_output_embeddings()(hidden_BLD.flatten(0, 1)[batch.logit_index_T])
    return summed(logits_TV, batch)


def whole_forward(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """[P, 2] from the model's own logits of every position."""
    mask_BL = (batch.segment_BL >= 0).long()
    logits_BLV = model(input_ids=batch.input_ids_BL, attention_mask=mask_BL, use_cache=False).logits
    return summed(logits_BLV.flatten(0, 1)[batch.logit_index_T], batch)


def summed(logits_TV: Tensor, batch: PairBatch) -> Tensor:
    logps_T = logits_TV.float().log_softmax(-1).gather(1, batch.labels_T[:, None]).squeeze(1)
    return torch.segment_reduce(logps_T.double(), "sum", lengths=batch.cu_seqlens.diff().long()).view(-1, 2).float()


def print_table(result: dict) -> None:
    machine = result["machine"]
    print(
        f"\n{' + '.join(result['models'])}, {machine['name']}, {machine['ranks']} ranks of {machine['threads_per_rank']} "
        f"thread(s), shard groups of {max(result['shard_group'])}, {result['pairs_per_rank']} pairs each, "
        f"{len(result['seconds'][REFERENCES])} rounds"
    )
    print(f"largest relative difference of a log-prob: {result['largest_relative_difference']:.1e}")
    for name, seconds in result["seconds_median"].items():
        print(f"  {name:<13} {seconds:6.2f} s (median)")
    for name, ratio in result["ratio_median"].items():
        low, high = min(result["ratios"][name]), max(result["ratios"][name])
        print(f"  {name}: {ratio:.3f} (median of the rounds' ratios, {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
