"""Rules of the house, over the syntax trees: imports point one way, nothing shadows an installed package."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("mrpo_scale/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("launch/*.py")]


def imported(path):
    """Top-level modules and dotted project modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def roots(names):
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in SOURCES if "mrpo_kernels" in p.parts], ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    assert roots(imported(path)) <= {"torch", "triton", "mrpo_kernels"}


def test_the_objective_sees_tensors_only():
    assert roots(imported(ROOT / "mrpo_scale/objective.py")) <= {"torch", "mrpo_kernels", "mrpo_scale"}
    own = {n for n in imported(ROOT / "mrpo_scale/objective.py") if n.startswith("mrpo_scale.")}
    assert {n for n in own if not n.startswith("mrpo_scale.losses")} <= {
        "mrpo_scale.base.errors",
        "mrpo_scale.base.errors.ConfigError",
    }
    assert roots(imported(ROOT / "mrpo_scale/losses.py")) <= {"torch"}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "cli.py" and p.parent.name != "launch"], ids=lambda p: p.name
)
def test_nothing_imports_the_command_line(path):
    assert not {n for n in imported(path) if n.startswith(("mrpo_scale.cli", "launch"))}


def test_data_flows_one_way():
    """The order of DESIGN.md section 1: a room imports rooms before it only."""
    order = [
        "errors",
        "data",
        "tokenization",
        "pair_batch",
        "sequence_logps",
        "window",
        "references",
        "trainer",
        "run",
        "eval",
        "cli",
    ]
    for path in ROOT.glob("mrpo_scale/**/*.py"):
        room = path.relative_to(ROOT / "mrpo_scale").parts[0].removesuffix(".py")
        if room not in order:
            continue
        used = {n.split(".")[1] for n in imported(path) if n.startswith("mrpo_scale.")}
        later = {n for n in used if n in order and order.index(n) > order.index(room)}
        assert not later, f"{path} imports {later}"


def test_no_script_shadows_an_installed_package():
    """`kernels.py` or a package `kernels` would hide Hugging Face's kernels library from transformers, and the like."""
    installed = set(importlib.metadata.packages_distributions()) - {"mrpo_scale", "mrpo_kernels"}
    folders = [ROOT, ROOT / "launch", ROOT / "benchmarks", ROOT / "tests"]
    scripts = {p.stem: p for folder in folders for p in folder.glob("*.py")}
    packages = {p.parent.name: p for folder in folders for p in folder.glob("*/__init__.py")}
    clashes = {**scripts, **packages}.keys() & installed
    assert not clashes
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_on_disk_is_packaged():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    assert "py.typed" in settings["package-data"]["*"]
    assert all((folder / "py.typed").is_file() for folder in (ROOT / "mrpo_scale", ROOT / "kernels" / "mrpo_kernels"))
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("mrpo_scale/**/__init__.py")}
    assert on_disk <= listed
    data = {
        "mrpo_scale.recipes",
        "mrpo_scale.ds_configs",
        "mrpo_scale.launch.accelerate",
        "mrpo_scale.reports.templates",
    }
    assert {"mrpo_kernels", *data} <= listed
