"""Pages hold together: links lead to files, numbers of decisions stay names, the examples' outputs are those of their JSON."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md"))]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


FILE = re.compile(
    r"(?<![\w/.-])((?:mrpo_scale|kernels|launch|benchmarks|tests|docs|recipes)/[\w./-]*\w\.(?:py|md|yaml|json))\b"
)
MODULE = re.compile(r"(?<![\w.])mrpo_scale((?:\.[a-z_]+)+)")
NO_FILES = {
    "mrpo_scale/a/b.py",
    "benchmarks/results/against-trl.json",
}  # an example, and what a command is told to write
PUBLIC = ("MRPOConfig", "MRPOTrainer", "Objective", "preference_loss", "prepare_launch")  # names of the package itself
PACKAGED = ("recipes", "ds_configs", "launch")  # folders of the clone that lie in the package once it is installed


def is_module(dotted):
    """Whether ``.a.b.c`` is a module of the package, or a name within one."""
    folder = ROOT / "mrpo_scale"
    for part in dotted[1:].split("."):
        if (folder / part).is_dir():
            folder /= part
        else:
            return (folder / f"{part}.py").is_file() or folder != ROOT / "mrpo_scale"
    return True


def mentioning():
    """Pages, and every file of code, whose docstrings and comments speak of other files."""
    folders = ("mrpo_scale", "kernels", "launch", "benchmarks", "tests")
    return [*PAGES, *(file for folder in folders for file in sorted(ROOT.glob(f"{folder}/**/*.py")))]


@pytest.mark.parametrize("file", mentioning(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_are_spoken_of_exist(file):
    """A file that moves is found by whoever reads of it."""
    text = file.read_text()
    for path in set(FILE.findall(text)) - NO_FILES:
        assert (ROOT / path).is_file() or (ROOT / "mrpo_scale" / path).is_file(), path
    for dotted in set(MODULE.findall(text)):
        assert is_module(dotted) or dotted[1:].startswith((*PUBLIC, *PACKAGED)), f"mrpo_scale{dotted}"


def test_decisions_are_numbered_once_and_without_gaps():
    numbers = re.findall(r"^- \*\*(\d+)\. ", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)
    assert len(numbers) >= 64
    assert sorted(map(int, numbers)) == list(range(1, len(numbers) + 1))


def test_the_comparison_printed_is_the_one_kept():
    lines = (EXAMPLES / "compare" / "comparison.txt").read_text().splitlines()
    kept = json.loads((EXAMPLES / "compare" / "comparison.json").read_text())
    for arm in kept["arms"]:
        line = next(line for line in lines if line.startswith(arm["name"] + "  "))
        for name in ("accuracy", "disagreeing", "moved_right", "reward_accuracy"):
            mean, deviation = arm[name]["mean"], arm[name]["standard_deviation"]
            assert f" {mean:.1%} ± {100 * deviation:.1f} " in line, (arm["name"], name)
        margin = arm["reward_margin"]
        assert line.endswith(f" {margin['mean']:+.3f} ± {margin['standard_deviation']:.3f}")
    assert lines[-4:] == kept["verdict"]


def test_the_check_printed_is_the_one_kept():
    text = (EXAMPLES / "check" / "check.txt").read_text()
    cost = json.loads((EXAMPLES / "check" / "check.json").read_text())["cost"]
    cases = list(cost["estimates"].values())

    def row(label):
        return next(line for line in text.splitlines() if line.startswith(label + "  ")).removeprefix(label).split()

    assert row("most at once") == [f"{case['peak_bytes'] / 2**30:.2f}" for case in cases]
    assert row("step, s") == [f"{case['seconds']['step']:.3f}" for case in cases]
    assert row("MFU of the policy's useful FLOPs") == [f"{case['mfu']:.1%}" for case in cases]
    for kind in ("live", "cached"):
        best = cost["cheapest"][kind]
        found = f"{best['fit']} of {best['tried']} settings fit: {best['setting']['seconds']['step']:.3f} s a step"
        assert f"cheapest with references {kind}, {found}" in text
