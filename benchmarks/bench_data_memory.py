"""Resident memory while a data set is read, made into pairs and tokenized: it must not grow with the set.

    python benchmarks/bench_data_memory.py --gigabytes 0.1 1 --layout strings --layout nectar

Each case writes a .jsonl file of that size, then reads it in a process of its own with an empty cache. Anonymous memory (RssAnon)
is what the process holds for itself; pages of memory-mapped Arrow files are the kernel's to drop and are not counted in it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Long ones, a token each: what is measured is memory, and tokenizing takes most of the time.
WORDS = ["incomprehensibilities", "counterrevolutionaries", "electroencephalographs", "uncharacteristically"]


def rows(layout: str) -> Iterator[dict[str, Any]]:
    """Rows of about 4 kB, without end."""
    rng = random.Random(0)

    def text(characters: int) -> str:
        return " ".join(rng.choices(WORDS, k=characters // 22))

    while True:
        if layout == "strings":
            yield {"prompt": text(1300), "chosen": text(1300), "rejected": text(1300)}
        elif layout == "nectar":
            answers = [{"answer": text(900), "model": "m", "rank": float(i)} for i in range(1, 5)]
            yield {"prompt": f"\n\nHuman: {text(400)}\n\nAssistant: ", "answers": answers}
        else:  # helpsteer: the two rows of a prompt
            prompt = text(1300)
            for score in (1, 4):
                yield {"prompt": prompt, "response": text(2700), "helpfulness": score}


def write(path: Path, layout: str, size: int) -> None:
    with path.open("w") as file:
        for row in rows(layout):
            if file.tell() >= size:
                return
            file.write(json.dumps(row) + "\n")


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def prepare(path: str, cache: str) -> tuple[int, float, float, float, float, float]:
    """Read, pair, tokenize. Returns pairs, MiB after imports, at the peak (looked at every 20 ms) and at the end, GiB, seconds."""
    import datasets
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mrpo_scale.data import PairOptions, find_layout, load_rows
    from mrpo_scale.data.pair_dataset import prepare_pairs
    from mrpo_scale.data.tokenization import ModelText

    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    view = ModelText(tokenizer, name="policy", max_context=None)

    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    loaded, _ = load_rows(path)
    options = PairOptions(ranked_pairs="best_vs_random")
    pairs = prepare_pairs(loaded, find_layout(loaded), [view], max_length=1024, options=options)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    written = sum(file.stat().st_size for file in Path(cache).rglob("*.arrow")) / 2**30
    return len(pairs), before, peak[0], anonymous_mib(), written, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--layout", choices=["strings", "nectar", "helpsteer"], action="append")
    args = parser.parse_args()
    print("| layout | file | pairs | after imports | peak | at the end | Arrow files | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for layout in args.layout or ["strings"]:
        for gigabytes in args.gigabytes:
            folder = Path(tempfile.mkdtemp(prefix="mrpo-data-"))
            try:
                write(folder / "pairs.jsonl", layout, int(gigabytes * 2**30))
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                    case = alone.submit(prepare, str(folder / "pairs.jsonl"), str(folder / "hf"))
                    pairs, before, peak, after, written, seconds = case.result()
            finally:
                shutil.rmtree(folder)
            print(
                f"| {layout} | {gigabytes:g} GiB | {pairs} | {before:.0f} MiB | {peak:.0f} MiB | {after:.0f} MiB "
                f"| {written:.1f} GiB | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
