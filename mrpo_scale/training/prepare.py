"""From what MRPOTrainer is called with to all that a run is made of: models planned, pairs tokenized, references opened, policy
loaded. What cannot work together is refused before weights load."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mrpo_scale.base.device import map_blocks_from
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.dealing import WindowShape, pair_lengths
from mrpo_scale.data.inputs import (
    EVAL_SET,
    TRAIN_SET,
    WEIGHTS_SET,
    as_datasets,
    check_steps,
    evaluation_split,
    prepare_sets,
)
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.window import TokenizedPairs, WeightedPairs, WindowSampler
from mrpo_scale.lifecycle.output_folder import check_output_folder
from mrpo_scale.lifecycle.template_date import decide_date, record_date
from mrpo_scale.logps.attention_choice import choose_end_to_end
from mrpo_scale.logps.pair_forward import choose_shared_prompt, enable_pair_scoring
from mrpo_scale.logps.routers import router_loss_coef
from mrpo_scale.logps.sequence_parallel import SequenceGroup, make_sequence_group
from mrpo_scale.models.adapter import add_adapter, four_bits
from mrpo_scale.models.plan import RunPlan, disable_dropout, load_policy, plan_models
from mrpo_scale.models.same_weights import repeated_references
from mrpo_scale.models.saving import check_small_files
from mrpo_scale.models.source import local_folder
from mrpo_scale.objective import Objective
from mrpo_scale.references.reward import RewardModel, plan_reward
from mrpo_scale.references.scores import ReferenceScores
from mrpo_scale.references.scores import open_scores as open_reference_scores
from mrpo_scale.references.validation_weights import with_validation_weights
from mrpo_scale.training.arguments import check_arguments, check_optimizer
from mrpo_scale.training.preflight import check_best_metric
from mrpo_scale.training.sampling import PolicySampler
from mrpo_scale.training.sequences import check_attention, check_sequences

logger = logging.getLogger(__name__)

PairSets = Mapping[str, PairDataset]


@dataclass(frozen=True)
class PreparedRun:
    """All that a run is made of, before its first step."""

    args: MRPOConfig
    plan: RunPlan
    pair_sets: PairSets  #: every set that the references score, by split
    train: WeightedPairs | None
    evals: WeightedPairs | dict[str, WeightedPairs] | None  #: as the Trainer takes ``eval_dataset``
    scores: ReferenceScores
    objective: Objective  #: of labelled pairs; `ref_weights: validation` replaced by what was found
    policy: PreTrainedModel
    use_cache: (
        bool | None
    )  #: what the policy's source says, which the Trainer switches off; of a wrapper the text config has it
    dropouts: Sequence[Any]  #: what was switched off, see models/plan.py
    router_loss_coef: float  #: of the routers' auxiliary loss, see logps/routers.py; 0: there is none
    shared_prompt: bool  #: layout of the policy's batches, see logps/pair_batch.py
    end_to_end: bool
    sequence_group: SequenceGroup | None  #: of this rank, see logps/sequence_parallel.py
    tokenizer_of_source: bool  #: no ``processing_class`` was passed
    sampler: PolicySampler | None = None  #: of `kd` and `rlhf`, which train on samples too, or only

    @property
    def held_out(self) -> list[WeightedPairs]:
        """The run's own held-out sets; its log, card and files speak of no others."""
        sets = self.evals.values() if isinstance(self.evals, dict) else [self.evals]
        return [pairs for pairs in sets if pairs is not None]


def _all_pairs(args: MRPOConfig, pair_sets: PairSets) -> PairSets:
    return pair_sets


def prepare_run(
    model: str | PreTrainedModel,
    ref_models: Sequence[str | Mapping[str, Any]] | None,
    args: MRPOConfig | None,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: PreTrainedTokenizerBase | None,
    trainer_arguments: dict[str, Any],
    *,
    select_pairs: Callable[[MRPOConfig, PairSets], PairSets] = _all_pairs,
    open_scores: Callable[[RunPlan, MRPOConfig, PairSets], ReferenceScores] = open_reference_scores,
) -> PreparedRun:
    """Collective over the world.

    Args:
        trainer_arguments: what else MRPOTrainer was called with; TRL's arguments that ask for nothing leave it.
        select_pairs: which of the tokenized pairs are used; default all.
        open_scores: where their reference scores come from.

    Raises:
        ConfigError: before any weights load, when models, data and keys do not fit together.
    """
    train_dataset, eval_dataset = as_datasets(train_dataset, eval_dataset)
    ref_models, args = check_arguments(model, ref_models, args, eval_dataset, trainer_arguments)
    plan = _plan(model, ref_models, args, processing_class)
    pair_sets = select_pairs(args, prepare_sets(plan, args, train_dataset, eval_dataset))
    if TRAIN_SET in pair_sets:
        check_steps(args, len(pair_sets[TRAIN_SET]), args.window_size)
    plan = _used(plan, args)
    if trainer_arguments.get("compute_metrics") is None:  # whose names nobody knows
        check_best_metric(args, plan.names, eval_dataset if isinstance(eval_dataset, dict) else ())
    _set_allocation(args)  # before the policy: what is scored ahead of training has the memory to itself
    scores = open_scores(plan, args, pair_sets)
    objective = with_validation_weights(args, scores, pair_sets)
    policy = _policy(model, plan, args)
    use_cache = getattr(policy.config, "use_cache", None)
    check_optimizer(trainer_arguments, policy)
    layout = _enable_scoring(policy, args)
    router_loss = router_loss_coef(policy, args.router_aux_loss_coef)
    # Around the forward that scores pairs, which peft passes everything on to.
    policy = add_adapter(policy, plan.policy, args) if args.use_peft else policy
    weighted = {split: WeightedPairs(pairs) for split, pairs in pair_sets.items() if split != WEIGHTS_SET}
    return PreparedRun(
        args=args,
        plan=plan,
        pair_sets=pair_sets,
        train=weighted.get(TRAIN_SET),
        evals=_evals(weighted, eval_dataset),
        scores=scores,
        objective=objective.of_pairs,
        policy=policy,
        use_cache=use_cache,
        dropouts=disable_dropout(policy) if args.disable_dropout else [],
        router_loss_coef=router_loss,
        **layout,
        sequence_group=make_sequence_group(args.sequence_parallel_size, datetime.timedelta(seconds=args.ddp_timeout)),
        tokenizer_of_source=processing_class is None,
        sampler=_sampler(args, plan, policy, pair_sets, scores, objective, layout),
    )


def window_sampler(args: MRPOConfig, pairs: TokenizedPairs, shared_prompt: bool, end_to_end: bool) -> WindowSampler:
    """The order in which a run with these arguments trains its rows, for a policy that lays pairs out in this way."""
    tokens = args.max_tokens_per_micro_batch  # of which a rank of a sequence group computes a part
    shape = WindowShape(
        args.world_size,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        max_tokens=None if tokens is None else tokens * args.sequence_parallel_size,
        padded=not end_to_end,
    )
    return WindowSampler(
        pair_lengths(pairs.lengths[:, 0], shared_prompt=shared_prompt, end_to_end=end_to_end),
        shape,
        shuffle=getattr(args, "train_sampling_strategy", "random") == "random",
        seed=args.data_seed if args.data_seed is not None else args.seed,
        drop_last=args.dataloader_drop_last,
    )


def _plan(
    model: str | PreTrainedModel,
    ref_models: Sequence[str | Mapping[str, Any]],
    args: MRPOConfig,
    processing_class: PreTrainedTokenizerBase | None,
) -> RunPlan:
    """Every model of the recipe, in a folder and on a date that are the run's."""
    set_activity("preparing the pairs")
    check_output_folder(args, model, ref_models)
    decide_date(args)  # the same for all models and ranks
    plan = plan_models(model, ref_models, args, processing_class)
    check_sequences(plan, args, args.world_size, args.device)
    record_date(args, plan.dated, run=args.folder)
    check_small_files(Path(plan.policy.path))
    if args.process_index == 0:
        for sentence in repeated_references(plan, args):
            logger.warning("%s", sentence)
    check_reward(args)
    return plan


def check_reward(args: MRPOConfig) -> None:
    """Collective over the world, where the reward model of `rlhf` is a hub id; other objectives have none.

    Raises:
        ConfigError: it gives no reward; see :func:`~mrpo_scale.references.reward.plan_reward`.
    """
    if args.objective == "rlhf":
        plan_reward(args.reward_model or "", **_reading(args))


def _reading(args: MRPOConfig) -> dict[str, Any]:
    """How a reward model is read: as the references are."""
    date = datetime.date.fromisoformat(args.template_date) if args.template_date else None
    return {"device": args.device, "plain_template": args.plain_template, "date": date}


def _sampler(
    args: MRPOConfig,
    plan: RunPlan,
    policy: PreTrainedModel,
    pair_sets: PairSets,
    scores: ReferenceScores,
    objective: Objective,
    layout: Mapping[str, bool],
) -> PolicySampler | None:
    """What samples and scores responses, with its reward model loaded; None where nothing is sampled, or trained."""
    if not args.samples or TRAIN_SET not in pair_sets:
        return None
    reward = None
    if args.objective == "rlhf":
        set_activity("loading the reward model")
        reward = RewardModel.load(args.reward_model or "", **_reading(args))
    return PolicySampler(args, plan, policy, pair_sets[TRAIN_SET], scores, objective, reward, **layout)


def _set_allocation(args: MRPOConfig) -> None:
    if args.device.type == "cpu" and args.world_size == 1:
        map_blocks_from(4 << 20)  # docs/performance.md: what each threshold costs in memory and time


def _policy(model: str | PreTrainedModel, plan: RunPlan, args: MRPOConfig) -> PreTrainedModel:
    set_activity("loading the policy")
    if not isinstance(model, str):
        return model
    local_folder(plan.policy, world_group())  # one rank of each node downloads it
    return load_policy(plan.policy, four_bits(args))


def _enable_scoring(policy: PreTrainedModel, args: MRPOConfig) -> dict[str, bool]:
    """Give the policy the forward that scores pairs, and the attention that their batches need, whose layout is returned."""
    enable_pair_scoring(policy, "policy", args.head_impl, offload=args.activation_offloading)
    end_to_end = choose_end_to_end(
        policy,
        args.device,
        name="policy",
        asked=args.attn_implementation,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        dropout=not args.disable_dropout,
        compiled=bool(args.torch_compile),
    )
    check_attention(policy, args)
    shared_prompt = choose_shared_prompt(args.shared_prompt, policy, "policy")
    return {"end_to_end": end_to_end, "shared_prompt": shared_prompt}


def _used(plan: RunPlan, args: MRPOConfig) -> RunPlan:
    """Without the references that the objective does not use."""
    others = len(plan.references) - 1
    if args.objective != "dpo" or not others:
        return plan
    logger.info(
        "objective dpo: the anchor alone is used, the %d other references are not loaded; their tokenizers decide which "
        "pairs every model can score, so that runs compare",
        others,
    )
    return plan.first(1)


def _evals(weighted: Mapping[str, WeightedPairs], eval_dataset: Any) -> WeightedPairs | dict[str, WeightedPairs] | None:
    if not isinstance(eval_dataset, dict):
        return weighted.get(EVAL_SET)
    splits = {name: evaluation_split(name) for name in eval_dataset}
    return {name: weighted[split] for name, split in splits.items() if split in weighted}
