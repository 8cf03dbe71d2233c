"""From finished run folders to figures: means and deviations over seeds, effect sizes, and what is beyond noise.

Everything between objectives is measured by *ranking accuracy*: the share of held-out pairs to whose chosen response the trained
policy gives the higher log-prob. No reference enters it, so it means the same for every run. Rewards are measured against each
run's own reference and do not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.compare.plan import HELD_OUT, Arm, Run
from mrpo_scale.models.plan import ANCHOR
from mrpo_scale.reports.html_report import RUN_FACTS
from mrpo_scale.training.held_out import HeldOutScores

RESAMPLES = 4000
#: Of an interval. Where m runs are compared with one, each interval has 1 - 0.05/m (Bonferroni).
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RunResult:
    """One finished run. Shares are of held-out pairs, measured on the weights that it saved."""

    run: Run
    accuracy: float
    reward_accuracy: float
    reward_margin: float
    curve: list[tuple[int, float]]  #: (optimizer step, ranking accuracy)
    scores: HeldOutScores

    @property
    def right(self) -> np.ndarray:
        """[N] bool, in the order of the pairs' keys."""
        logps_N2 = self.scores.policy_logps_N2
        return logps_N2[:, 0] > logps_N2[:, 1]

    def moved_right(self, start_N2: np.ndarray) -> float:
        """Share of pairs that training moved towards the label, from the untrained policy's log-probs ``start_N2``."""
        gain_N2 = self.scores.policy_logps_N2 - start_N2
        return float((gain_N2[:, 0] > gain_N2[:, 1]).mean())


@dataclass(frozen=True)
class Difference:
    """Ranking accuracy of an arm minus that of another."""

    mean: float
    low: float
    high: float
    cohens_d: float | None  #: of the values per seed; None where there are too few or they do not vary

    @property
    def beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ArmResult:
    """An arm's runs, and what they come to. (mean, standard deviation over seeds); the latter is None for a single seed."""

    arm: Arm
    runs: list[RunResult]
    planned: int
    accuracy: tuple[float, float | None]
    reward_accuracy: tuple[float, float | None]
    reward_margin: tuple[float, float | None]
    disagreeing: tuple[float, float | None] | None  #: accuracy on the pairs that the references do not rank alike
    moved_right: tuple[float, float | None] | None  #: share of pairs whose chosen response gained on the rejected one
    to_dpo: Difference | None = None  #: to DPO on the recipe's own reference 0
    to_best_single: Difference | None = None

    @property
    def right(self) -> np.ndarray:
        """[seeds, N] bool."""
        return np.stack([result.right for result in self.runs])


@dataclass(frozen=True)
class Comparison:
    """``references``: accuracy of each reference as it is. ``disagree``: share of pairs that they do not all rank alike."""

    arms: list[ArmResult]
    pairs: int
    references: dict[str, float]
    disagree: float
    confidence: float  #: of the intervals
    start: float | None = None  #: accuracy of the untrained policy, where it is a reference
    missing: list[Run] = field(default_factory=list)

    @property
    def singles(self) -> list[ArmResult]:
        return [arm for arm in self.arms if arm.arm.objective == "dpo"]

    @property
    def best_single(self) -> ArmResult | None:
        return max(self.singles, key=lambda arm: arm.accuracy[0], default=None)

    @property
    def best_multiple(self) -> ArmResult | None:
        several = [arm for arm in self.arms if arm.arm.objective != "dpo"]
        return max(several, key=lambda arm: arm.accuracy[0], default=None)


def read_run(run: Run) -> RunResult:
    """The figures of a finished run's folder."""
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    evals = {entry["step"]: entry for entry in history if "eval_logps/accuracies" in entry}
    # Of the weights that were saved, which `load_best_model_at_end` takes from an earlier step than the log's last.
    saved = json.loads((run.folder / RUN_FACTS).read_text())["rows"][-1]
    return RunResult(
        run,
        saved["ranking_accuracy"],
        saved["reward_accuracy"],
        saved["reward_margin"],
        [(step, evals[step]["eval_logps/accuracies"]) for step in sorted(evals)],
        HeldOutScores.load(run.folder / HELD_OUT),
    )


def compare_runs(results: Sequence[RunResult], planned: Sequence[Run], *, policy_is_reference: bool) -> Comparison:
    """All figures of the comparison.

    Args:
        policy_is_reference: whether reference 0, the anchor, is the untrained policy.

    Raises:
        ConfigError: two runs were measured on different pairs.
    """
    _check_same_pairs(results)
    ref_logps = _reference_logps(results)
    rank_KN = np.stack([logps_N2[:, 0] > logps_N2[:, 1] for logps_N2 in ref_logps.values()])
    split_N: np.ndarray = np.asarray(rank_KN.any(0) & ~rank_KN.all(0))
    arms: dict[str, list[RunResult]] = {}
    for result in results:
        arms.setdefault(result.run.arm.name, []).append(result)
    start_N2 = ref_logps.get(ANCHOR) if policy_is_reference else None
    found = [_summary(runs, planned, split_N, start_N2) for runs in arms.values()]
    several = sum(arm.arm.objective != "dpo" for arm in found)
    confidence = 1 - (1 - CONFIDENCE) / max(1, several)
    accuracies = {name: float((logps_N2[:, 0] > logps_N2[:, 1]).mean()) for name, logps_N2 in ref_logps.items()}
    best = max((arm for arm in found if arm.arm.objective == "dpo"), key=lambda arm: arm.accuracy[0], default=None)
    done = {result.run.folder for result in results}
    return Comparison(
        arms=[_with_differences(arm, _dpo_beside(arm, found), best, confidence) for arm in found],
        pairs=len(split_N),
        references=accuracies,
        disagree=float(split_N.mean()),
        confidence=confidence,
        start=accuracies.get(ANCHOR) if policy_is_reference else None,
        missing=[run for run in planned if run.folder not in done],
    )


def cohens_d(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Difference of the means over the pooled standard deviation; None below two values each, or where none of them vary."""
    if len(a) < 2 or len(b) < 2:
        return None
    squares = (len(a) - 1) * statistics.variance(a) + (len(b) - 1) * statistics.variance(b)
    pooled = (squares / (len(a) + len(b) - 2)) ** 0.5
    return (statistics.mean(a) - statistics.mean(b)) / pooled if pooled > 0 else None


def bootstrap_difference(
    right_SN: np.ndarray, other_SN: np.ndarray, confidence: float, seed: int = 0
) -> tuple[float, float]:
    """Interval of the difference of two arms' accuracies, each measured with its seeds on the same N pairs.

    Paired bootstrap: a resample draws N pairs, the same for both arms, and for each arm its number of seeds, with replacement.
    With one seed it knows the noise of the pairs only; with two or three it still understates that of the seeds.
    """
    draw = np.random.default_rng(seed)
    differences = []
    for _ in range(0, RESAMPLES, 100):
        pairs_BN = draw.multinomial(right_SN.shape[1], np.full(right_SN.shape[1], 1 / right_SN.shape[1]), size=100)
        means_B = []
        for arm_SN in (right_SN, other_SN):
            seeds_BS = draw.multinomial(len(arm_SN), np.full(len(arm_SN), 1 / len(arm_SN)), size=100)
            per_seed_BS = pairs_BN @ arm_SN.T / arm_SN.shape[1]
            means_B.append((per_seed_BS * seeds_BS).sum(1) / len(arm_SN))
        differences.append(means_B[0] - means_B[1])
    low, high = np.quantile(np.concatenate(differences), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _difference(arm: ArmResult, other: ArmResult, confidence: float) -> Difference:
    values, others = [r.accuracy for r in arm.runs], [r.accuracy for r in other.runs]
    low, high = bootstrap_difference(arm.right, other.right, confidence)
    return Difference(arm.accuracy[0] - other.accuracy[0], low, high, cohens_d(values, others))


def _dpo_beside(arm: ArmResult, arms: Sequence[ArmResult]) -> ArmResult | None:
    """DPO on the anchor, with the values of those varied keys that DPO uses."""
    beside = (dpo for dpo in arms if dpo.arm.reference == ANCHOR and dpo.arm.varied.items() <= arm.arm.varied.items())
    return next(beside, None)


def _with_differences(arm: ArmResult, dpo: ArmResult | None, best: ArmResult | None, confidence: float) -> ArmResult:
    return ArmResult(
        **{
            **vars(arm),
            "to_dpo": _difference(arm, dpo, confidence) if dpo and dpo is not arm else None,
            "to_best_single": _difference(arm, best, confidence) if best and best is not arm else None,
        }
    )


def _summary(
    runs: list[RunResult], planned: Sequence[Run], split_N: np.ndarray, start_N2: np.ndarray | None
) -> ArmResult:
    arm = runs[0].run.arm
    return ArmResult(
        arm=arm,
        runs=runs,
        planned=sum(run.arm.name == arm.name for run in planned),
        accuracy=_mean_and_deviation([r.accuracy for r in runs]),
        reward_accuracy=_mean_and_deviation([r.reward_accuracy for r in runs]),
        reward_margin=_mean_and_deviation([r.reward_margin for r in runs]),
        disagreeing=_mean_and_deviation([float(r.right[split_N].mean()) for r in runs]) if split_N.any() else None,
        moved_right=_mean_and_deviation([r.moved_right(start_N2) for r in runs]) if start_N2 is not None else None,
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _reference_logps(results: Sequence[RunResult]) -> dict[str, np.ndarray]:
    """Of each reference, [N, 2], from whichever run had it."""
    found: dict[str, np.ndarray] = {}
    for result in results:
        names = [result.run.arm.reference] if result.run.arm.reference else result.scores.names
        for name, logps_N2 in zip(names, result.scores.ref_logps_KN2, strict=True):
            found.setdefault(str(name), logps_N2)
    return found


def _check_same_pairs(results: Sequence[RunResult]) -> None:
    first = results[0]
    for result in results:
        if not np.array_equal(result.scores.row_keys, first.scores.row_keys):
            raise ConfigError(
                f"{result.run.folder} was measured on {len(result.scores.row_keys)} held-out pairs that are not the "
                f"{len(first.scores.row_keys)} of {first.run.folder}: has `dataset_name` changed since? Delete the older runs."
            )
