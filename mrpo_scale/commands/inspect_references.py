"""`mrpo inspect`: what each reference is worth for a data set, from the cached scores alone. No model loads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.tables import aligned
from mrpo_scale.base.untrusted import printable, refuse_links
from mrpo_scale.commands.score import Recipe
from mrpo_scale.data.inputs import WEIGHTS_SET
from mrpo_scale.objective import Objective, combine
from mrpo_scale.references.served import read_kept
from mrpo_scale.references.store.cache import ReferenceStore
from mrpo_scale.references.stores import distinct_rows, open_stores
from mrpo_scale.references.validation_weights import validation_weights
from mrpo_scale.reports.pictures import DECIDES_NOTHING, PALETTE

#: Above this correlation of margins a reference tells pairs apart as the anchor does.
SAME_AS_ANCHOR = 0.98


@dataclass(frozen=True)
class Worth:
    """One reference on P pairs. Shares are of pairs, or of their 2P texts where it says so.

    ``margin``: log-prob of chosen minus rejected.
    """

    name: str
    agrees: float  #: share of pairs with a positive margin: the reference ranks as the labels do
    agrees_per_token: float  #: the same for log-probs per token, which favour no length
    correlation: float | None  #: Pearson, of its margins with the anchor's; None where one of them is constant
    rank_correlation: float | None  #: Spearman
    weight: float  #: mean weight in the aggregate (Eq. 10 under `confidence`)
    clipped: float  #: share of texts whose log-prob Eq. 8 moved
    decides: float  #: share of texts where it is the lowest clipped log-prob with weight: it rules the harmonic mean
    logp_per_token: float
    moves: (
        float | None
    )  #: mean change of the virtual margin, in nats, were it left out; None for the anchor, or under fixed weights
    verdict: str = ""


def worth_of_references(
    ref_logps_KP2: Tensor, tokens_KP2: Tensor, objective: Objective, names: Sequence[str]
) -> list[Worth]:
    """Raw log-probs and token counts of K references on P pairs, the anchor first, to what each is worth."""
    logps = ref_logps_KP2.double()
    per_token = logps / tokens_KP2
    margins_KP = (logps[..., 0] - logps[..., 1]).numpy()
    combined = _combine(logps, objective)
    decides_P2 = combined.decides
    found = []
    for k, name in enumerate(names):
        worth = Worth(
            name=name,
            agrees=float((margins_KP[k] > 0).mean()),
            agrees_per_token=(per_token[k, :, 0] > per_token[k, :, 1]).double().mean().item(),
            correlation=_correlation(margins_KP[k], margins_KP[0]),
            rank_correlation=_correlation(_ranks(margins_KP[k]), _ranks(margins_KP[0])),
            weight=combined.weights_KP[k].mean().item(),
            clipped=(combined.clipped_KP2[k] != logps[k]).double().mean().item(),
            decides=(decides_P2 == k).double().mean().item(),
            logp_per_token=(logps[k].sum() / tokens_KP2[k].sum()).item(),
            moves=_moves(logps, combined.virtual_logps_P2, k, objective),
        )
        found.append(Worth(**{**asdict(worth), "verdict": _verdict(worth, k, logps.shape[1])}))
    return found


def inspect(argv: Sequence[str]) -> None:
    """Run the command: a table on the screen, ``inspect.json`` and ``inspect.png`` in ``--output``.

    Raises:
        ConfigError: no cache, or no row that all references have scored.
    """
    parser = argparse.ArgumentParser(prog="mrpo inspect", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    flags, rest = parser.parse_known_args(list(argv))
    recipe = Recipe.open(rest)
    if recipe.config.process_index != 0:
        return
    folder = flags.output or recipe.config.folder
    refuse_links(folder, "--output")
    stores = open_stores(recipe.plan, recipe.config, recipe.pair_sets)
    keys = distinct_rows(recipe.pair_sets)
    stored = [store.lookup(keys) for store in stores]
    everywhere_N = np.logical_and.reduce([s.found_N for s in stored])
    if not everywhere_N.any():
        have = ", ".join(f"{name} {int(s.found_N.sum())}" for name, s in zip(recipe.plan.names, stored, strict=True))
        raise ConfigError(
            f"no row has a score of every reference in {recipe.config.ref_cache_folder} (of {len(keys)} rows: {have}); run "
            "`mrpo score` with this recipe first."
        )
    ref_logps_KP2 = torch.stack([torch.from_numpy(s.logps_N2[everywhere_N]) for s in stored])
    tokens_KP2 = torch.stack([torch.from_numpy(s.tokens_N2[everywhere_N]) for s in stored])
    objective = _objective(recipe, stores)
    found = worth_of_references(ref_logps_KP2, tokens_KP2, objective, recipe.plan.names)
    disagree = _disagree(ref_logps_KP2)
    pairs = int(everywhere_N.sum())
    print(f"\n{worth_table(found, pairs, len(keys), disagree)}\n")
    precision = _served_precision(stores, tokens_KP2)
    quantized = {r.name: r.source.quantize for r in recipe.plan.references if r.source.quantize}
    for name, quantize in quantized.items():
        print(f"{name}: its linear layers were quantized to {quantize}.\n")
    adapters = {r.name: r.source.adapter.path for r in recipe.plan.references if r.source.adapter}
    for reference in recipe.plan.references:
        if reference.name in adapters:
            print(f"{reference.name}: the adapter {adapters[reference.name]} on {reference.source.path}.\n")
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "pairs": pairs,
        "rows": len(keys),
        "references_disagree": disagree,
        "served_precision": precision,
        "quantized": quantized,
        "adapters": adapters,
    }
    (folder / "inspect.json").write_text(
        json.dumps({**summary, "references": [asdict(worth) for worth in found]}, indent=2) + "\n"
    )
    plot_worth(found, ref_logps_KP2, folder / "inspect.png")
    print(f"{folder}/inspect.json, {folder}/inspect.png")


def _objective(recipe: Recipe, stores: Sequence[ReferenceStore]) -> Objective:
    """The recipe's; `ref_weights: validation` replaced by what the cached scores give."""
    objective = recipe.config.build_objective()
    if not recipe.config.weights_from_validation:
        return objective
    aside = [store.lookup(recipe.pair_sets[WEIGHTS_SET].row_keys) for store in stores]
    both_N = np.logical_and.reduce([s.found_N for s in aside])
    logps_KP2 = torch.stack([torch.from_numpy(s.logps_N2[both_N]) for s in aside])
    return replace(objective, ref_weights=validation_weights(logps_KP2, recipe.plan.names))


def _served_precision(stores: Sequence[ReferenceStore], tokens_KP2: Tensor) -> dict[str, float]:
    """{name: nats per token, root mean square} of the references that a server has scored; each is printed."""
    precision = {}
    for store, tokens_P2 in zip(stores, tokens_KP2, strict=True):
        kept = read_kept(store.folder)
        if kept is not None:
            name, length = store.identity.name, tokens_P2.double().mean().item()
            precision[name] = kept.precision
            print(
                f"{name}: served by {kept.server} as {printable(kept.root)}; measured precision {kept.precision:.2g} nats per "
                f"token (root mean square), {kept.precision * length**0.5:.2g} on a response of {length:.0f} tokens if errors are "
                "independent.\n"
            )
    return precision


def worth_table(found: Sequence[Worth], pairs: int, rows: int, disagree: float) -> str:
    """Plain text with a legend."""
    header = (
        *("reference", "agrees", "per token", "corr.", "rank corr.", "weight", "clipped", "decides", "moves"),
        *("log-prob/token", "verdict"),
    )
    cells = [
        (
            *(w.name, f"{w.agrees:.1%}", f"{w.agrees_per_token:.1%}", _or_dash(w.correlation, ".3f")),
            *(_or_dash(w.rank_correlation, ".3f"), f"{w.weight:.3f}", f"{w.clipped:.1%}", f"{w.decides:.1%}"),
            *(_or_dash(w.moves, ".2f"), f"{w.logp_per_token:.3f}"),
            w.verdict,
        )
        for w in found
    ]
    known = f"{pairs} pairs" if pairs == rows else f"{pairs} of {rows} pairs (the others lack a score)"
    return "\n".join(
        [
            aligned([header, *cells]),
            "",
            f"{known}; 95% of samples of this size give an agreement within {196 * (0.25 / pairs) ** 0.5:.1f} points.",
            f"The references disagree about which response is likelier on {disagree:.1%} of pairs.",
            "agrees: share of pairs where the reference gives the chosen response the higher log-prob. corr.: of its margins",
            "(chosen minus rejected) with the anchor's. clipped, decides: share of texts that the trust region moved, and where",
            "it is the lowest, so that it rules the harmonic mean. moves: change of the virtual margin without it, in nats.",
        ]
    )


def plot_worth(found: Sequence[Worth], ref_logps_KP2: Tensor, path: Path) -> None:
    """Bars of the shares, and each reference's margins against the anchor's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    others = range(1, len(found))
    figure = Figure(figsize=(4.6 * (1 + max(1, len(others))), 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    measures = {"agrees with labels": "agrees", "weight": "weight", "clipped": "clipped", "decides": "decides"}
    width = 0.8 / len(found)
    for k, worth in enumerate(found):
        places = np.arange(len(measures)) + (k - (len(found) - 1) / 2) * width
        values = [getattr(worth, key) for key in measures.values()]
        bars = axes[0].bar(places, values, width, label=worth.name, color=PALETTE[k % len(PALETTE)])
        axes[0].bar_label(bars, labels=[f"{value:.0%}" for value in values], fontsize=7)
    axes[0].axhline(0.5, color="#888888", linewidth=0.8, linestyle=":")
    axes[0].set_xticks(range(len(measures)), list(measures), fontsize=9)
    axes[0].set_ylim(0, 1.08)
    axes[0].set_title("What each reference does", fontsize=11)
    axes[0].legend(fontsize=8.5, frameon=False)
    margins_KP = (ref_logps_KP2[..., 0] - ref_logps_KP2[..., 1]).numpy()
    for k in others:
        axis = axes[k]
        axis.scatter(margins_KP[0], margins_KP[k], s=9, alpha=0.55, color=PALETTE[k % len(PALETTE)], linewidths=0)
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.set_xlabel("margin of the anchor (nats)", fontsize=9)
        axis.set_ylabel(f"margin of {found[k].name} (nats)", fontsize=9)
        axis.set_title(f"{found[k].name}: {found[k].verdict}", fontsize=9, wrap=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _combine(logps_KP2: Tensor, objective: Objective) -> CombinedReferences:
    """As MRPO combines them, whatever a run would: DPO would take the anchor alone."""
    return combine(logps_KP2, replace(objective, name="mrpo"))


def _moves(logps_KP2: Tensor, virtual_P2: Tensor, k: int, objective: Objective) -> float | None:
    if k == 0 or not isinstance(objective.ref_weights, str):
        return None
    without_P2 = _combine(torch.cat([logps_KP2[:k], logps_KP2[k + 1 :]]), objective).virtual_logps_P2
    difference_P2 = virtual_P2 - without_P2
    return (difference_P2[:, 0] - difference_P2[:, 1]).abs().mean().item()


def _verdict(worth: Worth, k: int, pairs: int) -> str:
    if k == 0:
        return "the anchor"
    if worth.decides < DECIDES_NOTHING:
        return f"adds nothing: decides {worth.decides:.1%} of texts"
    if worth.correlation is not None and worth.correlation > SAME_AS_ANCHOR:
        return f"nearly the anchor again: correlation {worth.correlation:.3f}"
    adds = f"adds something: decides {worth.decides:.0%} of texts"
    if worth.agrees < 0.5 - 1.96 * (0.25 / pairs) ** 0.5:
        return f"{adds}, but ranks pairs against the labels ({worth.agrees:.0%})"
    if worth.clipped > 0.95:
        return f"{adds}, nearly always at the edge of the trust region ({worth.clipped:.0%} clipped)"
    return adds


def _disagree(ref_logps_KP2: Tensor) -> float:
    """Share of pairs where not all references put the same response first."""
    chosen_KP = ref_logps_KP2[..., 0] > ref_logps_KP2[..., 1]
    return (chosen_KP.any(0) & ~chosen_KP.all(0)).double().mean().item()


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks, ties shared."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + last - 1) / 2)[inverse]
