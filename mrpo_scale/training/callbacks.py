"""Callbacks of the trainer: the clock of its steps and what a person sees in the terminal."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from mrpo_scale.references.scores import ReferenceScores


class StepClock(TrainerCallback):
    """Per-phase timer of optimizer steps: the trainer says when a step begins and which phase of it is under way.

    Phases are "data", "references" and "samples" within it, "head and loss", "optimizer" and "logging". Kept here are the
    wall-clock seconds of each step, from reading its pairs to the update (evaluation and saving are outside), of its references
    and of its samples.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.references: list[float] = []
        self.samples: list[float] = []  #: 0 where nothing is sampled
        self._started = 0.0
        self._of_step: defaultdict[str, float] = defaultdict(float)
        self._logged = 0

    def start_step(self) -> None:
        self._started = time.perf_counter()
        self._of_step.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what belongs to phase ``name``, which pauses the phase that it interrupts."""
        started = time.perf_counter()
        yield
        self._of_step[name] += time.perf_counter() - started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._started)
        self.references.append(self._of_step["references"])
        self.samples.append(self._of_step["samples"])

    def speed_since_last_log(self, tokens: float) -> dict[str, float]:
        """Mean seconds of a step, of its references and samples, and tokens per second where ``tokens`` were computed meanwhile."""
        first, self._logged = self._logged, len(self.steps)
        references, samples, steps = self.references[first:], self.samples[first:], self.steps[first:]
        return {
            "time/references": statistics.mean(references),
            **({"time/samples": statistics.mean(samples)} if any(samples) else {}),
            "time/step": statistics.mean(steps),
            "tokens_per_second": tokens / sum(steps),
        }

    def median(self) -> float | None:
        """Median of the steps after the first, which warms up; None before the second."""
        return statistics.median(self.steps[1:]) if len(self.steps) > 1 else None


class BeforeOptimizer(TrainerCallback):
    """``check`` is called before the optimizer moves, whoever steps it: an engine does so within the last backward, before the
    Trainer's own callbacks come. Called more often, it must have nothing to do."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)
        self._hook = innermost(kwargs["optimizer"]).register_step_pre_hook(lambda *_: self.check())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()  # an engine or a scaler that meets gradients which are not finite skips its optimizer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()


def innermost(optimizer: Any) -> Any:
    """accelerate and DeepSpeed wrap the one that updates weights, DeepSpeed around float32 copies."""
    while (inside := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inside
    return optimizer


class FlushScores(TrainerCallback):
    """Scores of references reach the disk with every epoch; the next one reads what all ranks wrote. See also resume.py."""

    def __init__(self, scores: ReferenceScores) -> None:
        self.scores = scores

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scores.flush(refresh=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scores.flush()


class ProgressLine(ProgressCallback):
    """The Trainer's progress bar with one short line per log; every metric goes to the dashboards and trainer_state.json."""

    SHOWN = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "grad_norm": "grad norm",
        "learning_rate": "lr",
        "time/step": "s/step",
        "time/references": "of which references",
    }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        values = [f"{text} {logs[prefix + key]:.4g}" for key, text in self.SHOWN.items() if prefix + key in logs]
        if values:
            where = "held-out" if prefix else "train"
            self.training_bar.write(f"step {state.global_step:>5} {where:<8}  " + "  ".join(values))
