"""Comparisons: which runs are planned, what is refused, and figures against hand computations."""

import json
import math
import re
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.compare.command import _flags
from mrpo_scale.compare.plan import FIXED, Arm, Run, Shared, plan_arms, plan_runs
from mrpo_scale.compare.processes import is_complete, tail
from mrpo_scale.compare.results import bootstrap_difference, cohens_d, compare_runs, read_run
from mrpo_scale.compare.show import as_json, plot, table, verdict
from mrpo_scale.config.keys import MRPOConfig, ScriptArguments
from mrpo_scale.config.recipe import parse
from mrpo_scale.training.held_out import HeldOutScores


def compare_lines():
    """The commands of docs/paper.md, the loop over recipes written out."""
    page = (Path(__file__).parents[2] / "docs" / "paper.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in page.splitlines() if line.strip().startswith("mrpo compare")]
    recipes = re.search(r"for recipe in (.*); do", page)[1].split()
    return [line.replace("$recipe", name) for line in lines for name in (recipes if "$recipe" in line else [""])]


REFERENCES = [("anchor", None), ("B", '{"model": "B"}')]
SHARED = Shared({"beta": 0.1}, ("--max_steps", "3"), ("--config=r.yaml",), "")


def test_dpo_on_each_reference_is_always_there_and_varied_by_what_it_uses():
    arms = plan_arms(["mrpo", "multi_dpo"], ["epsilon_max=0,0.1", "beta=0.1"], REFERENCES)
    assert [arm.name for arm in arms] == [
        "dpo on anchor beta=0.1",
        "dpo on B beta=0.1",
        "mrpo epsilon_max=0 beta=0.1",
        "mrpo epsilon_max=0.1 beta=0.1",
        "multi_dpo epsilon_max=0 beta=0.1",
        "multi_dpo epsilon_max=0.1 beta=0.1",
    ]
    assert arms[1].argv == ("--objective=dpo", '--anchor={"model": "B"}', "--beta=0.1")
    assert "--aggregate=harmonic" in arms[4].argv, "multi_dpo refuses any other"
    assert (arms[0].reference, arms[2].reference) == ("anchor", None)


def test_an_objective_with_settings_of_its_own():
    """They win over --vary, and a list of weights is written with blanks."""
    words = ["dpo:each", "mrpo:aggregate=geometric,ref_weights=0.2 0.8", "mrpo"]
    arms = plan_arms(words, ["ref_weights=uniform,confidence"], REFERENCES)
    assert [arm.name for arm in arms[2:]] == [
        "mrpo aggregate=geometric ref_weights=0.2 0.8",
        "mrpo ref_weights=uniform",
        "mrpo ref_weights=confidence",
    ]
    assert arms[2].argv == ("--objective=mrpo", "--aggregate=geometric", "--ref_weights", "0.2", "0.8")
    assert arms[2].folder == "mrpo_aggregate=geometric_ref_weights=0.2_0.8"


@pytest.mark.parametrize(
    ("objectives", "vary", "words"),
    [
        (["ppo"], [], ["ppo", "multi_dpo"]),
        (["dpo:B"], [], ["dpo:B", "dpo:each"]),
        (["mrpo:clip"], [], ["mrpo:clip", "KEY=VALUE"]),
        (["mrpo"], ["beta"], ["--vary beta", "KEY=VALUE,VALUE"]),
        (["mrpo"], ["beta=1", "beta=2"], ["twice", "epsilon_max=0.01,0.1"]),
        (["mrpo"], ["max_length=128,256"], ["max_length", "same pairs"]),
        (["mrpo"], ["seed=1,2"], ["seed", "--seeds"]),
    ],
)
def test_what_cannot_be_planned(objectives, vary, words):
    with pytest.raises(ConfigError) as error:
        plan_arms(objectives, vary, REFERENCES)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("line", compare_lines(), ids=range(len(compare_lines())))
def test_every_command_of_the_papers_page_can_be_planned(line):
    """Each of its runs parses, with the recipe that it names (bf16 is switched off for machines without)."""
    words = shlex.split(line)
    flags, rest = _flags().parse_known_args(words[2:])
    assert rest == [] and flags.seeds == 3
    script, _ = parse(["--config", flags.config, "--bf16", "false"])
    references = [("anchor", None), *((f"B{k}", model) for k, model in enumerate(script.ref_models))]
    for arm in plan_arms(flags.objectives, flags.vary, references):
        parse(["--config", flags.config, "--bf16", "false", *arm.argv])


def test_keys_that_may_not_differ_exist():
    known = {key for kind in (ScriptArguments, MRPOConfig) for key in kind.__dataclass_fields__}
    assert not FIXED - known


def test_runs_differ_in_arm_and_seed_and_paths_are_no_settings(tmp_path):
    arms = plan_arms(["mrpo"], [], REFERENCES)
    runs = plan_runs(arms, SHARED, range(7, 9), tmp_path)
    assert [(run.arm.name, run.seed) for run in runs[:4]] == [
        ("dpo on anchor", 7),
        ("dpo on B", 7),
        ("mrpo", 7),
        ("dpo on anchor", 8),
    ]
    assert runs[2].argv == (
        *("--config=r.yaml", "--max_steps", "3", "--objective=mrpo", "--data_seed=7"),
        f"--output_dir={tmp_path}/mrpo/seed-7",
    )
    elsewhere = plan_runs(arms, SHARED, range(7, 9), tmp_path / "moved")
    assert [run.settings for run in elsewhere] == [run.settings for run in runs]
    assert len({json.dumps(run.settings) for run in runs}) == len({run.folder for run in runs}) == 6


def test_cohens_d_by_hand():
    """Means 3 and 1, variances 1 and 4 from 3 values each: pooled deviation sqrt(2.5)."""
    assert cohens_d([2, 3, 4], [-1, 1, 3]) == pytest.approx(2 / math.sqrt(2.5))
    # Unequal counts: (1 * 2 + 2 * 1) / 3 is the pooled variance of [0, 2] and [1, 2, 3].
    assert cohens_d([0, 2], [1, 2, 3]) == pytest.approx(-1 / math.sqrt(4 / 3))
    assert cohens_d([1.0], [1, 2]) is None, "one seed has no deviation"
    assert cohens_d([2, 2], [1, 1]) is None, "nothing varies"


def test_the_bootstrap_is_paired():
    """Two arms that are right on the same half of the pairs do not differ; unpaired, the interval would be wide."""
    right = np.tile([True, False], 50)[None]
    assert bootstrap_difference(right, right, 0.95) == (0.0, 0.0)
    # The error of 100 independent differences of variance 1/2: 1.96 * sqrt(0.5 / 100) = 0.139 around 0.
    draw = np.random.default_rng(0)
    a, b = draw.random((2, 1, 400)) < 0.5
    low, high = bootstrap_difference(a, b, 0.95)
    expected = 1.96 * statistics.pstdev((a[0].astype(float) - b[0]).tolist()) / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)  # 4000 resamples know a quantile to about 4%
    assert (high + low) / 2 == pytest.approx(a.mean() - b.mean(), abs=0.01)


def test_seeds_are_resampled_too():
    """Seeds that all pairs agree on and that differ by 10 points: only the seeds' noise is left."""
    a = np.array([[True] * 100, [True] * 90 + [False] * 10])
    b = np.array([[True] * 95 + [False] * 5] * 2)
    narrow = bootstrap_difference(a[:1], b, 0.95)
    wide = bootstrap_difference(a, b, 0.95)
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


KEYS = np.array([f"{i:016d}" for i in range(8)], dtype="S16")
# Reference A ranks pairs 0-5 right, B pairs 2-7: they disagree on 0, 1, 6 and 7.
A, B = np.arange(8) < 6, np.arange(8) > 1


def logps(right):
    return np.stack([np.where(right, -1.0, -3.0), np.full(len(right), -2.0)], axis=-1).astype(np.float32)


def finished(folder: Path, arm: Arm, seed: int, right, keys=KEYS, margin=0.5) -> Run:
    """A run folder as training leaves it, for a policy that ranks the pairs ``right`` right."""
    run = Run(
        arm,
        seed,
        folder / arm.folder / f"seed-{seed}",
        (),
        {"recipe": {}, "launch": "", "words": [arm.name, str(seed)]},
    )
    run.folder.mkdir(parents=True)
    by_name = {"anchor": A, "B": B}
    names = ["anchor"] if arm.reference else ["anchor", "B"]
    shown = [by_name[arm.reference or name] for name in names]
    HeldOutScores(names, keys, logps(right), np.stack([logps(one) for one in shown])).save(
        run.folder / "eval_logps.npz"
    )
    accuracy = float(np.mean(right))
    evals = {"eval_logps/accuracies": accuracy, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": margin}
    history = [{"step": 2, **evals, "eval_logps/accuracies": 0.5}, {"step": 4, **evals}]
    state = {"global_step": 4, "max_steps": 4, "log_history": history}
    (run.folder / "trainer_state.json").write_text(json.dumps(state))
    row = {"name": "MRPO", "ranking_accuracy": accuracy, "reward_accuracy": 0.5, "reward_margin": margin}
    (run.folder / "run.json").write_text(json.dumps({"rows": [row]}))
    (run.folder / "compare.json").write_text(json.dumps({"settings": run.settings}))
    return run


@pytest.fixture
def runs(tmp_path):
    """DPO on A right on 4 and 6 of 8 pairs, on B on 4 and 4; MRPO at two epsilons on 8, 8 and 6, 8."""
    dpo_a, dpo_b, none, some = plan_arms(["mrpo"], ["epsilon_max=0,0.1"], REFERENCES)
    right = {4: np.arange(8) < 4, 6: np.arange(8) < 6, 8: np.arange(8) < 8}
    plan = [(dpo_a, 4, 6), (dpo_b, 4, 4), (none, 8, 8), (some, 6, 8)]
    return [finished(tmp_path, arm, seed, right[values[seed]]) for arm, *values in plan for seed in (0, 1)]


def test_figures_by_hand(runs):
    comparison = compare_runs([read_run(run) for run in runs], runs, policy_is_reference=True)
    dpo_a, dpo_b, none, some = comparison.arms
    assert dpo_a.accuracy == pytest.approx((0.625, statistics.stdev([0.5, 0.75])))
    assert some.accuracy == pytest.approx((0.875, statistics.stdev([0.75, 1])))
    assert comparison.best_single is dpo_a and comparison.best_multiple is none
    assert comparison.references == {"anchor": 0.75, "B": 0.75} and comparison.start == 0.75
    assert comparison.disagree == 0.5
    assert dpo_a.disagreeing[0] == 0.5 and none.disagreeing == (1.0, 0.0)  # pairs 0 and 1 right, 6 and 7 wrong
    assert dpo_b.to_best_single.mean == pytest.approx(-0.125)
    assert some.to_dpo.cohens_d == pytest.approx(0.25 / statistics.stdev([0.5, 0.75]))
    assert comparison.confidence == pytest.approx(0.975), "two runs with several references: Bonferroni"
    assert dpo_a.to_best_single is None and dpo_a.to_dpo is None
    assert none.reward_margin == (0.5, 0.0)
    # The untrained policy ranks pairs 0-5 right. Right on all: 6 and 7 moved; on 0-3: none, 4 and 5 moved away; on 0-5: none.
    assert (none.moved_right[0], dpo_b.moved_right[0], dpo_a.moved_right[0]) == (0.25, 0.0, 0.0)
    other = compare_runs([read_run(run) for run in runs], runs, policy_is_reference=False)
    assert other.arms[0].moved_right is None and other.start is None


def test_what_people_read(runs, tmp_path):
    absent = Run(runs[0].arm, 2, tmp_path / "gone", (), {})
    comparison = compare_runs([read_run(run) for run in runs], [*runs, absent], policy_is_reference=True)
    lines = table(comparison).splitlines()
    assert lines[1].startswith("mrpo epsilon_max=0  "), "the best first"
    assert next(line for line in lines if line.startswith("dpo on anchor")).split()[3:9] == [
        "2",
        "of",
        "3",
        "62.5%",
        "±",
        "17.7",
    ]
    assert "anchor 75.0%, B 75.0%" in table(comparison) and "97.5% interval" in table(comparison)
    said = verdict(comparison)
    assert said.startswith("Best: mrpo epsilon_max=0, 100.0% ± 0.0.")
    assert "minus best single reference (dpo on anchor): +37.5 [" in said and "points, NOT beyond noise" in said
    assert "2 seeds cannot say" in said and "Missing: dpo on anchor, seed 2." in said
    assert json.loads(json.dumps(as_json(comparison)))["arms"][2]["to_best_single"]["beyond_noise"] is False
    plot(comparison, tmp_path / "new" / "c.png", "title")
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_reference_that_wins_is_named(tmp_path):
    dpo_a, _, mrpo = plan_arms(["mrpo"], [], REFERENCES)
    most, few = np.arange(8) < 8, np.arange(8) < 1
    runs = [finished(tmp_path, arm, 0, right) for arm, right in ((dpo_a, most), (mrpo, few))]
    said = verdict(compare_runs([read_run(run) for run in runs], runs, policy_is_reference=True))
    assert (
        said.startswith("Best: dpo on anchor, 100.0%.")
        and "points, beyond noise" in said
        and "The single reference is better here" in said
    )
    level = [finished(tmp_path / "level", arm, 0, few) for arm in (dpo_a, mrpo)]
    said = verdict(compare_runs([read_run(run) for run in level], level, policy_is_reference=True))
    assert said.startswith("Best: a tie of dpo on anchor, mrpo, 12.5%.") and "NOT beyond noise" in said
    alone = compare_runs([read_run(runs[0])], runs, policy_is_reference=True)
    assert verdict(alone).startswith("No verdict")


def test_runs_on_other_pairs_do_not_compare(tmp_path):
    dpo_a, dpo_b, _ = plan_arms(["mrpo"], [], REFERENCES)
    runs = [finished(tmp_path, dpo_a, 0, A), finished(tmp_path, dpo_b, 0, A[:7], keys=KEYS[:7])]
    with pytest.raises(ConfigError, match="7 held-out pairs that are not the 8"):
        compare_runs([read_run(run) for run in runs], runs, policy_is_reference=True)


def test_what_counts_as_complete(tmp_path):
    run = finished(tmp_path, plan_arms(["mrpo"], [], REFERENCES)[0], 0, A)
    assert is_complete(run)
    changed = Run(run.arm, run.seed, run.folder, (), {**run.settings, "recipe": {"beta": 0.2}})
    with pytest.raises(ConfigError, match=r"other settings \(beta: None there, 0.2 now\)"):
        is_complete(changed)
    state = run.folder / "trainer_state.json"
    whole = state.read_text()
    state.write_text(whole.replace('"global_step": 4', '"global_step": 3'))
    assert not is_complete(run), "stopped before its last step"
    state.write_text(whole[:20])
    assert not is_complete(run), "a kill cut the file short"
    state.unlink()
    assert not is_complete(changed), "a run that did not finish may be run with other settings"


def test_the_tail_of_a_log(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {i}\n" for i in range(40)))
    assert tail(log).splitlines() == [f"line {i}" for i in range(28, 40)]
    log.write_text("noise\n\nerror: `beta` is wrong.\n\nmore noise\n")
    assert tail(log) == "error: `beta` is wrong."
