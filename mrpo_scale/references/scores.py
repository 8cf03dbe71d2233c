"""Where a run's reference scores come from: read where the cache has them, scored by live references where it has not.

A window is read whole or scored whole, for each reference: the same row beside other rows differs in the last bits, so only then
does a run that was killed and resumed see the numbers that it saw before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor
from tqdm.auto import tqdm

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import all_gather_object, all_reduce_max, broadcast_from_rank0, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.tokenization import ModelText, PairDataset
from mrpo_scale.data.window import PairExample, TokenizedPairs
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import ReferenceSource, local_folder, num_parameters
from mrpo_scale.objective import Objective, combine
from mrpo_scale.references.live import PartitionScorer, Reference, SpreadScorer, load_reference
from mrpo_scale.references.mapped import ranks_that_share
from mrpo_scale.references.placement import (
    Placement,
    Ranks,
    Share,
    partition,
    placement_table,
    process_groups,
    spread,
)
from mrpo_scale.references.precompute import score_ahead
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore, StoredScores
from mrpo_scale.references.store.identity import ReferenceIdentity, identify

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0  #: between two looks at the cache while `follow` waits


@dataclass(frozen=True)
class _Window:
    """This rank's pairs that are scored together, and what the cache has of them."""

    examples: Sequence[PairExample]
    pairs: TokenizedPairs
    rows: np.ndarray
    stored: Sequence[StoredScores]  #: of every reference; none without a cache
    which: Sequence[int]  #: references that must score them


class ReferenceScores:
    """The scores of a run's K references. Collective over the world: opening, :meth:`score`, :meth:`logps` and :meth:`flush`.

    Args:
        pair_sets: every set that will be scored.
        pool: references that are in memory already, by number and ranks; those that load now join them.

    Attributes:
        references: {k: reference} as far as this rank holds a part; none of those whose scores are all cached.

    Raises:
        ConfigError: a cache that cannot be read or, where something is missing, written; `follow` that waited in vain; a reference
            that cannot be loaded.
    """

    def __init__(
        self,
        plan: RunPlan,
        args: MRPOConfig,
        pair_sets: Mapping[str, PairDataset],
        pool: dict[tuple[int, Ranks], Reference] | None = None,
    ) -> None:
        self.names, self.device, self.impl = plan.names, args.device, args.head_impl
        self.stores = open_stores(plan, args, pair_sets)
        everything = distinct_rows(pair_sets)
        if self.stores and args.ref_scoring == "follow":
            wait_for_scores(self.stores, everything, args)
        missing = (
            count_missing(self.stores, everything, self.device) if self.stores else [len(everything)] * len(plan.names)
        )
        if args.ref_scoring == "precompute":
            score_ahead(plan, self.stores, [k for k, count in enumerate(missing) if count], pair_sets, args)
            missing = [0] * len(missing)
        self.live = [k for k, count in enumerate(missing) if count]
        self._writers: dict[int, PartWriter] = {}
        self.references: dict[int, Reference] = {}
        if self.stores:
            _report_cache(self.stores, missing, len(everything))
            with fail_together(world_group()):
                for k in self.live:
                    self.stores[k].prepare_to_write()
            self._writers = {k: PartWriter(self.stores[k]) for k in self.live}
        if self.live:
            self._load(plan, args, pair_sets, {} if pool is None else pool)

    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, objective: Objective) -> CombinedReferences:
        """The virtual reference of this rank's examples, all rows of ``pairs``, in their order. This is where a step forms it.

        Where all references are live it comes from the fused call that scores them, otherwise from the log-probs, by the same code.

        Raises:
            TrainingError: on every rank if one of them cannot write what it scored.
        """
        window = self._look_up(examples, pairs)
        if len(window.which) < len(self.names):
            return combine(self._completed(window), objective, self.impl)
        combined = self._scorer.combined(examples, pairs, window.which, objective)
        self._keep(window, combined.ref_logps_KP2)
        return combined

    def logps(self, examples: Sequence[PairExample], pairs: TokenizedPairs) -> Tensor:
        """Raw log-probs [K, P, 2] float32, where nothing is to be combined yet. Otherwise as :meth:`score`."""
        return self._completed(self._look_up(examples, pairs))

    def admit(self, pairs: PairDataset) -> None:
        """Make ready for rows that were in no set when this was opened. Collective over the world.

        Raises:
            ConfigError: a reference that was not loaded, because all its scores were there, would have to score some.
        """
        if not self.stores:
            return
        self.flush()
        keys = np.unique(pairs.row_keys)
        with fail_together(world_group()):
            for store in self.stores:
                store.want(keys)
        missing = count_missing(self.stores, keys, self.device)
        lacking = [
            f"{name} {n}"
            for k, (name, n) in enumerate(zip(self.names, missing, strict=True))
            if n and k not in self.live
        ]
        if lacking:
            raise ConfigError(
                f"of {len(keys)} rows these have no score in the cache: {', '.join(lacking)}; the references were not loaded, "
                "because the cache has all scores of the run's own sets. Pass the rows as `eval_dataset` when the trainer is made."
            )

    def flush(self, *, refresh: bool = False) -> None:
        """Write the rows that wait in memory. ``refresh``: then also read what the other ranks wrote, for the next epoch.

        Raises:
            TrainingError: on every rank if one of them cannot write.
        """
        if not self._writers:
            return
        with fail_together(world_group()):
            for writer in self._writers.values():
                writer.flush()
        if refresh:
            with fail_together(world_group()):
                for k in self._writers:
                    self.stores[k].refresh()

    def _look_up(self, examples: Sequence[PairExample], pairs: TokenizedPairs) -> _Window:
        """What the cache has of a window, and which references must score it. Collective over the world."""
        rows = np.array([example.row for example in examples], dtype=np.int64)
        if not self.stores:
            return _Window(examples, pairs, rows, [], self.live)
        stored = [store.lookup(pairs.row_keys[rows]) for store in self.stores]
        incomplete = [int(not stored[k].found_N.all()) for k in self.live]
        if self.live:
            incomplete = all_reduce_max(incomplete, world_group(), self.device)
        return _Window(
            examples, pairs, rows, stored, [k for k, some in zip(self.live, incomplete, strict=True) if some]
        )

    def _completed(self, window: _Window) -> Tensor:
        """[K, P, 2] from the cache and, for the references that lack a row, scored anew and kept."""
        scored_KP2 = None
        if window.which:
            scored_KP2 = self._scorer.score(window.examples, window.pairs, window.which)
            self._keep(window, scored_KP2)
            if not window.stored:
                return scored_KP2
        logps_KP2 = torch.stack([torch.from_numpy(stored.logps_N2) for stored in window.stored]).to(self.device)
        if scored_KP2 is not None:
            logps_KP2[window.which] = scored_KP2
        return logps_KP2

    def _keep(self, window: _Window, scored_KP2: Tensor) -> None:
        """Hand rows that the cache lacks to its writers. Collective over the world, where there is a cache."""
        if not window.stored:
            return
        real = np.array([example.weight > 0 for example in window.examples], dtype=bool)
        with fail_together(world_group()):
            for k, logps_P2 in zip(window.which, scored_KP2.cpu().numpy(), strict=True):
                new = real & ~window.stored[k].found_N
                tokens_N2 = window.pairs.lengths[window.rows[new], self._views[k], 1:]
                self._writers[k].add(window.pairs.row_keys[window.rows[new]], logps_P2[new], tokens_N2)

    def _load(
        self,
        plan: RunPlan,
        args: MRPOConfig,
        pair_sets: Mapping[str, PairDataset],
        pool: dict[tuple[int, Ranks], Reference],
    ) -> None:
        """The references that are needed live, one after the other, and a table of what went where."""
        self._views = {k: reference.view for k, reference in enumerate(plan.references)}
        window = args.train_batch_size * args.gradient_accumulation_steps
        lengths = {k: _mean_length(pair_sets, self._views[k]) for k in self.live}
        placement = _place(plan, args, self.live, lengths)
        timeout = timedelta(seconds=args.ddp_timeout)
        groups = process_groups(placement, timeout, of_one=args.ref_offload)
        progress = tqdm(
            self.live, desc="Loading references", disable=args.disable_tqdm or args.local_process_index != 0
        )
        for k in progress:
            set_activity(f"loading reference {self.names[k]}")
            ranks = placement.group_of(k, args.process_index)
            if ranks is not None:
                if (k, ranks) not in pool:
                    pool[k, ranks] = load_reference(plan.references[k], groups.get(ranks), args)
                self.references[k] = pool[k, ranks]
        everybody = [entry for some in all_gather_object(self._shares(), world_group()) for entry in some.items()]
        shares = dict(sorted(everybody, key=lambda entry: entry[1].bytes_per_rank))  # the rank that holds most is shown
        forwards = {}
        for k in self.live:
            sharing = args.world_size if args.ref_placement == "spread" else len(placement.ranks(k))
            tokens = window * args.world_size / sharing * lengths[k]
            forwards[k] = max(1, math.ceil(tokens / args.ref_tokens_per_forward))
        if args.process_index == 0:
            logger.info("references:\n%s", placement_table(self.names, placement, shares, forwards))
        per_forward = args.ref_tokens_per_forward
        if args.ref_placement == "partition":
            self._scorer: PartitionScorer | SpreadScorer = PartitionScorer(
                self.references, placement, self.device, tokens_per_forward=per_forward, impl=self.impl
            )
        else:
            self._scorer = SpreadScorer(self.references, tokens_per_forward=per_forward, impl=self.impl)

    def _shares(self) -> dict[int, Share]:
        return {
            k: Share(
                model_type=r.model.config.model_type,
                bytes_per_rank=r.model.bytes_per_rank,
                group_size=r.model.group_size,
                shared_prompt=r.model.shared_prompt,
                offload=r.model.offload,
                mapped=r.model.mapped,
            )
            for k, r in self.references.items()
        }


def distinct_rows(pair_sets: Mapping[str, PairDataset]) -> np.ndarray:
    """[N] keys of the rows of all sets, each once: a text that stands in two sets is scored once."""
    return np.unique(np.concatenate([pairs.row_keys for pairs in pair_sets.values()]))


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
    models = [(reference.source, plan.texts[reference.view]) for reference in plan.references]
    stores = [ReferenceStore(root, identity, wanted) for identity in identify_models(models, args, root)]
    with fail_together(world_group()):
        for store in stores if read else ():
            store.refresh()
    return stores


def identify_models(
    models: Sequence[tuple[ReferenceSource, ModelText]], args: MRPOConfig, memo_dir: Path
) -> list[ReferenceIdentity]:
    """Of each model; one process of each node reads its files, and all nodes must have the same. Collective over the world."""
    folders = [local_folder(source, world_group()) for source, _ in models]
    mine: list[ReferenceIdentity] | None = None
    with fail_together(world_group()):
        if args.local_process_index == 0:
            mine = [
                identify(source, folder, text, memo_dir) for (source, text), folder in zip(models, folders, strict=True)
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


def count_missing(stores: Sequence[ReferenceStore], keys: np.ndarray, device: torch.device) -> list[int]:
    """Rows of ``keys`` that each store has no score for, as the rank that sees least of them counts. Collective."""
    return all_reduce_max([int(store.missing(keys).sum()) for store in stores], world_group(), device)


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
            missing = count_missing(stores, keys, args.device)
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


def _place(plan: RunPlan, args: MRPOConfig, live: Sequence[int], lengths: Mapping[int, float]) -> Placement:
    nodes = ranks_that_share([plan.references[k].source for k in live], args)
    if args.ref_placement == "spread":
        return spread(live, nodes, args.ref_shard_size)
    costs = {}
    for k in live:
        source = plan.references[k].source
        costs[k] = num_parameters(local_folder(source, world_group()), source.name) * lengths[k]
    return partition(costs, nodes, args.ref_shard_size)


def _mean_length(pair_sets: Mapping[str, PairDataset], view: int) -> float:
    """Tokens of a pair in a view: prompt, chosen and rejected."""
    return float(np.concatenate([pairs.lengths[:, view].sum(-1) for pairs in pair_sets.values()]).mean())


def _report_cache(stores: Sequence[ReferenceStore], missing: Sequence[int], total: int) -> None:
    for store, count in zip(stores, missing, strict=True):
        logger.info("score cache: %s: %d of %d rows (%s)", store.identity.name, total - count, total, store.folder)
