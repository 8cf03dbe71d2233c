"""Several data sets as one: how a recipe names them, and what share of the pairs each gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.data_keys import DatasetSpec

logger = logging.getLogger(__name__)


def mix(tables: Sequence[datasets.Dataset], specs: Sequence[DatasetSpec], seed: int) -> datasets.Dataset:
    """One pair table of several. Without weights: all pairs of all sets. With weights: each set gives its share of the pairs.

    The mix is as large as the shares allow without a pair being taken twice, so it ends with the set that runs out first; of the
    others a random part is taken. Bad rows come along in proportion. The order is random. Everything depends on ``seed`` alone.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(table)) for table in tables]
    if specs[0].weight is not None:
        good = [pc.equal(table.with_format("arrow")["reason"][:], "").to_numpy() for table in tables]
        weights = np.array([spec.weight for spec in specs])
        size = min(flags.sum() / weight for flags, weight in zip(good, weights, strict=True))
        if size == 0:
            empty = next(spec.label for spec, flags in zip(specs, good, strict=True) if not flags.any())
            raise ConfigError(
                f"`dataset_name`: `{empty}` has no usable pair, so no mix with its weight is possible; remove it."
            )
        for i, flags in enumerate(good):
            wanted = int(size * weights[i] + 1e-9)
            taken = np.searchsorted(np.cumsum(flags[orders[i]]), wanted) + 1 if wanted else 0
            logger.info("%s: %d of %d pairs", specs[i].label, wanted, flags.sum())
            orders[i] = orders[i][:taken]
    starts = np.cumsum([0, *(len(table) for table in tables)])
    chosen = np.concatenate([order + start for order, start in zip(orders, starts, strict=False)])
    return datasets.concatenate_datasets(list(tables)).select(rng.permutation(chosen))
