"""A missing tool skips a test on a laptop and fails it in CI, and no test finds a way around that."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests import tools

ROOT = Path(__file__).parents[1]


def test_a_missing_tool_skips_with_the_package_that_brings_it(monkeypatch):
    monkeypatch.delenv("MRPO_REQUIRE_TOOLS", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.skip.Exception, match="ip is not installed: apt-get install iproute2"):
        tools.require_tool("ip")
    with pytest.raises(pytest.skip.Exception, match="no_such_module is not installed: make it"):
        tools.require_module("no_such_module", "make it")


def test_in_ci_it_fails(monkeypatch):
    monkeypatch.setenv("MRPO_REQUIRE_TOOLS", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.fail.Exception, match="ip is not installed"):
        tools.require_tool("ip")
    with pytest.raises(ModuleNotFoundError):
        tools.require_module("no_such_module", "make it")


def test_ci_demands_and_installs_every_tool():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^export MRPO_REQUIRE_TOOLS=1$", script, re.MULTILINE)
    for program, package in tools.PACKAGES.items():
        assert re.search(rf"^need {program} {package}\b", script, re.MULTILINE), program


def test_no_test_looks_for_tools_by_itself():
    """Calls that would skip in CI too. What is no tool (hardware, data that is not ours, `make chaos`) is a skipif mark."""
    for path in ROOT.glob("tests/**/*.py"):
        if path.name == "tools.py":
            continue
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        found = {"shutil.which", "pytest.importorskip", "pytest.skip"} & calls
        assert not found, f"{path.name} calls {found}: use tests/tools.py"


@pytest.mark.xfail(
    strict=True, raises=pytest.fail.Exception, reason="it shall fail: it starts a process without the mark"
)
def test_a_process_without_the_mark_is_noticed():
    subprocess.run(["true"], check=True)


@pytest.mark.processes
def test_a_process_with_the_mark_is_not():
    subprocess.run(["true"], check=True)
