"""Ending a run early on purpose: finish the step, save, say so, leave. The restart goes on where this one stopped.

A file, because a launcher passes on few signals and turns every exit status into 1: `touch OUTPUT_DIR/STOP` works from a batch
script's trap, from Kubernetes' preStop hook and by hand. SIGTERM, which launchers do pass on, and `max_hours` do the same.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from mrpo_scale.base.atomic_files import atomic_write
from mrpo_scale.base.ranks import all_reduce_max, get_rank, world_group

logger = logging.getLogger(__name__)

STOP = "STOP"  #: this file in ``output_dir`` asks a run to stop
PREEMPTED = "PREEMPTED"  #: this file says that the run stopped early, after saving, and wants to be started again

_FILE, _SIGTERM, _HOURS = 1, 2, 4
_WHY = {_FILE: f"the file {STOP}", _SIGTERM: "SIGTERM", _HOURS: "max_hours"}


class StopRequests:
    """What asks this run to stop, agreed on by all ranks.

    Args:
        folder: where STOP is looked for and PREEMPTED is written: the ``output_dir`` of the command line.
        max_hours: since this process started.

    A run removes the STOP that it obeys. One that is older than the process was meant for a previous attempt, which was killed
    before it could, and is removed too, so the batch script need not tidy up. PREEMPTED goes when the restart begins to train.
    """

    def __init__(self, folder: Path, max_hours: float | None) -> None:
        self.folder, self.max_hours = folder, max_hours
        self._terminated = False
        self._before: Any = None
        self.why = 0  #: bits of _WHY once all ranks have agreed to stop

    def watch(self) -> None:
        """Begin. In the main thread SIGTERM is a request from here on; before, it ends the process and nothing is lost."""
        if get_rank() == 0:
            (self.folder / PREEMPTED).unlink(missing_ok=True)
            stop = self.folder / STOP
            if stop.exists() and stop.stat().st_mtime < _started():
                logger.info("%s is older than this process: it was meant for an earlier one and is removed", stop)
                stop.unlink()
        try:
            self._before = signal.signal(signal.SIGTERM, self._on_sigterm)
        except ValueError:
            logger.info("not in the main thread: SIGTERM ends this process at once")

    def unwatch(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def agreed(self) -> bool:
        """Whether any rank has been asked to. Collective over the world; one number."""
        if not self.why:
            (self.why,) = all_reduce_max([self._asked()], world_group())
        return bool(self.why)

    @property
    def reason(self) -> str:
        return next(text for bit, text in _WHY.items() if self.why & bit)

    def leave_marker(self, step: int, checkpoint: Path | None) -> None:
        """PREEMPTED, for the batch script and for people. Call on one rank, when the checkpoint is complete.

        Args:
            checkpoint: None where no step was taken yet.
        """
        content = {
            "reason": self.reason,
            "step": step,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "launcher": _launcher(),
        }
        atomic_write(self.folder, lambda: PREEMPTED, (json.dumps(content, indent=1) + "\n").encode(), replace=True)
        (self.folder / STOP).unlink(missing_ok=True)

    def _asked(self) -> int:
        asked = _SIGTERM if self._terminated else 0
        if get_rank() == 0:
            asked |= _FILE if (self.folder / STOP).exists() else 0
            asked |= _HOURS if self.max_hours is not None and time.time() - _started() >= 3600 * self.max_hours else 0
        return asked

    def _on_sigterm(self, *_: Any) -> None:
        self._terminated = True


class StopWhenAsked(TrainerCallback):
    """After every optimizer step: save and end if asked to.

    Attributes:
        evaluation_put_off: an evaluation was due at the last step; the restart begins with it, since it may take longer than the
            time that is left.
    """

    def __init__(self, requests: StopRequests) -> None:
        self.requests = requests
        self.evaluation_put_off = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self.requests.agreed():
            self.stop(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.requests.why:
            return
        if float(state.epoch).is_integer():
            self.evaluation_put_off |= control.should_evaluate
        else:  # the Trainer calls this wherever it stops
            control.should_log = control.should_save = False
        control.should_evaluate = False

    def stop(self, control: Any) -> None:
        self.evaluation_put_off |= control.should_evaluate
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True


def already_told(folder: Path) -> bool:
    """Whether the launcher that started this rank 0 was told to stop in a previous attempt of its ranks: it must not go on."""
    try:
        told = json.loads((folder / PREEMPTED).read_text())
    except (OSError, ValueError):
        return False
    launcher = _launcher()
    return launcher is not None and told.get("launcher") == launcher


def _launcher() -> list[Any] | None:
    """What tells the process that restarts ranks from all others; None: nobody does."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = psutil.Process(os.getppid())
    return [socket.gethostname(), parent.pid, parent.create_time()]


def _started() -> float:
    """When this process did, in seconds since the epoch."""
    return psutil.Process().create_time()
