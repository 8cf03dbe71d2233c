"""The bugs that other people's tests of such kernels missed: one test for each, on every implementation that runs here.

Under TRITON_INTERPRET=1 that is the Triton kernel (test_interpreter.py), otherwise the torch path and the one-pass loss, on a GPU
all three. ``virtual_reference`` is bit for bit the Triton kernel of ``sequence_logps`` (test_triton.py), so it has no more here.

    trap                                                    test
    vocabulary tail: masked columns counted as exp(0)       test_the_tail_of_the_vocabulary_counts_for_nothing
    a running maximum that starts at 0                      test_a_running_maximum_starts_below_every_logit
    softcap applied after the -inf mask                     test_softcap_is_applied_before_the_mask
    softcap's digits lost to its own size                   test_softcap_keeps_the_digits_of_its_logits
    bias once per block of columns                          test_bias_is_added_once_for_all_blocks_of_columns
    logaddexp(-inf, -inf)                                   test_minus_infinity_and_minus_infinity_make_no_nan
    p - 1 of a confident target formed after rounding       test_the_gradient_of_a_confident_target_is_not_rounded_away
    empty responses (0 / 0)                                 test_an_empty_response_is_zero_and_moves_nothing
    all-masked batch                                        test_a_batch_without_a_token
    non-contiguous labels                                   test_labels_with_a_stride
    tied heads                                              test_a_tied_head_gets_both_gradients
    per-sequence upstream gradients that differ             test_every_response_has_its_own_upstream_gradient
    T*V > 2^31                                              test_offsets_beyond_two_to_the_31
    bitwise repeatability                                   test_the_same_bits_again

Each says how a kernel with the bug fails it; each was seen to fail on a kernel given that bug. In the interpreter a tile is 16
tokens x 32 words x 16 columns, in torch 5 tokens x 26 words, so that every input below crosses all of them.
"""

import importlib
import os

import pytest
import torch
from mrpo_kernels import chunked_head, linear_preference_loss, sequence_logps

from tests.kernel.oracle import assert_no_worse_than_plain, doubled, plain_logps, with_gradients

ONE_PASS = importlib.import_module("mrpo_kernels.linear_preference_loss")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["triton"] * (INTERPRETED or DEVICE == "cuda") + ["torch", "one pass"] * (not INTERPRETED)
UPSTREAM = (0.7, -1.3, 5.0, 0.01)
BIAS_FAR_BELOW = -300.0  # exp of it is 0 in float32, and exp(0) beside it is everything


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    monkeypatch.setitem(chunked_head._BLOCK_TOKENS, DEVICE, 5)
    monkeypatch.setitem(chunked_head._CHUNK_BYTES, DEVICE, 4 * 5 * 26)
    monkeypatch.setitem(
        ONE_PASS._CHUNK_BYTES, DEVICE, 4 * 101 * 12
    )  # of [0, 1, 9, 9, 41] the first pair fits, the second not
    return request.param


def inputs(dtype=torch.float32, *, vocabulary=101, hidden=40, scale=1.0, bias=None):
    """[hidden, weight, bias], labels, cu_seqlens: three tiles of tokens and columns, odd V, ragged responses, one of them empty."""
    g = torch.Generator().manual_seed(0)
    hidden_TD = scale * torch.randn(41, hidden, generator=g, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, hidden, generator=g, dtype=torch.float64)
    bias_V = None if bias is None else torch.full((vocabulary,), bias)
    tensors = [None if t is None else t.to(DEVICE, dtype) for t in (hidden_TD, weight_VD, bias_V)]
    labels_T = torch.randint(vocabulary, (41,), generator=g).to(DEVICE)
    return tensors, labels_T, torch.tensor([0, 1, 9, 9, 41], device=DEVICE)


def scored(implementation, tensors, labels_T, cu_seqlens, upstream=UPSTREAM, **options):
    """[logps_S, d_hidden, d_weight, d_bias] of one implementation."""

    def logps(h, w, b):
        return sequence_logps(h, w, labels_T, cu_seqlens, bias=b, impl=implementation, **options)

    if implementation != "one pass":
        return with_gradients(logps, tensors, upstream)
    upstream_P2, seen = torch.tensor(upstream, device=DEVICE).view(-1, 2), []

    def loss(h, w, b):
        def of_pairs(x_C2, pairs):
            return (upstream_P2[pairs].to(x_C2) * x_C2).sum(1)

        result = linear_preference_loss(h, w, labels_T, cu_seqlens, of_pairs, bias=b, **options)
        seen.append(result.policy_logps_P2.flatten())
        return result.loss

    _, *gradients = with_gradients(loss, tensors, 1.0)
    return [*seen, *gradients]


def check(implementation, tensors, labels_T, cu_seqlens, upstream=UPSTREAM, **options):
    """:func:`scored`, once it was found to be as good as plain torch."""

    def plain(h, w, b):
        return plain_logps(h, w, b, labels_T, cu_seqlens, **options)

    got = scored(implementation, tensors, labels_T, cu_seqlens, upstream, **options)
    eager, exact = (with_gradients(plain, given, upstream) for given in (tensors, doubled(tensors)))
    for name, mine, torchs, x in zip(("logps", "d_hidden", "d_weight", "d_bias"), got, eager, exact, strict=True):
        if x is not None:
            assert_no_worse_than_plain(mine, torchs, x, tensors[0].dtype, name)
    return got


@pytest.mark.parametrize("vocabulary", [33, 63], ids=["one word in the last tile", "all but one"])
def test_the_tail_of_the_vocabulary_counts_for_nothing(implementation, vocabulary):
    """Masked columns that count as exp(0) are all there is beside words of exp(-300): the log-probs come out 300 too low per token.
    Masked columns that repeat the last word (the loads clamp to it) double its share: visible once it is the likely word."""
    tensors, labels_T, cu_seqlens = inputs(vocabulary=vocabulary, bias=BIAS_FAR_BELOW)
    check(implementation, tensors, labels_T, cu_seqlens)
    tensors, labels_T, cu_seqlens = inputs(vocabulary=vocabulary, bias=0.0)
    tensors[2][-1] = 50.0
    check(implementation, tensors, labels_T, cu_seqlens)


def test_a_running_maximum_starts_below_every_logit(implementation):
    """From a maximum of 0 on, every exp(-300 - 0) is 0 and the log of their sum -inf. No tile has a tail here: 64 words, in the
    interpreter's two tiles and in torch's three of equal width but the last, fill what they are given."""
    tensors, labels_T, cu_seqlens = inputs(vocabulary=64, bias=BIAS_FAR_BELOW)
    logps_S = check(implementation, tensors, labels_T, cu_seqlens)[0]
    assert logps_S.isfinite().all()


@pytest.mark.parametrize("vocabulary", [33, 63])
def test_softcap_is_applied_before_the_mask(implementation, vocabulary):
    """Applied after it, -inf becomes -softcap, -40. The words lie between -31 and -39, so each masked column adds some percent."""
    tensors, labels_T, cu_seqlens = inputs(vocabulary=vocabulary, bias=-60.0)
    check(implementation, tensors, labels_T, cu_seqlens, softcap=40.0)


NEAR_AN_END = [(0.003, level) for level in (-12, -8, -4, -2, -0.5, 2, 8)]
NEAR_ZERO = [(6e-5, -0.02), (4e-4, 0.02), (2e-3, 0.0), (2e-3, 0.002), (2e-3, 0.006), (0.01, 0.0)]


@pytest.mark.parametrize("softcap", [30.0, 50.0])
@pytest.mark.parametrize(("scale", "level"), [*NEAR_AN_END, *NEAR_ZERO, (0.1, 0.0)])
def test_softcap_keeps_the_digits_of_its_logits(implementation, softcap, scale, level):
    """Every logit near one end of the range (scale and level are parts of softcap), or far within it, or at both ends and between;
    each token a response, since sums let errors cancel. Formed as softcap - 2 * softcap / (1 + exp(2x / softcap)), label, maximum
    and words are each off by last digits of softcap, and near an end a log-prob by three times as much as plain torch's. With the
    words' difference formed from two exp(2x / softcap), near zero both about 1, they are off so there, by up to five times."""
    tensors, labels_T, _ = inputs(scale=softcap * scale, bias=softcap * level)
    ends = torch.tensor([0, *range(42)], device=DEVICE)  # the first response is empty: two for each pair
    check(implementation, tensors, labels_T, ends, (0.7,) * 42, softcap=softcap)


@pytest.mark.parametrize("hidden", [16, 40], ids=["one block", "three blocks"])
def test_bias_is_added_once_for_all_blocks_of_columns(implementation, hidden):
    """Added inside the loop over D it counts once per block: right for one block, three times too much for three. Its gradient, a
    sum over all tokens, must come once as well, whatever the number of token blocks."""
    tensors, labels_T, cu_seqlens = inputs(hidden=hidden, bias=0.0)
    tensors[2] += torch.linspace(-4.0, 4.0, len(tensors[2]), device=DEVICE)
    check(implementation, tensors, labels_T, cu_seqlens)


@pytest.mark.parametrize("banned", [64, 1056], ids=["two tiles", "a whole step of the finishing kernel"])
def test_minus_infinity_and_minus_infinity_make_no_nan(implementation, banned):
    """Padded vocabularies carry a bias of -inf: for tiles of nothing but -inf (of 32 words, in steps of 32 tiles) the running
    maximum is still -inf, and exp(-inf - -inf) would make every token NaN."""
    tensors, labels_T, cu_seqlens = inputs(hidden=16, vocabulary=1100, bias=0.0)
    tensors[2][:banned] = -torch.inf
    for value in check(implementation, tensors, labels_T.clamp(min=banned), cu_seqlens):
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_confident_target_is_not_rounded_away(implementation, dtype):
    """1 - 2e-4 is 1 in bfloat16 and in float16: with p rounded before the 1 is taken off, the target's gradient is 0 while the
    other words' stay. Plain torch in these dtypes has the bug; the comparison is with plain float32 on the same numbers."""
    tensors, labels_T, cu_seqlens = inputs(dtype, scale=0.02, bias=0.0)
    labels_T.fill_(7)
    tensors[2][7] = 13.0

    def plain(h, w, b):
        return plain_logps(h, w, b, labels_T, cu_seqlens)

    got = scored(implementation, tensors, labels_T, cu_seqlens)
    eager, exact = (
        with_gradients(plain, [t.to(wide) for t in tensors], UPSTREAM) for wide in (torch.float32, torch.float64)
    )
    for name, mine, torchs, x in zip(("d_hidden", "d_weight", "d_bias"), got[1:], eager[1:], exact[1:], strict=True):
        assert_no_worse_than_plain(mine, torchs, x, dtype, name)


def test_an_empty_response_is_zero_and_moves_nothing(implementation):
    """0/0 makes it NaN, and reading one token anyway gives it a number; its upstream gradient of 1e30 must reach no token."""
    tensors, labels_T, _ = inputs(bias=0.0)
    ends = torch.tensor([0, 0, 20, 20, 20, 41, 41], device=DEVICE)  # at the start, twice in the middle, at the end
    upstream = (1e30, 0.7, 1e30, 1e30, -1.3, 1e30)
    logps_S, *gradients = scored(implementation, tensors, labels_T, ends, upstream)
    assert logps_S[[0, 2, 3, 5]].tolist() == [0.0] * 4
    without = torch.tensor([0, 20, 41], device=DEVICE)
    expected_S, *expected = scored(implementation, tensors, labels_T, without, (0.7, -1.3))
    torch.testing.assert_close(logps_S[[1, 4]], expected_S)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.fixture
def nan_in_new_memory():
    """Fresh pages happen to be zeros; torch fills what nobody wrote with NaN in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("responses", [0, 4])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_a_batch_without_a_token(implementation, responses):
    """A rank whose tokens are all masked: zeros, no NaN, no launch of an empty grid. It takes part in ZeRO-3's reduction, so its
    weight and bias still need a gradient, of zeros: memory that was never written is NaN here."""
    (hidden_TD, *parameters), labels_T, _ = inputs(bias=1.0)
    ends = torch.zeros(responses + 1, dtype=torch.int32, device=DEVICE)
    logps_S, d_hidden, *gradients = scored(
        implementation, [hidden_TD[:0], *parameters], labels_T[:0], ends, UPSTREAM[:responses]
    )
    assert logps_S.tolist() == [0.0] * responses and d_hidden.shape == (0, 40)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.shape == parameter.shape and not gradient.any()


def test_labels_with_a_stride(implementation):
    """A column of a wider tensor, as slicing leaves it: a kernel that walks its memory reads the neighbours, here wrong words."""
    tensors, labels_T, cu_seqlens = inputs()
    strided_T = torch.stack([labels_T, (labels_T + 1) % 101], 1)[:, 0]
    assert not strided_T.is_contiguous()
    expected = scored(implementation, tensors, labels_T, cu_seqlens)
    for mine, theirs in zip(scored(implementation, tensors, strided_T, cu_seqlens), expected, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_tied_head_gets_both_gradients(implementation):
    """The weight is the embedding as well. A gradient written over the other one, or a buffer handed out twice, loses a part."""
    (_, weight_VD, _), labels_T, cu_seqlens = inputs()
    upstream_P2 = torch.tensor(UPSTREAM, device=DEVICE).view(-1, 2)

    def embedded(w):
        return torch.nn.functional.embedding(labels_T.roll(1), w)

    def plain(w):
        return plain_logps(embedded(w), w, None, labels_T, cu_seqlens)

    def one_pass(w):
        return linear_preference_loss(
            embedded(w), w, labels_T, cu_seqlens, lambda x_C2, pairs: (upstream_P2[pairs] * x_C2).sum(1)
        ).loss

    def logps(w):
        return sequence_logps(embedded(w), w, labels_T, cu_seqlens, impl=implementation)

    function, upstream = (one_pass, 1.0) if implementation == "one pass" else (logps, UPSTREAM)
    got = with_gradients(function, [weight_VD], upstream)[1]
    eager, exact = (with_gradients(plain, [w], UPSTREAM)[1] for w in (weight_VD, weight_VD.double()))
    assert_no_worse_than_plain(got, eager, exact, torch.float32)


@pytest.mark.parametrize("only", [0, 1, 3])
def test_every_response_has_its_own_upstream_gradient(implementation, only):
    """One factor for the whole batch (the mean's, say) gives the other responses' tokens a gradient: theirs is exactly zero. With
    a response's gradient given to its neighbour's tokens, the rows that move are the wrong ones."""
    tensors, labels_T, cu_seqlens = inputs(bias=0.0)
    upstream = tuple(float(response == only) for response in range(4))
    d_hidden = check(implementation, tensors, labels_T, cu_seqlens, upstream)[1]
    begin, end = cu_seqlens[only : only + 2].tolist()
    moved = d_hidden.abs().sum(1) > 0
    assert moved[begin:end].all() and moved.sum() == end - begin


def test_offsets_beyond_two_to_the_31(implementation):
    """Row 19 of this weight starts 2.5e9 elements in (only the touched pages of its 5 GB exist); wrapped to 32 bits its address
    lies before the matrix. Offsets of T x V results would need the memory: test_compile.py reads their width in the compiler's IR.
    """
    (hidden_TD, weight_VD, _), labels_T, cu_seqlens = inputs(torch.bfloat16, hidden=16, vocabulary=20)
    memory = torch.empty(20 << 27, dtype=torch.bfloat16, device=DEVICE)
    sparse_VD = memory.as_strided((20, 16), (1 << 27, 1)).copy_(weight_VD)
    with torch.no_grad():
        if implementation == "one pass":
            expected, got = (
                linear_preference_loss(hidden_TD, w, labels_T, cu_seqlens, lambda x, _: x.sum(1)).policy_logps_P2
                for w in (weight_VD, sparse_VD)
            )
        else:
            expected, got = (
                sequence_logps(hidden_TD, w, labels_T, cu_seqlens, impl=implementation) for w in (weight_VD, sparse_VD)
            )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_the_same_bits_again(implementation, programs, monkeypatch):
    """Sums by atomics, or partials that depend on which program came first, differ from run to run, or with the number of programs
    (multiprocessors), or with what was in the memory they forgot to write."""
    tensors, labels_T, cu_seqlens = inputs(bias=0.5)
    first = scored(implementation, tensors, labels_T, cu_seqlens)
    if implementation == "triton":
        monkeypatch.setattr(importlib.import_module("mrpo_kernels.partials"), "_num_programs", lambda _: programs)
    for mine, theirs in zip(scored(implementation, tensors, labels_T, cu_seqlens), first, strict=True):
        assert torch.equal(mine, theirs)
