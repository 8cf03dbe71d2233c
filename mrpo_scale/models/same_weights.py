"""References that are one model: it would count as often as it is named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import ReferenceSource, folder_at_hand, open_weights, weight_files


def repeated_references(plan: RunPlan, args: MRPOConfig) -> list[str]:
    """A sentence for each model that is a reference more than once, with the same text, and what weight that gives it. Of models
    whose files are not here nothing is known."""
    if args.objective == "dpo":
        return []
    groups: dict[tuple[str, int], list[int]] = {}
    sizes = [_size_of(reference.source) for reference in plan.references]
    for k, reference in enumerate(plan.references):
        # Files of one size may be one model's, however many they are and whatever their headers.
        if sum(size > 0 and abs(size - sizes[k]) <= 0.01 * size for size in sizes) < 2:
            continue
        if (digest := _sample_of(reference.source)) is not None:
            groups.setdefault((digest, reference.tokenization), []).append(k)
    return [_sentence(plan.names, same, args.ref_weights) for same in groups.values() if len(same) > 1]


def _sentence(names: Sequence[str], same: Sequence[int], ref_weights: Sequence[object]) -> str:
    word, total = str(ref_weights[0]), len(names)
    if len(ref_weights) > 1:
        given = [float(str(ref_weights[k])) for k in same]
        weight = f"`ref_weights` gives them {' + '.join(f'{w:g}' for w in given)} = {sum(given):g}"
    elif word == "uniform":
        weight = f"`ref_weights: uniform` gives them {len(same)}/{total} = {len(same) / total:.3g} together"
    else:
        weight = f"`ref_weights: {word}` gives each of them the same weight, so this model counts {len(same)} times"
    return f"references {', '.join(names[k] for k in same)} have the same weights: {weight}; name it once, unless that is meant"


def _files_of(source: ReferenceSource) -> list[Path]:
    """Of a model that is at hand; none of any other."""
    if source.server is not None:
        return []
    try:
        folder = folder_at_hand(source)
        return [] if folder is None else weight_files(Path(folder), source.name)
    except ConfigError:  # said where the model is loaded
        return []


def _size_of(source: ReferenceSource) -> int:
    return sum(file.stat().st_size for file in _files_of(source))


def _sample_of(source: ReferenceSource) -> str | None:
    """Digest of the name, type, shape, first row and middle row of every tensor: training changes some of them wherever it trains,
    and reading them takes no time. None where the files are not here."""
    files = _files_of(source)
    if not files:
        return None
    tensors: dict[str, bytes] = {}
    for file in files:
        with open_weights(file, source.name) as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                part = stored.get_slice(name)
                shape = part.get_shape()
                rows = [part[i : i + 1] for i in (0, shape[0] // 2)] if shape and shape[0] else []
                sampled = b"".join(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)
                tensors[name] = hashlib.sha256(f"{name} {part.get_dtype()} {shape} ".encode() + sampled).digest()
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()
