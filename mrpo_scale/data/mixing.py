"""Several data sets as one: how a recipe names them, and what share of the pairs each gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from mrpo_scale.errors import ConfigError
from mrpo_scale.untrusted import parse_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set as a recipe names it: its name, or a mapping of these keys."""

    name: str
    config: str | None = None
    split: str | None = None
    weight: float | None = None
    layout: str | None = None

    @property
    def label(self) -> str:
        """What its rows are called in messages."""
        parts = [part for part in (self.config, self.split) if part]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


#: One data set as typed.
Entry = str | Mapping[str, Any] | DatasetSpec


def parse_datasets(dataset_name: Entry | Sequence[Entry]) -> list[DatasetSpec]:
    """``dataset_name`` as typed: a name, a mapping, a list of them, or mappings as JSON text (how the command line carries them).

    Raises:
        ConfigError: an unknown key, no name, a weight that is not above 0, or weights for some of the sets only.
    """
    entries = [dataset_name] if isinstance(dataset_name, (str, Mapping, DatasetSpec)) else list(dataset_name)
    specs = [_parse(entry) for entry in entries]
    without = [spec.name for spec in specs if spec.weight is None]
    if len(specs) > 1 and 0 < len(without) < len(specs):
        raise ConfigError(
            f"`dataset_name`: `{without[0]}` has no `weight` but others have; give all of them one, or none."
        )
    return specs


def _parse(entry: Entry) -> DatasetSpec:
    if isinstance(entry, DatasetSpec):
        return entry
    values: Any = entry
    if isinstance(entry, str):
        try:
            values = parse_json(entry) if entry.lstrip().startswith("{") else {"name": entry}
        except ValueError as error:
            raise ConfigError(f"`dataset_name: {entry}` is not a name nor a JSON mapping: {error}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"`dataset_name: {entry}` must be a name or a mapping, got {type(entry).__name__}.")
    known = [field.name for field in fields(DatasetSpec)]
    unknown = sorted(set(values) - set(known))
    if unknown or not values.get("name"):
        problem = f"unknown key `{unknown[0]}`" if unknown else "key `name` is missing"
        raise ConfigError(f"`dataset_name: {dict(values)}`: {problem}; known keys are {', '.join(known)}.")
    for key in known:
        if key != "weight" and not isinstance(values.get(key), (str, type(None))):
            raise ConfigError(f"`dataset_name: {dict(values)}`: `{key}: {values[key]!r}` must be text.")
    weight = values.get("weight")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float)) or not weight > 0):
        raise ConfigError(f"`dataset_name: {dict(values)}`: `weight: {weight}` must be a number above 0.")
    return DatasetSpec(**values)


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
