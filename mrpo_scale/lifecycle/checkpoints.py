"""Checkpoints that are complete or ignored: the marker that says so, which is the newest, which may go.

A checkpoint is many files of many ranks, and a run can be killed between any two of them. Its marker, ``complete.json``, is written
last, in one rename, when all of them are on the disk; it lists them with their sizes. A folder without it is not a checkpoint. A
complete one may hold the model only (`save_only_model`): it is kept and rotated, but no run goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mrpo_scale.base.atomic_files import TEMPORARY, atomic_write, sync_folder

logger = logging.getLogger(__name__)

MARKER = "complete.json"
VERSION = 1  #: of the marker
_NAME = re.compile(r"checkpoint-\d+")
_HASHED = (
    1 << 20
)  #: bytes; smaller files are also listed with a hash. Larger ones cost minutes to read, and kills truncate.


class IncompleteError(Exception):
    """Why a folder is no checkpoint to continue from, in words that follow its name."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its marker describes it."""

    folder: Path
    number: int  #: saves of an output folder count up: the newest is the one saved last, whatever its step
    step: int
    world_size: int
    fingerprint: dict[str, Any]  #: see fingerprint.py
    lacks: str | None  #: what a run would need to go on from here and is not among the files; None: it has all


def path_of(output_dir: Path, step: int) -> Path:
    """Where transformers puts the checkpoint of a step."""
    return output_dir / f"checkpoint-{step}"


def find_complete(output_dir: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The complete checkpoints of a run, oldest first, and why the others are not."""
    complete, others = [], {}
    folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1])):
        try:
            complete.append(read_checkpoint(folder))
        except IncompleteError as reason:
            others[folder] = str(reason)
    return sorted(complete, key=lambda checkpoint: checkpoint.number), others


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the marker and hold the files against it.

    Raises:
        IncompleteError: no marker, one that cannot be read, or a file that is missing or not the one that was saved.
    """
    marker = _read_marker(folder)
    for name, saved in marker["files"].items():
        _check_file(folder, name, saved)
    return Checkpoint(
        folder,
        number=marker["number"],
        step=marker["step"],
        world_size=marker["world_size"],
        fingerprint=marker["fingerprint"],
        lacks=_lacking(marker["files"], marker["world_size"]),
    )


def write_marker(folder: Path, *, step: int, world_size: int, fingerprint: dict[str, Any]) -> None:
    """Declare a checkpoint complete. Its files must be whole and on the disk by now; see :func:`flush_files`.

    Raises:
        OSError: the marker cannot be written; then there is none.
    """
    numbers = [_number(other) for other in folder.parent.glob(f"checkpoint-*/{MARKER}")]
    marker = {
        "version": VERSION,
        "number": 1 + max(numbers, default=0),
        "step": step,
        "world_size": world_size,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "fingerprint": fingerprint,
        "files": {path.relative_to(folder).as_posix(): _describe(path) for path in _files(folder)},
    }
    atomic_write(folder, lambda: MARKER, (json.dumps(marker, indent=1) + "\n").encode())


def _lacking(files: Collection[str], world_size: int) -> str | None:
    """Of what continues a run exactly, the first that is not there. With `save_only_model` it is the optimizer's state."""
    engine = any(name.startswith("global_step") for name in files)  # DeepSpeed's, the optimizer's state included
    ranks = range(world_size)
    needed = {
        "the optimizer's state": () if engine else ("optimizer.pt",),
        "the schedule's state": () if engine else ("scheduler.pt",),
        "a rank's random state": [f"rng_state_{rank}.pth" for rank in ranks] if world_size > 1 else ["rng_state.pth"],
        "a rank's progress": [f"progress_{rank}.json" for rank in ranks],
        "the Trainer's state": ["trainer_state.json"],
    }
    return next((what for what, names in needed.items() if not all(name in files for name in names)), None)


def flush_files(folder: Path) -> None:
    """Wait until every file that this host has written in a checkpoint is on the disk."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for inner in [folder.parent, folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)


def remove(folder: Path) -> None:
    """Delete a checkpoint, marker first: killed in between, what is left is not taken for one."""
    (folder / MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def rotate(output_dir: Path, limit: int | None, keep: Path | None = None) -> None:
    """Delete all but the ``limit`` newest complete checkpoints and ``keep``, and what unfinished saves have left.

    The newest complete one stays whatever ``limit`` says. None or 0 deletes nothing.
    """
    if not limit or limit < 1:
        return
    complete, incomplete = find_complete(output_dir)
    if not complete:
        return
    old = [checkpoint.folder for checkpoint in complete[:-limit]]
    for folder in [*old, *incomplete]:
        if keep is None or folder.resolve() != keep.resolve():
            logger.info("deleting %s (`save_total_limit: %d`)", folder, limit)
            remove(folder)


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except FileNotFoundError:
        raise IncompleteError(f"has no {MARKER}: its save did not finish") from None
    except (OSError, ValueError) as error:
        raise IncompleteError(f"has a {MARKER} that cannot be read ({error})") from None
    kinds = {"version": int, "number": int, "step": int, "world_size": int, "fingerprint": dict, "files": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(marker, dict) or not isinstance(marker.get(key), kind)
    ]
    if wrong or marker["version"] != VERSION:
        what = f"without `{wrong[0]}`" if wrong else f"of version {marker['version']}, which this program does not know"
        raise IncompleteError(f"has a {MARKER} {what}")
    if not marker["files"]:
        raise IncompleteError(f"has a {MARKER} that lists no files")
    return marker


def _number(marker: Path) -> int:
    try:
        return _read_marker(marker.parent)["number"]
    except IncompleteError:
        return 0


def _check_file(folder: Path, name: str, saved: Any) -> None:
    inside = PurePosixPath(name)
    if (
        inside.is_absolute()
        or ".." in inside.parts
        or not isinstance(saved, dict)
        or not isinstance(saved.get("bytes"), int)
    ):
        raise IncompleteError(f"has a {MARKER} with the entry {name!r}, which no save writes")
    path = folder / inside
    if not path.is_file():
        raise IncompleteError(f"lacks {name}")
    size = path.stat().st_size
    if size != saved["bytes"]:
        raise IncompleteError(f"has {size:,} bytes of {name}, which was saved with {saved['bytes']:,}")
    if "sha256" in saved and _sha256(path) != saved["sha256"]:
        raise IncompleteError(f"has other bytes in {name} than were saved")


def _files(folder: Path) -> Sequence[Path]:
    """All files of a checkpoint but the marker and what a killed writer left."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != folder / MARKER and not path.name.startswith(TEMPORARY))


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, **({"sha256": _sha256(path)} if size <= _HASHED else {})}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
