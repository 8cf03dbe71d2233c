"""Figures in README and docs are those of the JSON files that they come from.

Beside such a figure stands, unseen by the reader, where it comes from. Directly behind a text that has to be equal:

    x 1.122<!-- = bench-quickstart-cpu.json: {arms["MRPO K=3 cached"].overhead.median:.3f} -->

Before lines of a table or of a program's output, one for each item of a list:

    <!-- rows = inspect.json: for r in references
    {r.name:<9}  {r.agrees:.1%}
    -->

The file is one of benchmarks/results or of the page's own folder. In braces stands Python over the file's contents: keys are
attributes, and an item of a list is found by its number or its name. Sections that quote results throughout are listed below: there
every number with a fraction or a unit has to be marked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

#: Page: headings of the sections in which no figure may stand unmarked; None: all of them.
FULLY_MARKED: dict[str, list[str] | None] = {
    "README.md": None,
    "docs/performance.md": [
        "What MRPO costs over DPO: measured on this CPU",
        "The reference phase against its forwards",
        "Speed on a CPU",
        "Memory against two CPU ranks",
    ],
    "docs/long_context.md": ["Memory: measured on this CPU"],
}
#: What looks like a figure there and is none: versions, addresses, settings, and what was measured by hand, as the text says.
NO_FIGURES = {
    "README.md": ["Python 3.11", "2405.16388", "2512.10040", "License 2.0", "ZeRO-3"],
    "docs/performance.md": [
        "[95%]", "torch 2.13", "TRL 1.16", "0.5 to 0.9 million", "two and a half minutes",
        # by hand, with the reason beside it
        "0.8 GB of float32", "1.2 GB/s", "4.6 GB/s", "0.5 to 2.5 GB/s", "4e-6", "5e-5",
        "101.9 s and 8.00 GiB", "about 0.5 GiB",
    ],
    "docs/long_context.md": [],
}  # fmt: skip

INLINE = re.compile(r"<!-- = (\S+): (.+?) -->")
ROWS = re.compile(r"^<!-- rows = (\S+): for (\w+) in (.+)\n((?:.*\n)+?)-->\n+", re.MULTILINE)
FIELD = re.compile(r"\{([^{}]+?)(?::([-<>+,.\w%]*))?\}")
FIGURE = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+[\d.e-]*(?:\s?%)?|\s?(?:%|ms|s|GiB|MiB|GB|MB|GFLOP|TFLOP)(?![\w-]))")


class Node(dict[str, Any]):
    """A JSON mapping whose keys are attributes as well."""

    __getattr__ = dict.__getitem__


class Items(list[Any]):
    """A JSON list whose mappings are found by their name as well."""

    def __getitem__(self, which: Any) -> Any:
        return next(x for x in self if x["name"] == which) if isinstance(which, str) else super().__getitem__(which)


def wrap(value: Any) -> Any:
    if isinstance(value, dict):
        return Node({key: wrap(entry) for key, entry in value.items()})
    return Items(map(wrap, value)) if isinstance(value, list) else value


def load(name: str, page: Path) -> Any:
    """The contents of a JSON file, of benchmarks/results or relative to the page."""
    path = next(p for p in (ROOT / "benchmarks" / "results" / name, page.parent / name) if p.is_file())
    return wrap(json.loads(path.read_text()))


def fill(template: str, names: dict[str, Any]) -> str:
    """A template with its braces filled in."""
    names = {"__builtins__": {"median": median, "max": max, "min": min, "format": format}, **names}
    return FIELD.sub(lambda m: format(eval(m[1], names), m[2] or ""), template)  # noqa: S307 (our own pages)


def rows_of(mark: re.Match[str], page: Path) -> str:
    """The lines that a `rows` mark stands for."""
    contents = load(mark[1], page)
    items = eval(mark[3], {"__builtins__": {}, **contents})  # noqa: S307 (our own pages)
    return "".join(fill(mark[4], {**contents, mark[2]: item}) for item in items)


def wrong_figures(text: str, page: Path) -> list[str]:
    """What the page says and what its files say, where they differ."""
    wrong = []
    for mark in INLINE.finditer(text):
        expected = fill(mark[2], load(mark[1], page))
        said = INLINE.sub("", text[: mark.start()].rpartition("\n")[2])
        if not re.search(rf"(?<![\d.,+-]){re.escape(expected)}$", said):
            wrong.append(f"{page.name}: `...{said[-40:]}`, but {mark[1]} says `{expected}` ({mark[2]})")
    for mark in ROWS.finditer(text):
        expected, after = rows_of(mark, page), text[mark.end() :]
        if expected not in after:
            missing = [line for line in expected.splitlines() if line not in after.splitlines()] or [
                "these lines together"
            ]
            wrong.append(f"{page.name}: {mark[1]} says, but the page does not, `{missing[0]}`")
    return wrong


def unmarked_figures(page: Path, headings: list[str] | None, none: list[str]) -> list[str]:
    """Figures of these sections (None: of all) that no mark vouches for; ``none`` are texts that hold no figures."""
    text = page.read_text()
    for mark in list(ROWS.finditer(text)):
        text = text.replace(mark[0], "").replace(rows_of(mark, page), "")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for section in re.split(r"^#+ ", "\n" + text, flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        if headings is not None and heading not in headings:
            continue
        for mark in INLINE.finditer(body):
            body = body.replace(fill(mark[2], load(mark[1], page)) + mark[0], " ")
        body = re.sub(r"\]\([^)]*\)|`[^`\n]*`", " ", body)  # addresses, code
        for words in none:
            body = body.replace(words, " ")
        found += [f"{heading}: {figure[0]}" for figure in FIGURE.finditer(body)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_are_those_of_their_files(page: Path) -> None:
    assert wrong_figures(page.read_text(), page) == []


@pytest.mark.parametrize("name", FULLY_MARKED)
def test_no_figure_stands_unmarked(name: str) -> None:
    page, headings = ROOT / name, FULLY_MARKED[name]
    for heading in headings or ():
        assert re.search(rf"^#+ {re.escape(heading)}$", page.read_text(), re.MULTILINE), (
            f"{name} has no section {heading!r}"
        )
    assert unmarked_figures(page, headings, NO_FIGURES[name]) == []


def test_a_changed_digit_is_noticed() -> None:
    """Each digit of each marked figure of the README, and of the first table of docs/performance.md."""
    readme, performance = ROOT / "README.md", ROOT / "docs" / "performance.md"
    text, digits = readme.read_text(), 0
    for mark in INLINE.finditer(text):
        figure = fill(mark[2], load(mark[1], readme))
        for at in range(mark.start() - len(figure), mark.start()):
            if text[at].isdigit():
                digits += 1
                assert wrong_figures(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], readme)
    assert digits >= 20
    text = performance.read_text()
    assert wrong_figures(text.replace("| 1.012 [0.987, 1.028] |", "| 1.012 [0.987, 1.029] |"), performance)
