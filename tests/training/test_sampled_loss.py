"""The estimators of KD and RLHF against autograd of their exact losses, over all responses of a tabular policy in float64."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from mrpo_kernels.virtual_reference import CLIPS, clip_to_anchor

from mrpo_scale.objective import Objective, combine
from mrpo_scale.training.sampled_loss import sampled_loss

END, MOST = 2, 3
#: All responses over the words 0, 1 and an end: over after it, or cut after three tokens.
RESPONSES = [
    ids
    for n in range(1, MOST + 1)
    for ids in itertools.product(range(3), repeat=n)
    if END not in ids[:-1] and (ids[-1] == END or n == MOST)
]
PREFIXES = [ids for n in range(MOST) for ids in itertools.product(range(2), repeat=n)]
BETA = 0.3


def table(seed):
    return torch.randn(len(PREFIXES), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logps(logits):
    """[15] of every response."""
    token_logps = logits.log_softmax(-1)
    return torch.stack([sum(token_logps[PREFIXES.index(y[:i]), y[i]] for i in range(len(y))) for y in RESPONSES])


@pytest.fixture(scope="module")
def world():
    """Three references, rewards and lengths of every response, and every pair of responses."""
    i, j = torch.cartesian_prod(torch.arange(len(RESPONSES)), torch.arange(len(RESPONSES))).T
    both = torch.stack([i, j], -1)
    references_KN = torch.stack([logps(table(seed)) for seed in (1, 2, 3)]) * torch.tensor([[1.0], [1.4], [0.8]])
    rewards_N = torch.randn(len(RESPONSES), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    lengths_N = torch.tensor([len(y) for y in RESPONSES])
    return SimpleNamespace(both=both, references=references_KN, rewards=rewards_N, lengths=lengths_N)


def objective_of(name, clip):
    weights = (0.2, 0.5, 0.3)
    return Objective(name=name, beta=BETA, clip=clip, epsilon_max=0.3, ref_weights=weights)


def values(world, logps_N, name, clipped_KP2, normalize):
    """f of every pair's two responses [P, 2], written out."""
    logps_P2, weights = logps_N[world.both], (0.2, 0.5, 0.3)
    taught = (1, 2) if name == "kd" else (0, 1, 2)
    total = sum(weights[k] * (logps_P2 - clipped_KP2[k]) for k in taught)
    if normalize:
        total = total / world.lengths[world.both]
    return BETA * total - (world.rewards[world.both] if name == "rlhf" else 0)


def exact(world, name, clip, normalize):
    """Gradient of the expected loss, its own dependence on the policy included."""
    logits = table(0).requires_grad_()
    logps_N = logps(logits)
    ref_KP2 = world.references[:, world.both]
    clipped_KP2 = clip_to_anchor(ref_KP2, CLIPS[clip](ref_KP2, 0.3))
    chance_P = logps_N[world.both].sum(-1).exp()
    assert chance_P.sum().item() == pytest.approx(1)
    loss = (chance_P * values(world, logps_N, name, clipped_KP2, normalize).mean(-1)).sum()
    return torch.autograd.grad(loss, logits)[0], loss.item()


def estimated(world, name, clip, normalize, loss_of=None):
    """Mean over all pairs of the gradient that the trainer's loss has for each."""
    objective = objective_of(name, clip)
    logits = table(0).requires_grad_()
    policy_P2 = logps(logits)[world.both]
    references = combine(world.references[:, world.both], objective)
    options = {
        "lengths_P2": world.lengths[world.both] if normalize else None,
        "rewards_P2": world.rewards[world.both] if name == "rlhf" else None,
    }
    losses_P = (loss_of or (lambda *args, **kw: sampled_loss(*args, **kw).losses_P))(
        policy_P2, references, objective, **options
    )
    mean = (policy_P2.detach().sum(-1).exp() * losses_P).sum()
    return torch.autograd.grad(mean, logits)[0], mean.item()


CASES = [
    *(("kd", clip, normalize) for clip in ("fixed", "none", "adaptive") for normalize in (True, False)),
    ("rlhf", "none", False),
]


@pytest.mark.parametrize(("name", "clip", "normalize"), CASES)
def test_the_expected_gradient_is_that_of_the_expected_loss(world, name, clip, normalize):
    gradient, loss = exact(world, name, clip, normalize)
    found, mean = estimated(world, name, clip, normalize)
    assert gradient.norm() > 0.01
    assert (found - gradient).abs().max() < 1e-12
    assert mean == pytest.approx(loss, rel=1e-12)


def test_rlhf_clips_no_reference(world):
    """Eq. 6 has no trust region, whatever `clip` says."""
    found, _ = estimated(world, "rlhf", "adaptive", False)
    assert torch.equal(found, estimated(world, "rlhf", "none", False)[0])


def test_a_backward_through_the_log_ratio_is_noise(world):
    """The negative control: not zero for one sample, zero in the mean."""
    gradients = []

    def k1(policy_P2, references, objective, **options):
        ratios_P2 = sum(w * (policy_P2 - references.clipped_KP2[k]) for k, w in ((1, 0.5), (2, 0.3)))
        gradients.append(torch.autograd.grad(ratios_P2[17, 0], policy_P2, retain_graph=True)[0])
        return objective.beta * ratios_P2.mean(-1)

    found, _ = estimated(world, "kd", "none", False, k1)
    assert gradients[0].abs().max() > 0.1
    assert found.abs().max() < 1e-12
    assert exact(world, "kd", "none", False)[0].norm() > 0.01


@pytest.mark.parametrize("normalize", [True, False])
def test_the_difference_of_two_samples_is_biased_where_epsilon_is_adaptive(world, normalize):
    """Eq. 9 looks at both samples, so the other one's value is no baseline; here it is one with an epsilon of its own."""

    def leave_one_out(policy_P2, references, objective, lengths_P2=None, rewards_P2=None):
        scale = objective.beta / (1 if lengths_P2 is None else lengths_P2.double())
        logps_P2 = policy_P2.detach()
        ratios_P2 = sum(w * (logps_P2 - references.clipped_KP2[k]) for k, w in ((1, 0.5), (2, 0.3)))
        advantages_P2 = scale * (ratios_P2 + 0.8)  # f + s
        return ((advantages_P2 - advantages_P2.flip(-1)) / 2 * policy_P2).sum(-1)

    for clip, biased in (("fixed", False), ("none", False), ("adaptive", True)):
        gradient, _ = exact(world, "kd", clip, normalize)
        found, _ = estimated(world, "kd", clip, normalize, leave_one_out)
        error = ((found - gradient).norm() / gradient.norm()).item()
        assert error > 1e-3 if biased else error < 1e-12, (clip, error)


def test_what_two_equal_samples_teach(world):
    """Nothing: Eq. 9 gives equal texts the epsilon that the baseline has."""
    for name, clip in (("kd", "fixed"), ("kd", "none"), ("kd", "adaptive"), ("rlhf", "none")):
        objective = objective_of(name, clip)
        same = combine(world.references[:, [[3, 3]]], objective)
        rewards = torch.tensor([[0.7, 0.7]], dtype=torch.float64) if name == "rlhf" else None
        found = sampled_loss(
            torch.tensor([[-2.0, -2.0]], dtype=torch.float64),
            same,
            objective,
            lengths_P2=torch.tensor([[2, 2]]),
            rewards_P2=rewards,
        )
        assert found.coefficients_P2.abs().max() < 1e-15
