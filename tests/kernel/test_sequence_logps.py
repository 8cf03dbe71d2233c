"""Chunked log-probs: against float64 full logits, gradients by finite differences, and the traps of such kernels."""

import importlib

import pytest
import torch
from mrpo_kernels import sequence_logps

MODULE = importlib.import_module("mrpo_kernels.chunked_head")

OPTIONS = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.3},
    {"softcap": 2.0, "logit_scale": 1.7},
]


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


def plain(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap=None, logit_scale=1.0):
    """The definition, on full logits in the inputs' dtype."""
    logits_TV = (hidden_TD @ weight_VD.T + bias_V) * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logps_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in logps_T.split(cu_seqlens.diff().tolist())])


def gradients(function, tensors, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value.backward(upstream.to(value.dtype))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [0.2, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_plain_torchs(options, scale, dtype):
    *tensors, labels_T, cu_seqlens = inputs(dtype, scale=scale)
    upstream = torch.tensor([0.7, -1.3, 5.0, 0.01], dtype=torch.float64)  # every response its own gradient

    def ours(h, w, b):
        return sequence_logps(h, w, labels_T, cu_seqlens, bias=b, **options)

    def theirs(h, w, b):
        return plain(h, w, b, labels_T, cu_seqlens, **options)

    exact = gradients(theirs, [t.double() for t in tensors], upstream)
    got, eager = gradients(ours, tensors, upstream), gradients(theirs, tensors, upstream)
    for name, x, mine, torchs in zip(("logps", "d_hidden", "d_weight", "d_bias"), exact, got, eager, strict=True):
        slack = torch.finfo(dtype).eps * x.abs().max()
        error, allowed = (mine.double() - x).abs().max(), 2 * (torchs.double() - x).abs().max() + slack
        assert error <= allowed, (name, error.item(), allowed.item())


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    *tensors, labels_T, cu_seqlens = inputs(torch.float64, vocabulary=11, tokens=10, hidden=5)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 10])
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda h, w, b: sequence_logps(h, w, labels_T, cu_seqlens, bias=b, **options), leaves
    )


def test_an_empty_batch_still_touches_the_weight():
    """A rank without tokens must take part in ZeRO-3's gather, so its weight needs a gradient, of zeros."""
    hidden_TD, weight_VD, _, labels_T, _ = inputs(torch.float32)
    weight_VD.requires_grad_()
    logps_S = sequence_logps(hidden_TD[:0], weight_VD, labels_T[:0], torch.zeros(3, dtype=torch.int32))
    assert logps_S.tolist() == [0.0, 0.0]
    logps_S.sum().backward()
    assert weight_VD.grad is not None and not weight_VD.grad.any()


def test_long_responses_keep_their_last_digit():
    """A sum of 4,096 float32 tokens: the running total must not lose the small ones."""
    hidden_TD, weight_VD, bias_V, labels_T, _ = inputs(torch.float32, tokens=4096)
    cu_seqlens = torch.tensor([0, 4096])
    got = sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V)
    exact = plain(hidden_TD.double(), weight_VD.double(), bias_V.double(), labels_T, cu_seqlens)
    assert got.dtype == torch.float32
    assert ((got - exact) / exact).abs().max() < 2e-7


def test_tied_and_non_contiguous_inputs_and_repeatability():
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(torch.float32)
    weight = torch.empty(weight_VD.shape[::-1]).t().copy_(weight_VD)  # column-major
    labels = torch.stack([labels_T, labels_T], 1)[:, 0]
    straight = sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens)
    torch.testing.assert_close(sequence_logps(hidden_TD, weight, labels, cu_seqlens), straight)
    assert torch.equal(sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens), straight)


def test_misfits_are_errors():
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        sequence_logps(hidden_TD[:, 1:], weight_VD, labels_T, cu_seqlens)
    with pytest.raises(ValueError, match="one per row"):
        sequence_logps(hidden_TD, weight_VD, labels_T[1:], cu_seqlens)
    with pytest.raises(ValueError, match="impl must be one of"):
        sequence_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, impl="cuda")
