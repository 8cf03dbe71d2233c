"""A preference loss straight from hidden states, with its gradients made in the forward: no logits kept, none computed twice.

Design note. References are scored before the policy, so when a pair's two log-probs are known, so is its loss and with it the one
number per response that its logits' gradient is scaled by. A chunk of whole pairs therefore goes through the head once: logits,
softmax in place, the pairs' log-probs, their coefficients, dlogits in the same memory, and the two products that turn those into
d_hidden and d_weight. That is 6TDV operations where a backward that recomputes logits needs 8TDV (T tokens, D hidden, V
vocabulary). The price: hidden's gradient and a float32 d_weight wait through the body's backward, and the loss must be a sum over
pairs. Backward multiplies what is stored by the upstream scalar.

A pair with more tokens than a chunk holds takes the recompute path by itself (8TDV for that pair, no more memory): its coefficients
of chosen and rejected may differ, so the alternative, unscaled weight gradients, would take two more matrices as large as the head.

T tokens, D hidden, V vocabulary, P pairs; responses 2p and 2p + 1 are pair p's chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mrpo_kernels.chunked_head import (
    HeadGradients,
    OutputHead,
    accumulation_dtype,
    add_tile_gradients,
    d_logits_,
    head_gradients,
    operand_dtype,
    response_sums,
    softmax_,
    token_logps,
    word_tiles,
)
from mrpo_kernels.sequence_logps import check_inputs

# Bytes of one chunk's logits, which span the vocabulary. On a GPU, fewer chunks mean less traffic in the float32 weight gradient.
_CHUNK_BYTES = {"cpu": 40 << 20, "cuda": 1 << 30}

LossOfPairs = Callable[[Tensor, slice], Tensor]


class LinearPreferenceLoss(NamedTuple):
    loss: Tensor  #: scalar, differentiable in hidden, weight and bias, once
    policy_logps_P2: Tensor  #: for metrics; carries no gradient
    token_logps_T: Tensor | None = None  #: the same of each token, under ``per_token``


def linear_preference_loss(
    hidden_TD: Tensor,
    head_weight_VD: Tensor,
    labels_T: Tensor,
    cu_seqlens: Tensor,
    loss_of_pairs: LossOfPairs,
    *,
    bounds: Sequence[int] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    per_token: bool = False,
) -> LinearPreferenceLoss:
    """``loss_of_pairs(log-probs).sum()`` of :func:`~mrpo_kernels.sequence_logps`' log-probs, and its gradients, in one pass.

    Args:
        hidden_TD, head_weight_VD, labels_T, bias, softcap, logit_scale: as there.
        cu_seqlens: [2P+1] integers from 0 to T; chosen and rejected of a pair are neighbours.
        bounds: [P+1] of the pairs, ``cu_seqlens[::2]``, which the host cuts chunks by; None: read from it, which waits for a GPU.
        loss_of_pairs: maps (policy_logps_C2, pairs) to the losses [C] of the pairs ``pairs.start .. pairs.stop - 1``, each already
            weighted by its share of the batch. It is differentiated by autograd in its first argument, called once per chunk,
            and must treat pairs independently; whatever else it needs (combined references, weights) it slices by ``pairs``::

                lambda logps_C2, pairs: weight_P[pairs] * loss_against(logps_C2, references[pairs], objective).losses_P

        per_token: ``loss_of_pairs`` gets the log-prob of each token of those pairs, [bounds[pairs.stop] - bounds[pairs.start]],
            for a loss that weighs the tokens of a response differently.

    Returns:
        LinearPreferenceLoss, float32 (float64 for float64 inputs). Where no gradient is wanted, none is computed. With no tokens
        at all the weight still gets a gradient, of zeros, so that a rank without pairs takes part in ZeRO-3's collectives.

    Raises:
        ValueError: inputs that do not fit, or losses that are not [C].
        RuntimeError: on a second backward through the same loss; the gradients were given away in the first.
    """
    check_inputs(hidden_TD, head_weight_VD, labels_T, cu_seqlens, bias, softcap)
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens) - 1} responses; expected two for each pair")
    wants_gradients = torch.is_grad_enabled()
    bounds = cu_seqlens[::2].tolist() if bounds is None else list(bounds)
    if len(bounds) != len(cu_seqlens) // 2 + 1 or bounds[-1] > len(labels_T):
        raise ValueError(f"bounds {bounds} are not those of {len(cu_seqlens) // 2} pairs in {len(labels_T)} tokens")
    inputs = (hidden_TD, head_weight_VD, bias, labels_T, cu_seqlens, bounds, loss_of_pairs, per_token)
    loss, policy_logps_P2, token_logps_T = _LinearPreferenceLoss.apply(*inputs, softcap, logit_scale, wants_gradients)
    return LinearPreferenceLoss(loss, policy_logps_P2, token_logps_T if per_token else None)


class _LinearPreferenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        cu_seqlens: Tensor,
        bounds: list[int],
        loss_of_pairs: LossOfPairs,
        per_token: bool,
        softcap: float | None,
        logit_scale: float,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = [wants_gradients and need for need in ctx.needs_input_grad[:3]]
        dtype = accumulation_dtype(hidden_TD.dtype)
        head = OutputHead(weight_VD, bias_V, softcap, logit_scale)
        batch = _Batch(hidden_TD, head, labels_T, cu_seqlens, bounds, loss_of_pairs, per_token)
        fresh = torch.zeros if not len(labels_T) else torch.empty
        totals = HeadGradients(
            torch.empty_like(hidden_TD, dtype=operand_dtype(hidden_TD)) if needs[0] else None,
            fresh(weight_VD.shape, dtype=dtype, device=weight_VD.device) if needs[1] else None,
            fresh(weight_VD.shape[:1], dtype=dtype, device=weight_VD.device) if needs[2] else None,
        )
        with torch.autocast(hidden_TD.device.type, enabled=False):  # it would round products whose dtype is chosen here
            loss, policy_logps_P2, token_logps_T = _loss_and_gradients(batch, totals, any(needs))
        ctx.totals = totals
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(policy_logps_P2, token_logps_T)
        return loss, policy_logps_P2, token_logps_T

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        totals, ctx.totals = ctx.totals, None
        if totals is None:
            raise RuntimeError("linear_preference_loss gives its gradients away in backward; it cannot run twice")
        # A host can look whether there is anything to do; looking at a device's scalar would stall it.
        one = d_loss.device.type == "cpu" and d_loss.item() == 1.0
        scaled = [
            None if total is None else _scaled(total, d_loss, dtype, one)
            for total, dtype in zip(totals, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None, None, None, None


def _scaled(total: Tensor, d_loss: Tensor, dtype: torch.dtype, one: bool) -> Tensor:
    if total.dtype == dtype:
        return total if one else total.mul_(d_loss)
    return torch.mul(total, d_loss, out=torch.empty_like(total, dtype=dtype))  # scaled and rounded in one pass


class _Batch(NamedTuple):
    hidden_TD: Tensor
    head: OutputHead
    labels_T: Tensor
    cu_seqlens: Tensor
    bounds: list[int]
    loss_of_pairs: LossOfPairs
    per_token: bool


class _Scored(NamedTuple):
    """Whole pairs after the head: C tokens, or C pairs of 2 responses."""

    losses_C: Tensor
    logps_C2: Tensor
    token_logps_C: Tensor


def _loss_and_gradients(batch: _Batch, totals: HeadGradients, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(scalar loss, policy_logps_P2, token_logps_T, empty unless asked for); fills ``totals``."""
    vocabulary, device = batch.head.weight_VD.shape[0], batch.hidden_TD.device
    dtype = accumulation_dtype(batch.hidden_TD.dtype)
    bounds = batch.bounds
    # A softcap keeps its slope beside the logits.
    bytes_per_token = 4 * vocabulary * (1 if batch.head.softcap is None else 2)
    capacity = max(1, _CHUNK_BYTES.get(device.type, 1 << 30) // bytes_per_token)
    chunks = chunks_of_pairs(bounds, capacity)
    longest = max((n for pairs in chunks if (n := bounds[pairs.stop] - bounds[pairs.start]) <= capacity), default=0)
    memory = _logits_memory(batch, longest if gradients else 0)

    loss = torch.zeros((), dtype=torch.float64, device=device)
    logps_P2 = torch.zeros(len(bounds) - 1, 2, dtype=dtype, device=device)
    token_logps_T = torch.zeros(bounds[-1] if batch.per_token else 0, dtype=dtype, device=device)
    first = True
    for pairs in chunks:
        tokens = slice(bounds[pairs.start], bounds[pairs.stop])
        if gradients and 0 < tokens.stop - tokens.start <= capacity:
            scored = _one_pass(batch, pairs, tokens, totals, first, memory)
        else:
            scored = _two_passes(batch, pairs, tokens, totals, first, gradients)
        loss += scored.losses_C.double().sum()
        logps_P2[pairs] = scored.logps_C2
        if batch.per_token:
            token_logps_T[tokens] = scored.token_logps_C
        first = first and tokens.stop == tokens.start
    return loss.to(dtype), logps_P2, token_logps_T


def chunks_of_pairs(bounds: list[int], capacity: int) -> list[slice]:
    """Neighbouring pairs whose tokens together fit ``capacity``, or one larger pair. bounds: [P+1] token offsets."""
    chunks: list[slice] = []
    start = 0
    for pair in range(1, len(bounds)):
        if pair > start + 1 and bounds[pair] - bounds[start] > capacity:
            chunks.append(slice(start, pair - 1))
            start = pair - 1
    if len(bounds) - 1 > start:
        chunks.append(slice(start, len(bounds) - 1))
    return chunks


def _one_pass(
    batch: _Batch, pairs: slice, tokens: slice, totals: HeadGradients, first: bool, memory_TV: Tensor
) -> _Scored:
    """Logits once, gradients into totals."""
    operand = operand_dtype(batch.hidden_TD)
    hidden_CD, labels_C = batch.hidden_TD[tokens].to(operand), batch.labels_T[tokens]
    logits_CV = memory_TV[: len(labels_C)]
    tiles = _weight_tiles(batch.head, operand)
    for words in tiles:
        part_CV = batch.head.part(words, operand).uncapped(hidden_CD, logits_CV[:, words])
    logits_CV, slope_CV = batch.head.cap_with_slope_(part_CV if len(tiles) == 1 else logits_CV)
    label_logits_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    max_C, log_sum_C = softmax_(logits_CV)
    scored, d_token_C = _coefficients(batch, pairs, tokens, (label_logits_C - max_C) - log_sum_C)
    d_logits_CV = d_logits_(logits_CV, labels_C, 0, d_token_C)
    d_hidden_CD = None if totals.hidden_TD is None else totals.hidden_TD[tokens]
    for words in tiles:
        part = batch.head.part(words, operand)
        slope = None if slope_CV is None else slope_CV[:, words]
        add_tile_gradients(
            d_logits_CV[:, words],
            slope,
            hidden_CD,
            part,
            words,
            d_hidden_CD,
            totals,
            first_words=words.start == 0,
            first_tokens=first,
        )
    return scored


def _two_passes(
    batch: _Batch, pairs: slice, tokens: slice, totals: HeadGradients, first: bool, gradients: bool
) -> _Scored:
    """The same by recomputing logits, for a pair larger than a chunk; or without gradients, or without tokens."""
    hidden_CD, labels_C = batch.hidden_TD[tokens], batch.labels_T[tokens]
    logps_C, max_C, log_sum_C = token_logps(hidden_CD, batch.head, labels_C)
    scored, d_token_C = _coefficients(batch, pairs, tokens, logps_C)
    if gradients:
        own = totals._replace(hidden_TD=None if totals.hidden_TD is None else totals.hidden_TD[tokens])
        head_gradients(hidden_CD, batch.head, labels_C, d_token_C, (max_C, log_sum_C), own, add=not first)
    return scored


def _coefficients(batch: _Batch, pairs: slice, tokens: slice, token_logps_C: Tensor) -> tuple[_Scored, Tensor]:
    """The loss of whole pairs, and its derivative in each token's log-prob."""
    cu_seqlens = batch.cu_seqlens[2 * pairs.start : 2 * pairs.stop + 1] - tokens.start
    logps_C2 = response_sums(token_logps_C, cu_seqlens).view(-1, 2)
    with torch.enable_grad():
        leaf = (token_logps_C if batch.per_token else logps_C2).clone().requires_grad_()
        losses_C = batch.loss_of_pairs(leaf, pairs)
        if losses_C.shape != logps_C2.shape[:1]:
            raise ValueError(
                f"loss_of_pairs gave {tuple(losses_C.shape)} for {len(logps_C2)} pairs; expected one loss each"
            )
        (d_token_C,) = torch.autograd.grad(losses_C.sum(), leaf)
    if not batch.per_token:
        counts = cu_seqlens.diff().long()
        d_token_C = torch.repeat_interleave(d_token_C.flatten(), counts, output_size=len(token_logps_C))
    return _Scored(losses_C.detach(), logps_C2, token_logps_C.detach()), d_token_C


def _weight_tiles(head: OutputHead, operand: torch.dtype) -> list[slice]:
    """The whole head; in pieces where it has to be upcast, which must not make a second copy of it. Not where it is rounded to a
    low precision: its products then come in memory of their own, which pieces would have to be put together from."""
    vocabulary, width = head.weight_VD.shape
    if operand in (head.weight_VD.dtype, torch.bfloat16, torch.float16):
        return [slice(0, vocabulary)]
    return word_tiles(width, vocabulary, head.weight_VD.device.type)


def _logits_memory(batch: _Batch, num_tokens: int) -> Tensor:
    """One allocation for every chunk; only its dtype where the device's products come in memory of their own."""
    dtype = accumulation_dtype(batch.hidden_TD.dtype)
    device = batch.hidden_TD.device if operand_dtype(batch.hidden_TD) == dtype else "meta"
    return torch.empty(num_tokens, batch.head.weight_VD.shape[0], dtype=dtype, device=device)
