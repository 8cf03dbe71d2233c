"""MRPOTrainer: transformers' Trainer with K references, exact means over the global window, and the fused head.

Callbacks, logging and the DeepSpeed integration are the Trainer's own. What a run is made of is prepare.py's, what a step does is
step.py's, what is saved saver.py's; checkpoints that are complete and resume exactly are those of lifecycle/resume.py. Here the
Trainer's hooks call them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    TrainOutput,
    denumpify_detensorize,
)

from mrpo_scale.base.device import peak_flops
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from mrpo_scale.base.ranks import get_rank, sum_of_ranks
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.data.inputs import file_name
from mrpo_scale.data.window import PairExample, WeightedPairs, WindowSampler, held_out_sampler
from mrpo_scale.lifecycle.fingerprint import fingerprint
from mrpo_scale.lifecycle.resume import ResumableTrainer
from mrpo_scale.logps.flops import active_parameters
from mrpo_scale.logps.micro_batches import MicroBatch, PeerBatch
from mrpo_scale.models.adapter import count_parameters, has_adapter
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.saving import cast_as_stored, share_weights
from mrpo_scale.objective import Objective
from mrpo_scale.references.scores import ReferenceScores
from mrpo_scale.reports.artifacts import write_artifacts
from mrpo_scale.reports.pictures import RunSummary
from mrpo_scale.reports.run_facts import RunFacts
from mrpo_scale.training.before_first_step import BeforeFirstStep
from mrpo_scale.training.callbacks import BeforeOptimizer, FlushScores, ProgressLine, StepClock
from mrpo_scale.training.facts import facts_of
from mrpo_scale.training.held_out import HeldOut
from mrpo_scale.training.prepare import PairSets, PreparedRun, prepare_run, window_sampler
from mrpo_scale.training.saver import PolicySaver
from mrpo_scale.training.step import LossOfBatch, StepSums, begin_with_policy, finish_window, optimizer_step

logger = logging.getLogger(__name__)


class MRPOTrainer(ResumableTrainer):
    """Finetune ``model`` on preference pairs against its own starting weights and ``ref_models``.

    Args:
        model: hub id, folder, or a loaded causal LM.
        ref_models: references 1..K-1, as names or mappings (see ``ref_models`` in config/keys.py). None: plain DPO.
        args: an :class:`MRPOConfig`; default ``MRPOConfig()``.
        train_dataset, eval_dataset: rows of any supported layout, as a Dataset or a list of dicts; ``eval_dataset`` may be a
            mapping of names to sets, ``train_dataset`` a DatasetDict with ``train`` and, to evaluate on, ``test``.
        processing_class: the policy's tokenizer; read from ``model`` when that is a name.
        compute_metrics: called after every evaluation with an EvalPrediction of ``predictions`` [N, 2], the policy's log-probs of
            the chosen and the rejected responses, and ``label_ids`` [N, K, 2], the references', both in the set's order. What it
            returns is logged beside the other metrics and may be `metric_for_best_model`.
        script: the recipe that the run was started from, for its card and report.
        stop_folder: where STOP is looked for; default the run's folder.
        prepare, clock: what a benchmark replaces: :func:`~mrpo_scale.training.prepare.prepare_run`, and the timer of the phases.
        **kwargs: what Trainer takes: callbacks, optimizers, optimizer_cls_and_kwargs. What needs logits, which are never formed, or
            another loss is refused by name.

    Raises:
        ConfigError: before any weights load, when models, data and keys do not fit together.
    """

    args: MRPOConfig
    _begin_evaluation: Callable[[], None] | None = None  #: what is done before the first batch of one
    _loss_of_batch: LossOfBatch | None = None
    _grad_norm: Tensor | float | None = None  #: of the last step, read or not yet

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_models: Sequence[str | Mapping[str, Any]] | None = (),
        args: MRPOConfig | None = None,
        train_dataset: datasets.Dataset | datasets.DatasetDict | list[dict[str, Any]] | None = None,
        eval_dataset: datasets.Dataset | Mapping[str, Any] | list[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        script: ScriptArguments | None = None,
        stop_folder: Path | None = None,
        prepare: Callable[..., PreparedRun] = prepare_run,
        clock: StepClock | None = None,
        **kwargs: Any,
    ) -> None:
        run = prepare(model, ref_models, args, train_dataset, eval_dataset, processing_class, kwargs)
        self.run, self.script = run, script
        self.comparison: list[RunSummary] = []
        super().__init__(
            model=run.policy,
            args=run.args,
            data_collator=list,
            train_dataset=run.train,
            eval_dataset=run.evals,
            processing_class=run.plan.tokenizer,
            stop_folder=stop_folder,
            **kwargs,
        )
        # The loss of a micro-batch is already its share of the global window's mean.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.clock = clock or StepClock()
        self._sums, self._held_out, self._saver = StepSums(), HeldOut(run), PolicySaver(run)
        self._policy_checked = self._save_as_source = False
        self._best_results: dict[str, float] = {}
        before = BeforeFirstStep(self._saver), BeforeOptimizer(self.finish_window)
        for callback in (self.clock, FlushScores(run.scores), *before):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine)

    # ---- what the run is made of -------------------------------------------------------------------------------------

    @property
    def plan(self) -> RunPlan:
        return self.run.plan

    @property
    def pair_sets(self) -> PairSets:
        return self.run.pair_sets

    @property
    def scores(self) -> ReferenceScores:
        return self.run.scores

    @property
    def preference_objective(self) -> Objective:
        return self.run.objective

    @property
    def policy(self) -> PreTrainedModel:
        return self.run.policy

    @property
    def window_size(self) -> int:
        """Pairs per optimizer step over all ranks."""
        return self.args.window_size

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's, with a heartbeat: a rank that is gone ends the others within ``heartbeat_timeout`` and names itself."""
        with heartbeat(self.args.heartbeat_timeout):
            return super().train(*args, **kwargs)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.train_sampler = window_sampler(self.args, dataset.pairs, self.run.shared_prompt, self.run.end_to_end)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> WindowSampler:
        return held_out_sampler(eval_dataset.pairs, self.args.world_size, self.args.eval_batch_size)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[PairExample]], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch | PeerBatch]], Tensor]:
        """Begin :func:`optimizer_step`: this rank's share of the next window, and the number of pairs in the whole window.

        The Trainer takes ``num_batches`` turns to a step, however many micro-batches it has: each turn gets a part of them in their
        order, the last one at least the last.
        """
        self._check_policy(self.model_wrapped)
        batches, num_pairs, self._loss_of_batch = optimizer_step(
            self.run, epoch_iterator, num_batches, self.state.global_step + 1, self._sums, self.clock
        )
        ends = [len(batches) * turn // num_batches for turn in range(num_batches + 1)]
        return [batches[start:end] for start, end in itertools.pairwise(ends)], num_pairs

    def training_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Sequence[MicroBatch | PeerBatch],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one turn's micro-batches. Gradients meet, and DeepSpeed steps, after the window's last."""
        loss = torch.zeros((), device=self.args.device)
        state, sync = self.accelerator.gradient_state, self.accelerator.sync_gradients
        for left, batch in zip(reversed(range(len(inputs))), inputs, strict=True):
            state._set_sync_gradients(sync and not left)
            with self.accelerator.no_sync(model) if left else nullcontext():
                loss += super().training_step(model, batch, num_items_in_batch)  # type: ignore[arg-type]
        return loss

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: MicroBatch | PeerBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the window's mean loss, as the step of ``get_batch_samples`` computes it."""
        assert self._loss_of_batch is not None
        return self._loss_of_batch(model, inputs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self.clock.phase("optimizer"):
            return self._get_grad_norm(model) if self.is_deepspeed_enabled else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The Trainer's, left on the device: it is read with the window."""
        if grad_norm is None or not isinstance(grad_norm, Tensor):
            engine = self.is_deepspeed_enabled  # it has clipped, and stepped
            grad_norm = model.get_global_grad_norm() if engine else super()._get_grad_norm(model, grad_norm)
        self._grad_norm = grad_norm
        return grad_norm

    def finish_window(self) -> None:
        """See :func:`~mrpo_scale.training.step.finish_window`; called before the optimizer moves."""
        norm = self._grad_norm if isinstance(self._grad_norm, Tensor) else None
        number = finish_window(self.run, self._sums, norm)
        self._grad_norm = self._grad_norm if number is None else number

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        with self.clock.phase("logging"):
            if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
                self._log_steps()
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    def _log_steps(self) -> None:
        """The Trainer's log of the steps since the last one, of numbers that :meth:`finish_window` has read."""
        loss = self._sums.metrics.totals["_loss"]
        logs = {"loss": loss / (self.state.global_step - self._globalstep_last_logged)}
        if self._grad_norm is not None:
            logs["grad_norm"] = float(self._grad_norm)
        logs["learning_rate"] = self._get_learning_rate()
        self._tr_loss.zero_()
        self._total_loss_scalar += loss
        self._globalstep_last_logged = self.state.global_step
        self.store_flos()
        self.log(logs)

    def store_flos(self) -> None:
        """The Trainer's, between hosts."""
        self.state.total_flos += sum_of_ranks(float(self.current_flos))
        self.current_flos = 0

    def _check_policy(self, model: nn.Module) -> None:
        if not self._policy_checked:
            self._policy_checked = True
            begin_with_policy(self.run, model, self.accelerator.device)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # tensors are on the device, and DeepSpeed's cast of floats to bf16 would round log-probs

    def floating_point_ops(self, inputs: Any) -> int:
        """Of one turn's micro-batches."""
        tokens = sum(batch.pairs.num_tokens for batch in inputs if isinstance(batch, MicroBatch | PeerBatch))
        return self.flops_per_token * tokens

    def _track_num_input_tokens(self, inputs: Sequence[MicroBatch | PeerBatch]) -> None:
        """`include_num_input_tokens_seen`: positions that the policy computes, or those of them that hold a token of a pair."""
        how = self.args.include_num_input_tokens_seen
        if how == "no":
            return
        tokens = sum(b.pairs.num_positions if how == "all" else b.num_pair_tokens for b in inputs)
        self.state.num_input_tokens_seen += int(sum_of_ranks(tokens))

    @property
    def num_parameters(self) -> int:
        """Of the policy, whole."""
        return sum(count_parameters(self.policy))

    @property
    def flops_per_token(self) -> int:
        """Of products with weights that a token meets: 2 forward, 2 for the inputs' gradients and, of those that train, 2 for their
        own. Of frozen weights in 4 bits it counts half."""
        active = active_parameters(self.policy)
        return 6 * active if not has_adapter(self.policy) else 4 * active + 2 * count_parameters(self.policy)[1]

    # ---- what a checkpoint needs -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return fingerprint(self.plan, self.args, self.pair_sets, self.window_size)

    def summed(self) -> dict[str, float]:
        return {name: total if get_rank() == 0 else 0.0 for name, total in self._sums.metrics.totals.items()}

    def restore_summed(self, sums: Mapping[str, float], loss: float) -> None:
        self._sums.metrics.totals = {"_loss": loss, **sums} if sums else {}

    def before_checkpoint(self) -> None:
        """Scores reach the disk first: a run that resumes here must find them, or it would score their rows in other windows."""
        self.scores.flush()

    # ---- what is saved -----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy as its source was: key names, ties, dtypes, config, tokenizer. Checkpoints, which have a folder of
        their own, keep the dtype that training resumes in."""
        set_activity(f"saving {output_dir or self.args.output_dir}")
        self._save_as_source = not _internal_call or output_dir is None
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.folder)
        if self.args.should_save and state_dict is not None and not state_dict:
            # The Trainer does this where an engine does not give its weights away, and only warns.
            raise TrainingError(
                f"{folder}: DeepSpeed gives no whole weights to save; take a file of ds_configs/ instead."
            )
        # An adapter is written as peft writes it; its base is the source, which nobody changed.
        as_source = self._save_as_source and self.args.should_save and not self.args.use_peft
        if as_source:
            state = self.policy.state_dict() if state_dict is None else state_dict
            state_dict = cast_as_stored(state, self._saver.source_files().dtypes)
        with self._saver.original_settings():
            super()._save(output_dir, state_dict)
        if as_source:
            share_weights(folder)
            self._saver.source_files().write(folder)

    def compare_with(self, rows: Sequence[RunSummary]) -> None:
        """Show ``rows`` on the card and the report: other runs', this run's last."""
        self.comparison = list(rows)

    def facts(self) -> RunFacts:
        """What the reports say of the run so far."""
        return facts_of(
            self.run,
            self.state,
            self.script,
            results=self.results,
            best_step=self.measured_best(),
            comparison=self.comparison,
        )

    def create_model_card(self, *, model_name: str | None = None, **metadata: Any) -> None:  # type: ignore[override]
        """README.md, curves, report.html and what they are made from, in ``output_dir``. ``push_to_hub`` calls this before it
        uploads, so that the card on the hub is this one and not transformers' draft.

        Args:
            metadata: license, language, tags, ... of the front matter; ``dataset`` names rows that came from Python.
        """
        if self.is_world_process_zero():
            self.state.save_to_json(str(self.args.folder / TRAINER_STATE_NAME))
            write_artifacts(self.facts(), metadata)

    # ---- what is measured --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log; called on every rank."""
        if "loss" in logs and self._sums.metrics:
            logs.update(self._sums.metrics.means())
            logs.update(self._speed())
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        tokens = sum_of_ranks(self._sums.tokens)
        self._sums.tokens = 0
        speed = self.clock.speed_since_last_log(tokens)
        if peak := peak_flops(self.args.device):
            used = self.flops_per_token * speed["tokens_per_second"]
            speed["mfu"] = used / (peak * self.accelerator.num_processes)
        return speed

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's ``evaluate``, which also takes rows of any supported layout.

        Args:
            eval_dataset: the name of a set of the run; rows, or a mapping of names to rows, which are tokenized and scored as the
                run's own are. What they give is returned and shown on dashboards; log, card and files of the run stay its own.

        Raises:
            ConfigError: rows that cannot be used, or that a reference would have to score which was not loaded.
        """
        pairs, entries = self._held_out.as_pairs(eval_dataset, self.eval_dataset), len(self.state.log_history)
        metrics = super().evaluate(pairs, ignore_keys, metric_key_prefix)
        if isinstance(pairs, WeightedPairs) and not self._held_out.owns(pairs):
            del self.state.log_history[entries:]
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Log-probs of rows of any supported layout, in their order without those that were left out (`bad_rows_*.jsonl`).

        Returns:
            ``predictions`` [N, 2], the policy's log-probs of the chosen and the rejected responses; ``label_ids`` [N, K, 2], the
            references', the anchor's first; ``metrics`` as ``evaluate`` gives them.

        Raises:
            ConfigError: see :meth:`evaluate`.
        """
        pairs = self._held_out.as_pairs(test_dataset, self.eval_dataset)
        return super().predict(pairs, ignore_keys, metric_key_prefix)

    @property
    def results(self) -> Mapping[str, float]:
        """Metrics of the held-out set for the weights that are saved: the last ones, or with `load_best_model_at_end` the best
        step's."""
        last = [entry for entry in self.state.log_history if "eval_loss" in entry][-1:]
        return self._best_results or (last[0] if last else {})

    def measured_best(self) -> int | None:
        """The step that :attr:`results` are of, where that is not the last one that was evaluated."""
        return self.state.best_global_step if self._best_results else None

    def _load_best_model(self) -> None:
        """The Trainer's, and what is reported from then on is measured on these weights. The log keeps its order of steps."""
        super()._load_best_model()
        entries, step = len(self.state.log_history), self.state.global_step
        logger.info("measuring the weights of step %s, the best, which are saved", self.state.best_global_step)
        self.state.global_step = int(self.state.best_global_step or step)
        try:
            self._best_results = self.evaluate()
        finally:
            self.state.global_step = step
        del self.state.log_history[entries:]

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; the held-out pairs are scored by the references before the first one and the scores kept."""
        set_activity(f"evaluating after step {self.state.global_step}")
        prefix = kwargs.get("metric_key_prefix", "eval")
        # A loader draws a number; training must not notice how often it was evaluated.
        with torch.random.fork_rng(devices=()):
            show = not self.args.disable_tqdm and self.is_local_process_zero()
            self._begin_evaluation = partial(self._held_out.begin, dataloader, self.poll, show=show)
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        # Beside the run's other results, for comparisons pair by pair.
        file = self.args.folder / f"{file_name(prefix)}_logps.npz"
        means, held_out = self._held_out.finish(file if self.is_world_process_zero() else None)
        logps_N2, ref_logps_NK2 = held_out.policy_logps_N2, held_out.ref_logps_KN2.swapaxes(0, 1)
        if self.compute_metrics is not None:
            means |= denumpify_detensorize(self.compute_metrics(EvalPrediction(logps_N2, ref_logps_NK2)))
        metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": x for name, x in means.items()}
        metrics = {**(output.metrics or {}), **metrics}
        return output._replace(metrics=metrics, predictions=logps_N2, label_ids=ref_logps_NK2)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Measure one batch of held-out pairs; the metrics are summed here, not gathered by the Trainer."""
        self.poll()
        self._check_policy(model)  # where nothing was trained before
        if self._begin_evaluation is not None:  # with the policy in its engine, since it may be one of the references
            self._begin_evaluation()
            self._begin_evaluation = None
        with torch.no_grad(), self.compute_loss_context_manager():
            self._held_out.measure(model, inputs)
        return None, None, None
