"""The kernels' benchmark starts from a checkout that is not installed, as docs/kernels.md has it typed on a lent machine."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def test_the_benchmark_starts_without_an_installation():
    typed = (ROOT / "docs" / "kernels.md").read_text()
    paths = set(re.findall(r"^export PYTHONPATH=([^ ;]+)", typed, re.MULTILINE))
    assert len(paths) == 1, paths
    # Without `site` no .pth file is read, and so no editable installation is seen.
    found = subprocess.run(
        [sys.executable, "-S", "benchmarks/bench_kernels.py", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{paths.pop()}:{sysconfig.get_path('purelib')}"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and "--tune" in found.stdout, found.stderr
