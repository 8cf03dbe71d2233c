"""Files that others made: read within bounds, and never written through a link that they left.

What a model, a cache, a recipe or a run's folder holds may have come from anywhere. Nothing here believes it: neither its size, nor
its depth, nor that it is a file at all (a FIFO would block whoever opens it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mrpo_scale.base.errors import ConfigError

_MOST_DEPTH = 100  # whoever writes a value out again, as YAML or HTML, calls itself a few times for each level
_MOST_BYTES = 64 << 20  # the index of a checkpoint with 100,000 tensors has 10 MB


def read_text(path: Path, most: int = _MOST_BYTES) -> str:
    """A UTF-8 file's text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plain file, longer than ``most`` bytes, cannot be read, or is not UTF-8; says which.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is no plain file")
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    if len(data) > most:
        raise ValueError(f"has more than {most} bytes, which no such file needs")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error})") from error


def parse_json(text: str) -> Any:
    """Like ``json.loads``, whose ValueError here also stands for text that nests too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def read_json(path: Path, most: int = _MOST_BYTES) -> Any:
    """A file's JSON value. Raises as :func:`read_text`, and ValueError where it is not JSON."""
    text = read_text(path, most)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    level, depth = [value], 0
    while level:
        level = [
            child for v in level for child in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        depth += 1
    if depth > _MOST_DEPTH:
        raise ValueError(f"is nested {depth} levels deep, which no such file is")
    return value


def printable(text: str) -> str:
    """``text`` for a terminal: what would move its cursor, or be obeyed by it, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def refuse_links(folder: Path, key: str) -> None:
    """Check a folder that is about to be written, itself a link or not: a file in it that is a link to elsewhere would have the
    other file overwritten. Links to folders, such as a cache on another disk, are left to whoever made them.

    Raises:
        ConfigError: there is such a link, or the folder cannot be read or is no folder.
    """
    try:
        links = sorted(path for path in folder.iterdir() if path.is_symlink() and not path.is_dir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"`{key}: {folder}` cannot be used ({error.strerror}); name another folder.") from error
    if links:
        raise ConfigError(
            f"`{key}`: {links[0]} is a link to {links[0].readlink()}, which would be overwritten; remove the link or name another "
            "folder."
        )
