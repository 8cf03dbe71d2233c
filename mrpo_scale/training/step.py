"""One optimizer step, top to bottom: window -> references -> policy -> loss -> metrics.

transformers' Trainer drives a step through two hooks, and forward and backward of each micro-batch between them.
:func:`optimizer_step` is both: what comes before the micro-batches runs when ``get_batch_samples`` calls it, the function that it
returns when ``compute_loss`` does. The other functions here are its phases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from mrpo_kernels import CombinedReferences
from mrpo_kernels.chunked_head import response_sums
from torch import Tensor, nn

from mrpo_scale.base.device import send
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.heartbeat import set_activity
from mrpo_scale.base.ranks import all_gather_object, fail_together, sum_over_ranks, world_group
from mrpo_scale.data.inputs import TRAIN_SET
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.micro_batches import MicroBatch, PeerBatch, group_batches, policy_batches
from mrpo_scale.logps.pair_forward import preference_step, score_pairs, score_pairs_and_routers, score_tokens
from mrpo_scale.logps.routers import RouterBalance
from mrpo_scale.logps.self_check import check_pair_scoring
from mrpo_scale.objective import PreferenceLoss, loss_against
from mrpo_scale.references.adapter_off import AdapterOffAnchor
from mrpo_scale.references.scores import LiveScores
from mrpo_scale.training.callbacks import StepClock
from mrpo_scale.training.metrics import MetricSums, pair_metrics
from mrpo_scale.training.prepare import PreparedRun
from mrpo_scale.training.sampled_loss import SampledLoss
from mrpo_scale.training.sampling import PREFIX, PolicySampler, SampledBatch, sampled_metrics

logger = logging.getLogger(__name__)

#: (model, micro-batch) -> its share of the window's mean loss, to be sent backward.
LossOfBatch = Callable[[nn.Module, MicroBatch | PeerBatch], Tensor]


@dataclass
class StepSums:
    """What this rank has measured since the last log."""

    metrics: MetricSums = field(default_factory=MetricSums)  #: and "_loss", the sum of the steps' losses
    tokens: int = 0  #: that the policy computed
    step: int = 0  #: that is being taken
    window: list[tuple[MicroBatch, Tensor]] = field(
        default_factory=list
    )  #: its losses, until they are known to be finite
    from_anchor: Tensor | None = None  #: how far the untrained policy's log-probs lie from the anchor's, relative


def optimizer_step(
    run: PreparedRun,
    loader: Iterator[list[PairExample]],
    num_batches: int,
    step: int,
    sums: StepSums,
    clock: StepClock,
) -> tuple[list[MicroBatch | PeerBatch], Tensor, LossOfBatch]:
    """Take this rank's share of the next window, ``num_batches`` pieces of ``loader``. Collective, as is the function returned.

    Returns:
        the micro-batches, as many on every rank, the number of pairs in the whole window, and the loss of a micro-batch.
    """
    set_activity(f"scoring the pairs of step {step} with the references")
    sums.step = step
    clock.start_step()
    with clock.phase("data"):
        window = [example for _ in range(num_batches) for example in next(loader)]
        batches: list[MicroBatch | PeerBatch] = []
        if run.sampler is None or not run.sampler.replaces_pairs:
            with clock.phase("references"):
                references = run.scores.score(window, run.pair_sets[TRAIN_SET], run.objective)
            batches = micro_batches(run, window, references)
        if run.sampler is not None:
            batches += sampled_batches(run.sampler, window, step, clock)
        num_pairs = sum_over_ranks(
            send(torch.tensor(sum(e.weight for e in window), dtype=torch.float32), run.args.device)
        )

    def loss_of_batch(model: nn.Module, batch: MicroBatch | PeerBatch) -> Tensor:
        set_activity(f"computing step {step}")
        with clock.phase("head and loss"):  # the model's body is a phase of its own within
            if isinstance(batch, PeerBatch):
                return peer_part(model, batch, sums)
            policy_logps_P2, loss, share, balance = policy_loss(run, model, batch, num_pairs)
            measure(run, policy_logps_P2, loss, share, balance, batch, sums)
        return share

    return batches, num_pairs, loss_of_batch


def micro_batches(
    run: PreparedRun, examples: Sequence[PairExample], references: CombinedReferences
) -> list[MicroBatch | PeerBatch]:
    """The examples with their virtual reference, as the micro-batches that they were dealt to; over a sequence group, which is
    collective then, those of its other ranks between them."""
    layout: Any = {"shared_prompt": run.shared_prompt, "pad_token_id": run.plan.references[0].pad_token_id}
    if run.sequence_group is not None:
        return group_batches(examples, references, run.sequence_group, **layout)
    return list(policy_batches(examples, references, end_to_end=run.end_to_end, **layout))


def sampled_batches(
    sampler: PolicySampler, window: Sequence[PairExample], step: int, clock: StepClock
) -> list[SampledBatch]:
    """Responses that the policy gives to prompts of the window, with their references. Collective over the world."""
    set_activity(f"sampling responses of step {step}")
    with clock.phase("samples"):
        samples = sampler.draw(window, step)
    with clock.phase("references"):
        references, settled = sampler.score(samples)
    return sampler.micro_batches(samples, references, settled)


def policy_loss(
    run: PreparedRun, model: nn.Module, batch: MicroBatch, num_pairs: Tensor
) -> tuple[Tensor, PreferenceLoss | SampledLoss, Tensor, RouterBalance | None]:
    """The policy's log-probs [P, 2], the loss of each pair, this micro-batch's share of the window's mean loss, times the world
    size (data parallelism averages gradients), and of a mixture of experts whose routers are kept even what they did."""
    sampler, objective, lengths_P2 = run.sampler, run.objective, batch.pairs.response_lengths
    share_P = batch.weight_P / (batch.total if isinstance(batch, SampledBatch) else num_pairs) * run.args.world_size

    def loss_of(logps: Tensor, pairs: slice) -> PreferenceLoss | SampledLoss:
        if sampler is not None and isinstance(batch, SampledBatch):
            return sampler.loss(batch, logps, pairs)
        return loss_against(logps, batch.references[pairs], objective, lengths_P2[pairs])

    # Once a window: KD's labelled pairs keep them even, its samples would do it twice.
    repeated = sampler is not None and not sampler.replaces_pairs and isinstance(batch, SampledBatch)
    with_routers, balance = run.router_loss_coef > 0 and not repeated, None
    per_token = isinstance(batch, SampledBatch) and batch.settled is not None  # `loss_of` takes log-probs of tokens
    if not run.args.gradients_in_forward:
        if with_routers:
            policy_logps_P2, balance = score_pairs_and_routers(model, batch.pairs)
            logps = policy_logps_P2
        elif per_token:
            logps = score_tokens(model, batch.pairs)
            policy_logps_P2 = response_sums(logps.detach(), batch.pairs.cu_seqlens).view(-1, 2)
        else:
            logps = policy_logps_P2 = score_pairs(model, batch.pairs)
        loss = loss_of(logps, slice(None))
        share = (loss.losses_P * share_P).sum()
    else:

        def loss_of_pairs(logps: Tensor, pairs: slice) -> Tensor:
            return share_P[pairs] * loss_of(logps, pairs).losses_P

        options = {"with_routers": with_routers, "per_token": per_token}
        scored, balance = preference_step(model, batch.pairs, loss_of_pairs, **options)
        share, policy_logps_P2, token_logps_T = scored
        loss = loss_of(policy_logps_P2 if token_logps_T is None else token_logps_T, slice(None))
    if balance is not None:
        share = share + run.router_loss_coef * balance.loss * share_P.sum()
    return policy_logps_P2, loss, share, balance


def peer_part(model: nn.Module, batch: PeerBatch, sums: StepSums) -> Tensor:
    """This rank's part of another's micro-batch: a loss of 0, through which the owner's gradient reaches the tokens here."""
    sums.tokens += batch.pairs.num_tokens
    return 0 * score_pairs(model, batch.pairs).sum()


def finish_window(run: PreparedRun, sums: StepSums, grad_norm: Tensor | None = None) -> float | None:
    """When all micro-batches are through and before the optimizer moves: stop where a loss is not finite, and read what the log
    will say. The one time in a step that the host waits for its device. Collective over the world; nothing the second time.

    Returns:
        ``grad_norm``, read.

    Raises:
        TrainingError: on every rank, when any rank's loss is not finite; nothing was stepped.
    """
    if not sums.window:
        return None
    wanted = [x for x in (grad_norm, sums.from_anchor) if x is not None]
    numbers = sums.metrics.read(*wanted)
    if sums.from_anchor is not None:
        log = logger.warning if numbers[-1] > 0.02 else logger.info
        log("step 0: the policy's log-probs differ from the anchor's by at most %.1e relative", numbers[-1])
    window, sums.window, sums.from_anchor = sums.window, [], None
    if sums.metrics.totals.pop("_not_finite"):
        _stop(run, window, sums.step)
    return numbers[0] if grad_norm is not None else None


def _stop(run: PreparedRun, window: Sequence[tuple[MicroBatch, Tensor]], step: int) -> NoReturn:
    """Say which rows of this window are at fault. Collective over the world."""
    source = run.pair_sets[TRAIN_SET].source
    mine = [
        source(row)
        for batch, losses_P in window
        for row, finite in zip(batch.rows, torch.isfinite(losses_P).tolist(), strict=True)
        if not finite
    ]
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
    loss: PreferenceLoss | SampledLoss,
    share: Tensor,
    balance: RouterBalance | None,
    batch: MicroBatch,
    sums: StepSums,
) -> None:
    """Add what a micro-batch says to ``sums``, on the device; at first also how closely the policy agrees with the anchor, which it
    still is."""
    if sums.step == 1 and not sums.metrics and not run.args.anchor:
        anchor_logps_P2 = batch.references.ref_logps_KP2[0]
        sums.from_anchor = ((policy_logps_P2.detach() - anchor_logps_P2) / anchor_logps_P2).abs().max()
    losses_P = loss.losses_P.detach()
    sums.window.append((batch, losses_P))
    sums.metrics.add_sum("_not_finite", (~torch.isfinite(losses_P)).sum())
    sums.metrics.add_sum("_loss", share.detach() / run.args.world_size)
    if isinstance(loss, PreferenceLoss):
        metrics = pair_metrics(policy_logps_P2, batch.references, loss, run.objective, run.plan.names)
    else:
        assert isinstance(batch, SampledBatch)
        metrics = sampled_metrics(policy_logps_P2, batch, run.plan.names)
    if balance is not None:
        metrics |= {
            f"router/{name}": v.detach().float().expand_as(batch.weight_P) for name, v in balance._asdict().items()
        }
    sums.metrics.add(metrics, batch.weight_P, PREFIX if isinstance(batch, SampledBatch) else "")
    sums.tokens += batch.pairs.num_tokens


def begin_with_policy(run: PreparedRun, model: nn.Module, device: torch.device) -> None:
    """Before the first batch: let the references have the policy, if its weights are one of them, and see that the layout of
    batches does not change what it says. Collective over the world.

    Raises:
        ConfigError, TrainingError: see logps/self_check.py.
    """
    args = run.args
    if run.sampler is not None:
        run.sampler.model = model
    if args.anchor_is_policy and isinstance(run.scores, LiveScores):
        run.scores.anchor = AdapterOffAnchor(
            model,
            run.policy,
            device,
            shared_prompt=run.shared_prompt,
            end_to_end=run.end_to_end,
            pad_token_id=run.plan.references[0].pad_token_id,
            tokens_per_forward=args.ref_tokens_per_forward,
        )
    with fail_together(world_group()):
        check_pair_scoring(
            model,
            "policy",
            shared_prompt=run.shared_prompt,
            end_to_end=run.end_to_end,
            device=device,
            train_equals_eval=args.disable_dropout,
            group=run.sequence_group,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        )
