"""The stores of a run's references, all together: opened, counted, waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.hash_keys import distinct
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import all_gather_object, all_reduce_max, broadcast_from_rank0, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import ReferenceSource, local_folder
from mrpo_scale.references.store.cache import ReferenceStore
from mrpo_scale.references.store.identity import ReferenceIdentity, identify, identify_served

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0  #: between two looks at the cache while `follow` waits


def distinct_rows(pair_sets: Mapping[str, PairDataset]) -> np.ndarray:
    """[N] keys of the rows of all sets, each once: a text that stands in two sets is scored once."""
    keys = [pairs.row_keys for pairs in pair_sets.values()]
    return distinct(keys[0] if len(keys) == 1 else np.concatenate(keys))


def open_stores(
    plan: RunPlan, args: MRPOConfig, pair_sets: Mapping[str, PairDataset], *, read: bool = True
) -> list[ReferenceStore]:
    """The store of each reference, ``read`` or not yet; none without a cache folder. Collective over the world.

    Raises:
        ConfigError: a folder that is none, a part that cannot be used, or files of a reference that cannot be read.
    """
    root = args.ref_cache_folder
    if root is None:
        return []
    with fail_together(world_group()):
        there = next(path for path in (root, *root.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"`ref_cache_dir: {root}`: {there} is a file; name another folder.")
    wanted = distinct_rows(pair_sets)
    models = [(reference.source, plan.texts[reference.tokenization]) for reference in plan.references]
    stores = [ReferenceStore(root, identity, wanted) for identity in identify_models(models, args, root)]
    with fail_together(world_group()):
        for store in stores if read else ():
            store.refresh()
    return stores


def identify_models(
    models: Sequence[tuple[ReferenceSource, ModelText]], args: MRPOConfig, memo_dir: Path
) -> list[ReferenceIdentity]:
    """Of each model; one process of each node reads its files, and all nodes must have the same. Collective over the world."""
    folders = [None if source.server else local_folder(source, world_group()) for source, _ in models]
    mine: list[ReferenceIdentity] | None = None
    with fail_together(world_group()):
        if args.local_process_index == 0:
            mine = [
                identify_served(source, text) if folder is None else identify(source, folder, text, memo_dir)
                for (source, text), folder in zip(models, folders, strict=True)
            ]
    everybody = all_gather_object(mine, world_group())
    first = everybody[0]
    assert first is not None
    for rank, identities in enumerate(everybody):
        for ours, theirs in zip(first, identities or first, strict=True):
            if ours.key != theirs.key:
                raise ConfigError(
                    f"reference {ours.name}: its files on rank {rank}'s node are not those on rank 0's ({theirs.key} and "
                    f"{ours.key}); copy the folder again, or put it on a file system that all nodes share."
                )
    return first


def count_missing(stores: Sequence[ReferenceStore], keys: np.ndarray) -> list[int]:
    """Rows of ``keys`` that each store has no score for, as the rank that sees least of them counts. Collective."""
    return all_reduce_max([int(store.missing(keys).sum()) for store in stores], world_group())


def wait_for_scores(stores: Sequence[ReferenceStore], keys: np.ndarray, args: MRPOConfig) -> None:
    """Return when every store has every row; another job writes them. Collective over the world.

    Raises:
        ConfigError: no row came for ``ref_follow_timeout`` minutes.
    """
    set_activity("waiting for scores")
    total = len(keys) * len(stores)
    have, last_news = -1, time.monotonic()
    with tqdm(
        total=total, desc="Waiting for scores", unit="row", disable=args.disable_tqdm or args.process_index != 0
    ) as bar:
        while True:
            with fail_together(world_group()):
                for store in stores:
                    store.refresh()
            missing = count_missing(stores, keys)
            if total - sum(missing) > have:
                have, last_news = total - sum(missing), time.monotonic()
                bar.update(have - bar.n)
            if not any(missing):
                return
            if broadcast_from_rank0(time.monotonic() - last_news > 60 * args.ref_follow_timeout, world_group()):
                lacking = ", ".join(f"{store.identity.name} {n}" for store, n in zip(stores, missing, strict=True) if n)
                raise ConfigError(
                    f"`ref_scoring: follow`: no new score came into {args.ref_cache_folder} for {args.ref_follow_timeout:g} "
                    f"minutes (`ref_follow_timeout`); of {len(keys)} rows these are missing: {lacking}. Start `mrpo score` with "
                    "this recipe, or set `ref_scoring: precompute`."
                )
            time.sleep(min(POLL_SECONDS, 60 * args.ref_follow_timeout))


def report_stores(stores: Sequence[ReferenceStore], missing: Sequence[int], total: int) -> None:
    for store, count in zip(stores, missing, strict=True):
        logger.info("score cache: %s: %d of %d rows (%s)", store.identity.name, total - count, total, store.folder)
