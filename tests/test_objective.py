"""Objective: the oracle's 180 cases, the equivalences of DESIGN.md section 4, the means with 60 digits, and what is refused."""

import json
import math
import os
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from mrpo_kernels import CombinedReferences, combine_references
from mrpo_kernels.virtual_reference import AGGREGATES, aggregate_logps

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.objective import Objective, combine, loss_against, preference_loss

SHARED = Path(os.environ.get("MRPO_SHARED", Path(__file__).parents[2] / "shared"))
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


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5, -1e-6])
@pytest.mark.parametrize("clip", ["adaptive", "fixed", "none"])
def test_swapping_the_labels_negates_the_margin(aggregate, clip):
    policy, refs = random_logps(6, 2), random_logps(3, 6, 2, seed=1)
    objective = Objective(aggregate=aggregate, clip=clip)
    straight = preference_loss(policy, refs, objective)
    swapped = preference_loss(policy.flip(-1), refs.flip(-1), objective)
    torch.testing.assert_close(swapped.margins_P, -straight.margins_P)


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5, -1e-6])
@pytest.mark.parametrize("ref_weights", ["confidence", "uniform", (0.2, 0.3, 0.5)])
def test_copies_of_one_reference_equal_that_reference(aggregate, ref_weights):
    policy, ref = random_logps(6, 2), random_logps(1, 6, 2, seed=1)
    got = preference_loss(policy, ref.expand(3, -1, -1), Objective(aggregate=aggregate, ref_weights=ref_weights))
    torch.testing.assert_close(got.virtual_logps_P2, ref[0])


def power_mean(logps_K, weights_K, p):
    """log (sum a exp(p c) / sum a)^(1/p) with 60 digits, of the floats as they are."""
    with localcontext(prec=60):
        pairs = [(Decimal(a), Decimal(c)) for a, c in zip(weights_K, logps_K, strict=True) if a]
        if math.isinf(p):
            return (max if p > 0 else min)(c for _, c in pairs)
        total = sum(a for a, _ in pairs)
        if p == 0:
            return sum(a * c for a, c in pairs) / total
        return (sum(a * (Decimal(p) * c).exp() for a, c in pairs) / total).ln() / Decimal(p)


@pytest.mark.parametrize("p", [-math.inf, -100, -1, -1e-3, -1e-8, 0, 1e-12, 1e-8, 1e-3, 0.5, 1, 100, math.inf])
@pytest.mark.parametrize(("dtype", "digit"), [(torch.float64, 2.0**-53), (torch.float32, 2.0**-24)])
def test_power_means_with_60_digits(p, dtype, digit):
    """K=4 log-probs from -1 to -3000, far apart or in a cluster; weights that differ a billionfold, or are zero. A mean whose
    weights sum to a rounding more than 1, or whose logarithm is off by one, is wrong by that over p."""
    generator = torch.Generator().manual_seed(0)
    logps_KP2 = -(3000 ** torch.rand(4, 24, 2, generator=generator, dtype=torch.float64))
    logps_KP2[:, ::2] = logps_KP2[:1, ::2] * (1 + 1e-4 * torch.rand(4, 12, 2, generator=generator))
    weights_KP = torch.rand(4, 24, generator=generator, dtype=torch.float64) ** 4
    weights_KP[1, ::3], weights_KP[3, ::5] = 0, 1e-9
    logps_KP2, weights_KP = logps_KP2.to(dtype), (weights_KP / weights_KP.sum(0)).to(dtype)
    got = aggregate_logps(logps_KP2, weights_KP, p)
    assert got.dtype == dtype
    for pair in range(24):
        for side in range(2):
            logps_K = logps_KP2[:, pair, side].tolist()
            exact = power_mean(logps_K, weights_KP[:, pair].tolist(), p)
            # Float64 is computed in itself: a few last digits of the result, or, near 0, of the sum that the mean is. Float32 is
            # rounded once.
            size = abs(float(exact)) if abs(p) >= 0.5 or dtype == torch.float32 else max(map(abs, logps_K))
            slack = (1.01 if dtype == torch.float32 else 8) * digit * size
            assert abs(float(Decimal(got[pair, side].item()) - exact)) <= slack, (pair, side, logps_K)


@pytest.mark.parametrize("p", [-1, 0, 1, math.inf])
def test_an_exponent_and_its_name_are_one_mean(p):
    (name,) = (name for name, exponent in AGGREGATES.items() if exponent == p)
    assert Objective(aggregate=p) == Objective(aggregate=str(p)) == Objective(aggregate=name)
    assert Objective(aggregate="0.50").aggregate == 0.5


@pytest.mark.parametrize("count", [3, 9])
def test_a_pair_is_the_same_bits_wherever_it_stands(count):
    """Combined in another order, or alone, as live and cached windows and a resumed run's are; cut and joined again."""
    refs = random_logps(count, 37, 2).float()
    combined = combine(refs, Objective(aggregate=-0.3))
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    shuffled = combine(refs[:, order], Objective(aggregate=-0.3))
    alone = [combine(refs[:, i : i + 1], Objective(aggregate=-0.3)) for i in range(37)]
    for other in (shuffled[order.argsort()], CombinedReferences.joined(alone)):
        for name, values in vars(combined).items():
            assert torch.equal(getattr(other, name), values), name
    assert combined[3:5].ref_logps_KP2.shape == (count, 2, 2) and combined[3:5].epsilon_P2.shape == (2, 2)


@pytest.mark.parametrize("name", ["mrpo", "dpo", "multi_dpo"])
def test_a_loss_in_parts_is_the_loss_of_the_whole(name):
    policy, refs, objective = random_logps(7, 2), random_logps(3, 7, 2, seed=1), Objective(name)
    whole, combined = preference_loss(policy, refs, objective), combine(refs, objective)
    parts = [loss_against(policy[pairs], combined[pairs], objective) for pairs in (slice(0, 3), slice(3, 7))]
    for field in ("losses_P", "rewards_P2", "margins_P", "virtual_logps_P2", "epsilon_P2"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field
    assert combined.weights_KP.shape[0] == (1 if name == "dpo" else 3)


def test_which_reference_decides():
    """The lowest after the clip, of those with weight: the last of these is lowest and has none, the second is clipped to -11."""
    refs = torch.tensor([[[-10.0, -10.0]], [[-90.0, -9.5]], [[-95.0, -99.0]]])
    modes = {"epsilon_max": 0.1, "clip": "fixed", "aggregate": "harmonic"}
    assert combine_references(refs, ref_weights=[0.5, 0.5, 0.0], **modes).decides.tolist() == [[1, 0]]


def test_conservative_labels_mix_the_two_losses():
    margins = torch.tensor([0.7, -1.3], dtype=torch.float64)
    policy = torch.stack([margins, torch.zeros(2)], -1)
    got = preference_loss(policy, torch.zeros(1, 2, 2), Objective(beta=1.0, label_smoothing=0.1)).losses_P
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


@pytest.mark.parametrize("aggregate", [*AGGREGATES, 0.5, -1e-6])
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
        ({"aggregate": "median"}, ["aggregate", "median", "harmonic", "exponent"]),
        ({"aggregate": float("nan")}, ["aggregate: nan", "harmonic"]),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, ["label_smoothing", "ipo"]),
        ({"label_smoothing": 0.5}, ["label_smoothing", "0.5"]),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ["label_smoothing", "0.5"]),
        ({"loss_type": "exo_pair"}, ["label_smoothing: 0", "exo_pair", "0.001"]),
        ({"loss_type": "aot"}, ["loss_type: aot", "sorts", "sigmoid"]),
        ({"loss_type": "aot_unpaired"}, ["loss_type: aot_unpaired", "sorts"]),
        ({"loss_type": "dpo_norm"}, ["loss_type: dpo_norm", "sigmoid_norm"]),
        ({"loss_type": "apo_zer"}, ["did you mean `apo_zero`"]),
        ({"loss_type": []}, ["loss_type", "one or more"]),
        ({"loss_type": ["sft", "sft"]}, ["loss_type: sft sft", "once"]),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, ["loss_weights", "1 entries for 2"]),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -0.1]}, ["loss_weights", "-0.1", ">= 0"]),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 0.0]}, ["loss_weights", "above 0"]),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, ["discopop_tau", "0.05"]),
        ({"reference_margin": "positive"}, ["reference_margin: positive", "nonnegative"]),
        ({"name": "multi_dpo", "reference_margin": "nonnegative"}, ["reference_margin", "multi_dpo"]),
        ({"loss_type": "nca_pair", "name": "multi_dpo"}, ["nca_pair", "multi_dpo"]),
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
