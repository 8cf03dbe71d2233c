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
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from mrpo_kernels import CombinedReferences
from mrpo_kernels.chunked_head import response_sums
from torch import Tensor, nn

from mrpo_scale.base.device import send
from mrpo_scale.base.ranks import all_gather_object, all_reduce_max, fail_together, sum_over_ranks, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.data.alignment import AlignedResponse, SettledPieces, read_pieces, settled_pieces
from mrpo_scale.data.dealing import cut_by_tokens, pair_lengths
from mrpo_scale.data.pair_dataset import PairDataset
from mrpo_scale.data.pairs import BadRow, PairTokens, PreferencePair
from mrpo_scale.data.window import PairExample
from mrpo_scale.logps.generation import sample_responses, until
from mrpo_scale.logps.micro_batches import MicroBatch, policy_batches
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.objective import Objective, combine
from mrpo_scale.references.reward import RewardModel
from mrpo_scale.references.scores import LiveScores, ReferenceScores
from mrpo_scale.training.aligned_loss import SettledPlaces, SettledValues, aligned_loss, settled_values
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
    settled: SettledValues | None  #: of `kd_level: aligned`, as are
    pieces_P: Tensor  #: the mean number of pieces of the two samples, between settled cuts
    reread_P: Tensor  #: 1 where a reference reads the pieces in other tokens than the whole text, else 0


@dataclass(frozen=True)
class Samples:
    """This rank's two samples to each of P prompts, the longest first."""

    examples: list[PairExample]
    pairs: list[PreferencePair]  #: prompt and the texts of both samples
    cut: list[tuple[bool, bool]]
    aligned: list[AlignedResponse]  #: two to a prompt; without a cut unless `kd_level: aligned`
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

        self.aligned = args.objective == "kd" and args.kd_level == "aligned"

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

    def score(self, samples: Samples) -> tuple[CombinedReferences, SettledValues | None]:
        """The references of the samples, in their order; of `kd_level: aligned` also what they say of settled beginnings."""
        if not self.aligned:
            return self.scores.score(samples.examples, self.pairs, self.objective), None
        assert isinstance(self.scores, LiveScores)
        token_logps, device = self.scores.token_logps(samples.examples), self.args.device
        tokenizations = [reference.tokenization for reference in self.plan.references]
        bounds = [send(_bounds(samples.examples, v), device) for v in tokenizations]
        raw_KP2 = torch.stack([response_sums(x, cu).view(-1, 2) for x, cu in zip(token_logps, bounds, strict=True)])
        references = combine(raw_KP2, self.objective, self.args.head_impl)
        places = SettledPlaces.of(samples.aligned, tokenizations).to(device)
        policy_bounds = send(_bounds(samples.examples, 0), device)
        return references, settled_values(token_logps, bounds, places, policy_bounds, references, self.objective)

    def micro_batches(
        self, samples: Samples, references: CombinedReferences, settled: SettledValues | None
    ) -> list[SampledBatch]:
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
        counts = torch.tensor([len(r.pieces.texts) for r in samples.aligned], dtype=torch.float32)
        pieces_P = send(counts.view(-1, 2).mean(-1), device)
        reread_P = send(torch.tensor([r.reread for r in samples.aligned[::2]], dtype=torch.float32), device)
        bounds = _bounds(samples.examples, 0)[::2].tolist()
        return [
            SampledBatch(
                **{f.name: getattr(batch, f.name) for f in fields(batch)},
                total=total,
                rewards_P2=None if samples.rewards_P2 is None else samples.rewards_P2[part],
                cut_P=cut_P[part],
                identical_P=identical_P[part],
                pieces_P=pieces_P[part],
                reread_P=reread_P[part],
                settled=None if settled is None else settled[bounds[part.start] : bounds[part.stop]],
            )
            for part, batch in zip(parts, batches, strict=True)
        ]

    def loss(self, batch: SampledBatch, logps: Tensor, pairs: slice = slice(None)) -> SampledLoss:
        """Of some ``pairs`` of a micro-batch, whose policy log-probs these are: [P, 2], or of each token where the batch has
        settled values."""
        by_tokens = self.objective.name == "kd" and self.args.kd_normalize == "tokens"
        if batch.settled is not None:
            first, last, _ = pairs.indices(batch.pairs.num_pairs)
            tokens = slice(batch.pairs.bounds[first], batch.pairs.bounds[last])
            return aligned_loss(
                logps,
                batch.pairs.cu_seqlens[2 * first : 2 * last + 1] - tokens.start,
                batch.references[pairs],
                self.objective,
                batch.settled[tokens],
                by_tokens=by_tokens,
            )
        return sampled_loss(
            logps,
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
        found: list[tuple[PairExample, PreferencePair, tuple[bool, bool], list[AlignedResponse]]] = []
        for (row, weight), ids in zip(rows, responses, strict=True):
            cut = (ids[0][-1] not in self.ends, ids[1][-1] not in self.ends)
            chosen, rejected = (self._decode(until(sample, self.ends)) for sample in ids)
            pair = replace(self.pairs.pair(row), chosen=chosen, rejected=rejected)
            try:
                tokens, aligned = self._tokens(pair, ids, cut)
                example = PairExample(row, weight, tokens)
            except BadRow as error:
                logger.warning("samples for %s are left out: %s", self.pairs.source(row), error)
                example = PairExample(row, 0.0, self.pairs.tokens(row))
                aligned = [AlignedResponse(length) for length in example.tokens[0].scored_lengths]
            found.append((example, pair, cut, aligned))
        # Longest first, so that neighbours pad little.
        found.sort(key=lambda one: -_positions(one[0]))
        examples, pairs, cuts, aligned_of = (list(column) for column in zip(*found, strict=True))
        return Samples(examples, pairs, cuts, [response for both in aligned_of for response in both])

    def _decode(self, ids: Sequence[int]) -> str:
        tokenizer: Any = self.plan.texts[0].tokenizer
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tokens(
        self, pair: PreferencePair, ids: tuple[list[int], list[int]], cut: tuple[bool, bool]
    ) -> tuple[tuple[PairTokens, ...], list[AlignedResponse]]:
        """For each tokenization, the policy's own being the ids that were sampled, and where both are settled. Raises BadRow."""
        tokens, reads = [PairTokens(self.plan.texts[0].prompt_ids(pair), *ids)], []
        others = self.plan.texts[1:]
        if self.aligned and others:
            first, second = (settled_pieces(self._decode, until(sample, self.ends)) for sample in ids)
        else:
            first, second = (SettledPieces((str(text),), (), ()) for text in (pair.chosen, pair.rejected))
        for text in others:
            read = read_pieces(text, pair, (first, second), cut)
            length = len(read.tokens.prompt_ids) + max(len(read.tokens.chosen_ids), len(read.tokens.rejected_ids))
            if text.max_context is not None and length > text.max_context:
                raise BadRow(f"context_exceeded:{text.name}", f"{length} tokens, its context is {text.max_context}")
            tokens.append(read.tokens)
            reads.append(read)
        reread = not all(read.as_whole for read in reads)
        return tuple(tokens), [
            AlignedResponse(len(sample), pieces, tuple(read.before[side] for read in reads), reread)
            for side, (sample, pieces) in enumerate(zip(ids, (first, second), strict=True))
        ]

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
    if batch.settled is not None:
        metrics |= {"pieces": batch.pieces_P, "reread": batch.reread_P}
    if batch.rewards_P2 is not None:
        metrics["reward"] = batch.rewards_P2.mean(-1)
    return {PREFIX + name: value.float() for name, value in metrics.items()}


def _bounds(examples: Sequence[PairExample], tokenization: int) -> Tensor:
    """[2P+1] int64 boundaries of the responses of P examples in one of their tokenizations."""
    lengths = [length for example in examples for length in example.tokens[tokenization].scored_lengths]
    return torch.tensor([0, *accumulate(lengths)])


def _positions(example: PairExample) -> int:
    tokens = example.tokens[0]
    return len(tokens.prompt_ids) + len(tokens.chosen_ids) + len(tokens.rejected_ids)
