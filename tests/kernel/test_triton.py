"""The Triton kernels against float64, and every bug that other people's tests of such kernels missed.

Runs on a GPU, or on the CPU in the interpreter (see conftest.py), whose tiles are 16 tokens x 32 words x 16 columns, walked by 3
programs: every size below crosses each of them, and the finishing kernel's 32 tokens x 32 vocabulary tiles where it matters.
"""

import dataclasses
import functools
import importlib

import pytest
import torch
from mrpo_kernels import combine_logps, combine_references, finish, partials, sequence_logps, virtual_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_logps = functools.partial(sequence_logps, impl="triton")

OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 1.7}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    dtype=torch.float32, *, tokens=41, hidden=40, vocabulary=101, scale=1.0, seed=0, cu_seqlens=(0, 1, 9, 9, 41)
):
    """Three tiles of tokens, of columns (the last half full) and of words (odd); a response of 33 tokens, an empty one."""
    g = torch.Generator().manual_seed(seed)
    hidden_TD = (scale * torch.randn(tokens, hidden, generator=g, dtype=torch.float64)).to(DEVICE, dtype)
    weight_VD = torch.randn(vocabulary, hidden, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    bias_V = torch.randn(vocabulary, generator=g, dtype=torch.float64).to(DEVICE, dtype)
    labels_T = torch.randint(vocabulary, (tokens,), generator=g).to(DEVICE)
    return hidden_TD, weight_VD, bias_V, labels_T, torch.tensor(cu_seqlens, device=DEVICE)


def plain(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, softcap=None, logit_scale=1.0):
    """The definition, on full logits in the inputs' dtype."""
    logits_TV = hidden_TD @ weight_VD.T
    logits_TV = (logits_TV if bias_V is None else logits_TV + bias_V) * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    logps_T = logits_TV.log_softmax(-1).gather(1, labels_T[:, None]).squeeze(1)
    return torch.stack([part.sum() for part in logps_T.split(cu_seqlens.diff().tolist())])


def assert_no_worse_than_plain(got, eager, exact, dtype, name="", logit=1.0):
    """``logit``: the largest, where its last float32 digit counts. In gradients it does: forward and recompute add a logit's
    products up in different orders, so a probability is off by that digit, where plain torch has the same logit twice."""
    slack = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * logit) * exact.abs().max()
    error, allowed = (got.double() - exact).abs().max(), 2 * (eager.double() - exact).abs().max() + slack
    assert error <= allowed, (name, error.item(), allowed.item())


def check_forward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, logit=1.0, **options):
    """The kernel's log-probs, once they were found to be as good as plain torch's."""
    got = triton_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V, **options)
    eager = plain(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, **options)
    doubles = [None if x is None else x.double() for x in (hidden_TD, weight_VD, bias_V)]
    assert_no_worse_than_plain(
        got, eager, plain(*doubles, labels_T, cu_seqlens, **options), hidden_TD.dtype, logit=logit
    )
    return got


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [0.2, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients(options, scale, dtype, with_bias):
    """Every response has its own upstream gradient, and the bias must be added once, not once per block of columns."""
    *tensors, labels_T, cu_seqlens = inputs(dtype, scale=scale)
    tensors = tensors if with_bias else tensors[:2]
    upstream = torch.tensor([0.7, -1.3, 5.0, 0.01], dtype=torch.float64, device=DEVICE)

    def gradients(function, leaves):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        value = function(leaves[0], leaves[1], leaves[2] if with_bias else None)
        value.backward(upstream.to(value.dtype))
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    def ours(h, w, b):
        return triton_logps(h, w, labels_T, cu_seqlens, bias=b, **options)

    def theirs(h, w, b):
        return plain(h, w, b, labels_T, cu_seqlens, **options)

    exact = gradients(theirs, [t.double() for t in tensors])
    got, eager = gradients(ours, tensors), gradients(theirs, tensors)
    assert got[0].dtype == torch.float32
    logit = (tensors[0].double() @ tensors[1].double().T).abs().max().item()
    for name, mine, torchs, x in zip(
        ("logps", "d_hidden", "d_weight", "d_bias")[: len(exact)], got, eager, exact, strict=True
    ):
        assert_no_worse_than_plain(mine, torchs, x, dtype, name, 1.0 if name == "logps" else logit)


@pytest.mark.parametrize("vocabulary", [32, 33, 63])
@pytest.mark.parametrize("options", [{}, {"softcap": 40.0}])
def test_very_negative_logits(vocabulary, options):
    """All logits about -300: a masked column counted as exp(0), or a running max that starts at 0, is all the sum there is.
    With a softcap they are -40, and a mask applied before it would count each masked column as exp(-40), as much as a word."""
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(vocabulary=vocabulary)
    bias_V = torch.full((vocabulary,), -300.0, device=DEVICE)
    check_forward(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, logit=options.get("softcap", 1.0), **options)


@pytest.mark.parametrize("banned", [32, 1056], ids=["a tile", "a whole step of the finishing kernel"])
def test_banned_words(banned):
    """Padded vocabularies carry a bias of -inf: a tile, or 32 tiles, of nothing but -inf must not become -inf - -inf."""
    hidden_TD, weight_VD, bias_V, labels_T, _ = inputs(tokens=5, hidden=16, vocabulary=1100)
    bias_V[:banned] = -torch.inf
    logps_S = check_forward(
        hidden_TD, weight_VD, bias_V, labels_T.clamp(min=banned), torch.tensor([0, 2, 5], device=DEVICE)
    )
    assert logps_S.isfinite().all()


@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 48])
def test_hidden_sizes_around_a_block(hidden):
    check_forward(*inputs(hidden=hidden))


def test_an_empty_batch_and_empty_responses():
    """A rank without tokens still takes part in ZeRO-3's gather, so its weight needs a gradient, of zeros."""
    hidden_TD, weight_VD, bias_V, labels_T, _ = inputs()
    weight_VD.requires_grad_()
    logps_S = triton_logps(
        hidden_TD[:0], weight_VD, labels_T[:0], torch.zeros(5, dtype=torch.int32, device=DEVICE), bias=bias_V
    )
    assert logps_S.tolist() == [0.0] * 4
    logps_S.sum().backward()
    assert weight_VD.grad is not None and not weight_VD.grad.any()
    none = triton_logps(hidden_TD[:0], weight_VD, labels_T[:0], torch.zeros(1, dtype=torch.int32, device=DEVICE))
    assert none.shape == (0,)
    ends = torch.tensor([0, 0, 41, 41, 41], device=DEVICE)
    assert triton_logps(hidden_TD, weight_VD, labels_T, ends)[[0, 2, 3]].tolist() == [0.0] * 3


def test_strides():
    """Labels with a stride, a column-major weight, hidden states that are columns of something wider and not 16-byte aligned."""
    hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens = inputs()
    straight = triton_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V)
    wide = torch.cat([hidden_TD[:, :3], hidden_TD, hidden_TD], 1)
    got = triton_logps(
        wide[:, 3 : 3 + hidden_TD.shape[1]],
        weight_VD.t().contiguous().t(),
        torch.stack([labels_T, labels_T], 1)[:, 0],
        torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0],
        bias=torch.stack([bias_V, bias_V], 1)[:, 0],
    )
    # Unaligned rows run on other tiles on a GPU; in the interpreter the tiles are the same, and so is every bit.
    torch.testing.assert_close(got, straight, rtol=1e-6 if DEVICE == "cuda" else 0, atol=0)


def test_tied_heads():
    """The weight is the embedding as well: both gradients arrive in it."""
    _, weight_VD, _, labels_T, cu_seqlens = inputs()

    def gradient(function, weight):
        weight = weight.clone().requires_grad_()
        hidden_TD = torch.nn.functional.embedding(labels_T.roll(1), weight)
        function(hidden_TD, weight).sum().backward()
        return weight.grad

    def theirs(h, w):
        return plain(h, w, None, labels_T, cu_seqlens)

    got = gradient(lambda h, w: triton_logps(h, w, labels_T, cu_seqlens), weight_VD)
    logit = (weight_VD @ weight_VD.T).max().item()
    assert_no_worse_than_plain(
        got, gradient(theirs, weight_VD), gradient(theirs, weight_VD.double()), torch.float32, logit=logit
    )


def test_offsets_beyond_two_to_the_31():
    """Row 19 of this weight starts 2.5e9 elements in; only the touched pages of its 5 GB exist."""
    hidden_TD, weight_VD, _, labels_T, cu_seqlens = inputs(torch.bfloat16, hidden=16, vocabulary=20)
    sparse_VD = (
        torch.empty(20 << 27, dtype=torch.bfloat16, device=DEVICE).as_strided((20, 16), (1 << 27, 1)).copy_(weight_VD)
    )
    expected = triton_logps(hidden_TD, weight_VD, labels_T, cu_seqlens)
    assert torch.equal(triton_logps(hidden_TD, sparse_VD, labels_T, cu_seqlens), expected)


@pytest.mark.parametrize("programs", [1, 2, 7, 64])
def test_the_same_bits_again_and_on_any_number_of_programs(programs, monkeypatch):
    *arguments, bias_V, labels_T, cu_seqlens = inputs()
    first = triton_logps(*arguments, labels_T, cu_seqlens, bias=bias_V)
    assert torch.equal(triton_logps(*arguments, labels_T, cu_seqlens, bias=bias_V), first)
    monkeypatch.setattr(partials, "_num_programs", lambda device: programs)
    assert torch.equal(triton_logps(*arguments, labels_T, cu_seqlens, bias=bias_V), first)


def test_broken_inputs_are_nan_not_numbers():
    """A label outside the vocabulary, a NaN in the hidden states: only their own responses, and visibly."""
    hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens = inputs()
    labels_T[0], hidden_TD[40, 3] = -100, torch.nan
    got = triton_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V)
    assert got.isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90")
def test_tiles_loaded_by_descriptors(dtype, monkeypatch):
    """The tile option that no shipped tile takes yet: the same products in the same order."""
    *arguments, bias_V, labels_T, cu_seqlens = inputs(dtype)
    expected = triton_logps(*arguments, labels_T, cu_seqlens, bias=bias_V)
    tile = partials._tile(torch.device(DEVICE, 0), dtype, True)
    monkeypatch.setattr(partials, "_tile", lambda *_: dataclasses.replace(tile, descriptors=True))
    assert torch.equal(triton_logps(*arguments, labels_T, cu_seqlens, bias=bias_V), expected)


# K = 3 references of unequal T, D, V, some with bias, softcap or scale; two pairs; the second reference has an empty response.
REFERENCES = [
    {"tokens": 41, "hidden": 40, "vocabulary": 101, "cu_seqlens": (0, 1, 9, 20, 41)},
    {"tokens": 20, "hidden": 17, "vocabulary": 64, "cu_seqlens": (0, 5, 5, 12, 20)},
    {"tokens": 60, "hidden": 64, "vocabulary": 31, "cu_seqlens": (0, 33, 34, 40, 60)},
]
TRANSFORMS = {"softcap": [None, 4.0, 20.0], "logit_scale": [1.0, 0.5, 2.0]}
MODES = {"epsilon_max": 0.1, "clip": "adaptive", "ref_weights": "confidence", "aggregate": "harmonic"}


def references(count=3, dtype=torch.float32, same=False):
    """Positional and keyword arguments of virtual_reference; the middle reference has no bias."""
    rows = [inputs(dtype, scale=0.3, seed=0 if same else k, **REFERENCES[0 if same else k % 3]) for k in range(count)]
    hidden, weight, bias, labels, cu_seqlens = (list(column) for column in zip(*rows, strict=True))
    options = {key: [values[0 if same else k % 3] for k in range(count)] for key, values in TRANSFORMS.items()}
    return (hidden, weight, labels, cu_seqlens), options | {"bias": [None if k == 1 else b for k, b in enumerate(bias)]}


def assert_same(got, expected, rtol=0.0, atol=0.0):
    for name, mine, theirs in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_virtual_reference_against_float64(dtype):
    arguments, options = references(dtype=dtype)
    got = virtual_reference(*arguments, **options, **MODES, impl="triton")
    exact_KS, plain_KS = [], []
    for k, (h, w, y, cu) in enumerate(zip(*arguments, strict=True)):
        transform = {key: options[key][k] for key in TRANSFORMS}
        bias_V = options["bias"][k]
        plain_KS.append(plain(h, w, bias_V, y, cu, **transform))
        exact_KS.append(plain(h.double(), w.double(), None if bias_V is None else bias_V.double(), y, cu, **transform))
    exact, eager = (torch.stack(rows).view(3, 2, 2) for rows in (exact_KS, plain_KS))
    combined = (raw_KP2.float() if raw_KP2.dtype != torch.float64 else raw_KP2 for raw_KP2 in (eager, exact))
    eager_all, exact_all = ((raw, *combine_references(raw, **MODES)) for raw in combined)
    for name, mine, torchs, x in zip(got._fields, got, eager_all, exact_all, strict=True):
        assert_no_worse_than_plain(mine, torchs, x, dtype, name)


def test_virtual_reference_is_the_per_reference_path():
    """Bit for bit: K kernels of one reference, one kernel of K, and the finishing launch on log-probs from a cache."""
    arguments, options = references()
    got = virtual_reference(*arguments, **options, **MODES, impl="triton")
    alone = [
        triton_logps(h, w, y, cu, **{key: values[k] for key, values in options.items()})
        for k, (h, w, y, cu) in enumerate(zip(*arguments, strict=True))
    ]
    assert torch.equal(got.ref_logps_KP2, torch.stack(alone).view(3, 2, 2))
    assert_same(combine_logps(got.ref_logps_KP2, **MODES, impl="triton"), got)
    assert_same(got, virtual_reference(*arguments, **options, **MODES, impl="torch"), rtol=1e-6, atol=1e-7)
    assert_same(got, virtual_reference(*arguments, **options, **MODES, impl="triton"))


@pytest.mark.parametrize("aggregate", ["harmonic", "geometric", "arithmetic", "min"])
@pytest.mark.parametrize("ref_weights", ["confidence", "uniform", "fixed"])
@pytest.mark.parametrize("clip", ["adaptive", "fixed", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_finishing_arithmetic(count, clip, ref_weights, aggregate):
    """Against combine_references in float64: long responses, equal gaps, zeros everywhere, a fixed weight of zero."""
    raw_KP2 = -300 * torch.rand(count, 6, 2, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    raw_KP2[:, 3] = 0.0  # every denominator is zero: epsilon_max / 2, uniform weights
    raw_KP2[:, 4, 1] = raw_KP2[:, 4, 0]  # no reference prefers anything: uniform weights
    raw_KP2[-1, 5] = -8000.0  # far outside the clip range, and its exponential is 0
    fixed = [1.0] if count == 1 else [0.0, *[1 / (count - 1)] * (count - 1)]
    modes = {
        "epsilon_max": 0.1,
        "clip": clip,
        "ref_weights": fixed if ref_weights == "fixed" else ref_weights,
        "aggregate": aggregate,
    }
    raw = raw_KP2.float()
    got = combine_logps(raw.to(DEVICE), **modes, impl="triton")
    exact, eager = combine_references(raw.double(), **modes), combine_references(raw, **modes)
    for name, mine, torchs, x in zip(exact._fields, got[1:], eager, exact, strict=True):
        finite = x.isfinite()
        assert torch.equal(mine.cpu().isfinite(), finite), name
        assert_no_worse_than_plain(
            mine.cpu()[finite], torchs[finite], x[finite], torch.float32, name
        ) if finite.any() else None


@pytest.mark.parametrize("aggregate", ["harmonic", "geometric", "arithmetic", "min"])
def test_a_reference_that_scored_nan_is_not_clipped_to_a_number(aggregate):
    raw_KP2 = torch.full((3, 2, 2), -5.0, device=DEVICE)
    raw_KP2[2, 1, 0] = torch.nan
    modes = MODES | {"ref_weights": "uniform", "aggregate": aggregate, "clip": "fixed"}
    got = combine_logps(raw_KP2, **modes, impl="triton").virtual_logps_P2
    assert got.isnan().tolist() == [[False, False], [True, False]]


def test_copies_of_one_reference_are_that_reference():
    arguments, options = references(count=3, same=True)
    options["bias"][1] = options["bias"][0]
    got = virtual_reference(*arguments, **options, **MODES, impl="triton")
    torch.testing.assert_close(got.virtual_logps_P2, got.ref_logps_KP2[0], rtol=1e-6, atol=0)


def test_nothing_but_masked_tokens():
    """No reference has a token: zeros, uniform weights, epsilon_max / 2, no NaN. And no pair at all: empty tensors."""
    (hidden, weight, labels, _), options = references()

    def scored(pairs, impl):
        cu_seqlens = [torch.zeros(2 * pairs + 1, dtype=torch.int64, device=DEVICE)] * 3
        arguments = [h[:0] for h in hidden], weight, [y[:0] for y in labels], cu_seqlens
        return virtual_reference(*arguments, **options, **MODES, impl=impl)

    assert_same(scored(3, "triton"), scored(3, "torch"), rtol=1e-7, atol=1e-7)
    for impl in ("triton", "torch"):
        assert [tuple(x.shape) for x in scored(0, impl)] == [(3, 0, 2), (0, 2), (3, 0), (0, 2), (3, 0, 2)]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_two_launches_for_any_k(count, monkeypatch):
    launches = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(self.kernel.__name__)
            return self.kernel[grid]

    monkeypatch.setattr(partials, "partials_kernel", Counting(partials.partials_kernel))
    for name in ("virtual_reference_kernel", "response_sums_kernel"):
        monkeypatch.setattr(finish, name, Counting(getattr(finish, name)))
    arguments, options = references(count)
    virtual_reference(*arguments, **options, **MODES, impl="triton")
    assert launches == ["partials_kernel", "virtual_reference_kernel"]
    launches.clear()
    sequence_logps(*(column[0] for column in arguments), impl="triton")
    assert launches == ["partials_kernel", "response_sums_kernel"]


def test_references_are_constants():
    arguments, options = references()
    arguments[1][0].requires_grad_()
    got = virtual_reference(*arguments, **options, **MODES, impl="triton")
    assert not any(tensor.requires_grad for tensor in got)


def test_backward_recomputes_from_the_kernels_logsumexp():
    """The saved (max, log of sum) are the kernel's own, equal to the torch path's to float32."""
    module = importlib.import_module("mrpo_kernels.sequence_logps")
    *arguments, bias_V, labels_T, cu_seqlens = inputs(scale=5.0)
    saved = [
        f(*arguments, bias_V, labels_T, cu_seqlens, None, 1.0) for f in (module._triton_forward, module._torch_forward)
    ]
    digit = torch.finfo(torch.float32).eps * saved[0][1].abs().max().item()
    for mine, theirs in zip(*saved, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2 * digit)
