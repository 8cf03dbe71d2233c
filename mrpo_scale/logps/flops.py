"""Exact FLOPs of a step: what every matrix product of policy and references costs, from a model's config and token counts.

A product of [m, k] and [k, n] is 2mkn; nothing else is counted (norms, activations and softmax are thousandths of it). Attention
counts what its calls are given, not what a mask lets through: under sdpa and eager a mask over pairs is applied to a full square of
scores, span by span attention (a CPU's) has a rectangle for each response. A GPU's variable-length kernels skip what lies above the
diagonal (what they compute beyond it, within a block, and what a window would spare are left out). tests/logps/test_flops.py
compares with torch's own counter over real forwards and backwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from mrpo_kernels.cpu_linear import CpuLinear
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mrpo_scale.logps.attention_choice import head_size, named_size
from mrpo_scale.logps.attention_ways import WAYS
from mrpo_scale.logps.layer_masks import decoder_layers, parameters_of
from mrpo_scale.logps.pair_batch import PairBatch, packed_rows
from mrpo_scale.logps.span_attention import SPAN_ATTENTION

#: Attention kernels that skip what lies above the diagonal and take sequences without their padding.
SKIPS_THE_MASKED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", *WAYS)


@dataclass(frozen=True)
class UnitCosts:
    """FLOPs of one forward of a model, per unit of work."""

    per_position: int  #: all linear layers but the head
    per_score: int  #: both products of attention, all layers and heads, per (query, key) pair
    per_response_token: int  #: the output head
    recomputed_per_position: int  #: the linear layers that gradient checkpointing runs once more
    attn_implementation: str = "sdpa"


class Work(NamedTuple):
    """What a model is given in one forward, or in several: add them up."""

    positions: int  #: rows times width, padding included
    keys: int  #: positions whose keys and values attention is handed; span by span, a prompt counts once for each response
    scores: int  #: (query, key) pairs that attention computes in one head of one layer
    masked: int  #: those of them that have an entry in a mask
    response_tokens: int  #: what reaches the head: those that are scored

    def __add__(self, other: tuple[int, ...]) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


NO_WORK = Work(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ForwardFlops:
    """Of one model: the scoring of a window by a reference, say."""

    body: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.body + self.attention + self.head


@dataclass(frozen=True)
class TrainingFlops:
    """Of the policy: what a step executes, part by part.

    ``backward``: of the body and its attention. ``recompute``: the decoder layers once more, under gradient checkpointing, and the
    scores that fused attention kernels compute again. ``head``: everything the head does, in the forward or in the backward.
    """

    forward: int
    backward: int
    recompute: int
    head: int
    useful: int  #: forward and backward as mathematics asks for them, recomputation left out: what an MFU is a share of

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recompute + self.head


def unit_costs(model: PreTrainedModel) -> UnitCosts:
    """Of a causal LM, loaded, partitioned or on the meta device: only the sizes of its layers are read.

    Raises:
        ConfigError: the config lacks a field that attention's size is made of; the message names it.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    linear = sum(2 * _size(module) for module in model.modules() if _size(module) and module is not head)
    linear += 2 * _used_of_experts(model, config)
    layers, heads = (named_size(config, name) for name in ("num_hidden_layers", "num_attention_heads"))
    return UnitCosts(
        per_position=linear,
        per_score=2 * 2 * layers * heads * head_size(config),
        per_response_token=2 * _size(head),
        recomputed_per_position=sum(_recomputed(layer, config) for layer in decoder_layers(model)),
        attn_implementation=str(config._attn_implementation),
    )


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a matrix of every expert of a layer, stacked."""
    return [module for module in model.modules() if _stacked(module)]


def _stacked(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the stacked matrices of a module of experts; none of any other. ZeRO-3 leaves the parameters themselves empty."""
    shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in module.parameters(recurse=False)]
    return [shape for shape in shapes if len(shape) == 3 and shape[0] == getattr(module, "num_experts", None)]


def active_parameters(model: PreTrainedModel) -> int:
    """Of a mixture of experts those that a token meets, of other models all."""
    experts = sum(math.prod(shape) for module in expert_modules(model) for shape in _stacked(module))
    return parameters_of([model]) - experts + _used_of_experts(model, model.config.get_text_config())


def _used_of_experts(module: nn.Module, config: PretrainedConfig) -> int:
    """Elements of the experts' matrices in ``module`` that a token is multiplied by: those of the experts that it is sent to."""
    shapes = [shape for experts in expert_modules(module) for shape in _stacked(experts)]
    sent_to = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)  # Aria's name
    return sum(math.prod(shape) // shape[0] * min(sent_to or shape[0], shape[0]) for shape in shapes)


def work_of_batch(batch: PairBatch, attn_implementation: str = SPAN_ATTENTION) -> Work:
    """Of one forward, on this rank. ``attn_implementation``: of a batch end to end; padded rows have a mask under any."""
    if batch.group is not None:
        whole = work_of_batch(replace(batch, group=None), attn_implementation)
        return over_ranks(whole, batch.group.size)._replace(response_tokens=len(batch.labels_T))
    rows, width = batch.input_ids_BL.shape
    responses = len(batch.labels_T)
    if batch.spans is None:
        return _masked_work(rows, width, responses)
    calls = [(trunk, branches or (0,)) for trunk, branches in batch.spans.lengths]
    keys = sum(trunk + n for trunk, branches in calls for n in branches)
    if attn_implementation in SKIPS_THE_MASKED:
        seen = sum(_causal(trunk) + sum(trunk * n + _causal(n) for n in branches) for trunk, branches in calls)
        return Work(rows * width, keys, seen, 0, responses)
    first = sum((trunk + branches[0]) ** 2 for trunk, branches in calls)
    masked = sum(n * (trunk + n) for trunk, branches in calls for n in branches[1:])
    return Work(rows * width, keys, first + masked, masked, responses)


def work_of_lengths(
    lengths_P3: np.ndarray,
    *,
    scored: int | None = None,
    shared_prompt: bool,
    end_to_end: bool = False,
    attn_implementation: str = "sdpa",
) -> Work:
    """Of one forward over P pairs, laid out as :func:`~mrpo_scale.logps.pair_batch.collate_pairs` does.

    Args:
        lengths_P3: tokens of prompt, chosen and rejected.
        scored: response tokens that are scored, of all pairs together; None: all.
    """
    if not len(lengths_P3):
        return NO_WORK
    prompt_P, chosen_P, rejected_P = np.asarray(lengths_P3, dtype=np.int64).T
    responses = int((chosen_P + rejected_P).sum()) if scored is None else scored
    sides_S = np.concatenate([prompt_P + chosen_P, prompt_P + rejected_P])
    lengths = prompt_P + chosen_P + rejected_P if shared_prompt else sides_S
    if attn_implementation == SPAN_ATTENTION:
        masked = int((rejected_P * (prompt_P + rejected_P)).sum()) if shared_prompt else 0
        squares = ((prompt_P + chosen_P) ** 2).sum() if shared_prompt else (sides_S**2).sum()
        return Work(int(lengths.sum()), int(sides_S.sum()), int(squares) + masked, masked, responses)
    width = int(lengths.max())
    rows = len(packed_rows(lengths.tolist(), width)) if shared_prompt else len(lengths)
    if attn_implementation in SKIPS_THE_MASKED:
        twice = _causal(prompt_P).sum() if shared_prompt else 0  # the prompt's own scores, which are computed once
        positions = int(lengths.sum()) if end_to_end else rows * width
        keys = int(sides_S.sum()) if end_to_end else positions
        return Work(positions, keys, int(_causal(sides_S).sum() - twice), 0, responses)
    return _masked_work(rows, width, responses)


def over_ranks(work: Work, size: int) -> Work:
    """What a rank of a sequence group has of a forward: a part of the tokens and of the heads, under whole masks. Of response
    tokens, which stand at the end of a pair, the most that it can have."""
    positions = -(-work.positions // size)
    parts = (
        positions,
        -(-work.keys // size),
        -(-work.scores // size),
        work.masked,
        min(work.response_tokens, positions),
    )
    return work if size == 1 else Work(*parts)


def _causal(length: Any) -> Any:
    """Scores of a text with itself, up to the diagonal."""
    return length * (length + 1) // 2


def _masked_work(rows: int, width: int, responses: int) -> Work:
    """Of rows under one mask each."""
    return Work(rows * width, rows * width, rows * width**2, rows * width**2, responses)


def forward_flops(costs: UnitCosts, work: Work) -> ForwardFlops:
    """Of a forward without gradient, such as a reference's."""
    return ForwardFlops(
        body=costs.per_position * work.positions,
        attention=costs.per_score * work.scores,
        head=costs.per_response_token * work.response_tokens,
    )


def training_flops(
    costs: UnitCosts, work: Work, *, gradient_checkpointing: bool, gradients_in_forward: bool, frozen: bool = False
) -> TrainingFlops:
    """Of the policy's forward and backward.

    Args:
        frozen: its weights get no gradient of their own, as under an adapter, whose own products are left out (a percent).
        gradients_in_forward: ``head_backward``: 6TDV, or 8TDV where the backward computes the logits again.
    """
    forward = forward_flops(costs, work)
    layers = forward.body + forward.attention
    # A fused kernel keeps no scores: its backward starts with the product of queries and keys, half of its forward.
    scores_again = 0 if costs.attn_implementation == "eager" else forward.attention // 2
    rerun = costs.recomputed_per_position * work.positions + forward.attention
    return TrainingFlops(
        forward=layers,
        backward=2 * layers - frozen * forward.body,
        recompute=scores_again + rerun * gradient_checkpointing,
        head=forward.head * ((3 if gradients_in_forward else 4) - frozen),
        useful=3 * forward.total - frozen * (forward.body + forward.head),
    )


def total_work(parts: Sequence[Work]) -> Work:
    """The sum; none at all is no work."""
    return Work(*(sum(column) for column in zip(NO_WORK, *parts, strict=True)))


def _recomputed(layer: nn.Module, config: PretrainedConfig) -> int:
    """FLOPs per position of a decoder layer's second forward, attention left out. Torch stops it once everything that the backward
    needs is there again, and nothing needs the output of the last projection unless a norm follows. A CpuLinear notes what it
    needs when its product is done, so it is not spared."""
    products = [module for module in layer.modules() if _size(module)]
    if routed := _used_of_experts(layer, config):
        return 2 * routed + sum(2 * _size(module) for module in products)
    spared = not hasattr(layer, "post_feedforward_layernorm") and not isinstance(products[-1], CpuLinear)
    return sum(2 * _size(module) for module in (products[:-1] if spared else products))


def _size(module: nn.Module) -> int:
    """Elements of a linear layer's weight; from its attributes, because ZeRO-3 leaves the weight itself empty."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, Conv1D):  # GPT-2's name for a linear layer
        return module.nx * module.nf
    return 0
