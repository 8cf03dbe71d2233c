"""The first half hour on a GPU: every measurement that waits for one, the most telling first.

    make gpu                                       # or, in a bare checkout: python3 benchmarks/gpu_session.py --out $OUT
    python benchmarks/gpu_session.py --dry_run     # what would run, and whether anything is missing for it
    python benchmarks/gpu_session.py --only kernels tiles

Each part is a process of its own with a time of its own; one that fails or is cut off costs only itself. After each, session.json
and session.md say what has run so far, and the parts leave their own JSON beside them, so the session may be cut anywhere. Without
a GPU the parts that a CPU can do run there, on small sizes: they show that the commands work, and time nothing of interest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PEERS = {
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "trl": "trl",
}
BENCH = ["launch/bench.py", "--config", "bench_1b", "--references", "1", "2", "3", "--scoring", "live", "cached"]
MODEL_1B = (
    *("hidden_size=2048", "num_hidden_layers=16", "intermediate_size=8192", "num_attention_heads=16"),
    *("num_key_value_heads=8", "vocab_size=128256", "max_position_embeddings=4096"),
)
TINY = (
    "hidden_size=64",
    "num_hidden_layers=2",
    "intermediate_size=128",
    "num_attention_heads=4",
    "num_key_value_heads=2",
)


@dataclass(frozen=True)
class Part:
    """A command for python, ``{out}`` in it the folder of the results."""

    name: str
    shows: str
    minutes: float
    gpu: Sequence[str]
    cpu: Sequence[str] | None  #: None: only a GPU can
    modules: tuple[str, ...] = ()
    cpu_environment: tuple[str, ...] = ()


_TESTS = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
_TINY_PAIRS = ("--random_pairs", "24", "12", "--output", "{out}/bench-1b")
PARTS = [
    Part(
        "correct",
        "the kernels agree with float64",
        3,
        (*_TESTS, "tests/kernel/test_triton.py", "tests/kernel/test_traps.py"),
        (*_TESTS, "tests/kernel/test_triton.py", "-k", "strides or two_launches or references_are_constants"),
        ("pytest", "triton"),
        ("TRITON_INTERPRET=1",),
    ),
    Part(
        "kernels",
        "the head against its peers",
        7,
        ("benchmarks/bench_kernels.py", "--out", "{out}"),
        ("benchmarks/bench_kernels.py", "--device", "cpu", "--rounds", "1", "--out", "{out}"),
        ("matplotlib", "triton"),
    ),
    Part(
        "attention",
        "ways to share a prompt",
        2,
        ("benchmarks/bench_attention.py", "--out", "{out}"),
        ("benchmarks/bench_attention.py", "--device", "cpu", "--out", "{out}"),
    ),
    Part(
        "bench",
        "a step of 1B parameters, K = 1, 2, 3",
        8,
        (
            *BENCH,
            "--steps",
            "48",
            "--random_weights",
            *MODEL_1B,
            "--random_pairs",
            "512",
            "256",
            "--output",
            "{out}/bench-1b",
        ),
        (*BENCH[:4], "2", *BENCH[7:], "--steps", "12", "--random_weights", *TINY, *_TINY_PAIRS),
        ("transformers", "accelerate", "datasets"),
    ),
    Part(
        "profile",
        "where a step's time goes on the device",
        3,
        ("benchmarks/profile_step.py", "--out", "{out}", "--model", *MODEL_1B, "--pairs", "512", "256"),
        ("benchmarks/profile_step.py", "--device", "cpu", "--out", "{out}", "--model", *TINY, "--pairs", "24", "12"),
        ("transformers", "accelerate", "datasets"),
    ),
    Part(
        "tiles",
        "candidate tiles of the forward",
        6,
        ("benchmarks/bench_kernels.py", "--tune", "--out", "{out}"),
        None,
        ("triton",),
    ),
]


def lacks(part: Part, device: str) -> list[str]:
    """What is missing for a part: files of this checkout, modules, or a GPU."""
    command = part.gpu if device == "cuda" else part.cpu
    if command is None:
        return ["a GPU"]
    files = [word for word in command if word.endswith(".py") and not (ROOT / word).exists()]
    return files + [module for module in part.modules if importlib.util.find_spec(module) is None]


def run(part: Part, device: str, out: Path, limit: float) -> dict[str, object]:
    """Run a part for at most ``limit`` seconds; its output goes to a log in ``out``."""
    command = [word.format(out=out) for word in (part.gpu if device == "cuda" else part.cpu or ())]
    path = os.pathsep.join(filter(None, (str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= dict(setting.split("=") for setting in part.cpu_environment)
    started, log = time.monotonic(), out / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = "cut off"
    seconds = round(time.monotonic() - started, 1)
    return {"name": part.name, "shows": part.shows, "seconds": seconds, "limit": limit, "exit": code, "log": log.name}


def write(out: Path, session: dict[str, object], rows: Sequence[dict[str, object]]) -> None:
    (out / "session.json").write_text(json.dumps({**session, "parts": rows}, indent=1) + "\n")
    lines = [
        f"{session['device']}, torch {session['torch']}, {session['started']}",
        "",
        "| part | shows | seconds | of | exit |",
    ]
    lines += ["|---|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['shows']} | {row['seconds']} | {row['limit']} | {row['exit']} |" for row in rows]
    (out / "session.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the whole")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--dry_run", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    if args.dry_run:
        return dry_run(parts, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, no GPU"
    session: dict[str, object] = {
        "device": name,
        "torch": torch.__version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    deadline, rows = time.monotonic() + 60 * args.minutes, list[dict[str, object]]()
    for part in parts:
        left = deadline - time.monotonic()
        skipped = lacks(part, device) or (["time"] if left < 20 else [])
        if skipped:
            row: dict[str, object] = {"name": part.name, "shows": part.shows, "seconds": 0, "limit": 0}
            rows.append({**row, "exit": f"needs {', '.join(skipped)}", "log": None})
        else:
            rows.append(run(part, device, args.out.resolve(), min(60 * part.minutes, left)))
        print(f"{part.name}: {rows[-1]['exit']} after {rows[-1]['seconds']} s", flush=True)
        write(args.out, session, rows)
    return int(any(row["log"] is not None and row["exit"] != 0 for row in rows))


def dry_run(parts: Sequence[Part], out: Path) -> int:
    """Print every command as a GPU would get it. 1 if something that this checkout and environment should have is missing."""
    missing: list[str] = []
    for part in parts:
        lacking = lacks(part, "cuda")
        missing += lacking
        print(f"{part.name} ({part.minutes:g} min): {part.shows}\n  python {' '.join(part.gpu).format(out=out)}")
        print(f"  {'lacks ' + ', '.join(lacking) if lacking else 'nothing is missing'}")
    absent = [name for module, name in PEERS.items() if importlib.util.find_spec(module) is None]
    print(
        f"whole: {sum(part.minutes for part in parts):g} min; peers that are not installed and are left out: {absent or 'none'}"
    )
    if shutil.which("nvidia-smi") is None:
        print("no GPU here: the parts that a CPU can do would run")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
