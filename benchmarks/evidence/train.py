"""One run: a policy from its starting weights, trained on a seed's pairs against combined references, and what it then says of
every held-out pair.

The objective, the pairs' layout, the order of windows and the fused head are the trainer's own; what is left out is what a
trainer does beside training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor
from transformers import get_scheduler

from benchmarks.evidence.study import EPOCHS, WINDOW
from benchmarks.evidence.upper import UpperLayers
from benchmarks.evidence.world import World
from mrpo_scale.data.dealing import WindowShape
from mrpo_scale.data.window import WindowSampler
from mrpo_scale.logps.pair_batch import PairBatch
from mrpo_scale.logps.pair_forward import preference_step, score_pairs
from mrpo_scale.objective import Objective, loss_against

SCORED_TOGETHER = 32


@dataclass(frozen=True)
class Trained:
    losses: list[float]  #: of each step
    cpu_seconds: float


class Runner:
    """Trains one policy again and again from the weights that it has now."""

    def __init__(self, world: World, *, bf16: bool = False) -> None:
        assert world.policy is not None
        self.world, self.upper, self.bf16 = world, world.policy, bf16
        self._start = [p.detach().clone() for p in self.upper.trained]

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def reset(self) -> None:
        with torch.no_grad():
            for parameter, start in zip(self.upper.trained, self._start, strict=True):
                parameter.copy_(start)

    def train(
        self,
        rows: Sequence[int],
        references: CombinedReferences,
        objective: Objective,
        *,
        seed: int,
        learning_rate: float,
        epochs: int = EPOCHS,
    ) -> Trained:
        """From the starting weights. ``references``: of all of the world's pairs; ``rows``: those that are trained on."""
        self.reset()
        rows, began = np.asarray(rows), time.process_time()
        sampler = WindowSampler(self.world.lengths[rows], WindowShape(1, WINDOW), shuffle=True, seed=seed)
        optimizer = torch.optim.AdamW(self.upper.trained, lr=learning_rate, weight_decay=0.0)
        steps = epochs * len(sampler) // WINDOW
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
        losses = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for window in sampler.windows():
                chosen = [int(rows[draw.row]) for draw in window if not draw.filler]
                losses.append(self._step(chosen, references, objective))
                torch.nn.utils.clip_grad_norm_(self.upper.trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return Trained(losses, time.process_time() - began)

    def _step(self, rows: Sequence[int], references: CombinedReferences, objective: Objective) -> float:
        batch = self._batch(self.upper, rows)
        here, lengths_P2 = references[torch.tensor(rows)], batch.response_lengths

        def loss_of_pairs(logps_C2: Tensor, pairs: slice) -> Tensor:
            return loss_against(logps_C2, here[pairs], objective, lengths_P2[pairs]).losses_P / len(rows)

        with self._precision():
            scored, _ = preference_step(self.upper.policy, batch, loss_of_pairs)
        scored.loss.backward()
        return scored.loss.item()

    def _batch(self, upper: UpperLayers, rows: Sequence[int]) -> PairBatch:
        return upper.batch(rows, [self.world.pairs.tokens(row)[0] for row in rows])

    @torch.no_grad()
    def score(self, rows: Sequence[int]) -> Tensor:
        """The policy's log-probs [n, 2] of ``rows``, in their order, in the precision that it trains in."""
        rows = np.asarray(rows)
        order = np.argsort(self.world.lengths[rows], kind="stable")
        logps_N2 = torch.empty(len(rows), 2)
        for start in range(0, len(order), SCORED_TOGETHER):
            some = order[start : start + SCORED_TOGETHER]
            with self._precision():
                logps_N2[torch.from_numpy(some)] = score_pairs(
                    self.upper.policy, self._batch(self.upper, [int(r) for r in rows[some]])
                )
        return logps_N2


def training_rows(world: World, seed: int, count: int) -> np.ndarray:
    """The pairs that a seed trains on: ``count`` of the pool, the same for all methods."""
    pool = world.rows("pool")
    return np.sort(np.random.default_rng(seed).choice(pool, min(count, len(pool)), replace=False))
