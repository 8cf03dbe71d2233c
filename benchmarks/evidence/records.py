"""Results on disk: a JSON for each run, with the policy's margins of held-out pairs, and the references' scores of each world."""

from __future__ import annotations

import base64
import json
import platform
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch


def packed(values_N: np.ndarray) -> str:
    """float32 values as text."""
    return base64.b64encode(zlib.compress(np.asarray(values_N, dtype="<f4").tobytes(), 9)).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4")


@dataclass(frozen=True)
class Scores:
    """What references say of a world's N pairs."""

    names: list[str]
    part_N: np.ndarray
    row_N: np.ndarray  #: of the source file's rows that were read, from 0
    ref_logps_KN2: np.ndarray
    tokens_N2: np.ndarray  #: the policy's, of the chosen and the rejected answer

    def of(self, names: tuple[str, ...]) -> torch.Tensor:
        return torch.from_numpy(self.ref_logps_KN2[[self.names.index(name) for name in names]])

    def rows(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.part_N == part)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            path,
            names=np.array(self.names),
            parts=self.part_N,
            rows=self.row_N.astype("<i4"),
            ref_logps=self.ref_logps_KN2.astype("<f4"),
            tokens=self.tokens_N2.astype("<i2"),
        )

    @classmethod
    def load(cls, path: Path) -> Scores:
        with np.load(path) as a:
            return cls(a["names"].tolist(), a["parts"], a["rows"], a["ref_logps"], a["tokens"].astype(np.int64))


@cache
def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} thread"


@cache
def commit() -> str:
    """Of the code that runs, with a + where the code differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [
                "git",
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                "benchmarks/evidence",
                "mrpo_scale",
                "kernels",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed.strip() else "")


def run_file(root: Path, set_name: str, direction: str, method: str, seed: int) -> Path:
    return root / "runs" / set_name / direction / method / f"seed-{seed}.json"


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
