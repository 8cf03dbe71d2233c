"""The parts of `mrpo bench` that need no model: the plan, the clock, the figures."""

import itertools

import numpy as np
import pytest
import torch

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.bench import clock as clock_module
from mrpo_scale.bench.arms import UNTIMED, Arm, plan_arms, plan_steps
from mrpo_scale.bench.clock import PHASES, PhaseClock
from mrpo_scale.bench.results import estimate, summarise
from mrpo_scale.bench.trainer import Measured, Survey


def test_what_holds_least_comes_first():
    names = [arm.name for arm in plan_arms([3, 2], ["live", "cached"], ["spread", "partition"])]
    cached = ["DPO cached", "MRPO K=2 cached", "MRPO K=3 cached"]
    live = ["DPO live", "MRPO K=2 live", "MRPO K=3 live"]
    assert names == [*cached, *(f"{n}, spread" for n in live), *(f"{n}, partition" for n in live)]


def test_every_round_has_every_arm_once_on_the_same_window():
    arms = plan_arms([1, 2, 3], ["live", "cached"], ["spread"])
    steps = plan_steps(arms, rounds=20, windows=3, heaviest=1, seed=5)
    assert steps == plan_steps(arms, rounds=20, windows=3, heaviest=1, seed=5)  # on every rank
    first, timed = steps[: len(UNTIMED) * len(arms)], steps[len(UNTIMED) * len(arms) :]
    assert [(s.arm, s.kind) for s in first] == [(arm, kind) for arm in arms for kind in UNTIMED]
    assert {s.window for s in first} == {1}
    rounds = [list(group) for _, group in itertools.groupby(timed, key=lambda s: s.round)]
    assert len(rounds) == 20
    for i, taken in enumerate(rounds):
        assert {s.arm for s in taken} == set(arms) and len(taken) == len(arms)
        assert {s.window for s in taken} == {i % 3} and {s.kind for s in taken} == {"timed"}
    assert len({tuple(s.arm for s in taken) for taken in rounds}) > 10  # no arm always follows the same one


def test_a_phase_inside_another_one_pauses_it(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: float(2 ** next(ticks)))
    clock = PhaseClock(torch.device("cpu"))
    with clock.phase("logging"):  # before the start nothing is counted, and nothing is stamped
        pass
    clock.start()  # 1
    with clock.phase("head and loss"):  # 2
        clock.timed("policy forward", lambda: None)()  # 4, 8
    with pytest.raises(KeyError), clock.phase("backward"):  # 16 after the 32 that ends the loss
        raise KeyError
    seconds = clock.stop()
    expected = {"other": (2 - 1) + (32 - 16) + (128 - 64), "head and loss": (4 - 2) + (16 - 8)}
    expected |= {"policy forward": 8 - 4, "backward": 64 - 32}
    assert seconds == {**dict.fromkeys(PHASES, 0.0), **expected} and sum(seconds.values()) == 128 - 1
    assert not clock.running


def measured(arm, round, seconds, rows=(0, 1), references=0, tokens=None):
    step = next(s for s in plan_steps([arm], round + 1, 1, 0, 0) if s.round == round)
    phases = {**dict.fromkeys(PHASES, 0.0), "backward": seconds}
    return Measured(
        step, phases, list(rows), tokens or [6, 4], policy_flops=600, reference_flops=references, useful_flops=500
    )


def test_ratios_are_paired_by_round():
    """The machine is ten times slower in the second round, for both arms: medians of ratios do not see it."""
    dpo, mrpo = Arm(1, "live", "spread"), Arm(2, "live", "spread")
    seconds = [1.0, 10.0, 2.0]
    taken = [measured(mrpo, i, 1.5 * s, references=400) for i, s in reversed(list(enumerate(seconds)))]
    taken += [measured(dpo, i, s, references=200) for i, s in enumerate(seconds)]
    survey = {dpo: Survey({"all_gather": 7}, {"all_gather": 1}, 0.5, 1.0), mrpo: Survey()}
    ranks = [(taken, survey), (taken, {dpo: Survey(), mrpo: Survey()})]
    base, arm = summarise([dpo, mrpo], ranks, peak_flops=1000.0)
    assert {arm["overhead"][name] for name in ("median", "low", "high")} == {1.5}
    assert arm["overhead"]["flop_floor"] == (600 + 400) / (600 + 200)
    assert arm["flops_per_step"] == {"policy": 1200, "references": 800, "useful": 1000}  # of both ranks
    assert base["seconds"]["median"] == 2.0 and base["tokens_per_second"] == 2 * 10 * 3 / 13
    assert base["mfu"] == pytest.approx(2 * 500 * 3 / (13 * 1000 * 2))
    assert base["collectives"] == {"all_gather": {"bytes": [7, 0], "calls": [1, 0]}}


def test_balance_is_of_the_ranks_in_each_micro_batch():
    """One rank has 6 and 4 tokens, the other 2 and 4: of 10 the mean has 8."""
    arm = Arm(1, "cached")
    ranks = [([measured(arm, i, 1.0, tokens=t) for i in range(3)], {arm: Survey()}) for t in ([6, 4], [2, 4])]
    (found,) = summarise([arm], ranks, None)
    assert found["balance"]["median"] == 0.8 and found["steps"][0]["tokens"] == 16


def test_arms_that_trained_other_pairs_do_not_compare():
    dpo, mrpo = Arm(1, "cached"), Arm(2, "cached")
    taken = [measured(dpo, 0, 1.0), measured(mrpo, 0, 1.0, rows=(0, 2))]
    with pytest.raises(TrainingError, match="did not train the same pairs"):
        summarise([dpo, mrpo], [(taken, {dpo: Survey(), mrpo: Survey()})], None)


def test_the_interval_covers_the_median_as_often_as_it_says():
    draw = np.random.default_rng(0)
    intervals = [estimate(draw.lognormal(0.0, 0.5, 30)) for _ in range(200)]
    inside = sum(i["low"] <= 1.0 <= i["high"] for i in intervals)
    assert 0.88 <= inside / 200 <= 0.99
