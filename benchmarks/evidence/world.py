"""A set in one direction: its pairs, their parts, every reference's scores (from the score cache), the policy ready to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.study import ANCHOR, OTHER, UNUSED, Direction, SetPlan, read_rows, split
from benchmarks.evidence.upper import UpperLayers
from mrpo_scale.commands.score import Recipe
from mrpo_scale.config.recipe import parse
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring
from mrpo_scale.models.plan import load_policy
from mrpo_scale.references.precompute import score_ahead
from mrpo_scale.references.stores import count_missing, distinct_rows, open_stores


@dataclass
class World:
    """``ref_logps``: {reference: log-probs [N, 2] float32} of the N pairs; specialists are added when they are made."""

    recipe: Recipe
    pairs: PairDataset
    part_N: np.ndarray
    counts: dict[str, int]  #: rows of the file, and what is left after each filter
    ref_logps: dict[str, Tensor]
    policy: UpperLayers | None = None

    def rows(self, *parts: str) -> np.ndarray:
        return np.flatnonzero(np.isin(self.part_N, parts))

    def references(self, names: Sequence[str]) -> Tensor:
        """[K, N, 2]."""
        return torch.stack([self.ref_logps[name] for name in names])

    @property
    def lengths(self) -> np.ndarray:
        """[N] positions that the policy computes for each pair."""
        return self.pairs.lengths[:, 0].sum(-1)


def open_world(plan: SetPlan, direction: Direction, models: dict[str, str], data: Path, work: Path) -> World:
    """Read, tokenize, filter and split the pairs, and score them with both models where the cache under ``work`` lacks them."""
    work.mkdir(parents=True, exist_ok=True)
    path = data / plan.file
    rows = read_rows(path)
    file = work / f"{path.stem}.conversations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe.read(
        *parse(
            [
                *("--model_name_or_path", models[direction.policy], "--ref_models", models[direction.other]),
                *("--dataset_name", str(file), "--dataset_train_split", "train", "--max_bad_rows", "1"),
                *("--ref_cache_dir", str(work / "cache"), "--output_dir", str(work / "output" / direction.name)),
                *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
            ]
        )
    )
    pairs = recipe.pair_sets[TRAIN_SET]
    counts = {"pairs of one turn": len(rows), "that both models can score": len(pairs)}
    if plan.longest is not None:
        # In the tokens of one model, whichever is the policy, so that both directions have the same pairs.
        first = recipe.plan.texts.index(min(recipe.plan.texts, key=lambda text: len(text.tokenizer)))
        pairs = pairs.select(np.flatnonzero(pairs.lengths[:, first].sum(-1) <= plan.longest))
        counts[f"of at most {plan.longest} tokens"] = len(pairs)
    part_N = split(pairs.prompt_keys, plan.parts)
    pairs, part_N = pairs.select(np.flatnonzero(part_N != UNUSED)), part_N[part_N != UNUSED]
    counts["used"] = len(pairs)
    sets = {TRAIN_SET: pairs}
    stores = open_stores(recipe.plan, recipe.config, sets)
    missing = count_missing(stores, distinct_rows(sets))
    score_ahead(recipe.plan, stores, [k for k, n in enumerate(missing) if n], sets, recipe.config)
    scores = [torch.from_numpy(store.lookup(pairs.row_keys).logps_N2) for store in stores]
    return World(recipe, pairs, part_N, counts, dict(zip((ANCHOR, OTHER), scores, strict=True)))


def load_upper(world: World, layers: int, table: Path | None = None) -> UpperLayers:
    """The policy in float32 with its upper layers trainable; the frozen ones' hidden states are kept in ``table``."""
    policy = load_policy(world.recipe.plan.policy).float()
    enable_pair_scoring(policy, "policy")
    end_to_end = choose_end_to_end(
        policy, torch.device("cpu"), name="policy", asked=None, dtype=None, dropout=False, compiled=False
    )
    if not (end_to_end and choose_shared_prompt("true", policy, "policy")):
        raise NotImplementedError(f"{type(policy).__name__}: the study's policies lay pairs out end to end")
    upper = UpperLayers(policy.train(), layers)
    upper.prepare({row: world.pairs.tokens(row)[0] for row in range(len(world.pairs))}, table)
    world.policy = upper
    return upper
