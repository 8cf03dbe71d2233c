"""Responses that the policy samples in a step, two to a prompt, as pairs like any other: own tokens for the policy and whoever
shares its tokenization, the text tokenized anew for the other references; scored, laid out and weighted as pairs are.

Which prompts of a window are answered depends on (seed, step) and the window alone, the random numbers of the answers on the rank
too: a run that goes on samples what it would have sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from torch import Tensor, nn

from mrpo_scale.base.device import send
from mrpo_scale.base.ranks import all_gather_object, all_reduce_max, fail_together, sum_over_ranks, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.dealing import cut_by_tokens, pair_lengths
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.pairs import BadRow, PairTokens, PreferencePair
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.generation import sample_responses, until
from mrpo_scale.logps.micro_batches import MicroBatch, policy_batches
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.objective import Objective
from mrpo_scale.references.reward import RewardModel
from mrpo_scale.references.scores import ReferenceScores
from mrpo_scale.training.sampled_loss import SampledLoss, sampled_loss
from mrpo_scale.training.whole_policy import whole_policy

logger = logging.getLogger(__name__)

PREFIX = "sampled/"  #: of the metrics of samples, means over the sampled pairs


@dataclass(frozen=True)
class SampledBatch(MicroBatch):
    """A micro-batch of sampled pairs."""

    total: Tensor  #: sampled pairs of the whole window that count
    rewards_P2: Tensor | None
    cut_P: Tensor  #: share of the two samples that were cut
    identical_P: Tensor  #: 1 where both are the same tokens, else 0


@dataclass(frozen=True)
class Samples:
    """This rank's two samples to each of P prompts, the longest first."""

    examples: list[PairExample]
    pairs: list[PreferencePair]  #: prompt and the texts of both samples
    cut: list[tuple[bool, bool]]
    rewards_P2: Tensor | None = None


class PolicySampler:
    """Samples a step's pairs from the policy. Collective over the world: every method but :meth:`loss`.

    Args:
        pairs: the training set, whose prompts are answered.
        objective: ``kd`` or ``rlhf``.
        reward: of ``rlhf``.

    Attributes:
        model: the policy in whatever engine wraps it; set when that is ready, before anything is sampled.
    """

    def __init__(
        self,
        args: MRPOConfig,
        plan: RunPlan,
        policy: nn.Module,
        pairs: PairDataset,
        scores: ReferenceScores,
        objective: Objective,
        reward: RewardModel | None,
        *,
        shared_prompt: bool,
        end_to_end: bool,
    ) -> None:
        self.args, self.plan, self.policy, self.pairs = args, plan, policy, pairs
        self.scores, self.objective, self.reward = scores, objective, reward
        self.shared_prompt, self.end_to_end = shared_prompt, end_to_end
        self.pad_token_id = plan.references[0].pad_token_id
        self.model: nn.Module = policy
        # What ends a response: the template's end of turn, or, of a text without a template, the tokenizer's own.
        self.ends = {plan.texts[0].response_ids("a", raw=raw, cut=False)[-1] for raw in (False, True)}

    @property
    def replaces_pairs(self) -> bool:
        """Whether samples alone are trained on, not the labelled pairs."""
        return self.objective.name == "rlhf"

    def draw(self, window: Sequence[PairExample], step: int) -> Samples:
        """This rank's samples of a step, rewarded.

        Raises:
            ConfigError, TrainingError: on every rank: a prompt that the reward model cannot read, a reward that is not finite.
        """
        rows = self._rows(window, step)
        responses = self._responses([self._prompt_ids(row) for row, _ in rows], [row for row, _ in rows], step)
        return self._rewarded(self._tokenized(rows, responses))

    def score(self, samples: Samples) -> CombinedReferences:
        """The references of the samples, in their order."""
        return self.scores.score(samples.examples, self.pairs, self.objective)

    def micro_batches(self, samples: Samples, references: CombinedReferences) -> list[SampledBatch]:
        """As many on every rank."""
        parts, device = self._parts(samples.examples), references.virtual_logps_P2.device
        examples = [
            replace(example, micro_batch=number)
            for number, part in enumerate(parts)
            for example in samples.examples[part]
        ]
        batches = policy_batches(
            examples,
            references,
            shared_prompt=self.shared_prompt,
            end_to_end=self.end_to_end,
            pad_token_id=self.pad_token_id,
        )
        total = sum_over_ranks(send(torch.tensor(sum(e.weight for e in examples), dtype=torch.float32), device))
        cut_P = send(torch.tensor(samples.cut, dtype=torch.float32).mean(-1), device)
        identical = [e.tokens[0].chosen_ids == e.tokens[0].rejected_ids for e in examples]
        identical_P = send(torch.tensor(identical, dtype=torch.float32), device)
        return [
            SampledBatch(
                **{f.name: getattr(batch, f.name) for f in fields(batch)},
                total=total,
                rewards_P2=None if samples.rewards_P2 is None else samples.rewards_P2[part],
                cut_P=cut_P[part],
                identical_P=identical_P[part],
            )
            for part, batch in zip(parts, batches, strict=True)
        ]

    def loss(self, batch: SampledBatch, logps_C2: Tensor, pairs: slice = slice(None)) -> SampledLoss:
        """Of some ``pairs`` of a micro-batch, whose policy log-probs these are."""
        by_tokens = self.objective.name == "kd" and self.args.kd_normalize == "tokens"
        return sampled_loss(
            logps_C2,
            batch.references[pairs],
            self.objective,
            lengths_P2=batch.pairs.response_lengths[pairs] if by_tokens else None,
            rewards_P2=None if batch.rewards_P2 is None else batch.rewards_P2[pairs],
        )

    def _rows(self, window: Sequence[PairExample], step: int) -> list[tuple[int, float]]:
        """(row, weight) of this rank's prompts, longest first, equally many on every rank: a filler of weight 0 where they do not
        go round."""
        mine = [example.row for example in window if example.weight > 0]
        real = sorted(row for some in all_gather_object(mine, world_group()) for row in some)
        count = max(1, round(self.args.sampled_fraction * len(real)))
        chosen = np.random.default_rng([self.args.seed, step]).permutation(real)[:count].tolist()
        chosen.sort(key=lambda row: (-self.pairs.lengths[row, 0, 0], row))
        ranks, rank = self.args.world_size, self.args.process_index
        over = -len(chosen) % ranks
        weighted = [(row, 1.0) for row in chosen] + [(chosen[-1], 0.0)] * over
        return weighted[rank::ranks]

    def _prompt_ids(self, row: int) -> list[int]:
        return self.plan.texts[0].prompt_ids(self.pairs.pair(row))

    def _responses(
        self, prompts: Sequence[list[int]], rows: Sequence[int], step: int
    ) -> list[tuple[list[int], list[int]]]:
        """Two samples to each prompt, in the policy's tokens, with an end of turn unless they were cut."""
        args, each = self.args, self.args.generation_batch_size or len(prompts)
        seeds = np.random.SeedSequence([args.seed, step, args.process_index]).generate_state(-(-len(prompts) // each))
        sampled: list[list[int]] = []
        with self._generating(), whole_policy(self.model, gather=args.ds3_gather_for_generation) as synced:
            for start, seed in zip(range(0, len(prompts), each), seeds.tolist(), strict=True):
                twice = [ids for ids in prompts[start : start + each] for _ in range(2)]
                sampled += sample_responses(
                    self.policy,
                    twice,
                    ends=self.ends,
                    max_new_tokens=self._room(max(map(len, twice))),
                    pad_token_id=self.pad_token_id,
                    device=args.device,
                    seed=seed,
                    synced=synced,
                )
        return list(zip(sampled[::2], sampled[1::2], strict=True))

    def _generating(self) -> AbstractContextManager[Any]:
        """The precision that the policy trains in."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return nullcontext() if half is None else torch.autocast(self.args.device.type, half)

    def _room(self, prompt_length: int) -> int:
        context, most = self.plan.texts[0].max_context, self.args.max_completion_length
        # A pair whose prompt leaves no room for a response is a bad row, so at least one token is left.
        return most if context is None else min(most, context - prompt_length)

    def _tokenized(
        self, rows: Sequence[tuple[int, float]], responses: Sequence[tuple[list[int], list[int]]]
    ) -> Samples:
        """The samples as pairs of every model. One that a model cannot read counts for nothing, and is counted."""
        tokenizer: Any = self.plan.texts[0].tokenizer
        found: list[tuple[PairExample, PreferencePair, tuple[bool, bool]]] = []
        for (row, weight), ids in zip(rows, responses, strict=True):
            cut = (ids[0][-1] not in self.ends, ids[1][-1] not in self.ends)
            chosen, rejected = (
                tokenizer.decode(until(sample, self.ends), skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for sample in ids
            )
            pair = replace(self.pairs.pair(row), chosen=chosen, rejected=rejected)
            try:
                example = PairExample(row, weight, self._tokens(pair, ids, cut))
            except BadRow as error:
                logger.warning("samples for %s are left out: %s", self.pairs.source(row), error)
                example = PairExample(row, 0.0, self.pairs.tokens(row))
            found.append((example, pair, cut))
        # Longest first, so that neighbours pad little.
        found.sort(key=lambda one: -_positions(one[0]))
        return Samples([one[0] for one in found], [one[1] for one in found], [one[2] for one in found])

    def _tokens(
        self, pair: PreferencePair, ids: tuple[list[int], list[int]], cut: tuple[bool, bool]
    ) -> tuple[PairTokens, ...]:
        """For each tokenization; the policy's own are the ids that were sampled. Raises BadRow."""
        tokens = [PairTokens(self.plan.texts[0].prompt_ids(pair), *ids)]
        for text in self.plan.texts[1:]:
            ends = tuple(
                len(response) if short else None
                for response, short in zip((pair.chosen, pair.rejected), cut, strict=True)
            )
            read = text.ids(text.read(pair), (ends[0], ends[1]))
            length = len(read.prompt_ids) + max(len(read.chosen_ids), len(read.rejected_ids))
            if text.max_context is not None and length > text.max_context:
                raise BadRow(f"context_exceeded:{text.name}", f"{length} tokens, its context is {text.max_context}")
            tokens.append(read)
        return tuple(tokens)

    def _parts(self, examples: Sequence[PairExample]) -> list[slice]:
        """Micro-batches of this rank's pairs, the same slices on every rank: of `per_device_train_batch_size` pairs, or within
        `max_tokens_per_micro_batch` on the rank whose pairs are longest."""
        most, each = self.args.max_tokens_per_micro_batch, self.args.train_batch_size
        if most is None:
            return [slice(i, min(i + each, len(examples))) for i in range(0, len(examples), each)]
        tokens = [example.tokens[0] for example in examples]
        lengths_N3 = np.array([[len(t.prompt_ids), len(t.chosen_ids), len(t.rejected_ids)] for t in tokens])
        own = pair_lengths(lengths_N3, shared_prompt=self.shared_prompt, end_to_end=self.end_to_end)
        return cut_by_tokens(all_reduce_max(own.tolist(), world_group()), most, padded=not self.end_to_end)

    def _rewarded(self, samples: Samples) -> Samples:
        if self.reward is None:
            return samples
        with fail_together(world_group()):
            rewards_N = self.reward.scores(
                [pair.prompt for pair in samples.pairs for _ in range(2)],
                [str(text) for pair in samples.pairs for text in (pair.chosen, pair.rejected)],
                [short for cut in samples.cut for short in cut],
            )
        return replace(samples, rewards_P2=rewards_N.view(-1, 2))


def sampled_metrics(policy_logps_P2: Tensor, batch: SampledBatch, names: Sequence[str]) -> dict[str, Tensor]:
    """Metric name -> its value of each sampled pair, [P] float32. ``kl`` of a reference is log pi - log pi_k of a whole sample, not
    clipped: its mean estimates KL(pi || pi_k)."""
    pairs, logps_P2 = batch.pairs, policy_logps_P2.detach()
    metrics = {
        "length": pairs.response_lengths.float().mean(-1),
        "cut": batch.cut_P,
        "identical": batch.identical_P,
    }
    for k, name in enumerate(names):
        metrics[f"kl/{name}"] = (logps_P2 - batch.references.ref_logps_KP2[k]).mean(-1)
    if batch.rewards_P2 is not None:
        metrics["reward"] = batch.rewards_P2.mean(-1)
    return {PREFIX + name: value.float() for name, value in metrics.items()}


def _positions(example: PairExample) -> int:
    tokens = example.tokens[0]
    return len(tokens.prompt_ids) + len(tokens.chosen_ids) + len(tokens.rejected_ids)
