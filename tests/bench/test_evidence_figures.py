"""The study's statistics, its rules, and that the tables in the repository are those of the stored runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import report
from benchmarks.evidence.intervals import Difference, paired_difference, share_interval
from benchmarks.evidence.records import packed, unpacked
from benchmarks.evidence.rules import calibration, combined, fitted_weights, margins, weights_of
from benchmarks.evidence.scores_alone import proposition2, without_length
from benchmarks.evidence.study import METHODS, RESULTS, split
from benchmarks.evidence.tables import claims_across
from mrpo_scale.objective import Objective, combine

KEPT = Path(__file__).parents[2] / RESULTS


def logps(margin_KN: list[list[float]]) -> torch.Tensor:
    """[K, N, 2] with these margins."""
    half = torch.tensor(margin_KN)[..., None] / 2
    return torch.cat([half, -half], -1) - 20


def test_parts_do_not_share_a_prompt_and_come_again() -> None:
    keys = np.repeat(np.arange(30), [1, 2, 3] * 10)
    part_N = split(keys, {"validation": 8, "test": 20, "final": 7, "specialists": 5, "pool": 10})
    assert all(len(set(part_N[keys == key])) == 1 for key in keys)
    for part, count in {"validation": 8, "test": 20, "pool": 10}.items():
        assert count <= (part_N == part).sum() <= count + 2
    assert (part_N == "unused").any()
    assert (split(keys, {"validation": 8, "test": 20, "final": 7, "specialists": 5, "pool": 10}) == part_N).all()


def test_intervals_are_those_of_paired_pairs() -> None:
    """Two methods that differ on a tenth of the pairs, always the same way: the normal approximation of that tenth."""
    rng = np.random.default_rng(1)
    base = rng.random((1, 2000)) < 0.6
    better = base | (rng.random((1, 2000)) < 0.1)
    difference = paired_difference(np.repeat(better, 5, 0), np.repeat(base, 5, 0))
    share = (better & ~base).mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert difference.mean == pytest.approx(share)
    assert (difference.low, difference.high) == pytest.approx((share - half, share + half), abs=0.15 * half)
    assert difference.paired_d is None and difference.seeds == 5  # nothing varies over seeds
    assert difference.answer == "yes"
    assert share_interval(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson's, from tables


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.001, 0.1, "yes"), (-0.1, -0.001, "no"), (-0.009, 0.008, "no"), (-0.02, 0.005, "undecided")],
)
def test_answers_are_the_plans(low: float, high: float, answer: str) -> None:
    assert Difference(0.0, low, high, None, None, 5).answer == answer


def test_a_claim_is_yes_only_where_no_world_says_no() -> None:
    def world(**answers: str) -> dict[str, object]:
        return {"claims": [{"name": name, "answer": answer} for name, answer in answers.items()]}

    found = claims_across([world(a="yes", b="yes", c="undecided"), world(a="undecided", b="no", c="too few seeds")])
    assert {claim["name"]: claim["answer"] for claim in found} == {"a": "yes", "b": "no", "c": "undecided"}
    assert found[0]["line"] == "| a | **yes** | yes | undecided |"


def test_margins_survive_being_packed() -> None:
    values = np.random.default_rng(0).normal(size=37).astype("f4")
    assert (unpacked(packed(values)) == values).all()


def test_fitted_weights_and_calibration_find_the_reference_that_knows() -> None:
    rng = np.random.default_rng(0)
    informed, noise = np.abs(rng.normal(size=400)) + 0.5, rng.normal(size=400)
    margin_KN = torch.tensor(np.stack([noise, informed]), dtype=torch.float32)
    weights = fitted_weights(margin_KN)
    assert sum(weights) == pytest.approx(1) and weights[1] > 0.9
    coefficients = calibration(margin_KN)
    assert coefficients[1] > 5 * abs(coefficients[0])
    assert weights_of(METHODS["mrpo-one-hot"], logps(margin_KN.tolist())) == (0.0, 1.0)


def test_a_margin_counts_only_where_all_agree() -> None:
    ref_logps = logps([[1.0, 1.0, -3.0], [2.0, -5.0, -1.0], [3.0, 4.0, -2.0], [2.0, 2.0, -2.0]])
    found = combined(METHODS["rule-agree"], ref_logps, torch.arange(3), torch.zeros(3))
    assert margins(found.virtual_logps_P2).tolist() == pytest.approx([2.0, 1.0, -2.0], abs=1e-5)


def test_a_rule_reads_no_label_of_other_pairs() -> None:
    """Swapping chosen and rejected outside the validation pairs only negates their margins."""
    torch.manual_seed(0)
    ref_logps, difference, validation = torch.randn(4, 40, 2) - 30, torch.randn(40), torch.arange(20)
    for name in ("rule-calibrated", "rule-fitted", "mrpo-validation"):
        method = METHODS[name]
        references = ref_logps[: len(method.references)]
        swapped = torch.cat([references[:, :20], references[:, 20:].flip(-1)], 1)
        sign = torch.where(torch.arange(40) < 20, 1.0, -1.0)
        one = margins(combined(method, references, validation, difference).virtual_logps_P2)
        other = margins(combined(method, swapped, validation, sign * difference).virtual_logps_P2)
        torch.testing.assert_close(other, sign * one, rtol=1e-4, atol=1e-4)


def test_proposition_2_fails_for_the_harmonic_mean_of_clipped_references_and_holds_for_the_geometric() -> None:
    torch.manual_seed(0)
    ref_logps = -torch.rand(3, 4000, 2) * 60 - 5
    policy = ref_logps[0] + torch.randn(4000, 2) * 20
    counts = {}
    for aggregate in ("harmonic", "geometric"):
        found = combine(ref_logps, Objective(aggregate=aggregate, clip="fixed", epsilon_max=0.3))
        counts[aggregate] = proposition2(policy, found, found.weights_KP)
    assert counts["harmonic"]["apply"] == counts["geometric"]["apply"] > 500
    assert counts["harmonic"]["share"] > 0.05 and counts["geometric"]["fail"] == 0


def test_what_length_explains_is_taken_out() -> None:
    difference = torch.tensor([3.0, -2.0, 1.0, -4.0])
    rest = torch.tensor([0.5, 0.5, 0.5, 0.5])
    left = without_length(-2 * difference + rest, difference)
    assert (left > 0).all() and ((-2 * difference + rest) > 0).sum() == 2


def test_the_tables_are_those_of_the_stored_runs() -> None:
    kept = json.loads((KEPT / "summary.json").read_text())
    made = json.loads(json.dumps(report.summarise(KEPT)))
    assert [w["name"] for w in made["worlds"]] == [w["name"] for w in kept["worlds"]]
    for mine, theirs in zip(made["worlds"], kept["worlds"], strict=True):
        for row, old in zip(mine["rows"], theirs["rows"], strict=True):
            assert row["name"] == old["name"] and row["seeds"] == old["seeds"]
            if row["seeds"]:
                assert row["accuracy"] == pytest.approx(old["accuracy"], abs=1e-9)
    text = report.markdown(kept["worlds"], kept["commands"])
    assert (KEPT / "tables.md").read_text() == text
