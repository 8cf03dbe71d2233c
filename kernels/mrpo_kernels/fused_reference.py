"""Hidden states of K frozen references to one virtual reference, in two launches for any K.

Design note. Scoring K references one by one leaves K pipelines that drain at their ends, K launches of every small step, and the
dozen kernels of Equations 8-10. Here one persistent launch (:mod:`~mrpo_kernels.partials`) walks the tiles of all K heads, whatever
their D, V and T, and one small launch (:mod:`~mrpo_kernels.finish`) goes from partials to ref_logps_KP2 and the virtual log-probs.
References are constants: nothing here is differentiable. The torch path is :func:`sequence_logps` per reference and
:func:`combine_references`; it is the CPU's and the oracle. Log-probs that are there already (partition, cache) are combined by
the same code: cached and live references agree bit for bit.

K references, P pairs, S = 2P responses; responses 2p and 2p+1 are pair p's chosen and rejected; reference 0 is the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrpo_kernels.backend import resolve_impl
from mrpo_kernels.sequence_logps import check_inputs, sequence_logps
from mrpo_kernels.virtual_reference import CombinedReferences, check_modes, combine_references


@torch.no_grad()
def virtual_reference(
    hidden: Sequence[Tensor],
    head_weight: Sequence[Tensor],
    labels: Sequence[Tensor],
    cu_seqlens: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None] | None = None,
    softcap: Sequence[float | None] | None = None,
    logit_scale: Sequence[float] | None = None,
    epsilon_max: float,
    clip: str,
    ref_weights: str | Sequence[float],
    aggregate: str | float,
    impl: str = "auto",
) -> CombinedReferences:
    """Score P pairs with K references and combine them; each sequence has one entry per reference.

    Args:
        hidden: [T_k, D_k] each, already shifted as in :func:`sequence_logps`; head_weight: [V_k, D_k]; labels: [T_k].
        cu_seqlens: [2P+1] each: the token counts differ between references, the responses do not.
        bias, softcap, logit_scale: per reference, or None where no reference has one.
        epsilon_max, clip, ref_weights, aggregate: as in :func:`combine_references`.
        impl: ``auto``, ``triton`` (at most 64 references, all on one device in one dtype) or ``torch``.

    Returns:
        CombinedReferences, float32 (float64 for float64 inputs), without gradient.

    Raises:
        ValueError: sequences or inputs that do not fit, an unknown mode, or ``triton`` for tensors it cannot take.
        RuntimeError: ``triton`` on a machine that cannot run it.
    """
    num_refs = len(hidden)
    bias = [None] * num_refs if bias is None else bias
    softcap = [None] * num_refs if softcap is None else softcap
    logit_scale = [1.0] * num_refs if logit_scale is None else logit_scale
    _check_references(hidden, head_weight, labels, cu_seqlens, bias, softcap, logit_scale)
    check_modes(clip, ref_weights, aggregate, num_refs)
    heads = list(zip(hidden, head_weight, labels, cu_seqlens, bias, softcap, logit_scale, strict=True))
    if resolve_impl(impl, (*hidden, *head_weight), references=num_refs) == "torch":
        logps_K = [
            sequence_logps(h, w, y, cu, bias=b, softcap=cap, logit_scale=scale, impl="torch")
            for h, w, y, cu, b, cap, scale in heads
        ]
        raw_KP2 = torch.stack(logps_K).view(num_refs, -1, 2)
        return _combine(raw_KP2, epsilon_max, clip, ref_weights, aggregate, impl)

    from mrpo_kernels.finish import combine
    from mrpo_kernels.partials import Head, vocabulary_partials

    fixed = None if isinstance(ref_weights, str) else ref_weights
    partials = vocabulary_partials([Head(*head) for head in heads], fixed)
    raw_KP2 = torch.empty(num_refs, len(cu_seqlens[0]) // 2, 2, dtype=torch.float32, device=hidden[0].device)
    return combine(partials, raw_KP2, partials.floats, epsilon_max, clip, ref_weights, aggregate)


@torch.no_grad()
def combine_logps(
    ref_logps_KP2: Tensor,
    *,
    epsilon_max: float,
    clip: str,
    ref_weights: str | Sequence[float],
    aggregate: str | float,
    impl: str = "auto",
) -> CombinedReferences:
    """The same from log-probs that are there already (partition, cache), raw and [K, P, 2].

    On a GPU this is the finishing launch of :func:`virtual_reference` itself; in torch, and for float64, it is
    :func:`combine_references`. Raises as :func:`virtual_reference` does.
    """
    if ref_logps_KP2.ndim != 3 or ref_logps_KP2.shape[2] != 2:
        raise ValueError(f"ref_logps_KP2 must be [references, pairs, 2], got {tuple(ref_logps_KP2.shape)}")
    check_modes(clip, ref_weights, aggregate, ref_logps_KP2.shape[0])
    return _combine(ref_logps_KP2, epsilon_max, clip, ref_weights, aggregate, impl)


def _combine(
    raw_KP2: Tensor,
    epsilon_max: float,
    clip: str,
    ref_weights: str | Sequence[float],
    aggregate: str | float,
    impl: str,
) -> CombinedReferences:
    """By the implementation that log-probs like these get, wherever they come from: heads that are left to cuBLAS are no reason for
    a live window to be finished by other code than a cached one."""
    num_refs = raw_KP2.shape[0]
    if resolve_impl(impl, (raw_KP2,), products=False, references=num_refs) == "torch":
        return combine_references(
            raw_KP2, epsilon_max=epsilon_max, clip=clip, ref_weights=ref_weights, aggregate=aggregate
        )

    from mrpo_kernels.finish import combine
    from mrpo_kernels.partials import float_table

    fixed = None if isinstance(ref_weights, str) else ref_weights
    floats = float_table([(0.0, 1.0)] * num_refs, fixed, raw_KP2.device)
    return combine(None, raw_KP2.float().contiguous(), floats, epsilon_max, clip, ref_weights, aggregate)


def _check_references(*per_reference: Sequence) -> None:
    names = ("hidden", "head_weight", "labels", "cu_seqlens", "bias", "softcap", "logit_scale")
    counts = {name: len(values) for name, values in zip(names, per_reference, strict=True)}
    if len(set(counts.values())) > 1 or not counts["hidden"]:
        raise ValueError(f"one entry per reference, and at least one, got {counts}")
    responses = {len(cu_seqlens) - 1 for cu_seqlens in per_reference[3]}
    if len(responses) > 1 or next(iter(responses)) % 2:
        raise ValueError(f"every reference scores the same 2P responses, got {sorted(responses)}")
    for k, inputs in enumerate(zip(*per_reference[:6], strict=True)):
        try:
            check_inputs(*inputs)
        except ValueError as error:
            raise ValueError(f"reference {k}: {error}") from None
