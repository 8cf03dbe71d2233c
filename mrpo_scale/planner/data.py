"""What a run will read: counts, lengths in every model's tokens, and pairs as each model will score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mrpo_scale.base.tables import aligned, aligned_table
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.pairs import SIDES, PairTokens
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.reports.pictures import PALETTE

PARTS = ("prompt", *SIDES)
BOUNDARY, CUT = "┃", "✂"
CONTEXT = "⟦", "⟧"


@dataclass(frozen=True)
class ReadSet:
    """One set of rows. ``layout``: as recognised, or as named."""

    split: str
    layout: str
    rows: int
    pairs: PairDataset

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "rows": self.rows,
            "pairs": len(self.pairs),
            "left_out": self.pairs.counts,
            "truncated": self.pairs.truncated,
            "merged": self.pairs.merged,
            "trimmed": self.pairs.trimmed,
            "changed": self.pairs.changed,
            "no_tools": self.pairs.no_tools,
            "remarks": {remark.word: dict(remark.models) or remark.pairs for remark in self.pairs.remarks},
        }


def reader_names(plan: RunPlan) -> list[str]:
    """Of each model's tokenization, the models that read it."""
    readers: list[list[str]] = [["policy"], *([] for _ in plan.texts[1:])]
    for reference in plan.references:
        readers[reference.tokenization].append(reference.name)
    return [", ".join(names) for names in readers]


def sets_table(sets: Sequence[ReadSet], policy: ModelText) -> str:
    """Rows, what of them is used, and why the rest is not."""
    rows = [("set", "layout", "rows", "pairs", "left out", "responses cut")]
    for read in sets:
        left = ", ".join(f"{n} {reason}" for reason, n in read.pairs.counts.items()) or "none"
        cut = f"{read.pairs.truncated} pairs, {tokens_cut(read.pairs, policy):,} tokens lost"
        rows.append((read.split, read.layout, str(read.rows), str(len(read.pairs)), left, cut))
    return aligned(rows)


def remarks_list(sets: Sequence[ReadSet]) -> str:
    """What models do not see of the sets, or read as something else; a line for each. Empty where there is nothing to say."""
    return "\n".join(f"{read.split}: {remark.sentence}" for read in sets for remark in read.pairs.remarks)


def tokens_cut(pairs: PairDataset, policy: ModelText) -> int:
    """Response tokens of the policy that ``max_length`` took, ends of turn and context included."""
    lost = 0
    for row in map(int, pairs.cut_rows):
        whole = policy.ids(policy.read(pairs.uncut(row)), (None, None))
        responses = len(whole.chosen_ids) + len(whole.rejected_ids)
        # The prompt counts with each response: where the two part may depend on the cut.
        lost += 2 * len(whole.prompt_ids) + responses - int((pairs.lengths[row, 0] * (2, 1, 1)).sum())
    return lost


def lengths_table(lengths_NV3: np.ndarray, scored_NV2: np.ndarray, names: Sequence[str]) -> str:
    """Tokens of each part, in each model's own; of responses with context also those that are scored."""
    header = ("tokens", "part", "median", "mean", "95%", "longest")
    rows = []
    for tokenization, name in enumerate(names):
        parts = {part: lengths_NV3[:, tokenization, i] for i, part in enumerate(PARTS)}
        parts["pair"] = lengths_NV3[:, tokenization].sum(1)
        if (scored_NV2 < lengths_NV3[..., 1:]).any():
            parts |= {f"scored of {side}": scored_NV2[:, tokenization, i] for i, side in enumerate(SIDES)}
        for part, lengths in parts.items():
            numbers = (np.median(lengths), lengths.mean(), np.quantile(lengths, 0.95), lengths.max())
            rows.append((name, part, *(f"{n:.0f}" for n in numbers)))
    return aligned_table(header, rows)


def plot_lengths(lengths_NV3: np.ndarray, names: Sequence[str], max_length: int | None, path: Path) -> None:
    """A panel for each tokenization: histograms of prompt, chosen and rejected, one scale for all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.6 * len(names) + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    bins = np.linspace(0, lengths_NV3.max() + 1, 41)
    for tokenization, (axes, name) in enumerate(zip(panels, names, strict=True)):
        for i, part in enumerate(PARTS):
            lengths = lengths_NV3[:, tokenization, i]
            label = f"{part}: median {np.median(lengths):.0f}, longest {lengths.max()}"
            axes.hist(lengths, bins, histtype="step", linewidth=1.6, color=PALETTE[i], label=label)
        if tokenization == 0 and max_length is not None and max_length < 1.1 * bins[-1]:
            axes.axvline(
                max_length, color="#888888", linestyle=":", label=f"max_length {max_length}, prompt + response"
            )
        axes.set_title(f"tokens of {name}", fontsize=10)
        axes.set_ylabel("pairs", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("tokens", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def chosen_rows(pairs: PairDataset) -> dict[int, str]:
    """{row: why}: an ordinary pair, the longest, and one that was cut, or else the shortest."""
    totals = pairs.lengths[:, 0].sum(1)
    order = np.argsort(totals, kind="stable")
    rows = {int(order[len(order) // 2]): "of median length", int(order[-1]): "the longest"}
    cut = next((int(row) for row in pairs.cut_rows if int(row) not in rows), None)
    rows.update({int(order[0]): "the shortest"} if cut is None else {cut: "the first that was cut"})
    return rows


def render_pairs(pairs: PairDataset, texts: Sequence[ModelText], names: Sequence[str], *, width: int | None) -> str:
    """Three pairs token for token as every model will score them.

    Args:
        width: most characters of a prompt or a response; the middle of longer ones is left out. None shows all.
    """
    blocks = [
        f"{BOUNDARY} where the response, whose tokens are scored, begins; {CUT} where max_length cut it, so no end of turn or "
        f"fewer turns; {CONTEXT[0]}...{CONTEXT[1]} what it reads of users and tools, not scored."
    ]
    for row, why in chosen_rows(pairs).items():
        blocks.append(f"--- {pairs.source(row)} of the data set, {why}")
        cuts = dict(zip(SIDES, pairs.cut(row), strict=True))
        for text, name, tokens in zip(texts, names, pairs.tokens(row), strict=True):
            ids: Mapping[str, list[int]] = {part: getattr(tokens, f"{part}_ids") for part in PARTS}
            lines = [f"{name}: {', '.join(f'{part} {len(ids[part])} tokens' for part in PARTS)}"]
            prompt = _shortened(_decoded(text, ids["prompt"]), width)
            for part in SIDES:
                response = _shortened(_with_context(text, tokens, part), width) + CUT * cuts[part]
                lines.append(f"  {part:8}  {prompt}{BOUNDARY}{response}")
                prompt = "(the same prompt) "
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _with_context(text: ModelText, tokens: PairTokens, side: str) -> str:
    ids: list[int] = getattr(tokens, f"{side}_ids")
    bounds = [0, *getattr(tokens, f"{side}_context"), len(ids)]
    runs = [_decoded(text, ids[start:end]) for start, end in pairwise(bounds)]
    return "".join(CONTEXT[0] + run + CONTEXT[1] if i % 2 else run for i, run in enumerate(runs))


def _decoded(text: ModelText, ids: list[int]) -> str:
    """Tokens as text on one line, special ones included."""
    decoded: Any = text.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return decoded.replace("\n", "↵")


def _shortened(line: str, width: int | None) -> str:
    if width is None or len(line) <= width:
        return line
    half = width // 2
    return f"{line[:half]} … {len(line) - 2 * half} characters … {line[-half:]}"
