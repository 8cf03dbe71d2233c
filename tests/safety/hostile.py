"""What the tests of hostile input share: a command line that works, a trap, and how a refusal looks."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mrpo_scale.cli import run_command
from tests.tiny import pair_rows

SECONDS = 60
MEMORY = 6 << 30


class Trap:
    """A pickle that leaves a file behind when it is loaded, as an exploit would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Place:
    """A folder of one test: ``run`` is the output folder, ``executed`` appears if anything hostile runs."""

    def __init__(self, root: Path, models: dict[str, str], capsys: Any) -> None:
        self.root, self.models, self._capsys = root, models, capsys
        self.executed, self.run = root / "executed", root / "run"
        self.data = self.write("pairs.jsonl", json_lines(pair_rows(20)))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def trap(self, name: str) -> Path:
        """A Python file that leaves its mark when it is run or imported."""
        return self.write(name, f"open({str(self.executed)!r}, 'w').write('x')\n")

    def model(self, name: str = "llama", *, weights: bool = True) -> Path:
        """A copy of a sound model, to be spoilt."""
        folder = self.root / f"spoilt-{name}"
        shutil.copytree(self.models[name], folder)
        if not weights:
            (folder / "model.safetensors").unlink()
        return folder

    def words(self, **change: Any) -> list[str]:
        """A training of one step with what is changed."""
        keys = {
            "model_name_or_path": self.models["llama"],
            "ref_models": self.models["qwen2"],
            "dataset_name": self.data,
            "held_out": 6,
            "output_dir": self.run,
            "max_steps": 1,
            "gradient_checkpointing": "false",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "true",
            **change,
        }
        return [f"--{key}={value}" for key, value in keys.items()]

    def refused(self, command: str, words: list[str], *says: str, status: int = 2) -> str:
        """Assert that the command ends with one line that says all of this, having run, changed and removed nothing."""
        before = _state(self.root)
        self._capsys.readouterr()
        with bounded(), pytest.raises(SystemExit) as stop:
            run_command(command, words)
        printed = self._capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert stop.value.code == status, printed
        assert len(errors) == 1 and "Traceback" not in printed, printed
        assert all(word in errors[0] for word in says), errors[0]
        assert not self.executed.exists(), "hostile code ran"
        after = _state(self.root)
        assert {path: after.get(path) for path in before} == before, "a file that was there has changed"
        return errors[0]


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def edit(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors(header: Any, data: bytes = bytes(64)) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@contextmanager
def bounded() -> Iterator[None]:
    """What hangs or fills the memory is a failed test, not a machine that is lost."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"nothing was refused within {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _state(root: Path) -> dict[str, str]:
    """Every file with its contents, every link with its target."""
    found = {}
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(path)] = str(path.readlink())
        elif stat.S_ISREG(mode):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
