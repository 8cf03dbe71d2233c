"""Weights that a CPU uses as they lie in the files. All processes of a host that map a file share one copy of it, the page cache's,
so nothing has to be sharded, gathered or copied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from mrpo_scale.base.errors import TrainingError
from mrpo_scale.base.ranks import all_gather_object, fail_together, world_group
from mrpo_scale.config.keys import MRPOConfig
from mrpo_scale.models.on_disk import OnDisk
from mrpo_scale.models.source import ReferenceSource, check_config, check_weights, local_folder
from mrpo_scale.models.stored import build_on_meta, stored_tensors
from mrpo_scale.references.placement import find_nodes


def ranks_that_share(sources: Sequence[ReferenceSource], args: MRPOConfig) -> list[list[int]]:
    """Which ranks share a copy of each weight where ``ref_shard_size`` does not say it: those of a node, by sharding; or each rank
    is by itself, if all models can be mapped. Collective over the world.

    One rule for all models of a run, so that every rank meets the others in the same groups.
    """
    nodes = find_nodes()
    if args.device.type != "cpu" or args.ref_offload or args.ref_shard_size is not None:
        return nodes
    folders = [local_folder(source, world_group()) for source in sources]
    with fail_together(world_group()):
        mapped = all(_can_be_mapped(source, folder) for source, folder in zip(sources, folders, strict=True))
    if not all(all_gather_object(mapped, world_group())):
        return nodes
    return [[rank] for node in nodes for rank in node]


def _can_be_mapped(source: ReferenceSource, folder: Path) -> bool:
    config = check_config(source)
    files = check_weights(folder, config, source.name)  # before a model is built by what config.json says
    return can_be_mapped(source, build_on_meta(source, config), files)


def can_be_mapped(source: ReferenceSource, model: PreTrainedModel, files: list[Path]) -> bool:
    """Whether every tensor lies in the files as it computes, in dtype and layout; else it must be converted, into a copy."""
    return source.quantize is None and all(
        isinstance(stored, OnDisk) and stored.dtype == source.dtype
        for stored in stored_tensors(model, files, source.name).values()
    )


class MappedFiles:
    """Files whose contents are in use. Who replaces one (rename) harms nobody; who writes into one changes the model."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self._name = name
        self._open = {file: file.open("rb") for file in files}
        self._states = self._now()

    def check(self) -> None:
        """Raises TrainingError if a file was written since it was mapped."""
        for file, state in self._now().items():
            if state != self._states[file]:
                raise TrainingError(
                    f"{self._name}: {file} was written to while its weights were in use, so the scores since then may be of "
                    "neither model. Put the file back and start again; a model that must change gets a folder of its own."
                )

    def _now(self) -> Mapping[Path, tuple[int, int]]:
        """Size and time of change of the file that was opened, whatever bears its name now."""
        states = {file: os.fstat(handle.fileno()) for file, handle in self._open.items()}
        return {file: (state.st_size, state.st_mtime_ns) for file, state in states.items()}
