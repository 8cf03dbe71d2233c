"""What a reference's scores depend on, as a key: the cache of one reference is never read for another.

The weights enter as hashes of their **files**. Hashes of parameters in memory do not do: under ``zero.Init`` every tensor has
shape (0,), and any two models hash alike.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mrpo_scale.base.atomic_files import atomic_write
from mrpo_scale.base.errors import ConfigError
from mrpo_scale.base.untrusted import read_json

if TYPE_CHECKING:
    from mrpo_scale.data.model_text import ModelText
    from mrpo_scale.models.source import ReferenceSource

logger = logging.getLogger(__name__)

#: Raised whenever the same files would give other log-probs, so that no score of an older version is read.
SCORING = 2
_CHUNK = 1 << 22
_SHOW_PROGRESS = 1 << 30  # bytes
_CLOCK_TICK_NS = 20_000_000  # file times move in steps of up to 10 ms
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ReferenceIdentity:
    """A reference as the cache knows it. Only ``parts`` make the key: a renamed or moved model keeps its scores."""

    name: str
    parts: dict[str, Any]  #: JSON values
    path: str = ""  #: as the recipe says, for people to read

    @cached_property
    def key(self) -> str:
        """32 hex digits."""
        return hashlib.sha256(canonical_json(self.parts)).hexdigest()[:32]


def identify(source: ReferenceSource, folder: Path, text: ModelText, memo_dir: Path | None) -> ReferenceIdentity:
    """The identity of a reference. Reads each weight file once; with a memo, never again while it stays as it is.

    Args:
        folder: of the model's files: the local one or the hub snapshot.
        memo_dir: where hashes are kept, in ``file_hashes/``; None keeps none.

    Raises:
        ConfigError: a file that is missing, cannot be read or changes meanwhile; see also :func:`weight_files`.
    """
    from mrpo_scale.models.adapter_files import read_adapter  # bring transformers, which reading a cache does not need
    from mrpo_scale.models.source import weight_files

    files = weight_files(folder, source.name)
    adapter = None if source.adapter is None else read_adapter(source)
    try:
        config = (folder / "config.json").read_bytes()
        hashes = hash_files(files, memo_dir)
        of_adapter = [] if adapter is None else hash_files([adapter.file], memo_dir)
        code = _code_hashes(folder, config) if source.trust_remote_code else {}
    except OSError as error:
        raise ConfigError(
            f"{source.name}: {error.filename or folder} cannot be read ({error.strerror or error}); correct its permissions or "
            "copy the model again."
        ) from error
    parts = {
        "weights": {os.path.relpath(file, folder): digest for file, digest in zip(files, hashes, strict=True)},
        "config": hashlib.sha256(config).hexdigest(),
        "code": code,
        "text": text.fingerprint(),
        "dtype": str(source.dtype).removeprefix("torch."),
        "attn_implementation": source.attn_implementation,
        "scoring": SCORING,
        **({} if source.quantize is None else {"quantize": source.quantize}),  # others keep the keys that they had
        **({} if adapter is None else {"adapter": {**adapter.settings, "weights": of_adapter[0]}}),
    }
    return ReferenceIdentity(source.name, parts, source.path + (f" with adapter {adapter.path}" if adapter else ""))


def identify_served(source: ReferenceSource, text: ModelText) -> ReferenceIdentity:
    """The identity of a reference whose files are a server's: by the names that the user and the server have for it. Whether the
    weights behind them are still the same is found out by other means, see references/served.py."""
    parts = {
        "served": {"model": source.path, "revision": source.revision},
        "text": text.fingerprint(),
        "scoring": SCORING,
    }
    return ReferenceIdentity(source.name, parts, source.path)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def hash_files(files: Sequence[Path], memo_dir: Path | None) -> list[str]:
    """The sha256 of each file, from the hub's name for it or from the memo where either knows it.

    Raises:
        OSError: a file cannot be read.
        ConfigError: a file changes while it is read.
    """
    known = [_blob_name(file) or _recall(file, memo_dir) for file in files]
    unknown = [file for file, digest in zip(files, known, strict=True) if digest is None]
    total = sum(file.stat().st_size for file in unknown)
    lock = Lock()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="Hashing weights", disable=total < _SHOW_PROGRESS) as bar,
        ThreadPoolExecutor(max_workers=8) as threads,
    ):

        def advance(size: int) -> None:
            with lock:
                bar.update(size)

        fresh = iter(list(threads.map(lambda file: _hash_and_remember(file, memo_dir, advance), unknown)))
    return [digest if digest is not None else next(fresh) for digest in known]


def hash_file(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _code_hashes(folder: Path, config: bytes) -> dict[str, str]:
    """Of a model that brings code of its own: the hub's commit, or the hash of each Python file."""
    if "auto_map" not in json.loads(config):
        return {}
    if folder.parent.name == "snapshots":  # whose code is downloaded later, from the same commit
        return {"commit": folder.name}
    return {file.name: hash_file(file, lambda _: None) for file in sorted(folder.glob("*.py"))}


def _blob_name(file: Path) -> str | None:
    """The hub's cache names large files by their sha256, and snapshots are links to them."""
    if not file.is_symlink():
        return None
    blob = file.resolve()
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def _hash_and_remember(file: Path, memo_dir: Path | None, advance: Callable[[int], None]) -> str:
    before = _state(file)
    # A change within the clock tick of the last one would leave the file's times as they are; after this pause none can.
    if abs(time.time_ns() - max(before["mtime_ns"], before["ctime_ns"])) < _CLOCK_TICK_NS:
        time.sleep(_CLOCK_TICK_NS / 1e9)
    digest = hash_file(file, advance)
    if _state(file) != before:
        raise ConfigError(f"{file} changed while it was read; start again when nothing writes it.")
    if memo_dir is not None:
        _remember(before, digest, memo_dir)
    return digest


def _state(file: Path) -> dict[str, Any]:
    """What differs, as far as the system can tell without reading, whenever the contents do."""
    real = file.resolve()
    info = real.stat()
    return {
        "path": str(real),
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
        "inode": info.st_ino,
    }


def _recall(file: Path, memo_dir: Path | None) -> str | None:
    if memo_dir is None:
        return None
    state = _state(file)
    memo = _memo_folder(memo_dir) / _memo_name(state)
    try:
        record = read_json(memo)
        digest = record["sha256"]
        if record == _record(state, digest) and _SHA256.fullmatch(digest):
            return digest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s is not used: %s", memo, error)
    return None


def _remember(state: dict[str, Any], digest: str, memo_dir: Path) -> None:
    folder = _memo_folder(memo_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data = canonical_json(_record(state, digest))
        atomic_write(folder, lambda: _memo_name(state), data, replace=True)
    except OSError as error:
        logger.info("%s cannot be written (%s): the next run hashes %s again", folder, error, state["path"])


def _record(state: dict[str, Any], digest: str) -> dict[str, Any]:
    record = {**state, "sha256": digest}
    return {**record, "check": hashlib.sha256(canonical_json(record)).hexdigest()}


def _memo_folder(memo_dir: Path) -> Path:
    return memo_dir / "file_hashes"


def _memo_name(state: dict[str, Any]) -> str:
    return hashlib.sha256(os.fsencode(state["path"])).hexdigest()[:32] + ".json"
