"""Where a run's reference scores come from: read where the cache has them, scored by live references where it has not.

A window is read whole or scored whole, for each reference: the same row beside other rows differs in the last bits, so only then
does a run that was killed and resumed see the numbers that it saw before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor

from mrpo_scale.base.device import HostCopy, send
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.hash_keys import distinct
from mrpo_scale.base.ranks import all_reduce_max, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.window import PairExample, TokenizedPairs
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.objective import Objective, combine
from mrpo_scale.references.adapter_off import AdapterOffAnchor
from mrpo_scale.references.live import Reference, SpreadScorer
from mrpo_scale.references.loading import LiveReferences, Pool, load_references
from mrpo_scale.references.precompute import score_ahead
from mrpo_scale.references.served import compare_served
from mrpo_scale.references.store.cache import PartWriter, ReferenceStore, StoredScores
from mrpo_scale.references.stores import count_missing, distinct_rows, open_stores, report_stores, wait_for_scores


class ReferenceScores(ABC):
    """The scores of a run's K references; :func:`open_scores` makes one. Collective over the world: every method.

    Args:
        names: of the K references.
        loaded: the references that can score rows; all of them where there is no cache.

    Attributes:
        live: the numbers of these references.
        references: {k: reference} as far as this rank holds a part of one.
        stores: of each of the K references; none without a cache.
    """

    stores: Sequence[ReferenceStore] = ()

    def __init__(self, names: Sequence[str], loaded: LiveReferences) -> None:
        self.names, self.live = names, list(loaded.which)
        self.references: dict[int, Reference] = loaded.references
        self.scorer = loaded.scorer

    @abstractmethod
    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, objective: Objective) -> CombinedReferences:
        """The virtual reference of this rank's examples, all rows of ``pairs``, in their order. This is where a step forms it.

        Where all references are live it comes from the fused call that scores them, otherwise from the log-probs, by the same code.

        Raises:
            TrainingError: on every rank if one of them cannot write what it scored.
        """

    @abstractmethod
    def logps(self, examples: Sequence[PairExample], pairs: TokenizedPairs) -> Tensor:
        """Raw log-probs [K, P, 2] float32, where nothing is to be combined yet. Otherwise as :meth:`score`."""

    @abstractmethod
    def admit(self, pairs: PairDataset) -> None:
        """Make ready for rows that were in no set when this was opened.

        Raises:
            ConfigError: a reference that was not loaded, because all its scores were there, would have to score some.
        """

    @abstractmethod
    def flush(self, *, refresh: bool = False) -> None:
        """Write the rows that wait in memory. ``refresh``: then also read what the other ranks wrote, for the next epoch.

        Raises:
            TrainingError: on every rank if one of them cannot write.
        """


def open_scores(
    plan: RunPlan, args: MRPOConfig, pair_sets: Mapping[str, PairDataset], pool: Pool | None = None
) -> ReferenceScores:
    """Live or cached scores, as ``args`` say; scores or waits for what must be there first. Collective over the world.

    Args:
        pair_sets: every set that will be scored.
        pool: references that are in memory already; those that load now join them.

    Raises:
        ConfigError: a cache that cannot be read or, where something is missing, written; `follow` that waited in vain; a reference
            that cannot be loaded.
    """
    if args.ref_cache_folder is None or args.samples:  # what is sampled is in no cache, so every reference must be here
        loaded = load_references(plan, args, pair_sets, range(int(args.anchor_is_policy), len(plan.names)), pool)
        return LiveScores(plan.names, loaded, args)
    stores = open_stores(plan, args, pair_sets)
    everything = distinct_rows(pair_sets)
    if args.ref_scoring == "follow":
        wait_for_scores(stores, everything, args)
    missing = count_missing(stores, everything)
    compare_served(plan, stores, missing, is_main=args.process_index == 0)
    if args.ref_scoring == "precompute":
        score_ahead(plan, stores, [k for k, count in enumerate(missing) if count], pair_sets, args)
        missing = [0] * len(missing)
    report_stores(stores, missing, len(everything))
    live = [k for k, count in enumerate(missing) if count]
    with fail_together(world_group()):
        for k in live:
            stores[k].prepare_to_write()
    tokenizations = [reference.tokenization for reference in plan.references]
    return CachedScores(plan.names, load_references(plan, args, pair_sets, live, pool), stores, tokenizations, args)


class LiveScores(ReferenceScores):
    """All references score every window, and nothing is kept. Where the anchor is the policy, :attr:`anchor` is set when the policy
    is ready, and before anything is scored."""

    def __init__(self, names: Sequence[str], loaded: LiveReferences, args: MRPOConfig) -> None:
        super().__init__(names, loaded)
        self.impl = args.head_impl
        self.anchor: AdapterOffAnchor | None = None

    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, objective: Objective) -> CombinedReferences:
        live = self._live(
            1 if objective.name == "dpo" else len(self.names)
        )  # KD's labelled pairs need the anchor alone
        if 0 not in live:
            return combine(self._logps(examples, pairs, live), objective, self.impl)
        return self.scorer.combined(examples, pairs, live, objective)

    def logps(self, examples: Sequence[PairExample], pairs: TokenizedPairs) -> Tensor:
        return self._logps(examples, pairs, self._live(len(self.names)))

    def token_logps(self, examples: Sequence[PairExample]) -> list[Tensor]:
        """Raw log-probs [T_k] float32 of each reference's own tokens, example after example."""
        assert isinstance(self.scorer, SpreadScorer), "a sample is known to its own rank alone"
        live = self._live(len(self.names))
        others = self.scorer.score_tokens(examples, live) if live else []
        if 0 in live:
            return others
        assert self.anchor is not None
        return [self.anchor.score_tokens(examples), *others]

    def _live(self, count: int) -> list[int]:
        """Of the first ``count`` references, those that are not the policy."""
        return [k for k in self.live if k < count]

    def _logps(self, examples: Sequence[PairExample], pairs: TokenizedPairs, live: Sequence[int]) -> Tensor:
        others_KP2 = self.scorer.score(examples, pairs, live) if live else None
        if others_KP2 is not None and 0 in live:
            return others_KP2
        assert self.anchor is not None
        anchor_P2 = self.anchor.score(examples)
        return anchor_P2[None] if others_KP2 is None else torch.cat([anchor_P2[None], others_KP2])

    def admit(self, pairs: PairDataset) -> None:
        """Live references score any row."""

    def flush(self, *, refresh: bool = False) -> None:
        """No row waits."""


@dataclass(frozen=True)
class _Window:
    """This rank's pairs that are scored together, and what the cache has of them."""

    examples: Sequence[PairExample]
    pairs: TokenizedPairs
    rows: np.ndarray
    stored: Sequence[StoredScores]  #: of every reference
    which: Sequence[int]  #: references that must score them


class CachedScores(ReferenceScores):
    """Rows are read from the cache; the references that lacked some when this was opened score them, and they are kept.

    Args:
        stores: of each of the K references.
        tokenizations: of each reference, which of an example's tokenizations is its own.
    """

    def __init__(
        self,
        names: Sequence[str],
        loaded: LiveReferences,
        stores: Sequence[ReferenceStore],
        tokenizations: Sequence[int],
        args: MRPOConfig,
    ) -> None:
        super().__init__(names, loaded)
        self.stores, self.device, self.impl = stores, args.device, args.head_impl
        self._tokenizations = tokenizations
        self._writers = {k: PartWriter(stores[k]) for k in self.live}
        self._kept: tuple[_Window, HostCopy] | None = None

    def score(self, examples: Sequence[PairExample], pairs: TokenizedPairs, objective: Objective) -> CombinedReferences:
        window = self._look_up(examples, pairs)
        if len(window.which) < len(self.names):
            return combine(self._completed(window), objective, self.impl)
        combined = self.scorer.combined(examples, pairs, window.which, objective)
        self._keep(window, combined.ref_logps_KP2)
        return combined

    def logps(self, examples: Sequence[PairExample], pairs: TokenizedPairs) -> Tensor:
        return self._completed(self._look_up(examples, pairs))

    def admit(self, pairs: PairDataset) -> None:
        self.flush()
        keys = distinct(pairs.row_keys)
        with fail_together(world_group()):
            for store in self.stores:
                store.want(keys)
        missing = count_missing(self.stores, keys)
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
        if not self._writers:
            return
        self._write_kept()
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
        stored = [store.lookup(pairs.row_keys[rows]) for store in self.stores]
        incomplete = [int(not stored[k].found_N.all()) for k in self.live]
        incomplete = all_reduce_max(incomplete, world_group())
        return _Window(
            examples, pairs, rows, stored, [k for k, some in zip(self.live, incomplete, strict=True) if some]
        )

    def _completed(self, window: _Window) -> Tensor:
        """[K, P, 2] from the cache and, for the references that lack a row, scored anew and kept."""
        scored_KP2 = None
        if window.which:
            scored_KP2 = self.scorer.score(window.examples, window.pairs, window.which)
            self._keep(window, scored_KP2)
        logps_KP2 = send(torch.stack([torch.from_numpy(stored.logps_N2) for stored in window.stored]), self.device)
        if scored_KP2 is not None:
            for k, logps_P2 in zip(window.which, scored_KP2, strict=True):
                logps_KP2[k] = logps_P2
        return logps_KP2

    def _keep(self, window: _Window, scored_KP2: Tensor) -> None:
        """Hand rows that the cache lacks to its writers, once the next window is scored: a GPU's numbers are on their way to the
        host meanwhile. Collective over the world."""
        self._write_kept()
        self._kept = (window, HostCopy(scored_KP2))

    def _write_kept(self) -> None:
        """Collective over the world."""
        if self._kept is None:
            return
        (window, scored_KP2), self._kept = self._kept, None
        real = np.array([example.weight > 0 for example in window.examples], dtype=bool)
        with fail_together(world_group()):
            for k, logps_P2 in zip(window.which, scored_KP2.numpy(), strict=True):
                new = real & ~window.stored[k].found_N
                tokens_N2 = window.pairs.scored[window.rows[new], self._tokenizations[k]]
                self._writers[k].add(window.pairs.row_keys[window.rows[new]], logps_P2[new], tokens_N2)
