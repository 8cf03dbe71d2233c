"""Times, checks and weighs the fused kernels against full logits and other people's kernels.

    python benchmarks/bench_kernels.py                 # the GPU, the shapes of four model families
    python benchmarks/bench_kernels.py --device cpu    # the torch path
    python benchmarks/bench_kernels.py --tune          # instead: every candidate tile of the Triton forward, best first

Every result is compared with float64 first (gradients on a sample of rows). Contenders are timed in turn, round after round, so
that a busy machine slows all of them; ratios are medians of each round's ratio to the baseline. TFLOP/s count the products that
the task needs, 2TDV forward and 6TDV with backward, for everybody: recomputed logits earn nothing. The ceiling is the fastest
plain product of the same size. Writes JSON, a table and a PNG under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrpo_kernels
import torch
from kernel_contenders import CONTENDERS, PLAIN, Case, Contender, Data, LossFunction, exact_values
from kernel_report import figure, tables
from mrpo_kernels import combine_references, sequence_logps
from torch import Tensor

from mrpo_scale.base.device import device_name

GPU_CASES = [
    Case(16384, 4096, 128256, 512),
    Case(8192, 4096, 32000, 512),
    Case(8192, 3584, 152064, 512),
    Case(4096, 2304, 262144, 512),
]
CPU_CASES = [Case(512, 576, 49152, 32), Case(256, 256, 16000, 32)]
CPU_REFERENCE_CASES = [Case(256, 256, 16000, 32)]
NUM_REFERENCES = (1, 3, 5)
PASSES = {"forward": 1, "forward+backward": 3}  # name -> products of 2TDV that the task needs
# What a peer may raise on a machine or shape that it does not support; each is reported with its text.
PEER_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError, OSError)
MODES: dict[str, Any] = {"epsilon_max": 0.1, "clip": "adaptive", "ref_weights": "confidence", "aggregate": "harmonic"}


def run_pass(
    loss: LossFunction, data: Data, which: str, weight_gradient: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss, d_hidden, d_weight)"""
    if which == "forward":
        with torch.no_grad():
            return loss(data, data.hidden_TD, data.weight_VD), None, None
    leaves = [data.hidden_TD.detach().requires_grad_(), data.weight_VD.detach().requires_grad_(weight_gradient)]
    value = loss(data, *leaves)
    value.backward()
    return value, leaves[0].grad, leaves[1].grad


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[], object]], device: str, rounds: int, baseline: str
) -> dict[str, list[float]]:
    """Times by name, a round after the other. Whoever needs eight times the baseline's time leaves after three."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if number < 3 or baseline not in times or min(times[name]) < 8 * min(times[baseline]):
                times[name].append(timed(call, device))
    return times


def reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def row_of(
    name: str, which: str, times: dict[str, list[float]], baseline: str, flops: float, gemm_tflops: float
) -> dict:
    mine = times[name]
    ms, tflops = statistics.median(mine), flops / statistics.median(mine) / 1e9
    quartiles = statistics.quantiles(mine, n=4) if len(mine) > 1 else [ms, ms, ms]
    ratio = statistics.median(x / y for x, y in zip(mine, times[baseline], strict=False)) if baseline in times else 0.0
    return {
        "name": name,
        "pass": which,
        "ms": ms,
        "quartiles_ms": [quartiles[0], quartiles[2]],
        "time_ratio": ratio,
        "tflops": tflops,
        "of_gemm": tflops / gemm_tflops,
        "rounds_ms": [round(x, 3) for x in mine],
    }


class Bench:
    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.absent: dict[str, str] = {}
        self.losses: dict[str, tuple[Contender, LossFunction]] = {}
        for contender in CONTENDERS:
            if device not in contender.devices:
                self.absent[contender.name] = f"not timed on {device}"
                continue
            try:
                self.losses[contender.name] = (contender, contender.make())
            except (ImportError, AttributeError) as error:
                self.absent[contender.name] = reason(error)

    def policy(self, case: Case, index: int, title: str, memory: bool) -> dict[str, Any]:
        """Every contender, forward and forward+backward, on one shape."""
        torch.compiler.reset()
        data = Data.random(case, self.device, self.dtype)
        gemm = gemm_call(data)
        rows: list[dict[str, Any]] = []
        run: dict[str, Any] = {"title": title, "case": vars(case), "rows": rows}
        for which, products in PASSES.items():
            calls: dict[str, Callable[[], object]] = {"gemm": gemm}
            errors: dict[str, dict[str, float]] = {}
            for name, (contender, loss) in self.losses.items():
                try:
                    errors[name] = self._check(contender, loss, data, which)
                    calls[name] = functools.partial(run_pass, loss, data, which)
                except PEER_ERRORS as error:
                    rows.append({"name": name, "pass": which, "failed": reason(error)})
                    free(self.device)
            times = interleaved(calls, self.device, self.rounds, PLAIN)
            run["gemm_ms"] = min(times["gemm"])
            run["gemm_tflops"] = case.gemm_flops / run["gemm_ms"] / 1e9
            for name in errors:
                row = row_of(name, which, times, PLAIN, products * case.gemm_flops, run["gemm_tflops"])
                extra_mib = self.extra_mib(name, index, data, which) if memory else None
                rows.append(row | {"errors": errors[name], "extra_mib": extra_mib})
        for row in rows:
            base = next((r.get("extra_mib") for r in rows if r["name"] == PLAIN and r["pass"] == row["pass"]), None)
            row["extra_ratio"] = row["extra_mib"] / base if base and row.get("extra_mib") is not None else 0.0
        return run

    def _check(self, contender: Contender, loss: LossFunction, data: Data, which: str) -> dict[str, float]:
        got = run_pass(loss, data, which)
        errors = _exact(data, contender.target, False).errors(*got)
        if contender.name.startswith("Liger fused linear DPO") and errors["loss"] > 0.05:
            errors = _exact(data, contender.target, True).errors(*got)
        return errors

    def extra_mib(self, name: str, index: int, data: Data, which: str) -> float:
        """Peak memory beyond what was there before and the weight's gradient.

        Where the peak comes before that gradient exists, subtracting it would flatter; so a pass without it is measured as well.
        """
        if which == "forward":
            return self._peak(name, index, data, which, weight_gradient=False) / 2**20
        with_it = self._peak(name, index, data, which, weight_gradient=True) - data.weight_VD.nbytes
        try:
            return max(with_it, self._peak(name, index, data, which, weight_gradient=False)) / 2**20
        except PEER_ERRORS:  # some peers cannot run with a frozen weight
            return with_it / 2**20

    def _peak(self, name: str, index: int, data: Data, which: str, weight_gradient: bool) -> int:
        if self.device == "cuda":
            free(self.device)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run_pass(self.losses[name][1], data, which, weight_gradient)
            return torch.cuda.max_memory_allocated() - before
        # A process of its own, whose pages are counted by the kernel; small blocks too must go back to it.
        command = [sys.executable, __file__, "--peak", name, which, str(index), str(int(weight_gradient))]
        command += ["--threads", str(torch.get_num_threads())]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(p for p in sys.path if p)}
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        return int(out.split()[-1])

    def references(self, case: Case, num_references: int) -> dict[str, Any]:
        """K references on one shape, each with weights of its own, to a virtual reference."""
        heads = [Data.random(case, self.device, self.dtype, seed) for seed in range(num_references)]
        packed = [[getattr(h, key) for h in heads] for key in ("hidden_TD", "weight_VD", "labels_T", "cu_seqlens")]
        gemms = [gemm_call(head) for head in heads]
        calls: dict[str, Callable[[], Any]] = {"gemm": lambda: [gemm() for gemm in gemms]}

        def one_by_one(impl: str) -> Tensor:
            logps = [sequence_logps(*args, impl=impl).view(-1, 2) for args in zip(*packed, strict=True)]
            return combine_references(torch.stack(logps), **MODES).virtual_logps_P2

        calls["one by one, torch tiles"] = torch.no_grad()(lambda: one_by_one("torch"))
        if self.device == "cuda":
            calls["one by one, Triton"] = torch.no_grad()(lambda: one_by_one("triton"))
        fused = getattr(mrpo_kernels, "virtual_reference", None)
        if fused is not None:
            calls["ours: virtual_reference"] = lambda: fused(*packed, **MODES).virtual_logps_P2
        else:
            self.absent["ours: virtual_reference"] = "not in mrpo_kernels yet"

        exact_KP2 = torch.stack([exact_logps(head) for head in heads])
        exact = combine_references(exact_KP2, **MODES).virtual_logps_P2
        rows: list[dict[str, Any]] = []
        errors = {}
        for name in [name for name in calls if name != "gemm"]:
            try:
                errors[name] = {"virtual": ((calls[name]().double() - exact).norm() / exact.norm()).item()}
            except PEER_ERRORS as error:
                rows.append({"name": name, "pass": "forward", "failed": reason(error)})
                del calls[name]
                free(self.device)
        times = interleaved(calls, self.device, self.rounds, "one by one, torch tiles")
        flops, gemm_ms = num_references * case.gemm_flops, min(times["gemm"])
        gemm_tflops = flops / gemm_ms / 1e9
        for name, found in errors.items():
            row = row_of(name, "forward", times, "one by one, torch tiles", flops, gemm_tflops)
            rows.append(row | {"errors": found, "extra_mib": None})
        title = f"virtual reference, K={num_references}, {case.name}"
        return {"title": title, "case": vars(case), "gemm_ms": gemm_ms, "gemm_tflops": gemm_tflops, "rows": rows}


@functools.lru_cache(maxsize=4)
def _exact(data: Data, target: str, average: bool) -> Any:
    return exact_values(data, target, average)


def exact_logps(data: Data) -> Tensor:
    """[P, 2] in float64, token block by token block."""
    parts = []
    for hidden_BD, labels_B in zip(data.hidden_TD.split(256), data.labels_T.split(256), strict=True):
        logits_BV = torch.cat([hidden_BD.double() @ w.double().t() for w in data.weight_VD.split(16384)], 1)
        parts.append(logits_BV.log_softmax(-1).gather(1, labels_B[:, None]))
    return torch.cat(parts).view(data.case.pairs, 2, -1).sum(-1)


def gemm_call(data: Data) -> Callable[[], object]:
    """The ceiling: one product of the head's size, written in the inputs' dtype to memory that is already there."""

    shape = (data.case.tokens, data.case.vocabulary)
    out_TV = torch.empty(shape, dtype=data.hidden_TD.dtype, device=data.hidden_TD.device)
    weight_DV = data.weight_VD.t()
    call = functools.partial(torch.mm, data.hidden_TD, weight_DV, out=out_TV)
    call()
    return call


def free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def print_peak(name: str, which: str, index: str, weight_gradient: str) -> None:
    """Child process: the most resident memory that one pass adds, in bytes."""
    data = Data.random(CPU_CASES[int(index)], "cpu", torch.float32)
    loss = next(c for c in CONTENDERS if c.name == name).make()
    small = Data.random(Case(64, 64, 512, 16), "cpu", torch.float32)
    run_pass(loss, small, which)  # thread pools, code pages and compilers are not what is measured
    keep_gradient = bool(int(weight_gradient))
    if "compile" in name:
        run_pass(loss, data, which, keep_gradient)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run_pass(loss, data, which, keep_gradient)
    print(_status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def machine(device: str, dtype: torch.dtype) -> dict[str, str]:
    name = device_name(torch.device(device)) + f" ({torch.get_num_threads()} cores)" * (device == "cpu")
    versions = {}
    for package in ("triton", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"name": name, "host": platform.platform(), "torch": torch.__version__, "dtype": str(dtype), **versions}


def tune(folder: Path) -> None:
    """Prints the table and writes tiles-cuda.json and .md."""
    if not torch.cuda.is_available():
        raise SystemExit("--tune times Triton tiles and needs a CUDA GPU; there is none")
    from kernel_tiles import sweep, table

    rows = sweep(GPU_CASES, functools.partial(timed, device="cuda"))
    report = {"machine": machine("cuda", torch.bfloat16), "rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiles-cuda.json").write_text(json.dumps(report, indent=1) + "\n")
    text = f"{report['machine']['name']}, triton {report['machine']['triton']}\n\n{table(rows, GPU_CASES)}\n"
    (folder / "tiles-cuda.md").write_text(text)
    print(text)


def save(report: dict[str, Any], folder: Path) -> None:
    """After every run, so that one that dies late costs nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"kernels-{report['device']}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(tables(report))
    figure(report, stem.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="default: 20 on a GPU, 9 on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument(
        "--tune", action="store_true", help="time tiles of the Triton forward on a GPU, and nothing else"
    )
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        print_peak(*args.peak)
        return
    if args.tune:
        tune(args.out)
        return
    bench = Bench(args.device, args.rounds or (20 if args.device == "cuda" else 9))
    report: dict[str, Any] = {"machine": machine(args.device, bench.dtype), "rounds": bench.rounds, "runs": []}
    report["device"], report["absent"] = args.device, bench.absent
    runs, threads = report["runs"], torch.get_num_threads()
    for index, case in enumerate(GPU_CASES if args.device == "cuda" else CPU_CASES):
        for count in sorted({threads, 1}, reverse=True) if args.device == "cpu" and index == 0 else [threads]:
            torch.set_num_threads(count)
            suffix = f", threads: {count}" if args.device == "cpu" else ""
            runs.append(bench.policy(case, index, case.name + suffix, memory=count == threads))
            save(report, args.out)
            _exact.cache_clear()
            free(args.device)
        torch.set_num_threads(threads)
    for case in GPU_CASES if args.device == "cuda" else CPU_REFERENCE_CASES:
        for num_references in NUM_REFERENCES:
            runs.append(bench.references(case, num_references))
            save(report, args.out)
            free(args.device)
    print(tables(report))


if __name__ == "__main__":
    main()
