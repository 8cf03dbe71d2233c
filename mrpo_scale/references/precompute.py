"""Score whole data sets into the cache, one reference in memory at a time: `ref_scoring: precompute` and `mrpo score`.

Rows are sorted by length and cut into chunks, so that a forward holds pairs of like length. A job visits the chunks in an order
of its own and leaves out what the cache has by then, so that any number of jobs fill one cache together.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from tqdm.auto import tqdm

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, get_rank, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.references.live import Reference, load_reference, score_in_step
from mrpo_scale.references.mapped import ranks_that_share
from mrpo_scale.references.placement import process_groups, spread
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore

logger = logging.getLogger(__name__)

FORWARDS_PER_CHUNK = 4  #: of each rank: enough to even out the ranks, little enough to meet another job's rows soon
SECONDS_PER_PART = 60.0  #: what a killed job loses at most


@dataclass(frozen=True)
class _Rows:
    """Distinct rows of several sets, longest first for one tokenization."""

    pairs: Sequence[PairDataset]
    set_N: np.ndarray  #: which of ``pairs``
    row_N: np.ndarray
    key_N: np.ndarray
    length_N: np.ndarray  #: tokens of prompt, chosen and rejected
    tokenization: int

    @classmethod
    def of(cls, pair_sets: Mapping[str, PairDataset], tokenization: int) -> _Rows:
        pairs = list(pair_sets.values())
        set_N = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
        row_N = np.concatenate([np.arange(len(p)) for p in pairs])
        length_N = np.concatenate([p.lengths[:, tokenization].sum(-1) for p in pairs])
        key_N, first = np.unique(np.concatenate([p.row_keys for p in pairs]), return_index=True)
        first, key_N = first[order := np.argsort(-length_N[first], kind="stable")], key_N[order]
        return cls(pairs, set_N[first], row_N[first], key_N, length_N[first], tokenization)

    def chunks(self, tokens: int) -> list[np.ndarray]:
        """Consecutive rows of about ``tokens`` tokens, as indices."""
        ends = np.cumsum(self.length_N)
        starts = np.flatnonzero(np.diff(ends // max(tokens, 1), prepend=-1))
        return np.split(np.arange(len(ends)), starts[1:])

    def tokens(self, i: int) -> PairTokens:
        return self.pairs[self.set_N[i]].tokens(int(self.row_N[i]))[self.tokenization]

    def token_counts(self, chosen: np.ndarray) -> np.ndarray:
        """[n, 2] scored tokens."""
        counts = [self.pairs[self.set_N[i]].scored[self.row_N[i], self.tokenization] for i in chosen]
        return np.array(counts, dtype=np.int32).reshape(-1, 2)


def score_ahead(
    plan: RunPlan,
    stores: Sequence[ReferenceStore],
    which: Sequence[int],
    pair_sets: Mapping[str, PairDataset],
    args: MRPOConfig,
) -> None:
    """Give the references ``which`` a score for every row, each spread over the world's shard groups. Collective over the world.

    Raises:
        ConfigError: a cache that cannot be written, a reference that cannot be loaded.
        TrainingError: a part that could not be written.
    """
    with fail_together(world_group()):
        for k in which:
            stores[k].prepare_to_write()
    nodes = ranks_that_share([plan.references[k].source for k in which], args)
    placement = spread(which, nodes, args.ref_shard_size)
    groups = process_groups(placement, timedelta(seconds=args.ddp_timeout), of_one=args.ref_offload)
    for k in which:
        ranks = placement.group_of(k, args.process_index)
        assert ranks is not None
        set_activity(f"scoring all pairs with {plan.names[k]}")
        reference = load_reference(plan.references[k], groups.get(ranks), args)
        fill(reference, stores[k], pair_sets, args)
        del reference
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def fill(reference: Reference, store: ReferenceStore, pair_sets: Mapping[str, PairDataset], args: MRPOConfig) -> None:
    """Score every row that ``store`` lacks. Collective over the world."""
    rows = _Rows.of(pair_sets, reference.tokenization)
    rank, world_size = args.process_index, args.world_size
    chunks = rows.chunks(FORWARDS_PER_CHUNK * args.ref_tokens_per_forward * world_size)
    # Another job's order is another one, so that the two rarely work on the same rows.
    random.Random(broadcast_from_rank0(time.time_ns(), world_group())).shuffle(chunks)
    missing_N = broadcast_from_rank0(store.missing(rows.key_N), world_group())
    missing = int(missing_N.sum())
    started, scored, done, repeats = time.perf_counter(), 0, 0, store.repeats
    with (
        PartWriter(store, seconds=SECONDS_PER_PART) as writer,
        tqdm(
            total=missing, desc=f"Scoring with {reference.name}", unit="row", disable=args.disable_tqdm or rank != 0
        ) as bar,
    ):
        for chunk in chunks:
            todo = chunk[_still_missing(store, rows.key_N[chunk])]
            mine = todo[rank::world_size]
            tokens = [rows.tokens(i) for i in mine]
            failure: TrainingError | None = None
            for part, logps_P2 in score_in_step(reference, tokens, args.ref_tokens_per_forward):
                try:
                    writer.add(rows.key_N[mine[part]], logps_P2.cpu().numpy(), rows.token_counts(mine[part]))
                except TrainingError as error:
                    failure = error  # raised below: the group still waits for the forwards that are left
                bar.update(len(logps_P2) * world_size)  # the other ranks are about as far
            with fail_together(world_group()):
                if failure is not None:
                    raise failure
            scored += len(todo)
            done += int(missing_N[chunk].sum())  # those that another job has scored meanwhile too
            bar.update(done - bar.n)
        with fail_together(world_group()):
            writer.flush()
    store.refresh()
    seconds = time.perf_counter() - started
    others = f", {missing - scored} came from another job" if missing > scored else ""
    if store.repeats > repeats:
        others += f", {store.repeats - repeats} were scored by both"
    logger.info(
        "%s: scored %d rows in %.1f s, %.1f rows/s%s", reference.name, scored, seconds, scored / seconds, others
    )


def _still_missing(store: ReferenceStore, keys: np.ndarray) -> np.ndarray:
    """[n] bool, the same on all ranks: as the first rank sees the folder now."""
    mask = np.zeros(0, dtype=bool)
    if get_rank() == 0:
        store.refresh()
        mask = store.missing(keys)
    return broadcast_from_rank0(mask, world_group())
