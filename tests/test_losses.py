"""Every outer loss against formulas written apart from the code, in float64 (through a model: training/test_losses.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from mrpo_kernels.outer_losses import LEVELLED, LOSSES

from mrpo_scale.objective import Objective, combine, loss_against, preference_loss
from tests.loss_formulas import BETA, loss_by_formula, objective


def some_pairs(pairs=6, references=3):
    generator = torch.Generator().manual_seed(3)
    refs = -20 + 2 * torch.randn(references, pairs, 2, generator=generator, dtype=torch.float64)
    policy = refs[0] + 1.5 * torch.randn(pairs, 2, generator=generator, dtype=torch.float64)
    return policy, refs, torch.randint(3, 30, (pairs, 2), generator=generator)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name):
    policy, refs, lengths = some_pairs()
    got = preference_loss(policy, refs, objective(name), lengths_P2=lengths)
    expected = loss_by_formula(name, policy, got.virtual_logps_P2, refs[0], lengths)
    torch.testing.assert_close(got.losses_P, expected, rtol=1e-12, atol=1e-12)
    policy.requires_grad_()
    references = combine(refs, objective(name))
    assert torch.autograd.gradcheck(lambda x: loss_against(x, references, objective(name), lengths).losses_P, policy)


@pytest.mark.parametrize("name", LEVELLED)
def test_the_virtual_references_level_does_not_matter(name):
    policy, refs, lengths = some_pairs()
    references = combine(refs, objective(name))
    moved = replace(references, virtual_logps_P2=references.virtual_logps_P2 + torch.arange(6.0)[:, None])
    once, again = (loss_against(policy, r, objective(name), lengths).losses_P for r in (references, moved))
    torch.testing.assert_close(once, again, rtol=1e-12, atol=1e-12)


def test_several_losses_are_added_with_their_weights():
    policy, refs, lengths = some_pairs()
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)  # MPO
    got = preference_loss(policy, refs, objective(names, loss_weights=weights), lengths_P2=lengths)
    alone = [preference_loss(policy, refs, objective(n), lengths_P2=lengths).losses_P for n in names]
    torch.testing.assert_close(got.losses_P, sum(w * x for w, x in zip(weights, alone, strict=True)))
    torch.testing.assert_close(list(got.parts.values()), alone)


def test_losses_per_token_need_lengths_and_ipo_without_them_is_of_whole_responses():
    policy, refs, _ = some_pairs()
    for name in ("sigmoid_norm", "sft"):
        with pytest.raises(ValueError, match="lengths_P2"):
            preference_loss(policy, refs, objective(name))
    ipo, whole = (preference_loss(policy, refs, objective(n)).losses_P for n in ("ipo", "ipo_whole"))
    assert torch.equal(ipo, whole)


def test_a_pair_far_from_right_has_a_finite_loss():
    policy, refs = torch.tensor([[-5000.0, -1.0]]), torch.tensor([[[-1.0, -5000.0]]])
    for name in LOSSES:
        assert preference_loss(policy, refs, objective(name), lengths_P2=torch.ones(1, 2)).loss.isfinite(), name


def test_a_reference_that_prefers_the_rejected_response_counts_as_undecided():
    """HyPO: -logsig(beta (policy margin - max(0, reference margin))); the level of the pair stays."""
    policy, refs, _ = some_pairs(pairs=40)
    got = preference_loss(policy, refs, Objective(beta=BETA, reference_margin="nonnegative"))
    plain = preference_loss(policy, refs, Objective(beta=BETA))
    reference = (plain.virtual_logps_P2[:, 0] - plain.virtual_logps_P2[:, 1]).numpy()
    assert 5 < (reference < 0).sum() < 35, "both kinds of pairs"
    d = BETA * ((policy[:, 0] - policy[:, 1]).numpy() - np.maximum(0, reference))
    assert got.losses_P.numpy() == pytest.approx(np.log1p(np.exp(-d)), rel=1e-12)
    assert got.virtual_logps_P2.mean(-1).numpy() == pytest.approx(plain.virtual_logps_P2.mean(-1).numpy(), rel=1e-12)
    assert torch.equal(got.losses_P[reference >= 0], plain.losses_P[reference >= 0])
