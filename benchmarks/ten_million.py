"""Ten million pairs, stage after stage as `mrpo train` and `mrpo score` take them: tokenizing, the score cache, starts.

    python benchmarks/ten_million.py --folder /scratch/pairs --json benchmarks/results/ten-million-cpu.json     # hours, 40 GB
    python benchmarks/ten_million.py --folder /scratch/pairs --rows 100000

Every stage is a process of its own, so that its peak memory is its own; a second call goes on where the first one stopped.
`--tokenized N` tokenizes about N of the rows and fills the other blocks with copies under keys of their own: starts read them all
the same. Scores are random numbers, written as scoring jobs write them. For the resumed start the checkpoint of the first step is
moved to the middle of the epoch. Models are tiny: what is measured grows with rows, not with weights. Seconds of the clock are
those of whatever else the machine does; `cpu_seconds` are of the processes themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_cache import write_report

WORDS = [
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("red", "green", "blue", "fast", "slow", "yes", "no", "maybe"),
]
BATCH, ACCUMULATION = 8, 8
CHUNK = 100_000


def make_world(folder: Path, rows: int) -> None:
    """Two tiny models, and short rows as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("llama", **sizes, **heads, pad_token_id=0, eos_token_id=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    columns = ("prompt", "chosen", "rejected")
    with pq.ParquetWriter(folder / "rows.part", pa.schema([(name, pa.string()) for name in columns])) as file:
        for start in range(0, rows, CHUNK):
            words = np.array(WORDS)[rng.integers(0, len(WORDS), size=(min(CHUNK, rows - start), 15))]
            texts = [
                (f"{start + i} {' '.join(w[:7])}?", f"{' '.join(w[7:11])} {i % 9}", f"{' '.join(w[11:])} {i % 7}!")
                for i, w in enumerate(words)
            ]
            file.write_table(pa.table(dict(zip(columns, zip(*texts, strict=True), strict=True))))
    (folder / "rows.part").rename(folder / "rows.parquet")


def words_of(folder: Path, **keys: Any) -> list[str]:
    """The command line of the run."""
    recipe = {
        "model_name_or_path": folder / "policy",
        "ref_models": folder / "reference",
        "max_length": 128,
        "dataset_name": folder / "rows.parquet",
        "output_dir": folder / "run",
        "ref_cache_dir": folder / "scores",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "use_cpu": True,
        "num_train_epochs": 1,
        "report_to": "none",
        "gradient_checkpointing": False,
        "save_steps": 100_000,
        **keys,
    }
    return [word for key, value in recipe.items() for word in (f"--{key}", str(value))]


def spent() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    mine, theirs = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    clock, cpu = time.perf_counter(), spent()
    made = call()
    return made, {"seconds": time.perf_counter() - clock, "cpu_seconds": spent() - cpu}


def memory() -> dict[str, float]:
    """GiB: the most that was resident, and what of it is the process's own now, not mapped from files."""
    status = Path("/proc/self/status").read_text()
    kib = {name: int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmHWM", "RssAnon")}  # type: ignore[index]
    return {"peak_gib": kib["VmHWM"] / 2**20, "own_gib": kib["RssAnon"] / 2**20}


def opened(folder: Path) -> Any:
    from mrpo_scale.commands.score import Recipe

    return Recipe.open(words_of(folder))


def tokens(folder: Path, wanted: int) -> dict[str, Any]:
    """Rows tokenized as any start does it, but for blocks that are filled before."""
    from mrpo_scale.data import pair_dataset

    real, figures = pair_dataset.tokenized, {}

    def measured(table: Any, **options: Any) -> Any:
        missing = [n for n in range(table.blocks) if table.read(n) is None]
        real_blocks = max(1, min(table.blocks, round(wanted / len(table.rows) * table.blocks)))
        made = [n for n in missing if n < real_blocks]
        if missing[len(made) :] and made:
            table.write(made.pop(0))  # what the others are copies of
        for number in missing[-1 : real_blocks - 1 : -1]:
            copy_block(table, number)
        whole, took = timed(lambda: real(table, **options))
        rows = sum(len(table.block(n)) for n in made)
        files = [table.file(n) for n in range(table.blocks)]
        figures.update(rows=rows, copied_rows=len(table.rows) - sum(len(table.block(n)) for n in range(real_blocks)))
        figures.update(took, files=len(files), gib=sum(f.stat().st_size for f in files) / 2**30)
        figures.update(rows_per_cpu_second=rows / took["cpu_seconds"])
        return whole

    pair_dataset.tokenized = measured  # type: ignore[assignment]
    _, whole = timed(lambda: opened(folder))
    return {**figures, "processes": len(os.sched_getaffinity(0)), "whole_start": whole, **memory()}


def copy_block(table: Any, number: int) -> None:
    import pyarrow as pa

    from mrpo_scale.base.atomic_files import atomic_file

    source, rows = table.read(0).data.table, len(table.block(number))
    source = pa.concat_tables([source, source]).slice(0, rows)
    rng = np.random.default_rng(number)
    for name in ("row_key_0", "row_key_1", "prompt_key"):
        keys = pa.array(rng.integers(0, 2**63 - 1, size=rows, dtype=np.int64))
        source = source.set_column(source.column_names.index(name), source.schema.field(name), keys)
    with atomic_file(table.file(number)) as file, pa.ipc.new_stream(file, source.schema) as out:
        out.write_table(source.combine_chunks())


def fill_scores(folder: Path) -> dict[str, Any]:
    """A score for every row and reference, in parts as `mrpo score` writes them."""
    from mrpo_scale.references.store.cache import PartWriter
    from mrpo_scale.references.stores import distinct_rows, open_stores

    recipe = opened(folder)
    keys = distinct_rows(recipe.pair_sets)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(keys))

    def write() -> None:
        for store in open_stores(recipe.plan, recipe.config, recipe.pair_sets, read=False):
            store.prepare_to_write()
            with PartWriter(store) as writer:
                for start in range(0, len(order), 4096):
                    some = order[start : start + 4096]
                    logps = -rng.uniform(1, 100, size=(len(some), 2)).astype(np.float32)
                    writer.add(keys[some], logps, np.full((len(some), 2), 9, dtype=np.int32))

    _, took = timed(write)
    return {"rows": len(keys), **took, **memory()}


def cache(folder: Path) -> dict[str, Any]:
    """The stores read, and asked for windows of rows."""
    from mrpo_scale.references.stores import count_missing, distinct_rows, open_stores

    recipe = opened(folder)
    before = memory()
    stores, took = timed(lambda: open_stores(recipe.plan, recipe.config, recipe.pair_sets))
    keys = distinct_rows(recipe.pair_sets)
    missing, counted = timed(lambda: count_missing(stores, keys))
    assert not any(missing)
    rng, cpu = np.random.default_rng(1), []
    window = BATCH * ACCUMULATION
    for _ in range(500):
        asked = keys[rng.integers(0, len(keys), size=window)]
        start = time.process_time()
        assert all(store.lookup(asked).found_N.all() for store in stores)
        cpu.append(1e6 * (time.process_time() - start))
    files = [file for store in stores for file in store.folder.glob("part-*")]
    return {
        "references": len(stores),
        "parts": len(files),
        "gib": sum(f.stat().st_size for f in files) / 2**30,
        "open": took,
        "count_missing": counted,
        "window_rows": window,
        "window_cpu_us": float(np.median(cpu)),
        "own_gib_before": before["own_gib"],
        **memory(),
    }


def train(folder: Path) -> dict[str, Any]:
    """`mrpo train` up to its first step, which is taken and saved before the run stops."""
    from mrpo_scale.base.errors import Preempted
    from mrpo_scale.commands import train as command
    from mrpo_scale.training import prepare, trainer

    figures: dict[str, Any] = {}
    clock = time.perf_counter() - (time.time() - started())
    real_step, real_rows, real_sets = trainer.optimizer_step, command.read_rows, prepare.prepare_sets

    def step(run: Any, *args: Any) -> Any:
        if "seconds" not in figures:
            figures.update(step=args[2], seconds=time.perf_counter() - clock, cpu_seconds=spent(), **memory())
        return real_step(run, *args)

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            made, figures[name] = timed(lambda: call(*args))
            return made

        return run

    trainer.optimizer_step = step  # type: ignore[assignment]
    command.read_rows, prepare.prepare_sets = noted("read_rows", real_rows), noted("prepare_sets", real_sets)  # type: ignore[assignment]
    try:
        command.run(words_of(folder, max_hours=1e-6))
    except Preempted:
        return figures
    raise SystemExit("the run did not stop after its first step")


def started() -> float:
    """When this process began, in seconds since 1970: imports are part of a start."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    boot = int(re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.M)[1])  # type: ignore[index]
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def move_checkpoint(run: Path, rows: int) -> None:
    """The checkpoint of step 1 becomes one of the middle of the epoch."""
    from mrpo_scale.lifecycle import checkpoints

    middle = rows // (BATCH * ACCUMULATION) // 2
    old, new = run / "checkpoint-1", run / f"checkpoint-{middle}"
    marker = json.loads((old / "complete.json").read_text())
    (old / "complete.json").unlink()
    old.rename(new)
    state = json.loads((new / "trainer_state.json").read_text())
    state.update(global_step=middle, epoch=0.5)
    (new / "trainer_state.json").write_text(json.dumps(state))
    checkpoints.write_marker(new, step=middle, world_size=1, fingerprint=marker["fingerprint"])


def stage(name: str, folder: Path, *words: str) -> dict[str, Any]:
    """In a process of its own; what it found is kept beside the rows."""
    file = folder / f"figures-{name}.json"
    if not file.exists():
        print(f"{name} ...", flush=True)
        words = (sys.executable, __file__, "--folder", str(folder), "--stage", name, *words)
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        subprocess.run(words, check=True, env=environment)
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--tokenized", type=int, help="default: all rows")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.absolute()
    wanted = args.rows if args.tokenized is None else args.tokenized
    if args.stage:
        stages = {
            "tokens": lambda: tokens(folder, wanted),
            "fill": lambda: fill_scores(folder),
            "cache": lambda: cache(folder),
            "first": lambda: train(folder),
            "resumed": lambda: train(folder),
        }
        (folder / f"figures-{args.stage}.json").write_text(json.dumps(stages[args.stage](), indent=2) + "\n")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.parquet").exists():
        make_world(folder, args.rows)
    figures = {
        "tokens": stage("tokens", folder, "--tokenized", str(wanted), "--rows", str(args.rows)),
        "fill": stage("fill", folder),
        "cache": stage("cache", folder),
    }
    if not (folder / "figures-first.json").exists():
        shutil.rmtree(folder / "run", ignore_errors=True)
    figures["first"] = stage("first", folder)
    if (folder / "run" / "checkpoint-1").exists():
        move_checkpoint(folder / "run", args.rows)
    figures["resumed"] = stage("resumed", folder)
    write_report({"rows": args.rows, **figures}, args.json)


if __name__ == "__main__":
    main()
