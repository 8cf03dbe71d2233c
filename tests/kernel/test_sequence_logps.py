"""Chunked log-probs: against float64 full logits, gradients by finite differences. The traps are in test_traps.py."""

import importlib

import pytest
import torch
from mrpo_kernels import sequence_logps

from tests.kernel.oracle import OPTIONS, assert_no_worse_than_plain, doubled, plain_logps, with_gradients

MODULE = importlib.import_module("mrpo_kernels.chunked_head")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Blocks of three tokens, tiles of 26 words or fewer: every test crosses borders inside a response and the vocabulary."""
    monkeypatch.setitem(MODULE._BLOCK_TOKENS, "cpu", 3)
    monkeypatch.setitem(MODULE._CHUNK_BYTES, "cpu", 4 * 3 * 26)


def inputs(dtype, *, vocabulary=101, tokens=23, hidden=17, scale=1.0, seed=0):
    """Odd vocabulary and hidden size, ragged responses, an empty one in the middle."""
    g = torch.Generator().manual_seed(seed)
    hidden_TD = (scale * torch.randn(tokens, hidden, generator=g, dtype=torch.float64)).to(dtype)
    weight_VD = torch.randn(vocabulary, hidden, generator=g, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype)
    labels_T = torch.randint(vocabulary, (tokens,), generator=g)
    cu_seqlens = torch.tensor([0, 1, 9, 9, tokens], dtype=torch.int32)
    return hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [0.2, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_plain_torchs(options, scale, dtype):
    *tensors, labels_T, cu_seqlens = inputs(dtype, scale=scale)

    def ours(h, w, b):
        return sequence_logps(h, w, labels_T, cu_seqlens, bias=b, **options)

    def plain(h, w, b):
        return plain_logps(h, w, b, labels_T, cu_seqlens, **options)

    upstream = (0.7, -1.3, 5.0, 0.01)
    exact = with_gradients(plain, doubled(tensors), upstream)
    got, eager = with_gradients(ours, tensors, upstream), with_gradients(plain, tensors, upstream)
    for name, mine, torchs, x in zip(("logps", "d_hidden", "d_weight", "d_bias"), got, eager, exact, strict=True):
        assert_no_worse_than_plain(mine, torchs, x, dtype, name)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    *tensors, labels_T, cu_seqlens = inputs(torch.float64, vocabulary=11, tokens=10, hidden=5)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 10])
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda h, w, b: sequence_logps(h, w, labels_T, cu_seqlens, bias=b, **options), leaves
    )


def test_long_responses_keep_their_last_digit():
    """A sum of 4,096 float32 tokens: the running total must not lose the small ones."""
    hidden_TD, weight_VD, bias_V, labels_T, _ = inputs(torch.float32, tokens=4096)
    cu_seqlens = torch.tensor([0, 4096])
    got = sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V)
    exact = plain_logps(hidden_TD.double(), weight_VD.double(), bias_V.double(), labels_T, cu_seqlens)
    assert got.dtype == torch.float32
    assert ((got - exact) / exact).abs().max() < 2e-7


def test_a_column_major_weight():
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(torch.float32)
    weight = torch.empty(weight_VD.shape[::-1]).t().copy_(weight_VD)
    straight = sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens)
    torch.testing.assert_close(sequence_logps(hidden_TD, weight, labels_T, cu_seqlens), straight)


def test_misfits_are_errors():
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        sequence_logps(hidden_TD[:, 1:], weight_VD, labels_T, cu_seqlens)
    with pytest.raises(ValueError, match="one per row"):
        sequence_logps(hidden_TD, weight_VD, labels_T[1:], cu_seqlens)
    with pytest.raises(ValueError, match="impl must be one of"):
        sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, impl="cuda")
    with pytest.raises(ValueError, match="bias"):
        sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=torch.zeros(100))
    with pytest.raises(ValueError, match=r"one device, got .*'labels': 'meta'"):
        sequence_logps(hidden_TD, weight_VD, labels_T.to("meta"), cu_seqlens)
    for softcap in (0.0, -30.0):
        with pytest.raises(ValueError, match="softcap must be positive"):
            sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, softcap=softcap)
