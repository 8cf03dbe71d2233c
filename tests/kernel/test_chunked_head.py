"""Operands of low precision, which only a GPU takes as they are: its rule, on the CPU, with a product that sums in float32."""

import importlib
import itertools

import pytest
import torch
from mrpo_kernels import chunked_head, linear_preference_loss, sequence_logps

from tests.kernel.oracle import assert_no_worse_than_plain, doubled, plain_logps, with_gradients

ONE_PASS = importlib.import_module("mrpo_kernels.linear_preference_loss")
TOKENS, VOCABULARY, WIDTH = 20, 40, 24


@pytest.fixture(params=[True, False], ids=["torch adds to float32", "torch does not"])
def as_on_a_gpu(request, monkeypatch):
    """cuBLAS's contract: operands alike; the result is theirs in dtype, or float32, and then in memory of its own."""
    mm = torch.mm

    def summed_in_float32(a, b, *, out_dtype=None, out=None):
        assert a.dtype == b.dtype and out_dtype in (None, a.dtype, torch.float32) and (out is None or out_dtype is None)
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        return mm(a.to(out_dtype), b.to(out_dtype))

    def added_to_float32(total, a, b, *, out_dtype, out):
        assert total.dtype == out_dtype == torch.float32
        return out.copy_(total + summed_in_float32(a, b, out_dtype=out_dtype))

    monkeypatch.setattr(torch, "mm", summed_in_float32)
    monkeypatch.setattr(torch, "addmm", added_to_float32)
    monkeypatch.setattr(chunked_head, "_can_add_to_float32", lambda device, dtype: request.param)
    for module in (chunked_head, ONE_PASS):
        monkeypatch.setattr(module, "operand_dtype", lambda tensor: tensor.dtype)
    monkeypatch.setitem(chunked_head._BLOCK_TOKENS, "cpu", 8)  # three blocks, three tiles of 16 words or fewer
    monkeypatch.setitem(chunked_head._CHUNK_BYTES, "cpu", 4 * 8 * 16)


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=2)))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_tokens", [None, 7, 1000], ids=["two passes", "pair by pair", "one chunk"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_low_precision_operands(dtypes, softcap, chunk_tokens, monkeypatch):
    """Hidden states and weight of every pair of dtypes: products in memory of their own, and in memory that they are given."""
    monkeypatch.setitem(ONE_PASS._CHUNK_BYTES, "cpu", 4 * VOCABULARY * (chunk_tokens or 1))
    g = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=g).to(dtypes[0])
    weight_VD, bias_V = torch.randn(VOCABULARY, WIDTH, generator=g).to(dtypes[1]), torch.randn(VOCABULARY, generator=g)
    labels_T = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    cu_seqlens = torch.tensor([0, 3, 9, 14, TOKENS])

    def ours(h, w, b):
        options = {"bias": b, "softcap": softcap}
        if chunk_tokens is None:
            return sequence_logps(h, w, labels_T, cu_seqlens, impl="torch", **options).sum()
        return linear_preference_loss(h, w, labels_T, cu_seqlens, lambda x_C2, _: x_C2.sum(1), **options).loss

    def plain(h, w, b):
        return plain_logps(h, w, b, labels_T, cu_seqlens, softcap).sum()

    tensors, coarse = [hidden_TD, weight_VD, bias_V], max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    got, exact, eager, eager_float32 = (
        with_gradients(function, given, 1.0)
        for function, given in (
            (ours, tensors),
            (plain, doubled(tensors)),
            (plain, [tensor.to(coarse) for tensor in tensors]),
            (plain, [tensor.float() for tensor in tensors]),
        )
    )
    assert [value.dtype for value in got] == [torch.float32, *(tensor.dtype for tensor in tensors)]
    for name, mine, torchs, x in zip(("loss", "d_hidden", "d_weight", "d_bias"), got, eager, exact, strict=True):
        assert_no_worse_than_plain(mine, torchs, x, coarse, name)
    if dtypes[0] == dtypes[1]:  # no operand is rounded, so neither may be a logit
        assert_no_worse_than_plain(got[0], eager_float32[0], exact[0], torch.float32, "loss")


@pytest.mark.parametrize("tile", [4 * 16 * 65536, 4 * 16 * 256], ids=["whole vocabulary", "tiles"])
def test_the_sum_over_a_real_vocabulary(tile, monkeypatch):
    """65,536 words, as models have today: on a CPU torch's own softmax loses up to 1e-5 of their sum, always the same way."""
    monkeypatch.setitem(chunked_head._CHUNK_BYTES, "cpu", tile)
    logits_TV = 3 * torch.randn(16, 65536, generator=torch.Generator().manual_seed(0))
    labels_T = torch.arange(16)
    head = chunked_head.OutputHead(logits_TV.t().contiguous(), None, None, 1.0)
    got = chunked_head.token_logps(torch.eye(16), head, labels_T)
    exact_T = logits_TV.double().log_softmax(-1)[labels_T, labels_T]
    error_T = got.logps_T - exact_T
    assert error_T.abs().max() < 2e-6 and error_T.mean().abs() < 5e-7
