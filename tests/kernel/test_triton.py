"""The Triton kernels against float64; the traps that all implementations share are in test_traps.py.

Runs on a GPU, or on the CPU in the interpreter (see conftest.py), whose tiles are 16 tokens x 32 words x 16 columns, walked by 3
programs: every size below crosses each of them, and the finishing kernel's 32 tokens x 32 vocabulary tiles where it matters.
"""

import functools
import importlib
import math

import pytest
import torch
from mrpo_kernels import combine_logps, combine_references, finish, partials, sequence_logps, virtual_reference
from mrpo_kernels.virtual_reference import AGGREGATES, CLIPS, WEIGHTINGS, aggregate_logps

from tests.kernel.oracle import OPTIONS, assert_no_worse_than_plain, doubled, plain_logps, with_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_logps = functools.partial(sequence_logps, impl="triton")

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


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [0.2, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients(options, scale, dtype, with_bias):
    *tensors, labels_T, cu_seqlens = inputs(dtype, scale=scale)
    if not with_bias:
        tensors[2] = None

    def ours(h, w, b):
        return triton_logps(h, w, labels_T, cu_seqlens, bias=b, **options)

    def plain(h, w, b):
        return plain_logps(h, w, b, labels_T, cu_seqlens, **options)

    upstream = (0.7, -1.3, 5.0, 0.01)
    exact = with_gradients(plain, doubled(tensors), upstream)
    got, eager = with_gradients(ours, tensors, upstream), with_gradients(plain, tensors, upstream)
    assert got[0].dtype == torch.float32
    for name, mine, torchs, x in zip(("logps", "d_hidden", "d_weight", "d_bias"), got, eager, exact, strict=True):
        if x is not None:
            assert_no_worse_than_plain(mine, torchs, x, dtype, name)


@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 48])
def test_hidden_sizes_around_a_block(hidden):
    *tensors, labels_T, cu_seqlens = inputs(hidden=hidden)
    got = triton_logps(*tensors[:2], labels_T, cu_seqlens, bias=tensors[2])
    eager, exact = (plain_logps(*given, labels_T, cu_seqlens) for given in (tensors, doubled(tensors)))
    assert_no_worse_than_plain(got, eager, exact, torch.float32)


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_log_prob_is_above_zero(dtype):
    """The label's logit is a dot of its own, and as the likely word's it can exceed the tiles' logsumexp in the last digit."""
    hidden_TD, weight_VD, _, _, _ = inputs(dtype, scale=20.0)
    labels_T = (hidden_TD.double() @ weight_VD.double().T).argmax(1)
    assert (triton_logps(hidden_TD, weight_VD, labels_T, torch.arange(42, device=DEVICE)) <= 0).all()


def test_broken_inputs_are_nan_not_numbers():
    """A label outside the vocabulary, a NaN in the hidden states, ends before the beginning or past the last token (where the
    kernel must not read): only their own responses, and visibly."""
    hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens = inputs()
    labels_T[0], hidden_TD[40, 3] = -100, torch.nan
    got = triton_logps(hidden_TD, weight_VD, labels_T, cu_seqlens, bias=bias_V)
    assert got.isnan().tolist() == [True, False, False, True]
    ends = torch.tensor([-3, 2, 9, 7, 20, 1 << 20], device=DEVICE)
    got = triton_logps(hidden_TD, weight_VD, labels_T, ends, bias=bias_V)
    assert got.isnan().tolist() == [True, False, True, False, True]


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
    for name, mine in vars(got).items():
        theirs = getattr(expected, name)
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_virtual_reference_against_float64(dtype):
    arguments, options = references(dtype=dtype)
    got = virtual_reference(*arguments, **options, **MODES, impl="triton")
    exact_KS, plain_KS = [], []
    for k, (h, w, y, cu) in enumerate(zip(*arguments, strict=True)):
        transform = {key: options[key][k] for key in TRANSFORMS}
        tensors = [h, w, options["bias"][k]]
        plain_KS.append(plain_logps(*tensors, y, cu, **transform))
        exact_KS.append(plain_logps(*doubled(tensors), y, cu, **transform))
    exact, eager = (torch.stack(rows).view(3, 2, 2) for rows in (exact_KS, plain_KS))
    combined = (raw_KP2.float() if raw_KP2.dtype != torch.float64 else raw_KP2 for raw_KP2 in (eager, exact))
    eager_all, exact_all = (vars(combine_references(raw, **MODES)) for raw in combined)
    for name, mine in vars(got).items():
        assert_no_worse_than_plain(mine, eager_all[name], exact_all[name], dtype, name)


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


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5])
@pytest.mark.parametrize("ref_weights", [*WEIGHTINGS, "fixed"])
@pytest.mark.parametrize("clip", CLIPS)
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
    for name, mine in vars(got).items():
        torchs, x = getattr(eager, name), getattr(exact, name)
        finite = x.isfinite()
        assert torch.equal(mine.cpu().isfinite(), finite), name
        assert_no_worse_than_plain(
            mine.cpu()[finite], torchs[finite], x[finite], torch.float32, name
        ) if finite.any() else None


@pytest.mark.parametrize("p", [-100, -3, -1, 0, 0.5, *(-((-10.0) ** -n) for n in range(1, 13, 2)), 1e-4, 1e-6])
def test_the_mean_is_within_one_rounding_of_float64(p):
    """Over clusters of log-probs and log-probs far apart, on both sides of the kernel's switch between two formulas."""
    generator = torch.Generator().manual_seed(0)
    apart_P = 10.0 ** torch.linspace(-3, 3, 16)[:, None]
    raw_KP2 = -1000 - apart_P * torch.rand(5, 16, 2, generator=generator)
    modes = MODES | {"clip": "none", "aggregate": p}
    got = combine_logps(raw_KP2.to(DEVICE), **modes, impl="triton")
    weights_KP, exact = got.weights_KP.cpu(), aggregate_logps(raw_KP2.double(), got.weights_KP.cpu().double(), p)
    assert (weights_KP > 0).all()
    torch.testing.assert_close(got.virtual_logps_P2.cpu().double(), exact, rtol=1.5 * 2**-24, atol=0)


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5])
@pytest.mark.parametrize("ref_weights", [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
def test_a_probability_of_zero(aggregate, ref_weights):
    """-inf, with and without weight, is what it is in torch: never NaN."""
    raw_KP2 = torch.tensor([[[-5.0, -3.0]], [[-4.0, -2.0]], [[-math.inf, -1.0]]], device=DEVICE)
    modes = MODES | {"clip": "none", "ref_weights": ref_weights, "aggregate": aggregate}
    got, expected = (combine_logps(raw_KP2, **modes, impl=impl).virtual_logps_P2 for impl in ("triton", "torch"))
    assert not expected.isnan().any()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5, 1e-8])
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
        shapes = [tuple(x.shape) for x in vars(scored(0, impl)).values()]
        assert shapes == [(3, 0, 2), (0, 2), (3, 0), (0, 2), (3, 0, 2)]


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
    assert not any(tensor.requires_grad for tensor in vars(got).values())


def test_backward_recomputes_from_the_kernels_logsumexp():
    """Of bfloat16 and float16: the saved (max, log of sum) are the kernel's own, equal to the torch path's to float32."""
    module = importlib.import_module("mrpo_kernels.sequence_logps")
    *arguments, bias_V, labels_T, cu_seqlens = inputs(torch.bfloat16, scale=5.0)
    saved = [
        f(*arguments, bias_V, labels_T, cu_seqlens, None, 1.0) for f in (module._triton_forward, module._torch_forward)
    ]
    digit = torch.finfo(torch.float32).eps * saved[0][1].abs().max().item()
    for mine, theirs in zip(*saved, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2 * digit)
