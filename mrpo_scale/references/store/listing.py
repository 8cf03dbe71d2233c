"""What lies in a cache, sound or not: for people, and for whoever decides what to delete. Nothing here raises for a bad file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mrpo_scale.base.hash_keys import distinct
from mrpo_scale.base.untrusted import read_json
from mrpo_scale.references.store.part_files import PART_NAME, PartError, Rows, part_names, read_part

DESCRIPTION = "reference.json"
_MOST_BYTES = 4 << 20  # a name and a hash for each weight file
_KEY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PartReport:
    """One file of a store. ``problem`` is None if every byte of it is right; otherwise ``rows`` is 0."""

    name: str
    rows: int
    bytes: int
    problem: str | None


@dataclass(frozen=True)
class CacheEntry:
    """One reference in a cache. ``rows`` counts each row once, however many parts hold it."""

    key: str
    description: dict[str, Any]  #: reference.json; empty if it is missing or damaged
    rows: int
    bytes: int
    parts: int
    problems: list[str] = field(default_factory=list)


def list_cache(root: Path) -> list[CacheEntry]:
    """What a cache holds, every part verified; empty if there is no such folder."""
    if not root.is_dir():
        return []
    return [_entry(folder) for folder in sorted(root.iterdir()) if _KEY.fullmatch(folder.name) and folder.is_dir()]


def _entry(folder: Path) -> CacheEntry:
    examined = list(examine(folder, folder.name))
    try:
        description = read_description(folder / DESCRIPTION)
    except (FileNotFoundError, PartError):  # which the reports name
        description = {}
    pieces = [rows for _, rows in examined if rows is not None]
    return CacheEntry(
        key=folder.name,
        description=description,
        rows=len(distinct(np.concatenate([rows.keys_N for rows in pieces]))) if pieces else 0,
        bytes=sum(report.bytes for report, _ in examined),
        parts=sum(PART_NAME.fullmatch(report.name) is not None for report, _ in examined),
        problems=[f"{report.name} {report.problem}" for report, _ in examined if report.problem],
    )


def examine(folder: Path, key: str) -> Iterator[tuple[PartReport, Rows | None]]:
    """Every part, with its rows if it is sound, and whatever else a user should know of."""
    if not folder.is_dir():
        return
    if folder.is_symlink():
        yield PartReport(folder.name, 0, 0, f"is a link to {folder.readlink()} and is not read"), None
        return
    try:
        read_description(folder / DESCRIPTION)
    except FileNotFoundError:
        yield PartReport(DESCRIPTION, 0, 0, "is missing; the next run that scores writes it"), None
    except PartError as error:
        yield PartReport(DESCRIPTION, 0, (folder / DESCRIPTION).lstat().st_size, str(error)), None
    for path in sorted(folder.glob("*.safetensors")):
        if PART_NAME.fullmatch(path.name) is None:
            yield (
                PartReport(path.name, 0, path.lstat().st_size, "does not have the name of a part and is not read"),
                None,
            )
    for name in part_names(folder):
        path = folder / name
        try:
            size = path.lstat().st_size
            rows = read_part(path, key)
        except FileNotFoundError:
            continue
        except PartError as error:
            yield PartReport(name, 0, size, str(error)), None
        else:
            yield PartReport(name, len(rows.keys_N), size, None), rows


def read_description(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, or PartError where it is damaged."""
    remedy = "delete the file, and it is written again"
    if path.is_symlink():
        raise PartError("is a link, and a cache holds its files itself", remedy)
    try:
        description = read_json(path, _MOST_BYTES)
    except ValueError as error:
        raise PartError(str(error), remedy) from error
    if not isinstance(description, dict) or not isinstance(description.get("parts"), dict):
        raise PartError("does not describe a reference", remedy)
    return description
