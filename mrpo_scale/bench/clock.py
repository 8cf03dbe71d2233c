"""Where the time of a step goes. Every moment belongs to exactly one phase, so that the phases of a step add up to the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from mrpo_scale.training.callbacks import StepClock

OTHER = "other"
#: In the order of a step.
PHASES = ("data", "references", "policy forward", "head and loss", "backward", "optimizer", "logging", OTHER)

Function = TypeVar("Function", bound=Callable[..., Any])


class PhaseClock:
    """Stamps the moments at which a step passes from one phase to another; a phase inside another one pauses it.

    On a GPU the stamps are events in the stream that computes, so that no phase waits for the device; the last one is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stack: list[str] = []
        self._stamps: list[tuple[Any, str]] = []

    @property
    def running(self) -> bool:
        return bool(self._stack)

    def start(self) -> None:
        self._stack, self._stamps = [OTHER], []
        self._stamp()

    def stop(self) -> dict[str, float]:
        """Seconds of each phase since :meth:`start`."""
        self._stamp()
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (begin, phase), (end, _) in zip(self._stamps, self._stamps[1:], strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
        self._stack = []
        return seconds

    def enter(self, phase: str) -> None:
        if self._stack:
            self._stack.append(phase)
            self._stamp()

    def leave(self) -> None:
        if self._stack:
            self._stack.pop()
            self._stamp()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Function) -> Function:
        """``function``, whose time is phase ``name``."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapper  # type: ignore[return-value]

    def _stamp(self) -> None:
        stamp: Any
        if self._on_gpu:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self._stamps.append((stamp, self._stack[-1]))


class BenchClock(StepClock):
    """The trainer's timer, which also stamps the phases.

    Args:
        on_step: called with the seconds of each phase when a step is over, which its logging ends.
    """

    def __init__(self, phases: PhaseClock, on_step: Callable[[dict[str, float]], None]) -> None:
        super().__init__()
        self.phases, self.on_step = phases, on_step

    def start_step(self) -> None:
        super().start_step()
        self.phases.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), self.phases.phase(name):
            yield
        if name == "logging" and self.phases.running:  # the Trainer logs once more at the end of the epoch
            self.on_step(self.phases.stop())
