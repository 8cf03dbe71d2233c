"""Launch 2 of the fused log-probs: partials to per-response log-probs, and on to the virtual reference.

Design note. One program per response (``sequence_logps``) or per pair (``virtual_reference``, over all K references). A program
reduces its tokens' (max, sum) over the vocabulary tiles, both read along the token axis, and adds the token log-probs up in
float64: a 4,096-token response stays exact to the last float32 digit. The pair kernel keeps its K x 2 log-probs in registers and
goes through Equations 9, 8, 10 and Proposition 1 at once, so K * S + S numbers leave the device and the arithmetic of a dozen
small torch kernels costs none. How to clip, weigh and aggregate are arguments, not constants, and a pair's block has room for
``MAX_REFERENCES``: three variants of these kernels serve every run on a GPU, and all three are compiled by the tests. It is the
same arithmetic as :mod:`mrpo_kernels.virtual_reference`, from the rounded log-probs in float32 but for the power mean, and reads
given log-probs (partition, cache) with the same code: cached and live references agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrpo_kernels.backend import MAX_REFERENCES
from mrpo_kernels.partials import (
    COLUMNS,
    CU_SEQLENS,
    FIRST_PARTIAL,
    FIRST_TOKEN,
    FLOAT_COLUMNS,
    NUM_TOKENS,
    SOFTCAP,
    TILES_V,
    WEIGHT_K,
    Partials,
)
from mrpo_kernels.virtual_reference import CLIPS, WEIGHTINGS, CombinedReferences, exponent_of

BLOCK_T, BLOCK_N = 32, 32
# Left to itself the assembler spills 8 bytes of the pair kernel to stay within 80 registers, although it has one program per pair.
NUM_WARPS, MAX_REGISTERS = 4, 168
ADAPTIVE, NO_CLIP = (tl.constexpr(list(CLIPS).index(name)) for name in ("adaptive", "none"))
CONFIDENCE, UNIFORM = (tl.constexpr(list(WEIGHTINGS).index(name)) for name in ("confidence", "uniform"))
FIXED = len(WEIGHTINGS)  # the K numbers of the float table
# Up to it, three terms of expm1(t) and two of log1p have 12 digits; past it, a plain logarithm's rounding over p leaves as many.
NEAR = tl.constexpr(2.0**-12)


@triton.jit
def _softcapped(x, softcap):
    """softcap * tanh(x / softcap), or x where softcap is 0, in float64: what is left of two such numbers near softcap, a label's
    logit and its row's maximum, would lose to their rounding the digits that launch 1 keeps."""
    x = x.to(tl.float64)
    if softcap > 0:
        cap = softcap.to(tl.float64)
        x = cap - 2.0 * cap / (1.0 + tl.exp(x * (2.0 / cap)))
    return x


@triton.jit
def _response_logp(
    row_ptr, softcap, response, max_ptr, sum_ptr, label_logit_ptr, token_max_ptr, token_log_sum_ptr,
    STORE_TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One response's log-prob in float64; its tokens' logsumexp, as (max, log of sum), is stored for a backward."""
    cu_seqlens_ptr = tl.load(row_ptr + CU_SEQLENS).to(tl.pointer_type(tl.int32))
    begin, end = tl.load(cu_seqlens_ptr + response), tl.load(cu_seqlens_ptr + response + 1)
    num_tokens = tl.load(row_ptr + NUM_TOKENS)
    broken = (begin < 0) | (end < begin) | (end > num_tokens)  # nothing is read, and the log-prob is NaN
    end = tl.where(broken, begin, end)
    tiles_v = tl.load(row_ptr + TILES_V)
    first_token, first_partial = tl.load(row_ptr + FIRST_TOKEN), tl.load(row_ptr + FIRST_PARTIAL)
    total = tl.zeros((BLOCK_T,), dtype=tl.float64)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T).to(tl.int64)
        exists = tokens < end
        running_max = tl.full((BLOCK_T,), -float("inf"), dtype=tl.float64)
        running_sum = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for tile_v in range(0, tiles_v, BLOCK_N):
            tiles = tile_v + tl.arange(0, BLOCK_N).to(tl.int64)
            at = first_partial + tiles[:, None] * num_tokens + tokens[None, :]
            mask = (tiles < tiles_v)[:, None] & exists[None, :]
            maxima = _softcapped(tl.load(max_ptr + at, mask=mask, other=-float("inf")), softcap)
            maxima = tl.where(mask, maxima, -float("inf"))  # which the softcap has mapped to -softcap
            sums = tl.load(sum_ptr + at, mask=mask, other=0.0)
            new_max = tl.maximum(running_max, tl.max(maxima, 0))
            # While only banned words (and no running sum) were seen, the max is -inf and -inf - -inf would be NaN.
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            below_shift = (maxima - shift[None, :]).to(tl.float32)
            running_sum *= tl.exp((running_max - shift).to(tl.float32))
            running_sum += tl.sum(sums * tl.exp(below_shift), 0)
            running_max = new_max
        log_sum = tl.log(tl.where(exists, running_sum, 1.0).to(tl.float64))
        label_logit = _softcapped(tl.load(label_logit_ptr + first_token + tokens, mask=exists, other=0.0), softcap)
        # The label's logit and the tiles' add the same products up in different orders: a word's log-prob could exceed zero by that
        # digit, which turns the clip's bounds around. NaN is not above zero and stays.
        token_logp = (label_logit - running_max) - log_sum
        total += tl.where(exists & ~(token_logp > 0.0), token_logp, 0.0)
        if STORE_TOKENS:
            tl.store(token_max_ptr + first_token + tokens, running_max.to(tl.float32), mask=exists)
            tl.store(token_log_sum_ptr + first_token + tokens, log_sum.to(tl.float32), mask=exists)
    return tl.where(broken, float("nan"), tl.sum(total, 0))


@triton.jit
def response_sums_kernel(
    table_ptr, floats_ptr, max_ptr, sum_ptr, label_logit_ptr, logps_ptr, token_max_ptr, token_log_sum_ptr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    response = tl.program_id(0)
    logp = _response_logp(
        table_ptr, tl.load(floats_ptr + SOFTCAP), response, max_ptr, sum_ptr, label_logit_ptr, token_max_ptr, token_log_sum_ptr,
        True, BLOCK_T, BLOCK_N,
    )  # fmt: skip
    tl.store(logps_ptr + response, logp.to(tl.float32))


@triton.jit
def _power_mean(logps_K2, weights_K, p):
    """:func:`~mrpo_kernels.virtual_reference.aggregate_logps` of one pair, in float64. Rows without weight are left out."""
    used_K1 = (weights_K != 0)[:, None]
    logps_K2 = tl.where(used_K1, logps_K2, 0.0).to(tl.float64)
    p = tl.cast(p, tl.float64)
    if tl.abs(p) == float("inf"):
        sign = tl.where(p > 0, -1.0, 1.0)
        broken_K2 = tl.where(logps_K2 != logps_K2, logps_K2, 0.0)  # tl.min would skip a NaN
        mean_2 = sign * tl.min(tl.where(used_K1, sign * logps_K2, float("inf")), 0) + tl.sum(broken_K2, 0)
    else:
        shares_K = weights_K.to(tl.float64)
        shares_K /= tl.sum(shares_K, 0)
        mean_2 = tl.sum(shares_K[:, None] * logps_K2, 0)
        if p != 0:
            t_K2 = tl.where(used_K1, p * (logps_K2 - mean_2[None, :]), 0.0)
            near_2 = tl.sum(shares_K[:, None] * (t_K2 * (1.0 + t_K2 * (0.5 + t_K2 * (1.0 / 6.0)))), 0)
            near_2 -= 0.5 * near_2 * near_2
            logs_K1 = tl.log(tl.where(weights_K != 0, shares_K, 1.0))[:, None]
            x_K2 = tl.where(used_K1, logs_K1 + p * logps_K2, -float("inf"))
            top_2 = tl.max(x_K2, 0)
            shift_2 = tl.where(tl.abs(top_2) < float("inf"), top_2, 0.0)  # infinite minus infinite would be NaN
            far_2 = shift_2 + tl.log(tl.sum(tl.exp(x_K2 - shift_2[None, :]), 0))
            mean_2 = tl.where(tl.max(tl.abs(t_K2), 0) < NEAR, mean_2 + near_2 / p, far_2 / p)
    return mean_2.to(tl.float32)


@triton.jit
def _combine(raw_K2, fixed_weights_K, ks, num_refs, epsilon_max, clip, weights, exponent):
    """Equations 9, 8, 10 and the power mean of one pair. Rows past num_refs are zeros and get weight zero."""
    anchor_2 = tl.sum(tl.where((ks == 0)[:, None], raw_K2, 0.0), 0)
    epsilon_2 = tl.zeros_like(anchor_2) + tl.where(clip == NO_CLIP, float("inf"), epsilon_max)
    if clip == ADAPTIVE:
        size_2 = tl.abs(tl.sum(raw_K2, 0))
        size = tl.sum(size_2, 0)
        epsilon_2 = epsilon_max * tl.where(size > 0, size_2 / tl.where(size > 0, size, 1.0), 0.5)
    clipped_K2 = raw_K2
    if clip != NO_CLIP:
        lower_2, upper_2 = (1.0 + epsilon_2) * anchor_2, (1.0 - epsilon_2) * anchor_2
        # A reference that scored NaN must stay NaN: without the flag the hardware's max would return the bound.
        inside_K2 = tl.maximum(raw_K2, lower_2[None, :], propagate_nan=tl.PropagateNan.ALL)
        inside_K2 = tl.minimum(inside_K2, upper_2[None, :], propagate_nan=tl.PropagateNan.ALL)
        clipped_K2 = tl.where((ks == 0)[:, None], raw_K2, inside_K2)

    weights_K = fixed_weights_K
    if weights == UNIFORM:
        weights_K = tl.zeros_like(fixed_weights_K) + 1.0 / num_refs
    elif weights == CONFIDENCE:
        sign_2 = 1.0 - 2.0 * tl.arange(0, 2)
        gaps_K = tl.abs(tl.sum(raw_K2 * sign_2[None, :], 1))
        gap = tl.sum(gaps_K, 0)
        weights_K = tl.where(gap > 0, gaps_K / tl.where(gap > 0, gap, 1.0), 1.0 / num_refs)
    weights_K = tl.where(ks < num_refs, weights_K, 0.0)
    return _power_mean(clipped_K2, weights_K, exponent), weights_K, epsilon_2, clipped_K2


# Otherwise a step with one pair, or sixteen, or log-probs that are a view, would each wait for a compilation of its own.
@triton.jit(do_not_specialize=["raw_ptr", "num_refs", "num_pairs", "clip", "weights"])
def virtual_reference_kernel(
    table_ptr, floats_ptr, max_ptr, sum_ptr, label_logit_ptr, raw_ptr,
    virtual_ptr, weights_ptr, epsilon_ptr, clipped_ptr, num_refs, num_pairs, epsilon_max,
    clip, weights, exponent,
    FROM_LOGPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program p: pair p of every reference. ``raw_ptr`` [K, P, 2] is read if FROM_LOGPS, else written."""
    pair = tl.program_id(0).to(tl.int64)
    ks, sides = tl.arange(0, BLOCK_K), tl.arange(0, 2)
    live_K = ks < num_refs
    at_K2 = (ks[:, None] * num_pairs + pair) * 2 + sides[None, :]
    if FROM_LOGPS:
        raw_K2 = tl.load(raw_ptr + at_K2, mask=live_K[:, None], other=0.0)
    else:
        raw_K2 = tl.zeros((BLOCK_K, 2), dtype=tl.float32)
        for i in range(2 * num_refs):
            logp = _response_logp(
                table_ptr + (i // 2) * COLUMNS, tl.load(floats_ptr + (i // 2) * FLOAT_COLUMNS + SOFTCAP), 2 * pair + i % 2,
                max_ptr, sum_ptr, label_logit_ptr, max_ptr, sum_ptr, False, BLOCK_T, BLOCK_N,
            )  # fmt: skip
            here = (ks == i // 2)[:, None] & (sides == i % 2)[None, :]
            raw_K2 = tl.where(here, logp.to(tl.float32), raw_K2)
        tl.store(raw_ptr + at_K2, raw_K2, mask=live_K[:, None])
    fixed_weights_K = tl.load(floats_ptr + ks * FLOAT_COLUMNS + WEIGHT_K, mask=live_K, other=0.0)
    virtual_2, weights_K, epsilon_2, clipped_K2 = _combine(
        raw_K2, fixed_weights_K, ks, num_refs, epsilon_max, clip, weights, exponent
    )
    tl.store(virtual_ptr + pair * 2 + sides, virtual_2)
    tl.store(epsilon_ptr + pair * 2 + sides, epsilon_2)
    tl.store(weights_ptr + ks * num_pairs + pair, weights_K, mask=live_K)
    tl.store(clipped_ptr + at_K2, clipped_K2, mask=live_K[:, None])


def response_logps(partials: Partials, num_responses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Launch 2 for one head: (logps_S, max_T, log_sum_T), all float32."""
    max_T, log_sum_T = torch.empty_like(partials.label_logit_T), torch.empty_like(partials.label_logit_T)
    logps_S = torch.empty(num_responses, dtype=torch.float32, device=max_T.device)
    if num_responses:
        with torch.cuda.device_of(logps_S):
            response_sums_kernel[(num_responses,)](
                partials.table, partials.floats, partials.max_N, partials.sum_N, partials.label_logit_T,
                logps_S, max_T, log_sum_T, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N,
                num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    return logps_S, max_T, log_sum_T


def combine(
    partials: Partials | None,
    raw_KP2: Tensor,
    floats: Tensor,
    epsilon_max: float,
    clip: str,
    ref_weights: str | Sequence[float],
    aggregate: str | float,
) -> CombinedReferences:
    """Launch 2 for K references.

    Args:
        partials: of launch 1, and ``raw_KP2`` is filled; or None, and ``raw_KP2`` holds the log-probs.
        floats: the table that has the weights where they are numbers.
    """
    num_refs, num_pairs, _ = raw_KP2.shape
    clipped_KP2, weights_KP = torch.empty_like(raw_KP2), raw_KP2.new_empty(num_refs, num_pairs)
    virtual_P2, epsilon_P2 = raw_KP2.new_empty(num_pairs, 2), raw_KP2.new_empty(num_pairs, 2)
    weights = list(WEIGHTINGS).index(ref_weights) if isinstance(ref_weights, str) else FIXED
    if num_pairs:
        # Without partials their pointers are never read: any tensor does.
        given = partials or Partials(floats, floats, floats, table=floats, floats=floats, heads=())
        with torch.cuda.device_of(raw_KP2):
            virtual_reference_kernel[(num_pairs,)](
                given.table, floats, given.max_N, given.sum_N, given.label_logit_T, raw_KP2,
                virtual_P2, weights_KP, epsilon_P2, clipped_KP2,
                num_refs, num_pairs, float(epsilon_max), list(CLIPS).index(clip), weights, exponent_of(aggregate),
                FROM_LOGPS=partials is None, BLOCK_K=MAX_REFERENCES, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N,
                num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    return CombinedReferences(raw_KP2, virtual_P2, weights_KP, epsilon_P2, clipped_KP2)
