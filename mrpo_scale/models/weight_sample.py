"""Whether two names stand for one model, as far as a sample of the weights of each tells."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.source import ReferenceSource, folder_at_hand, open_weights, snapshot, weight_files


def files_at_hand(source: ReferenceSource) -> list[Path]:
    """The weight files of a model that is at hand; none of any other."""
    if source.server is not None:
        return []
    try:
        folder = folder_at_hand(source)
        return [] if folder is None else weight_files(Path(folder), source.name)
    except ConfigError:  # said where the model is loaded
        return []


def sample_of(files: list[Path], name: str) -> str | None:
    """Digest of the name, type, shape, first row and middle row of every tensor: training changes some of them wherever it trains,
    and reading them takes no time. None where there are no files."""
    if not files:
        return None
    tensors: dict[str, bytes] = {}
    for file in files:
        with open_weights(file, name) as stored:
            for key in stored.keys():  # noqa: SIM118 (no mapping)
                part = stored.get_slice(key)
                shape = part.get_shape()
                rows = [part[i : i + 1] for i in (0, shape[0] // 2)] if shape and shape[0] else []
                sampled = b"".join(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)
                tensors[key] = hashlib.sha256(f"{key} {part.get_dtype()} {shape} ".encode() + sampled).digest()
    return hashlib.sha256(b"".join(tensors[key] for key in sorted(tensors))).hexdigest()


def same_model(source: ReferenceSource, path: str, revision: str | None) -> bool:
    """Whether ``path`` at ``revision`` is the model of ``source``: by name, by folder, or by what its files hold, where both are
    here."""
    if path == source.path:
        return None in (revision, source.revision) or revision == source.revision
    if Path(path).is_dir() and Path(source.path).is_dir() and Path(path).samefile(source.path):
        return True
    other = ReferenceSource(source.name, path, revision)
    try:
        here = files_at_hand(other) or weight_files(snapshot(other, local_files_only=True), source.name)
    except ConfigError:  # neither a folder nor in the hub's cache
        return False
    sample = sample_of(files_at_hand(source), source.name)
    return sample is not None and sample == sample_of(here, source.name)
