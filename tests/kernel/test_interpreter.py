"""Runs test_triton.py, test_traps.py and test_random_order.py in Triton's interpreter, in one process of its own: whoever imported
triton first here did so without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_the_kernels_in_the_interpreter(capsys):
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--durations=3",
        "tests/kernel/test_triton.py",
        "tests/kernel/test_traps.py",
        "tests/kernel/test_random_order.py",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    with capsys.disabled():
        print("\n".join(["", *done.stdout.splitlines()[-1:]]))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
