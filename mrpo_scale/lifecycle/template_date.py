"""The date that chat templates print: one for a whole run and for a whole score cache, however many days they take.

Llama 3's template, for one, asks for today's date. Tomorrow every prompt would be another text: a run could not be continued, and
no stored score would fit. So the date is fixed when the run or the cache begins, and recorded there.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mrpo_scale.base.atomic_files import atomic_write
from mrpo_scale.base.errors import ConfigError, one_line
from mrpo_scale.base.ranks import broadcast_from_rank0, fail_together, world_group
from mrpo_scale.base.untrusted import read_json
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.lifecycle.checkpoints import IncompleteError, find_complete, read_checkpoint

logger = logging.getLogger(__name__)

TEMPLATE_DATE = "template_date"  #: the key, and the entry of a checkpoint's fingerprint
RECORD = "template_date.json"
_MOST_BYTES = 1 << 10


def decide_date(args: MRPOConfig, baselines: Sequence[Path] = ()) -> datetime.date:
    """The date of this run, which ``args.template_date`` holds from now on. Collective over the world.

    It is what the key says; else that of the checkpoint that the run goes on from, or of the run that was begun in ``output_dir``;
    else that of the score cache; else today.

    Args:
        baselines: folders of runs that are part of this one and may have been begun before it.

    Raises:
        ConfigError: a record that cannot be read.
    """
    if args.template_date is None:
        found = None
        with fail_together(world_group()):
            if args.process_index == 0:
                begun = [args.folder, *baselines] if _goes_on(args) else []
                found = _date_of_checkpoint(args) or first_recorded([*begun, args.ref_cache_folder])
        args.template_date = broadcast_from_rank0(found, world_group())
    return datetime.date.fromisoformat(str(args.template_date))


def _date_of_checkpoint(args: MRPOConfig) -> str | None:
    wanted = str(args.resume_from_checkpoint)
    if not _goes_on(args):
        return None
    try:
        if wanted.lower() not in ("auto", "true"):
            return read_checkpoint(Path(wanted)).fingerprint.get(TEMPLATE_DATE)
    except IncompleteError:
        return None  # the run refuses it where it chooses its checkpoint
    complete, _ = find_complete(args.folder)
    return complete[-1].fingerprint.get(TEMPLATE_DATE) if complete else None


def _goes_on(args: MRPOConfig) -> bool:
    """Whether the run goes on from what is there, if anything is."""
    return str(args.resume_from_checkpoint).lower() not in ("none", "false", "never")


def record_date(args: MRPOConfig, names: Sequence[str], run: Path | None = None) -> None:
    """Say which date the templates print, if any does, and record it in the score cache and in the folder of the run. Collective.

    Args:
        names: the models whose templates print the date.
        run: ``output_dir`` of a run that begins or goes on; None for a job that only scores.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    with fail_together(world_group()):
        if args.process_index == 0:
            _record(args, names, run)


def _record(args: MRPOConfig, names: Sequence[str], run: Path | None) -> None:
    if not names:
        if TEMPLATE_DATE in args.non_default_keys:
            logger.warning(
                "`template_date: %s` has no effect: no model's chat template prints a date", args.template_date
            )
        return
    logger.info(
        "the chat templates of %s print the date: it is %s in all of this run (`template_date`)",
        ", ".join(names), args.template_date,
    )  # fmt: skip
    if run is not None:
        write_record(run, str(args.template_date), replace=True)
    cache = args.ref_cache_folder
    if cache is None:
        return
    if recorded_date(cache) is None:  # one that has a date may be there to read only
        write_record(cache, str(args.template_date), replace=False)
    of_cache = recorded_date(cache)
    if of_cache is not None and of_cache != args.template_date:
        logger.warning(
            "`ref_cache_dir`: %s was begun with `template_date: %s`; this run has %s, so no score of that date is read for %s. Set "
            "`template_date: %s` to read them.",
            cache, of_cache, args.template_date, ", ".join(names), of_cache,
        )  # fmt: skip


def recorded_date(folder: Path) -> str | None:
    """What :func:`record_date` wrote; None where it has not.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = folder / RECORD
    if not folder.is_dir():
        return None
    try:
        if path.is_symlink() and not path.exists():  # nothing would be recorded over it, and every day be another date
            raise ValueError(f"is a link to {path.readlink()}, which does not exist")
        found = read_json(path, _MOST_BYTES)
        return datetime.date.fromisoformat(found[TEMPLATE_DATE]).isoformat()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} does not tell a date ({one_line(error)}); delete it and set `template_date`."
        ) from error


def first_recorded(folders: Sequence[Path | None]) -> str:
    """The date of the first folder that has one; today where none has."""
    dates = (recorded_date(folder) for folder in folders if folder is not None)
    return next((date for date in dates if date is not None), _today().isoformat())


def _today() -> datetime.date:
    return datetime.date.today()


def write_record(folder: Path, date: str, *, replace: bool) -> None:
    """Record the date in a folder; without ``replace`` it keeps the one that it has. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder, lambda: RECORD, (json.dumps({TEMPLATE_DATE: date}) + "\n").encode(), replace=replace)
    except FileExistsError:
        return  # a cache keeps the date that it was begun with
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); make it writable or name another folder."
        ) from error
