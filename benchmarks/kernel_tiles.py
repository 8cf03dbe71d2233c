"""Sweep of bench_kernels.py --tune: the forward of ``sequence_logps`` with every candidate tile, on the shapes of the benchmark.

The winner by the sum of its times goes into ``TILES`` of mrpo_kernels/partials.py; tests/kernel/test_compile.py must then pass with
it, also for heads with bias or softcap, whose epilogue needs more registers than the plain one that is timed first here.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kernel_contenders import Case, Data
from mrpo_kernels import partials, sequence_logps
from mrpo_kernels.partials import Tile
from triton.errors import TritonError

# What fits 228 KiB of shared memory around the shipped tile, which is always tried first, and its wider groups.
SHAPES = [
    (128, 256, 64, 8),
    (128, 128, 64, 8),
    (128, 128, 64, 4),
    (256, 128, 64, 8),
    (64, 256, 64, 4),
    (128, 256, 32, 8),
]
CANDIDATES = [
    Tile(block_t, block_v, block_d, num_warps=warps, num_stages=stages)
    for (block_t, block_v, block_d, warps), stages in itertools.product(SHAPES, (3, 4))
]
HEADS: dict[str, dict[str, float]] = {"plain": {}, "softcap": {"softcap": 30.0}}


def sweep(cases: list[Case], timed: Callable[[Callable[[], object]], float], rounds: int = 5) -> list[dict[str, Any]]:
    """One row per head and candidate: median milliseconds and TFLOP/s per shape, or why it did not run or was wrong. Best first."""
    major = torch.cuda.get_device_capability()[0]
    shipped = partials.TILES[max(key for key in partials.TILES if key <= major)]
    others = [*CANDIDATES, *(replace(shipped, group_t=group_t) for group_t in (4, 16))]
    candidates = [shipped, *(tile for tile in others if tile != shipped)]
    rows: list[dict[str, Any]] = [
        {"head": head, "tile": vars(tile), "shipped": tile == shipped, "ms": {}}
        for head in HEADS
        for tile in candidates
    ]
    try:
        for case in cases:
            data = Data.random(case, "cuda", torch.bfloat16)
            given = (data.hidden_TD, data.weight_VD, data.labels_T, data.cu_seqlens)
            expected = {head: sequence_logps(*given, **options, impl="torch") for head, options in HEADS.items()}
            for row in rows:
                if "failed" not in row:
                    _measure(row, given, expected[row["head"]], case, timed, rounds)
            del data, given, expected
            torch.cuda.empty_cache()
    finally:
        partials.TILES[major] = shipped
        partials._tile.cache_clear()
    return sorted(rows, key=lambda row: (row["head"], "failed" in row, sum(row["ms"].values())))


def _measure(row: dict, given: tuple, expected_S: torch.Tensor, case: Case, timed: Callable, rounds: int) -> None:
    partials.TILES[torch.cuda.get_device_capability()[0]] = Tile(**row["tile"])
    partials._tile.cache_clear()

    def forward() -> torch.Tensor:
        return sequence_logps(*given, **HEADS[row["head"]], impl="triton")

    try:
        with torch.no_grad():
            # cuBLAS and Triton add the same bfloat16 products in float32, in different orders.
            torch.testing.assert_close(forward(), expected_S, rtol=1e-5, atol=1e-3)
            row["ms"][case.name] = statistics.median(timed(forward) for _ in range(rounds))
    except (TritonError, RuntimeError, AssertionError) as error:  # beyond the machine, or wrong: the row says which
        row["failed"] = f"{case.name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"


def table(rows: list[dict[str, Any]], cases: list[Case]) -> str:
    lines = ["| head | tile | " + " | ".join(case.name for case in cases) + " |", "|---|---|" + "---|" * len(cases)]
    for row in rows:
        tile = row["tile"]
        name = f"{tile['block_t']}x{tile['block_v']}x{tile['block_d']}, {tile['num_warps']} warps, {tile['num_stages']} stages"
        name += f", group {tile['group_t']}" + ", shipped" * row["shipped"]
        times = [
            f"{row['ms'][case.name]:.2f} ms, {case.gemm_flops / row['ms'][case.name] / 1e9:.0f} TFLOP/s"
            if case.name in row["ms"]
            else "-"
            for case in cases
        ]
        lines.append(
            f"| {row['head']} | {name} | " + " | ".join([*times, *([row["failed"]] if "failed" in row else [])]) + " |"
        )
    return "\n".join(lines)
