"""Launch 1 of the fused log-probs: hidden states of K heads to online softmax partials, one persistent launch for any K.

Design note. Every program walks output tiles [BLOCK_T tokens, BLOCK_V words] of ``hidden @ W.T``, reference after reference, in
steps of the grid's size, so K heads of unequal D, V and T fill the device like one. A tile stays in registers: bias, scale and
softcap are applied in float32, and only its rows' (max, sum of exp(x - max)) are stored, plainly, at [vocabulary tile, token]; the
max, and the label's logit, as they were before the softcap, which is monotone: launch 2 caps these few in float64. Nobody else
writes there, so nothing locks and a second run gives the same bits. Tiles are ordered in groups of GROUP_T
row tiles: a group's hidden rows stay in L2 while the weight streams past once per group.

The labels' logits are a second loop of the same programs, dots of a hidden row with the indexed weight row: matching labels in
the tile's epilogue costs registers that it does not have (255 and spills, against about 170), and 2TD flops are nothing.

What differs between references sits in a table of int64 rows (addresses, strides, sizes) and one of float32 (softcap, scale), so
no K is compiled, and bias and softcap share one switch: fourteen variants for a GPU, each compiled by the tests and checked for
spills. Offsets are int64 throughout: a head of 262144 x 8192 has 2^31 elements. Rows past the end are clamped, not masked, which
keeps the loads of the inner loop unconditional; their results are masked (a vocabulary's tail again after the softcap, which would
map its -inf to -softcap) or not stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mrpo_kernels.backend import is_aligned


@dataclass(frozen=True)
class Tile:
    """A configuration of the partials kernel; tests compile each and read its registers and spills. ``max_registers`` of a thread:
    None leaves it to the assembler, which does better with the large tiles."""

    block_t: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_t: int = 8
    max_registers: int | None = None


# By compute capability's major number: the newest that is not above the device's.
TILES = {
    8: Tile(128, 128, 64, num_warps=8, num_stages=3),
    9: Tile(128, 256, 64, num_warps=8, num_stages=4),
    10: Tile(128, 256, 64, num_warps=8, num_stages=4),
    12: Tile(128, 128, 64, num_warps=8, num_stages=3),
}
# For float32, which is exact (no TF32) and therefore slow, and for rows that are not 16-byte aligned, whose loads cannot be wide.
# Left to itself the assembler spills a few bytes of some variants to stay within the 168 registers with which three programs fit a
# multiprocessor; only one is launched on each.
PLAIN_TILE = Tile(64, 64, 16, num_warps=4, num_stages=3, max_registers=255)
# The interpreter runs every program in Python: small tiles, so that tests of a few tokens still have several in each direction.
INTERPRETER_TILE = Tile(16, 32, 16, num_warps=1, num_stages=1, group_t=2)
_INTERPRETER_PROGRAMS = 3

# Columns of the int64 table, one row per head.
HIDDEN, HIDDEN_STRIDE, WEIGHT, WEIGHT_STRIDE, BIAS, LABELS, CU_SEQLENS = (tl.constexpr(i) for i in range(7))
NUM_TOKENS, VOCABULARY, WIDTH, FIRST_TILE, FIRST_TOKEN, FIRST_PARTIAL, TILES_V = (tl.constexpr(i) for i in range(7, 14))
COLUMNS = tl.constexpr(14)
# Columns of the float32 table. A softcap of 0 is none. WEIGHT_K is the reference's fixed weight, for the finishing kernel.
SOFTCAP, LOGIT_SCALE, WEIGHT_K = (tl.constexpr(i) for i in range(3))
FLOAT_COLUMNS = tl.constexpr(3)

LOG2_E = tl.constexpr(math.log2(math.e))
LABEL_BLOCK_T, LABEL_BLOCK_D = tl.constexpr(16), tl.constexpr(128)


class Head(NamedTuple):
    """One head's inputs. cu_seqlens: [S+1]; the response of token t is where cu_seqlens[s] <= t < cu_seqlens[s+1]."""

    hidden_TD: Tensor
    weight_VD: Tensor
    labels_T: Tensor
    cu_seqlens: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class Partials(NamedTuple):
    """What launch 2 reads: all heads' partials and label logits, one after the other, and the tables that say where."""

    max_N: Tensor
    sum_N: Tensor
    label_logit_T: Tensor
    table: Tensor
    floats: Tensor
    heads: tuple[Head, ...]  # the tensors behind the table's addresses, alive until launch 2 is queued


@triton.jit
def _exp2_minus_one(t):
    """2^t - 1 for t >= 0. exp2(t) keeps few digits of a small t, so up to 1 it is t times a polynomial: the best of degree 5 for
    (2^t - 1) / t on [0, 1], by Remez's exchange, whose relative error is 2^-26."""
    polynomial = 2.0745577e-4 * t + 1.2710057e-3
    polynomial = polynomial * t + 9.6506509e-3
    polynomial = polynomial * t + 5.5496565e-2
    polynomial = polynomial * t + 2.4022714e-1
    polynomial = polynomial * t + 6.9314717e-1
    return tl.where(t < 1.0, polynomial * t, tl.exp2(t) - 1.0)


@triton.jit
def _sum_of_softcapped(logits, inside, row_max, softcap):
    """Sum over the words inside of exp(c tanh(x / c) - c tanh(m / c)), where c is the softcap and m the row's maximum.

    Neither c tanh(x / c) nor exp(2x / c) keeps the digits of x: the first rounds them to its own size near the ends of the range,
    the second in the middle. m - x has them, so the difference is formed from it: with g = exp(2 (m - x) / c) - 1 and the row's
    s = 1 / (1 + exp(2m / c)) it is -2 c s (1 - s) g / (1 + s g), where nothing cancels, and words at the maximum add exactly 1.
    """
    # Past `end` tanh is 1 to 12 digits, and past 2^80 g changes none of g / (1 + s g): the bounds keep 0 * inf and inf - inf away.
    end, to_power = 14.0 * softcap, 2.0 * LOG2_E / softcap
    top = tl.clamp(row_max, -end, end)
    s, one_minus_s = 1.0 / (1.0 + tl.exp2(top * to_power)), 1.0 / (1.0 + tl.exp2(-top * to_power))
    factor = -2.0 * LOG2_E * softcap * s * one_minus_s
    t = tl.clamp((top[:, None] - logits) * to_power, 0.0, 80.0, propagate_nan=tl.PropagateNan.ALL)
    growth = _exp2_minus_one(t)
    # 1 / (1 + s g) as a square, because a division's extra steps take 50 registers more on sm_90, and spill.
    root = tl.rsqrt(1.0 + s[:, None] * growth)
    below_max = growth * (root * root) * factor[:, None]
    return tl.sum(tl.where(inside, tl.exp2(below_max), 0.0), 1)


@triton.jit
def _sum_of_exponentials(logits, row_max):
    """Sum of exp(x - row_max). 0, not the NaN of -inf + inf, where a bias of -inf bans every word of the tile."""
    return tl.sum(tl.exp(logits - tl.where(row_max == -float("inf"), 0.0, row_max)[:, None]), 1)


@triton.jit
def _load_rows(ptrs, cols, width, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(cols < width)[None, :], other=0.0)


@triton.jit
def _address(row_ptr, column: tl.constexpr, stride_column: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A matrix of the table: (pointer, row stride). The hints let its loads be 16 bytes wide and asynchronous, as those of a kernel
    argument are. They must sit on the pointer (on the integer they are lost): without them nothing is pipelined and tiles spill."""
    ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    stride = tl.load(row_ptr + stride_column)
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
        stride = tl.multiple_of(stride, 8)
    return ptr, stride


@triton.jit
def _num_biases(row_ptr):
    """V, or 0 for a head without a bias among heads with one."""
    return tl.where(tl.load(row_ptr + BIAS) != 0, tl.load(row_ptr + VOCABULARY), 0)


@triton.jit(do_not_specialize=["num_heads"])
def partials_kernel(
    table_ptr, floats_ptr, max_ptr, sum_ptr, label_logit_ptr, num_heads,
    DTYPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
    EVEN_D: tl.constexpr, ALIGNED: tl.constexpr, HAS_TRANSFORM: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    for k in range(num_heads):
        row_ptr = table_ptr + k * COLUMNS
        hidden_ptr, hidden_stride = _address(row_ptr, HIDDEN, HIDDEN_STRIDE, DTYPE, ALIGNED)
        weight_ptr, weight_stride = _address(row_ptr, WEIGHT, WEIGHT_STRIDE, DTYPE, ALIGNED)
        bias_ptr = tl.load(row_ptr + BIAS).to(tl.pointer_type(tl.float32))
        num_tokens, vocabulary = tl.load(row_ptr + NUM_TOKENS), tl.load(row_ptr + VOCABULARY)
        width = tl.load(row_ptr + WIDTH)
        if ALIGNED:
            width = tl.multiple_of(width, 8)
        floats_row_ptr = floats_ptr + k * FLOAT_COLUMNS
        softcap, scale = tl.load(floats_row_ptr + SOFTCAP), tl.load(floats_row_ptr + LOGIT_SCALE)
        tiles_t, tiles_v = tl.cdiv(num_tokens, BLOCK_T).to(tl.int32), tl.cdiv(vocabulary, BLOCK_V).to(tl.int32)
        # Program p takes the tiles whose number, counted over all heads, is p modulo the grid's size.
        first = (program + programs - tl.load(row_ptr + FIRST_TILE).to(tl.int32) % programs) % programs
        partial_offset = tl.load(row_ptr + FIRST_PARTIAL)
        for tile in range(first, tiles_t * tiles_v, programs):
            group = tile // (GROUP_T * tiles_v)
            group_size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
            tile_t = group * GROUP_T + (tile % (GROUP_T * tiles_v)) % group_size
            tile_v = (tile % (GROUP_T * tiles_v)) // group_size
            tokens = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
            words = tile_v.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
            cols = tl.arange(0, BLOCK_D).to(tl.int64)
            hidden_ptrs = hidden_ptr + tl.minimum(tokens, num_tokens - 1)[:, None] * hidden_stride + cols[None, :]
            weight_ptrs = weight_ptr + tl.minimum(words, vocabulary - 1)[:, None] * weight_stride + cols[None, :]
            logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
            for d in range(0, width, BLOCK_D):
                hidden = _load_rows(hidden_ptrs + d, cols + d, width, EVEN_D)
                weight = _load_rows(weight_ptrs + d, cols + d, width, EVEN_D)
                logits = tl.dot(hidden, weight.T, logits, input_precision="ieee")
            if HAS_TRANSFORM:
                logits += tl.load(bias_ptr + words, mask=words < _num_biases(row_ptr), other=0.0)[None, :]
            logits *= scale
            # In 32 bits: as int64 every column's comparison would hold two registers.
            inside = (tl.arange(0, BLOCK_V) < (vocabulary - tile_v.to(tl.int64) * BLOCK_V).to(tl.int32))[None, :]
            logits = tl.where(inside, logits, -float("inf"))
            row_max = tl.max(logits, 1)
            # A branch, not a choice between two results: the tile would have to be kept for the other one, and spills.
            if HAS_TRANSFORM:
                if softcap > 0:
                    row_sum = _sum_of_softcapped(logits, inside, row_max, softcap)
                else:
                    row_sum = _sum_of_exponentials(logits, row_max)
            else:
                row_sum = _sum_of_exponentials(logits, row_max)
            at = partial_offset + tile_v * num_tokens + tokens
            tl.store(max_ptr + at, row_max, mask=tokens < num_tokens)
            tl.store(sum_ptr + at, row_sum, mask=tokens < num_tokens)
        _label_logits(
            row_ptr, label_logit_ptr, hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, scale,
            HAS_TRANSFORM,
        )  # fmt: skip


@triton.jit
def _label_logits(
    row_ptr, label_logit_ptr, hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, scale,
    HAS_TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Each label's logit before the softcap: the dot of its token's hidden row with its weight row; NaN for a label outside the
    vocabulary."""
    num_tokens, vocabulary = tl.load(row_ptr + NUM_TOKENS), tl.load(row_ptr + VOCABULARY)
    width = tl.load(row_ptr + WIDTH)
    labels_ptr = tl.load(row_ptr + LABELS).to(tl.pointer_type(tl.int64))
    for block in range(tl.program_id(0), tl.cdiv(num_tokens, LABEL_BLOCK_T), tl.num_programs(0)):
        tokens = block * LABEL_BLOCK_T + tl.arange(0, LABEL_BLOCK_T).to(tl.int64)
        exists = tokens < num_tokens
        labels = tl.load(labels_ptr + tokens, mask=exists, other=0)
        valid = (labels >= 0) & (labels < vocabulary)
        labels = tl.where(valid, labels, 0)
        cols = tl.arange(0, LABEL_BLOCK_D).to(tl.int64)
        products = tl.zeros((LABEL_BLOCK_T, LABEL_BLOCK_D), dtype=tl.float32)
        for d in range(0, width, LABEL_BLOCK_D):
            mask = exists[:, None] & ((cols + d) < width)[None, :]
            hidden = tl.load(hidden_ptr + tokens[:, None] * hidden_stride + (cols + d)[None, :], mask=mask, other=0.0)
            weight = tl.load(weight_ptr + labels[:, None] * weight_stride + (cols + d)[None, :], mask=mask, other=0.0)
            products += hidden.to(tl.float32) * weight.to(tl.float32)
        logit = tl.sum(products, 1)
        if HAS_TRANSFORM:
            logit += tl.load(bias_ptr + labels, mask=labels < _num_biases(row_ptr), other=0.0)
        logit *= scale
        logit = tl.where(valid, logit, float("nan"))
        tl.store(label_logit_ptr + tl.load(row_ptr + FIRST_TOKEN) + tokens, logit, mask=exists)


INTERPRETED = not isinstance(partials_kernel, triton.runtime.JITFunction)


def vocabulary_partials(heads: Sequence[Head], ref_weights: Sequence[float] | None = None) -> Partials:
    """Launch 1 over all heads (no launch if no head has a token). ``ref_weights`` only travel in the float table."""
    heads = [_prepared(head) for head in heads]
    device = heads[0].hidden_TD.device
    aligned = heads[0].hidden_TD.dtype != torch.float32 and all(
        is_aligned(matrix) for head in heads for matrix in (head.hidden_TD, head.weight_VD)
    )
    if INTERPRETED:  # whose product of bfloat16 matrices is wrong; float32 holds the same numbers
        heads = [head._replace(hidden_TD=head.hidden_TD.float(), weight_VD=head.weight_VD.float()) for head in heads]
    dtype = heads[0].hidden_TD.dtype
    tile = _tile(device, aligned)
    rows: list[list[int]] = []
    tiles = tokens = partials = 0
    for hidden_TD, weight_VD, labels_T, cu_seqlens, bias_V, _, _ in heads:
        (num_tokens, width), vocabulary = hidden_TD.shape, weight_VD.shape[0]
        addresses = [hidden_TD.data_ptr(), hidden_TD.stride(0), weight_VD.data_ptr(), weight_VD.stride(0)]
        addresses += [0 if bias_V is None else bias_V.data_ptr(), labels_T.data_ptr(), cu_seqlens.data_ptr()]
        tiles_v = triton.cdiv(vocabulary, tile.block_v)
        rows.append([*addresses, num_tokens, vocabulary, width, tiles, tokens, partials, tiles_v])
        tiles += triton.cdiv(num_tokens, tile.block_t) * tiles_v
        tokens += num_tokens
        partials += num_tokens * tiles_v
    out = Partials(
        torch.empty(partials, dtype=torch.float32, device=device),
        torch.empty(partials, dtype=torch.float32, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device),
        _to_device(rows, torch.int64, device),
        float_table([(head.softcap or 0.0, head.logit_scale) for head in heads], ref_weights, device),
        tuple(heads),
    )
    if tiles:
        with torch.cuda.device_of(out.max_N):
            partials_kernel[(min(_num_programs(device), tiles),)](
                out.table, out.floats, out.max_N, out.sum_N, out.label_logit_T, len(heads),
                DTYPE=_triton_dtype(dtype), BLOCK_T=tile.block_t, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP_T=tile.group_t,
                EVEN_D=aligned and all(head.hidden_TD.shape[1] % tile.block_d == 0 for head in heads), ALIGNED=aligned,
                HAS_TRANSFORM=any(head.bias_V is not None or head.softcap for head in heads),
                num_warps=tile.num_warps, num_stages=tile.num_stages,
                maxnreg=tile.max_registers,
            )  # fmt: skip
    return out


def _prepared(head: Head) -> Head:
    """With the dtypes and strides that the table promises; copies only what differs."""
    return head._replace(
        hidden_TD=_rows_contiguous(head.hidden_TD),
        weight_VD=_rows_contiguous(head.weight_VD),
        labels_T=head.labels_T.long().contiguous(),
        cu_seqlens=head.cu_seqlens.to(head.hidden_TD.device, torch.int32).contiguous(),
        bias_V=None if head.bias_V is None else head.bias_V.float().contiguous(),
    )


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def float_table(
    softcap_and_scale: Sequence[tuple[float, float]], weights: Sequence[float] | None, device: torch.device
) -> Tensor:
    weights = weights or [0.0] * len(softcap_and_scale)
    return _to_device(
        [[*pair, weight] for pair, weight in zip(softcap_and_scale, weights, strict=True)], torch.float32, device
    )


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _to_device(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Through pinned memory: a pageable copy would make the host wait for everything queued before it."""
    table = torch.tensor(rows, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.cache
def _tile(device: torch.device, aligned: bool) -> Tile:
    if INTERPRETED:
        return INTERPRETER_TILE
    if not aligned:
        return PLAIN_TILE
    capability = torch.cuda.get_device_capability(device)[0]
    return TILES[max(major for major in TILES if major <= capability)]


@functools.cache
def _num_programs(device: torch.device) -> int:
    return _INTERPRETER_PROGRAMS if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
