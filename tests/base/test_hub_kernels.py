"""Importing bitsandbytes runs no code from the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASKS = """import logging
try:
    from kernels import get_kernel
    get_kernel()
except Exception as error:
    logging.getLogger(__name__).warning("Failed to load CPU gemm_4bit_forward: %s", error)
logging.getLogger(__name__).warning("of something else")
"""


@pytest.mark.processes
@pytest.mark.parametrize("first", ["mrpo_scale", "json"])
def test_no_kernel_is_asked_for(tmp_path, first):
    """As bitsandbytes asks on some CPUs; the second is the control."""
    package = tmp_path / "bitsandbytes" / "backends" / "cpu"
    package.mkdir(parents=True)
    for folder in (tmp_path / "bitsandbytes", package.parent, package):
        (folder / "__init__.py").touch()
    (package / "ops.py").write_text(ASKS)
    (tmp_path / "kernels.py").write_text("def get_kernel():\n    print('asked')\n    raise OSError('no network')\n")
    code = f"import {first}, bitsandbytes.backends.cpu.ops, kernels; print(kernels.get_kernel.__name__)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    asked = first == "json"
    assert ("asked" in ended.stdout) == asked and ("gemm_4bit_forward" in ended.stderr) == asked
    assert ended.stdout.endswith("get_kernel\n") and "of something else" in ended.stderr
