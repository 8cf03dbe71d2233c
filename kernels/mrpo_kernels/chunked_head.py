"""The output head in tiles of [tokens, words], in torch: what the CPU runs, what cuBLAS runs, and the oracle of the Triton kernels.

Design note. A pass whose logsumexp is known, or need not be known yet, walks *vocabulary* tiles in its inner loop and up to
``_BLOCK_TOKENS`` tokens at once: each row of the weight, and of its gradient, then passes through memory once per block, and with a
single block its gradient is written once and needs no float32 copy. A pass that needs a token's whole row of probabilities at once
(:mod:`~mrpo_kernels.linear_preference_loss`) takes chunks of tokens instead. Both use the pieces below.

Elementwise passes over a tile cost as much as memory does, so there are few: the maximum, one fused softmax in place, and the
maximum again, because 1 / max(softmax) is the sum of exponentials, correct to one rounding. Gradients reuse the tile's memory.

Operands are the inputs' dtype on a GPU, where the tensor cores sum in float32 and hand that out; on a CPU operands of
low precision are upcast tile by tile. Logits, softmax and gradients are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mrpo_kernels.cpu_linear import fast, fast_product

# Bytes of one tile of logits. On a CPU few large operations beat small ones that fit the L2 (a tile is read four times, and every
# operation ends in a barrier of the threads); on a GPU a tile must fill the device, which [16384, 4096] does.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Tokens per walk through the vocabulary: enough that streaming the weight costs little beside its products.
_BLOCK_TOKENS = {"cpu": 1024, "cuda": 16384}
# Words of one product that comes in memory of its own: small enough to be read back from the cache.
_PRODUCT_WORDS = 2048


class OutputHead(NamedTuple):
    """``softcap(scale * (hidden @ W.T + bias))``."""

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    scale: float

    def part(self, words: slice, dtype: torch.dtype) -> OutputHead:
        """The same head over some words, its weight in ``dtype``."""
        bias_V = None if self.bias_V is None else self.bias_V[words]
        return OutputHead(self.weight_VD[words].to(dtype), bias_V, self.softcap, self.scale)

    def uncapped(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Logits [C, V] before the softcap in the accumulation dtype, in ``out_CV``'s memory where the device allows."""
        if fast(hidden_CD, self.weight_VD, out_CV):
            logits_CV = out_CV
            for words in _product_tiles(len(self.weight_VD)):
                logits_CV[:, words] = fast_product(hidden_CD, self.weight_VD[words])
        elif hidden_CD.dtype == out_CV.dtype:
            logits_CV = torch.mm(hidden_CD, self.weight_VD.t(), out=out_CV)
        else:
            # cuBLAS can hand out its float32 sums; rounded to bfloat16 they would cost tenths of a nat per response.
            logits_CV = torch.mm(hidden_CD, self.weight_VD.t(), out_dtype=out_CV.dtype)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1.0:
            logits_CV *= self.scale
        return logits_CV

    def cap_(self, logits_CV: Tensor) -> Tensor:
        """Final logits, in place."""
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def cap_with_slope_(self, logits_CV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Final logits, in place, and d softcap(x) / dx as a new tensor; None without a softcap.

        The slope comes from the tanh itself: near 1, a rounding more (from final logits) is a large part of 1 - tanh^2.
        """
        if self.softcap is None:
            return logits_CV, None
        tanh_CV = logits_CV.div_(self.softcap).tanh_()
        slope_CV = tanh_CV.square().neg_().add_(1)
        return tanh_CV.mul_(self.softcap), slope_CV


class TokenLogps(NamedTuple):
    """Log-probs of the labels. The logsumexp stays in two parts: their float32 sum would lose digits of peaked logits."""

    logps_T: Tensor
    max_T: Tensor
    log_sum_T: Tensor


class HeadGradients(NamedTuple):
    hidden_TD: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype if tensor.is_cuda else accumulation_dtype(tensor.dtype)


def response_sums(token_logps_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S], summed in float64: a response of thousands of tokens keeps its last float32 digit."""
    if len(cu_seqlens) == 1:  # a rank without a pair; segment_reduce wants one segment
        return token_logps_T.new_zeros(0)
    # Checked lengths are lengths that the host has read: on a GPU it would wait for them at every head.
    unsafe = token_logps_T.is_cuda
    sums_S = torch.segment_reduce(token_logps_T.double(), "sum", lengths=cu_seqlens.diff().long(), unsafe=unsafe)
    return sums_S.to(token_logps_T.dtype)


def token_blocks(num_tokens: int, device_type: str) -> Iterator[slice]:
    size = _BLOCK_TOKENS.get(device_type, 16384)
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def word_tiles(num_tokens: int, vocabulary: int, device_type: str) -> list[slice]:
    """Tiles of equal width, a multiple of 64 words where one is large enough, so that rows stay aligned."""
    width = max(1, _CHUNK_BYTES.get(device_type, 1 << 30) // (4 * max(num_tokens, 1)))
    width = -(-vocabulary // -(-vocabulary // width))
    if width >= 64:
        width = -(-width // 64) * 64
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def softmax_(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits in place into their softmax. Returns (max_C, log_sum_C), whose sum is the logsumexp.

    On a CPU the sum within torch's softmax comes out too small: of 49,152 words by 1e-6, at times by 1e-5, which whole responses
    add up. What its results sum to, which ``sum`` adds pairwise, says by how much.

    Where a bias of -inf bans every word of a tile, log_sum is 0: its tokens may have words in other tiles.
    """
    max_C = logits_CV.amax(1)
    torch.softmax(logits_CV, 1, out=logits_CV)
    log_sum_C = logits_CV.sum(1).div_(logits_CV.amax(1)).log_()
    return max_C, log_sum_C.masked_fill_(max_C == -torch.inf, 0)


def d_logits_(softmax_CV: Tensor, labels_C: Tensor, first_word: int, d_token_C: Tensor) -> Tensor:
    """d_token * (onehot - softmax), in place. In float32, so that p - 1 of a confident label is formed before any rounding."""
    local_C = labels_C - first_word
    inside_C = (local_C >= 0) & (local_C < softmax_CV.shape[1])
    minus_one_C = inside_C.to(softmax_CV.dtype).neg_()
    softmax_CV.scatter_add_(1, local_C.clamp_(0, softmax_CV.shape[1] - 1)[:, None], minus_one_C[:, None])
    return softmax_CV.mul_(-d_token_C[:, None])


def add_product_(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total = a @ b`` if first, else ``total += a @ b``, summed in the wider of the dtypes. A total wider than the operands is
    a GPU's, see :func:`operand_dtype`."""
    if fast(total, a, b):
        product = fast_product(a.contiguous(), b.t())
        total.copy_(product) if first else total.add_(product)
    elif total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.itemsize < a.itemsize:
        product = torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif not first and _can_add_to_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        product = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)


@functools.cache
def _can_add_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a low-precision product to a float32 matrix in one call; older ones want all operands alike."""
    total = torch.zeros(16, 16, device=device)
    operand = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, operand, operand, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def token_logps(hidden_TD: Tensor, head: OutputHead, labels_T: Tensor) -> TokenLogps:
    """Log-probs of the labels, tile by tile; nothing larger than a tile is held."""
    device, operand = hidden_TD.device, operand_dtype(hidden_TD)
    result = TokenLogps(
        *(torch.empty(len(labels_T), dtype=accumulation_dtype(hidden_TD.dtype), device=device) for _ in range(3))
    )
    for block in token_blocks(len(labels_T), device.type):
        hidden_CD, labels_C = hidden_TD[block].to(operand), labels_T[block]
        label_logits_C = torch.empty_like(result.max_T[block])
        partials = []
        tiles = word_tiles(len(labels_C), head.weight_VD.shape[0], device.type)
        memory = _TileMemory(hidden_CD, tiles)
        for words in tiles:
            logits_CV = head.cap_(head.part(words, operand).uncapped(hidden_CD, memory.tile(words)))
            local_C = labels_C - words.start
            inside_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
            here_C = logits_CV.gather(1, local_C.clamp_(0, logits_CV.shape[1] - 1)[:, None]).squeeze(1)
            label_logits_C = torch.where(inside_C, here_C, label_logits_C)
            partials.append(torch.stack(softmax_(logits_CV)))
        max_NC, log_sum_NC = torch.stack(partials, 1)
        max_C = max_NC.amax(0)
        log_sum_C = (log_sum_NC + (max_NC - max_C)).logsumexp(0)
        result.max_T[block], result.log_sum_T[block] = max_C, log_sum_C
        result.logps_T[block] = (label_logits_C - max_C) - log_sum_C
    return result


def head_gradients(
    hidden_TD: Tensor,
    head: OutputHead,
    labels_T: Tensor,
    d_token_T: Tensor,
    logsumexp: tuple[Tensor, Tensor],
    totals: HeadGradients,
    *,
    add: bool = False,
) -> None:
    """Recomputes each tile's logits and turns them into gradients of ``sum(d_token * logps)``.

    Args:
        logsumexp: (max_T, log_sum_T) of :func:`token_logps`.
        totals: written (``weight_VD`` and ``bias_V``: added to, if ``add``); None where no gradient is wanted. ``weight_VD`` and
            ``bias_V`` must be of the accumulation dtype if there is more than one block or ``add``.
    """
    device, operand = hidden_TD.device, operand_dtype(hidden_TD)
    max_T, log_sum_T = logsumexp
    for block in token_blocks(len(labels_T), device.type):
        hidden_CD, labels_C, d_token_C = hidden_TD[block].to(operand), labels_T[block], d_token_T[block]
        d_hidden_CD = None
        if totals.hidden_TD is not None:
            d_hidden_CD = totals.hidden_TD[block]
            if d_hidden_CD.dtype != d_token_T.dtype:  # a sum over tiles
                d_hidden_CD = torch.empty_like(d_hidden_CD, dtype=d_token_T.dtype)
        tiles = word_tiles(len(labels_C), head.weight_VD.shape[0], device.type)
        memory = _TileMemory(hidden_CD, tiles)
        for words in tiles:
            part = head.part(words, operand)
            logits_CV, slope_CV = head.cap_with_slope_(part.uncapped(hidden_CD, memory.tile(words)))
            softmax_CV = logits_CV.sub_(max_T[block, None]).sub_(log_sum_T[block, None]).exp_()
            d_logits_CV = d_logits_(softmax_CV, labels_C, words.start, d_token_C)
            add_tile_gradients(
                d_logits_CV,
                slope_CV,
                hidden_CD,
                part,
                words,
                d_hidden_CD,
                totals,
                first_words=words.start == 0,
                first_tokens=not (add or block.start),
            )
        if d_hidden_CD is not None and totals.hidden_TD is not None and d_hidden_CD.dtype != totals.hidden_TD.dtype:
            totals.hidden_TD[block].copy_(d_hidden_CD)


def add_tile_gradients(
    d_logits_CV: Tensor,
    slope_CV: Tensor | None,
    hidden_CD: Tensor,
    part: OutputHead,
    words: slice,
    d_hidden_CD: Tensor | None,
    totals: HeadGradients,
    *,
    first_words: bool,
    first_tokens: bool,
) -> None:
    """One tile's products. ``first_words``: no other words of these tokens have written ``d_hidden_CD``; ``first_tokens``: no other
    tokens have written the gradients of these words. Then the memory is written, else added to."""
    if slope_CV is not None:
        d_logits_CV.mul_(slope_CV)
    if part.scale != 1.0:
        d_logits_CV.mul_(part.scale)
    d_operand_CV = d_logits_CV.to(hidden_CD.dtype)
    quick = fast(d_operand_CV, part.weight_VD)
    for tile in _product_tiles(d_operand_CV.shape[1]) if quick else [slice(None)]:
        d_tile_CW = d_operand_CV[:, tile]
        if quick:
            # Rows of logits lie a vocabulary apart: transposing them as they are misses the cache with every number.
            d_tile_CW = d_tile_CW.contiguous()
        if d_hidden_CD is not None:
            add_product_(d_hidden_CD, d_tile_CW, part.weight_VD[tile], first=first_words and not tile.start)
        if totals.weight_VD is not None:
            add_product_(totals.weight_VD[words][tile], d_tile_CW.t(), hidden_CD, first=first_tokens)
    if totals.bias_V is not None:
        d_bias_V = d_logits_CV.sum(0)
        totals.bias_V[words].copy_(d_bias_V) if first_tokens else totals.bias_V[words].add_(d_bias_V)


def _product_tiles(num_words: int) -> Iterator[slice]:
    return (slice(start, min(start + _PRODUCT_WORDS, num_words)) for start in range(0, num_words, _PRODUCT_WORDS))


def recomputed_gradients(
    hidden_TD: Tensor,
    head: OutputHead,
    labels_T: Tensor,
    d_token_T: Tensor,
    logsumexp: tuple[Tensor, Tensor],
    needs: tuple[bool, bool, bool],
) -> HeadGradients:
    """Gradients of hidden, weight and bias, in the inputs' dtypes, where needed; zeros for no tokens at all."""
    # With one block a word's gradient is written once, so the weight's own dtype will do.
    num_blocks = len(list(token_blocks(len(labels_T), hidden_TD.device.type)))
    new = torch.zeros_like if num_blocks == 0 else torch.empty_like
    sum_dtype = None if num_blocks < 2 else d_token_T.dtype
    wanted = HeadGradients(
        new(hidden_TD) if needs[0] else None,
        new(head.weight_VD, dtype=sum_dtype, memory_format=torch.contiguous_format) if needs[1] else None,
        None if head.bias_V is None or not needs[2] else new(head.bias_V, dtype=sum_dtype),
    )
    head_gradients(hidden_TD, head, labels_T, d_token_T, logsumexp, wanted)
    return HeadGradients(
        wanted.hidden_TD,
        None if wanted.weight_VD is None else wanted.weight_VD.to(head.weight_VD.dtype),
        None if wanted.bias_V is None or head.bias_V is None else wanted.bias_V.to(head.bias_V.dtype),
    )


class _TileMemory:
    """One allocation for all tiles of a block: fresh pages cost a CPU as much as the softmax of what is written into them."""

    def __init__(self, hidden_CD: Tensor, tiles: list[slice]) -> None:
        dtype, size = accumulation_dtype(hidden_CD.dtype), len(hidden_CD) * (tiles[0].stop - tiles[0].start)
        # On a GPU with low-precision operands the product comes with its own memory, from a caching allocator.
        device = hidden_CD.device if hidden_CD.dtype == dtype else torch.device("meta")
        self._rows, self._memory = len(hidden_CD), torch.empty(size, dtype=dtype, device=device)

    def tile(self, words: slice) -> Tensor:
        width = words.stop - words.start
        return self._memory[: self._rows * width].view(self._rows, width)
