"""Predictions of the planner from 8 to 16,384 GPUs: policies of 8B, 70B and 405B with three references; engines of 1B to 405B, 2k
to 128k tokens, with references cached.

    python benchmarks/predict_scale.py [--gpu h100-80gb] [--network 400gbit] [--output benchmarks/results/predictions.json]

The models are the sizes of published ones, as config.json files in benchmarks/configs; no weights, tokenizers or data are read.
For each number of GPUs it takes the setting that `mrpo check` would call the cheapest, and DPO with the same one. Prints the tables
of docs/scale.md. Seconds are a roofline whose shares of the peaks are assumed (mrpo_scale/planner/cluster.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mrpo_scale.base.gpus import GIB
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.planner.cluster import Cluster, make_cluster
from mrpo_scale.planner.estimate import Estimate, estimate
from mrpo_scale.planner.job import Job, PlannedModel
from mrpo_scale.planner.model_size import ModelSize, model_size
from mrpo_scale.planner.search import search
from mrpo_scale.planner.show import as_json, assumptions
from mrpo_scale.planner.workload import Workload

ROOT = Path(__file__).parents[1]
#: Policy, which is also the anchor, and the two references beside it.
RUNS = {
    "llama-3.1-8b": ("mistral-7b-v0.3", "qwen2.5-7b"),
    "llama-3.1-70b": ("qwen2.5-72b", "mistral-large-2407"),
    "llama-3.1-405b": ("qwen2.5-72b", "mistral-large-2407"),
}
GPUS = (8, 64, 256, 1024, 4096, 16384)
#: Engines: policies, tokens of a pair (an eighth of them each response's), GPUs, and pairs of a step for each GPU.
POLICIES = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b")
TOKENS = (2048, 8192, 32768, 131072)
ENGINE_GPUS = (8, 64, 1024, 16384)
PAIRS_PER_GPU = 4
LEAST_PAIRS = 512  #: pairs of an optimizer step; more where there are more GPUs, one for each
MEDIANS, SPREAD, LONGEST = (
    (300, 250, 250),
    0.6,
    1500,
)  #: tokens of prompt, chosen and rejected: log-normal, each cut at LONGEST


def lengths(pairs: int = 4096) -> np.ndarray:
    """[pairs, 3 views, 3] tokens: the same text has as many in every model's tokenizer, give or take a tenth, which is left out."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIANS), SPREAD, (pairs, 3)).astype(np.int64)
    return np.repeat(drawn.clip(1, LONGEST)[:, None], 3, axis=1)


def size_of(name: str) -> ModelSize:
    source = ReferenceSource(name, str(ROOT / "benchmarks/configs" / name), dtype=torch.bfloat16)
    return model_size(source, itemsize=2)


def engines(policy: str, tokens: int, gpus: int, cluster: Cluster) -> dict[str, Any]:
    """The three cheapest engines for one policy, references cached, pairs of about ``tokens``: log-normal, none longer."""
    medians = np.array([tokens * 3 // 8, tokens // 8, tokens // 8])  # of which the longest reach the whole
    drawn = np.random.default_rng(0).lognormal(np.log(medians), 0.4, (4096, 3))
    shorter = np.minimum(1, tokens / drawn.sum(1, keepdims=True))
    size = size_of(policy)
    workload = Workload((drawn * shorter).astype(np.int64).clip(1)[:, None])
    job = Job(size, (PlannedModel(size, 0),), workload, PAIRS_PER_GPU * gpus, 65536, False)
    found = search(job, cluster, live=False)
    return {
        "policy": policy,
        "tokens": tokens,
        "gpus": gpus,
        "pairs_per_step": job.window,
        "least_gib": found.least.peak / GIB,
        "plans": [{**as_json(plan), "words": _setting(plan)} for plan in found.plans],
        "cell": f"{_setting(found.best)}, {found.best.mfu:.0%}"
        if found.best
        else _too_large(found.least.peak / GIB, cluster),
    }


def predict(job: Job, cluster: Cluster) -> dict[str, Any]:
    """The cheapest settings with live and with cached references, and DPO beside the first."""
    live, cached = search(job, cluster), search(job, cluster, live=False)
    found: dict[str, Any] = {"gpus": cluster.gpus, "pairs_per_step": job.window, "tried": live.tried + cached.tried}
    found["least_gib"] = {"live": live.least.peak / GIB, "cached": cached.least.peak / GIB}
    if live.best is not None:
        dpo = estimate(job, replace(live.best.setting, only_anchor=True), cluster)
        found |= {"live": as_json(live.best), "dpo_live": as_json(dpo)}
        found["overhead"] = live.best.seconds / dpo.seconds
        found["flop_floor"] = live.best.flops / dpo.flops
    if cached.best is not None:
        found["cached"] = as_json(cached.best)
    found["row"] = row(live.best, cached.best, found, cluster)
    return found


def row(live: Estimate | None, cached: Estimate | None, found: dict[str, Any], cluster: Cluster) -> list[str]:
    """Cells of the table."""
    cells = [f"{found['gpus']:,}", f"{found['pairs_per_step']:,}"]
    if live is None:
        cells += [_too_large(found["least_gib"]["live"], cluster), "-", "-", "-", "-"]
    else:
        cells += [
            _setting(live), f"{live.peak / GIB:.0f}", f"{live.seconds:.3g}", f"{live.mfu:.0%}",
            f"{found['overhead']:.2f} ({found['flop_floor']:.2f})",
        ]  # fmt: skip
    if cached is None:
        return [*cells, _too_large(found["least_gib"]["cached"], cluster), "-", "-"]
    return [*cells, _setting(cached), f"{cached.seconds:.3g}", f"{cached.mfu:.0%}"]


def _too_large(least_gib: float, cluster: Cluster) -> str:
    """Why nothing fits; offloading can empty the device and overfill the host."""
    return "no: host memory" if least_gib * GIB <= cluster.usable else f"no: at least {least_gib:.0f} GiB"


def _setting(e: Estimate) -> str:
    s = e.setting
    words = [s.zero.name, f"{s.micro_batch}x{e.accumulation}", *["ckpt"] * s.checkpointing]
    words += [f"sp{s.sequence_parallel}"] * (s.sequence_parallel > 1)
    if s.live:
        words += [f"{s.placement} {s.shard_size}", *["offload"] * s.offload]
    return " ".join(words)


HEADER = [
    "GPUs", "pairs/step", "references live", "GiB", "s/step", "MFU", "over DPO (FLOPs)", "references cached", "s/step", "MFU",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--network", default="400gbit")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/predictions.json")
    args = parser.parse_args()
    results: dict[str, Any] = {"gpu": args.gpu, "network": args.network, "runs": {}}
    for policy, others in RUNS.items():
        sizes = [size_of(name) for name in (policy, policy, *others)]
        references = tuple(PlannedModel(size, view) for size, view in zip(sizes[1:], (0, 1, 2), strict=True))
        billions = [f"{size.parameters / 1e9:.1f}B" for size in sizes[1:]]
        print(
            f"\n**{policy}**, K=3: the anchor ({billions[0]}), {others[0]} ({billions[1]}), {others[1]} ({billions[2]})\n"
        )
        print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
        cases = []
        for gpus in GPUS:
            cluster = make_cluster(args.gpu, gpus, 8, args.network)
            job = Job(sizes[0], references, Workload(lengths()), max(LEAST_PAIRS, gpus), 65536, False)
            cases.append(predict(job, cluster))
            print(f"| {' | '.join(cases[-1].pop('row'))} |", flush=True)
        results["runs"][policy] = {"references": [policy, *others], "cases": cases}
    results["engines"] = []
    print(
        f"\n| policy | tokens | {' | '.join(f'{gpus:,} GPUs' for gpus in ENGINE_GPUS)} |\n|{'---|' * (2 + len(ENGINE_GPUS))}"
    )
    for policy in POLICIES:
        for tokens in TOKENS:
            row = [engines(policy, tokens, gpus, make_cluster(args.gpu, gpus, 8, args.network)) for gpus in ENGINE_GPUS]
            results["engines"].append({"policy": policy, "tokens": tokens, "cases": row})
            print(f"| {policy} | {tokens:,} | {' | '.join(case['cell'] for case in row)} |", flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{assumptions(make_cluster(args.gpu, 8, 8, args.network))}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
