"""What a launcher may have left or asked for that would make every rank wait for ever, looked at before any rank waits."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.ds_config import check_sharding

#: What launchers, and MPI's three, tell a process of its rank.
_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
BUILD_SECONDS = 300.0  #: no DeepSpeed op takes longer to compile

logger = logging.getLogger(__name__)

_GATHER = "stage3_gather_16bit_weights_on_model_save"


def prepare_launch() -> None:
    """What must be in order before ranks meet, that is before an MRPOConfig is made: every command calls it first, and so does a
    Python script that a launcher starts. Deletes locks that killed builds have left, or waits until another host's build is done.

    Raises:
        ConfigError: the launcher would restart this job in vain.
    """
    check_restarts()
    clear_stale_build_locks()


def is_launched() -> bool:
    """Whether this process is one of a job's ranks: a launcher or MPI has said so, or they have met already."""
    return dist.is_initialized() or any(name in os.environ for name in _RANKS)


def launch_alone(deepspeed: str) -> None:
    """Be the only rank of a job, as a launcher of one process says it: DeepSpeed asks MPI otherwise, which is rarely there.

    Raises:
        ConfigError: this machine has several GPUs, of which one would be used, or Slurm has started several such processes, which
            would train alone.
    """
    gpus, tasks = torch.cuda.device_count(), int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        raise ConfigError(
            f"`deepspeed: {deepspeed}`: srun started {tasks} processes and none knows of the others; let it start one launcher on "
            "each node (launch/slurm)."
        )
    if gpus > 1:
        raise ConfigError(
            f"`deepspeed: {deepspeed}` without a launcher would use 1 of {gpus} GPUs: start it with `accelerate launch "
            f"--config_file launch/accelerate/eight_gpu_zero3.yaml --num_processes {gpus} launch/train.py`, or show this process "
            "one of them (CUDA_VISIBLE_DEVICES)."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logger.info("`deepspeed: %s` without a launcher: a job of one process", deepspeed)


def check_restarts() -> None:
    """Refuse ``--max_restarts`` where the second attempt would read the first one's addresses and wait for dead processes.

    That is so wherever the launcher itself keeps the store (pytorch/pytorch issue 135712).

    Raises:
        ConfigError: the launcher may restart this job, and its store outlives the attempt.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"`--max_restarts {restarts}` would not survive its first restart: the launcher keeps the addresses of dead ranks. "
            "Add `--rdzv_backend c10d` and export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every host, or set it to 0."
        )


def let_weights_be_saved(plugin: Any) -> None:
    """Have DeepSpeed give its weights to a save as a model folder needs them, whatever its file says or leaves out.

    Args:
        plugin: accelerate's DeepSpeedPlugin, before an engine is made of it.

    Raises:
        ConfigError: weights are divided in a way that is not supported; see :func:`~mrpo_scale.config.ds_config.check_sharding`.
    """
    settings = plugin.deepspeed_config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_sharding(settings, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    zero = settings.get("zero_optimization") or {}
    if zero.get("stage") == 3 and not zero.get(_GATHER, False):
        logger.info(
            "`%s` is taken as true: without it no weights could be saved (accelerate: `zero3_save_16bit_model`)",
            _GATHER,
        )
        zero[_GATHER] = True


def clear_stale_build_locks() -> None:
    """Remove the lock of a DeepSpeed op whose build was killed: torch waits for it for ever and says nothing.

    A lock that a process of this host has open is a build that goes on. One that none has may be another host's, where the folder
    is shared; after ``BUILD_SECONDS`` it is nobody's.
    """
    for lock in _build_locks():
        said = False
        while (age := _age(lock)) is not None and not _is_open_here(lock):
            if age > BUILD_SECONDS:
                logger.warning("removing %s: its build was killed %.0f minutes ago", lock, age / 60)
                lock.unlink(missing_ok=True)
                break
            if not said:
                logger.warning(
                    "%s is %.0f s old and no process of this host compiles: waiting up to %.0f s for another host's build. If "
                    "none is running, delete the file.", lock, age, BUILD_SECONDS - age,
                )  # fmt: skip
                said = True
            time.sleep(1.0)


def check_build_locks() -> None:
    """Refuse to wait for a build that was killed, and warn of one that may have been. Touches no file.

    Raises:
        ConfigError: a lock that no process of this host has open is older than any build takes.
    """
    for lock in _build_locks():
        age = _age(lock)
        if age is None or _is_open_here(lock):
            continue
        remedy = "call mrpo_scale.prepare_launch() before MRPOConfig is made, or delete the file"
        if age > BUILD_SECONDS:
            raise ConfigError(
                f"{lock} was left by a build of a DeepSpeed op that was killed, and is waited for: {remedy}."
            )
        logger.warning(
            "%s: no process of this host compiles; if no other host does, this waits for ever: %s", lock, remedy
        )


def _build_locks() -> list[Path]:
    """Locks of DeepSpeed's ops; on one rank of a host, since the others would say the same."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return [*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")]


def _age(file: Path) -> float | None:
    """Seconds since the file was written; None where it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_open_here(file: Path) -> bool:
    """Whether a process of this host that this user may look into has the file open."""
    wanted = str(file.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) == wanted:
                return True
        except OSError:
            continue  # closed or gone meanwhile, or another user's
    return False
