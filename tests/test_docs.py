"""Pages hold together: links lead to files, numbers of decisions stay names, the examples' outputs are those of their JSON."""

import ast
import io
import json
import re
import tokenize
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


FOLDERS = ("mrpo_scale", "kernels", "launch", "benchmarks", "tests")
CODE = [file for folder in FOLDERS for file in sorted(ROOT.glob(f"{folder}/**/*.py"))]
FILE = re.compile(
    r"(?<![\w/.-])((?:mrpo_scale|kernels|launch|benchmarks|tests|docs|recipes)/[\w./-]*\w\.(?:py|md|yaml|json))\b"
)
SCRIPT = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.py)\b")  # `data/window.py` and `window.py` too
NAME = re.compile(r"(?<![\w.])(mrpo_scale|mrpo_kernels)((?:\.[A-Za-z_]\w*)+)")
WITHIN = re.compile(
    r"((?:`\w+`(?:, | and )?)+)\s+in\s+`([\w/.-]+\.py)`"
)  # `clip_to_anchor`, `adaptive_epsilon` in `FILE`
NO_FILES = {
    "mrpo_scale/a/b.py",  # an example
    "benchmarks/results/against-trl.json",  # what a command is told to write
    "file_baton.py",  # torch's
    "kernels.py",  # what must not be there
    "shared/tools/real_models.py",  # lies beside the clone
}
PACKAGED = ("recipes", "ds_configs", "launch")  # folders of the clone that lie in the package once it is installed


def prose(file):
    """A page; of a file of code its comments and docstrings."""
    text = file.read_text()
    if file.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    return "\n".join([*comments, *(ast.get_docstring(node) or "" for node in nodes)])


def is_file(path):
    return any((folder / path).is_file() for folder in (ROOT, ROOT / "mrpo_scale"))


def is_script(path):
    return any(f"/{file.relative_to(ROOT)}".endswith(f"/{path}") for file in CODE)


def is_name(package, rest):
    """Whether each part of ``package.a.b.c`` is a module of the one before it or a word in its file."""
    place = ROOT / package if package == "mrpo_scale" else ROOT / "kernels" / package
    for part in rest[1:].split("."):
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            place /= f"{part}.py"
        else:
            file = place / "__init__.py" if place.is_dir() else place
            return bool(re.search(rf"\b{part}\b", file.read_text()))
    return True


@pytest.mark.parametrize("file", [*PAGES, *CODE], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_names_that_are_spoken_of_exist(file):
    """A file that moves is found by whoever reads of it."""
    text = prose(file)
    assert not {path for path in FILE.findall(file.read_text()) if not is_file(path)} - NO_FILES
    assert not {path for path in SCRIPT.findall(text) if not is_script(path)} - NO_FILES
    assert not {
        package + rest
        for package, rest in NAME.findall(text)
        if not (is_name(package, rest) or rest[1:].startswith(PACKAGED))
    }


def defined(file):
    """Functions, classes and variables that a file defines, also within its classes."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in nodes if isinstance(node, named)} | {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_finds_in_a_file_is_defined_there(page):
    for names, path in WITHIN.findall(page.read_text()):
        files = [file for file in CODE if f"/{file.relative_to(ROOT)}".endswith(f"/{path}")]
        assert any(set(re.findall(r"\w+", names)) <= defined(file) for file in files), (names, path)


def test_a_wrong_name_is_seen():
    assert is_script("references/live.py") and is_script("live.py") and not is_script("references/source.py")
    assert is_name("mrpo_scale", ".models.source.check_config") and is_name("mrpo_kernels", ".combine_logps")
    assert not is_name("mrpo_scale", ".references.source") and not is_name("mrpo_scale", ".models.source.check_confi")


def test_decisions_are_numbered_once_and_without_gaps():
    numbers = re.findall(r"^- \*\*(\d+)\. ", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)
    assert len(numbers) >= 64
    assert sorted(map(int, numbers)) == list(range(1, len(numbers) + 1))
    cited = re.findall(r"\b[Dd]ecisions? (\d+)", "\n".join(prose(file) for file in [*PAGES, *CODE]))
    assert set(cited) <= set(numbers)


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
    assert row("step, s") == [f"{case['seconds']['step']:.3g}" for case in cases]
    assert row("MFU of the policy's useful FLOPs") == [f"{case['mfu']:.1%}" for case in cases]
    for kind in ("live", "cached"):
        best = cost["cheapest"][kind]
        found = f"{best['fit']} of {best['tried']} settings fit: {best['setting']['seconds']['step']:.3g} s a step"
        assert f"cheapest with references {kind}, {found}" in text
