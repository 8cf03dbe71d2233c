"""A paper's table as people read it: in the terminal, as Markdown, as a page, as a picture; and as JSON."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from mrpo_scale.compare.paper_results import EFFECT_SIZE, Cell, Column
from mrpo_scale.compare.paper_tables import Block, PaperTable
from mrpo_scale.compare.weight_choice import Choice
from mrpo_scale.reports.pictures import PALETTE

_MARKDOWN = {"best": "**", "second": "*", "": ""}
_TERMINAL = {"best": "\033[1m", "second": "\033[3m", "": ""}
_HTML = {"best": "b", "second": "i", "": "span"}


@dataclass(frozen=True)
class Filled:
    """A table with its figures.

    Args:
        sides: (set, direction) of each column.
        columns: by block, one for each side.
        before: by block, {what: value for each side} of the untrained policy, as a method measures it where it has a method's name.
        pairs: reported in each column.
        set_aside: held-out pairs of each column that weights were chosen on.
        holes: what is missing and why, a line each.
        facts: how the runs were trained, a line each.
    """

    title: str
    table: PaperTable
    methods: Sequence[str]
    sides: Sequence[tuple[str, str]]
    columns: Mapping[Block, Sequence[Column]]
    before: Mapping[Block, Mapping[str, Sequence[float | None]]]
    pairs: Sequence[int]
    set_aside: Sequence[int]
    seeds: Sequence[int]
    choices: Sequence[Choice] = ()
    holes: Sequence[str] = ()
    facts: Sequence[str] = ()


@dataclass(frozen=True)
class _Grid:
    """Two rows of headings, of which equal neighbours belong together, and (heading, [(text, mark)]) below."""

    heads: list[list[str]]
    rows: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)


def as_text(filled: Filled, *, styled: bool) -> str:
    """Plain text; ``styled``: bold and italic as a terminal shows them, otherwise as Markdown writes them."""
    parts = [filled.title]
    for block in filled.table.blocks:
        parts += [block.title, _aligned(_grid(filled, block), styled)]
    wrapped = [textwrap.fill(line, 120, subsequent_indent="  ", break_long_words=False) for line in notes(filled)]
    return "\n\n".join([*parts, "\n".join(wrapped)])


def as_markdown(filled: Filled) -> str:
    parts = [f"# {filled.title}"]
    for block in filled.table.blocks:
        grid = _grid(filled, block)
        heads = [_escaped(", ".join(head)) for head in zip(*grid.heads, strict=True)]
        lines = ["| " + " | ".join(["", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
        for name, cells in grid.rows:
            texts = [f"{_MARKDOWN[mark]}{_escaped(text)}{_MARKDOWN[mark]}" for text, mark in cells]
            lines.append("| " + " | ".join([_escaped(name), *texts]) + " |")
        parts += [f"## {block.title}", "\n".join(lines)]
    return "\n\n".join([*parts, "\n".join(f"- {_escaped(line)}" for line in notes(filled))]) + "\n"


def as_html(filled: Filled) -> str:
    """One page without script or network; what comes from names of models and data is escaped."""

    def text(words: str) -> str:
        return html.escape(words.replace("<-", "←"))

    parts = [f"<h1>{text(filled.title)}</h1>"]
    for block in filled.table.blocks:
        grid = _grid(filled, block)
        top = "".join(f'<th colspan="{len(list(same))}">{text(name)}</th>' for name, same in groupby(grid.heads[0]))
        lines = [f"<tr><th></th>{top}</tr>"]
        lines.append("<tr><th></th>" + "".join(f"<th>{text(name)}</th>" for name in grid.heads[1]) + "</tr>")
        for name, cells in grid.rows:
            shown = "".join(f"<td><{_HTML[mark]}>{text(cell)}</{_HTML[mark]}></td>" for cell, mark in cells)
            lines.append(f"<tr><th>{text(name)}</th>{shown}</tr>")
        parts += [f"<h2>{text(block.title)}</h2>", "<table>", *lines, "</table>"]
    parts += ["<ul>", *(f"<li>{text(line)}</li>" for line in notes(filled)), "</ul>"]
    return _PAGE.format(title=text(filled.title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25em .8em; text-align: left; white-space: nowrap; }}
tr:nth-child(2) th {{ border-bottom: 1px solid; }}
</style></head><body>
{body}
</body></html>
"""


def notes(filled: Filled) -> list[str]:
    """What the figures are, what is bold, which weights were chosen, what is missing."""
    names = [f"{set_name}, {direction}" for set_name, direction in filled.sides]
    counts = "; ".join(
        f"{name}: {pairs}" + (f" ({aside} others chose the weights)" if aside else "")
        for name, pairs, aside in zip(names, filled.pairs, filled.set_aside, strict=True)
    )
    lines = [
        "A cell: mean ± standard deviation over seeds (number of finished seeds).",
        *_settings(filled),
        f"Held-out pairs that are reported: {counts}.",
        "As the paper measures it: rewards are beta * log(policy / virtual reference) for MRPO, beta * log(policy / first "
        "reference) for all others. MRPO's hold what the references know before any training, and do not compare with the others'.",
        "Reference-free: share of pairs to whose chosen response the policy gives the higher log-prob. It compares.",
    ]
    for block, rows in filled.before.items():
        for what, values in rows.items():
            shown = "; ".join(f"{name}: {_value(v, block)}" for name, v in zip(names, values, strict=True))
            lines.append(f"{block.short.capitalize()} of {what} before any training: {shown}.")
    if filled.table.marked:
        lines.append(
            f"Bold: the best of its column, where Cohen's d to every other method is at least {EFFECT_SIZE} (difference of the "
            "means over the pooled standard deviation of the values per seed), as in the paper's caption. Italic: the second "
            "best mean."
        )
        lines += _distances(filled, names)
    for choice in filled.choices:
        lines.append(f"Weight of the first reference, chosen on {choice.set_name}: {choice.sentence()}.")
    if len(filled.seeds) < 3:
        count = "2 seeds" if len(filled.seeds) == 2 else "1 seed"
        lines.append(f"{count}: deviations and effect sizes are rough; run three or more.")
    return [*lines, *filled.facts, *(f"HOLE: {hole}" for hole in filled.holes)]


def _settings(filled: Filled) -> list[str]:
    """What the numbers over the columns mean, where methods are across."""
    if not filled.table.methods_across:
        return []
    directions = dict.fromkeys(direction for _, direction in filled.sides)
    return ["; ".join(f"({_roman(i)}) {direction}" for i, direction in enumerate(directions)) + "."]


def _roman(i: int) -> str:
    """Of the i-th column, from 0: i, ii, iii, iv, ... as the paper counts its settings."""
    return "x" * ((i + 1) // 10) + ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")[(i + 1) % 10]


def _distances(filled: Filled, names: Sequence[str]) -> list[str]:
    lines = []
    for block in filled.table.blocks:
        for name, column in zip(names, filled.columns[block], strict=True):
            if column.best is None:
                tied = f"{', '.join(column.first)} share the highest mean" if column.first else "nothing finished"
                lines.append(f"{block.short.capitalize()}, {name}: {tied}.")
                continue
            sizes = ", ".join(
                f"{other} {d:+.2f}" if d is not None else f"{other} none (one seed, or no value varies)"
                for other, d in column.distances.items()
            )
            lines.append(f"{block.short.capitalize()}, {name}: best is {column.best}; d to {sizes or 'nobody'}.")
    return lines


def as_json(filled: Filled) -> dict[str, Any]:
    """Everything in the table, unrounded."""
    return {
        "title": filled.title,
        "seeds": list(filled.seeds),
        "columns": [
            {"set": set_name, "direction": direction, "pairs": pairs, "pairs_set_aside": aside}
            for (set_name, direction), pairs, aside in zip(filled.sides, filled.pairs, filled.set_aside, strict=True)
        ],
        "blocks": {
            block.name: {
                "title": block.title,
                "methods": {
                    method: [_cell_as_json(column.cells[method]) for column in filled.columns[block]]
                    for method in filled.methods
                },
                "best": [column.best for column in filled.columns[block]],
                "cohens_d_of_best": [dict(column.distances) for column in filled.columns[block]],
                "before_training": {what: list(values) for what, values in filled.before.get(block, {}).items()},
            }
            for block in filled.table.blocks
        },
        "weights": [
            {
                "method": choice.method,
                "set": choice.set_name,
                "direction": choice.direction,
                "chosen": choice.weight,
                "tried": {f"{weight:g}": asdict(one) for weight, one in choice.tried.items()},
                "failed": list(choice.failed),
            }
            for choice in filled.choices
        ],
        "holes": list(filled.holes),
        "facts": list(filled.facts),
    }


def plot(filled: Filled, path: Path) -> None:
    """A panel for each block and column: every seed, mean and standard deviation of every method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks, sides = filled.table.blocks, filled.sides
    size = (1.8 + 3.9 * len(sides), 1.0 + (0.9 + 0.34 * len(filled.methods)) * len(blocks))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # Agg whatever the user's display or MPLBACKEND says
    figure.suptitle(filled.title, fontsize=12, fontweight="bold")
    axes = figure.subplots(len(blocks), len(sides), squeeze=False, sharey=True)
    for row, block in zip(axes, blocks, strict=True):
        for i, axis in enumerate(row):
            _plot_column(axis, filled, block, i)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _plot_column(axis: Any, filled: Filled, block: Block, i: int) -> None:
    scale = 100 if block.percent else 1
    for place, name in enumerate(reversed(filled.methods)):
        cell, colour = filled.columns[block][i].cells[name], PALETTE[filled.methods.index(name) % len(PALETTE)]
        values = [scale * value for value in cell.values]
        axis.scatter(values, [place] * len(values), s=24, facecolors="white", edgecolors=colour, zorder=3)
        if cell.mean is not None:
            spread = [scale * (cell.deviation or 0.0)]
            axis.errorbar([scale * cell.mean], [place], xerr=spread, fmt="D", markersize=5, capsize=3, color=colour)
    for what, starts in filled.before.get(block, {}).items():
        start = starts[i]
        if start is not None and what in filled.methods:
            place = len(filled.methods) - 1 - filled.methods.index(what)
            axis.scatter([scale * start], [place], s=30, marker="x", color="#555555", label="before any training")
        elif start is not None:
            axis.axvline(
                scale * start, label=f"{what}, before any training", color="#777777", linestyle="--", linewidth=1.2
            )
    axis.set_yticks(range(len(filled.methods)), list(reversed(filled.methods)), fontsize=8.5)
    axis.set_ylim(-0.6, len(filled.methods) - 0.4)
    axis.set_title(f"{', '.join(filled.sides[i])}\n{block.title}", fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.grid(True, axis="x", color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axis.legend(
            once.values(), once.keys(), fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1)
        )


def _grid(filled: Filled, block: Block) -> _Grid:
    columns = filled.columns[block]
    sets = list(dict.fromkeys(set_name for set_name, _ in filled.sides))
    if not filled.table.methods_across:
        grid = _Grid([[set_name for set_name, _ in filled.sides], [direction for _, direction in filled.sides]])
        for name in filled.methods:
            grid.rows.append((name, [_shown(column.cells[name], block) for column in columns]))
        return grid
    directions = list(dict.fromkeys(direction for _, direction in filled.sides))
    numbers = [f"({_roman(i)})" for i in range(len(directions))]
    grid = _Grid([[name for name in filled.methods for _ in directions], numbers * len(filled.methods)])
    of = dict(zip(filled.sides, columns, strict=True))
    for set_name in sets:
        cells = [of[set_name, direction].cells[name] for name in filled.methods for direction in directions]
        grid.rows.append((set_name, [_shown(cell, block) for cell in cells]))
    return grid


def _shown(cell: Cell, block: Block) -> tuple[str, str]:
    """A cell's text, which always says its number of seeds, and its mark."""
    finished = len(cell.values)
    seeds = f"({finished})" if finished == cell.planned else f"({finished} of {cell.planned})"
    if cell.mean is None:
        return f"- {seeds}", ""
    spread = f" ± {_value(cell.deviation, block)}" if cell.deviation is not None else ""
    return f"{_value(cell.mean, block)}{spread} {seeds}", cell.mark


def _value(value: float | None, block: Block) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if block.percent else f"{value:.3f}"


def _aligned(grid: _Grid, styled: bool) -> str:
    def plain(text: str, mark: str) -> str:
        return text if styled else f"{_MARKDOWN[mark]}{text}{_MARKDOWN[mark]}"

    first = [
        ["", *(name if i == 0 or name != row[i - 1] else "" for i, name in enumerate(row))] for row in grid.heads[:1]
    ]
    lines = [*first, ["", *grid.heads[1]], *([name, *(plain(*cell) for cell in cells)] for name, cells in grid.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    marks = [[""] * len(widths)] * 2 + [["", *(mark for _, mark in cells)] for _, cells in grid.rows]
    shown = []
    for line, of_line in zip(lines, marks, strict=True):
        cells = []
        for text, width, mark in zip(line, widths, of_line, strict=True):
            padded = text.ljust(width)
            cells.append(f"{_TERMINAL[mark]}{padded}\033[0m" if styled and mark else padded)
        shown.append("  ".join(cells).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([*shown[:2], rule, *shown[2:]])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<-", "&lt;-").replace("*", "\\*")


def _cell_as_json(cell: Cell) -> dict[str, Any]:
    return {
        "values": list(cell.values),
        "planned_seeds": cell.planned,
        "mean": cell.mean,
        "standard_deviation": cell.deviation,
        "mark": cell.mark or None,
    }
