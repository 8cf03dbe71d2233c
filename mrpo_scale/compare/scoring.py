"""One scoring for all runs of a comparison: what the score cache lacks is computed in one process group, before the first run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.commands.score import Recipe
from mrpo_scale.compare.processes import run_alone, tail
from mrpo_scale.references.stores import count_missing, distinct_rows, open_stores


def fill_cache(recipe: Recipe, argv: Sequence[str], log: Path) -> None:
    """Run ``argv``, the `mrpo score` of the recipe, unless every score is there.

    Raises:
        TrainingError: the scoring failed.
    """
    stores = open_stores(recipe.plan, recipe.config, recipe.pair_sets)
    missing = count_missing(stores, distinct_rows(recipe.pair_sets))
    if not any(missing):
        print(f"scores: complete in {recipe.config.ref_cache_folder}", flush=True)
        return
    print(f"scores: {sum(missing)} to compute with {len(stores)} references, once for all runs; log: {log}", flush=True)
    status = run_alone(argv, log)
    if status:
        raise TrainingError(f"scoring failed with status {status}; {log} ends:\n{tail(log)}")
