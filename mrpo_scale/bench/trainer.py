"""The trainer that is measured: MRPOTrainer itself, with a timer that stamps its phases and another arm for every step.

One policy engine serves all arms, with `learning_rate: 0`: forward, backward, clipping and Adam run in full, and every arm finds
the same weights. What differs between arms is what a trainer of that recipe would hold: reference scores, names, objective.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback

from mrpo_scale.base.device import peak_memory_gib, reset_peak_memory
from mrpo_scale.bench.arms import Arm, Step
from mrpo_scale.bench.clock import BenchClock, PhaseClock
from mrpo_scale.bench.communication import CollectiveCounter, busy_seconds, link_profiler
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.window import Draw, PairExample
from mrpo_scale.logps.flops import NO_WORK, UnitCosts, Work, forward_flops, training_flops, unit_costs, work_of_batch
from mrpo_scale.logps.layer_masks import body_of
from mrpo_scale.logps.micro_batches import MicroBatch, PeerBatch
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.objective import Objective
from mrpo_scale.references.live import Reference
from mrpo_scale.references.placement import Ranks
from mrpo_scale.references.scores import ReferenceScores, open_scores
from mrpo_scale.training.callbacks import ProgressLine
from mrpo_scale.training.prepare import PairSets, prepare_run, window_sampler
from mrpo_scale.training.trainer import MRPOTrainer


@dataclass
class Measured:
    """One step on one rank."""

    step: Step
    phases: dict[str, float] = field(default_factory=dict)  #: seconds
    rows: list[int] = field(default_factory=list)  #: trained with weight
    tokens: list[int] = field(default_factory=list)  #: of each micro-batch
    policy_flops: int = 0
    reference_flops: int = 0
    useful_flops: int = 0  #: without what is computed a second time to save memory


@dataclass
class Survey:
    """What is known of an arm from its untimed steps, on one rank."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    link_seconds: float = 0.0
    peak_memory_gib: float = 0.0


class BenchTrainer(MRPOTrainer):
    """Takes the steps of a plan.

    Args:
        arms: as :func:`~mrpo_scale.bench.arms.plan_arms` orders them.
        rounds: timed steps of each arm.
        plan_steps: (windows, the heaviest of them) -> the steps to take.

    Attributes:
        measured: of every timed step, in order.
        surveys: of every arm.
    """

    def __init__(
        self, *args: Any, arms: Sequence[Arm], rounds: int, plan_steps: Callable[[int, int], list[Step]], **kwargs: Any
    ) -> None:
        self._arms, self._rounds, self._plan_steps = arms, rounds, plan_steps
        self._scores_of: dict[Arm, ReferenceScores] = {}
        self._pool: dict[tuple[int, Ranks], Reference] = {}
        self._costs_of: dict[int, UnitCosts] = {}
        self._now: Measured | None = None
        self._guards = ExitStack()
        self.measured: list[Measured] = []
        self.surveys = {arm: Survey() for arm in arms}
        self.phases = PhaseClock(kwargs["args"].device)
        super().__init__(
            *args,
            prepare=partial(prepare_run, select_pairs=self._first_windows, open_scores=self._open_scores),
            clock=BenchClock(self.phases, self._keep),
            **kwargs,
        )
        for shows_steps in (PrinterCallback, ProgressLine):
            self.remove_callback(shows_steps)
        self.whole_run = self.run
        self._policy_costs: UnitCosts | None = None
        self._bar = tqdm(total=len(self.steps), unit="step", disable=self.args.process_index != 0)

    # ---- what is trained ---------------------------------------------------------------------------------------------

    def _first_windows(self, args: MRPOConfig, pair_sets: PairSets) -> PairSets:
        """The pairs of the first windows that training with this recipe would take: only those are scored for the cached arms."""
        pairs = pair_sets["train"]
        # How the policy lays pairs out is not known yet; it does not decide which of them share a window.
        windows = list(window_sampler(args, pairs, shared_prompt=True, end_to_end=True).windows())
        whole = [window for window in windows if not any(draw.filler for draw in window)] or windows
        drawn = whole[: self._rounds]
        rows = sorted({draw.row for window in drawn for draw in window})
        place = {row: i for i, row in enumerate(rows)}
        self.windows = [[draw._replace(row=place[draw.row]) for draw in window] for window in drawn]
        selected = pairs.select(rows)
        tokens_N = selected.lengths.sum((1, 2))
        weights = [int(tokens_N[[draw.row for draw in window]].sum()) for window in self.windows]
        self.steps = self._plan_steps(len(weights), weights.index(max(weights)))
        return {"train": selected}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Draw]:
        run = self.whole_run
        sampler = window_sampler(self.args, run.pair_sets["train"], run.shared_prompt, run.end_to_end)
        dealt = [sampler.arranged(window, sampler.deal(window)) for window in self.windows]
        return Listed([draw for step in self.steps for draw in dealt[step.window]])

    # ---- arms --------------------------------------------------------------------------------------------------------

    def _open_scores(self, plan: RunPlan, args: MRPOConfig, pair_sets: PairSets) -> ReferenceScores:
        """Those of the cached arms, most references first, because that one scores what the cache lacks; or of the first arm."""
        cached = [arm for arm in self._arms if arm.scoring == "cached"]
        for arm in [*cached[::-1], self._arms[0]]:
            if arm not in self._scores_of:
                self._open_arm(arm, plan, args, pair_sets)
        return self._scores_of[self._arms[0]]

    def _open_arm(self, arm: Arm, plan: RunPlan, args: MRPOConfig, pair_sets: PairSets) -> None:
        args = copy.copy(args)
        if arm.scoring == "cached":
            args.ref_scoring = "precompute"
        else:
            args.ref_scoring, args.ref_cache_dir, args.ref_placement = "live", None, arm.placement  # type: ignore[assignment]
        self._scores_of[arm] = open_scores(plan.first(arm.references), args, pair_sets, self._pool)

    def _turn_to(self, arm: Arm) -> None:
        """Be the trainer of this arm. Collective over the world where it loads references."""
        whole = self.whole_run
        if arm not in self._scores_of:
            self._open_arm(arm, whole.plan, self.args, whole.pair_sets)
        self.run = replace(
            whole,
            plan=whole.plan.first(arm.references),
            scores=self._scores_of[arm],
            objective=objective_of(arm, self.args),
        )

    def forget_arms(self) -> None:
        """Free all references."""
        for scores in self._scores_of.values():
            scores.references.clear()
        self._scores_of.clear()
        self._pool.clear()

    def resident_unused_gib(self) -> float:
        """Shards of references in memory that the present arm would not hold."""
        used = {id(reference) for reference in self.scores.references.values()}
        return sum(r.model.bytes_per_rank for r in self._pool.values() if id(r) not in used) / 2**30

    # ---- a step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[PairExample]], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch | PeerBatch]], Tensor]:
        step = self.steps[self.state.global_step]
        self._turn_to(step.arm)
        self._put_clocks()
        if self._policy_costs is None:
            self._policy_costs = unit_costs(self.policy)
        self._now = Measured(step)
        self._bar.set_description(step.arm.name if step.round >= 0 else f"warm-up ({step.kind}): {step.arm.name}")
        self._watch(step)
        if dist.is_initialized():
            dist.barrier()  # what one rank still had to do is not this step's time
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: MicroBatch | PeerBatch, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert self._now is not None and self._policy_costs is not None
        work = work_of_batch(inputs.pairs, self._policy_costs.attn_implementation)
        flops = training_flops(
            self._policy_costs,
            work,
            gradient_checkpointing=self.args.gradient_checkpointing,
            gradients_in_forward=self.args.gradients_in_forward,
        )
        self._now.policy_flops += flops.total
        self._now.useful_flops += flops.useful
        self._now.tokens.append(inputs.pairs.num_tokens)
        if isinstance(inputs, MicroBatch):
            self._now.rows += [row for row, weight in zip(inputs.rows, inputs.weights, strict=True) if weight]
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- clocks and counters -----------------------------------------------------------------------------------------

    def _put_clocks(self) -> None:
        """Where the trainer does not see a phase pass, and at whatever has not got one yet: the engine once, each reference when
        it appears."""
        clock = self.phases
        for reference in self.scores.references.values():
            if id(reference) not in self._costs_of:
                self._costs_of[id(reference)] = unit_costs(reference.model.model)
                reference.model.model.register_forward_pre_hook(self._count_reference(reference), with_kwargs=True)
        if "backward" not in vars(self.accelerator):
            self.accelerator.backward = clock.timed("backward", self.accelerator.backward)
            stepper: Any = self.deepspeed if self.deepspeed is not None else self.optimizer
            stepper.step = clock.timed("optimizer", stepper.step)
            # Before and after all other hooks, so that gathers of ZeRO-3 count as part of the forward that needs them.
            body = body_of(self.policy)
            body.register_forward_pre_hook(lambda *_: clock.enter("policy forward"), prepend=True)
            body.register_forward_hook(lambda *_: clock.leave())

    def _count_reference(self, reference: Reference) -> Callable[..., None]:
        costs = self._costs_of[id(reference)]

        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            work: Work = NO_WORK
            if "pairs" in kwargs:
                work = work_of_batch(kwargs["pairs"], costs.attn_implementation)
            if self._now is not None:
                flops = forward_flops(costs, work).total
                self._now.reference_flops += flops
                self._now.useful_flops += flops

        return count

    def _watch(self, step: Step) -> None:
        if step.kind == "count":
            self._counter = self._guards.enter_context(CollectiveCounter())
        elif step.kind == "profile":
            self._profiler = self._guards.enter_context(link_profiler(self.args.device))
        elif step.kind == "memory":
            reset_peak_memory()

    def _keep(self, phases: dict[str, float]) -> None:
        self._guards.close()
        now, self._now = self._now, None
        assert now is not None
        survey = self.surveys[now.step.arm]
        if now.step.kind == "count":
            survey.bytes, survey.calls = dict(self._counter.bytes), dict(self._counter.calls)
        elif now.step.kind == "profile":
            survey.link_seconds = busy_seconds(self._profiler)
        elif now.step.kind == "memory":
            survey.peak_memory_gib = peak_memory_gib(self.args.device) - self.resident_unused_gib()
        elif now.step.kind == "timed":
            now.phases = phases
            self.measured.append(now)
        self._bar.update()
        if len(self.measured) == self._rounds * len(self._arms):
            self._bar.close()


class Listed(Sampler[Draw]):
    """Rows in a given order."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return len(self.draws)

    def __iter__(self) -> Iterator[Draw]:
        return iter(self.draws)


def objective_of(arm: Arm, args: MRPOConfig) -> Objective:
    """What an arm minimises: DPO on the anchor, or the recipe's objective over K references."""
    args = copy.copy(args)
    args.objective = "dpo" if arm.references == 1 else args.objective
    return args.build_objective()
