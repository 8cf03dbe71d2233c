"""Where the time of an optimizer step goes on the device: the largest kernels, and how long it waits for the host.

    python benchmarks/profile_step.py --out FOLDER [--device cpu] --model hidden_size=2048 ... --pairs 512 256

DPO against a cached reference, random weights and words as `mrpo bench` makes them; the last step of four is profiled. Writes
profile-DEVICE.json, profile-DEVICE.md and a trace for Perfetto.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from mrpo_scale import MRPOConfig, MRPOTrainer
from mrpo_scale.bench.synthetic import parse_sizes, random_models, random_pairs
from mrpo_scale.config.model_spec import ModelSpec
from mrpo_scale.data.toy_world import resolve
from mrpo_scale.models.plan import load_tokenizer

STEPS = 4


class ProfileLastStep(TrainerCallback):
    def __init__(self, profiler: profile) -> None:
        self.profiler = profiler

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS - 1:
            self.profiler.start()
        elif state.global_step == STEPS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", nargs="+", required=True, metavar="KEY=NUMBER")
    parser.add_argument("--pairs", nargs=2, type=int, required=True, metavar=("PROMPT", "RESPONSE"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    on_gpu = args.device == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        config = MRPOConfig(
            output_dir=folder,
            ref_cache_dir=f"{folder}/cache",
            ref_scoring="precompute",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            max_length=2048,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=on_gpu,
            use_cpu=not on_gpu,
        )
        (policy,) = random_models([ModelSpec(resolve("toy:llama"))], parse_sizes(args.model), config)
        rows = random_pairs(load_tokenizer(ModelSpec(policy["model"])), STEPS * config.window_size, args.pairs, 7)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        profiler = profile(activities=activities, acc_events=True)
        trainer = MRPOTrainer(policy["model"], [], config, rows, callbacks=[ProfileLastStep(profiler)])
        trainer.train()
    report(profiler, trainer.clock.median() or 0.0, args.out, args.device)


def report(profiler: profile, step_seconds: float, out: Path, device: str) -> None:
    """The twenty largest kernels and the share of the step that they leave idle; on a CPU, its operations."""
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    averages = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in averages) / 1e6
    rows = [{"name": e.key[:100], "ms": getattr(e, key) / 1e3, "calls": e.count} for e in averages[:20]]
    result = {"device": device, "median_step_s": step_seconds, "busy_s": whole, "largest": rows}
    (out / f"profile-{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"step {step_seconds:.3f} s, of which {device} busy {whole:.3f} s",
        "",
        "| ms | calls | name |",
        "|---|---|---|",
    ]
    lines += [f"| {row['ms']:.2f} | {row['calls']} | `{row['name']}` |" for row in rows]
    (out / f"profile-{device}.md").write_text("\n".join(lines) + "\n")
    profiler.export_chrome_trace(str(out / f"profile-{device}.trace.json.gz"))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
