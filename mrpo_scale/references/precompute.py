"""Score whole data sets into the cache, one reference in memory at a time: `ref_scoring: precompute` and `mrpo score`.

Rows are sorted by length and cut into chunks, so that a forward holds pairs of like length. A job visits the chunks in an order
of its own and leaves out what the cache has by then, so that any number of jobs fill one cache together.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from tqdm.auto import tqdm

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.hash_keys import is_first, sort_order
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, get_rank, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.dealing import deal_to_ranks
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.tokenization import PairTokens
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.references.adapters import lenders
from mrpo_scale.references.live import Reference, load_reference, score_in_step
from mrpo_scale.references.mapped import ranks_that_share
from mrpo_scale.references.placement import process_groups, spread
from mrpo_scale.references.served import ServedReference
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore

logger = logging.getLogger(__name__)

#: A job of an array has its own share of the rows, which nobody waits for: it looks what the others have this often, not before
#: each chunk, and writes parts less often the more jobs there are. Hundreds of jobs would otherwise list a folder of tens of
#: thousands of files all the time.
SECONDS_PER_LOOK = 10.0
FORWARDS_PER_CHUNK = 4  #: of each rank: enough to even out the ranks, little enough to meet another job's rows soon
SECONDS_PER_PART = 60.0  #: what a killed job loses at most


@dataclass(frozen=True)
class Share:
    """Which job of an array this is, from 0, and how many there are."""

    number: int
    jobs: int

    @property
    def seconds_per_part(self) -> float:
        """Ten jobs or fewer write as a single one does; a hundred and more every ten minutes, which is what a killed one loses."""
        return SECONDS_PER_PART * min(10, max(1, self.jobs // 10))

    def order(self, chunks: int, rng: random.Random) -> list[int]:
        """Its own chunks first to last; then those of the others last to first, so that a helper meets a job late."""
        others = [number for number in range(self.jobs) if number != self.number]
        rng.shuffle(others)
        helped = (chunk for number in others for chunk in reversed(range(number, chunks, self.jobs)))
        return [*range(self.number, chunks, self.jobs), *helped]


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
        key_N = np.concatenate([p.row_keys for p in pairs])
        first = sort_order(key_N)
        first = first[is_first(key_N[first])]
        first = first[np.argsort(-length_N[first], kind="stable")]
        return cls(pairs, set_N[first], row_N[first], key_N[first], length_N[first], tokenization)

    def chunks(self, tokens: int) -> list[np.ndarray]:
        """Consecutive rows of about ``tokens`` tokens, as indices."""
        ends = np.cumsum(self.length_N)
        starts = np.flatnonzero(np.diff(ends // max(tokens, 1), prepend=-1))
        return np.split(np.arange(len(ends)), starts[1:])

    def batches(self, size: int) -> list[np.ndarray]:
        """Consecutive rows, ``size`` at a time, as indices."""
        return np.split(np.arange(len(self.key_N)), range(size, len(self.key_N), size))

    def longest(self) -> int:
        """Tokens of the longest prompt with a response."""
        lengths = [p.lengths[:, self.tokenization] for p in self.pairs if len(p)]
        return max((int((one[:, 0] + one[:, 1:].max(-1)).max()) for one in lengths), default=0)

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
    share: Share | None = None,
) -> None:
    """Give the references ``which`` a score for every row, each spread over the world's shard groups. Collective over the world.

    Raises:
        ConfigError: a cache that cannot be written, a reference that cannot be loaded.
        TrainingError: a part that could not be written.
    """
    with fail_together(world_group()):
        for k in which:
            stores[k].prepare_to_write()
    served = _connect(plan, stores, [k for k in which if plan.references[k].source.server], pair_sets, args)
    loaded = [k for k in which if k not in served]
    nodes = ranks_that_share([plan.references[k].source for k in loaded], args)
    placement = spread(loaded, nodes, args.ref_shard_size)
    groups = process_groups(placement, timedelta(seconds=args.ddp_timeout), of_one=args.ref_offload)
    lender = lenders({k: plan.references[k].source for k in loaded})
    reference: Reference | None = None
    # Those that share weights one after the other, so that these load once.
    for k in [*served, *sorted(loaded, key=lambda k: lender[k])]:
        set_activity(f"scoring all pairs with {plan.names[k]}")
        if k in served:
            _fill_from_server(served[k], stores[k], pair_sets, args)
            continue
        ranks = placement.group_of(k, args.process_index)
        assert ranks is not None
        beside = [] if reference is None or lender[k] == k else [reference]
        reference = None  # what lends nothing goes before the next one comes
        _release(args)
        reference = load_reference(plan.references[k], groups.get(ranks), args, beside)
        fill(reference, stores[k], pair_sets, args, share)
    reference = None
    _release(args)


def _release(args: MRPOConfig) -> None:
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


def fill(
    reference: Reference,
    store: ReferenceStore,
    pair_sets: Mapping[str, PairDataset],
    args: MRPOConfig,
    share: Share | None = None,
) -> None:
    """Score every row that ``store`` lacks. Collective over the world.

    Args:
        share: of a job of an array; without one, jobs visit rows in orders of chance.
    """
    rows = _Rows.of(pair_sets, reference.tokenization)
    chunks = rows.chunks(FORWARDS_PER_CHUNK * args.ref_tokens_per_forward * args.world_size)

    def score(todo: np.ndarray, writer: PartWriter, bar: tqdm) -> None:
        mine = todo[deal_to_ranks(rows.length_N[todo], args.world_size)[args.process_index]]
        tokens = [rows.tokens(i) for i in mine]
        failure: TrainingError | None = None
        for part, logps_P2 in score_in_step(reference, tokens, args.ref_tokens_per_forward):
            try:
                writer.add(rows.key_N[mine[part]], logps_P2.cpu().numpy(), rows.token_counts(mine[part]))
            except TrainingError as error:
                failure = error  # raised below: the group still waits for the forwards that are left
            bar.update(len(logps_P2) * args.world_size)  # the other ranks are about as far
        with fail_together(world_group()):
            if failure is not None:
                raise failure

    _fill(reference.name, rows, chunks, score, store, args, share)


def _connect(
    plan: RunPlan,
    stores: Sequence[ReferenceStore],
    which: Sequence[int],
    pair_sets: Mapping[str, PairDataset],
    args: MRPOConfig,
) -> dict[int, ServedReference]:
    """The references ``which``, whose servers answer and are the ones that they were: before any other is loaded. Collective."""
    served = {}
    with fail_together(world_group()):
        for k in which:
            text = plan.texts[plan.references[k].tokenization]
            served[k] = ServedReference(plan.references[k], text, stores[k].folder)
            if args.process_index == 0:
                served[k].connect(_Rows.of(pair_sets, served[k].tokenization).longest())
    return served


def _fill_from_server(
    reference: ServedReference, store: ReferenceStore, pair_sets: Mapping[str, PairDataset], args: MRPOConfig
) -> None:
    """As :func:`fill`. The first rank asks, so that ``concurrency`` is the job's; a batch is written as soon as it is scored."""
    rows = _Rows.of(pair_sets, reference.tokenization)

    def score(todo: np.ndarray, writer: PartWriter, bar: tqdm) -> None:
        with fail_together(world_group()):
            if args.process_index == 0 and len(todo):
                writer.add(rows.key_N[todo], reference.score([rows.tokens(i) for i in todo]), rows.token_counts(todo))
                writer.flush()

    _fill(reference.name, rows, rows.batches(reference.rows_per_batch), score, store, args)


def _fill(
    name: str,
    rows: _Rows,
    chunks: list[np.ndarray],
    score: Callable[[np.ndarray, PartWriter, tqdm], None],
    store: ReferenceStore,
    args: MRPOConfig,
    share: Share | None = None,
) -> None:
    """``score`` what ``store`` lacks of each chunk, in an order of this job's own. Collective over the world."""
    # Another job's order is another one, so that the two rarely work on the same rows.
    rng = random.Random(broadcast_from_rank0(time.time_ns(), world_group()))
    order = rng.sample(range(len(chunks)), len(chunks)) if share is None else share.order(len(chunks), rng)
    look = _Look(store, 0.0 if share is None else SECONDS_PER_LOOK)
    missing_N = broadcast_from_rank0(store.missing(rows.key_N), world_group())
    missing = int(missing_N.sum())
    started, scored, done, repeats = time.perf_counter(), 0, 0, store.repeats
    disable = args.disable_tqdm or args.process_index != 0
    with (
        _writer(store, share) as writer,
        tqdm(total=missing, desc=f"Scoring with {name}", unit="row", disable=disable) as bar,
    ):
        for chunk in (chunks[i] for i in order):
            todo = chunk[look.missing(rows.key_N[chunk])]
            score(todo, writer, bar)
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
    logger.info("%s: scored %d rows in %.1f s, %.1f rows/s%s", name, scored, seconds, scored / seconds, others)


def _writer(store: ReferenceStore, share: Share | None) -> PartWriter:
    if share is None or share.seconds_per_part <= SECONDS_PER_PART:
        return PartWriter(store, seconds=SECONDS_PER_PART)
    return PartWriter(store, rows=1 << 16, seconds=share.seconds_per_part)


class _Look:
    """What a store lacks, as the first rank sees the folder, at which it looks every ``seconds``. Collective over the world."""

    def __init__(self, store: ReferenceStore, seconds: float) -> None:
        self._store, self._seconds, self._next = store, seconds, 0.0

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[n] bool, the same on all ranks."""
        mask = np.zeros(0, dtype=bool)
        if get_rank() == 0:
            if time.monotonic() >= self._next:
                self._store.refresh()
                self._next = time.monotonic() + self._seconds
            mask = self._store.missing(keys)
        return broadcast_from_rank0(mask, world_group())
