"""Files that appear whole or not at all, however the writer ends."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

#: Names that begin so are of writers at work, or of writers that were killed.
TEMPORARY = ".tmp-"
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_NO_ROOM = re.compile(
    r"StorageFull|QuotaExceeded|FileTooLarge|PytorchStreamWriter failed|unexpected pos|"
    + "|".join(rf"code: {code}\b|{re.escape(os.strerror(code))}" for code in _NO_ROOM)
)
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}


def atomic_write(folder: Path, name: Callable[[], str], data: bytes | bytearray, *, replace: bool = False) -> Path:
    """Write ``folder / name()``: to a temporary name, flushed to the disk, then renamed.

    Args:
        name: asked for when the data are on the disk, right before the file appears.
        replace: whether an existing file of that name gives way.

    Raises:
        FileExistsError: the file exists and may not be replaced.
        OSError: from the system. No file of that name has appeared then, except where only the folder could not be flushed.
    """
    temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        # Not `tempfile`, whose files nobody but their owner may read: caches are shared.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        final = folder / name()
        if replace:
            temporary.replace(final)
        else:
            _rename_to_new(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    return final


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written piece by piece. It appears, or takes an older one's place, when the block ends without an error.

    Raises:
        OSError: from the system; no such file has appeared then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_about_disk(error: BaseException | None) -> bool:
    """Whether a write failed for want of room. safetensors and torch say so in words of their own, and ranks pass on words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if _SAYS_NO_ROOM.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove_abandoned(folder: Path, older_than: float) -> None:
    """Remove what killed writers left ``older_than`` seconds ago or earlier."""
    for path in folder.glob(f"{TEMPORARY}*"):
        try:
            if path.stat().st_mtime < time.time() - older_than:
                path.unlink()
        except FileNotFoundError:
            continue  # another job removed it first
        except OSError as error:
            logger.warning("%s, left by a killed writer, cannot be removed: %s", path, error.strerror)


def _rename_to_new(old: Path, new: Path) -> None:
    """A rename that fails where ``new`` exists, which ``rename`` itself does not."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if new.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error
        old.rename(new)


def sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, on file systems that have such a call."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
