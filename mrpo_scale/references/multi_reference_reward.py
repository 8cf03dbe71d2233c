"""The K KL terms of Eq. 6 as a plain reward function, for whoever keeps a reinforcement learning library of one reference.

As the weights sum to 1,

    r - beta sum_k alpha_k (log pi - log pi_k) = [r + beta sum_{k>=2} alpha_k (log pi_k - log pi_1)] - beta (log pi - log pi_1).

The bracket needs no log-prob of the policy; the rest is the library's own KL to its one reference, pi_1. That has to be the
log-ratio itself (k1) within the reward, and nothing may clip or normalise the bracket: docs/reward.md has each library's settings.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mrpo_kernels.virtual_reference import CLIPS, clip_to_anchor
from torch import Tensor

from mrpo_scale.base.errors import ConfigError, TrainingError, refuse
from mrpo_scale.config.data_keys import PLAIN_TEMPLATE
from mrpo_scale.config.model_spec import ModelSpec, parse_ref_models
from mrpo_scale.data.pairs import Message, PairTokens
from mrpo_scale.data.tokenization import ModelText
from mrpo_scale.models.plan import ANCHOR, load_tokenizer, num_embeddings, pad_token_id
from mrpo_scale.models.source import ReferenceSource, resolve_source
from mrpo_scale.models.tensor_check import check_model
from mrpo_scale.objective import Objective
from mrpo_scale.references.live import Reference, padded_lengths, score_in_step
from mrpo_scale.references.reward import RewardModel, loading_dtype, sample_tokens
from mrpo_scale.references.sharding import ShardedReference

#: As TRL calls them: ``(prompts=, completions=, completion_ids=, **columns)`` -> a number for each completion.
RewardFunction = Callable[..., Sequence[float]]


class MultiReferenceReward:
    """The bracket above for samples, called as TRL calls a reward function.

    Args:
        anchor: pi_1, the model that the library's own KL is to: the policy's starting weights. A folder, a hub id, or a mapping as
            `ref_models` has them.
        ref_models: pi_2, pi_3, ...
        beta: the library's own KL coefficient, the same number.
        ref_weights: alpha, K numbers that sum to 1, the anchor's first; or ``uniform``.
        reward: r: a :class:`RewardModel`, its folder or mapping, or a reward function; None: 0, where the library adds r itself.
        clip: ``none``, or ``fixed``: log pi_k within epsilon_max of log pi_1 (Eq. 8).
        device: default: the current GPU, else the CPU.
        dtype: of all models that do not name one; None: float32 on a CPU, elsewhere what their config.json says.
        group: None: every process holds whole models. A process group: each of its ranks holds a part, and then every call is
            collective over it, with any number of samples on each rank, none too.
        tokens_per_forward, shared_prompt: as for references that are scored live.
        plain_template, date: see :class:`~mrpo_scale.data.model_text.ModelText`.

    Raises:
        ConfigError: a model that cannot be used; weights or a clip that make no reward of one sample.
    """

    def __init__(
        self,
        anchor: str | Mapping[str, Any],
        ref_models: Sequence[str | Mapping[str, Any]],
        *,
        beta: float,
        ref_weights: str | Sequence[float],
        reward: RewardModel | str | Mapping[str, Any] | RewardFunction | None = None,
        clip: str = "none",
        epsilon_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
        tokens_per_forward: int = 16384,
        shared_prompt: str = "auto",
        plain_template: str = PLAIN_TEMPLATE,
        date: datetime.date | None = None,
    ) -> None:
        specs = [*parse_ref_models([anchor], "anchor"), *parse_ref_models(ref_models)]
        self.beta, self.clip, self.epsilon_max = beta, clip, epsilon_max
        self.weights = _check_modes(beta, ref_weights, clip, epsilon_max, len(specs))
        self.tokens_per_forward = tokens_per_forward
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.texts: list[ModelText] = []
        self.references: list[Reference] = []
        names = [ANCHOR, *(spec.name or Path(spec.model).name for spec in specs[1:])]
        planned = [_plan(spec, name, device, dtype) for spec, name in zip(specs, names, strict=True)]
        if isinstance(reward, (str, Mapping)):
            reward = RewardModel.load(reward, device=device, dtype=dtype, plain_template=plain_template, date=date)
        self.reward = reward
        for k, (spec, (source, rows, context)) in enumerate(zip(specs, planned, strict=True)):
            tokenizer = load_tokenizer(ModelSpec(source.files, revision=spec.revision), source.name)
            text = ModelText(
                tokenizer,
                name=source.name,
                max_context=context,
                chat_template=spec.chat_template,
                plain_template=plain_template,
                system=spec.system,
                date=date,
            )
            model = ShardedReference(source, group, device, shared_prompt=shared_prompt)
            self.texts.append(text)
            self.references.append(Reference(source.name, model, k, pad_token_id(tokenizer, rows)))
        # What ends a sample: the template's end of turn, or, of a text without a template, the tokenizer's own.
        self._ends = {self.texts[0].response_ids("", raw=raw, cut=False)[-1] for raw in (False, True)}

    def __call__(
        self,
        prompts: Sequence[list[Message] | str],
        completions: Sequence[list[Message] | str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """The bracket of each of N samples.

        Args:
            prompts: conversations, or texts that every model reads as they are.
            completions: the responses: texts, or one assistant message each.
            completion_ids: the tokens that the policy sampled, its end of turn among them: the anchor, whose tokens they are, is
                scored on these, since tokens -> text -> tokens is not the identity. Without them it is scored on the text, which
                then counts as whole.
            columns: what else the library passes; a reward function gets it.

        Raises:
            ConfigError: a conversation that a template rejects, or that is longer than a model's context.
            TrainingError: a number that is not finite.
        """
        texts = [_text_of(completion) for completion in completions]
        cut = [False] * len(texts) if completion_ids is None else [ids[-1] not in self._ends for ids in completion_ids]
        term_N = multi_reference_term(
            self.ref_logps(prompts, texts, completion_ids, cut), self.weights, self.clip, self.epsilon_max
        )
        rewards_N = self.beta * term_N
        if isinstance(self.reward, RewardModel):
            rewards_N += self.reward.scores(prompts, texts, cut).to(rewards_N)
        elif self.reward is not None:
            assert callable(self.reward)
            given = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            rewards_N += torch.tensor(list(given)).to(rewards_N)
        if not rewards_N.isfinite().all():
            raise TrainingError(f"{int((~rewards_N.isfinite()).sum())} of {len(rewards_N)} rewards are not finite.")
        return rewards_N.tolist()

    def ref_logps(
        self,
        prompts: Sequence[list[Message] | str],
        responses: Sequence[str],
        response_ids: Sequence[Sequence[int]] | None = None,
        cut: Sequence[bool] | None = None,
    ) -> Tensor:
        """log pi_k [K, N] of whole responses, float32 sums over the tokens that each reference reads; see :meth:`__call__`.

        Args:
            cut: which responses have no end of turn; None: all have one.
        """
        cut = [False] * len(responses) if cut is None else cut
        logps_K = []
        for reference, text in zip(self.references, self.texts, strict=True):
            samples = [sample_tokens(text, *sample) for sample in zip(prompts, responses, cut, strict=True)]
            if reference.tokenization == 0 and response_ids is not None:
                samples = [(prompt, list(ids)) for (prompt, _), ids in zip(samples, response_ids, strict=True)]
            logps_K.append(self._score(reference, samples))
        return torch.stack(logps_K)

    def _score(self, reference: Reference, samples: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """[N] log-probs of responses in one reference's tokens. A response without tokens has the probability 1."""
        places, pairs = _pair_up(samples)
        logps_N = torch.zeros(len(samples), device=reference.model.device)
        lengths = padded_lengths(pairs, reference.model.shared_prompt)
        order = sorted(range(len(pairs)), key=lambda i: -lengths[i])
        longest_first = [pairs[i] for i in order]
        for part, logps_P2 in score_in_step(reference, longest_first, self.tokens_per_forward):
            logps_N[[place for i in order[part] for place in places[i]]] = logps_P2.flatten()
        return logps_N


def multi_reference_term(
    ref_logps_KN: Tensor, weights: Sequence[float], clip: str = "none", epsilon_max: float = 0.1
) -> Tensor:
    """sum_{k>=2} alpha_k (log pi_k - log pi_1) [N] of log-probs [K, N], those of k >= 2 clipped by Eq. 8; in float64."""
    logps_KN = ref_logps_KN.double()
    clipped_KN = clip_to_anchor(logps_KN, CLIPS[clip](logps_KN, epsilon_max))
    weights_K1 = logps_KN.new_tensor(weights)[:, None]
    return (weights_K1 * (clipped_KN - logps_KN[0]))[1:].sum(0)


def _check_modes(
    beta: float, ref_weights: str | Sequence[float], clip: str, epsilon_max: float, num_references: int
) -> list[float]:
    """The weights as numbers. Raises ConfigError."""
    Objective(beta=beta, epsilon_max=epsilon_max, clip=clip, ref_weights=ref_weights).check_references(num_references)
    problems = []
    if isinstance(ref_weights, str) and ref_weights != "uniform":
        problems.append(
            f"`ref_weights: {ref_weights}` comes from pairs whose better response is known, and samples have none; give K numbers, "
            "or `uniform`"
        )
    if clip == "adaptive":
        problems.append(
            "`clip: adaptive` makes the epsilon of a sample depend on the samples beside it, which biases a baseline of those; use "
            "`fixed` or `none`"
        )
    refuse(problems)
    return [1 / num_references] * num_references if isinstance(ref_weights, str) else [float(w) for w in ref_weights]


def _plan(
    spec: ModelSpec, name: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[ReferenceSource, int | None, int | None]:
    """Where a model comes from, the rows of its embedding and its context. No weights load."""
    if spec.url:
        raise ConfigError(f"`{spec.model}` at {spec.url}: a served model scores no samples here; name its folder.")
    source = resolve_source(
        ReferenceSource(
            name=name,
            path=spec.model,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            attn_implementation=spec.attn_implementation,
            quantize=spec.quantize,
        )
    )
    config = check_model(source)
    source = replace(source, dtype=loading_dtype(spec, config, device, dtype))
    return source, num_embeddings(config), getattr(config.get_text_config(), "max_position_embeddings", None)


def _text_of(completion: list[Message] | str) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and isinstance(completion[0].get("content"), str):
        return completion[0]["content"]
    raise ConfigError(
        f"a completion of {len(completion)} messages: only plain assistant turns are scored; generate without tools."
    )


def _pair_up(samples: Sequence[tuple[list[int], list[int]]]) -> tuple[list[tuple[int, ...]], list[PairTokens]]:
    """(the two samples of each pair, the pairs): two of one prompt share its forward; one that is left stands in both places."""
    places: list[tuple[int, ...]] = []
    waiting: dict[tuple[int, ...], int] = {}
    for i, (prompt, response) in enumerate(samples):
        if not response:
            continue
        first = waiting.pop(tuple(prompt), None)
        if first is None:
            waiting[tuple(prompt)] = i
        else:
            places.append((first, i))
    places += [(i, i) for i in waiting.values()]
    return places, [PairTokens(samples[i][0], samples[i][1], samples[j][1]) for i, j in places]
