"""What tests need beside the Python packages. Where it is missing they skip, with the reason, except under MRPO_REQUIRE_TOOLS=1.

.ci/run sets that variable and installs the programs: a test that silently skipped there would check nothing for months.
"""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

#: Program: the Debian package that brings it.
PACKAGES = {
    "chromium": "chromium",
    "faketime": "faketime",
    "ip": "iproute2",
    "shellcheck": "shellcheck",
}


def lacking(reason: str) -> NoReturn:
    """The machine lacks what this test needs: skip, or fail where everything has to be there."""
    if os.environ.get("MRPO_REQUIRE_TOOLS"):
        pytest.fail(f"{reason} (MRPO_REQUIRE_TOOLS is set: this may not be skipped)", pytrace=False)
    pytest.skip(reason)


def find_tool(name: str, *other_names: str) -> str | None:
    """Path of the first of these programs that is installed."""
    return next(filter(None, map(shutil.which, (name, *other_names))), None)


def require_tool(name: str, *other_names: str) -> str:
    """Path of the first of these programs that is installed; without one the test skips, or fails under MRPO_REQUIRE_TOOLS."""
    return find_tool(name, *other_names) or lacking(f"{name} is not installed: apt-get install {PACKAGES[name]}")


def require_module(name: str, remedy: str) -> ModuleType:
    """Import a module, with which a test file can do nothing without: without it the file skips, or fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if os.environ.get("MRPO_REQUIRE_TOOLS"):
            raise
        pytest.skip(f"{name} is not installed: {remedy}", allow_module_level=True)


def module_of_extra(name: str, extra: str) -> ModuleType:
    """Import a module of an extra that `dev`, and so CI, does not install: without it the file skips, in CI too."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed: pip install 'mrpo-scale[{extra}]'", allow_module_level=True)
