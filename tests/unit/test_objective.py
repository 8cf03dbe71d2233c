"""Objective: the oracle's 180 cases, the equivalences of DESIGN.md section 4, and what is refused."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from mrpo_scale.errors import ConfigError
from mrpo_scale.objective import Objective, outer_loss, preference_loss

SHARED = Path(os.environ.get("MRPO_SHARED", Path(__file__).parents[3] / "shared"))
VECTORS = SHARED / "vectors" / "objective.json"


def random_logps(*shape, seed=0, scale=100.0):
    return -scale * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not VECTORS.exists(), reason=f"the oracle's cases are not beside this clone ({VECTORS})")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_agrees_with_the_oracle(dtype, tolerance):
    cases = json.loads(VECTORS.read_text())["cases"]
    assert len(cases) == 180
    for i, case in enumerate(cases):
        options = case["options"]
        objective = Objective(
            name=case["objective"],
            beta=options["beta"],
            epsilon_max=options["eps_max"],
            clip="adaptive" if options.get("adaptive", True) else "fixed",
            ref_weights=options.get("weights", "confidence"),
            aggregate=options.get("how", "harmonic"),
        )
        got = preference_loss(
            torch.tensor(case["policy_logps"], dtype=dtype), torch.tensor(case["ref_logps"], dtype=dtype), objective
        )
        fields = {
            "loss": got.loss,
            "margin": got.margins_P,
            "virtual": got.virtual_logps_P2,
            "weights": got.weights_KP,
            "epsilon": got.epsilon_P2,
            "clipped": got.clipped_KP2,
        }
        for name, expected in case["expect"].items():
            expected = torch.tensor(expected, dtype=torch.float64)
            error = ((fields[name].double() - expected).abs() / expected.abs().clamp(min=1)).max()
            assert error <= tolerance, (i, case["kind"], case["setting"], name, error.item())


@pytest.mark.parametrize("name", ["mrpo", "multi_dpo"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_one_reference_or_no_trust_region_is_dpo_on_the_anchor(name, loss_type):
    policy, refs = random_logps(6, 2), random_logps(3, 6, 2, seed=1)
    dpo = preference_loss(policy, refs, Objective("dpo", beta=0.3, loss_type=loss_type))
    alone = preference_loss(policy, refs[:1], Objective(name, beta=0.3, loss_type=loss_type))
    no_room = preference_loss(policy, refs, Objective(name, beta=0.3, epsilon_max=0.0, loss_type=loss_type))
    difference = (policy - refs[0])[:, 0] - (policy - refs[0])[:, 1]
    torch.testing.assert_close(dpo.margins_P, 0.3 * difference)
    torch.testing.assert_close(alone.loss, dpo.loss)
    torch.testing.assert_close(no_room.loss, dpo.loss)


@pytest.mark.parametrize("aggregate", ["harmonic", "geometric", "arithmetic", "min"])
@pytest.mark.parametrize("clip", ["adaptive", "fixed", "none"])
def test_swapping_the_labels_negates_the_margin(aggregate, clip):
    policy, refs = random_logps(6, 2), random_logps(3, 6, 2, seed=1)
    objective = Objective(aggregate=aggregate, clip=clip)
    straight = preference_loss(policy, refs, objective)
    swapped = preference_loss(policy.flip(-1), refs.flip(-1), objective)
    torch.testing.assert_close(swapped.margins_P, -straight.margins_P)


@pytest.mark.parametrize("aggregate", ["harmonic", "geometric", "arithmetic", "min"])
@pytest.mark.parametrize("ref_weights", ["confidence", "uniform", (0.2, 0.3, 0.5)])
def test_copies_of_one_reference_equal_that_reference(aggregate, ref_weights):
    policy, ref = random_logps(6, 2), random_logps(1, 6, 2, seed=1)
    got = preference_loss(policy, ref.expand(3, -1, -1), Objective(aggregate=aggregate, ref_weights=ref_weights))
    torch.testing.assert_close(got.virtual_logps_P2, ref[0])


def test_conservative_labels_mix_the_two_losses():
    margins = torch.tensor([0.7, -1.3], dtype=torch.float64)
    got = outer_loss(margins, Objective(label_smoothing=0.1))
    log_sigmoid = [-math.log(1 + math.exp(-m)) for m in (0.7, -1.3, -0.7, 1.3)]
    expected = [-0.9 * log_sigmoid[0] - 0.1 * log_sigmoid[2], -0.9 * log_sigmoid[1] - 0.1 * log_sigmoid[3]]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_ipo_and_hinge_by_hand():
    policy = torch.tensor([[-3.0, -9.0]], dtype=torch.float64)
    refs = torch.tensor([[[-4.0, -8.0]]], dtype=torch.float64)  # d = (-3 + 4) - (-9 + 8) = 2
    assert preference_loss(policy, refs, Objective(beta=0.1, loss_type="ipo")).loss.item() == pytest.approx(
        (2 - 5) ** 2
    )
    assert preference_loss(policy, refs, Objective(beta=0.1, loss_type="hinge")).loss.item() == pytest.approx(0.8)


@pytest.mark.parametrize("aggregate", ["harmonic", "geometric", "arithmetic", "min"])
def test_a_reference_of_weight_zero_is_gone(aggregate):
    policy, refs = random_logps(4, 2), random_logps(2, 4, 2, seed=1)
    refs[1] = -torch.inf
    got = preference_loss(policy, refs, Objective(ref_weights=(1.0, 0.0), aggregate=aggregate, clip="none"))
    torch.testing.assert_close(got.virtual_logps_P2, refs[0])
    assert torch.isfinite(got.loss)


def test_ties_and_zeros_do_not_divide_by_zero():
    refs = torch.zeros(3, 2, 2, dtype=torch.float64)
    got = preference_loss(torch.full((2, 2), -1.0, dtype=torch.float64), refs, Objective(epsilon_max=0.2))
    torch.testing.assert_close(got.epsilon_P2, torch.full((2, 2), 0.1, dtype=torch.float64))
    torch.testing.assert_close(got.weights_KP, torch.full((3, 2), 1 / 3, dtype=torch.float64))
    assert torch.isfinite(got.loss)


def test_gradients_reach_the_policy_only():
    policy, refs = random_logps(4, 2).requires_grad_(), random_logps(3, 4, 2, seed=1).requires_grad_()
    preference_loss(policy, refs, Objective()).loss.backward()
    assert policy.grad is not None and policy.grad.abs().min() > 0
    assert refs.grad is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": -1.0}, ["beta", "-1", "above 0"]),
        ({"beta": float("nan")}, ["beta", "nan"]),
        ({"epsilon_max": -0.1}, ["epsilon_max", "-0.1"]),
        ({"ref_weights": [0.5, 0.6]}, ["ref_weights", "1.1", "summing to 1"]),
        ({"ref_weights": "mean"}, ["ref_weights", "mean", "uniform"]),
        ({"name": "ppo"}, ["objective", "ppo", "multi_dpo"]),
        ({"aggregate": "median"}, ["aggregate", "median", "harmonic"]),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ["label_smoothing", "ipo"]),
        ({"label_smoothing": 0.5}, ["label_smoothing", "0.5"]),
        ({"name": "multi_dpo", "aggregate": "min"}, ["aggregate", "multi_dpo"]),
    ],
)
def test_what_makes_no_sense_is_refused(keys, words):
    with pytest.raises(ConfigError) as error:
        Objective(**keys)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_weight_for_every_reference():
    with pytest.raises(ConfigError, match=r"2 entries .* 3 references"):
        preference_loss(random_logps(4, 2), random_logps(3, 4, 2), Objective(ref_weights=[0.5, 0.5]))
