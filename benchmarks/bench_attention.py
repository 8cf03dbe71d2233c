"""Times the ways in which attention can share a pair's prompt, forward and backward, one layer.

    python benchmarks/bench_attention.py [--device cpu] [--out FOLDER]

Pairs lie end to end in one row. ``mask``: one call with a [L, L] mask; ``spans``: two calls a pair, see
logps/span_attention.py; ``varlen``: one call of torch's variable-length attention, the rejected response over the prompt's keys
once more; ``two sequences``: the same call with the prompt read twice. Each is compared with ``spans`` in float64. Writes
attention-DEVICE.json and .md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mrpo_scale.logps.span_attention import Spans, span_attention

SHAPES = {"cuda": [(16, 300, 250, 32, 8, 128), (8, 1000, 300, 32, 8, 128)], "cpu": [(2, 30, 25, 4, 2, 32)]}
ERRORS = (ImportError, AttributeError, RuntimeError, TypeError, NotImplementedError, ValueError)


def spans_way(q: Tensor, k: Tensor, v: Tensor, pairs: int, prompt: int, response: int) -> Tensor:
    spans = Spans(((prompt, (response, response)),) * pairs)
    return span_attention(nn.Module(), q, k, v, None, spans)[0][0]


def mask_way(q: Tensor, k: Tensor, v: Tensor, pairs: int, prompt: int, response: int) -> Tensor:
    part = torch.tensor([0] * prompt + [1] * response + [2] * response, device=q.device).repeat(pairs)
    pair = torch.arange(pairs, device=q.device).repeat_interleave(prompt + 2 * response, output_size=len(part))
    seen = (pair[:, None] == pair) & ((part == 0) | (part[:, None] == part))
    seen &= torch.ones(len(part), len(part), dtype=torch.bool, device=q.device).tril()
    return sdpa(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int]) -> Tensor:
    """[T, heads, d]; newer versions of torch take fewer heads of keys, older ones want them repeated."""
    from torch.nn.attention.varlen import varlen_attn

    options = (
        {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    )
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    starts = [torch.tensor([0, *n], device=q.device).cumsum(0).to(torch.int32) for n in (queries, keys)]
    return varlen_attn(q, k, v, *starts, max(queries), max(keys), **options)


def varlen_way(q: Tensor, k: Tensor, v: Tensor, pairs: int, prompt: int, response: int) -> Tensor:
    length = prompt + 2 * response
    row = torch.arange(length, device=q.device)
    wanted = torch.cat([row[: prompt + response], row[:prompt], row[prompt + response :]])
    keys_T = (torch.arange(pairs, device=q.device)[:, None] * length + wanted).flatten()
    k, v = (x[0].transpose(0, 1).index_select(0, keys_T) for x in (k, v))
    return _varlen(q[0].transpose(0, 1), k, v, [prompt + response, response] * pairs, [prompt + response] * 2 * pairs)


def two_sequences(q: Tensor, k: Tensor, v: Tensor, pairs: int, prompt: int, response: int) -> Tensor:
    length = prompt + 2 * response
    row = torch.arange(length, device=q.device)
    wanted = torch.cat([row[: prompt + response], row[:prompt], row[prompt + response :]])
    rows_T = (torch.arange(pairs, device=q.device)[:, None] * length + wanted).flatten()
    q, k, v = (x[0].transpose(0, 1).index_select(0, rows_T) for x in (q, k, v))
    out = _varlen(q, k, v, *[[prompt + response] * 2 * pairs] * 2).unflatten(0, (pairs, -1))
    return torch.cat([out[:, : prompt + response], out[:, 2 * prompt + response :]], 1).flatten(0, 1)


WAYS: dict[str, Callable[..., Tensor]] = {
    "spans": spans_way,
    "mask": mask_way,
    "varlen": varlen_way,
    "two sequences": two_sequences,
}


def measured(
    way: Callable[..., Tensor], inputs: list[Tensor], sizes: tuple[int, int, int], exact: Tensor, rounds: int
) -> dict:
    """Milliseconds of forward and backward, median of ``rounds``; largest error against float64; GiB at the peak."""
    on_gpu, times = inputs[0].is_cuda, []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 2):
        leaves = [x.detach().requires_grad_() for x in inputs]
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = way(*leaves, *sizes)
        out.backward(torch.ones_like(out))
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    error = ((out.detach().double() - exact).norm() / exact.norm()).item()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"ms": round(statistics.median(times[2:]), 3), "error": error, "peak_gib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rows, lines = [], ["| pairs | prompt | response | way | ms | error | GiB |", "|---|---|---|---|---|---|---|"]
    for pairs, prompt, response, heads, kv_heads, width in SHAPES[args.device]:
        sizes, length = (pairs, prompt, response), pairs * (prompt + 2 * response)
        g = torch.Generator(args.device).manual_seed(0)
        shapes = [(1, n, length, width) for n in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(shape, generator=g, device=args.device, dtype=dtype) for shape in shapes]
        exact = spans_way(*(x.double() for x in inputs), *sizes)
        for name, way in WAYS.items():
            try:
                row = measured(way, inputs, sizes, exact, args.rounds)
            except ERRORS as error:
                row = {"absent": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            rows.append({"pairs": pairs, "prompt": prompt, "response": response, "way": name, **row})
            shown = row.get("absent") or f"{row['ms']} | {row['error']:.1e} | {row['peak_gib']}"
            lines.append(f"| {pairs} | {prompt} | {response} | {name} | {shown} |")
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"attention-{args.device}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / f"attention-{args.device}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
