"""Memory of one long pair on one rank and over 2 and 4: what autograd keeps, and how far the resident set grows.

    python -m benchmarks.sequence_memory [--tokens 8192] [--output benchmarks/results/sequence-memory-cpu.json]

A Llama of random weights computes one pair of so many tokens, half of them the prompt, forward and backward, over gloo ranks of
this machine. *Kept*: bytes of the distinct tensors that autograd saved when the backward begins, without weights. *Peak*: how far
the largest resident set of a rank exceeds the one before the step, gradients of the weights in place. Needs the clone: the ranks
are the tests' pool.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.validate_planner import saved_bytes
from mrpo_scale.base.device import device_name, peak_memory_gib, reset_peak_memory
from mrpo_scale.data.pairs import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import PairBatch, collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, score_pairs
from mrpo_scale.logps.sequence_parallel import make_sequence_group

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def policy(tokens: int, checkpointing: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=tokens, **SIZES)
    model = AutoModelForCausalLM.from_config(config).train()
    enable_pair_scoring(model, "policy")
    choose_end_to_end(model, torch.device("cpu"))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def pair(tokens: int) -> PairTokens:
    ids = (torch.arange(tokens) % 990 + 5).tolist()
    half, quarter = tokens // 2, tokens // 4
    return PairTokens(ids[:half], ids[half : half + quarter], ids[half + quarter :])


def measured(tokens: int, shared_prompt: bool, checkpointing: bool, over: int) -> tuple[int, int] | None:
    """(bytes kept, bytes of growth) on this rank of the pair over the first ``over`` ranks; None on the others."""
    group = make_sequence_group(over, None) if dist.is_initialized() and over > 1 else None
    if dist.is_initialized() and dist.get_rank() >= over:
        return None
    model = policy(tokens, checkpointing)

    def batch(length: int) -> PairBatch:
        return collate_pairs([pair(length)], shared_prompt=shared_prompt, end_to_end=True, group=group)

    def step(pairs: PairBatch) -> None:
        logps_P2 = score_pairs(model, pairs)
        (logps_P2[:, 0] - logps_P2[:, 1]).sum().backward()

    pairs = batch(tokens)
    with saved_bytes(model, [x for x in vars(pairs).values() if isinstance(x, torch.Tensor)]) as found:
        score_pairs(model, pairs)  # and drop what it kept
    kept = sum(found.values())
    step(batch(64))  # gradients and buffers of the group are there from now on
    reset_peak_memory()
    before = peak_memory_gib(torch.device("cpu"))
    step(pairs)
    return kept, int((peak_memory_gib(torch.device("cpu")) - before) * 2**30)


def compare(tokens: int, run: Any, worlds: Sequence[int] = (1, 2, 4)) -> list[dict[str, Any]]:
    """A row for each layout and each number of ranks; ``run(over, *args)`` calls :func:`measured` on ranks."""
    rows = []
    for shared_prompt in (False, True):
        for checkpointing in (False, True):
            alone: dict[str, Any] = {}
            for over in worlds:
                kept, peak = zip(*[x for x in run(tokens, shared_prompt, checkpointing, over) if x], strict=True)
                row = {
                    "shared_prompt": shared_prompt,
                    "gradient_checkpointing": checkpointing,
                    "ranks": over,
                    "kept": max(kept),
                    "peak": max(peak),
                }
                alone = alone or row
                rows.append(row | {f"{key}_part": row[key] / alone[key] for key in ("kept", "peak")})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sequence-memory-cpu.json"))
    flags = parser.parse_args()
    from benchmarks import sequence_memory  # under a name that the ranks know
    from tests.distributed.pool import Pool

    # One size of malloc's large blocks, which are given back when they are freed: else the growth is the heap's history.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    pool = Pool(4)
    try:
        rows = compare(flags.tokens, lambda *args: pool.run(sequence_memory.measured, *args, timeout=1200))
    finally:
        pool.close()
    found = {"machine": device_name(torch.device("cpu")), "tokens": flags.tokens, "sizes": SIZES, "rows": rows}
    flags.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
