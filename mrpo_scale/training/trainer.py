"""MRPOTrainer: transformers' Trainer with K references, exact means over the global window, and the fused head.

Callbacks, logging and the DeepSpeed integration are the Trainer's own; checkpoints that are complete and resume exactly are in
resume.py. Overridden are the rooms where a step happens: what a window is (samplers, ``get_batch_samples``), what its loss is
(``compute_loss``) and what is measured.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from mrpo_kernels import CombinedReferences
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    PredictionOutput,
    TrainOutput,
    denumpify_detensorize,
)

from mrpo_scale.base.device import map_blocks_from, peak_flops
from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.base.heartbeat import heartbeat, set_activity
from mrpo_scale.base.ranks import all_gather_object, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.data.inputs import (
    EVAL_SET,
    TRAIN_SET,
    WEIGHTS_SET,
    as_datasets,
    check_steps,
    evaluation_split,
    file_name,
    prepare_set,
    prepare_sets,
)
from mrpo_scale.data.tokenization import PairDataset
from mrpo_scale.data.window import PairExample, WeightedPairs, WindowSampler
from mrpo_scale.lifecycle.fingerprint import fingerprint
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.resume import ResumableTrainer
from mrpo_scale.lifecycle.template_date import decide_date, record_date
from mrpo_scale.logps.micro_batches import MicroBatch, policy_batches
from mrpo_scale.logps.pair_forward import (
    choose_end_to_end,
    choose_shared_prompt,
    enable_pair_scoring,
    preference_step,
    score_pairs,
)
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.models.plan import disable_dropout, load_policy, original_dropout, plan_models
from mrpo_scale.models.saving import (
    SourceFiles,
    cast_as_stored,
    check_small_files,
    read_source_files,
    share_weights,
    unvalidated_generation_config,
)
from mrpo_scale.objective import loss_against
from mrpo_scale.references.scores import ReferenceScores
from mrpo_scale.references.validation_weights import with_validation_weights
from mrpo_scale.reports.artifacts import write_artifacts
from mrpo_scale.reports.pictures import RunSummary
from mrpo_scale.training.arguments import check_arguments
from mrpo_scale.training.before_first_step import BeforeFirstStep, check_optimizer, check_trainer_arguments
from mrpo_scale.training.callbacks import FlushScores, ProgressLine, StepClock
from mrpo_scale.training.held_out import HeldOutScores
from mrpo_scale.training.metrics import MetricSums, pair_metrics
from mrpo_scale.training.preflight import check_best_metric

logger = logging.getLogger(__name__)


def window_sampler(args: MRPOConfig, num_rows: int) -> WindowSampler:
    """The order in which a run with these arguments trains its rows."""
    return WindowSampler(
        num_rows,
        args.window_size,
        shuffle=getattr(args, "train_sampling_strategy", "random") == "random",
        seed=args.data_seed if args.data_seed is not None else args.seed,
        drop_last=args.dataloader_drop_last,
    )


class MRPOTrainer(ResumableTrainer):
    """Finetune ``model`` on preference pairs against its own starting weights and ``ref_models``.

    Args:
        model: hub id, folder, or a loaded causal LM.
        ref_models: references 1..K-1, as names or mappings (see ``ref_models`` in config.py). None: plain DPO.
        args: an :class:`MRPOConfig`; default ``MRPOConfig()``.
        train_dataset, eval_dataset: rows of any supported layout, as a Dataset or a list of dicts; ``eval_dataset`` may be a
            mapping of names to sets, ``train_dataset`` a DatasetDict with ``train`` and, to evaluate on, ``test``.
        processing_class: the policy's tokenizer; read from ``model`` when that is a name.
        compute_metrics: called after every evaluation with an EvalPrediction of ``predictions`` [N, 2], the policy's log-probs of
            the chosen and the rejected responses, and ``label_ids`` [N, K, 2], the references', both in the set's order. What it
            returns is logged beside the other metrics and may be `metric_for_best_model`.
        **kwargs: what Trainer takes: callbacks, optimizers, optimizer_cls_and_kwargs. What needs logits, which are never formed, or
            another loss is refused by name.

    Raises:
        ConfigError: before any weights load, when models, data and keys do not fit together.
    """

    args: MRPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_models: Sequence[str | Mapping[str, Any]] | None = (),
        args: MRPOConfig | None = None,
        train_dataset: datasets.Dataset | datasets.DatasetDict | list[dict[str, Any]] | None = None,
        eval_dataset: datasets.Dataset | Mapping[str, Any] | list[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataset, eval_dataset = as_datasets(train_dataset, eval_dataset)
        ref_models, args = check_arguments(model, ref_models, args, eval_dataset, kwargs)
        check_trainer_arguments(kwargs)
        set_activity("preparing the pairs")
        check_output_folder(args, model, ref_models)
        decide_date(args)  # the same for all models and ranks
        self.plan = plan_models(model, ref_models, args, processing_class)
        record_date(args, self.plan.dated, run=args.folder)
        check_small_files(Path(self.plan.policy.path))
        self.pair_sets = self._prepare_sets(args, train_dataset, eval_dataset)
        if TRAIN_SET in self.pair_sets:
            check_steps(args, len(self.pair_sets[TRAIN_SET]), args.window_size)
        if args.objective == "dpo" and ref_models:
            logger.info(
                "objective dpo: the anchor alone is used, the %d other references are not loaded; their tokenizers decide which "
                "pairs every model can score, so that runs compare",
                len(ref_models),
            )
            self.plan = self.plan.first(1)
        if kwargs.get("compute_metrics") is None:  # whose names nobody knows
            check_best_metric(args, self.plan.names, eval_dataset if isinstance(eval_dataset, dict) else ())
        weighted = {split: WeightedPairs(pairs) for split, pairs in self.pair_sets.items()}
        #: Those of the run; its log, card and files speak of no others.
        self._own_evals = [pairs for split, pairs in weighted.items() if split not in (TRAIN_SET, WEIGHTS_SET)]
        evals: Any = weighted.get(EVAL_SET)
        if isinstance(eval_dataset, dict):
            splits = {name: evaluation_split(name) for name in eval_dataset}
            evals = {name: weighted[split] for name, split in splits.items() if split in weighted}

        if args.device.type == "cpu" and args.world_size == 1:
            map_blocks_from(4 << 20)  # docs/performance.md: what each threshold costs in memory and time
        # Before the policy: what is scored ahead of training has the memory to itself.
        self.scores = self._open_scores(args)
        self.preference_objective = with_validation_weights(args, self.scores, self.pair_sets)
        set_activity("loading the policy")
        policy = load_policy(self.plan.policy) if isinstance(model, str) else model
        self._source_use_cache = getattr(policy.config, "use_cache", None)  # of a wrapper the text config has it
        check_optimizer(kwargs, policy)
        enable_pair_scoring(policy, "policy", args.head_impl)
        self._dropouts = disable_dropout(policy) if args.disable_dropout else []
        self.policy = policy
        super().__init__(
            model=policy,
            args=args,
            data_collator=list,
            train_dataset=weighted.get(TRAIN_SET),
            eval_dataset=evals,
            processing_class=self.plan.tokenizer,
            **kwargs,
        )
        # The loss of a micro-batch is already its share of the global window's mean.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.shared_prompt = choose_shared_prompt(args.shared_prompt, policy.config, "policy")
        self.end_to_end = choose_end_to_end(policy, args.device, compiled=bool(args.torch_compile))
        self.pad_token_id = self.plan.references[0].pad_token_id
        self.clock = StepClock()
        self.add_callback(self.clock)
        self.add_callback(FlushScores(self.scores))
        self.add_callback(BeforeFirstStep(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine)
        self._metrics, self._eval_metrics = MetricSums(), MetricSums()
        self._tokens = 0
        self._held_out_scores: dict[WeightedPairs, dict[int, CombinedReferences]] = {}
        self._eval_scores: dict[int, CombinedReferences] = {}
        self._eval_rows: list[HeldOutScores] = []
        self._policy_checked = False
        self._save_as_source = False
        self._tokenizer_of_source = processing_class is None
        self._source_files: SourceFiles | None = None
        self._best_results: dict[str, float] = {}
        # For the model card, where the caller knows more than the trainer: a recipe, and other runs to compare with.
        self.script: ScriptArguments | None = None
        self.comparison: list[RunSummary] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's, with a heartbeat: a rank that is gone ends the others within ``heartbeat_timeout`` and names itself."""
        with heartbeat(self.args.heartbeat_timeout):
            return super().train(*args, **kwargs)

    # ---- which pairs make a step -------------------------------------------------------------------------------------

    @property
    def window_size(self) -> int:
        """Pairs per optimizer step over all ranks."""
        return self.args.window_size

    def _prepare_sets(self, args: MRPOConfig, train: Any, evals: Any) -> dict[str, PairDataset]:
        return prepare_sets(self.plan, args, train, evals)

    def _open_scores(self, args: MRPOConfig) -> ReferenceScores:
        return ReferenceScores(self.plan, args, self.pair_sets)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        self.train_sampler = window_sampler(self.args, len(dataset))
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> WindowSampler:
        return WindowSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size, shuffle=False, seed=0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[PairExample]], num_batches: int, device: torch.device
    ) -> tuple[list[MicroBatch], Tensor]:
        """This rank's share of the next window, its virtual reference formed, and the number of pairs in the whole window."""
        self._check_policy(self.model_wrapped)
        set_activity(f"scoring the pairs of step {self.state.global_step + 1} with the references")
        self.clock.start()
        examples = [example for _ in range(num_batches) for example in next(epoch_iterator)]
        references = self.scores.score(examples, self.pair_sets[TRAIN_SET], self.preference_objective)
        self.clock.references_done()
        batches = self._batches(examples, references, num_batches)
        pairs = torch.tensor(sum(e.weight for e in examples), device=device)
        return batches, self._sum_over_ranks(pairs)

    def _batches(
        self, examples: list[PairExample], references: CombinedReferences, num_batches: int
    ) -> list[MicroBatch]:
        return policy_batches(
            examples,
            references,
            num_batches,
            shared_prompt=self.shared_prompt,
            end_to_end=self.end_to_end,
            pad_token_id=self.pad_token_id,
        )

    def _check_policy(self, model: nn.Module) -> None:
        if self._policy_checked:
            return
        self._policy_checked = True
        args = self.args
        with fail_together(world_group()):
            check_pair_scoring(
                model,
                "policy",
                shared_prompt=self.shared_prompt,
                end_to_end=self.end_to_end,
                device=self.accelerator.device,
                train_equals_eval=args.disable_dropout,
                dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            )

    # ---- what a step minimises ---------------------------------------------------------------------------------------

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the window's mean loss, times the world size (data parallelism averages gradients).

        Raises:
            TrainingError: on every rank, when any rank's loss is not finite; nothing is stepped or saved.
        """
        assert num_items_in_batch is not None
        set_activity(f"computing step {self.state.global_step + 1}")
        share_P = inputs.weight_P / num_items_in_batch * self.accelerator.num_processes
        references, objective, lengths_P2 = inputs.references, self.preference_objective, inputs.pairs.response_lengths
        if self.args.gradients_in_forward:

            def loss_of_pairs(logps_C2: Tensor, pairs: slice) -> Tensor:
                return share_P[pairs] * loss_against(logps_C2, references[pairs], objective, lengths_P2[pairs]).losses_P

            total, policy_logps_P2 = preference_step(model, inputs.pairs, loss_of_pairs)
            loss = loss_against(policy_logps_P2, references, objective, lengths_P2)
        else:
            policy_logps_P2 = score_pairs(model, inputs.pairs)
            loss = loss_against(policy_logps_P2, references, objective, lengths_P2)
            total = (loss.losses_P * share_P).sum()
        self._stop_if_not_finite(loss.losses_P, inputs)
        if self.state.global_step == 0 and not self._metrics:
            self._compare_with_anchor(policy_logps_P2, references.ref_logps_KP2[0])
        metrics = pair_metrics(policy_logps_P2, references, loss, objective, self.plan.names)
        self._metrics.add(metrics, inputs.weight_P)
        self._tokens += inputs.pairs.num_tokens
        return total

    def _stop_if_not_finite(self, losses_P: Tensor, inputs: MicroBatch) -> None:
        bad_P = ~torch.isfinite(losses_P.detach())
        if not self._sum_over_ranks(bad_P.any().float()):
            return
        mine = [
            self.pair_sets[TRAIN_SET].source(row) for row, bad in zip(inputs.rows, bad_P.tolist(), strict=True) if bad
        ]
        everyone: list[list[str]] = [mine]
        if dist.is_initialized():
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        where = "; ".join(f"rank {rank}: {', '.join(rows)}" for rank, rows in enumerate(everyone) if rows)
        raise TrainingError(
            f"the loss of step {self.state.global_step + 1} is not finite for training pairs of {where} (row numbers of the "
            f"data set). All ranks stop; the last checkpoint in {self.args.output_dir} is as it was. Look at those rows and at "
            "`learning_rate`, or at the reference that returned such a log-prob."
        )

    def _compare_with_anchor(self, policy_logps_P2: Tensor, anchor_logps_P2: Tensor) -> None:
        """Before the first step the policy is the anchor: say how closely their log-probs agree."""
        if not self.args.anchor:
            relative = ((policy_logps_P2.detach() - anchor_logps_P2) / anchor_logps_P2).abs().max().item()
            log = logger.warning if relative > 0.02 else logger.info
            log("step 0: the policy's log-probs differ from the anchor's by at most %.1e relative", relative)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs  # tensors are on the device, and DeepSpeed's cast of floats to bf16 would round log-probs

    def floating_point_ops(self, inputs: Any) -> int:
        if not isinstance(inputs, MicroBatch):
            return 0
        return 6 * self._num_parameters * inputs.pairs.num_tokens

    def _track_num_input_tokens(self, inputs: MicroBatch) -> None:
        """`include_num_input_tokens_seen`: positions that the policy computes, or those of them that hold a token of a pair."""
        how = self.args.include_num_input_tokens_seen
        if how == "no":
            return
        tokens = inputs.pairs.input_ids_BL.numel() if how == "all" else inputs.num_pair_tokens
        total = self._sum_over_ranks(torch.tensor(tokens, device=self.accelerator.device))
        self.state.num_input_tokens_seen += int(total.item())

    @property
    def _num_parameters(self) -> int:
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.policy.parameters())

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    # ---- what a checkpoint needs -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        return fingerprint(self.plan, self.args, self.pair_sets, self.window_size)

    def summed(self) -> dict[str, float]:
        return self._metrics.state()

    def restore_summed(self, sums: Mapping[str, float]) -> None:
        self._metrics.restore(sums, self.accelerator.device)

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

    def source_files(self) -> SourceFiles:
        """What a save takes from the policy's folder, read once, before the first step: the folder may be gone at the end."""
        if self._source_files is None:
            self._source_files = read_source_files(
                self.policy,
                self.plan.policy,
                tokenizer=self._tokenizer_of_source,
                chat_template=self.plan.texts[0].template if self.args.chat_template else None,
            )
        return self._source_files

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder, config = Path(output_dir or self.args.folder), self.policy.config
        if self.args.should_save and state_dict is not None and not state_dict:
            # The Trainer does this where an engine does not give its weights away, and only warns.
            raise TrainingError(
                f"{folder}: DeepSpeed gives no whole weights to save; take a file of ds_configs/ instead."
            )
        in_training = config.use_cache
        if self._source_use_cache is None:
            del config.use_cache  # the Trainer has set it on a wrapper's config too
        else:
            config.use_cache = self._source_use_cache  # the Trainer switches it off
        as_source = self._save_as_source and self.args.should_save
        if as_source:
            state = self.policy.state_dict() if state_dict is None else state_dict
            state_dict = cast_as_stored(state, self.source_files().dtypes)
        with original_dropout(self._dropouts), unvalidated_generation_config(self.policy):
            super()._save(output_dir, state_dict)
        config.use_cache = in_training
        if as_source:
            share_weights(folder)
            self.source_files().write(folder)

    def create_model_card(self, *, model_name: str | None = None, **metadata: Any) -> None:  # type: ignore[override]
        """README.md, curves, report.html and what they are made from, in ``output_dir``. ``push_to_hub`` calls this before it
        uploads, so that the card on the hub is this one and not transformers' draft.

        Args:
            metadata: license, language, tags, ... of the front matter; ``dataset`` names rows that came from Python.
        """
        if self.is_world_process_zero():
            write_artifacts(self, metadata)

    # ---- what is measured --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log; called on every rank."""
        if "loss" in logs and self._metrics:
            logs.update(self._metrics.means(self._sum_over_ranks))
            logs.update(self._speed())
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        tokens = self._sum_over_ranks(torch.tensor(float(self._tokens), device=self.accelerator.device)).item()
        self._tokens = 0
        references, steps = self.clock.since_last_log()
        speed = {
            "time/references": statistics.mean(references),
            "time/step": statistics.mean(steps),
            "tokens_per_second": tokens / sum(steps),
        }
        if peak := peak_flops(self.args.device):
            used = 6 * self._num_parameters * speed["tokens_per_second"]
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
        pairs, entries = self._as_pairs(eval_dataset), len(self.state.log_history)
        metrics = super().evaluate(pairs, ignore_keys, metric_key_prefix)
        if isinstance(pairs, WeightedPairs) and pairs not in self._own_evals:
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
        return super().predict(self._as_pairs(test_dataset), ignore_keys, metric_key_prefix)

    def _as_pairs(self, rows: Any) -> Any:
        """Rows as pairs that the policy and every reference can score; what are pairs already, or names of such, as they are."""
        if isinstance(rows, dict):
            return {name: self._as_pairs(some) for name, some in rows.items()}
        known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(rows, str) and rows not in known:
            raise ConfigError(
                f"`eval_dataset: {rows}`: the run has no set of this name; it has {', '.join(known) or 'none'}."
            )
        if rows is None or isinstance(rows, str | WeightedPairs):
            return rows
        pairs = prepare_set(self.plan, self.args, "extra", as_datasets(None, rows)[1])
        self.scores.admit(pairs)
        return WeightedPairs(pairs)

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
            self._eval_scores = self._score_held_out(dataloader)
            self._eval_pairs, self._eval_rows = dataloader.dataset.pairs, []
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        means = self._eval_metrics.means(self._sum_over_ranks)
        held_out = self._joined_held_out()
        if dataloader.dataset in self._own_evals and self.is_world_process_zero():
            # Beside the run's other results, for comparisons pair by pair.
            held_out.save(self.args.folder / f"{file_name(prefix)}_logps.npz")
        in_order = held_out.select(self._eval_pairs.row_keys)
        logps_N2, ref_logps_NK2 = in_order.policy_logps_N2, in_order.ref_logps_KN2.swapaxes(0, 1)
        if self.compute_metrics is not None:
            means |= denumpify_detensorize(self.compute_metrics(EvalPrediction(logps_N2, ref_logps_NK2)))
        metrics = {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": x for name, x in means.items()}
        metrics = {**(output.metrics or {}), **metrics}
        return output._replace(metrics=metrics, predictions=logps_N2, label_ids=ref_logps_NK2)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> tuple[None, None, None]:
        """Measure one batch of held-out pairs; the metrics are summed here, not gathered by the Trainer."""
        self.poll()
        self._check_policy(model)  # where nothing was trained before
        references = CombinedReferences.joined([self._eval_scores[e.row] for e in inputs])
        batch = self._batches(inputs, references, 1)[0]
        with torch.no_grad(), self.compute_loss_context_manager():
            logps_P2 = score_pairs(model, batch.pairs)
        loss = loss_against(logps_P2, batch.references, self.preference_objective, batch.pairs.response_lengths)
        metrics = pair_metrics(logps_P2, batch.references, loss, self.preference_objective, self.plan.names)
        self._eval_metrics.add({"loss": loss.losses_P, **metrics}, batch.weight_P)
        self._eval_rows.append(self._held_out_rows(batch, logps_P2))
        return None, None, None

    def _held_out_rows(self, batch: MicroBatch, logps_P2: Tensor) -> HeldOutScores:
        real = (batch.weight_P > 0).cpu()
        keys = self._eval_pairs.row_keys[list(batch.rows)]
        return HeldOutScores(
            self.plan.names,
            keys[real.numpy()],
            logps_P2.float().cpu()[real].numpy(),
            batch.references.ref_logps_KP2.float().cpu()[:, real].numpy(),
        )

    def _joined_held_out(self) -> HeldOutScores:
        """What every model says of every held-out pair. Collective."""
        everybody = [rows for some in all_gather_object(self._eval_rows, world_group()) for rows in some]
        self._eval_rows = []
        return HeldOutScores.joined(everybody)

    def _score_held_out(self, dataloader: Any) -> dict[int, CombinedReferences]:
        """Row -> its virtual reference, for this rank's rows of the set: formed once, from memory afterwards."""
        if dataloader.dataset in self._held_out_scores:
            return self._held_out_scores[dataloader.dataset]
        scores: dict[int, CombinedReferences] = {}
        progress = tqdm(
            dataloader,
            desc=f"Scoring held-out pairs with {len(self.plan.names)} references",
            disable=self.args.disable_tqdm or not self.is_local_process_zero(),
        )
        for examples in progress:
            self.poll()
            references = self.scores.score(examples, dataloader.dataset.pairs, self.preference_objective)
            scores.update({e.row: references[i : i + 1] for i, e in enumerate(examples)})
        self.scores.flush()
        if dataloader.dataset in self._own_evals:
            self._held_out_scores[dataloader.dataset] = scores
        return scores
