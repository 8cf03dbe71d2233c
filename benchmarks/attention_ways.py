"""Checks and times the ways to compute attention over pairs: one variable-length call, two sequences, a mask, span by span.

    python benchmarks/attention_ways.py                # the GPU: heads of four model families, pairs of two lengths
    python benchmarks/attention_ways.py --device cpu   # small, what a CPU has
    python benchmarks/attention_ways.py --dry_run      # what would run and what would not and why; runs the smallest case, untimed

First everything is compared with plain products in float64, output and gradients; what is wrong is named and still timed. Then the
contenders are timed in turn, round after round; ratios are medians of each round's ratio to two sequences per pair, which is what a
trainer without a shared prompt computes. Last, two decoder layers of an 8B model, everything in them: what a step gains. JSON and a
table in `--out`, after every case: it can be cut at any point.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from mrpo_scale.base.device import device_name
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import Needs, refusal, trial
from mrpo_scale.logps.attention_ways import FLEX, REFERENCE, WAYS, FlexSpans, attention_function
from mrpo_scale.logps.pair_batch import PairBatch, _in_window, _visible, collate_pairs
from mrpo_scale.logps.pair_forward import enable_pair_scoring, response_hidden
from mrpo_scale.logps.span_attention import SPAN_ATTENTION, span_attention
from mrpo_scale.logps.varlen_layout import varlen_layout

TWO, MASK = "two sequences", "mask"
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Attention of one layer over equal pairs."""

    title: str
    heads: int
    key_heads: int
    head_size: int
    lengths: tuple[int, int, int]  #: prompt, chosen, rejected
    pairs: int
    window: int | None = None
    softcap: float | None = None


SHORT, LONG = (300, 250, 250), (1000, 300, 300)
GPU_CASES = [
    Case("Llama 8B", 32, 8, 128, LONG, 8),
    Case("Llama 8B", 32, 8, 128, SHORT, 16),
    Case("Gemma 3 12B, a layer with a window", 16, 8, 256, (2000, 500, 500), 4, window=1024),
    Case("Gemma 2 9B, soft-capped", 16, 8, 256, LONG, 4, softcap=50.0),
    Case("Qwen 0.5B", 14, 2, 64, SHORT, 16),
]
CPU_CASES = [Case("a small CPU case", 4, 2, 32, (60, 50, 50), 4, window=40)]


class Contenders:
    """{name: (inputs, call, exact values' name)} for one case; a call takes [1, heads, T, d] and gives [T, heads, d]."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.absent: dict[str, str] = {}
        self.batches = {shared: batch_of(case, shared).to(device) for shared in (True, False)}
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.upstream = {}, {}
        for shared, batch in self.batches.items():
            length = batch.input_ids_BL.shape[1]
            shapes = [(1, n, length, case.head_size) for n in (case.heads, case.key_heads, case.key_heads, case.heads)]
            *inputs, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            self.inputs[shared], self.upstream[shared] = inputs, upstream[0].transpose(0, 1)
        self.calls = dict(self._calls())

    def _calls(self) -> Iterator[tuple[str, tuple[bool, Call]]]:
        """(name, (shared prompt?, call)): two sequences by the first kernel that is here, then everything on shared prompts."""
        needs = Needs(
            *(self.case.heads, self.case.key_heads, self.case.head_size, self.dtype),
            softcap=self.case.softcap,
            window=self.case.window is not None,
        )
        first = True
        for way in WAYS.values():
            if way.name == REFERENCE and self.device.type == "cuda":
                continue
            reason = cannot(way.name, needs, self.device)
            if reason:
                self.absent[way.name] = reason
                continue
            if first:
                yield f"{TWO} ({way.name})", (False, self._way(way.name, False))
                first = False
            yield way.name, (True, self._way(way.name, True))
        if self.case.softcap is None:
            yield MASK, (True, self._mask())
            yield SPAN_ATTENTION, (True, self._span_by_span())

    def _way(self, name: str, shared: bool) -> Call:
        batch = self.batches[shared]
        assert batch.spans is not None and batch.varlen_index is not None
        spans: Any = varlen_layout(batch.spans.lengths, batch.varlen_index)
        if name == FLEX:
            spans = FlexSpans(batch.segment_BL[0], batch.part_BL[0], batch.position_ids_BL[0])
        function = attention_function(WAYS[name])
        module = nn.Module().train()
        module.is_causal = True  # type: ignore[assignment]
        options = {"spans": spans, "sliding_window": self.case.window, "softcap": self.case.softcap}
        return lambda query, key, value: function(module, query, key, value, None, **options)[0][0]

    def _mask(self) -> Call:
        """A pair per row, which is how sdpa takes equal pairs without padding; torch chooses the kernel."""
        pairs = self.case.pairs
        one = collate_pairs([tokens(self.case.lengths)], shared_prompt=True)
        seen_BLL = _visible(one) if self.case.window is None else _in_window(one, _visible(one), self.case.window)
        mask = seen_BLL[:, None].to(self.device)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = [x.unflatten(2, (pairs, -1))[0].transpose(0, 1) for x in (query, key, value)]
            repeats = query.shape[1] // key.shape[1]
            rows[1:] = [x.repeat_interleave(repeats, 1) for x in rows[1:]]  # as transformers does with a mask
            return scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2).flatten(0, 1)

        return call

    def _span_by_span(self) -> Call:
        spans, module = self.batches[True].spans, nn.Module()
        return lambda query, key, value: span_attention(
            module, query, key, value, None, spans=spans, sliding_window=self.case.window
        )[0][0]

    def exact(self, shared: bool) -> list[Tensor]:
        """Output and gradients in float64."""
        return self.run(self._way(REFERENCE, shared), shared, torch.float64)

    def run(self, call: Call, shared: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        inputs = [x.detach().to(dtype or self.dtype).requires_grad_() for x in self.inputs[shared]]
        output = call(*inputs)
        return [output, *torch.autograd.grad(output, inputs, self.upstream[shared].to(output.dtype))]


def tokens(lengths: tuple[int, int, int]) -> PairTokens:
    return PairTokens(*([1] * n for n in lengths))


def batch_of(case: Case, shared: bool) -> PairBatch:
    return collate_pairs([tokens(case.lengths)] * case.pairs, shared_prompt=shared, end_to_end=True)


def cannot(name: str, needs: Needs, device: torch.device) -> str | None:
    if name == FLEX and device.type == "cpu":
        return "it has no backward on a CPU"
    return refusal(WAYS[name], needs, device, tried=False) or trial(WAYS[name], needs, device)


# ---- measuring -------------------------------------------------------------------------------------------------------


def relative_errors(got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    names = ("output", "d_query", "d_key", "d_value")
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(names, got, exact, strict=True)}


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def in_turn(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """{name: median milliseconds, and the median of its ratios to the first one's of the same round}."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    baseline = next(iter(times.values()))
    return {
        name: {
            "ms": statistics.median(mine),
            "ratio": statistics.median(x / y for x, y in zip(mine, baseline, strict=True)),
        }
        for name, mine in times.items()
    }


def attention_case(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """``rounds`` of 0: checked only."""
    contenders = Contenders(case, device, dtype)
    exact = {shared: contenders.exact(shared) for shared in (True, False)}
    rows: list[dict[str, Any]] = []
    for name, (shared, call) in contenders.calls.items():
        errors = relative_errors(contenders.run(call, shared), exact[shared])
        right = max(errors.values()) <= max(4 * torch.finfo(dtype).eps, 2e-3)
        positions = contenders.batches[shared].input_ids_BL.numel()
        rows.append({"name": name, "positions": positions, "right": right, "errors": errors})
    del exact

    def forward(shared: bool, call: Call) -> Callable[[], object]:
        return lambda: torch.no_grad()(call)(*contenders.inputs[shared])

    def both(shared: bool, call: Call) -> Callable[[], object]:
        return lambda: contenders.run(call, shared)

    for which, make in (("forward", forward), ("forward+backward", both)) if rounds else ():
        calls = {name: make(shared, call) for name, (shared, call) in contenders.calls.items()}
        for row, measured in zip(rows, in_turn(calls, device, rounds).values(), strict=True):
            row[which] = measured
    return {"kind": "attention", "case": asdict(case), "absent": contenders.absent, "rows": rows}


def layers_case(
    case: Case, device: torch.device, dtype: torch.dtype, rounds: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Forward and backward of two decoder layers, milliseconds of a micro-batch; the first row is two sequences per pair."""
    heads = {"num_attention_heads": case.heads, "num_key_value_heads": case.key_heads, "head_dim": case.head_size}
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=2, vocab_size=128, max_position_embeddings=8192)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    enable_pair_scoring(model, "two layers")
    needs = Needs(case.heads, case.key_heads, case.head_size, dtype)
    names = [name for name in WAYS if (name != REFERENCE or device.type == "cpu") and not cannot(name, needs, device)]
    layouts = [(TWO, names[0], {"shared_prompt": False, "end_to_end": True})] if names else []
    layouts += [(name, name, {"shared_prompt": True, "end_to_end": True}) for name in names]
    layouts.append((MASK, "sdpa", {"shared_prompt": True}))
    calls: dict[str, Callable[[], object]] = {}
    positions = {}
    for name, attention, layout in layouts:
        batch = collate_pairs([tokens(case.lengths)] * case.pairs, **layout).to(device)  # type: ignore[arg-type]
        positions[name] = batch.input_ids_BL.numel()

        def call(attention: str = attention, batch: PairBatch = batch) -> None:
            model.set_attn_implementation(attention)
            response_hidden(model, batch).sum().backward()
            model.zero_grad(set_to_none=True)

        calls[name] = call
    measured = in_turn(calls, device, rounds) if rounds else {}
    rows = [
        {"name": name, "positions": positions[name], **({"forward+backward": measured[name]} if rounds else {})}
        for name in calls
    ]
    return {"kind": "two decoder layers", "case": asdict(case), "rows": rows}


# ---- output ----------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']}: torch {report['torch']}, transformers {report['transformers']}, {report['dtype']}"]
    for run in report["runs"]:
        case = run["case"]
        lines += [
            "",
            f"{run['kind']}: {case['title']}, {case['pairs']} pairs of {' + '.join(map(str, case['lengths']))}",
            "",
        ]
        lines += [
            "| way | positions | largest error | forward ms | ratio | forward + backward ms | ratio |",
            "|---" * 7 + "|",
        ]
        for row in run["rows"]:
            errors = row.get("errors")
            error = f"{max(errors.values()):.1e}{'' if row['right'] else ' WRONG'}" if errors else ""
            cells = [
                f"{row[w]['ms']:.3f} | {row[w]['ratio']:.2f}" if w in row else " | "
                for w in ("forward", "forward+backward")
            ]
            lines.append(f"| {row['name']} | {row['positions']} | {error} | {cells[0]} | {cells[1]} |")
        lines += [f"\nabsent: {name}: {why}" for name, why in run.get("absent", {}).items()]
    return "\n".join(lines) + "\n"


def save(report: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"attention-{report['device']}.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / f"attention-{report['device']}.md").write_text(table(report))


def main(argv: list[str] | None = None) -> int:
    """0 where every contender that ran was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--dry_run", action="store_true", help="check the smallest case, time and write nothing")
    flags = parser.parse_args(argv)
    device = torch.device(flags.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    report: dict[str, Any] = {
        "machine": f"{device_name(device)} ({platform.machine()})",
        "device": device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": flags.rounds,
        "runs": [],
    }
    cases = CPU_CASES if device.type == "cpu" or flags.dry_run else GPU_CASES
    sizes = (
        {"hidden_size": 4096, "intermediate_size": 14336}
        if cases is GPU_CASES
        else {"hidden_size": 64, "intermediate_size": 96}
    )
    rounds = 0 if flags.dry_run else flags.rounds
    for case in cases:
        report["runs"].append(attention_case(case, device, dtype, rounds))
        if not flags.dry_run:
            save(report, flags.out)
    for case in cases[:2]:
        report["runs"].append(layers_case(case, device, dtype, rounds, sizes))
        if not flags.dry_run:
            save(report, flags.out)
    print(table(report))
    return 0 if all(row.get("right", True) for run in report["runs"] for row in run["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
