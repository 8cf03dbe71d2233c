"""Scores on disk: ``ref_cache_dir/<reference key>/`` holds ``reference.json`` and parts, each written once and never changed.

A part's name begins with the time it appeared. Of a row that two jobs have scored, the oldest part counts, today and after every
part that is still to come, so that a resumed run reads the bits it read before.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

import numpy as np

from mrpo_scale.base.atomic_files import atomic_write, remove_abandoned
from mrpo_scale.base.errors import ConfigError, TrainingError
from mrpo_scale.base.hash_keys import distinct, find
from mrpo_scale.references.store.identity import ReferenceIdentity, canonical_json
from mrpo_scale.references.store.listing import (
    DESCRIPTION,
    CacheEntry,
    PartReport,
    examine,
    list_cache,
    read_description,
)
from mrpo_scale.references.store.part_files import (
    PartError,
    Rows,
    encode_part,
    faulty_scores,
    make_rows,
    next_part_name,
    part_names,
    read_part,
    sorted_rows,
)

__all__ = ["CacheEntry", "PartReport", "PartWriter", "ReferenceStore", "StoredScores", "list_cache"]

_DAY = 86400.0
_TOGETHER = 256  # parts


@dataclass(frozen=True)
class StoredScores:
    """What a store knows of N rows; those it does not have are nan and 0."""

    found_N: np.ndarray
    logps_N2: np.ndarray
    tokens_N2: np.ndarray


class ReferenceStore:
    """The scores of one reference: ``root/<key>/reference.json`` and ``part-*.safetensors``.

    Files of other names are no business of the store. Nothing is read before :meth:`refresh`.

    Args:
        root: ``ref_cache_dir``.
        wanted_keys: ``S16`` array; rows of other keys are not kept in memory. None keeps all, 32 bytes each.

    Attributes:
        repeats: rows that were read and not needed, because an older part has them: jobs at work at once scored them twice.
    """

    def __init__(self, root: Path, identity: ReferenceIdentity, wanted_keys: np.ndarray | None = None) -> None:
        self.identity = identity
        self.folder = root / identity.key
        self._wanted = None if wanted_keys is None else distinct(wanted_keys)
        self._names: set[str] = set()  # of the parts in memory
        # Sorted and without a key in common, each at least twice as long as the next: a lookup searches few of them, and adding
        # a part merges short ones only.
        self._runs: list[Rows] = []
        self.repeats = 0

    def __len__(self) -> int:
        return sum(len(run.keys_N) for run in self._runs)

    def refresh(self) -> int:
        """Read the parts that are new since the last call; returns how many rows they add.

        Raises:
            ConfigError: a part that cannot be used, or a ``reference.json`` of something else; nothing is added then.
        """
        self._refuse_link()
        try:
            self._check_description()
            names = [name for name in part_names(self.folder) if name not in self._names]
        except OSError as error:
            raise ConfigError(
                f"`ref_cache_dir`: {self.folder} cannot be read ({error.strerror}); correct its permissions or name another folder."
            ) from error
        pieces: list[Rows] = []
        read: list[str] = []
        for name in names:
            try:
                pieces.append(self._of_interest(read_part(self.folder / name, self.identity.key)))
            except FileNotFoundError:
                continue  # deleted since it was listed
            except PartError as error:
                raise ConfigError(f"`ref_cache_dir`: {self.folder / name} {error}.") from error
            read.append(name)
            if len(read) % _TOGETHER == 0:
                # Freed one by one at the end, thousands of small arrays leave holes in the heap as large as the rows themselves.
                pieces[-_TOGETHER:] = [sorted_rows(pieces[-_TOGETHER:])]
        self._names.update(read)
        return self._add(pieces)

    def want(self, keys: np.ndarray) -> None:
        """Keep rows of these keys as well (``S16``). Reads all parts again if some of the keys are new."""
        if self._wanted is None or find(self._wanted, keys)[1].all():
            return
        self._wanted = distinct(np.concatenate([self._wanted, keys]))
        self._names, self._runs = set(), []
        self.refresh()

    def lookup(self, keys_N: np.ndarray) -> StoredScores:
        """The scores of the rows with these keys (``S16`` [N], in any order, repeated or not)."""
        n = len(keys_N)
        found_N = np.zeros(n, dtype=bool)
        logps_N2 = np.full((n, 2), np.nan, dtype=np.float32)
        tokens_N2 = np.zeros((n, 2), dtype=np.int32)
        for run in self._runs:
            at_N, hit_N = find(run.keys_N, keys_N)
            at = at_N[hit_N]
            logps_N2[hit_N], tokens_N2[hit_N] = run.logps_N2[at], run.tokens_N2[at]
            found_N |= hit_N
        return StoredScores(found_N, logps_N2, tokens_N2)

    def missing(self, keys_N: np.ndarray) -> np.ndarray:
        """Bool [N]: rows that have no scores here."""
        found_N = np.zeros(len(keys_N), dtype=bool)
        for run in self._runs:
            found_N |= find(run.keys_N, keys_N)[1]
        return ~found_N

    def prepare_to_write(self) -> None:
        """Make the folder, describe the reference in it, and try a write, before any model is loaded for it.

        Raises:
            ConfigError: the folder cannot be written, or is another reference's.
        """
        self._refuse_link()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._check_description():
                self._describe()
            remove_abandoned(self.folder, older_than=_DAY)
            probe = atomic_write(self.folder, lambda: f".tmp-probe-{secrets.token_hex(8)}", bytes(1 << 16))
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"`ref_cache_dir`: {self.folder} cannot be written ({error.strerror}); make it writable, make room on its disk, or "
                "name another folder."
            ) from error

    def write_part(self, keys_N: np.ndarray, logps_N2: np.ndarray, tokens_N2: np.ndarray) -> Path:
        """Write rows as one part, on the disk when this returns, and add them to what :meth:`lookup` sees.

        Args:
            keys_N: ``S16`` [N]; of rows with one key the first is written.
            logps_N2: float32, chosen and rejected.
            tokens_N2: how many tokens each log-prob is the sum of.

        Raises:
            ValueError: wrong shapes or dtypes, or no row.
            TrainingError: log-probs that no model gives, such as nan; or the system cannot write. No file appears then. It is
                raised on this rank only.
        """
        rows = make_rows(keys_N, logps_N2, tokens_N2)
        if not len(rows.keys_N):
            raise ValueError("a part without rows")
        if faults := int(faulty_scores(rows).sum()):
            raise TrainingError(
                f"{self.identity.name}: {faults} of {len(rows.keys_N)} rows have log-probs that are nan, infinite or above 0, or "
                "have no tokens; none of these rows was stored. Check the reference's weights and its `dtype`."
            )
        rows = sorted_rows([rows])
        data = encode_part(rows, self.identity.key)
        try:
            path = atomic_write(self.folder, lambda: next_part_name(self.folder), data)
        except OSError as error:
            raise TrainingError(
                f"`ref_cache_dir`: no part could be written to {self.folder} ({error.strerror}). The cache is readable as it "
                f"was, without these {len(rows.keys_N)} rows. Make room, raise the quota or make the folder writable, and start "
                "again: rows that are stored are not scored again."
            ) from error
        self._names.add(path.name)
        self._add([self._of_interest(rows)])
        return path

    def verify(self) -> list[PartReport]:
        """Read every byte of every part, and say what is wrong, if anything. Also names files that look like parts and are not."""
        return [report for report, _ in examine(self.folder, self.identity.key)]

    def _of_interest(self, rows: Rows) -> Rows:
        return rows if self._wanted is None else rows.take(find(self._wanted, rows.keys_N)[1])

    def _add(self, pieces: list[Rows]) -> int:
        """Add rows, the oldest first; rows that are here stay as they are. Returns how many are new."""
        if not pieces:
            return 0
        read, rows = sum(len(piece.keys_N) for piece in pieces), sorted_rows(pieces)
        known_N = ~self.missing(rows.keys_N)
        if known_N.any():
            rows = rows.take(~known_N)
        self.repeats += read - len(rows.keys_N)
        if not len(rows.keys_N):
            return 0
        if self._wanted is not None and np.array_equal(rows.keys_N, self._wanted):
            rows = rows._replace(keys_N=self._wanted)  # which all stores of a run share
        self._runs.append(rows)
        while len(self._runs) > 1 and len(self._runs[-2].keys_N) < 2 * len(self._runs[-1].keys_N):
            self._runs[-2:] = [sorted_rows(self._runs[-2:])]
        return len(rows.keys_N)

    def _refuse_link(self) -> None:
        if self.folder.is_symlink():
            raise ConfigError(
                f"`ref_cache_dir`: {self.folder} is a link to {self.folder.readlink()}, out of the cache, so it is neither read "
                "nor written; put that folder in its place. The whole `ref_cache_dir` may be a link."
            )

    def _check_description(self) -> bool:
        """Whether ``reference.json`` is there."""
        path = self.folder / DESCRIPTION
        try:
            description = read_description(path)
        except FileNotFoundError:
            return False
        except PartError as error:
            raise ConfigError(f"`ref_cache_dir`: {path} {error}.") from error
        if canonical_json(description["parts"]) != canonical_json(self.identity.parts):
            raise ConfigError(
                f"`ref_cache_dir`: {path} describes another reference than {self.identity.name}, whose key its folder has; move "
                "the folder away, and the reference is scored again."
            )
        return True

    def _describe(self) -> None:
        description = {
            "key": self.identity.key,
            "parts": self.identity.parts,
            "name": self.identity.name,
            "path": self.identity.path,
            "mrpo_scale": version("mrpo-scale"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            atomic_write(self.folder, lambda: DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        except FileExistsError:
            self._check_description()  # another job was first


class PartWriter:
    """Collects rows and writes all that wait as one part: what a killed process loses. Leaving its block writes what is left, also
    after an error.

    Args:
        rows: as soon as so many wait, they are written.
        seconds: after this time since the first waiting row, the next :meth:`add` writes whatever waits.
    """

    def __init__(self, store: ReferenceStore, rows: int = 4096, seconds: float = 300.0) -> None:
        self.store, self.rows, self.seconds = store, rows, seconds
        self._waiting: Rows | None = None
        self._since = 0.0

    def add(self, keys_N: np.ndarray, logps_N2: np.ndarray, tokens_N2: np.ndarray) -> None:
        """See :meth:`ReferenceStore.write_part`."""
        rows = make_rows(keys_N, logps_N2, tokens_N2)
        if not len(rows.keys_N):
            return
        if self._waiting is None:
            self._waiting, self._since = rows, time.monotonic()
        else:
            self._waiting = Rows(*(np.concatenate(columns) for columns in zip(self._waiting, rows, strict=True)))
        if len(self._waiting.keys_N) >= self.rows or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what waits; it goes on waiting where that fails."""
        if self._waiting is not None:
            self.store.write_part(*self._waiting)
            self._waiting = None

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        except TrainingError as failure:
            if error is None:
                raise
            error.add_note(f"Afterwards, rows that were scored could not be stored: {failure}")
