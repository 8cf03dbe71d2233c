"""References that are one model: it would count as often as it is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.adapter_files import ADAPTER_WEIGHTS
from mrpo_scale.models.plan import RunPlan
from mrpo_scale.models.source import ReferenceSource
from mrpo_scale.models.weight_sample import files_at_hand, sample_of


def repeated_references(plan: RunPlan, args: MRPOConfig) -> list[str]:
    """A sentence for each model that is a reference more than once, with the same text, and what weight that gives it. Of models
    whose files are not here nothing is known."""
    if args.objective == "dpo":
        return []
    groups: dict[tuple[str | None, str | None, int], list[int]] = {}
    sizes = [_size_of(reference.source) for reference in plan.references]
    for k, reference in enumerate(plan.references):
        # Files of one size may be one model's, however many they are and whatever their headers.
        if sum(size > 0 and abs(size - sizes[k]) <= 0.01 * size for size in sizes) < 2:
            continue
        if (digest := _digest(reference.source))[0] is not None:
            groups.setdefault((*digest, reference.tokenization), []).append(k)
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


def _size_of(source: ReferenceSource) -> int:
    return sum(file.stat().st_size for file in files_at_hand(source))


def _digest(source: ReferenceSource) -> tuple[str | None, str | None]:
    """Of a sample of its weights, and of its adapter's; None where the files are not here, or there is none."""
    adapter = [Path(source.adapter.files) / ADAPTER_WEIGHTS] if source.adapter else []
    return sample_of(files_at_hand(source), source.name), sample_of(adapter, source.name)
