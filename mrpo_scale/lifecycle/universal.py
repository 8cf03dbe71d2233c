"""A ZeRO checkpoint on another number of ranks, by way of DeepSpeed's universal checkpoint.

Every rank's slices are put together to one file per parameter, from which any number of ranks reads its own.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mrpo_scale.base.atomic_files import TEMPORARY, atomic_write
from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, world_group
from mrpo_scale.data.inputs import without_ranks
from mrpo_scale.lifecycle.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

_LATEST = "latest_universal"  #: DeepSpeed's name for the file that names the folder
_POLL_SECONDS = 0.5
_WORKERS = 8


def as_universal(checkpoint: Checkpoint) -> None:
    """Add the universal form to a checkpoint, unless it has it. Collective over the world.

    One process works, which takes about as long as reading and writing the optimizer states twice. The ranks ask for news once in a
    while instead of waiting in one collective, so no timeout of theirs limits it.

    Raises:
        TrainingError: the conversion failed.
    """
    if broadcast_from_rank0((checkpoint.folder / _LATEST).is_file(), world_group()):
        return
    logger.info(
        "converting %s of %d ranks for another number; the copy is %s",
        *(checkpoint.folder, checkpoint.world_size, "removed with the checkpoint"),
    )
    converter: subprocess.Popen[bytes] | None = None
    tag = (checkpoint.folder / "latest").read_text().strip()
    output = checkpoint.folder / f"{TEMPORARY}universal"
    with fail_together(world_group()):
        if _first():
            shutil.rmtree(output, ignore_errors=True)
            converter = _start(checkpoint.folder / tag, output / f"{tag}_universal")
    status: int | None = None
    while status is None:
        time.sleep(_POLL_SECONDS)
        status = broadcast_from_rank0(converter.poll() if converter else None, world_group())
    if status:
        raise TrainingError(
            f"{checkpoint.folder} could not be converted from {checkpoint.world_size} ranks (status {status}; DeepSpeed's message "
            f"is above). It takes as much disk as the checkpoint again; on {checkpoint.world_size} ranks no conversion is needed."
        )
    with fail_together(world_group()):
        if _first():
            final = checkpoint.folder / f"{tag}_universal"
            shutil.rmtree(final, ignore_errors=True)
            (output / final.name).rename(final)
            atomic_write(checkpoint.folder, lambda: _LATEST, final.name.encode(), replace=True)
            shutil.rmtree(output)


@contextmanager
def load_universal(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """An engine that is made in this block loads the universal form."""
    before = deepspeed_config.get("checkpoint")
    deepspeed_config["checkpoint"] = {**(before or {}), "load_universal": True}
    try:
        yield
    finally:
        if before is None:
            del deepspeed_config["checkpoint"]
        else:
            deepspeed_config["checkpoint"] = before


def own_steps(engine: Any) -> None:
    """Give every parameter its own count of Adam steps: loading the universal form leaves one tensor for all, which then counts
    once for each of them."""
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _first() -> bool:
    group = world_group()
    return group is None or group.rank() == 0


def _start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    workers = str(max(1, min(_WORKERS, (os.cpu_count() or 1) // 2)))
    words = ["--input_folder", source, "--output_folder", target]
    words += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    module = "deepspeed.checkpoint.ds_to_universal"
    # Its progress bars are on stderr, and what it prints besides is for its authors.
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)], env=without_ranks(), stdout=subprocess.DEVNULL
    )
