"""Loss and gradients in one pass: against float64 full logits through the project's objectives. The traps are in test_traps.py."""

import functools
import importlib

import pytest
import torch
from mrpo_kernels import chunked_head, linear_preference_loss, sequence_logps

from mrpo_scale.objective import Objective, preference_loss
from tests.kernel.oracle import OPTIONS, assert_no_worse_than_plain, doubled, float32_rounding, with_gradients
from tests.kernel.oracle import plain_logps as plain_logps_S

# The package exports the function under the module's own name.
module = importlib.import_module("mrpo_kernels.linear_preference_loss")

VOCABULARY = 101  # odd: no tile divides it
BOUNDS = [0, 4, 9, 9, 12, 12, 12, 20, 33, 34, 36]  # ragged; pair 1 has an empty chosen, pair 2 no token, pair 3 is long
OBJECTIVES = [
    Objective(),
    Objective(label_smoothing=0.2),
    Objective(loss_type="ipo"),
    Objective(loss_type="hinge", beta=0.02),  # small, so that hinges are not all flat
    Objective(name="multi_dpo"),
    Objective(name="dpo"),
]
CHUNK_TOKENS = {"pair_by_pair": 12, "all_recomputed": 1, "one_chunk": 1000}


@pytest.fixture(params=CHUNK_TOKENS.values(), ids=CHUNK_TOKENS.keys(), autouse=True)
def chunk_tokens(request, monkeypatch):
    """Chunks of a pair or two with one pair too large for any; every pair too large; all pairs together."""
    monkeypatch.setitem(module._CHUNK_BYTES, "cpu", 4 * VOCABULARY * request.param)
    monkeypatch.setitem(chunked_head._BLOCK_TOKENS, "cpu", 5)
    monkeypatch.setitem(chunked_head._CHUNK_BYTES, "cpu", 4 * 5 * 26)
    return request.param


def inputs(dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden_TD = (scale * torch.randn(BOUNDS[-1], 17, generator=g, dtype=torch.float64)).to(dtype)
    weight_VD = torch.randn(VOCABULARY, 17, generator=g, dtype=torch.float64).to(dtype)
    bias_V = torch.randn(VOCABULARY, generator=g, dtype=torch.float64).to(dtype)
    labels_T = torch.randint(VOCABULARY, (BOUNDS[-1],), generator=g)
    return [hidden_TD, weight_VD, bias_V], labels_T, torch.tensor(BOUNDS, dtype=torch.int32)


def plain_logps(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, **options):
    return plain_logps_S(hidden_TD, weight_VD, bias_V, labels_T, cu_seqlens, **options).view(-1, 2)


def references(policy_logps_P2):
    """Two references near the policy and one far from it, so that clips and weights matter."""
    g = torch.Generator().manual_seed(1)
    noise_KP2 = torch.randn(3, *policy_logps_P2.shape, generator=g, dtype=torch.float64)
    return policy_logps_P2.detach().double() + noise_KP2 * torch.tensor([0.3, 0.5, 4.0])[:, None, None]


def pair_losses(ref_logps_KP2, objective):
    """What a trainer passes: losses weighted by each pair's share of the batch."""
    weight_P = torch.tensor([0.5, 1.0, 0.25, 2.0, 0.01], dtype=torch.float64) / 5

    def loss_of_pairs(logps_C2, pairs):
        refs_KC2, weight_C = ref_logps_KP2[:, pairs].to(logps_C2), weight_P[pairs].to(logps_C2)
        return weight_C * preference_loss(logps_C2, refs_KC2, objective).losses_P

    return loss_of_pairs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [0.2, 20.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_larger_than_plain_torchs(options, scale, dtype):
    """Draw by draw. A margin is beta times a difference of log-probs of hundreds of nats, whose last digit moves a pair's
    coefficient by many of its own; how far it moves the exact results is allowed, and computed: each pair's margin is shifted by
    the rounding of its terms to float32, and what that does to loss and gradients is added up over the pairs."""
    for seed in range(8):
        tensors, labels_T, cu_seqlens = inputs(dtype, scale, seed)
        exact_logps_P2 = plain_logps(*doubled(tensors), labels_T, cu_seqlens, **options)
        loss_of_pairs = pair_losses(references(exact_logps_P2), Objective())
        rounding_P2 = float32_rounding(*tensors, labels_T, cu_seqlens, **options).view(-1, 2)

        def ours(h, w, b):
            return linear_preference_loss(h, w, labels_T, cu_seqlens, loss_of_pairs, bias=b, **options).loss  # noqa: B023

        def plain(h, w, b, shift_P2=0.0):
            logps_P2 = plain_logps(h, w, b, labels_T, cu_seqlens, **options)  # noqa: B023
            return loss_of_pairs(logps_P2 + shift_P2, slice(0, 5)).sum()  # noqa: B023

        got, eager = (with_gradients(function, tensors, 0.7) for function in (ours, plain))
        exact = with_gradients(plain, doubled(tensors), 0.7)
        moved = [torch.zeros_like(x) for x in exact]
        for pair in range(len(rounding_P2)):
            shift_P2 = torch.zeros_like(rounding_P2)
            shift_P2[pair] = rounding_P2[pair] * torch.tensor([1.0, -1.0])
            shifted = with_gradients(functools.partial(plain, shift_P2=shift_P2), doubled(tensors), 0.7)
            moved = [total + (mine - x).abs() for total, mine, x in zip(moved, shifted, exact, strict=True)]
        for name, *values, shift in zip(
            ("loss", "d_hidden", "d_weight", "d_bias"), got, eager, exact, moved, strict=True
        ):
            assert_no_worse_than_plain(*values, dtype, f"{name}, seed {seed}", conditioning=shift)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.name}-{o.loss_type}-{o.label_smoothing}")
def test_every_objective_matches_its_definition(objective):
    tensors, labels_T, cu_seqlens = inputs(torch.float64)
    exact_logps_P2 = plain_logps(*tensors, labels_T, cu_seqlens)
    loss_of_pairs = pair_losses(references(exact_logps_P2), objective)
    result = linear_preference_loss(*tensors[:2], labels_T, cu_seqlens, loss_of_pairs, bias=tensors[2])
    torch.testing.assert_close(result.policy_logps_P2, exact_logps_P2)
    exact = with_gradients(
        lambda h, w, b: loss_of_pairs(plain_logps(h, w, b, labels_T, cu_seqlens), slice(0, 5)).sum(), tensors, 0.7
    )
    got = with_gradients(
        lambda h, w, b: linear_preference_loss(h, w, labels_T, cu_seqlens, loss_of_pairs, bias=b).loss, tensors, 0.7
    )
    for mine, theirs in zip(got, exact, strict=True):
        assert theirs.abs().max() > 0  # an objective that is flat here would test nothing
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("options", OPTIONS)
def test_finite_differences(options):
    """The derivative along random directions, with an upstream gradient that is not one (gradcheck would run backward twice)."""
    tensors, labels_T, cu_seqlens = inputs(torch.float64)
    loss_of_pairs = pair_losses(references(plain_logps(*tensors, labels_T, cu_seqlens, **options)), Objective())

    def tripled(h, w, b):
        return 3 * linear_preference_loss(h, w, labels_T, cu_seqlens, loss_of_pairs, bias=b, **options).loss

    _, *grads = with_gradients(tripled, tensors, 1.0)
    g = torch.Generator().manual_seed(2)
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        step = 1e-5 * torch.randn(tensor.shape, generator=g, dtype=torch.float64)
        ahead, behind = ([*tensors[:i], tensor + sign * step, *tensors[i + 1 :]] for sign in (1, -1))
        difference = (tripled(*ahead) - tripled(*behind)) / 2
        torch.testing.assert_close((grad * step).sum(), difference, rtol=1e-5, atol=1e-12)


def test_it_is_sequence_logps_and_a_loss():
    """The trainer may choose either by measurement, so they must agree; and in a tied head gradients of both uses add up."""
    (hidden_TD, weight_VD, _), labels_T, cu_seqlens = inputs(torch.float32)
    weight = weight_VD.requires_grad_()
    tokens = torch.arange(BOUNDS[-1]) % VOCABULARY  # hidden states that come from the tied matrix itself
    loss_of_pairs = pair_losses(
        references(sequence_logps(hidden_TD, weight, labels_T, cu_seqlens).view(-1, 2)), Objective()
    )

    two_pass = loss_of_pairs(
        sequence_logps(weight[tokens], weight, labels_T, cu_seqlens).view(-1, 2), slice(0, 5)
    ).sum()
    (expected,) = torch.autograd.grad(two_pass, weight)
    result = linear_preference_loss(weight[tokens], weight, labels_T, cu_seqlens, loss_of_pairs)
    torch.testing.assert_close(result.loss, two_pass)
    torch.testing.assert_close(torch.autograd.grad(result.loss, weight)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_wanted_gradients_are_made(wanted, monkeypatch):
    tensors, labels_T, cu_seqlens = inputs(torch.float32)
    tensors[wanted].requires_grad_()
    made = []
    monkeypatch.setattr(
        module,
        "_loss_and_gradients",
        lambda b, totals, g, f=module._loss_and_gradients: made.append(totals) or f(b, totals, g),
    )
    loss_of_pairs = pair_losses(torch.zeros(1, 5, 2), Objective(name="dpo"))
    linear_preference_loss(*tensors[:2], labels_T, cu_seqlens, loss_of_pairs, bias=tensors[2]).loss.backward()
    assert [total is not None for total in made[0]] == [i == wanted for i in range(3)]
    assert [t.grad is not None for t in tensors] == [i == wanted for i in range(3)]


def test_without_grad_nothing_is_kept():
    tensors, labels_T, cu_seqlens = inputs(torch.float32)
    loss_of_pairs = pair_losses(torch.zeros(1, 5, 2), Objective(name="dpo"))
    leaves = [t.requires_grad_() for t in tensors]
    wanted = linear_preference_loss(*leaves[:2], labels_T, cu_seqlens, loss_of_pairs, bias=leaves[2])
    with torch.no_grad():
        got = linear_preference_loss(*leaves[:2], labels_T, cu_seqlens, loss_of_pairs, bias=leaves[2])
    assert wanted.loss.requires_grad and not got.loss.requires_grad and not wanted.policy_logps_P2.requires_grad
    torch.testing.assert_close(got, wanted.__class__(wanted.loss.detach(), wanted.policy_logps_P2))


@pytest.mark.parametrize("num_pairs", [0, 2])
def test_an_empty_batch_still_touches_the_weight(num_pairs):
    """A rank without tokens must take part in ZeRO-3's reduction, so its weight needs a gradient, of zeros."""
    (hidden_TD, weight_VD, _), labels_T, _ = inputs(torch.float32)
    weight_VD.requires_grad_()
    cu_seqlens = torch.zeros(2 * num_pairs + 1, dtype=torch.int32)
    result = linear_preference_loss(
        hidden_TD[:0], weight_VD, labels_T[:0], cu_seqlens, lambda logps, _: logps.sum(1) + 1
    )
    assert result.loss.item() == num_pairs and result.policy_logps_P2.tolist() == [[0.0, 0.0]] * num_pairs
    result.loss.backward()
    assert weight_VD.grad is not None and not weight_VD.grad.any()


def test_bitwise_repeatable_and_only_once():
    tensors, labels_T, cu_seqlens = inputs(torch.float32)
    loss_of_pairs = pair_losses(torch.zeros(1, 5, 2), Objective(name="dpo"))

    def loss(h, w, b):
        return linear_preference_loss(h, w, labels_T, cu_seqlens, loss_of_pairs, bias=b).loss

    first, second = with_gradients(loss, tensors, 0.7), with_gradients(loss, tensors, 0.7)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    value = loss(*(t.requires_grad_() for t in tensors))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot run twice"):
        value.backward()


def test_non_contiguous_inputs_and_autocast():
    (hidden_TD, weight_VD, _), labels_T, cu_seqlens = inputs(torch.float32)
    loss_of_pairs = pair_losses(torch.zeros(1, 5, 2), Objective(name="dpo"))
    plain = with_gradients(
        lambda h, w: linear_preference_loss(h, w, labels_T, cu_seqlens, loss_of_pairs).loss, [hidden_TD, weight_VD], 0.7
    )
    weight = torch.empty(weight_VD.shape[::-1]).t().copy_(weight_VD)  # column-major
    labels = torch.stack([labels_T, labels_T], 1)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):  # must not round what is float32 by choice
        odd = with_gradients(
            lambda h, w: linear_preference_loss(h, w, labels, cu_seqlens, loss_of_pairs).loss, [hidden_TD, weight], 0.7
        )
    for x, y in zip(odd, plain, strict=True):
        torch.testing.assert_close(x, y)


def test_chunks_hold_whole_pairs():
    assert module.chunks_of_pairs([0, 4, 9, 12, 33, 36, 36], 12) == [slice(0, 3), slice(3, 4), slice(4, 6)]
    assert module.chunks_of_pairs([0, 0, 5], 1) == [slice(0, 1), slice(1, 2)]
    assert module.chunks_of_pairs([0], 12) == []


def test_misfits_are_errors():
    (hidden_TD, weight_VD, _), labels_T, cu_seqlens = inputs(torch.float32)
    with pytest.raises(ValueError, match="two for each pair"):
        linear_preference_loss(hidden_TD, weight_VD, labels_T, cu_seqlens[:-1], lambda logps, _: logps.sum(1))
    with pytest.raises(ValueError, match="one loss each"):
        linear_preference_loss(hidden_TD, weight_VD, labels_T, cu_seqlens, lambda logps, _: logps.sum())


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_a_loss_of_tokens(wants_gradients):
    """Each token of a response with a weight of its own, beside autograd through the log-probs of tokens."""
    tensors, labels_T, cu_seqlens = inputs(torch.float64)
    weight_T = torch.randn(len(labels_T), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss_of_pairs(logps_C, pairs):
        start, stop = BOUNDS[2 * pairs.start], BOUNDS[2 * pairs.stop]
        assert logps_C.shape == (stop - start,)
        lengths = cu_seqlens[::2].diff().tolist()[pairs]
        return torch.stack([part.sum() for part in (weight_T[start:stop] * logps_C.square()).split(lengths)])

    every = torch.arange(len(labels_T) + 1)
    leaves = [x.clone().requires_grad_(wants_gradients) for x in tensors]
    plain_T = sequence_logps(*leaves[:2], labels_T, every, bias=leaves[2], impl="torch")
    expected = loss_of_pairs(plain_T, slice(0, 5)).sum()
    mine = [x.clone().requires_grad_(wants_gradients) for x in tensors]
    with torch.set_grad_enabled(wants_gradients):
        found = linear_preference_loss(*mine[:2], labels_T, cu_seqlens, loss_of_pairs, bias=mine[2], per_token=True)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.token_logps_T, plain_T.detach())
    sums_S = sequence_logps(*tensors[:2], labels_T, cu_seqlens, bias=tensors[2], impl="torch")
    torch.testing.assert_close(found.policy_logps_P2.flatten(), sums_S)
    if wants_gradients:
        for own, plain in zip(
            torch.autograd.grad(found.loss, mine), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(own, plain)
