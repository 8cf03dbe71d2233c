"""One part of a cache: a safetensors file of scored rows whose checksum covers every byte of it.

    row_key [n, 16] uint8, ascending    logps [n, 2] float32    tokens [n, 2] int32    (chosen, rejected)
    metadata: format, reference (the key of the model that scored), sha256 (of the file with 64 zeros in its own place)

Nothing of a file is believed before its checksum is verified, and no row of a file with a fault is used.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from mrpo_scale.base.hash_keys import is_ascending, is_first, sort_order
from mrpo_scale.base.untrusted import parse_json

FORMAT = "1"
KEY_BYTES = 16
PART_NAME = re.compile(r"part-([0-9a-f]{16,})-[0-9a-f]{8}\.safetensors")
_BLANK = b"0" * 64
_MAX_HEADER = 1 << 16  # ours has 400 bytes
# By how much a log-prob may exceed 0 per token: float32 rounds `logit - logsumexp` where the probability is almost 1.
_ROUNDING = 1e-4


class Rows(NamedTuple):
    """Scored rows; ``keys_N`` is an ``S16`` array, whose elements lose trailing NULs when they are turned into bytes."""

    keys_N: np.ndarray
    logps_N2: np.ndarray
    tokens_N2: np.ndarray

    def take(self, which: np.ndarray | slice) -> Rows:
        return Rows(*(column[which] for column in self))


class PartError(Exception):
    """What is wrong with a part, and the remedy."""

    def __init__(self, problem: str, remedy: str = "delete the file, and its rows are scored again") -> None:
        super().__init__(f"{problem}; {remedy}")


def part_names(folder: Path) -> list[str]:
    """The parts of a folder, the oldest first; none if there is no such folder."""
    if not folder.exists():
        return []
    with os.scandir(folder) as entries:
        found = [match for match in (PART_NAME.fullmatch(entry.name) for entry in entries) if match]
    return [name for _, name in sorted((int(match[1], 16), match[0]) for match in found)]


def next_part_name(folder: Path) -> str:
    """A name later than that of every part there is, whatever the clocks of the machines that wrote them said."""
    names = part_names(folder)
    newest = int(names[-1].split("-")[1], 16) if names else 0
    return f"part-{max(time.time_ns(), newest + 1):016x}-{secrets.token_hex(4)}.safetensors"


def make_rows(keys_N: np.ndarray, logps_N2: np.ndarray, tokens_N2: np.ndarray) -> Rows:
    """Own copies in the stored types.

    Raises:
        ValueError: dtypes or shapes that are not of rows.
    """
    keys_N, logps_N2, tokens_N2 = np.array(keys_N), np.array(logps_N2), np.array(tokens_N2)
    n = len(keys_N)
    if keys_N.dtype != f"S{KEY_BYTES}" or keys_N.shape != (n,):
        raise ValueError(f"row keys must be S{KEY_BYTES} [n], not {keys_N.dtype} {list(keys_N.shape)}")
    if logps_N2.shape != (n, 2) or tokens_N2.shape != (n, 2) or tokens_N2.dtype.kind not in "iu":
        raise ValueError(
            f"{n} keys need logps [{n}, 2] and integer tokens [{n}, 2], not {list(logps_N2.shape)} and {tokens_N2.dtype} "
            f"{list(tokens_N2.shape)}"
        )
    return Rows(keys_N, logps_N2.astype(np.float32, copy=False), tokens_N2.astype(np.int32, copy=False))


def sorted_rows(pieces: list[Rows]) -> Rows:
    """All rows by ascending key; of rows with one key the first. Empties ``pieces``, so that no column is held twice for long."""
    keys, logps, tokens = (list(column) for column in zip(*pieces, strict=True))
    pieces.clear()
    keys_N = np.concatenate(keys)
    keys.clear()
    order = sort_order(keys_N)
    keys_N = keys_N[order]
    first = is_first(keys_N)
    if not first.all():
        order, keys_N = order[first], keys_N[first]
    logps_N2 = np.concatenate(logps)[order]
    logps.clear()
    return Rows(keys_N, logps_N2, np.concatenate(tokens)[order])


def faulty_scores(rows: Rows) -> np.ndarray:
    """Bool [n]: rows with a log-prob that no model gives, or a response without tokens."""
    highest = _ROUNDING * np.maximum(rows.tokens_N2, 1)
    return ~(np.isfinite(rows.logps_N2) & (rows.logps_N2 <= highest) & (rows.tokens_N2 > 0)).all(axis=1)


def encode_part(rows: Rows, reference_key: str) -> bytearray:
    """The file's bytes, checksum included. ``rows`` are sorted."""
    tensors = {
        "row_key": np.ascontiguousarray(rows.keys_N).view(np.uint8).reshape(-1, KEY_BYTES),
        "logps": rows.logps_N2,
        "tokens": rows.tokens_N2,
    }
    metadata = {"format": FORMAT, "reference": reference_key, "sha256": _BLANK.decode()}
    data = bytearray(safetensors.numpy.save(tensors, metadata=metadata))
    at = _checksum_position(bytes(data[: 8 + _MAX_HEADER]))
    data[at : at + len(_BLANK)] = hashlib.sha256(data).hexdigest().encode()
    return data


def read_part(path: Path, reference_key: str) -> Rows:
    """Every row of a part, verified.

    Raises:
        PartError: the file is not, byte by byte, a part that this reference's scorer wrote.
        FileNotFoundError: it is gone.
    """
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            raise PartError(
                "is a link or no plain file, and a cache holds its parts itself", "put the file in its place"
            )
        if info.st_size <= 8:
            raise PartError(f"has {info.st_size} bytes, so it is not a whole part")
        with open(path, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header = _verify_bytes(mapped, reference_key)
        rows = _read_tensors(path, header)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PartError(f"cannot be read: {error.strerror or error}", "make it readable, or delete it") from error
    if not is_ascending(rows.keys_N):
        raise PartError("has rows that are not in the order of their keys")
    if faults := int(faulty_scores(rows).sum()):
        raise PartError(f"has {faults} rows with log-probs that are not finite or above 0, or without tokens")
    return rows


def _verify_bytes(data: memoryview, reference_key: str) -> dict[str, Any]:
    """The header, once the checksum says that it is what was written."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, _MAX_HEADER):
        raise PartError(f"says that its header has {length} bytes, which no part of {len(data)} bytes has")
    head = data[: 8 + length].tobytes()
    try:
        header = parse_json(head[8:].decode())
        metadata = header.pop("__metadata__")
        written_format = metadata["format"]
        if written_format != FORMAT:
            raise PartError(
                f"is of format {written_format!r}, and this version reads format {FORMAT}",
                "update mrpo_scale, or, if no newer version wrote it, delete the file, and its rows are scored again",
            )
        reference = metadata["reference"]
        at = _checksum_position(head)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartError("has a header that is not a part's") from error
    digest = hashlib.sha256(data[:at])
    digest.update(_BLANK)
    digest.update(data[at + len(_BLANK) :])
    if head[at : at + len(_BLANK)] != digest.hexdigest().encode():
        raise PartError("does not have the bytes that were written: its sha256 differs")
    if reference != reference_key:
        raise PartError(
            f"was written for the reference {reference}, not for the one of this folder",
            "move it to the folder of that name, or delete it",
        )
    return header


def _read_tensors(path: Path, header: dict[str, Any]) -> Rows:
    entries = {name: entry if isinstance(entry, dict) else {} for name, entry in header.items()}
    found = {name: [entry.get("dtype"), entry.get("shape")] for name, entry in entries.items()}
    shape = found["row_key"][1] if "row_key" in found else None
    n = shape[0] if isinstance(shape, list) and shape else 0
    wanted = {"row_key": ["U8", [n, KEY_BYTES]], "logps": ["F32", [n, 2]], "tokens": ["I32", [n, 2]]}
    if n == 0 or found != wanted:
        raise PartError(
            f"holds {found}, not row_key [n, {KEY_BYTES}] uint8, logps [n, 2] float32 and tokens [n, 2] int32"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            row_key, logps, tokens = (tensors.get_tensor(name) for name in ("row_key", "logps", "tokens"))
    except SafetensorError as error:
        raise PartError(f"is not a safetensors file ({error})") from error
    return Rows(np.ascontiguousarray(row_key).view(f"S{KEY_BYTES}").ravel(), logps, tokens)


def _checksum_position(head: bytes) -> int:
    """Where the 64 digits stand.

    Raises:
        ValueError: nowhere.
    """
    match = re.search(rb'"sha256":"[0-9a-f]{64}"', head)
    if match is None:
        raise ValueError("no sha256")
    return match.start() + len(b'"sha256":"')
