"""Times the cache of reference scores: writing parts, opening a store, and looking up the rows of a batch.

    python benchmarks/bench_cache.py                        # ten million rows, about 330 MB in a temporary folder
    python benchmarks/bench_cache.py --rows 100000 --json out.json

Another process writes the store, so that the memory of this one is that of a reader. The files are in the page cache when they are
read. Lookups ask for other random rows each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mrpo_scale.references.store.cache import PartWriter, ReferenceStore
from mrpo_scale.references.store.identity import ReferenceIdentity

IDENTITY = ReferenceIdentity("benchmark", {"weights": {"model.safetensors": "0" * 64}})
CHUNK = 65536


def keys(start: int, stop: int) -> np.ndarray:
    """[stop - start] keys, as good as random: an odd factor makes row numbers into distinct first halves."""
    i = np.arange(start, stop, dtype=np.uint64)
    scattered = i * np.uint64(0x9E3779B97F4A7C15)
    return np.stack([scattered ^ (scattered >> np.uint64(32)), i], axis=1).view("S16").ravel()


def fill(root: Path, count: int, seconds: Any) -> None:
    rng = np.random.default_rng(0)
    store = ReferenceStore(root, IDENTITY)
    store.prepare_to_write()
    start = time.perf_counter()
    with PartWriter(store) as writer:
        for at in range(0, count, CHUNK):
            n = min(CHUNK, count - at)
            logps = -rng.uniform(1, 1000, size=(n, 2)).astype(np.float32)
            writer.add(keys(at, at + n), logps, rng.integers(1, 512, size=(n, 2), dtype=np.int32))
    seconds.value = time.perf_counter() - start


def memory(field: str) -> float:
    """MiB, of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def open_store(root: Path, wanted: np.ndarray | None = None) -> tuple[ReferenceStore, dict[str, float]]:
    before = memory("RssAnon")
    store = ReferenceStore(root, IDENTITY, wanted)
    start, cpu = time.perf_counter(), time.process_time()
    store.refresh()
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return store, {"rows": len(store), **spent, "anonymous_mib": memory("RssAnon") - before}


def time_lookups(store: ReferenceStore, count: int, batch: int, repeats: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    times = []
    for _ in range(repeats):
        asked = np.concatenate([keys(i, i + 1) for i in rng.integers(0, count, size=batch)])
        start = time.perf_counter()
        found = store.lookup(asked).found_N
        times.append(1e6 * (time.perf_counter() - start))
        assert found.all()
    return {"first_us": times[0], "median_us": statistics.median(times), "p99_us": float(np.percentile(times, 99))}


def measure(root: Path, count: int, batch: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    seconds = context.Value("d", 0.0)
    writer = context.Process(target=fill, args=(root, count, seconds))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the process that fills the store failed")
    files = list((root / IDENTITY.key).glob("part-*"))
    some, some_figures = open_store(root, wanted=keys(0, count // 100))
    del some
    store, figures = open_store(root)
    start = time.perf_counter()
    store.refresh()
    again = time.perf_counter() - start
    start = time.perf_counter()
    assert not store.missing(keys(0, min(count, 1_000_000))).any()
    return {
        "write": {"seconds": seconds.value, "parts": len(files), "mib": sum(f.stat().st_size for f in files) / 2**20},
        "open": figures,
        "open_wanting_1_percent": some_figures,
        "refresh_without_news_ms": 1e3 * again,
        "missing_of_a_million_rows_s": time.perf_counter() - start,
        f"lookup_{batch}_rows": time_lookups(store, count, batch, 2000),
        "peak_mib": memory("VmHWM"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.rows, args.batch)
    write_report({"rows": args.rows, **figures}, args.json)


def write_report(figures: dict[str, Any], path: Path | None) -> None:
    """Print what was measured and on what; write it to ``path`` as well, if there is one."""
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "numpy": np.__version__,
    }
    text = json.dumps({"machine": machine, **figures}, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
