"""How far log-probs computed in bf16 lie from float32's on a CPU: real models, real pairs, whole responses.

    python benchmarks/bf16_error.py --models models/smollm2 models/gemma3 --pairs pairs.json --output result.json

Two ways to compute in bf16 are held against float32 weights: float32 weights under autocast, as a policy is trained by one process,
and bf16 weights, as ZeRO's copies of float32 master weights and references are. In both the head's logits, the softmax and the sum
over a response are float32. The pairs are the first that ``--max_length`` leaves good.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from against_trl import run_benchmark
from torch import Tensor

from mrpo_scale.base.device import device_name
from mrpo_scale.config.hardware import bf16_instructions
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data import load_rows
from mrpo_scale.data.inputs import prepare_sets
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_batch import collate_pairs
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring, score_pairs
from mrpo_scale.models.plan import load_policy, plan_models

CPU = torch.device("cpu")
#: Name in the result: (weights, whether under autocast).
WAYS = {"autocast": ("float32", True), "bf16 weights": ("bfloat16", False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of causal language models")
    parser.add_argument("--pairs", required=True, help="pairs in any layout that is known here")
    parser.add_argument("--num_pairs", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--output", type=Path)
    run_benchmark(parser.parse_args(), measure, print_table)


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    return {
        "machine": {"name": device_name(CPU), "instructions": bf16_instructions()},
        "torch": torch.__version__,
        "pairs": flags.num_pairs,
        "max_length": flags.max_length,
        "models": [errors_of(model, flags) for model in flags.models],
    }


def errors_of(model: str, flags: argparse.Namespace) -> dict[str, Any]:
    """Of one model: what its log-probs are, and how far each way lies from them."""
    pairs = first_pairs(model, flags)
    expected_P2 = logps(model, pairs, "float32", autocast=False)
    lengths_P2 = torch.tensor([[len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    found = {name: logps(model, pairs, *way) for name, way in WAYS.items()}
    margins_P = expected_P2 @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return {
        "name": Path(model).name,
        "response_tokens": lengths_P2.double().mean().item(),
        "logp": expected_P2.mean().item(),
        "margin": margins_P.abs().mean().item(),
        "ways": [{"name": name, **errors(got_P2, expected_P2, lengths_P2)} for name, got_P2 in found.items()],
        # What step 0 of one process says of the policy against its own weights as a reference.
        "between_the_ways": ((found["autocast"] - found["bf16 weights"]) / expected_P2).abs().max().item(),
    }


def errors(got_P2: Tensor, expected_P2: Tensor, lengths_P2: Tensor) -> dict[str, float]:
    """In nats, but where it says relative."""
    off_P2 = got_P2 - expected_P2
    margin_off_P = off_P2[:, 0] - off_P2[:, 1]
    return {
        "mean": off_P2.abs().mean().item(),
        "largest": off_P2.abs().max().item(),
        "bias_per_token": (off_P2.sum() / lengths_P2.sum()).item(),
        "largest_relative": (off_P2 / expected_P2).abs().max().item(),
        "margin_mean": margin_off_P.abs().mean().item(),
        "margin_largest": margin_off_P.abs().max().item(),
    }


def first_pairs(model: str, flags: argparse.Namespace) -> list[PairTokens]:
    with tempfile.TemporaryDirectory() as folder:
        args = MRPOConfig(
            output_dir=folder, use_cpu=True, report_to="none", max_length=flags.max_length, max_bad_rows=1.0
        )
        rows, _ = load_rows(flags.pairs)
        pairs = prepare_sets(plan_models(model, [], args, None), args, rows, None)["train"]
        if len(pairs) < flags.num_pairs:
            raise SystemExit(f"{flags.pairs} holds {len(pairs)} good pairs; see --num_pairs")
        return [pairs.tokens(i)[0] for i in range(flags.num_pairs)]


@torch.no_grad()
def logps(folder: str, pairs: list[PairTokens], dtype: str, autocast: bool) -> Tensor:
    """Log-probs [P, 2] as a run on a CPU computes them, in float64."""
    with tempfile.TemporaryDirectory() as work:
        args = MRPOConfig(output_dir=work, use_cpu=True, report_to="none", dtype=dtype)
        model = load_policy(plan_models(folder, [], args, None).policy).eval()
    enable_pair_scoring(model, folder, "torch")
    half = torch.bfloat16 if autocast else None
    layout = {"end_to_end": choose_end_to_end(model, CPU, name=folder, dtype=half)}
    layout["shared_prompt"] = choose_shared_prompt("auto", model, folder)
    scored = []
    for pair in pairs:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scored.append(score_pairs(model, collate_pairs([pair], **layout)))
        assert scored[-1].dtype == torch.float32
    return torch.cat(scored).double()


def print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['pairs']} pairs, max_length {result['max_length']}, {result['machine']['name']}; nats")
    print(f"{'':28}{'mean':>10}{'largest':>10}{'relative':>10}{'margin':>10}{'largest':>10}{'bias/token':>12}")
    for model in result["models"]:
        print(f"{model['name']}: log-prob {model['logp']:.1f}, margin {model['margin']:.1f}", end="")
        print(f", {model['response_tokens']:.0f} tokens; between the ways {model['between_the_ways']:.1e} relative")
        for way in model["ways"]:
            print(
                f"  {way['name']:26}{way['mean']:>10.3f}{way['largest']:>10.3f}{way['largest_relative']:>10.1e}", end=""
            )
            print(f"{way['margin_mean']:>10.3f}{way['margin_largest']:>10.3f}{way['bias_per_token']:>12.1e}")


if __name__ == "__main__":
    main()
