"""What a model's folder holds and its causal language model does not have: a vision tower, heads that predict further tokens.

Such tensors are not trained, but the saved folder has its source's config.json, which speaks of them; whoever loads it as that
would get random numbers for them. So they are copied, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedModel

from mrpo_scale.models.source import weight_files
from mrpo_scale.models.stored import COMPUTED_BUFFERS, stored_tensors

_MOST_AT_ONCE = 16 << 20  #: bytes that are in memory while tensors are copied


def left_out(model: PreTrainedModel, source: Path) -> dict[Path, list[str]]:
    """{safetensors file of ``source``: keys of its tensors that ``model`` has under no name}. Buffers that any model computes for
    itself are none of them."""
    state = model.state_dict()
    computed = re.compile("|".join(COMPUTED_BUFFERS))
    found: dict[Path, dict[str, None]] = defaultdict(dict)
    for name, stored in stored_tensors(model, weight_files(source, "policy"), "policy").items():
        if name not in state and not computed.search(name):
            for part in stored.parts:
                found[part.file][part.key] = None  # once, of however many tensors it is a part
    return {file: list(keys) for file, keys in found.items()}


def copy_left_out(copied: Mapping[Path, list[str]], folder: Path) -> None:
    """Add to ``folder``, where a model was saved, the tensors that :func:`left_out` has found.

    They get a file of their own, so there is an index afterwards, and the files are numbered as they always are.
    """
    if not copied:
        return
    saved = weight_files(folder, "policy")
    total = len(saved) + 1
    files = [folder / f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    _copy_tensors(copied, files[-1])
    for file, numbered in zip(saved, files, strict=False):
        file.rename(numbered)
    headers = {file: _read_header(file) for file in files}
    size = sum(file.stat().st_size - start for file, (_, start) in headers.items())
    weight_map = {key: file.name for file, (header, _) in headers.items() for key in header if key != "__metadata__"}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy_tensors(keys: Mapping[Path, list[str]], target: Path) -> None:
    """A new safetensors file of the tensors ``keys`` of others."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[tuple[Path, int, int]] = []
    end = 0
    for file, names in keys.items():
        stored, start = _read_header(file)
        for key in sorted(names):
            first, last = stored[key]["data_offsets"]
            header[key] = {**stored[key], "data_offsets": [end, end + last - first]}
            parts.append((file, start + first, last - first))
            end += last - first
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with target.open("wb") as written:
        written.write(len(text).to_bytes(8, "little") + text)
        for file, start, size in parts:
            with file.open("rb") as read:
                read.seek(start)
                _copy_bytes(read, written, size)


def _copy_bytes(read: BinaryIO, written: BinaryIO, size: int) -> None:
    while size:
        data = read.read(min(size, _MOST_AT_ONCE))
        if not data:
            raise OSError(f"{read.name} ended {size} bytes early while its tensors were copied")
        written.write(data)
        size -= len(data)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(the header of a safetensors file that has been opened as such before, where its data begins)."""
    with file.open("rb") as read:
        length = int.from_bytes(read.read(8), "little")
        return json.loads(read.read(length)), 8 + length
