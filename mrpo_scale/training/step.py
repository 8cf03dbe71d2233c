"""One optimizer step, top to bottom: window -> references -> policy -> loss -> metrics.

transformers' Trainer drives a step through two hooks, and forward and backward of each micro-batch between them.
:func:`optimizer_step` is both: what comes before the micro-batches runs when ``get_batch_samples`` calls it, the function that it
returns when ``compute_loss`` does. The other functions here are its phases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor, nn

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import all_gather_object, fail_together, sum_over_ranks, world_group
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.micro_batches import MicroBatch, policy_batches
from mrpo_scale.logps.pair_forward import preference_step, score_pairs, score_pairs_and_routers
from mrpo_scale.logps.routers import RouterBalance
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.objective import PreferenceLoss, loss_against
from mrpo_scale.training.callbacks import StepClock
from mrpo_scale.training.metrics import MetricSums, pair_metrics
from mrpo_scale.training.prepare import PreparedRun

logger = logging.getLogger(__name__)

#: (model, micro-batch) -> its share of the window's mean loss, to be sent backward.
LossOfBatch = Callable[[nn.Module, MicroBatch], Tensor]


@dataclass
class StepSums:
    """What this rank has measured since the last log."""

    metrics: MetricSums = field(default_factory=MetricSums)
    tokens: int = 0  #: that the policy computed


def optimizer_step(
    run: PreparedRun,
    loader: Iterator[list[PairExample]],
    num_batches: int,
    step: int,
    sums: StepSums,
    clock: StepClock,
) -> tuple[list[MicroBatch], Tensor, LossOfBatch]:
    """Take this rank's share of the next window from ``loader``. Collective over the world, as is the function returned.

    Returns:
        the ``num_batches`` micro-batches, the number of pairs in the whole window, and the loss of a micro-batch.
    """
    set_activity(f"scoring the pairs of step {step} with the references")
    clock.start_step()
    with clock.phase("data"):
        window = [example for _ in range(num_batches) for example in next(loader)]
        with clock.phase("references"):
            references = run.scores.score(window, run.pair_sets[TRAIN_SET], run.objective)
        batches = micro_batches(run, window, references, num_batches)
        num_pairs = sum_over_ranks(torch.tensor(sum(e.weight for e in window), device=run.args.device))

    def loss_of_batch(model: nn.Module, batch: MicroBatch) -> Tensor:
        set_activity(f"computing step {step}")
        with clock.phase("head and loss"):  # the model's body is a phase of its own within
            policy_logps_P2, loss, share, balance = policy_loss(run, model, batch, num_pairs)
            stop_if_not_finite(run, loss, batch, step)
            measure(run, policy_logps_P2, loss, balance, batch, step, sums)
        return share

    return batches, num_pairs, loss_of_batch


def micro_batches(
    run: PreparedRun, examples: Sequence[PairExample], references: CombinedReferences, count: int
) -> list[MicroBatch]:
    """The examples with their virtual reference, as ``count`` equally large batches for the policy."""
    return policy_batches(
        examples,
        references,
        count,
        shared_prompt=run.shared_prompt,
        end_to_end=run.end_to_end,
        pad_token_id=run.plan.references[0].pad_token_id,
    )


def policy_loss(
    run: PreparedRun, model: nn.Module, batch: MicroBatch, num_pairs: Tensor
) -> tuple[Tensor, PreferenceLoss, Tensor, RouterBalance | None]:
    """The policy's log-probs [P, 2], the loss of each pair, this micro-batch's share of the window's mean loss, times the world
    size (data parallelism averages gradients), and of a mixture of experts whose routers are kept even what they did."""
    share_P = batch.weight_P / num_pairs * run.args.world_size
    references, objective, lengths_P2 = batch.references, run.objective, batch.pairs.response_lengths
    with_routers, balance = run.router_loss_coef > 0, None
    if not run.args.gradients_in_forward:
        if with_routers:
            policy_logps_P2, balance = score_pairs_and_routers(model, batch.pairs)
        else:
            policy_logps_P2 = score_pairs(model, batch.pairs)
        loss = loss_against(policy_logps_P2, references, objective, lengths_P2)
        share = (loss.losses_P * share_P).sum()
    else:

        def loss_of_pairs(logps_C2: Tensor, pairs: slice) -> Tensor:
            return share_P[pairs] * loss_against(logps_C2, references[pairs], objective, lengths_P2[pairs]).losses_P

        scored, balance = preference_step(model, batch.pairs, loss_of_pairs, with_routers=with_routers)
        share, policy_logps_P2 = scored
        loss = loss_against(policy_logps_P2, references, objective, lengths_P2)
    if balance is not None:
        share = share + run.router_loss_coef * balance.loss * share_P.sum()
    return policy_logps_P2, loss, share, balance


def stop_if_not_finite(run: PreparedRun, loss: PreferenceLoss, batch: MicroBatch, step: int) -> None:
    """Nothing is stepped or saved. Collective over the world.

    Raises:
        TrainingError: on every rank, when any rank's loss is not finite.
    """
    bad_P = ~torch.isfinite(loss.losses_P.detach())
    if not sum_over_ranks(bad_P.any().float()):
        return
    source = run.pair_sets[TRAIN_SET].source
    mine = [source(row) for row, bad in zip(batch.rows, bad_P.tolist(), strict=True) if bad]
    everyone = all_gather_object(mine, world_group())
    where = "; ".join(f"rank {rank}: {', '.join(rows)}" for rank, rows in enumerate(everyone) if rows)
    raise TrainingError(
        f"the loss of step {step} is not finite for training pairs of {where} (row numbers of the "
        f"data set). All ranks stop; the last checkpoint in {run.args.output_dir} is as it was. Look at those rows and at "
        "`learning_rate`, or at the reference that returned such a log-prob."
    )


def measure(
    run: PreparedRun,
    policy_logps_P2: Tensor,
    loss: PreferenceLoss,
    balance: RouterBalance | None,
    batch: MicroBatch,
    step: int,
    sums: StepSums,
) -> None:
    """Add the metrics of a micro-batch to ``sums``; say once how closely the policy agrees with the anchor, which it still is."""
    if step == 1 and not sums.metrics and not run.args.anchor:
        anchor_logps_P2 = batch.references.ref_logps_KP2[0]
        relative = ((policy_logps_P2.detach() - anchor_logps_P2) / anchor_logps_P2).abs().max().item()
        log = logger.warning if relative > 0.02 else logger.info
        log("step 0: the policy's log-probs differ from the anchor's by at most %.1e relative", relative)
    metrics = pair_metrics(policy_logps_P2, batch.references, loss, run.objective, run.plan.names)
    if balance is not None:
        metrics |= {
            f"router/{name}": v.detach().float().expand_as(batch.weight_P) for name, v in balance._asdict().items()
        }
    sums.metrics.add(metrics, batch.weight_P)
    sums.tokens += batch.pairs.num_tokens


def check_policy(run: PreparedRun, model: nn.Module, device: torch.device) -> None:
    """Before the first batch: that the layout of batches does not change what the policy says. Collective over the world.

    Raises:
        ConfigError, TrainingError: see logps/self_check.py.
    """
    args = run.args
    with fail_together(world_group()):
        check_pair_scoring(
            model,
            "policy",
            shared_prompt=run.shared_prompt,
            end_to_end=run.end_to_end,
            device=device,
            train_equals_eval=args.disable_dropout,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
