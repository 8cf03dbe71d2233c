"""A trained policy as an ordinary Hugging Face folder that loads as its source does: the source's key names, dtypes, small files.

transformers rewrites what it saves in the manner of its own version (``torch_dtype`` becomes ``dtype``, tokenizer classes get new
names), which other versions and other programs may not read. So the small files are the source's own, byte for byte.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mrpo_scale.base.errors import ConfigError
from mrpo_scale.models.left_out import copy_left_out, left_out
from mrpo_scale.models.source import ReferenceSource, snapshot, weight_files
from mrpo_scale.models.stored import match_names, stored_tensors

logger = logging.getLogger(__name__)

_MODEL_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
CHAT_TEMPLATE = "chat_template.jinja"


def folder_of(source: ReferenceSource) -> Path:
    """Where the files are that the policy was loaded from: of a hub id the snapshot on this machine, not what the hub has now."""
    return Path(source.path) if Path(source.path).is_dir() else snapshot(source, local_files_only=True)


def dtypes_on_disk(model: PreTrainedModel, source: Path) -> dict[str, torch.dtype]:
    """{name in ``model``: dtype of what is stored for it in the safetensors files of ``source``}; no tensor is read."""
    stored = stored_tensors(model, weight_files(source, "policy"), "policy")
    return {name: tensor.dtype for name, tensor in stored.items()}


@torch.no_grad()
def load_weights(model: Any, folder: Path) -> None:
    """Read what ``save_pretrained`` wrote back into a model in memory. The files have the names of the architecture's first days
    (GPT-NeoX: embed_out for lm_head); loaded by name, as the Trainer does, such tensors would stay what they are.

    Raises:
        ConfigError: a tensor is missing, or unknown to the model.
    """
    stored = stored_tensors(model, weight_files(folder, "policy"), "policy")
    state = model.state_dict(keep_vars=True)
    for key, names in match_names(model, stored, "policy").items():
        state[names[0]].copy_(stored[key].read())


def cast_as_stored(state: dict[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """``state`` in the dtypes of its source. Tied weights stay one tensor, or they would be written twice."""
    dtype_of = {tensor.data_ptr(): dtypes[name] for name, tensor in state.items() if name in dtypes}
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        address = tensor.data_ptr()
        if address not in cast:
            cast[address] = tensor.to(dtype_of.get(address, tensor.dtype))
    return {name: cast[tensor.data_ptr()] for name, tensor in state.items()}


def check_small_files(source: Path) -> None:
    """Check, before a run of hours, that what will be copied and published with the model is the model's own.

    Raises:
        ConfigError: a file of a local folder is a link to one elsewhere. (A hub snapshot's link to their repository's blobs.)
    """
    home = source.resolve().parents[1] if source.resolve().parent.name == "snapshots" else source.resolve()
    for name in (*_MODEL_FILES, *_TOKENIZER_FILES):
        if (source / name).is_file() and not (source / name).resolve().is_relative_to(home):
            raise ConfigError(
                f"policy: {source / name} is a link to {(source / name).resolve()}, outside the model's folder, and would be "
                "copied into the trained model; put the file itself there, or remove the link."
            )


def share_weights(folder: Path) -> None:
    """Let whoever may read the config read the weights: safetensors makes files that only their owner may read, and then a server
    of another user cannot load the model."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


@dataclass(frozen=True)
class SourceFiles:
    """What a saved model takes from its source: dtypes of tensors, and whole small files by name."""

    dtypes: Mapping[str, torch.dtype]
    small: Mapping[str, bytes]
    left_out: Mapping[Path, list[str]]  #: see left_out.py

    def write(self, folder: Path) -> None:
        """The small files over what transformers wrote to ``folder``, and the tensors that the model does not have."""
        copy_left_out(self.left_out, folder)
        for name, content in self.small.items():
            (folder / name).write_bytes(content)
        if self.left_out:
            logger.info(
                "%d tensors of %s that its causal language model does not have, such as a vision tower's, were not trained and are "
                "in %s as they were",
                *(sum(map(len, self.left_out.values())), next(iter(self.left_out)).parent, folder),
            )


def read_source_files(
    model: PreTrainedModel, source: ReferenceSource, *, tokenizer: bool, chat_template: str | None
) -> SourceFiles:
    """Read what a save will need of the policy's folder.

    Args:
        tokenizer: whether the source's tokenizer is saved; else that of the trainer.
        chat_template: Jinja text that the policy was trained with in place of its own; goes into the file that loaders prefer.

    Raises:
        ConfigError: a tensor of the model is not in the folder.
    """
    folder = folder_of(source)
    names = (*_MODEL_FILES, *(_TOKENIZER_FILES if tokenizer else ()))
    small = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if chat_template is not None:
        small[CHAT_TEMPLATE] = chat_template.encode()
    return SourceFiles(dtypes_on_disk(model, folder), small, left_out(model, folder))


@contextmanager
def unvalidated_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Let ``save_pretrained`` write the generation config as it is.

    It refuses one that was changed since it was loaded (the Trainer sets special tokens in it) and speaks of a temperature without
    sampling, as many published ones do, and writes no weights then.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    model.generation_config = _Unvalidated(config)  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = config


class _Unvalidated:
    """The one method of a generation config that ``save_pretrained`` of a model calls."""

    def __init__(self, config: GenerationConfig) -> None:
        self._config = config

    def save_pretrained(self, folder: str | Path) -> None:
        self._config.to_json_file(
            Path(folder) / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"]
        )
