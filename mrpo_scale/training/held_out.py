"""What every model of a run says of every held-out pair, on disk: comparisons between runs are paired, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import nn
from tqdm.auto import tqdm

from mrpo_scale.base.device import HostCopy
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.hash_keys import find, sort_order
from mrpo_scale.base.ranks import all_gather_object, world_group
from mrpo_scale.data.inputs import as_datasets, prepare_set
from mrpo_scale.data.window import PairExample, WeightedPairs
from mrpo_scale.logps.micro_batches import MicroBatch, PeerBatch
from mrpo_scale.logps.pair_forward import score_pairs
from mrpo_scale.objective import loss_against
from mrpo_scale.training.metrics import MetricSums, pair_metrics
from mrpo_scale.training.prepare import PreparedRun
from mrpo_scale.training.step import micro_batches


@dataclass(frozen=True)
class HeldOutScores:
    """Log-probs of N held-out pairs, sorted by key; the last axis is (chosen, rejected)."""

    names: Sequence[str]  #: of the K references that the run loaded, the anchor's first
    row_keys: np.ndarray  #: [N] S16, see tokenization.row_key
    policy_logps_N2: np.ndarray
    ref_logps_KN2: np.ndarray

    @classmethod
    def joined(cls, pieces: Sequence[HeldOutScores]) -> HeldOutScores:
        keys = np.concatenate([piece.row_keys for piece in pieces])
        order = sort_order(keys)
        return cls(
            pieces[0].names,
            keys[order],
            np.concatenate([piece.policy_logps_N2 for piece in pieces])[order],
            np.concatenate([piece.ref_logps_KN2 for piece in pieces], axis=1)[:, order],
        )

    def select(self, row_keys: np.ndarray) -> HeldOutScores:
        """The pairs with these keys, in their order. All of them must be here."""
        at, _ = find(self.row_keys, row_keys)
        return replace(
            self,
            row_keys=self.row_keys[at],
            policy_logps_N2=self.policy_logps_N2[at],
            ref_logps_KN2=self.ref_logps_KN2[:, at],
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            names=np.array(list(self.names)),
            row_keys=self.row_keys,
            policy_logps=self.policy_logps_N2,
            ref_logps=self.ref_logps_KN2,
        )

    @classmethod
    def load(cls, path: Path) -> HeldOutScores:
        """Raises OSError or ValueError where the file is missing or damaged."""
        with np.load(path) as arrays:
            return cls(arrays["names"].tolist(), arrays["row_keys"], arrays["policy_logps"], arrays["ref_logps"])


class HeldOut:
    """Held-out sets of a run: their virtual references, formed once and kept, and what is measured in one evaluation.

    Args:
        run: of it the scores and the objective form the references, and the names go into the files.

    A set is looked up by the object that it is: of sets that are evaluated once, such as rows from Python, nothing is kept.
    """

    def __init__(self, run: PreparedRun) -> None:
        self.run = run
        self._own = run.held_out
        self._kept: dict[WeightedPairs, dict[int, CombinedReferences]] = {}
        self._references: dict[int, CombinedReferences] = {}
        self._set: WeightedPairs | None = None  #: that is measured
        self._sums = MetricSums()
        self._rows: list[tuple[MicroBatch, HostCopy]] = []  #: measured, and the log-probs of policy and references

    def owns(self, pairs: WeightedPairs) -> bool:
        """Whether the set is one of the run's own, of which its log, card and files speak."""
        return pairs in self._own

    def as_pairs(self, rows: Any, known: Any) -> Any:
        """Rows of any supported layout as pairs that the policy and every reference can score; what are pairs already, or the name
        of such among the run's ``known`` sets, as they are. Collective over the world.

        Raises:
            ConfigError: no set of that name, or none at all; rows that are of no use, or that a reference which was not loaded
                would have to score.
        """
        if isinstance(rows, dict):
            return {name: self.as_pairs(some, known) for name, some in rows.items()}
        names = known if isinstance(known, dict) else {}
        if isinstance(rows, str) and rows not in names:
            raise ConfigError(
                f"`eval_dataset: {rows}`: the run has no set of this name; it has {', '.join(names) or 'none'}."
            )
        if rows is None and not known:
            raise ConfigError(
                "there are no held-out pairs to evaluate on; pass rows to this call, or `eval_dataset` to the trainer (in a recipe "
                "`dataset_test_split` or `held_out`)."
            )
        if rows is None or isinstance(rows, str | WeightedPairs):
            return rows
        pairs = prepare_set(self.run.plan, self.run.args, "extra", as_datasets(None, rows)[1])
        self.run.scores.admit(pairs)
        return WeightedPairs(pairs)

    def begin(self, loader: Any, poll: Callable[[], None], *, show: bool) -> None:
        """Score the set of ``loader``, where that has not been done, and start to measure it. Collective over the world.

        Args:
            poll: called before each batch.
            show: a progress bar.
        """
        self._set, self._sums, self._rows = loader.dataset, MetricSums(), []
        if loader.dataset in self._kept:
            self._references = self._kept[loader.dataset]
        else:
            self._references = self._score(loader, poll, show)

    def _score(self, loader: Any, poll: Callable[[], None], show: bool) -> dict[int, CombinedReferences]:
        """Row -> its virtual reference, for this rank's rows of the set."""
        run, references = self.run, dict[int, CombinedReferences]()
        title = f"Scoring held-out pairs with {len(run.plan.names)} references"
        for examples in tqdm(loader, desc=title, disable=not show):
            poll()
            combined = run.scores.score(examples, loader.dataset.pairs, run.objective)
            references.update({e.row: combined[i : i + 1] for i, e in enumerate(examples)})
        run.scores.flush()
        if self.owns(loader.dataset):
            self._kept[loader.dataset] = references
        return references

    def measure(self, model: nn.Module, examples: Sequence[PairExample]) -> None:
        """The policy's loss and metrics on one batch of the set, added to those of this evaluation."""
        run = self.run
        references = CombinedReferences.joined([self._references[e.row] for e in examples])
        for batch in micro_batches(run, examples, references):
            logps_P2 = score_pairs(model, batch.pairs)
            if isinstance(batch, PeerBatch):
                continue
            loss = loss_against(logps_P2, batch.references, run.objective, batch.pairs.response_lengths)
            metrics = pair_metrics(logps_P2, batch.references, loss, run.objective, run.plan.names)
            self._sums.add({"loss": loss.losses_P, **metrics}, batch.weight_P)
            self._rows.append((batch, HostCopy(torch.stack([logps_P2, *batch.references.ref_logps_KP2]).float())))

    def _scores_of(self, batch: MicroBatch, copy: HostCopy) -> HeldOutScores:
        assert self._set is not None
        real = np.array(batch.weights) > 0
        policy_logps_P2, *ref_logps_KP2 = copy.numpy()
        keys = self._set.pairs.row_keys[list(batch.rows)]
        names = self.run.plan.names[: len(ref_logps_KP2)]  # KD's and RLHF's pairs are scored by the anchor alone
        return HeldOutScores(names, keys[real], policy_logps_P2[real], np.stack(ref_logps_KP2)[:, real])

    def finish(self, file: Path | None) -> tuple[dict[str, float], HeldOutScores]:
        """Means of the metrics over all pairs, and what every model says of every pair, in the set's order. Collective.

        Args:
            file: where that is written, sorted by key, if the set is one of the run's own; None on all ranks but one.
        """
        assert self._set is not None
        means = self._sums.means()
        mine = [self._scores_of(*row) for row in self._rows]
        everybody = [rows for some in all_gather_object(mine, world_group()) for rows in some]
        scores = HeldOutScores.joined(everybody)
        if file is not None and self.owns(self._set):
            scores.save(file)
        self._rows = []
        return means, scores.select(self._set.pairs.row_keys)
