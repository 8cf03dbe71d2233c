"""What the study is made of: sets and their parts, directions, methods. docs/evidence.md is the plan that this carries out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mrpo_scale.objective import Objective

RESULTS = Path("benchmarks/results/evidence")
BETA = 0.1
WINDOW = 8  #: pairs of a step
EPOCHS = 3
TUNING_SEEDS = (100,)  #: of the runs that choose the learning rate; no table reports them
LEARNING_RATES = (2e-5, 1e-4, 3e-4)
ALL = "-all"  #: a variant that trains on pool and specialists' pairs together, once
HIGH, HIGH_RATES = "-high", (1e-3, 3e-3)  #: a variant and its rates: those of the plan hardly changed a ranking

#: Parts of a set, in the order in which they are filled; what is left is the pool that training pairs are drawn from.
PARTS = ("validation", "test", "final", "specialists", "pool")
UNUSED = "unused"


@dataclass(frozen=True)
class SetPlan:
    """One data set: its file, how many pairs each part takes, how many of the pool a seed trains on, the longest pair.

    A pool without a number takes what is left; pairs beyond all parts are not used, nor scored.
    """

    file: str
    parts: Mapping[str, int]
    train: int
    longest: int | None = None


SETS = {
    "truthfulqa": SetPlan(
        "truthfulqa.jsonl", {"validation": 60, "test": 180, "final": 100, "specialists": 64, "pool": 116}, train=64
    ),
    "gsm8k-solutions": SetPlan(
        "gsm8k-solutions.jsonl",
        {"validation": 30, "test": 60, "final": 30, "specialists": 0, "pool": 60},
        train=48,
        longest=280,
    ),
    "preferences-en-300": SetPlan("preferences-en-300.json", {"pool": 48}, train=0, longest=430),
}


@dataclass(frozen=True)
class Direction:
    """Policy and second reference, and how many of the policy's upper layers train."""

    name: str
    policy: str
    other: str
    layers: int


DIRECTIONS = {
    "l-from-m": Direction("l-from-m", "smollm2", "gemma3", 4),
    "m-from-l": Direction("m-from-l", "gemma3", "smollm2", 4),
}


@dataclass(frozen=True)
class Method:
    """One row of the table. ``references``: of ANCHOR, OTHER, SFT, EXPERT, SELF, the first one is the anchor of the objective.

    ``weights`` and ``rule`` are worked out on validation pairs before training, see rules.py.
    """

    title: str
    references: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    rule: str | None = None

    def objective(self, weights: tuple[float, ...] | None = None) -> Objective:
        options = dict(self.options) | ({"ref_weights": weights} if weights is not None else {})
        return Objective(beta=BETA, **options)


ANCHOR, OTHER, SFT, EXPERT, SELF = "anchor", "other", "sft", "expert", "self"
_TWO, _FOUR = (ANCHOR, OTHER), (ANCHOR, OTHER, SFT, EXPERT)
_DPO = {"name": "dpo"}


def _mrpo(title: str, references: tuple[str, ...] = _TWO, **options: Any) -> Method:
    return Method(title, references, options)


METHODS = {
    "dpo-anchor": Method("DPO on the anchor", (ANCHOR,), _DPO),
    "dpo-other": Method("DPO on the other model", (OTHER,), _DPO),
    "mrpo": _mrpo("MRPO (harmonic, confidence, adaptive 0.1)"),
    "mrpo-no-clip": _mrpo("MRPO, no clip", clip="none"),
    "multi-dpo-uniform": _mrpo("Multi-DPO, uniform", name="multi_dpo", ref_weights="uniform"),
    "mean-ref": _mrpo("Mean Ref (geometric, uniform)", aggregate="geometric", ref_weights="uniform"),
    "mrpo-fixed-0.1": _mrpo("MRPO, clip fixed 0.1", clip="fixed"),
    "mrpo-fixed-0.05": _mrpo("MRPO, clip fixed 0.05", clip="fixed", epsilon_max=0.05),
    "mrpo-uniform": _mrpo("MRPO, uniform", ref_weights="uniform"),
    "mrpo-validation": Method("MRPO, validation weights", _TWO, {}, weights="validation"),
    "mrpo-min": _mrpo("MRPO, p = -inf", aggregate="min"),
    "mrpo-geometric": _mrpo("MRPO, p = 0", aggregate="geometric"),
    "mrpo-arithmetic": _mrpo("MRPO, p = 1", aggregate="arithmetic"),
    "mrpo-0.01": _mrpo("MRPO, epsilon_max 0.01", epsilon_max=0.01),
    "mrpo-1": _mrpo("MRPO, epsilon_max 1", epsilon_max=1.0),
    "multi-dpo": _mrpo("Multi-DPO, confidence", name="multi_dpo"),
    "hypo": Method("HyPO on the anchor", (ANCHOR,), {"name": "dpo", "reference_margin": "nonnegative"}),
    "pre-dpo": Method("Pre-DPO: DPO on the anchor's trained copy", (SELF,), _DPO),
    "mrpo-one-hot": Method("MRPO, one-hot on the best of validation", _TWO, {}, weights="one-hot"),
    "dpo-expert": Method("DPO on E", (EXPERT,), _DPO),
    "dpo-sft": Method("DPO on S", (SFT,), _DPO),
    "mrpo-sft": _mrpo("MRPO, anchor and S: setting (i)", (ANCHOR, SFT)),
    "mrpo-sft-no-clip": _mrpo("MRPO, anchor and S, no clip", (ANCHOR, SFT), clip="none"),
    "mrpo-k3": _mrpo("MRPO, K = 3 (anchor, M, E)", (ANCHOR, OTHER, EXPERT)),
    "mrpo-k4": _mrpo("MRPO, K = 4 (anchor, M, S, E)", _FOUR),
    "mrpo-k4-no-clip": _mrpo("MRPO, K = 4, no clip", _FOUR, clip="none"),
    "mean-ref-k4": _mrpo("Mean Ref, K = 4", _FOUR, aggregate="geometric", ref_weights="uniform"),
    "rule-fitted": Method("rule: geometric, weights fitted", _FOUR, {"aggregate": "geometric"}, weights="fitted"),
    "rule-agree": Method("rule: margin where all agree", _FOUR, _DPO, rule="agree"),
    "rule-calibrated": Method("rule: calibrated margin", _FOUR, _DPO, rule="calibrated"),
    "rule-hypo": _mrpo("rule: MRPO, K = 4, nonnegative margin", _FOUR, reference_margin="nonnegative"),
}
RULES = tuple(name for name in METHODS if name.startswith("rule-"))
SINGLES = ("dpo-anchor", "dpo-other", "dpo-sft", "dpo-expert")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one user turn and two answers, as conversations, so that every model uses its own template. Pairs of several
    turns are left out; their number is the difference to the file's."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if rows and not isinstance(rows[0]["prompt"], str):
            return rows
        plain = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    else:
        rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if len(row["conversations"]) == 1]
        plain = [(r["conversations"][0]["value"], r["chosen"]["value"], r["rejected"]["value"]) for r in rows]
    return [
        {"prompt": [_turn("user", p)], "chosen": [_turn("assistant", c)], "rejected": [_turn("assistant", r)]}
        for p, c, r in plain
    ]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def split(prompt_keys: np.ndarray, parts: Mapping[str, int]) -> np.ndarray:
    """[N] the name of each pair's part. Seed 0; all pairs of a prompt stay together, so a part may be a little larger."""
    part_N = np.full(len(prompt_keys), UNUSED, dtype="<U11")
    order = np.random.default_rng(0).permutation(np.unique(prompt_keys))
    sizes = {key: int((prompt_keys == key).sum()) for key in order}
    prompts = iter(order)
    for name in PARTS:
        count = 0
        while count < parts.get(name, len(order) if name == "pool" else 0):
            key = next(prompts, None)
            if key is None:
                break
            part_N[prompt_keys == key] = name
            count += sizes[key]
    return part_N
