"""An append-only file of JSON lines that outlives a killed process: what was appended is on disk, and no line is half a record."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import parse_json


class RecordFile:
    """Records of one writer. Appending is safe from several threads; a second process is refused.

    Args:
        fields: what each record must have.

    Attributes:
        records: what the file held when it was opened, in order.

    Raises:
        ConfigError: another process writes it, or a line in it is no record.
    """

    def __init__(self, path: Path, fields: Sequence[str] = ()) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._lock = threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{path} is being written by another process; wait for it or name another folder."
            ) from None
        self._drop_half_a_line()
        self.records = read_records(path, fields)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until it is on disk."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())

    def _drop_half_a_line(self) -> None:
        """A process killed while writing leaves a last line without its end; the next record must not be glued to it."""
        self._file.seek(0)
        held = self._file.read()
        whole = held.rfind(b"\n") + 1
        if whole < len(held):
            self._file.truncate(whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def read_records(path: Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The whole lines of a file that another process may be writing. Raises ConfigError where one is no object with
    ``fields``."""
    records = []
    lines = path.read_bytes().split(b"\n")[:-1]
    for n, line in enumerate(lines, start=1):
        try:
            record = parse_json(line.decode())
        except ValueError:
            record = None
        if not isinstance(record, dict) or not record.keys() >= set(fields):
            raise ConfigError(f"{path}, line {n} is not a record; delete that line.")
        records.append(record)
    return records
