"""The planner's memory against what CPU ranks under ZeRO-3 really hold: bytes of tensors by kind, and what autograd saves.

    python -m benchmarks.validate_planner [--output benchmarks/results/planner-cpu.json]

Three policies (10M, 60M and the architecture of SmolLM2-135M, random weights) with two references beside them, under both
placements, with and without gradient checkpointing. Needs the clone: tokenizer and words are those of the tests.
tests/distributed/test_planner.py does the same with smaller models.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback

from mrpo_scale.base.device import peak_memory_gib, reset_peak_memory
from mrpo_scale.bench.communication import CollectiveCounter
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.logps.flops import work_of_batch
from mrpo_scale.logps.micro_batches import MicroBatch, PeerBatch
from mrpo_scale.planner.cluster import make_cluster
from mrpo_scale.planner.estimate import estimate
from mrpo_scale.planner.job import Job, PlannedModel, Setting
from mrpo_scale.planner.model_size import model_size
from mrpo_scale.planner.workload import Workload
from mrpo_scale.planner.zero import policy_traffic, read_zero
from mrpo_scale.training.trainer import MRPOTrainer
from tests.tiny import WORDS, tokenizer

ROOT = Path(__file__).parents[1]

SIZES: dict[str, dict[str, Any]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "vocab_size": 16384},
    "60M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 11, "vocab_size": 32768},
    # SmolLM2-135M's config.json
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 5, "vocab_size": 20001}),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 320, "intermediate_size": 900, "num_hidden_layers": 4, "vocab_size": 9999},
    ),
}


def write_model(folder: Path, model_type: str, sizes: dict[str, Any]) -> None:
    """A random model and a tokenizer that fits it."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if model_type == "gpt_neox" else 2}
    config = AutoConfig.for_model(
        model_type,
        **{"max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | heads | sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer("{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}", 280).save_pretrained(folder)


def pairs(count: int, words: int) -> datasets.Dataset:
    """Rows whose prompt and responses have about ``words`` words each."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(words // 2, words)))

    return datasets.Dataset.from_list([{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(count)])


class Measured(MRPOTrainer):
    """Counts what the policy's forward leaves for its backward, and gathers, in the second step, once everything is in place."""

    activations: tuple[int, int] | None = None  #: bytes saved, bytes predicted
    secondary: int = 0  #: bytes of hpZ's second copy, which a forward leaves until the optimizer's step
    gathered: tuple[int, ...] = ()  #: bytes of weights that each micro-batch brought from other ranks

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 0:
            return super().training_step(*args, **kwargs)
        with CollectiveCounter() as moved:  # both ways at once: a forward's end gathers ahead for the backward
            loss = super().training_step(*args, **kwargs)
        self.gathered += (moved.bytes["all_gather"],)
        return loss

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if self.state.global_step == 0:
            return super().compute_loss(model, inputs, **kwargs)
        batch = [value for value in vars(inputs.pairs).values() if isinstance(value, Tensor)]
        known = [*batch, *_references_of(inputs)]
        with saved_bytes(self.policy, known) as found:
            loss = super().compute_loss(model, inputs, **kwargs)
        self.secondary = tensor_bytes([p.ds_secondary_tensor for p in self.policy.parameters()], set())
        size = model_size(self.plan.policy, itemsize=4, device_type="cpu")
        work = work_of_batch(inputs.pairs)
        self.activations = (
            sum(found.values()),
            size.activations.kept(
                work,
                4,
                checkpointing=self.args.gradient_checkpointing,
                ranks=self.args.sequence_parallel_size,
            ),
        )
        return loss


def _references_of(batch: MicroBatch | PeerBatch) -> list[Tensor]:
    """None of a batch that is another rank's."""
    return [] if isinstance(batch, PeerBatch) else [*vars(batch.references).values(), batch.weight_P]


@contextmanager
def saved_bytes(model: torch.nn.Module, inputs: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """{storage: bytes} of what autograd saves in the block, but for weights (gathered ones too), buffers and ``inputs``."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.buffers(), *inputs]}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no freed address is counted as another tensor's

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
        if storage.data_ptr() not in known | weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def tensor_bytes(tensors: Iterable[Tensor | None], known: set[int]) -> int:
    """Of their distinct storages that are not in ``known``; adds them to it."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def held_by_rank(trainer: Measured) -> dict[str, int]:
    """Bytes of tensors that this rank holds after a step, by kind."""
    engine: Any = trainer.deepspeed
    zero, known = engine.optimizer, set()
    parameters = list(trainer.policy.parameters())
    states = [value for state in zero.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    references = [p for r in trainer.scores.references.values() for p in r.model.model.parameters()]
    return {
        "parameters": tensor_bytes([t for p in parameters for t in (p.ds_tensor, p.data)], known) + trainer.secondary,
        "optimizer": tensor_bytes([*zero.fp32_partitioned_groups_flat, *states], known),
        "gradients": tensor_bytes(
            [zero.grad_partitions_flat_buffer, *(bucket.buffer for bucket in zero.ipg_buckets.values())], known
        ),
        "references": tensor_bytes(references, known),
    }


def measure(
    policy: str,
    references: list[str],
    output_dir: str,
    *,
    placement: str,
    checkpointing: bool,
    words: int,
    ds_config: str | None = None,
    accumulation: int = 1,
    sequence: int = 1,
) -> dict[str, Any]:
    """Two steps on this rank; predicted and measured bytes by kind. Collective over the world.

    Args:
        ds_config: path; None where accelerate's launcher names one. Ranks of hpZ's groups stand for nodes.
        sequence: `sequence_parallel_size`.
    """
    if torch.distributed.is_initialized():  # a pool of tests; under a launcher accelerate does it
        from deepspeed import comm

        comm.init_distributed(dist_backend="gloo")
    reset_peak_memory()
    config = MRPOConfig(
        output_dir=output_dir,
        deepspeed=ds_config,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        sequence_parallel_size=sequence,
        max_steps=2,
        gradient_checkpointing=checkpointing,
        head_backward="recompute",  # what the head keeps is then seen by the hooks, too
        ref_placement=placement,  # type: ignore[arg-type]
        ref_shard_size=2,  # both ranks, as on a node of GPUs: left to themselves CPUs would map the files
        max_length=None,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = pairs(4 * accumulation * config.world_size, words)
    trainer = Measured(policy, ref_models=references, args=config, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
        measured = held_by_rank(trainer)
        peak = peak_memory_gib(config.device)
        predicted = predict(trainer, ds_config or "zero3_cpu", checkpointing=checkpointing)
    finally:
        if trainer.deepspeed is not None:
            trainer.deepspeed.destroy()
        trainer.scores.references.clear()
        AcceleratorState._reset_state()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, of which a process can make only one
        gc.collect()
    assert trainer.activations is not None
    kinds = {kind: {"measured": measured[kind], "predicted": predicted[kind]} for kind in measured}
    for number, size in enumerate(trainer.gathered):
        kinds[f"gathered by micro-batch {number}"] = {"measured": size, "predicted": predicted[f"gathered {number}"]}
    kinds["activations"] = dict(zip(("measured", "predicted"), trainer.activations, strict=True))
    return {"kinds": kinds, "peak_rss_gib": round(peak, 3)}


def predict(trainer: Measured, ds_config: str, *, checkpointing: bool) -> dict[str, int]:
    """What the planner says of the rank that holds most, and of the bytes that a micro-batch gathers."""
    args, plan, zero = trainer.args, trainer.plan, read_zero(ds_config)
    cluster = make_cluster("cpu", args.world_size, zero.secondary if zero.secondary > 1 else args.world_size, None)
    job = Job(
        policy=model_size(plan.policy, itemsize=4, device_type="cpu"),
        references=tuple(
            PlannedModel(model_size(r.source, itemsize=4, device_type="cpu"), r.tokenization) for r in plan.references
        ),
        workload=Workload(np.asarray(trainer.pair_sets["train"].lengths)),
        window=trainer.window_size,
        tokens_per_forward=args.ref_tokens_per_forward,
        gradients_in_forward=False,
        device_type="cpu",
    )
    sequence = args.sequence_parallel_size
    setting = Setting(2, checkpointing, zero, placement=args.ref_placement, shard_size=2, sequence_parallel=sequence)
    sent = policy_traffic(job.policy, zero, cluster, checkpointing=checkpointing)
    scattered = cluster.gather(4 * job.policy.trained_parameters, cluster.gpus)
    again, backward = sum(sent.forward[:2]), sum(sent.backward[:2]) - sum(scattered[:2])
    # In every turn each rank of a sequence group has a forward of its own pairs, and one of each other rank's.
    later = (sequence - 1) * again + sequence * backward
    gathered = {
        f"gathered {n}": round(later + (again if n else sum(sent.first[:2]))) for n in range(len(trainer.gathered))
    }
    return {**estimate(job, setting, cluster).held, **gathered}


def _rank(folder: Path, sizes: list[str]) -> None:
    """All cases of some sizes, on one rank of the launcher."""
    results = []
    for size in sizes:
        for placement in ("spread", "partition"):
            for checkpointing in (False, True):
                found = measure(
                    str(folder / size), [str(folder / name) for name in REFERENCES], str(folder / "out"),
                    placement=placement, checkpointing=checkpointing, words=50,
                )  # fmt: skip
                case = {"policy": size, "placement": placement, "gradient_checkpointing": checkpointing}
                results.append({**case, "rank": int(os.environ["RANK"]), **found})
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


def _table(results: list[dict[str, Any]]) -> str:
    from mrpo_scale.base.tables import aligned_table

    header = ("policy", "placement", "checkpointing", "kind", "measured MiB", "predicted MiB", "predicted / measured")
    rows = []
    for case in results:
        for kind, found in case["kinds"].items():
            rows.append(
                (
                    case["policy"], case["placement"], str(case["gradient_checkpointing"]).lower(), kind,
                    f"{found['measured'] / 2**20:.2f}", f"{found['predicted'] / 2**20:.2f}",
                    f"{found['predicted'] / found['measured']:.3f}",
                )
            )  # fmt: skip
        rows.append((*rows[-1][:3], "resident set, peak", f"{case['peak_rss_gib'] * 1024:.0f}", "-", "-"))
    return aligned_table(header, rows)


def worst_of_ranks(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per case and kind the rank that holds most, which is what the planner speaks of."""
    cases = []
    for same in zip(*ranks, strict=True):
        kinds = {
            kind: max((r["kinds"][kind] for r in same), key=lambda found: found["measured"])
            for kind in same[0]["kinds"]
        }
        cases.append({**same[0], "kinds": kinds, "peak_rss_gib": max(r["peak_rss_gib"] for r in same)})
    return cases


def _keep(path: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the cases of one size in the file, in place of those that it has of that size; returns all that it has."""
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    by_size = {size: [c for c in known if c["policy"] == size] for size in SIZES} | {cases[0]["policy"]: cases}
    results = [case for of_size in by_size.values() for case in of_size]
    path.write_text(json.dumps({"ranks": 2, "torch": torch.__version__, "cases": results}, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/planner-cpu.json")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    args = parser.parse_args()
    if args.folder:
        _rank(args.folder, args.sizes)
        return
    with tempfile.TemporaryDirectory(prefix="mrpo-planner-") as temporary:
        folder = Path(temporary)
        for name, sizes in SIZES.items():
            write_model(folder / name, "llama", sizes)
        for name, (model_type, sizes) in REFERENCES.items():
            write_model(folder / name, model_type, sizes)
        launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
        words = [*launcher, "launch/accelerate/cpu_zero3.yaml", "-m", __spec__.name, "--folder", str(folder), "--sizes"]
        for size in args.sizes:  # a launch for each, so that no case inherits memory from a larger one
            subprocess.run([*words, size], check=True, cwd=ROOT)
            cases = worst_of_ranks([json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)])
            results = _keep(args.output, cases)
    print(f"\n{_table(results)}")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
